"""Training and inference against peers that all can install, in one process and in turns.

    python -m benchmarks.speed [--only '[step1,phases,step2,wavlm,inference,forms]'] [--rounds 3] [--out DIR]

The peers: a dense distillation step on torchaudio's own HuBERT and WavLM (teacher, student forward and backward, clip,
AdamW, in float32), transformers' HubertModel for inference, and the machine's own matrix multiplication as the limit.
Every round times each of them once, so that whatever else the machine does meets all alike; medians and ratios count.
Weights are random, which costs the same; masks have the wanted expected sparsity, or that of the recipe's start, and
are drawn anew in every step. The section phases takes a step apart; forms times one without each of the faster forms
in wav2vec2/kernels.py.
Prints a table, writes speed.json and speed.svg.
"""

from __future__ import annotations

import copy
import io
import itertools
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any
from unittest import mock

import jsonargparse
import matplotlib
import torch
import torchaudio
from torch import Tensor, nn
from tqdm import tqdm

from distillation.config import RECIPES, parse_arguments, parse_recipe
from distillation.errors import UserError, command
from distillation.objectives import ObjectiveConfig, Objectives, Teacher
from distillation.objectives.layer_to_layer import DistanceWeights, distances
from distillation.optim import param_groups
from distillation.sparsity import Lagrangian, make_prunable
from tests.configs import HUBERT_BASE
from wav2vec2 import Wav2Vec2Model, prune, wav2vec2_model
from wav2vec2.checkpoint import replacing
from wav2vec2.kernels import linear
from wav2vec2.macs import num_macs

matplotlib.use("svg")
from matplotlib import pyplot as plt

SAMPLE_RATE = 16_000
SPARSITIES = (0.0, 0.25, 0.5, 0.7, 0.75, 0.85)
LAYERS = (0, 4, 8, 12)
HEAD_WIDTH = 768
SPREAD = 2.0  # of log_alpha around its mean: some units nearly certain, some undecided
BF16 = torch.bfloat16
WAVLM_BASE = {
    **HUBERT_BASE, "encoder_num_heads": None, "encoder_head_dim": None, "encoder_total_num_heads": [12] * 12,
    "encoder_remaining_heads": [list(range(12))] * 12, "encoder_num_buckets": 320, "encoder_max_distance": 800,
}  # fmt: skip
NAMES = {"step1": "HuBERT Base", "wavlm": "WavLM Base+"}
SECTIONS = ["step1", "phases", "step2", "wavlm", "inference", "forms"]
START = "start"  # the masks as the recipe begins with them
# Faster forms of operations, and the function of wav2vec2 that asks whether to use each.
FORMS = {
    "float32 products by oneDNN": "linear",
    "channels of a frame together": "keeps_channels_first",
    "positional convolution over shifted copies": "wide_conv1d",
    "first norm folded into its convolution": "forward",
    "attention written out": "attend",
    "dropout from 16 random bits": "dropout",
}
# What was aimed at, on two CPU threads: a row's name without its precision -> times faster, by precision.
GOALS = {
    "HuBERT Base, step 1, 4 x 5 s, start": {"f32": 1.2, "bf16": 2.7},
    "HuBERT Base, step 1, 4 x 5 s, 70% pruned": {"f32": 2.6, "bf16": 5.0},
    "HuBERT Base, step 1, 4 x 5 s, whole schedule": {"f32": 2.4, "bf16": 4.6},
    "HuBERT Base, step 2, 4 x 5 s": {"f32": 1.2, "bf16": 2.5},
    "WavLM Base+, step 1, 1 x 15 s, 70% pruned": {"f32": 2.2, "bf16": 3.8},
    "student against teacher, 10 s": {"f32": 3.4, "bf16": 7.0},
}
Step = Callable[[], object]


@dataclass
class Row:
    """One line: a variant, its peer of the same round, both in seconds."""

    section: str
    name: str
    seconds: float
    peer: float
    share_of_peak: float | None = None  # of the measured matrix multiplication in the same precision
    extra: dict[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """How many times faster than the peer."""
        return self.peer / self.seconds

    @property
    def goal(self) -> float | None:
        """What the ratio should be at least, where something was aimed at."""
        what, _, precision = self.name.rpartition(", ")
        return GOALS.get(what, {}).get(precision)


def autocast(dtype: torch.dtype | None, device: str = "cpu") -> Any:
    """Of a step: bfloat16, or float32 as it is."""
    return nullcontext() if dtype is None else torch.autocast(device, dtype)


class Stopwatch:
    """Seconds spent in the phases of a step; a phase inside another is not counted there."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time what runs inside."""
        begin, inner = time.perf_counter(), sum(self.seconds.values())
        yield
        elapsed = time.perf_counter() - begin - (sum(self.seconds.values()) - inner)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + elapsed


class Ours:
    """This toolkit's training step, as its Lightning module takes it.

    Args:
        student: masked for step 1, dense for step 2.
        teacher: dense.
        waveforms: [B, N], nothing padded.
        objective: what to train towards; DPHuBERT's by default.
    """

    def __init__(
        self,
        student: Wav2Vec2Model,
        teacher: Wav2Vec2Model,
        waveforms: Tensor,
        objective: ObjectiveConfig | None = None,
    ) -> None:
        recipe, _ = parse_recipe(["--config", str(RECIPES / "dphubert_base.yaml")])
        torch.manual_seed(0)
        self.student, self.waveforms = student.train(), waveforms
        self.teachers = {None: Teacher(teacher), BF16: Teacher(copy.deepcopy(teacher), BF16)}
        self.objectives = Objectives(objective or recipe.objective, student, teacher).to(waveforms.device)
        pruning = recipe.pruning if student.masks() else None
        before = sum(p.numel() for p in teacher.parameters())
        self.lagrangian = None
        if pruning is not None:
            self.lagrangian = Lagrangian(before, pruning.target_sparsity, pruning.warmup_steps).to(waveforms.device)
        whole = nn.ModuleList([student, self.objectives, *([self.lagrangian] if self.lagrangian else [])])
        groups = param_groups(whole, self.lagrangian, recipe.optim, pruning)
        # rates of 0: a step must not change the sparsity that is being measured
        for group in groups:
            group["lr"] = 0.0 if group["name"] in ("log_alpha", "lambda") else 1e-6
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        self.watch = Stopwatch()

    def forward(self, dtype: torch.dtype | None = None, teacher_dtype: torch.dtype | None = None) -> Tensor:
        """Loss of a micro-batch; the teacher's type is the student's where it is not given."""

        def teacher(*args: Any) -> Any:
            with self.watch("teacher"):
                return self.teachers[teacher_dtype or dtype](*args)

        with self.watch("student, forward"), autocast(dtype, self.waveforms.device.type):
            total = self.objectives(teacher, self.student, self.waveforms, None).total
            if self.lagrangian is not None:
                total = total + self.lagrangian(self.student.get_num_params(), 0)
        return total

    def step(self, dtype: torch.dtype | None = None, teacher_dtype: torch.dtype | None = None) -> None:
        """One update."""
        loss = self.forward(dtype, teacher_dtype)
        with self.watch("student, backward"):
            loss.backward()
        with self.watch("update"):
            params = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
            norm = torch.nn.utils.get_total_norm([p.grad for p in params])
            torch.nn.utils.clip_grads_with_norm_(params, 10.0, norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


class Peer:
    """The same step plainly: torchaudio's teacher, a student of any origin, every layer's state, torch's AdamW.

    Args:
        student: has ``extract_features``.
        teacher: torchaudio's.
        waveforms: [B, N].
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, waveforms: Tensor) -> None:
        self.student, self.teacher, self.waveforms = student.train(), teacher.eval().requires_grad_(False), waveforms
        self.heads = nn.ModuleList(nn.Linear(HEAD_WIDTH, HEAD_WIDTH) for _ in LAYERS).to(waveforms.device)
        self.params = [p for p in [*student.parameters(), *self.heads.parameters()] if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.params, 1e-6)
        self.watch = Stopwatch()

    def forward(self) -> Tensor:
        """Loss of a micro-batch."""
        with self.watch("teacher"), torch.no_grad():
            targets = states(self.teacher, self.waveforms)
        with self.watch("student, forward"):
            found = states(self.student, self.waveforms)
            predictions = [head(found[layer]) for head, layer in zip(self.heads, LAYERS)]
            weights = DistanceWeights()
            terms = distances(predictions, [targets[layer] for layer in LAYERS], None, weights)
            return torch.stack([terms[name] * weight for name, weight in weights.as_terms().items() if weight]).sum()

    def step(self) -> None:
        """One update in float32."""
        self.finish(self.forward())

    def finish(self, loss: Tensor) -> None:
        """Backward, clip, update."""
        with self.watch("student, backward"):
            loss.backward()
        with self.watch("update"):
            torch.nn.utils.clip_grad_norm_(self.params, 10.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


def states(model: nn.Module, waveforms: Tensor) -> list[Tensor]:
    """The Transformer's input and all layers; torchaudio's own model gives the layers alone."""
    if isinstance(model, Wav2Vec2Model):
        return model.extract_features(waveforms)[0]
    features, _ = model.feature_extractor(waveforms, None)  # type: ignore[operator]
    encoder: Any = model.encoder
    features, mask = encoder._preprocess(features, None)
    return [features, *encoder.transformer.get_intermediate_outputs(features, attention_mask=mask)]


def set_sparsity(model: Wav2Vec2Model, target: float) -> None:
    """Masks whose expected number of parameters is that share short of all; units of all kinds alike."""
    masks = list(model.masks().values())
    generator = torch.Generator().manual_seed(0)
    noise = [SPREAD * torch.randn(len(mask), generator=generator) for mask in masks]
    total = sum(p.numel() for name, p in model.named_parameters() if not name.endswith("log_alpha"))
    low, high = -20.0, 20.0
    with torch.no_grad():
        for _ in range(30):
            middle = (low + high) / 2
            for mask, values in zip(masks, noise):
                mask.log_alpha.copy_(values + middle)
            if model.get_num_params().item() > (1 - target) * total:
                high = middle
            else:
                low = middle


def in_turns(steps: dict[str, Step], rounds: int, title: str, shuffled: bool = False) -> dict[str, float]:
    """Median seconds of each after one round that does not count.

    With ``shuffled`` every round has another order: the next step feels in what state one leaves the memory, which
    counts where small differences do.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    with tqdm(total=(rounds + 1) * len(steps), desc=title, unit="step", leave=False, dynamic_ncols=True) as bar:
        for i in range(rounds + 1):
            order = random.Random(i).sample(list(steps), len(steps)) if shuffled else list(steps)
            for name, step in ((name, steps[name]) for name in order):
                begin = time.perf_counter()
                step()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if i:
                    times[name].append(time.perf_counter() - begin)
                bar.update()
    return {name: statistics.median(some) for name, some in times.items()}


def matmul_peak(dtype: torch.dtype, size: int = 2048, device: str = "cpu") -> float:
    """Multiply-accumulates per second of a square matrix product, by the faster of the libraries that torch has."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    linear(a[None], b)[0, 0, 0].item()
    begin, count = time.perf_counter(), 0
    while count < 3 or time.perf_counter() - begin < 1.0:
        for _ in range(5):
            c = linear(a[None], b)
        c[0, 0, 0].item()  # waits for the device
        count += 5
    return count * size**3 / (time.perf_counter() - begin)


def kept_bytes(forward: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes that a forward pass keeps for backward, parameters left out, each storage once."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no storage is freed and its address given to another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(kept.values())


def training_rows(
    section: str, config: dict[str, Any], peer_model: Callable[[], nn.Module], batch: tuple[int, float],
    sparsities: Collection[float | str], rounds: int, peaks: dict[torch.dtype | None, float],
) -> list[Row]:  # fmt: skip
    """Step 1 at several sparsities, in float32 and bfloat16, against the dense step; START comes first if at all."""
    size, seconds = batch
    waveforms = torch.randn(size, round(seconds * SAMPLE_RATE), generator=torch.Generator().manual_seed(0))
    teacher = wav2vec2_model(**config).eval()
    recipe, _ = parse_recipe(["--config", str(RECIPES / "dphubert_base.yaml")])
    ours = Ours(make_prunable(teacher, recipe.pruning), teacher, waveforms)
    peer = Peer(peer_model(), peer_model(), waveforms)
    dense_macs = 4 * num_macs(teacher, [waveforms.shape[1]] * size)  # teacher, and three times the student
    before = sum(p.numel() for p in teacher.parameters())
    rows = []
    for point in sparsities:
        if isinstance(point, str):
            name, sparsity = START, 1 - ours.student.get_num_params().item() / before
        else:
            name, sparsity = f"{point:.0%} pruned", point
            set_sparsity(ours.student, point)
        steps: dict[str, Step] = {"peer": peer.step, "f32": ours.step, "bf16": lambda: ours.step(BF16)}
        found = in_turns(steps, rounds, f"{section} {name}")
        pruned_macs = num_macs(prune(ours.student)[0], [waveforms.shape[1]] * size)
        macs = dense_macs / 4 + 3 * pruned_macs
        for precision, dtype in (("f32", None), ("bf16", BF16)):
            share = macs / found[precision] / peaks[dtype]
            title = f"{NAMES[section]}, step 1, {size} x {seconds:g} s, {name}, {precision}"
            rows.append(Row(section, title, found[precision], found["peer"], share, {"sparsity": sparsity}))
        if sparsity == 0.7:
            dense = kept_bytes(peer.forward, peer.student)
            for row, dtype in zip(rows[-2:], (None, BF16)):
                row.extra["kept"] = kept_bytes(lambda dtype=dtype: ours.forward(dtype), ours.student) / dense
    return rows


def phase_rows(rounds: int, peaks: dict[torch.dtype | None, float]) -> list[Row]:
    """Step 1 at 70 % taken apart, beside the dense step."""
    waveforms = torch.randn(4, 5 * SAMPLE_RATE, generator=torch.Generator().manual_seed(0))
    teacher = wav2vec2_model(**HUBERT_BASE).eval()
    recipe, _ = parse_recipe(["--config", str(RECIPES / "dphubert_base.yaml")])
    ours = Ours(make_prunable(teacher, recipe.pruning), teacher, waveforms)
    set_sparsity(ours.student, 0.7)
    peer = Peer(torchaudio.models.hubert_base(), torchaudio.models.hubert_base(), waveforms)
    runs: dict[str, tuple[Ours | Peer, Step]] = {
        "peer": (peer, peer.step), "f32": (ours, ours.step), "bf16": (ours, lambda: ours.step(BF16))
    }  # fmt: skip
    found: dict[tuple[str, str], list[float]] = {}

    def timed(name: str) -> None:
        who, step = runs[name]
        who.watch.seconds.clear()
        step()
        for phase, seconds in who.watch.seconds.items():
            found.setdefault((name, phase), []).append(seconds)

    in_turns({name: lambda name=name: timed(name) for name in runs}, rounds, "phases")
    lengths = [waveforms.shape[1]] * len(waveforms)
    student = num_macs(prune(ours.student)[0], lengths)
    macs = {"teacher": num_macs(teacher, lengths), "student, forward": student, "student, backward": 2 * student}
    median = {key: statistics.median(values[1:]) for key, values in found.items()}  # the first does not count
    return [
        Row("phases", f"HuBERT Base, step 1, 4 x 5 s, 70% pruned: {phase}, {precision}", median[precision, phase],
            median["peer", phase], macs[phase] / median[precision, phase] / peaks[dtype] if phase in macs else None)
        for precision, dtype in (("f32", None), ("bf16", BF16))
        for phase in ("teacher", "student, forward", "student, backward", "update")
    ]  # fmt: skip


def schedule_total(
    rows: list[Row], precision: str, steps: int = 50_000, warmup: int = 5_000, target: float = 0.75
) -> Row:
    """Mean update of the whole of step 1, in dense steps: the sparsity follows its published target."""
    points = sorted((row.extra["sparsity"], 1 / row.ratio) for row in rows if row.name.endswith(precision))

    def cost(sparsity: float) -> float:
        for (left, a), (right, b) in itertools.pairwise(points):
            if left <= sparsity <= right:
                return a + (b - a) * (sparsity - left) / (right - left)
        return points[-1][1]

    ramp = statistics.mean(cost(target * i / 100) for i in range(101))
    seconds = (warmup * ramp + (steps - warmup) * cost(target)) / steps
    return Row("step1", f"HuBERT Base, step 1, 4 x 5 s, whole schedule, {precision}", seconds, 1.0)


def step2_rows(rounds: int, peaks: dict[torch.dtype | None, float]) -> list[Row]:
    """Step 2 on a pruned student against the same student run plainly with torchaudio's teacher."""
    waveforms = torch.randn(4, 5 * SAMPLE_RATE, generator=torch.Generator().manual_seed(0))
    teacher = wav2vec2_model(**HUBERT_BASE).eval()
    recipe, _ = parse_recipe(["--config", str(RECIPES / "dphubert_base.yaml")])
    masked = make_prunable(teacher, recipe.pruning)
    set_sparsity(masked, 0.75)
    student, copy = prune(masked)[0], prune(masked)[0]
    ours, peer = Ours(student, teacher, waveforms), Peer(copy, torchaudio.models.hubert_base(), waveforms)
    steps: dict[str, Step] = {"peer": peer.step, "f32": ours.step, "bf16": lambda: ours.step(BF16),
                              "bf16 teacher, f32": lambda: ours.step(None, BF16)}  # fmt: skip
    found = in_turns(steps, rounds, "step 2")
    lengths = [waveforms.shape[1]] * 4
    macs = num_macs(teacher, lengths) + 3 * num_macs(student, lengths)
    return [
        Row(
            "step2",
            f"HuBERT Base, step 2, 4 x 5 s, {name}",
            found[name],
            found["peer"],
            None if "teacher" in name else macs / found[name] / peaks[dtype],
        )
        for name, dtype in (("f32", None), ("bf16 teacher, f32", None), ("bf16", BF16))
    ]


def inference_rows(rounds: int, peaks: dict[torch.dtype | None, float]) -> list[Row]:
    """A 23.6 M student against its teacher, and the teacher against transformers' model."""
    from transformers import HubertConfig, HubertModel

    teacher = wav2vec2_model(**HUBERT_BASE).eval()
    recipe, _ = parse_recipe(["--config", str(RECIPES / "dphubert_base.yaml")])
    masked = make_prunable(teacher, recipe.pruning)
    set_sparsity(masked, 0.75)
    student = prune(masked)[0].eval()
    other = HubertModel(HubertConfig()).eval()
    half = copy.deepcopy(student).bfloat16()
    rows = []
    for seconds in (1.0, 10.0, 35.0):
        waveform = torch.randn(1, round(seconds * SAMPLE_RATE))

        def autocasted(waveform: Tensor = waveform) -> None:
            with torch.autocast("cpu", BF16):
                student.extract_features(waveform)

        steps: dict[str, Step] = {
            "transformers": lambda w=waveform: other(w, output_hidden_states=True),
            "teacher": lambda w=waveform: teacher.extract_features(w),
            "f32": lambda w=waveform: student.extract_features(w),
            "bf16": lambda w=waveform: half.extract_features(w.bfloat16()),
            "autocast to bf16": autocasted,
        }  # fmt: skip
        with torch.inference_mode():
            found = in_turns(steps, 3 * rounds, f"inference {seconds:g} s")
        macs = {model: num_macs(model, [waveform.shape[1]]) for model in (student, teacher)}
        for how, dtype in (("f32", None), ("bf16", BF16), ("autocast to bf16", BF16)):
            share = macs[student] / found[how] / peaks[dtype]
            title = f"student against teacher, {seconds:g} s, {how}"
            rows.append(Row("inference", title, found[how], found["teacher"], share))
        share = macs[teacher] / found["teacher"] / peaks[None]
        title = f"teacher against transformers, {seconds:g} s, f32"
        rows.append(Row("inference", title, found["teacher"], found["transformers"], share))
    return rows


@contextmanager
def usual_forms(names: Collection[str]) -> Iterator[None]:
    """Without some of FORMS: those operations run as a compiler would see them."""
    callers = {FORMS[name] for name in names}

    def traced() -> bool:
        return sys._getframe(1).f_code.co_name in callers

    with mock.patch("wav2vec2.kernels.traced", traced), mock.patch("wav2vec2.feature_extractor.traced", traced):
        yield


def form_rows(rounds: int) -> list[Row]:
    """A step at 70 % with all of FORMS against one without each of them, and without any."""
    waveforms = torch.randn(4, 5 * SAMPLE_RATE, generator=torch.Generator().manual_seed(0))
    teacher = wav2vec2_model(**HUBERT_BASE).eval()
    recipe, _ = parse_recipe(["--config", str(RECIPES / "dphubert_base.yaml")])
    ours = Ours(make_prunable(teacher, recipe.pruning), teacher, waveforms)
    set_sparsity(ours.student, 0.7)
    rows = []
    for precision, dtype in (("f32", None), ("bf16", BF16)):

        def step(names: Collection[str], dtype: torch.dtype | None = dtype) -> None:
            with usual_forms(names):
                ours.step(dtype)

        steps: dict[str, Step] = {name: lambda name=name: step([name]) for name in FORMS}
        steps |= {"any": lambda: step(list(FORMS)), "all": lambda: step([])}
        found = in_turns(steps, rounds, f"forms {precision}", shuffled=True)
        title = "HuBERT Base, step 1, 4 x 5 s, 70% pruned, against one without"
        rows += [Row("forms", f"{title} {name}, {precision}", found["all"], found[name]) for name in [*FORMS, "any"]]
    return rows


def table(rows: list[Row]) -> str:
    """Markdown, without columns that would be empty."""
    cells = [
        ["what", "seconds", "peer's seconds", "times faster", "goal", "of matmul peak", "activations kept, of dense"]
    ]
    for row in rows:
        goal = "" if row.goal is None else f"{row.goal:g}"
        share = "" if row.share_of_peak is None else f"{row.share_of_peak:.0%}"
        kept = f"{row.extra['kept']:.2f}" if "kept" in row.extra else ""
        cells.append([row.name, f"{row.seconds:.3f}", f"{row.peer:.3f}", f"{row.ratio:.2f}", goal, share, kept])
    columns = [column for column in zip(*cells) if any(column[1:])]
    head, *lines = ["| " + " | ".join(line) + " |" for line in zip(*columns)]
    return "\n".join([head, "|---" * len(columns) + "|", *lines])


def draw(rows: list[Row]) -> str:
    """SVG: times faster than dense against sparsity, one line per section and precision."""
    figure, axis = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if "sparsity" in row.extra and START not in row.name:
            model, _, batch, _, precision = row.name.split(", ")
            curves.setdefault(f"{model}, {batch}, {precision}", []).append((row.extra["sparsity"], row.ratio))
    for name, points in curves.items():
        axis.plot(*zip(*sorted(points)), marker="o", label=name)
    axis.axhline(1, color="0.6", linewidth=1)
    axis.set(xlabel="sparsity", ylabel="times faster than the dense step", ylim=(0, None))
    axis.grid(alpha=0.2)
    if curves:
        axis.legend(fontsize=8)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    plt.close(figure)
    return text.getvalue()


def run(
    only: list[str] = SECTIONS, rounds: int = 3, threads: int = 2, out: Path = Path("benchmarks/results")
) -> list[Row]:
    """Measure, print and plot.

    Args:
        only: any of step1, phases, step2, wavlm, inference, forms.
        rounds: timed steps of each variant; inference takes three times as many.
        threads: of torch.
        out: folder of speed.json and speed.svg.
    """
    if unknown := [name for name in only if name not in SECTIONS]:
        raise UserError(f"--only: no section {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    peaks: dict[torch.dtype | None, float] = {None: matmul_peak(torch.float32), BF16: matmul_peak(BF16)}
    rows: list[Row] = []
    if "step1" in only:
        points = [START, *SPARSITIES]
        four = training_rows("step1", HUBERT_BASE, torchaudio.models.hubert_base, (4, 5.0), points, rounds, peaks)
        rows += [*four, *(schedule_total(four, precision) for precision in ("f32", "bf16"))]
        rows += training_rows("step1", HUBERT_BASE, torchaudio.models.hubert_base, (1, 15.0), (0.0, 0.7), rounds, peaks)
    if "phases" in only:
        rows += phase_rows(rounds, peaks)
    if "step2" in only:
        rows += step2_rows(rounds, peaks)
    if "wavlm" in only:
        rows += training_rows("wavlm", WAVLM_BASE, torchaudio.models.wavlm_base, (1, 15.0), (0.0, 0.7), rounds, peaks)
    if "inference" in only:
        rows += inference_rows(rounds, peaks)
    if "forms" in only:
        rows += form_rows(rounds)
    print(f"{date.today()}, {os.cpu_count()} cores, {threads} threads, torch {torch.__version__}, "
          f"Python {platform.python_version()}; matmul peak {peaks[None] / 1e9:.0f} GMAC/s float32, "
          f"{peaks[BF16] / 1e9:.0f} bfloat16\n")  # fmt: skip
    apart = ("phases", "forms")
    tables = [
        [row for row in rows if row.section not in apart],
        *([row for row in rows if row.section == name] for name in apart),
    ]
    print("\n\n".join(table(some) for some in tables if some))
    content = {
        "date": str(date.today()), "threads": threads, "torch": torch.__version__,
        "peak_gmacs": {"f32": peaks[None] / 1e9, "bf16": peaks[BF16] / 1e9},
        "rows": [{**vars(row), "ratio": row.ratio, "goal": row.goal} for row in rows],
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    for path, text in ((out / "speed.json", json.dumps(content, indent=1) + "\n"), (out / "speed.svg", draw(rows))):
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    print(f"\n-> {out / 'speed.json'}, {out / 'speed.svg'}")
    return rows


@command
def main() -> None:
    """Run the benchmark."""
    parser = jsonargparse.ArgumentParser(description=__doc__, exit_on_error=False)
    parser.add_function_arguments(run)
    run(**vars(parse_arguments(parser, sys.argv[1:])))


if __name__ == "__main__":
    main()
