"""Training and inference against peers that all can install, in one process and in turns.

    python -m benchmarks.speed [--only '[step1,phases,step2,wavlm,inference,forms]'] [--rounds 3] [--out DIR]

The peers: a dense distillation step on torchaudio's own HuBERT and WavLM (teacher, student forward and backward, clip,
AdamW, in float32), transformers' HubertModel for inference, and the machine's own matrix multiplication as the limit.
Every round times each of them once, so that whatever else the machine does meets all alike; medians and ratios count.
Weights are random, which costs the same; masks have the wanted expected sparsity, or that of the recipe's start, and
are drawn anew in every step. The section phases takes a step apart; forms times one without each of the faster forms
in wav2vec2/kernels.py, of which some are taken only where they win.
Prints a table, writes speed.json and speed.svg. Stopped and run again, it goes on after the last point.
"""

import copy
import functools
import statistics
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchaudio
from matplotlib.figure import Figure
from torch import nn

from benchmarks.plots import write
from benchmarks.steps import BF16, Ours, Peer, Step, kept_bytes, matmul_peak, num_macs, set_sparsity
from distillation.commandline import command_of
from distillation.config import RECIPES, parse_recipe
from distillation.errors import UserError
from distillation.journal import Journal
from distillation.sparsity import make_prunable
from distillation.stopping import keeping
from evaluation.conditions import conditions
from evaluation.tables import machine, markdown_table
from evaluation.timing import in_turns, noise
from wav2vec2 import Wav2Vec2Model, prune, wav2vec2_model
from wav2vec2.architecture import HUBERT_BASE, WAVLM_BASE
from wav2vec2.counting import count_params
from wav2vec2.kernels import FORMS, choices, usual_forms

SPARSITIES = (0.0, 0.25, 0.5, 0.7, 0.75, 0.85)
NAMES = {"step1": "HuBERT Base", "wavlm": "WavLM Base+"}
SECTIONS = ["step1", "phases", "step2", "wavlm", "inference", "forms"]
PEAK = "matmul peak"
START = "start"  # the masks as the recipe begins with them
# What was aimed at, on two CPU threads: a row's name without its precision -> times faster, by precision.
GOALS = {
    "HuBERT Base, step 1, 4 x 5 s, start": {"f32": 1.2, "bf16": 2.7},
    "HuBERT Base, step 1, 4 x 5 s, 70% pruned": {"f32": 2.6, "bf16": 5.0},
    "HuBERT Base, step 1, 4 x 5 s, whole schedule": {"f32": 2.4, "bf16": 4.6},
    "HuBERT Base, step 2, 4 x 5 s": {"f32": 1.2, "bf16": 2.5},
    "WavLM Base+, step 1, 1 x 15 s, 70% pruned": {"f32": 2.2, "bf16": 3.8},
    "student against teacher, 10 s": {"f32": 3.4, "bf16": 7.0},
}


@dataclass
class Training:
    """What step 1 is measured on."""

    section: str
    config: dict[str, Any]  # of the teacher
    peer_model: Callable[[], nn.Module]  # torchaudio's of that size
    size: int  # waveforms in a batch
    seconds: float  # of each
    sparsities: Collection[float | str]  # START comes first if at all


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


def measured(known: Journal, point: str, measure: Callable[[], list[Row]]) -> list[Row]:
    """The rows of a point whose variants are timed beside each other, unless they are known."""
    if point not in known:
        known[point] = [vars(row) for row in measure()]
    return [Row(**row) for row in known[point]]


def masked_and_teacher(config: dict[str, Any], sparsity: float | None = None) -> tuple[Wav2Vec2Model, Wav2Vec2Model]:
    """The recipe's student, with its masks where they start or at an expected sparsity, and its random teacher."""
    teacher = wav2vec2_model(**config).eval()
    recipe, _ = parse_recipe(["--config", str(RECIPES / "dphubert_base.yaml")])
    student = make_prunable(teacher, recipe.pruning)
    if sparsity is not None:
        set_sparsity(student, sparsity)
    return student, teacher


def training_rows(what: Training, rounds: int, peaks: dict[torch.dtype | None, float], known: Journal) -> list[Row]:
    """Step 1 at several sparsities, in float32 and bfloat16, against the dense step."""
    waveforms = noise(what.size, what.seconds)

    @functools.cache
    def models() -> tuple[Ours, Peer, Wav2Vec2Model]:
        student, teacher = masked_and_teacher(what.config)
        return Ours(student, teacher, waveforms), Peer(what.peer_model(), what.peer_model(), waveforms), teacher

    def measure(point: float | str, title: str) -> list[Row]:
        ours, peer, teacher = models()
        if isinstance(point, str):
            sparsity = 1 - ours.student.get_num_params().item() / count_params(teacher)
        else:
            sparsity = point
            set_sparsity(ours.student, point)
        steps: dict[str, Step] = {"peer": peer.step, "f32": ours.step, "bf16": lambda: ours.step(BF16)}
        found = in_turns(steps, rounds, title)
        macs = num_macs(teacher, waveforms) + 3 * num_macs(prune(ours.student)[0], waveforms)
        rows = []
        for precision, dtype in (("f32", None), ("bf16", BF16)):
            share, extra = macs / found[precision] / peaks[dtype], {"sparsity": sparsity}
            rows.append(Row(what.section, f"{title}, {precision}", found[precision], found["peer"], share, extra))
        if sparsity == 0.7:
            dense = kept_bytes(peer.forward, peer.student)
            for row, dtype in zip(rows, (None, BF16)):
                row.extra["kept"] = kept_bytes(partial(ours.forward, dtype), ours.student) / dense
        return rows

    found = []
    for point in what.sparsities:
        name = point if isinstance(point, str) else f"{point:.0%} pruned"
        title = f"{NAMES[what.section]}, step 1, {what.size} x {what.seconds:g} s, {name}"
        found += measured(known, title, partial(measure, point, title))
    return found


def phase_rows(rounds: int, peaks: dict[torch.dtype | None, float]) -> list[Row]:
    """Step 1 at 70 % taken apart, beside the dense step."""
    waveforms = noise(4, 5.0)
    student, teacher = masked_and_teacher(HUBERT_BASE, 0.7)
    ours = Ours(student, teacher, waveforms)
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

    in_turns({name: partial(timed, name) for name in runs}, rounds, "phases")
    forward = num_macs(prune(ours.student)[0], waveforms)
    macs = {"teacher": num_macs(teacher, waveforms), "student, forward": forward, "student, backward": 2 * forward}
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
    costs = np.interp(target * np.arange(101) / 100, [s for s, _ in points], [cost for _, cost in points])
    seconds = float((warmup * costs.mean() + (steps - warmup) * costs[-1]) / steps)
    return Row("step1", f"HuBERT Base, step 1, 4 x 5 s, whole schedule, {precision}", seconds, 1.0)


def step2_rows(rounds: int, peaks: dict[torch.dtype | None, float]) -> list[Row]:
    """Step 2 on a pruned student against the same student run plainly with torchaudio's teacher."""
    waveforms = noise(4, 5.0)
    masked, teacher = masked_and_teacher(HUBERT_BASE, 0.75)
    student, same = prune(masked)[0], prune(masked)[0]
    ours, peer = Ours(student, teacher, waveforms), Peer(same, torchaudio.models.hubert_base(), waveforms)
    steps: dict[str, Step] = {"peer": peer.step, "f32": ours.step, "bf16": lambda: ours.step(BF16),
                              "bf16 teacher, f32": lambda: ours.step(None, BF16)}  # fmt: skip
    found = in_turns(steps, rounds, "step 2")
    macs = num_macs(teacher, waveforms) + 3 * num_macs(student, waveforms)
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


def inference_rows(rounds: int, peaks: dict[torch.dtype | None, float], known: Journal) -> list[Row]:
    """A 23.6 M student against its teacher, and the teacher against transformers' model."""
    from transformers import HubertConfig, HubertModel

    @functools.cache
    def models() -> tuple[Wav2Vec2Model, Wav2Vec2Model, HubertModel]:
        masked, teacher = masked_and_teacher(HUBERT_BASE, 0.75)
        return prune(masked)[0].eval(), teacher, HubertModel(HubertConfig()).eval()

    def measure(seconds: float) -> list[Row]:
        student, teacher, other = models()
        half = copy.deepcopy(student).bfloat16()
        waveform = noise(1, seconds)

        def lowered() -> None:
            half.extract_features(waveform.bfloat16())

        def autocasted() -> None:
            with torch.autocast("cpu", BF16):
                student.extract_features(waveform)

        steps: dict[str, Step] = {
            "transformers": partial(other, waveform, output_hidden_states=True),
            "teacher": partial(teacher.extract_features, waveform),
            "f32": partial(student.extract_features, waveform),
            "bf16": lowered,
            "autocast to bf16": autocasted,
        }
        with torch.inference_mode():
            found = in_turns(steps, 3 * rounds, f"inference {seconds:g} s")
        macs = {model: num_macs(model, waveform) for model in (student, teacher)}
        rows = []
        for how, dtype in (("f32", None), ("bf16", BF16), ("autocast to bf16", BF16)):
            share = macs[student] / found[how] / peaks[dtype]
            title = f"student against teacher, {seconds:g} s, {how}"
            rows.append(Row("inference", title, found[how], found["teacher"], share))
        share = macs[teacher] / found["teacher"] / peaks[None]
        title = f"teacher against transformers, {seconds:g} s, f32"
        rows.append(Row("inference", title, found["teacher"], found["transformers"], share))
        return rows

    return [
        row for seconds in (1.0, 10.0, 35.0)
        for row in measured(known, f"inference, {seconds:g} s", partial(measure, seconds))
    ]  # fmt: skip


def form_rows(rounds: int, known: Journal) -> list[Row]:
    """A step at 70 % with all of FORMS against one without each of them, and without any."""

    @functools.cache
    def ours() -> Ours:
        student, teacher = masked_and_teacher(HUBERT_BASE, 0.7)
        return Ours(student, teacher, noise(4, 5.0))

    def measure(precision: str, dtype: torch.dtype | None) -> list[Row]:
        def step(names: Collection[str]) -> None:
            with usual_forms(names):
                ours().step(dtype)

        steps: dict[str, Step] = {name: partial(step, [name]) for name in FORMS}
        steps |= {"any": partial(step, FORMS), "all": partial(step, [])}
        found = in_turns(steps, rounds, f"forms {precision}")
        title = "HuBERT Base, step 1, 4 x 5 s, 70% pruned, against one without"
        return [
            Row("forms", f"{title} {FORMS.get(name, name)}, {precision}", found["all"], found[name])
            for name in [*FORMS, "any"]
        ]

    return [
        row for precision, dtype in (("f32", None), ("bf16", BF16))
        for row in measured(known, f"forms, {precision}", partial(measure, precision, dtype))
    ]  # fmt: skip


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
    head, *lines = zip(*columns)
    return markdown_table(head, lines)


def draw(rows: list[Row]) -> Figure:
    """Times faster than dense against sparsity, one line per section and precision."""
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axis = figure.subplots()
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
    return figure


def measure_sections(only: list[str], rounds: int, peaks: dict[torch.dtype | None, float], known: Journal) -> list[Row]:
    """What is not known of these sections is measured."""
    rows: list[Row] = []
    if "step1" in only:
        base = Training("step1", HUBERT_BASE, torchaudio.models.hubert_base, 4, 5.0, (START, *SPARSITIES))
        four = training_rows(base, rounds, peaks, known)
        rows += [*four, *(schedule_total(four, precision) for precision in ("f32", "bf16"))]
        rows += training_rows(replace(base, size=1, seconds=15.0, sparsities=(0.0, 0.7)), rounds, peaks, known)
    if "phases" in only:
        rows += measured(known, "phases", partial(phase_rows, rounds, peaks))
    if "step2" in only:
        rows += measured(known, "step2", partial(step2_rows, rounds, peaks))
    if "wavlm" in only:
        wavlm = Training("wavlm", WAVLM_BASE, torchaudio.models.wavlm_base, 1, 15.0, (0.0, 0.7))
        rows += training_rows(wavlm, rounds, peaks, known)
    if "inference" in only:
        rows += inference_rows(rounds, peaks, known)
    if "forms" in only:
        rows += form_rows(rounds, known)
    return rows


def run(
    only: list[str] = SECTIONS, rounds: int = 3, threads: int = 2, out: Path = Path("benchmarks/results")
) -> list[Row]:
    """Measure, print and plot.

    What is measured is kept, point by point, in OUT/.speed.jsonl until all is there.

    Args:
        only: any of step1, phases, step2, wavlm, inference, forms.
        rounds: timed steps of each variant; inference takes three times as many.
        threads: of torch.
        out: folder of speed.json and speed.svg.

    Raises:
        Stopped: a signal asked for it.
        UserError: an unknown section.
    """
    if unknown := [name for name in only if name not in SECTIONS]:
        raise UserError(f"--only: no section {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    known = Journal(out / ".speed.jsonl", conditions(rounds=rounds), "points")
    with keeping(f"the points measured so far are in {known.path}"):
        if PEAK not in known:
            known[PEAK] = [matmul_peak(torch.float32), matmul_peak(BF16)]
        peaks: dict[torch.dtype | None, float] = dict(zip((None, BF16), known[PEAK]))
        rows = measure_sections(only, rounds, peaks, known)
    print(f"{machine()}, {threads} threads; matmul peak {peaks[None] / 1e9:.0f} GMAC/s float32, "
          f"{peaks[BF16] / 1e9:.0f} bfloat16\n")  # fmt: skip
    apart = ("phases", "forms")
    tables = [
        [row for row in rows if row.section not in apart],
        *([row for row in rows if row.section == name] for name in apart),
    ]
    print("\n\n".join(table(some) for some in tables if some))
    content = {
        "date": str(date.today()), "threads": threads, "torch": torch.__version__, "kernels": choices(),
        "peak_gmacs": {"f32": peaks[None] / 1e9, "bf16": peaks[BF16] / 1e9},
        "rows": [{**vars(row), "ratio": row.ratio, "goal": row.goal} for row in rows],
    }  # fmt: skip
    print(f"\n-> {write(out, 'speed', content, draw(rows))}")
    known.remove()
    return rows


main = command_of(run, __doc__)

if __name__ == "__main__":
    main()
