"""Compressed wav2vec 2.0 / HuBERT / WavLM models for transformers: backbone, CTC head, feature-extraction pipeline.

Shapes: B batch, N samples at 16 kHz, T frames at 50 Hz, D width, V vocabulary, L layers.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from transformers import Pipeline, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from exporting.configuration_compressed_speech import CompressedSpeechConfig
from wav2vec2.model import wav2vec2_model
from wav2vec2.passes import PassOptions

IGNORED_LABEL = -100  # padding of labels, as everywhere in transformers


class CompressedSpeechPreTrainedModel(PreTrainedModel):
    """What backbone and head share."""

    config_class = CompressedSpeechConfig
    base_model_prefix = "compressed_speech"
    main_input_name = "input_values"
    input_modalities = "audio"

    def freeze_feature_encoder(self) -> None:
        """Train everything but the convolutions, as is usual in fine-tuning."""
        self.base_model.backbone.feature_extractor.requires_grad_(False)


class CompressedSpeechModel(CompressedSpeechPreTrainedModel):
    """The backbone."""

    def __init__(self, config: CompressedSpeechConfig) -> None:
        super().__init__(config)
        self.backbone = wav2vec2_model(**{**config.model_config, "aux_num_out": None})
        # torch's own weight norm computes the same; transformers renames weights of the other spelling when it loads
        position = self.backbone.encoder.transformer.pos_conv_embed
        width, _, kernel = position.conv.weight_v.shape
        conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=position.conv.groups)
        position.conv = weight_norm(conv, dim=2)
        # never trained: a buffer, since transformers makes every parameter that it loads trainable
        extractor = self.backbone.feature_extractor
        weight = extractor.dummy_weight.detach()
        del extractor.dummy_weight
        extractor.register_buffer("dummy_weight", weight)
        self.post_init()

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput | tuple:
        """Run the model; it normalises the waveform itself where it was trained so.

        Args:
            input_values: [B, N], padded on the right with zeros.
            attention_mask: [B, N], 1 on samples and 0 on padding; None when nothing is padded.
            output_hidden_states: return the L + 1 states; index 0 is the Transformer's input.
            return_dict: False for a tuple.
            kwargs: ignored.

        Returns:
            ``last_hidden_state`` [B, T, D], through the final layer norm where the model has one, and the states.
        """
        output_hidden_states = (
            self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        )
        lengths = None if attention_mask is None else attention_mask.sum(-1)
        transformer = self.backbone.encoder.transformer
        layer_drop = transformer.layer_drop if self.training else 0.0
        output, frames = self.backbone.run(input_values, lengths, PassOptions(layer_drop=layer_drop))
        num_frames = output.features.shape[1]
        states = (output.features, *(transformer.hold(state, num_frames, frames) for state in output.layers))
        last = transformer.layer_norm(states[-1]) if transformer.layer_norm_first else states[-1]
        result = BaseModelOutput(last_hidden_state=last, hidden_states=states if output_hidden_states else None)
        return result if _wants_dict(self.config, return_dict) else result.to_tuple()


class CompressedSpeechForCTC(CompressedSpeechPreTrainedModel):
    """The backbone with a linear layer over characters."""

    def __init__(self, config: CompressedSpeechConfig) -> None:
        super().__init__(config)
        self.compressed_speech = CompressedSpeechModel(config)
        self.dropout = nn.Dropout(config.final_dropout)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput | tuple:
        """Logits [B, T, V], and the CTC loss where ``labels`` [B, S] are given (-100 on padding).

        The other arguments are those of the backbone.
        """
        outputs = self.compressed_speech(input_values, attention_mask, output_hidden_states, return_dict=True)
        logits = self.lm_head(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            num_samples = torch.full((len(input_values),), input_values.shape[1], device=logits.device)
            lengths = num_samples if attention_mask is None else attention_mask.sum(-1)
            real = labels != IGNORED_LABEL
            log_probs = F.log_softmax(logits, dim=-1, dtype=torch.float32).transpose(0, 1)
            with torch.backends.cudnn.flags(enabled=False):  # cuDNN's CTC refuses some lengths
                loss = F.ctc_loss(
                    log_probs,
                    labels[real],
                    self.compressed_speech.backbone.output_length(lengths),
                    real.sum(-1),
                    blank=self.config.pad_token_id,
                    reduction=self.config.ctc_loss_reduction,
                    zero_infinity=self.config.ctc_zero_infinity,
                )
        result = CausalLMOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)
        return result if _wants_dict(self.config, return_dict) else result.to_tuple()


class AudioFeatureExtractionPipeline(Pipeline):
    """``pipeline("feature-extraction", model=..., trust_remote_code=True)``, whose own version takes text alone.

    Takes a waveform [N] at 16 kHz, or ``{"array": waveform, "sampling_rate": 16000}``, or a list of these.
    """

    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = True
    _load_tokenizer = False

    def _sanitize_parameters(self, return_tensors: bool = False, **kwargs: Any) -> tuple[dict, dict, dict]:
        return {}, {}, {"return_tensors": return_tensors}

    def preprocess(self, inputs: Any) -> Any:
        """Waveform to tensors; another sampling rate is an error."""
        rate = self.feature_extractor.sampling_rate
        if isinstance(inputs, dict):
            inputs, rate = inputs["array"], inputs["sampling_rate"]
        return self.feature_extractor(inputs, sampling_rate=rate, return_tensors="pt")

    def _forward(self, model_inputs: Any) -> Any:
        return self.model(**model_inputs)

    def postprocess(self, model_outputs: Any, return_tensors: bool) -> Any:
        """The last hidden state as a tensor [1, T, D] or nested lists."""
        features = model_outputs[0]
        return features if return_tensors else features.tolist()


def _wants_dict(config: CompressedSpeechConfig, return_dict: bool | None) -> bool:
    return getattr(config, "return_dict", True) if return_dict is None else return_dict
