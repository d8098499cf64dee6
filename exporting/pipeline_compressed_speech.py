"""The pipeline of the task "feature-extraction" for waveforms; transformers' own takes text alone.

Shapes: B batch, N samples at 16 kHz, T frames at 50 Hz, D width.
"""

from typing import Any

import numpy as np
from torch import Tensor
from transformers import Pipeline

from wav2vec2.embed import check_waveforms


class AudioFeatureExtractionPipeline(Pipeline):
    """``pipeline("feature-extraction", model=..., trust_remote_code=True)``.

    Takes a waveform [N] at 16 kHz, or ``{"array": waveform, "sampling_rate": 16000}`` ("raw" for "array" too), or a
    list, a generator or a dataset of these. Whatever ``batch_size`` is, each gives what it gives alone.
    """

    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = True
    _load_tokenizer = False

    def _sanitize_parameters(self, return_tensors: bool | None = None) -> tuple[dict, dict, dict]:
        return {}, {}, {} if return_tensors is None else {"return_tensors": return_tensors}

    def preprocess(self, inputs: Any) -> Any:
        """Waveform to tensors.

        Raises:
            ValueError: no waveform of one channel with full scale 1, or another sampling rate.
        """
        rate = self.feature_extractor.sampling_rate
        if hasattr(inputs, "get_all_samples"):  # the decoder that datasets gives since its version 4
            samples = inputs.get_all_samples()
            inputs = {"array": samples.data.squeeze(0), "sampling_rate": samples.sample_rate}
        if isinstance(inputs, dict):
            array = inputs.get("array", inputs.get("raw"))
            if array is None or "sampling_rate" not in inputs:
                raise ValueError(f'audio must be {{"array": ..., "sampling_rate": ...}}, got the keys {list(inputs)}')
            if inputs["sampling_rate"] != rate:
                raise ValueError(
                    f"audio of {inputs['sampling_rate']} Hz: resample it to {rate} Hz, which the model takes"
                )
            inputs = array
        (waveform,) = check_waveforms([np.asarray(inputs) if isinstance(inputs, (list, tuple)) else inputs])
        extracted = self.feature_extractor(
            waveform.cpu().numpy(), sampling_rate=rate, return_attention_mask=True, return_tensors="pt"
        )
        return extracted.to(self.model.dtype)

    def _forward(self, model_inputs: Any) -> dict[str, Tensor]:
        """The last hidden state [B, T, D] and the valid frames [B]: in a batch all are as long as the longest."""
        features = self.model.base_model(**model_inputs).last_hidden_state
        lengths = model_inputs["attention_mask"].sum(-1)
        return {"features": features, "frames": self.model._get_feat_extract_output_lengths(lengths)}

    def postprocess(self, model_outputs: dict[str, Tensor], return_tensors: bool = False) -> Any:
        """One utterance's last hidden state as a tensor [1, T, D] or nested lists."""
        features = model_outputs["features"][:, : int(model_outputs["frames"])].clone()  # not the whole batch's memory
        return features if return_tensors else features.tolist()
