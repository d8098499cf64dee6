"""Transformer encoder with prunable feed-forward units; blocks may be missing and sizes differ per layer.

Shapes: B batch, T frames, D width, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import LAYER_DROP_RATE, AttentionMap, SelfAttention, WavLMSelfAttention
from .counting import count_params
from .feature_extractor import FeatureProjection, valid_frames
from .hardconcrete import (
    Alive,
    Gates,
    HardConcrete,
    Prunable,
    Pruned,
    live_units,
    num_live,
    probability_none,
    scale,
    select,
    together,
    touch,
)
from .kernels import Dropout, linear, wide_conv1d
from .passes import HiddenStates, PassOptions, ScaleGradient, layer_scales

# names of weight norm's tensors here, in fairseq and in older torch, and in its parametrised form
WEIGHT_NORM = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
FFN_DROP_RATE = 0.5  # initial probability that an FFN unit is dropped (released DPHuBERT)


def own_spelling(name: str) -> str:
    """Name of a tensor where torch's parametrised weight norm would have another; all other names stay."""
    for own, other in WEIGHT_NORM.items():
        name = name.replace(other, own)
    return name


def torch_spelling(name: str) -> str:
    """The way back from :func:`own_spelling`."""
    for own, other in WEIGHT_NORM.items():
        name = name.replace(own, other)
    return name


class WeightNormConv1d(nn.Module):
    """Grouped 1-D convolution whose weight is ``g * v / ||v||`` per kernel position (as ``weight_norm(dim=2)``).

    Not by ``torch.nn.utils.weight_norm``, whose hook makes a model impossible to deep-copy. Loads the parametrised
    spelling of its weights too.
    """

    def __init__(self, channels: int, kernel_size: int, groups: int) -> None:
        super().__init__()
        self.groups, self.kernel_size = groups, kernel_size
        weight = torch.empty(channels, channels // groups, kernel_size)
        nn.init.normal_(weight, 0.0, (4.0 / (kernel_size * channels)) ** 0.5)
        self.weight_g = nn.Parameter(torch.linalg.vector_norm(weight, dim=(0, 1), keepdim=True))
        self.weight_v = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_load_state_dict_pre_hook(_use_own_spelling)

    def forward(self, x: Tensor) -> Tensor:
        """[B, D, T] -> [B, D, T]; a kernel of even size sees one frame more to the left than to the right."""
        weight = torch._weight_norm(self.weight_v, self.weight_g, 2)
        return wide_conv1d(x, weight, self.bias, self.groups)


def _use_own_spelling(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
    for own, other in WEIGHT_NORM.items():
        if prefix + other in state_dict:
            state_dict[prefix + own] = state_dict.pop(prefix + other)


class ConvolutionalPositionalEmbedding(nn.Module):
    """Relative position from a wide convolution over the frames."""

    def __init__(self, embed_dim: int, kernel_size: int, groups: int) -> None:
        super().__init__()
        self.conv = WeightNormConv1d(embed_dim, kernel_size, groups)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        num_frames = x.shape[1]  # torch's own convolution, which a folder for transformers has here, makes one more
        return F.gelu(self.conv(x.transpose(1, 2))[..., :num_frames]).transpose(1, 2)


class FeedForward(nn.Module):
    """Two linear layers with GELU; masks over the intermediate units and the block."""

    def __init__(
        self, embed_dim: int, interm_features: int, interm_dropout: float, dropout: float, prunable: Prunable
    ) -> None:
        super().__init__()
        self.intermediate_dense = nn.Linear(embed_dim, interm_features)
        self.intermediate_dropout = Dropout(interm_dropout)
        self.output_dense = nn.Linear(interm_features, embed_dim)
        self.output_dropout = Dropout(dropout)
        self.hard_concrete_for_intermediate = (
            HardConcrete(interm_features, FFN_DROP_RATE, paddable=True) if prunable.units else None
        )
        self.hard_concrete_for_layer = HardConcrete(1, LAYER_DROP_RATE) if prunable.block else None

    def is_alive(self, gates: Gates) -> bool:
        """Whether anything of the block exists under these gates."""
        units, layer = gates.get(self.hard_concrete_for_intermediate), gates.get(self.hard_concrete_for_layer)
        return (units is None or units.num_live > 0) and (layer is None or layer.num_live > 0)

    def live_weights(self, gates: Gates) -> dict[str, Tensor]:
        """What exists of the weights, by name, under these gates."""
        units, layer = gates.get(self.hard_concrete_for_intermediate), gates.get(self.hard_concrete_for_layer)
        first, second = self.intermediate_dense, self.output_dense
        return {
            "intermediate_dense.weight": select(first.weight, units, 0),
            "intermediate_dense.bias": select(first.bias, units, 0),
            "output_dense.weight": scale(scale(select(second.weight, units, 1), units, 1), layer, 0),
            "output_dense.bias": scale(second.bias, layer, 0),
        }

    def forward(self, x: Tensor, gates: Gates) -> Tensor:
        """[B, T, D] -> [B, T, D], through the live units, of which there is at least one."""
        live = self.live_weights(gates)
        x = F.gelu(linear(x, live["intermediate_dense.weight"], live["intermediate_dense.bias"]))
        x = self.intermediate_dropout(x)
        return self.output_dropout(linear(x, live["output_dense.weight"], live["output_dense.bias"]))

    def pruned(self, gates: Gates) -> Pruned:
        """What is left of the block."""
        if not self.is_alive(gates):
            return Pruned(config={"encoder_use_feed_forward": False, "encoder_ff_interm_features": 0})
        weights = self.live_weights(gates)
        return Pruned(weights, {"encoder_ff_interm_features": len(weights["intermediate_dense.bias"])})

    def num_params(self, alive: Alive) -> Tensor | int:
        """Expected parameters: the output bias exists while any unit does."""
        width = self.intermediate_dense.in_features
        units, exists = self.num_live(alive)
        return units * (2 * width + 1) + exists * width

    def num_macs(self, frames: Tensor, alive: Alive) -> Tensor | int:
        """Expected multiply-accumulates of ``frames`` [B]."""
        return int(frames.sum()) * 2 * self.intermediate_dense.in_features * self.num_live(alive)[0]

    def num_live(self, alive: Alive) -> tuple[Tensor | int, Tensor | int]:
        """Expected number of units, and the probability that the block exists."""
        units, exists = live_units(self.hard_concrete_for_intermediate, self.intermediate_dense.out_features, alive)
        gate = num_live(self.hard_concrete_for_layer, 1, alive)
        return units * gate, exists * gate


class EncoderLayer(nn.Module):
    """Attention and feed-forward blocks with residuals; post-norm (Base) or pre-norm (Large). A block may be None."""

    def __init__(
        self,
        attention: SelfAttention | None,
        dropout: float,
        layer_norm_first: bool,
        feed_forward: FeedForward | None,
        embed_dim: int,
    ) -> None:
        super().__init__()
        self.attention = attention
        self.dropout = Dropout(dropout)
        self.layer_norm = nn.LayerNorm(embed_dim)
        self.layer_norm_first = layer_norm_first
        self.feed_forward = feed_forward
        self.final_layer_norm = nn.LayerNorm(embed_dim)

    def forward(
        self,
        x: Tensor,
        valid: Tensor | None,
        position_bias: Tensor | None,
        gates: Gates,
        source: AttentionMap | None = None,
        maps: list[Tensor | None] | None = None,
    ) -> tuple[Tensor, AttentionMap | None]:
        """Run the blocks that exist.

        Args:
            x: [B, T, D].
            valid: as for SelfAttention.
            position_bias: as for SelfAttention.
            gates: as drawn for this pass.
            source: attention map that the layers below left for reuse.
            maps: append the attention map of this layer to it; None where it has none.

        Returns:
            [B, T, D], and the map for the layers above.
        """
        attention = self.attention
        if attention is not None and not attention.reuse:
            source = None
        exists = attention is not None and attention.is_alive(gates) and (source is not None or not attention.reuse)
        if attention is None or not exists:
            x = touch(x, attention, self.layer_norm)
        else:
            y, source = attention(self.attention_input(x), valid, position_bias, gates, source, maps is not None)
            x = x + self.dropout(y)
        if maps is not None:
            maps.append(source.applied.mean(1) if exists and source is not None else None)
        return self.after_attention(x, gates), source

    def attention_input(self, x: Tensor) -> Tensor:
        """What the attention block sees of the layer's input [..., D]."""
        return self.layer_norm(x) if self.layer_norm_first else x

    def after_attention(self, x: Tensor, gates: Gates) -> Tensor:
        """The layer's output [B, T, D], from its input to which what the attention block gives is added."""
        norm_first = self.layer_norm_first
        if not norm_first:
            x = self.layer_norm(x)
        if self.feed_forward is None or not self.feed_forward.is_alive(gates):
            x = touch(x, self.feed_forward, self.final_layer_norm)
        else:
            x = x + self.feed_forward(self.final_layer_norm(x) if norm_first else x, gates)
        return x if norm_first else self.final_layer_norm(x)

    def masks(self) -> list[HardConcrete | None]:
        """Of its blocks, in a fixed order; None for one that it does not have."""
        attention, feed_forward = self.attention, self.feed_forward
        found: list[HardConcrete | None] = []
        if attention is not None:
            found += [attention.hard_concrete_for_heads, attention.hard_concrete_for_query_channels,
                      attention.hard_concrete_for_value_channels, attention.hard_concrete_for_layer]  # fmt: skip
        if feed_forward is not None:
            found += [feed_forward.hard_concrete_for_intermediate, feed_forward.hard_concrete_for_layer]
        return found

    @property
    def sizes(self) -> tuple[object, ...]:
        """What the expected numbers depend on besides which units exist."""
        masks = tuple(None if mask is None else len(mask) for mask in self.masks())
        width = None if self.feed_forward is None else self.feed_forward.intermediate_dense.weight.shape
        return None if self.attention is None else self.attention.sizes, width, masks

    def num_params(self, alive: Alive, source: SelfAttention | None) -> Tensor | int:
        """Expected parameters, the layer's own norms included; ``source`` as for SelfAttention."""
        total: Tensor | int = count_params(self.layer_norm, self.final_layer_norm)
        if self.attention is not None and source is not None:
            total = total + self.attention.num_params(alive, source)
        if self.feed_forward is not None:
            total = total + self.feed_forward.num_params(alive)
        return total


class Transformer(nn.Module):
    """Positional convolution, layers, and one layer norm: before the layers (post-norm) or after them (pre-norm).

    With ``time_reduction`` a strided convolution shortens the frames before the first layer (FitHuBERT,
    https://arxiv.org/abs/2207.00555, section 2.2); frames at the end that do not fill a stride are lost, as in the
    released code. ``upsampler`` is the learned way back to the full rate, for objectives without one of their own; the
    released FitHuBERT holds one too.
    """

    def __init__(
        self,
        pos_conv_embed: ConvolutionalPositionalEmbedding,
        dropout: float,
        layers: Sequence[EncoderLayer],
        layer_norm_first: bool,
        layer_drop: float,
        time_reduction: int = 1,
    ) -> None:
        super().__init__()
        embed_dim = len(pos_conv_embed.conv.bias)
        self.pos_conv_embed = pos_conv_embed
        self.layer_norm = nn.LayerNorm(embed_dim)
        self.layer_norm_first = layer_norm_first  # of the layers, as in the flat config
        self.layer_drop = layer_drop
        self.dropout = Dropout(dropout)
        self.reduction = time_reduction
        self.time_reduction: nn.Conv1d | None = None
        self.upsampler: nn.ConvTranspose1d | None = None
        if time_reduction > 1:
            self.time_reduction = nn.Conv1d(embed_dim, embed_dim, time_reduction, time_reduction)
            self.upsampler = nn.ConvTranspose1d(embed_dim, embed_dim, time_reduction, time_reduction)
        self.layers = cast(Sequence[EncoderLayer], nn.ModuleList(layers))
        for layer, source in zip(layers, self.attention_sources()):
            if source is not None and source is not layer.attention:
                source.keep_map = True

    def attention_sources(self) -> list[SelfAttention | None]:
        """Per layer the block whose attention map it applies: its own, an earlier one, or None without attention."""
        sources: list[SelfAttention | None] = []
        source = None
        for layer in self.layers:
            if layer.attention is not None and not layer.attention.reuse:
                source = layer.attention
            sources.append(None if layer.attention is None else source)
        return sources

    def position_block(self) -> WavLMSelfAttention | None:
        """Layer 0's attention if it holds WavLM's position embedding, which outlives that layer's heads."""
        first = self.layers[0].attention if len(self.layers) else None
        return first if isinstance(first, WavLMSelfAttention) and first.rel_attn_embed is not None else None

    def hidden_states(
        self, features: Tensor, valid: Tensor | None, gates: Gates, options: PassOptions | None = None
    ) -> HiddenStates:
        """Outputs of the layers, without the final layer norm of pre-norm models.

        Args:
            features: [B, T, D] from the feature projection.
            valid: bool [B, 1, 1, T], False on padding; None when nothing is padded.
            gates: as drawn for this pass.
            options: how to run.
        """
        options = options or PassOptions()
        x = features + self.pos_conv_embed(features)
        if not self.layer_norm_first:
            x = self.layer_norm(x)
        layer_input = x
        x = self.dropout(x)
        if self.time_reduction is not None:
            x, valid = self.reduce(x, valid)
            layer_input = x
        layers = self.layers[: options.num_layers]
        first = self.position_block()
        position_bias = None if first is None or not len(layers) else first.position_bias(x.shape[1])
        output = HiddenStates(features, [], layer_input)
        source: AttentionMap | None = None
        for i, layer in enumerate(layers):
            if options.layer_drop == 0.0 or torch.rand(()).item() > options.layer_drop:
                maps = output.maps if options.keep_maps else None
                if options.recompute and maps is None and torch.is_grad_enabled():
                    x, source = checkpoint(layer, x, valid, position_bias, gates, source, use_reentrant=False)
                else:
                    x, source = layer(x, valid, position_bias, gates, source, maps)
            else:
                x = touch(x, layer)
            state = x
            if options.scale_gradients is not None:
                trunk, branch = layer_scales(options.scale_gradients, i + 1, len(layers))
                state, x = ScaleGradient.apply(x, branch), ScaleGradient.apply(x, trunk)
            output.layers.append(state)
        return output

    def reduce(self, x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """[B, T, D] -> [B, T', D], and the mask [B, 1, 1, T] -> [B, 1, 1, T'].

        A row with fewer frames than one stride, which the released code cannot run, is filled with zeros.
        """
        assert self.time_reduction is not None
        if valid is not None:
            x = x * valid[:, 0, 0, :, None].to(x.dtype)
        reduced = torch.sym_max(x.shape[1] // self.reduction, 1)
        missing = reduced * self.reduction - x.shape[1]  # negative where frames are lost
        x = self.time_reduction(F.pad(x, (0, 0, 0, missing)).transpose(1, 2)).transpose(1, 2)
        if valid is not None:
            whole = F.pad(valid, (0, missing)).unflatten(-1, (-1, self.reduction)).all(-1)
            valid = whole | valid[..., :1] & (torch.arange(reduced, device=x.device) == 0)
        return x, valid

    def covered(self, frames: Tensor) -> Tensor:
        """Frames [B] of the input ``frames`` [B] that the layers have seen: without those that time reduction loses."""
        return frames.minimum((frames // self.reduction * self.reduction).clamp(min=self.reduction))

    def upsample(self, state: Tensor, num_frames: int) -> Tensor:
        """[B, T', D] -> the first T frames [B, T, D] of the learned upsampler; unchanged without time reduction."""
        if self.upsampler is None:
            return state
        return self.upsampler(state.transpose(1, 2)).transpose(1, 2)[:, :num_frames]

    def hold(self, state: Tensor, num_frames: int, lengths: Tensor | None) -> Tensor:
        """[B, T', D] -> [B, T, D], each frame as often as time reduction has merged frames into it.

        Frames that time reduction has lost get what the last before them has.

        Args:
            state: of a layer.
            num_frames: T.
            lengths: [B] valid frames of the T; None when nothing is padded.
        """
        if self.reduction == 1:
            return state
        index = torch.arange(num_frames, device=state.device) // self.reduction
        if lengths is None:
            return state.index_select(1, index.clamp(max=state.shape[1] - 1))
        last = (lengths // self.reduction - 1).clamp(min=0)
        index = index[None].minimum(last[:, None])
        return state.gather(1, index[..., None].expand(-1, -1, state.shape[-1]))

    def pruned(self, gates: Gates) -> list[Pruned]:
        """What is left of each layer's blocks."""
        sources = self.attention_sources()
        any_attention = any(source is not None and source.is_alive(gates) for source in sources)
        layers = [Pruned() for _ in sources]
        for i, (left, layer, source) in enumerate(zip(layers, self.layers, sources)):
            if layer.attention is not None and source is not None:
                left.add(f"layers.{i}.attention", layer.attention.pruned(gates, source, any_attention))
            if layer.feed_forward is not None:
                left.add(f"layers.{i}.feed_forward", layer.feed_forward.pruned(gates))
        return layers

    def num_params(self, alive: Alive) -> Tensor | int:
        """Expected parameters of the positional convolution, norms, time reduction and layers."""
        total: Tensor | int = count_params(self.pos_conv_embed, self.layer_norm, self.time_reduction, self.upsampler)
        none_alive: Tensor | int = 1
        first = self.position_block()
        for layer, source, alive_of, count in self._alike(alive):
            total = total + _sum(layer.num_params(alive_of, source), count)
            if first is not None and layer.attention is not None and layer.attention is source:
                # a block that reuses never outlives its source
                exists = layer.attention.num_live(alive_of, source)[1]
                none_alive = none_alive * _none(exists, count)
        if first is not None and first.rel_attn_embed is not None:
            total = total + first.rel_attn_embed.weight.numel() * (1 - none_alive)
        return total

    def _alike(self, alive: Alive) -> Iterator[tuple[EncoderLayer, SelfAttention | None, Alive, int]]:
        """The layers by the first of those of equal sizes: it, its source, what lives of all of them, how many."""
        sources = self.attention_sources()
        groups: dict[object, list[int]] = {}
        for i, (layer, source) in enumerate(zip(self.layers, sources)):
            groups.setdefault(layer.sizes if source is layer.attention else i, []).append(i)
        for group in groups.values():
            alike = together(alive, *zip(*(self.layers[i].masks() for i in group)))
            yield self.layers[group[0]], sources[group[0]], alike, len(group)

    def num_macs(self, frames: Tensor, alive: Alive) -> Tensor | int:
        """Expected multiply-accumulates of ``frames`` [B] of the features."""
        conv = self.pos_conv_embed.conv
        # published counts include the frame too many that an even kernel with equal padding makes
        positions = (frames + (conv.kernel_size + 1) % 2)[frames > 0]
        total: Tensor | int = int(positions.sum()) * conv.weight_v.numel()
        if self.time_reduction is not None:
            frames = (frames // self.reduction).maximum(frames.clamp(max=1))
            total = total + int(frames.sum()) * self.time_reduction.weight.numel()
        position_bias = self.position_block() is not None
        for layer, source, alive_of, count in self._alike(alive):
            if layer.attention is not None and source is not None:
                total = total + _sum(layer.attention.num_macs(frames, alive_of, source, position_bias), count)
            if layer.feed_forward is not None:
                total = total + _sum(layer.feed_forward.num_macs(frames, alive_of), count)
        return total


def _none(exists: Tensor | int, count: int) -> Tensor | int:
    """The probability that none of so many layers exists, each of which does with this one, or with its own [count]."""
    if isinstance(exists, Tensor) and exists.dim():
        return probability_none(exists)
    return (1 - exists) ** count


def _sum(each: Tensor | int, count: int) -> Tensor | int:
    """Of so many layers, what each of them gives [count], or all of them alike."""
    if isinstance(each, Tensor):
        return each.sum() if each.dim() else each * count
    return each * count


class Encoder(nn.Module):
    """Feature projection and Transformer."""

    def __init__(self, feature_projection: FeatureProjection, transformer: Transformer) -> None:
        super().__init__()
        self.feature_projection = feature_projection
        self.transformer = transformer

    def hidden_states(
        self,
        features: Tensor,
        lengths: Tensor | None,
        gates: Gates,
        gate_in: HardConcrete | None,
        options: PassOptions | None = None,
    ) -> HiddenStates:
        """The Transformer's input after the feature projection, and the layers.

        Args:
            features: [B, T, c] from the extractor.
            lengths: [B] valid frames; None when nothing is padded.
            gates: as drawn for this pass.
            gate_in: mask of the extractor's last layer.
            options: how to run.
        """
        options = options or PassOptions()
        x = self.feature_projection(features, gates.get(gate_in))
        if options.masked is not None:
            assert options.mask_embedding is not None
            x = torch.where(options.masked[..., None], options.mask_embedding.to(x.dtype), x)
        valid = None
        if lengths is not None:
            frames = valid_frames(lengths, x.shape[1])
            x = x * frames[..., None].to(x.dtype)
            # a row without a valid frame attends to its zeros: softmax over nothing would be NaN
            valid = (frames | (lengths == 0)[:, None])[:, None, None, :]
        return self.transformer.hidden_states(x, valid, gates, options)
