"""Students by config: a copy of the teacher, thin and random, a few of its layers, or a uniform slice of it.

All are models of :mod:`wav2vec2` that differ in their flat config only, so masks, pruning and files work for each.
Shapes: C channels of the extractor, D Transformer width.
"""

import copy
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from distillation.budget import Cost, Parameters
from distillation.errors import UserError, require
from wav2vec2 import Wav2Vec2Model, prune, wav2vec2_model
from wav2vec2.architecture import architecture
from wav2vec2.attention import WavLMSelfAttention
from wav2vec2.checkpoint import add_masks
from wav2vec2.counting import count_params
from wav2vec2.hardconcrete import HardConcrete
from wav2vec2.importers.mapping import flat_config
from wav2vec2.pruning import Survivors

CERTAIN = 60.0  # log_alpha of a unit whose gate is 1 in float32


@dataclass
class ThinStudent:
    """Thin and deep, at random. The defaults are FitHuBERT's, which its relatives share."""

    num_layers: int = 12
    """Transformer layers."""
    width: int = 480
    """Transformer width D; as wide as the last channels: no linear map between them."""
    heads: int = 12
    """Attention heads per layer."""
    ffn: int = 480
    """FFN units per layer."""
    channels: list[int] = field(default_factory=lambda: [128, 256, 512])
    """Channels of the first conv layer, of the five in the middle, of the last three (C)."""
    pos_conv_kernel: int = 128
    """Frames that the positional convolution sees."""
    pos_conv_groups: int = 16
    """Groups of the positional convolution."""
    time_reduction: int = 1
    """Frames merged into one before the first layer; 1 for none."""
    reuse_attention: Literal["released", "paper"] | None = None
    """Every second layer reuses the attention map of the layer before it, and has no queries and keys: as it is
    (paper), or put through a second softmax (released). There is no dropout on reused maps."""
    dropout: float = 0.1
    """After attention, FFN activation, FFN and positional convolution, and on the attention weights."""
    input_dropout: float = 0.05
    """After the feature projection."""

    def __post_init__(self) -> None:
        sizes = ("num_layers", "width", "heads", "ffn", "time_reduction")
        require(self, "student.thin.", "be three numbers", lambda value: len(value) == 3, "channels")
        require(self, "student.thin.", "be at least 1", lambda value: value >= 1, *sizes)
        require(self, "student.thin.", f"divide the width {self.width}", lambda n: self.width % n == 0, "heads")

    def conv_layers(self) -> list[tuple[int, int, int]]:
        """(channels, kernel, stride): HuBERT's strides, with two 1x1 convolutions where the channels grow."""
        first, middle, last = self.channels
        return [(first, 10, 5), (middle, 1, 1), *[(middle, 3, 2)] * 4, (last, 1, 1), *[(last, 2, 2)] * 2]


@dataclass
class CopiedLayers:
    """A few wide layers of the teacher above its extractor, as DistilHuBERT."""

    layers: list[int] = field(default_factory=lambda: [1, 2])
    """Teacher layers to copy, counted from 1, in ascending order."""
    norms: Literal["teacher", "released"] = "teacher"
    """Norms around the layers: the teacher's, or as in the released DistilHuBERT: none before the feature projection,
    and a fresh one of the Transformer (before the layers; after them in pre-norm models)."""
    ffn_dropout: float | None = None
    """After the FFN activation; null for the teacher's."""
    input_dropout: float | None = None
    """After the feature projection; null for the teacher's."""


@dataclass
class UniformSlice:
    """The same share of every conv layer, of every layer's heads and of its FFN units: what pruning must beat."""

    num_params: int
    """Parameters of the student, met to within one FFN unit as long as there are FFN units to choose."""


@dataclass
class StudentConfig:
    """What distill.py starts from. Nothing set: a copy of the teacher, to be pruned."""

    thin: ThinStudent | None = None
    """Thin and deep, at random."""
    layers: CopiedLayers | None = None
    """A few layers of the teacher."""
    slice: UniformSlice | None = None
    """A uniform slice of the teacher."""
    dropout: float | None = None
    """All rates of the student's dropout, in both steps and in its files, whatever it starts from: 0 for none; null for
    the teacher's, those of thin and layers, or those of student_ckpt."""

    def __post_init__(self) -> None:
        require(self, "student.", "lie in [0, 1)", lambda value: 0 <= value < 1, "dropout")
        names = [entry for entry in ("thin", "layers", "slice") if getattr(self, entry) is not None]
        if len(names) > 1:
            raise UserError(f"student: {' and '.join(names)} are set, a student can be only one of them")


def build_student(config: StudentConfig, teacher: Wav2Vec2Model) -> Wav2Vec2Model:
    """The student before training, dense; random ones from torch's default generator.

    Args:
        config: what kind, and its sizes.
        teacher: dense; not changed, and sharing no memory with the student.

    Raises:
        UserError: sizes that build no model, or that the teacher does not allow.
    """
    try:
        student = _of_kind(config, teacher)
    except UserError as error:
        raise UserError(f"student.slice: {error}") if config.slice is not None else error from None
    except ValueError as error:
        raise UserError(f"student: {error}") from None
    return student if config.dropout is None else with_dropout(student, config.dropout)


def _of_kind(config: StudentConfig, teacher: Wav2Vec2Model) -> Wav2Vec2Model:
    if config.thin is not None:
        return _thin(config.thin, teacher)
    if config.layers is not None:
        return _copied_layers(config.layers, teacher)
    if config.slice is not None:
        return uniform_slice(teacher, Parameters(), config.slice.num_params)
    return copy.deepcopy(teacher).requires_grad_(True)


def with_dropout(model: Wav2Vec2Model, rate: float) -> Wav2Vec2Model:
    """The same model with another dropout."""
    names = ("encoder_projection_dropout", "encoder_attention_dropout", "encoder_ff_interm_dropout", "encoder_dropout")
    result = wav2vec2_model(**{**model.config, **dict.fromkeys(names, rate)})
    result.load_state_dict(model.state_dict())
    result.vocabulary = copy.copy(model.vocabulary)
    return result


def check_frame_rate(student: Wav2Vec2Model, teacher: Wav2Vec2Model, source: object) -> None:
    """Refuse a student whose frames are not the teacher's.

    Raises:
        UserError: naming ``source``.
    """
    samples = torch.arange(400, 2000, device="cpu")  # of models on the meta device too
    if not torch.equal(student.output_length(samples), teacher.output_length(samples)):
        raise UserError(
            f"{source}: its extractor gives other frames than the teacher's; kernels and strides must agree"
        )


def backbone_params(model: Wav2Vec2Model) -> int:
    """Parameters of a model as published: those of ``dummy_weight`` count once pruning has left something in it."""
    dummy = model.feature_extractor.dummy_weight
    return count_params(model) - (dummy.numel() if bool((dummy == 1).all()) else 0)


def _thin(config: ThinStudent, teacher: Wav2Vec2Model) -> Wav2Vec2Model:
    flat = flat_config(
        conv_layers=config.conv_layers(),
        embed_dim=config.width,
        num_layers=config.num_layers,
        num_heads=config.heads,
        ff_interm_features=config.ffn,
        buckets=None,
        extractor_mode="group_norm",
        extractor_conv_bias=False,
        encoder_projection_dropout=config.input_dropout,
        encoder_pos_conv_kernel=config.pos_conv_kernel,
        encoder_pos_conv_groups=config.pos_conv_groups,
        encoder_attention_dropout=config.dropout,
        encoder_ff_interm_dropout=config.dropout,
        encoder_dropout=config.dropout,
        encoder_layer_norm_first=False,
        encoder_layer_drop=0.0,
        normalize_waveform=teacher.normalize_waveform,
    )
    if config.channels[-1] == config.width:
        flat["encoder_use_projection"] = False
    if config.time_reduction > 1:
        flat["encoder_time_reduction"] = config.time_reduction
    if config.reuse_attention is not None:
        flat["encoder_reuse_attention"] = [i % 2 == 1 for i in range(config.num_layers)]
    if config.reuse_attention == "released":
        flat["encoder_reuse_softmax"] = True
    model = wav2vec2_model(**flat)
    initialize(model)
    return model


def initialize(model: Wav2Vec2Model) -> None:
    """Random weights as published: He for the conv layers, N(0, 0.02) without biases for the layers, as BERT.

    Everything else keeps what :func:`wav2vec2_model` gave it.
    """
    for conv in model.feature_extractor.conv_layers:
        nn.init.kaiming_normal_(conv.conv.weight)
    for layer in model.encoder.transformer.layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0.0, 0.02)
                nn.init.zeros_(module.bias)


def _copied_layers(config: CopiedLayers, teacher: Wav2Vec2Model) -> Wav2Vec2Model:
    chosen = config.layers
    if not chosen or chosen != sorted(set(chosen)) or not 1 <= chosen[0] <= chosen[-1] <= teacher.num_layers:
        raise UserError(
            f"student.layers.layers is {chosen}: name teacher layers in ascending order, 1 to {teacher.num_layers}"
        )
    flat = copy.deepcopy(teacher.config)
    for name, value in flat.items():
        if isinstance(value, list) and len(value) == teacher.num_layers and name.startswith("encoder_"):
            flat[name] = [value[layer - 1] for layer in chosen]
    flat["encoder_num_layers"] = len(chosen)
    for key, rate in (("ff_interm", config.ffn_dropout), ("projection", config.input_dropout)):
        if rate is not None:
            flat[f"encoder_{key}_dropout"] = rate
    norms: tuple[str, ...] = ()
    if config.norms == "released":
        flat["encoder_projection_layer_norm"] = False
        norms = ("encoder.feature_projection.layer_norm.", "encoder.transformer.layer_norm.")
    prefix = "encoder.transformer.layers."
    state: dict[str, Tensor] = {}
    for name, tensor in teacher.state_dict().items():
        if name.startswith(norms):
            continue
        if not name.startswith(prefix):
            state[name] = tensor
            continue
        index, rest = name.removeprefix(prefix).split(".", 1)
        if int(index) + 1 in chosen:
            state[f"{prefix}{chosen.index(int(index) + 1)}.{rest}"] = tensor
    first = teacher.encoder.transformer.layers[0].attention
    if isinstance(first, WavLMSelfAttention) and first.rel_attn_embed is not None:  # serves whichever layer is first
        state[f"{prefix}0.attention.rel_attn_embed.weight"] = first.rel_attn_embed.weight
    model = wav2vec2_model(**flat)
    fresh = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(norms)}
    model.load_state_dict(state | fresh)
    model.vocabulary = copy.copy(teacher.vocabulary)
    return model


@torch.no_grad()
def uniform_slice(teacher: Wav2Vec2Model, cost: Cost, wanted: float) -> Wav2Vec2Model:
    """Keep evenly spaced units: the same share everywhere, FFN units then filled up one by one over the layers.

    Args:
        teacher: dense.
        cost: what the slice is measured by.
        wanted: most that it may cost.

    Raises:
        UserError: no slice costs that.
    """
    uneven = architecture(teacher.config).uneven
    masked = add_masks(
        teacher,
        extractor_prune_conv_channels=True,
        encoder_prune_attention_heads=not uneven,
        encoder_prune_attention_head_channels=uneven,
        encoder_prune_feed_forward_intermediate=True,
    )
    masks = masked.masks()
    for mask in masks.values():
        mask.log_alpha.fill_(CERTAIN)
    units = [mask for name, mask in masks.items() if name.endswith("intermediate")]
    others = [mask for mask in masks.values() if mask not in units]

    def counts(share: float) -> dict[HardConcrete, int]:
        return {mask: max(1, round(share * len(mask))) for mask in masks.values()}

    def size(kept: dict[HardConcrete, int]) -> float:
        alive = {mask: evenly_spaced(len(mask), count).double() for mask, count in kept.items()}
        return cost(masked, alive.__getitem__).item()

    low, high = 0.0, 1.0
    least, most = size(counts(low)), size(counts(high))
    if not least <= wanted <= most:
        raise UserError(
            f"no uniform slice has {cost.text(wanted)}: those of this teacher have {cost.text(least)} to "
            f"{cost.text(most)}"
        )
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if size(counts(middle)) <= wanted else (low, middle)
    kept = counts(low)
    total = sum(map(len, units))
    first, last = sum(kept[mask] for mask in units), total

    def filled(number: int) -> dict[HardConcrete, int]:
        """``number`` FFN units in all, the same in every layer up to one."""
        bounds = [round(number * (i + 1) / len(units)) for i in range(len(units))]
        spread = [min(len(mask), end - start) for mask, start, end in zip(units, [0, *bounds], bounds)]
        return {**{mask: kept[mask] for mask in others}, **dict(zip(units, spread))}

    while first < last:  # the most units that fit
        middle_count = (first + last + 1) // 2
        first, last = (middle_count, last) if size(filled(middle_count)) <= wanted else (first, middle_count - 1)
    survivors: Survivors = {mask: evenly_spaced(len(mask), count) for mask, count in filled(first).items()}
    return prune(masked, survivors)[0].train()


def evenly_spaced(num_units: int, count: int) -> Tensor:
    """Bool [num_units], ``count`` of them true."""
    kept = torch.zeros(num_units, dtype=torch.bool)
    kept[torch.arange(count) * num_units // max(1, count)] = True
    return kept
