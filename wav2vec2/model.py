"""The prunable wav2vec 2.0 / HuBERT / WavLM model: one class for full, masked and pruned networks.

Shapes: B batch, N samples at 16 kHz, T frames at 50 Hz, D Transformer width, L layers.
"""

import copy
import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .attention import Buckets, SelfAttention, WavLMSelfAttention
from .config import check_config
from .counting import count_params
from .embed import batches_by_length, check_waveforms, pad
from .feature_extractor import SAMPLE_RATE, ConvLayerBlock, FeatureExtractor, FeatureProjection, valid_frames
from .hardconcrete import Alive, Gates, HardConcrete, Prunable, alive_probabilities, draw_gates
from .head_channels import HeadChannels
from .inputs import check_batch, check_index, check_lengths
from .kernels import traced
from .passes import HiddenStates, PassOptions, ScaleGradient
from .resampling import check_rate, resample, resampled_length
from .statistics import Statistics
from .transformer import ConvolutionalPositionalEmbedding, Encoder, EncoderLayer, FeedForward, Transformer

RELEASED_EPS = 1e-5  # added to the variance of a waveform by fairseq, torchaudio and the released DPHuBERT
# keys of the flat config that a HuBERT, a WavLM or an ordinary student does not have
ABSENT = {
    "encoder_use_projection",
    "encoder_projection_layer_norm",
    "encoder_time_reduction",
    "encoder_reuse_attention",
    "encoder_reuse_softmax",
    "encoder_num_heads",
    "encoder_head_dim",
    "encoder_total_num_heads",
    "encoder_remaining_heads",
    "encoder_head_channels",
    "encoder_prune_attention_head_channels",
    "encoder_num_buckets",
    "encoder_max_distance",
}


def normalize(waveforms: Tensor, lengths: Tensor | None, eps: float, whole: Statistics | None = None) -> Tensor:
    """Zero mean and unit variance per row [B, N] over its valid samples, or over the ``whole`` that it is a piece of.

    Padding stays zero.
    """
    if whole is not None:
        scaled = ((waveforms - whole.mean[:, None]) * torch.rsqrt(whole.variance + eps)[:, None]).to(waveforms.dtype)
        return scaled if lengths is None else scaled * valid_frames(lengths, waveforms.shape[-1])
    if lengths is None:
        variance, mean = torch.var_mean(waveforms, dim=-1, correction=0, keepdim=True)
        return (waveforms - mean) * torch.rsqrt(variance + eps)
    valid = valid_frames(lengths, waveforms.shape[-1]).to(waveforms.dtype)
    count = lengths.clamp(min=1)[:, None]
    mean = (waveforms * valid).sum(-1, keepdim=True) / count
    variance = ((waveforms - mean).square() * valid).sum(-1, keepdim=True) / count
    return (waveforms - mean) * torch.rsqrt(variance + eps) * valid


class Wav2Vec2Model(nn.Module):
    """Build it with :func:`wav2vec2_model`, load it with :func:`wav2vec2.load_model`."""

    def __init__(
        self,
        normalize_waveform: bool | float,
        feature_extractor: FeatureExtractor,
        encoder: Encoder,
        aux: nn.Linear | None,
        config: dict[str, Any],
    ) -> None:
        super().__init__()
        self.normalize_waveform = normalize_waveform
        self.feature_extractor = feature_extractor
        self.encoder = encoder
        self.aux = aux
        self.config = config  # flat: ``wav2vec2_model(**model.config)`` builds this network
        # [D], replaces masked frames in pre-training; load_checkpoint sets it where the file holds one
        self.register_buffer("mask_embedding", None, persistent=False)
        self.mask_embedding: Tensor | None
        # of the output layer's V symbols, the blank first (wav2vec2.vocabulary); in files an entry of its own
        self.vocabulary: list[str] | None = None

    @property
    def num_layers(self) -> int:
        """Transformer layers L."""
        return len(self.encoder.transformer.layers)

    @property
    def embed_dim(self) -> int:
        """Transformer width D."""
        return self.config["encoder_embed_dim"]

    @property
    def normalize_eps(self) -> float | None:
        """What is added to the variance of a waveform that is normalised; None where it is not."""
        if not self.normalize_waveform:
            return None
        return RELEASED_EPS if self.normalize_waveform == 1 else float(self.normalize_waveform)

    @property
    def takes_statistics(self) -> bool:
        """Whether a frame depends on statistics over the whole waveform, not on the samples around it alone."""
        first = self.feature_extractor.conv_layers[0]
        return self.normalize_eps is not None or isinstance(first.layer_norm, nn.GroupNorm)

    def masks(self) -> dict[str, HardConcrete]:
        """Every Hard Concrete mask by its module path, in forward order. Empty for a dense model."""
        return {name: module for name, module in self.named_modules() if isinstance(module, HardConcrete)}

    def draw_gates(self) -> Gates:
        """One sample of every mask in training, the deterministic gates in eval."""
        return draw_gates(self.masks().values(), self.training)

    def output_length(self, lengths: Tensor) -> Tensor:
        """Frames [B] from samples [B]; ValueError where these are no int64 tensor."""
        check_lengths(lengths)
        return self.feature_extractor.output_length(lengths)

    def symbol_frames(self, lengths: Tensor) -> Tensor:
        """Frames [B] in which ``aux`` can write a symbol, from samples [B].

        A model that merges frames repeats its last state for all of them: they hold one symbol together.
        """
        frames, merged = self.output_length(lengths), self.encoder.transformer.reduction
        return (frames // merged).maximum(frames.clamp(max=1))

    def extract_features(
        self,
        waveforms: Tensor,
        lengths: Tensor | None = None,
        num_layers: int | None = None,
        gates: Gates | None = None,
    ) -> tuple[list[Tensor], Tensor | None]:
        """All hidden states, as used by SUPERB. Layers of a time-reduced model are held for as many frames.

        Args:
            waveforms: [B, N], zero padded.
            lengths: [B] valid samples; None when nothing is padded.
            num_layers: stop after that many layers.
            gates: masks to use; by default they are drawn.

        Returns:
            L + 1 tensors [B, T, D] (index 0 is the Transformer's input, before the positional convolution; the final
            layer norm of pre-norm models is not applied, as in torchaudio) and the valid frames [B], or None.

        Raises:
            ValueError: as :meth:`run`.
        """
        output, frames = self.run(waveforms, lengths, PassOptions(num_layers=num_layers), gates)
        num_frames = output.features.shape[1]
        layers = [self.encoder.transformer.hold(state, num_frames, frames) for state in output.layers]
        return [output.features, *layers], frames

    @torch.no_grad()
    def embed(
        self, waveforms: Tensor | Iterable[Tensor], layer: int = -1, *, sample_rate: int = SAMPLE_RATE
    ) -> list[Tensor]:
        """Features of whole waveforms of any lengths, without gradients and as in eval mode.

        Args:
            waveforms: one [N] with full scale 1, a list of them, or [B, N] without padding: tensors, or numpy arrays of
                floats. They go to the model's device in batches of similar length.
            layer: which state of :meth:`extract_features`; -1 is the last layer.
            sample_rate: of all waveforms, in Hz; others than 16 kHz are resampled.

        Returns:
            [T, D] of each waveform; T is 0 for one shorter than 400 samples at 16 kHz.

        Raises:
            ValueError: another shape or type, samples that are not finite, no such layer, or no such rate.
        """
        num_states = self.num_layers + 1
        states_of = f"the model has states 0 (the Transformer's input) to {self.num_layers}"
        layer = check_index("layer", layer, -num_states, self.num_layers, states_of) % num_states
        rows, rate = check_waveforms(waveforms), check_rate(sample_rate)
        shortest, weight = self.feature_extractor.receptive_field, self.feature_extractor.dummy_weight
        precision = torch.promote_types(weight.dtype, torch.float32)
        features: list[Tensor] = [weight.new_empty(0)] * len(rows)
        training = self.training
        self.eval()
        try:
            for batch in batches_by_length([resampled_length(len(row), rate) for row in rows], shortest):
                resampled = [resample(rows[i].to(weight.device, precision), rate) for i in batch]
                padded, lengths = pad(resampled, shortest, weight)
                states, frames = self.extract_features(padded, lengths, num_layers=layer)
                assert frames is not None
                for i, state, count in zip(batch, states[-1], frames.tolist()):
                    features[i] = state[:count].clone()
        finally:
            self.train(training)
        return features

    def frame_times(self, num_frames: int) -> Tensor:
        """Middle of each frame in seconds from the start of the audio, float64 [num_frames]."""
        check_index("num_frames", num_frames, 0, math.inf, "must not be negative")
        return self.feature_extractor.frame_times(num_frames)

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The last layer's output [B, T, D], normalised in pre-norm models, through ``aux`` where there is one.

        Same arguments as :meth:`extract_features`; unlike there, layers drop out in training.
        """
        layer_drop = self.encoder.transformer.layer_drop if self.training else 0.0
        output, frames = self.run(waveforms, lengths, PassOptions(layer_drop=layer_drop))
        return self.output(output, frames), frames

    def output(self, states: HiddenStates, frames: Tensor | None) -> Tensor:
        """What :meth:`forward` gives, from the states of a pass through all layers.

        Args:
            states: what :meth:`run` returns.
            frames: [B] valid frames of the features; None when nothing is padded.
        """
        hold, num_frames = self.encoder.transformer.hold, states.features.shape[1]
        return self.project(hold(states.layers[-1], num_frames, frames) if states.layers else states.features)

    def project(self, x: Tensor) -> Tensor:
        """The last layer's states [B, T, D], normalised in pre-norm models, through ``aux`` where there is one."""
        transformer = self.encoder.transformer
        x = transformer.layer_norm(x) if transformer.layer_norm_first else x
        return x if self.aux is None else self.aux(x)

    def run(
        self,
        waveforms: Tensor,
        lengths: Tensor | None = None,
        options: PassOptions | None = None,
        gates: Gates | None = None,
    ) -> tuple[HiddenStates, Tensor | None]:
        """The forward pass, in all detail: what training looks at.

        Args:
            waveforms: [B, N], zero padded.
            lengths: [B] valid samples; None when nothing is padded.
            options: how to run; masked frames take the model's own mask embedding where the options name none.
            gates: masks to use; by default they are drawn.

        Returns:
            The states, and the valid frames [B] of the features, or None.

        Raises:
            ValueError: waveforms or lengths of another shape, type or device, fewer samples than one frame takes, no
                such number of layers, or masked frames without a mask embedding. On a GPU, which would have to be
                waited for, lengths beyond 0 to N are not noticed.
        """
        options = options or PassOptions()
        if options.masked is not None and options.mask_embedding is None:
            if self.mask_embedding is None:
                raise ValueError("the model has no mask embedding: its file was converted without")
            options = dataclasses.replace(options, mask_embedding=self.mask_embedding)
        if not traced():
            weight, shortest = self.feature_extractor.conv_layers[0].conv.weight, self.feature_extractor.receptive_field
            check_batch(waveforms, lengths, weight, shortest)
            if options.num_layers is not None:
                layers = f"the model has {self.num_layers} layers"
                check_index("num_layers", options.num_layers, 0, self.num_layers, layers)
        if gates is None:
            gates = self.draw_gates()
        statistics = options.statistics
        if self.normalize_eps is not None:
            waveforms = normalize(waveforms, lengths, self.normalize_eps, statistics)
            statistics = None if statistics is None else statistics.normalized(self.normalize_eps)
        features, frames = self.feature_extractor(waveforms, lengths, gates, statistics)
        if options.extractor_gradient != 1.0:
            features = ScaleGradient.apply(features, options.extractor_gradient)
        gate_in = self.feature_extractor.conv_layers[-1].hard_concrete
        return self.encoder.hidden_states(features, frames, gates, gate_in, options), frames

    def get_num_params(self, alive: Alive | None = None) -> Tensor:
        """Expected number of parameters (masks themselves excluded) as a float64 scalar.

        Differentiable in every ``log_alpha``; equal to the counted parameters of the pruned model when every unit is
        certain to live or to be dropped.

        Args:
            alive: probability of each unit of a mask; by default what the masks say.
        """
        alive = alive or alive_probabilities(self.masks().values())
        extractor, encoder = self.feature_extractor, self.encoder
        channels = extractor.num_live(alive)
        total = extractor.num_params(channels) + encoder.feature_projection.num_params(channels[-1])
        total = total + encoder.transformer.num_params(alive) + count_params(self.aux)
        return total if isinstance(total, Tensor) else torch.tensor(total, dtype=torch.float64)

    def get_num_macs(self, num_samples: int | Sequence[int], alive: Alive | None = None) -> Tensor:
        """Expected multiply-accumulates of :meth:`extract_features` as a float64 scalar, in closed form.

        Counted: convolutions, linear layers, and both products of the attention (queries with keys, weights with
        values). Not counted, as in the usual counters: norms, activations, softmax, lookups and other work per element.
        Differentiable in every ``log_alpha``.

        Args:
            num_samples: length of an utterance at 16 kHz; for several, each runs alone and the sum is returned.
            alive: as for :meth:`get_num_params`.
        """
        alive = alive or alive_probabilities(self.masks().values())
        samples = list(num_samples) if isinstance(num_samples, Iterable) else [num_samples]
        checked = [check_index("num_samples", n, 0, math.inf, "must not be negative") for n in samples]
        lengths = torch.tensor(checked, dtype=torch.int64)
        extractor, encoder = self.feature_extractor, self.encoder
        frames = extractor.output_length(lengths)
        channels = extractor.num_live(alive)
        total = extractor.num_macs(lengths, channels)
        total = total + encoder.feature_projection.num_macs(frames, channels[-1])
        total = total + encoder.transformer.num_macs(frames, alive)
        return total if isinstance(total, Tensor) else torch.tensor(total, dtype=torch.float64)


def wav2vec2_model(
    *,
    extractor_mode: str,
    extractor_conv_layer_config: Sequence[Sequence[int]],
    extractor_conv_bias: bool,
    encoder_embed_dim: int,
    encoder_projection_dropout: float,
    encoder_pos_conv_kernel: int,
    encoder_pos_conv_groups: int,
    encoder_num_layers: int,
    encoder_use_attention: Sequence[bool],
    encoder_use_feed_forward: Sequence[bool],
    encoder_num_heads: Sequence[int] | None = None,
    encoder_head_dim: int | None = None,
    encoder_total_num_heads: Sequence[int] | None = None,
    encoder_remaining_heads: Sequence[Sequence[int]] | None = None,
    encoder_num_buckets: int | None = None,
    encoder_max_distance: int | None = None,
    encoder_attention_dropout: float,
    encoder_ff_interm_features: Sequence[int],
    encoder_ff_interm_dropout: float,
    encoder_dropout: float,
    encoder_layer_norm_first: bool,
    encoder_layer_drop: float,
    aux_num_out: int | None,
    normalize_waveform: bool | float,
    extractor_prune_conv_channels: bool = False,
    encoder_prune_attention_heads: bool = False,
    encoder_prune_attention_layer: bool = False,
    encoder_prune_feed_forward_intermediate: bool = False,
    encoder_prune_feed_forward_layer: bool = False,
    encoder_use_projection: bool | None = None,
    encoder_projection_layer_norm: bool | None = None,
    encoder_time_reduction: int | None = None,
    encoder_reuse_attention: Sequence[bool] | None = None,
    encoder_reuse_softmax: bool | None = None,
    encoder_head_channels: Sequence[Sequence[Sequence[int]]] | None = None,
    encoder_prune_attention_head_channels: bool | None = None,
) -> Wav2Vec2Model:
    """Build a model with random weights from a flat config, the ``config`` of a ``.pth`` file.

    Args:
        extractor_mode: "group_norm" (on the first conv layer) or "layer_norm" (on every one).
        extractor_conv_layer_config: (channels, kernel, stride) per conv layer.
        extractor_conv_bias: bias of the conv layers.
        encoder_embed_dim: Transformer width D.
        encoder_projection_dropout: after the feature projection.
        encoder_pos_conv_kernel: frames that the positional convolution sees.
        encoder_pos_conv_groups: its groups.
        encoder_num_layers: L.
        encoder_use_attention: per layer, whether it has an attention block.
        encoder_use_feed_forward: per layer, whether it has a feed-forward block.
        encoder_num_heads: heads per layer.
        encoder_head_dim: width of a head.
        encoder_total_num_heads: WavLM only, heads per layer before pruning.
        encoder_remaining_heads: WavLM only, which of these each layer has.
        encoder_num_buckets: WavLM only, buckets of the relative positions.
        encoder_max_distance: WavLM only, frames beyond which they share one.
        encoder_attention_dropout: on the attention weights.
        encoder_ff_interm_features: FFN units per layer.
        encoder_ff_interm_dropout: after the FFN activation.
        encoder_dropout: after attention, FFN and positional convolution.
        encoder_layer_norm_first: pre-norm (Large) or post-norm (Base).
        encoder_layer_drop: probability of skipping a layer in ``forward`` in training.
        aux_num_out: width of a linear output layer, or None.
        normalize_waveform: zero mean and unit variance before the first layer; True adds 1e-5 to the variance, as
            fairseq, torchaudio and the released files do, a number adds that one. Older readers take it for True.
        extractor_prune_conv_channels: mask the conv channels.
        encoder_prune_attention_heads: mask the heads.
        encoder_prune_attention_layer: mask whole attention blocks.
        encoder_prune_feed_forward_intermediate: mask the FFN units.
        encoder_prune_feed_forward_layer: mask whole feed-forward blocks.
        encoder_use_projection: False for students without a linear map between extractor and Transformer, whose last
            conv layer is then not prunable.
        encoder_projection_layer_norm: False for DistilHuBERT, which has no layer norm before the feature projection.
        encoder_time_reduction: students only, frames merged into one before the first layer.
        encoder_reuse_attention: students only, per layer whether it reuses the attention map of the nearest earlier
            layer that computes one.
        encoder_reuse_softmax: put reused maps through a second softmax, as the released ARMHuBERT does.
        encoder_head_channels: where heads are not all of one width, per layer and head how many channels it has of
            queries and keys, and how many of values; ``encoder_head_dim`` is then the width of the whole heads.
        encoder_prune_attention_head_channels: mask these, one by one.

    Raises:
        ValueError: a value out of range, or lists whose length is not ``encoder_num_layers``.
    """
    config = {name: copy.deepcopy(value) for name, value in locals().items() if name not in ABSENT or value is not None}
    if not encoder_prune_attention_head_channels:
        config.pop("encoder_prune_attention_head_channels", None)
    is_wavlm = encoder_remaining_heads is not None
    check_config(config, is_wavlm)

    conv_layers = []
    in_channels = 1
    for i, layer in enumerate(extractor_conv_layer_config):
        norm = extractor_mode if extractor_mode == "layer_norm" or i == 0 else "none"
        is_last = i == len(extractor_conv_layer_config) - 1
        prune_channels = extractor_prune_conv_channels and (not is_last or encoder_use_projection is not False)
        conv_layers.append(ConvLayerBlock(in_channels, layer, extractor_conv_bias, norm, prune_channels, is_last))
        in_channels = layer[0]

    def attention(i: int) -> SelfAttention:
        width, dropout = encoder_embed_dim, encoder_attention_dropout
        channels_too = bool(encoder_prune_attention_head_channels)
        prunable = Prunable(encoder_prune_attention_heads, encoder_prune_attention_layer, channels_too)
        channels = None if encoder_head_channels is None else HeadChannels.read(encoder_head_channels[i])
        reuse: Literal["map", "softmax"] | None = None
        if encoder_reuse_attention is not None and encoder_reuse_attention[i]:
            reuse = "softmax" if encoder_reuse_softmax else "map"
        if not is_wavlm:
            assert encoder_num_heads is not None and encoder_head_dim is not None
            return SelfAttention(width, encoder_num_heads[i], encoder_head_dim, dropout, prunable, reuse, channels)
        assert encoder_total_num_heads is not None and encoder_remaining_heads is not None
        assert encoder_num_buckets is not None and encoder_max_distance is not None
        total, remaining = encoder_total_num_heads[i], encoder_remaining_heads[i]
        if reuse:  # the map holds WavLM's position bias already
            return SelfAttention(width, remaining, width // total, dropout, prunable, reuse, channels)
        buckets = Buckets(encoder_num_buckets, encoder_max_distance) if i == 0 else None
        return WavLMSelfAttention(width, total, remaining, dropout, buckets, prunable, channels)

    def feed_forward(i: int) -> FeedForward:
        prunable = Prunable(encoder_prune_feed_forward_intermediate, encoder_prune_feed_forward_layer)
        features = encoder_ff_interm_features[i]
        return FeedForward(encoder_embed_dim, features, encoder_ff_interm_dropout, encoder_dropout, prunable)

    layers = [
        EncoderLayer(
            attention(i) if encoder_use_attention[i] else None,
            encoder_dropout,
            encoder_layer_norm_first,
            feed_forward(i) if encoder_use_feed_forward[i] else None,
            encoder_embed_dim,
        )
        for i in range(encoder_num_layers)
    ]
    transformer = Transformer(
        ConvolutionalPositionalEmbedding(encoder_embed_dim, encoder_pos_conv_kernel, encoder_pos_conv_groups),
        encoder_dropout,
        layers,
        encoder_layer_norm_first,
        encoder_layer_drop,
        encoder_time_reduction or 1,
    )
    linear = encoder_use_projection is not False
    projection_norm = encoder_projection_layer_norm is not False
    projection = FeatureProjection(in_channels, encoder_embed_dim, encoder_projection_dropout, linear, projection_norm)
    encoder = Encoder(projection, transformer)
    aux = None if aux_num_out is None else nn.Linear(encoder_embed_dim, aux_num_out)
    return Wav2Vec2Model(normalize_waveform, FeatureExtractor(conv_layers), encoder, aux, config)
