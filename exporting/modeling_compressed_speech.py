"""Compressed wav2vec 2.0 / HuBERT / WavLM models for transformers: backbone, CTC head, classification head.

Shapes: B batch, N samples at 16 kHz, T frames at 50 Hz, T' frames of a time-reduced model's layers, D width, H heads,
V vocabulary, L layers. No method takes arguments that it does not know: Trainer would count on one that does to divide
the loss by the batches of an update.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput, SequenceClassifierOutput

from exporting.configuration_compressed_speech import CompressedSpeechConfig

# unused here: save_pretrained copies the files that this one imports, and config.json names this one for the pipeline
from exporting.pipeline_compressed_speech import AudioFeatureExtractionPipeline as AudioFeatureExtractionPipeline
from wav2vec2.attention import AttentionMap
from wav2vec2.feature_extractor import valid_frames
from wav2vec2.model import wav2vec2_model
from wav2vec2.passes import PassOptions

IGNORED_LABEL = -100  # of the classes, as everywhere in transformers
IMPOSSIBLE = -1e4  # a logit whose probability is 0 beside one of 0, in half precision too


class CompressedSpeechPreTrainedModel(PreTrainedModel):
    """What backbone and heads share."""

    config_class = CompressedSpeechConfig
    base_model_prefix = "compressed_speech"
    main_input_name = "input_values"
    input_modalities = "audio"
    supports_gradient_checkpointing = True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CompressedSpeechForSequenceClassification) and module.layer_weights is not None:
            nn.init.constant_(module.layer_weights, 1 / len(module.layer_weights))

    def freeze_feature_encoder(self) -> None:
        """Train everything but the convolutions, as is usual in fine-tuning."""
        self.base_model.backbone.feature_extractor.requires_grad_(False)

    @property
    def _shortest(self) -> int:
        """Samples of one frame."""
        return self.base_model.backbone.feature_extractor.receptive_field

    def freeze_base_model(self) -> None:
        """Train the head alone."""
        self.base_model.requires_grad_(False)

    def _get_feat_extract_output_lengths(self, input_lengths: Tensor | int) -> Tensor | int:
        """Frames from samples, under the name that scripts for transformers' speech models call."""
        output_length = self.base_model.backbone.output_length
        if isinstance(input_lengths, Tensor):
            return output_length(input_lengths)
        return int(output_length(torch.tensor(input_lengths)))

    def _get_feature_vector_attention_mask(self, feature_vector_length: int, attention_mask: Tensor) -> Tensor:
        """Bool [B, T], True on the frames that see no padding, from the mask [B, N] of the samples."""
        frames = self.base_model.backbone.output_length(_lengths(attention_mask))
        return valid_frames(frames, feature_vector_length)


class CompressedSpeechModel(CompressedSpeechPreTrainedModel):
    """The backbone.

    Gradient checkpointing keeps the inputs of the layers alone and runs each again in the backward pass, always by
    torch's non-reentrant way: the gradients are the same whatever ``gradient_checkpointing_kwargs`` say.
    """

    def __init__(self, config: CompressedSpeechConfig) -> None:
        super().__init__(config)
        self.backbone = wav2vec2_model(**{**config.model_config, "aux_num_out": None})
        self.gradient_checkpointing = False
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
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput | tuple:
        """Run the model; it normalises the waveform itself where it was trained so.

        Args:
            input_values: [B, N], padded on the right with zeros.
            attention_mask: [B, N], 1 on samples and 0 on padding; None when nothing is padded.
            output_attentions: return the L attention maps [B, H, T', T'] before dropout. H is what pruning has left in
                that layer, and 0 in a layer without attention or one that LayerDrop skips; a layer that reuses a map
                returns the one that it applies.
            output_hidden_states: return the L + 1 states; index 0 is the Transformer's input.
            return_dict: False for a tuple.

        Returns:
            ``last_hidden_state`` [B, T, D], through the final layer norm where the model has one, the states and the
            maps.

        Raises:
            ValueError: a mask of another shape, or with padding before samples.
        """
        config = self.config
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        lengths = None
        if attention_mask is not None:
            _check_mask(attention_mask, input_values)
            lengths = _lengths(attention_mask)
        missing = self._shortest - input_values.shape[-1]
        if missing > 0:  # of one frame; there is none, as such a row has none in a longer batch
            input_values = F.pad(input_values, (0, missing))
            lengths = input_values.new_zeros(len(input_values), dtype=torch.long)
        transformer = self.backbone.encoder.transformer
        options = PassOptions(
            layer_drop=transformer.layer_drop if self.training else 0.0,
            keep_maps=output_attentions,
            recompute=self.gradient_checkpointing and self.training,
        )
        with self._recorded_maps() if output_attentions else nullcontext({}) as maps:
            output, frames = self.backbone.run(input_values, lengths, options)
        num_frames = output.features.shape[1]
        states = (output.features, *(transformer.hold(state, num_frames, frames) for state in output.layers))
        if missing > 0:
            states = tuple(state[:, :0] for state in states)
        last = transformer.layer_norm(states[-1]) if transformer.layer_norm_first else states[-1]
        attentions = None
        if output_attentions:
            rows, short, _ = output.layer_input.shape
            none = output.layer_input.new_zeros(rows, 0, short, short)
            attentions = tuple(maps.get(layer, none) for layer in range(len(transformer.layers)))
        result = BaseModelOutput(
            last_hidden_state=last, hidden_states=states if output_hidden_states else None, attentions=attentions
        )
        return result if _wants_dict(config, return_dict) else result.to_tuple()

    @contextmanager
    def _recorded_maps(self) -> Iterator[dict[int, Tensor]]:
        """The map [B, H, T', T'] that each layer's attention applies, by layer, of the pass that runs within."""
        maps: dict[int, Tensor] = {}

        def record(layer: int, module: nn.Module, inputs: tuple, output: tuple[Tensor, AttentionMap]) -> None:
            maps[layer] = output[1].applied

        with ExitStack() as handles:
            for i, layer in enumerate(self.backbone.encoder.transformer.layers):
                if layer.attention is not None:
                    handles.enter_context(layer.attention.register_forward_hook(partial(record, i)))
            yield maps


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
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutput | tuple:
        """Logits [B, T, V], and the CTC loss where ``labels`` [B, S] are given (negative on padding).

        Frames of padding are blanks, since the pipeline and most scripts decode them too. The other arguments are
        those of the backbone.

        Raises:
            ValueError: labels that the vocabulary does not have, or labels of a batch without a frame, besides those of
                the backbone.
        """
        if labels is not None and (labels >= self.config.vocab_size).any():
            raise ValueError(f"labels: {int(labels.max())} is not in the vocabulary of {self.config.vocab_size}")
        outputs = self.compressed_speech(
            input_values, attention_mask, output_attentions, output_hidden_states, return_dict=True
        )
        logits = self.lm_head(self.dropout(outputs.last_hidden_state))
        if attention_mask is not None:
            valid = self._get_feature_vector_attention_mask(logits.shape[1], attention_mask)
            blank = logits.new_full(logits.shape[-1:], IMPOSSIBLE)
            blank[self.config.pad_token_id] = 0.0
            logits = torch.where(valid[..., None], logits, blank)
        loss = None
        if labels is not None:
            if logits.shape[1] == 0:
                raise ValueError(f"utterances of fewer than {self._shortest} samples have no frame to transcribe")
            num_samples = torch.full((len(input_values),), input_values.shape[1], device=logits.device)
            lengths = num_samples if attention_mask is None else _lengths(attention_mask)
            real = labels >= 0
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
        result = CausalLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
        return result if _wants_dict(self.config, return_dict) else result.to_tuple()


class CompressedSpeechForSequenceClassification(CompressedSpeechPreTrainedModel):
    """The backbone with classes for whole utterances: a projection, its mean over the frames, and a linear layer.

    With ``use_weighted_layer_sum`` the projection sees a learned mean of all L + 1 states, as in SUPERB
    (https://arxiv.org/abs/2105.01051), instead of the last one.
    """

    def __init__(self, config: CompressedSpeechConfig) -> None:
        super().__init__(config)
        self.compressed_speech = CompressedSpeechModel(config)
        num_states = config.num_hidden_layers + 1
        self.layer_weights: nn.Parameter | None = None
        if config.use_weighted_layer_sum:
            self.layer_weights = nn.Parameter(torch.full((num_states,), 1 / num_states))
        self.projector = nn.Linear(config.hidden_size, config.classifier_proj_size)
        self.classifier = nn.Linear(config.classifier_proj_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple:
        """Logits [B, ``num_labels``], and their cross-entropy where ``labels`` [B] are given (-100: does not count).

        The mean is that of the valid frames. The other arguments are those of the backbone.

        Raises:
            ValueError: a row without a frame, labels that are no classes, or a problem that is not to find one class
                per row; besides those of the backbone.
        """
        if labels is not None:
            self._check_classes(labels, len(input_values))
        wants_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        outputs = self.compressed_speech(
            input_values,
            attention_mask,
            output_attentions,
            wants_states or self.layer_weights is not None,
            return_dict=True,
        )
        x = outputs.last_hidden_state
        if self.layer_weights is not None:
            shares = self.layer_weights.softmax(-1)
            x = sum(share * state for share, state in zip(shares, outputs.hidden_states))
        x = self.projector(x)
        mask = torch.ones_like(input_values) if attention_mask is None else attention_mask
        valid = self._get_feature_vector_attention_mask(x.shape[1], mask)
        if not valid.any(-1).all():
            raise ValueError(f"an utterance of fewer than {self._shortest} samples has no frame to classify")
        shares = valid / valid.sum(-1, keepdim=True)
        logits = self.classifier((x * shares[..., None].to(x.dtype)).sum(1))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits, labels.view(-1).long(), ignore_index=IGNORED_LABEL)
        result = SequenceClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states if wants_states else None,
            attentions=outputs.attentions,
        )
        return result if _wants_dict(self.config, return_dict) else result.to_tuple()

    def _check_classes(self, labels: Tensor, num_rows: int) -> None:
        """Refuse what cross-entropy does not take, or what would stop a GPU."""
        problem, num_labels = self.config.problem_type, self.config.num_labels
        if problem not in (None, "single_label_classification"):
            raise ValueError(f"problem_type {problem!r}: this class only does 'single_label_classification'")
        if labels.is_floating_point() or labels.numel() != num_rows:
            raise ValueError(
                f"labels {list(labels.shape)} of {labels.dtype}: must be the number of a class per row, [{num_rows}]"
            )
        wrong = labels[((labels < 0) & (labels != IGNORED_LABEL)) | (labels >= num_labels)]
        if len(wrong):
            raise ValueError(f"labels: {int(wrong[0])} is none of the {num_labels} classes (num_labels)")


def _lengths(attention_mask: Tensor) -> Tensor:
    """Samples [B] of a mask [B, N] of any type."""
    return attention_mask.bool().sum(-1)


def _check_mask(attention_mask: Tensor, input_values: Tensor) -> None:
    if attention_mask.shape != input_values.shape:
        raise ValueError(
            f"attention_mask {list(attention_mask.shape)} must have the shape of input_values "
            f"{list(input_values.shape)}: one value per sample"
        )
    if attention_mask.device.type == "cpu":  # elsewhere it would wait
        mask = attention_mask.bool()
        if (mask[:, 1:] & ~mask[:, :-1]).any():
            raise ValueError("attention_mask has padding before samples; pad on the right (padding_side='right')")


def _wants_dict(config: CompressedSpeechConfig, return_dict: bool | None) -> bool:
    return getattr(config, "return_dict", True) if return_dict is None else return_dict
