"""Configuration of a compressed wav2vec 2.0 / HuBERT / WavLM model for transformers."""

import math
from typing import Any

from transformers import PretrainedConfig


class CompressedSpeechConfig(PretrainedConfig):
    """Sizes per layer, and what the heads need.

    Args:
        model_config: flat config of the network; lists give the heads and feed-forward units of each layer.
        vocab_size: outputs of the CTC head.
        final_dropout: before the CTC head.
        ctc_loss_reduction: "mean" or "sum" over the batch.
        ctc_zero_infinity: an utterance with more characters than frames counts as 0, not as infinity.
        pad_token_id: the CTC blank.
        use_weighted_layer_sum: classify a learned mean of all states, not the last one.
        classifier_proj_size: width of the projection before the classes.
    """

    model_type = "compressed_speech"

    def __init__(
        self,
        model_config: dict[str, Any] | None = None,
        vocab_size: int = 32,
        final_dropout: float = 0.1,
        ctc_loss_reduction: str = "mean",
        ctc_zero_infinity: bool = True,
        pad_token_id: int = 0,
        use_weighted_layer_sum: bool = False,
        classifier_proj_size: int = 256,
        **kwargs: Any,
    ) -> None:
        super().__init__(pad_token_id=pad_token_id, **kwargs)
        self.model_config = model_config or {}
        self.vocab_size = vocab_size
        self.final_dropout = final_dropout
        self.ctc_loss_reduction = ctc_loss_reduction
        self.ctc_zero_infinity = ctc_zero_infinity
        self.use_weighted_layer_sum = use_weighted_layer_sum
        self.classifier_proj_size = classifier_proj_size

    @property
    def hidden_size(self) -> int:
        """Width of every state."""
        return self.model_config["encoder_embed_dim"]

    @property
    def num_hidden_layers(self) -> int:
        """Transformer layers."""
        return self.model_config["encoder_num_layers"]

    @property
    def inputs_to_logits_ratio(self) -> int:
        """Samples per frame; the pipelines cut long audio at multiples of it."""
        return math.prod(stride for _, _, stride in self.model_config["extractor_conv_layer_config"])
