"""Teacher, compressed model, and its ONNX and 8-bit exports side by side on the CPU.

    scripts/demo.sh demo_out
    python -m benchmarks.formats --demo demo_out [--out DIR]

Speed is measured in turns: every round runs each of them once on the same 10 s. Accuracy is phones per frame of
mini-SUPERB, a linear probe on the weighted layers, with 95 % intervals over 30 held-out speakers. Prints a table,
writes formats.json and formats.svg. Stopped and run again, it goes on. Needs requirements/export.txt.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from benchmarks.minisuperb.evaluate import Features, frame_counts, probe_settings, rates, start
from benchmarks.plots import write
from distillation.commandline import command_of
from distillation.journal import Journal
from distillation.stopping import keeping
from evaluation.conditions import conditions
from evaluation.tables import markdown_table
from evaluation.timing import in_turns
from exporting import onnx
from exporting.source import ExportOptions, Source
from wav2vec2 import load_model
from wav2vec2.checkpoint import fingerprint
from wav2vec2.feature_extractor import SAMPLE_RATE

SECONDS = 10.0
Extract = Callable[..., tuple[Any, Any]]


def onnx_extract(path: Path, threads: int) -> Extract:
    """An exported file with the signature of ``extract_features``."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # its threads would otherwise spin on for a while, into the time of the model measured next
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def extract(waveforms: Tensor, lengths: Tensor, num_layers: int | None = None) -> tuple[list[Tensor], Tensor]:
        states, frames = session.run(None, {"waveforms": waveforms.numpy(), "lengths": lengths.numpy()})
        return list(torch.from_numpy(states).unbind()), torch.from_numpy(frames)

    return extract


def real_time_factors(extracts: dict[str, Extract], rounds: int) -> dict[str, float]:
    """Median computing seconds per second of audio, one waveform of 10 s."""
    waveform = torch.randn(1, int(SECONDS * SAMPLE_RATE), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([waveform.shape[1]])
    with torch.inference_mode():
        runs = {name: partial(extract, waveform, lengths) for name, extract in extracts.items()}
        seconds = in_turns(runs, rounds, "timing")
    return {name: some / SECONDS for name, some in seconds.items()}


@torch.inference_mode()
def max_difference(extract: Extract, reference: Extract, waveforms: list[Tensor]) -> float:
    """Largest difference of any state on some utterances, each alone."""
    found = 0.0
    for waveform in waveforms:
        inputs = waveform[None], torch.tensor([len(waveform)])
        for ours, theirs in zip(extract(*inputs)[0], reference(*inputs)[0], strict=True):
            found = max(found, (ours - theirs).abs().max().item())
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    head = ["model", "size on disk MB", "real-time factor", "faster", "max difference", "phones per frame %"]
    lines = []
    for row in rows:
        factor, difference, (low, high) = row["real_time_factor"], row["max_difference"], row["interval"]
        lines.append([
            row["name"],
            f"{row['bytes'] / 1e6:.2f}",
            f"{factor:.5f}",
            f"{rows[0]['real_time_factor'] / factor:.1f} x",
            "" if difference is None else f"{difference:.1e}",
            f"{row['phones']:.1f} [{low:.1f}, {high:.1f}]",
        ])  # fmt: skip
    return markdown_table(head, lines)


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Three bars per model."""
    figure = Figure(figsize=(9.6, 2.6), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    names = [row["name"] for row in rows]
    panels = (
        ("size on disk, MB", [row["bytes"] / 1e6 for row in rows], None),
        ("ms per second of audio", [1000 * row["real_time_factor"] for row in rows], None),
        ("phones per frame, %", [row["phones"] for row in rows],
         np.abs(np.array([row["interval"] for row in rows]).T - [row["phones"] for row in rows])),
    )  # fmt: skip
    for axis, (title, values, spread) in zip(axes, panels):
        bars = axis.barh(names, values, xerr=spread, color=[f"C{i}" for i in range(len(rows))], height=0.6)
        axis.bar_label(bars, fmt="%.3g", padding=4, fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.2)
    axes[0].invert_yaxis()
    return figure


def run(
    demo: Path = Path("demo_out"), out: Path | None = None, rounds: int = 15, steps: int = 600, threads: int = 1
) -> None:
    """Export, measure, print and plot.

    What is finished is kept in OUT/.formats.jsonl until all is there.

    Args:
        demo: folder that scripts/demo.sh has left.
        out: folder of the exports, the probes' corpus, formats.json and formats.svg; DEMO/minisuperb by default.
        rounds: timed runs of each model.
        steps: updates of each probe.
        threads: of torch and ONNX Runtime.

    Raises:
        Stopped: a signal asked for it.
        UserError: the demo's folder lacks a file.
    """
    torch.set_num_threads(threads)
    out, data = start(demo, out, "teacher.pth", "final.pth")
    teacher, student = load_model(demo / "teacher.pth"), load_model(demo / "final.pth")
    files = {
        "teacher": demo / "teacher.pth",
        "compressed": demo / "final.pth",
        "compressed, ONNX": out / "final.onnx",
        "compressed, ONNX int8": out / "final.int8.onnx",
    }
    of = conditions(
        teacher=fingerprint(teacher), student=fingerprint(student), rounds=rounds, probes=probe_settings(steps)
    )
    known = Journal(out / ".formats.jsonl", of, "parts")
    with keeping(f"what is finished is in {known.path}"):
        for name, quantize in (("compressed, ONNX", None), ("compressed, ONNX int8", "int8")):
            if f"export: {name}" not in known or not files[name].is_file():
                onnx.export(Source.read(demo / "final.pth"), files[name], ExportOptions(quantize=quantize))
                known[f"export: {name}"] = None
        extracts: dict[str, Extract] = {
            "teacher": teacher.extract_features,
            "compressed": student.extract_features,
            **{name: onnx_extract(path, threads) for name, path in files.items() if path.suffix == ".onnx"},
        }
        if "real-time factors" not in known:
            known["real-time factors"] = real_time_factors(extracts, rounds)
        for name, extract in tqdm(extracts.items(), "probing", unit="model"):
            if name in known:
                continue
            features = Features(extract)
            runs = [{"phones": frame_counts("phones", data, features(data.train), features(data.test), steps)}]
            drawn = rates(runs, "phones", np.random.default_rng(0), 2000)
            checked = [u.waveform for u in data.test[:20]]
            known[name] = {
                "name": name,
                "bytes": files[name].stat().st_size,
                "real_time_factor": known["real-time factors"][name],
                "max_difference": None if name in ("teacher", "compressed") else max_difference(
                    extract, student.extract_features, checked
                ),
                "phones": float(rates(runs, "phones", None, 1)[0]),
                "interval": np.percentile(drawn, [2.5, 97.5]).tolist(),
            }  # fmt: skip
    rows = [known[name] for name in files]
    written = write(out, "formats", rows, draw(rows))
    known.remove()
    print(table(rows))
    print(f"\n-> {written}")


main = command_of(run, __doc__)

if __name__ == "__main__":
    main()
