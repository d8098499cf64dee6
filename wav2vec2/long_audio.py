"""The states of audio of any length, piece by piece: what the whole gives, but for rounding.

Every layer is run over the whole audio before the next, in pieces of frames; all frames attend to each other. Memory
grows by twice the width per frame; time grows with the square of the frames.

Shapes: T frames, D width, E width of a head.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import SelfAttention, WavLMSelfAttention
from .hardconcrete import Gate, Gates
from .head_channels import HeadChannels
from .kernels import attend, attention_weights
from .model import Wav2Vec2Model
from .passes import PassOptions
from .statistics import Statistics, StatisticsStream
from .transformer import EncoderLayer
from .windows import Window, alignment

Read = Callable[[int, int], Tensor]  # samples [begin, end) at 16 kHz; begin at a whole second
PIECE = 1500  # frames that go through a block at once
PAIRS = 2**23  # elements of an attention map that are written out at once


class States(NamedTuple):
    """Frames ``first`` to ``first + n`` of the whole audio, of one layer."""

    layer: int
    first: int
    values: Tensor  # [n, D]


def statistics_of(model: Wav2Vec2Model, read: Read, num_samples: int, seconds_at_once: float) -> Statistics | None:
    """What the model takes from a whole waveform, read once; None where it takes nothing."""
    if not model.takes_statistics:
        return None
    first = model.feature_extractor.conv_layers[0].conv
    stream = StatisticsStream(first.kernel_size[0], first.stride[0])
    step = alignment(model, seconds_at_once)
    for begin in range(0, num_samples, step):
        stream.add(read(begin, min(begin + step, num_samples)))
    return stream.result().to(model.feature_extractor.dummy_weight.device)


@torch.no_grad()
def long_states(
    model: Wav2Vec2Model,
    read: Read,
    window: Window,
    layers: Sequence[int],
    statistics: Statistics | None,
    seconds_at_once: float,
) -> Iterator[States]:
    """States of the frames that a window keeps, in no order but that of the layers.

    Args:
        model: in eval mode.
        read: gives the waveform.
        window: whose frames attend to each other.
        layers: which of the L + 1 states.
        statistics: of the whole waveform, by :func:`statistics_of`.
        seconds_at_once: of audio that the convolutions take.
    """
    gates, transformer = model.draw_gates(), model.encoder.transformer
    origin = window.begin // model.feature_extractor.frame_shift
    x = _features(model, read, window, statistics, seconds_at_once, gates)
    num_frames = len(x)

    def kept(layer: int) -> Iterator[States]:
        """The frames of the window, each reduced one as often as it stands for one."""
        for begin in range(window.first - origin, window.last - origin, PIECE):
            frames = torch.arange(begin, min(begin + PIECE, window.last - origin), device=x.device)
            rows = frames if layer == 0 else (frames // transformer.reduction).clamp(max=len(x) - 1)
            yield States(layer, origin + begin, x[rows].float().cpu())

    if 0 in layers:
        yield from kept(0)
    if max(layers) == 0 or num_frames == 0:
        return
    x = _positioned(model, x)
    if transformer.time_reduction is not None:
        x = _reduced(model, x)
    run = _Layers(model, gates, len(x))
    spare = torch.empty_like(x)
    for number, layer in enumerate(transformer.layers[: max(layers)], start=1):
        run.layer(layer, x, spare)
        if number in layers:
            yield from kept(number)


def _pieces(num_frames: int, size: int = PIECE) -> Iterator[slice]:
    return (slice(begin, min(begin + size, num_frames)) for begin in range(0, num_frames, size))


def _features(
    model: Wav2Vec2Model, read: Read, window: Window, statistics: Statistics | None, seconds: float, gates: Gates
) -> Tensor:
    """The Transformer's input [T, D] of a window."""
    extractor = model.feature_extractor
    shift, overlap = extractor.frame_shift, extractor.receptive_field - extractor.frame_shift
    num_frames = int(model.output_length(torch.tensor([window.end - window.begin])))
    x = extractor.dummy_weight.new_empty(num_frames, model.embed_dim)
    step, done = alignment(model, seconds), 0
    while done < num_frames:
        begin = window.begin + done * shift
        waveform = read(begin, min(begin + step + overlap, window.end)).to(x)
        output, _ = model.run(waveform[None], None, PassOptions(num_layers=0, statistics=statistics), gates)
        features = output.features[0]
        x[done : done + len(features)] = features
        done += len(features)
    return x


def _positioned(model: Wav2Vec2Model, x: Tensor) -> Tensor:
    """With the positional convolution, [T, D]: each piece sees the frames around it."""
    transformer = model.encoder.transformer
    margin = transformer.pos_conv_embed.conv.kernel_size
    result = torch.empty_like(x)
    for piece in _pieces(len(x)):
        begin = max(piece.start - margin, 0)
        around = x[None, begin : piece.stop + margin]
        position = transformer.pos_conv_embed(around)[0, piece.start - begin : piece.stop - begin]
        summed = x[piece] + position
        result[piece] = summed if transformer.layer_norm_first else transformer.layer_norm(summed)
    return result


def _reduced(model: Wav2Vec2Model, x: Tensor) -> Tensor:
    """Merged frames, [T', D]."""
    transformer = model.encoder.transformer
    whole = max(len(x) // transformer.reduction * transformer.reduction, 1)
    size = PIECE * transformer.reduction
    return torch.cat([transformer.reduce(x[None, piece], None)[0][0] for piece in _pieces(whole, size)])


@dataclass
class _Source:
    """Where an attention map comes from: the block that computes it, and its input."""

    block: SelfAttention
    inputs: Callable[[slice], Tensor]


class _Layers:
    """Runs one layer after the other over [T, D], in place."""

    def __init__(self, model: Wav2Vec2Model, gates: Gates, num_frames: int) -> None:
        self.gates = gates
        first = model.encoder.transformer.position_block()
        self.bias_by_distance = None if first is None else first.bias_by_distance(num_frames)
        self.source: _Source | None = None

    def layer(self, layer: EncoderLayer, x: Tensor, spare: Tensor) -> None:
        """Replace ``x`` by the layer's output; ``spare`` is of its size."""
        block = layer.attention
        if block is not None and not block.reuse:
            self.source = None
        attends = block is not None and block.is_alive(self.gates) and (self.source is not None or not block.reuse)
        if block is not None and attends:
            states = x.clone() if block.keep_map else x  # layers above come back to it
            own = _Source(block, lambda piece: layer.attention_input(states[piece]))
            self.source = self.source if block.reuse else own
            assert self.source is not None
            self._mix(own, self.source, spare)
        for piece in _pieces(len(x)):
            summed = x[piece] + spare[piece] if attends else x[piece]
            x[piece] = layer.after_attention(summed[None], self.gates)[0]

    def _mix(self, own: _Source, source: _Source, result: Tensor) -> None:
        """What the attention block ``own`` gives, into ``result`` [T, D], with the map that ``source`` computes."""
        block, num_frames = own.block, len(result)
        heads = source.block.live_heads(self.gates)
        live = block.live_weights(heads, self.gates.get(block.hard_concrete_for_layer))
        asked = source.block.live_weights(heads, None)
        result.copy_(live["out_proj.bias"].expand_as(result))
        whole = (block.head_dim,) * (len(live["v_proj.bias"]) // block.head_dim)
        channels = heads.channels or HeadChannels(whole, whole)
        written_out = bool(block.reuse) or self.bias_by_distance is not None
        size = max(PAIRS // num_frames, 1) if written_out else PIECE
        ends = [list(accumulate(counts)) for counts in channels]
        for head in range(len(channels.values)):
            of_queries, of_values = (slice(end[head] - n[head], end[head]) for end, n in zip(ends, channels))

            def project(of: _Source, weights: dict[str, Tensor], name: str, piece: slice, rows: slice) -> Tensor:
                return F.linear(of.inputs(piece), weights[f"{name}.weight"][rows], weights[f"{name}.bias"][rows])

            pieces = list(_pieces(num_frames))
            k = torch.cat([project(source, asked, "k_proj", piece, of_queries) for piece in pieces])[None, None]
            v = torch.cat([project(own, live, "v_proj", piece, of_values) for piece in pieces])[None, None]
            scale = math.sqrt(k.shape[-1] / block.head_dim)  # what follows divides by the root of the width it sees
            for piece in _pieces(num_frames, size):
                q = project(source, asked, "q_proj", piece, of_queries)[None, None] * scale
                mask = self._bias(source, heads.heads, head, piece, num_frames)
                if block.reuse:
                    weights = attention_weights(q, k, mask)
                    mixed = (weights.softmax(-1) if block.reuse == "softmax" else weights) @ v
                else:
                    mixed = attend(q, k, v, mask, 0.0)
                result[piece] += F.linear(mixed[0, 0], live["out_proj.weight"][:, of_values])

    def _bias(self, source: _Source, live: Gate | None, head: int, piece: slice, num_frames: int) -> Tensor | None:
        """WavLM's gated position bias [n, T] of one of the ``live`` heads."""
        block = source.block
        if not isinstance(block, WavLMSelfAttention) or self.bias_by_distance is None:
            return None
        number = head if live is None or live.index is None else int(live.index[head])
        number = block.remaining_heads[number]
        by_head = source.inputs(piece).unflatten(-1, (block.total_num_heads, block.head_dim))[:, number]
        starts = num_frames - 1 - torch.arange(piece.start, piece.stop, device=by_head.device)
        positions = self.bias_by_distance[number].unfold(0, num_frames, 1)[starts]  # [n, T]
        return block.gated(by_head, block.gru_rel_pos_const[0, number], positions)
