"""A model in every format on the CPU, side by side: the size that is published, with random weights, and the demo's.

    scripts/demo.sh demo_out
    python -m benchmarks.formats --demo demo_out [--out DIR]

Real-time factors are computing seconds per second of audio, one waveform at a time. They are measured in turns, each
format and number of threads in a process of its own. Differences are those of any state from PyTorch's, of its largest
value, on utterances of mini-SUPERB; phones and words per frame are its linear probes on the weighted layers, with 95 %
intervals over 30 held-out speakers, of the demo's model as it is and where a format rounds. Prints a table, writes
formats.json and formats.svg. Stopped and run again, it goes on. Needs requirements/export.txt.
"""

import logging
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from benchmarks.format_runs import OPEN, Extract, real_time_factors
from benchmarks.minisuperb.evaluate import Data, Features, frame_counts, probe_settings, rates, start
from benchmarks.plots import write
from benchmarks.speed import masked_and_teacher
from distillation.commandline import command_of
from distillation.errors import UserError
from distillation.journal import Journal
from distillation.stopping import keeping
from evaluation.conditions import conditions
from evaluation.tables import machine, markdown_table
from exporting.formats import FORMATS
from exporting.source import ExportOptions, Source
from wav2vec2 import load_model, prune, save_model
from wav2vec2.architecture import HUBERT_BASE
from wav2vec2.checkpoint import fingerprint
from wav2vec2.counting import count_params
from wav2vec2.pruning import survivors_for_size

logger = logging.getLogger(__name__)
THREADS = 1, 2
SECONDS = 1.0, 10.0
TASKS = "phones", "words"
KEPT = 0.25  # of HuBERT Base's parameters in the published DPHuBERT: 23.59 M


class Measured(NamedTuple):
    """What ``--to`` and ``--quantize`` are for a row of the table."""

    to: str
    quantize: Literal["int8"] | None = None


EXPORTED = {
    "torch.export": Measured("torch-export"),
    "ONNX": Measured("onnx"),
    "ONNX int8": Measured("onnx", "int8"),
    "executorch": Measured("executorch"),
}


def save_published_size(path: Path) -> None:
    """A model of the size that DPHuBERT has, with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student, teacher = masked_and_teacher(HUBERT_BASE, 1 - KEPT)
        save_model(path, prune(student, survivors_for_size(student, round(KEPT * count_params(teacher))))[0])


def export_all(model: Path, out: Path, known: Journal) -> dict[str, Path]:
    """The model's file and those of the formats whose packages are here."""
    files = {"torch": model}
    for name, (to, quantize) in tqdm(EXPORTED.items(), f"exporting {out.name}", unit="format", leave=False):
        suffix = (f".{quantize}" if quantize else "") + FORMATS[to].suffix
        path, key = out.with_name(out.name + suffix), f"export: {out.name}, {name}"
        if known.pieces.get(key) is None or not path.is_file():
            try:
                import_module(FORMATS[to].module).export(Source.read(model), path, ExportOptions(quantize=quantize))
            except UserError as error:
                logger.warning("%s is left out: %s", name, error)
                continue
            known[key] = path.name
        files[name] = path
    return files


@torch.inference_mode()
def largest_difference(extract: Extract, reference: Extract, waveforms: list[Tensor]) -> float:
    """Of any state on some utterances, each alone, as a share of the state's largest value."""
    found: list[Tensor] = []
    for waveform in waveforms:
        inputs = waveform[None], torch.tensor([len(waveform)])
        for ours, theirs in zip(extract(*inputs)[0], reference(*inputs)[0], strict=True):
            found.append((ours - theirs).abs().max() / theirs.abs().max())
    return torch.stack(found).max().item()


def probed(extract: Extract, data: Data, steps: int) -> dict[str, list[float]]:
    """Phones and words per frame in per cent: rate, lower and upper end of its interval."""
    features = Features(extract)
    train, test = features(data.train), features(data.test)
    found = {}
    for task in TASKS:
        runs = [{task: frame_counts(task, data, train, test, steps)}]
        drawn = rates(runs, task, np.random.default_rng(0), 2000)
        found[task] = [float(rates(runs, task, None, 1)[0]), *np.percentile(drawn, [2.5, 97.5]).tolist()]
    return found


def measured(title: str, model: Path, out: Path, data: Data, known: Journal, rounds: int, steps: int | None) -> list:
    """One row for each format of a model; ``steps`` are the updates of each probe, None for no probes."""
    files = export_all(model, out, known)
    times = f"times: {out.name}, {', '.join(files)}"
    if times not in known:
        known[times] = real_time_factors(files, THREADS, SECONDS, rounds)
    rows = []
    reference = OPEN["torch"](model, max(THREADS))
    for name, path in tqdm(files.items(), f"comparing {out.name}", unit="format", leave=False):
        key = f"{out.name}, {name}"
        if key not in known:
            extract = OPEN[name](path, max(THREADS))
            rounds_values = name in EXPORTED and EXPORTED[name].quantize
            known[key] = {
                "difference": None if name == "torch" else largest_difference(
                    extract, reference, [u.waveform for u in data.test[:20]]
                ),
                "probes": probed(extract, data, steps) if steps and (name == "torch" or rounds_values) else {},
            }  # fmt: skip
        rows.append(
            {
                "model": title,
                "format": name,
                "bytes": path.stat().st_size,
                "real_time_factors": known[times][name],
                **known[key],
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    factors = [f"{n} thread{'s' * (n > 1)}, {s:g} s" for n in THREADS for s in SECONDS]
    head = ["model", "format", "MB", *factors, "largest difference", *(f"{task} %" for task in TASKS)]
    lines = []
    for row in rows:
        probes = [row["probes"].get(task) for task in TASKS]
        lines.append([
            row["model"],
            row["format"],
            f"{row['bytes'] / 1e6:.2f}",
            *(f"{factor:.3g}" for of_threads in row["real_time_factors"] for factor in of_threads),
            "" if row["difference"] is None else f"{row['difference']:.1e}",
            *("" if probe is None else f"{probe[0]:.1f} [{probe[1]:.1f}, {probe[2]:.1f}]" for probe in probes),
        ])  # fmt: skip
    return markdown_table(head, lines)


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Size on disk, and time with one and two threads; a line of panels per model."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(10, 0.6 + 2.2 * len(models)), layout="constrained")
    for line, model in zip(figure.subplots(len(models), 1 + len(THREADS), squeeze=False, sharey="row"), models):
        mine = [row for row in rows if row["model"] == model]
        places, height = np.arange(len(mine)), 0.38
        bars = line[0].barh(places, [row["bytes"] / 1e6 for row in mine], 2 * height, color="C7")
        line[0].bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
        line[0].set(title="size on disk, MB", yticks=places, yticklabels=[row["format"] for row in mine], ylabel=model)
        line[0].invert_yaxis()
        for i, (axis, threads) in enumerate(zip(line[1:], THREADS)):
            for k, seconds in enumerate(SECONDS):
                values = [1000 * row["real_time_factors"][i][k] for row in mine]
                bars = axis.barh(places + (k - 0.5) * height, values, height, label=f"{seconds:g} s", color=f"C{k}")
                axis.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
            axis.set_title(f"ms per second of audio, {threads} thread{'s' * (threads > 1)}")
        for axis in line:
            axis.title.set_size(10)
            axis.margins(x=0.2)
            axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*line[-1].get_legend_handles_labels(), loc="outside lower right", ncols=2, fontsize=8, frameon=False)
    return figure


def run(demo: Path = Path("demo_out"), out: Path | None = None, rounds: int = 9, steps: int = 600) -> None:
    """Export, measure, print and plot.

    What is finished is kept in OUT/.formats.jsonl until all is there.

    Args:
        demo: folder that scripts/demo.sh has left.
        out: folder of the exports, the probes' corpus, formats.json and formats.svg; DEMO/minisuperb by default.
        rounds: timed runs of each format, number of threads and length of audio.
        steps: updates of each probe.

    Raises:
        Stopped: a signal asked for it.
        UserError: the demo's folder lacks a file.
    """
    torch.set_num_threads(max(THREADS))
    out, data = start(demo, out, "final.pth")
    published, final = out / "published.pth", demo / "final.pth"
    if not published.is_file():
        save_published_size(published)
    of = conditions(
        published=fingerprint(load_model(published)), demo=fingerprint(load_model(final)), rounds=rounds,
        probes=probe_settings(steps), onnxruntime=_version("onnxruntime"),
    )  # fmt: skip
    known = Journal(out / ".formats.jsonl", of, "parts")
    with keeping(f"what is finished is in {known.path}"):
        rows = []
        for model, name, of_probes in ((published, "published", None), (final, "final", steps)):
            title = f"{'demo' if of_probes else 'published size'}, {count_params(load_model(model)) / 1e6:.2f} M"
            rows += measured(title, model, out / name, data, known, rounds, of_probes)
    written = write(out, "formats", rows, draw(rows))
    known.remove()
    print(f"{machine()}; real-time factors, lower is faster\n\n{table(rows)}\n\n-> {written}")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


main = command_of(run, __doc__)

if __name__ == "__main__":
    main()
