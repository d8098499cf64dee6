"""What models cost: parameters, multiply-accumulates, memory, and speed measured in turns.

python -m evaluation.cost teacher.pth final.pth [--seconds 1 5 15 35] [--batch 1 8] [--device auto] [--out cost.json]

With --out it goes on when it is run again after a stop.
"""

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from distillation.budget import MACS_SECONDS, SUPERB_SAMPLES
from distillation.commandline import make_parser, parse_arguments
from distillation.data.config import MIN_INPUT_FRAMES
from distillation.errors import UserError, command
from distillation.journal import Journal
from distillation.stopping import keeping
from evaluation.conditions import conditions
from evaluation.peak_memory import peak_memory
from evaluation.tables import format_table
from evaluation.timing import in_turns, keep_memory, noise
from wav2vec2 import load_model
from wav2vec2.checkpoint import fingerprint, load_checkpoint, write_text
from wav2vec2.feature_extractor import SAMPLE_RATE

MIB = 1024**2


@dataclass
class Speed:
    """One measurement of one model."""

    device: str
    seconds: float  # per utterance
    batch: int  # utterances
    real_time_factor: float  # computing seconds per second of audio, all utterances together
    peak_bytes: int | None  # weights and activations; None where the system does not tell
    milliseconds: float = field(init=False)  # of all utterances together

    def __post_init__(self) -> None:
        self.milliseconds = 1000 * self.real_time_factor * self.seconds * self.batch


@dataclass
class Cost:
    """What one model costs."""

    name: str
    file: str
    file_bytes: int
    num_params: int  # of the model itself, masks excluded
    num_head_params: int  # of the distillation heads in the file
    loaded_bytes: int  # of the parameters in memory, without heads
    macs_10s: int  # one utterance of 10 s
    macs_superb: int  # sum over the 32 utterances of the SUPERB protocol
    speed: list[Speed] = field(default_factory=list)


def cost_of_file(name: str, path: Path) -> Cost:
    """What is known of a model file without running it."""
    checkpoint = load_checkpoint(path)
    model = checkpoint.model
    params = [p for key, p in model.named_parameters() if not key.endswith("log_alpha")]
    # One map shared by several matched layers appears once per layer in the file.
    heads = {(h.data_ptr(), h.shape): h.numel() for h in checkpoint.heads.values()}
    return Cost(
        name=name,
        file=str(path),
        file_bytes=path.stat().st_size,
        num_params=sum(p.numel() for p in params),
        num_head_params=sum(heads.values()),
        loaded_bytes=sum(p.numel() * p.element_size() for p in params),
        macs_10s=round(model.get_num_macs(MACS_SECONDS * SAMPLE_RATE).item()),
        macs_superb=round(model.get_num_macs(SUPERB_SAMPLES).item()),
    )


def measure(
    paths: Mapping[str, Path],
    *,
    seconds: Sequence[float],
    batch: Sequence[int],
    devices: Sequence[str],
    rounds: int = 5,
    progress: bool = True,
    known: Journal | None = None,
) -> list[Cost]:
    """Cost of several models, timed in turns.

    Args:
        paths: name -> model file.
        seconds: lengths of the utterances.
        batch: utterances that run together.
        devices: "cpu", "cuda".
        rounds: timed runs per model and case.
        progress: show a bar.
        known: keeps what is measured, and spares what was.

    Raises:
        CheckpointError: a file is no model.
    """
    costs = [cost_of_file(name, path) for name, path in paths.items()]
    # The smallest first: what the allocator keeps of one case never counts for the next.
    cases = sorted(((s, b) for s in seconds for b in batch), key=lambda case: case[0] * case[1])
    found: Journal | dict[str, Any] = {} if known is None else known
    total = len(devices) * len(costs) * (1 + len(cases) * (1 + rounds))
    with tqdm(total=total, desc="cost", unit="run", dynamic_ncols=True, disable=not progress) as bar:
        for device in devices:
            peaks = []
            for name, path in paths.items():
                key = f"memory of {name} on {device}"
                if key not in found:
                    found[key] = (_peak_on_gpu if device == "cuda" else peak_memory)(path, cases)
                peaks.append(found[key])
                bar.update()
            models = [load_model(path, device=device) for path in paths.values()]
            for i, (length, size) in enumerate(cases):
                key = f"{size} x {length:g} s on {device}"
                if key in found:
                    bar.update((1 + rounds) * len(costs))
                else:
                    waveforms = noise(size, length).to(device)
                    runs = dict(enumerate(partial(model.extract_features, waveforms) for model in models))
                    keep_memory()
                    with torch.inference_mode():
                        found[key] = list(in_turns(runs, rounds, "", bar).values())
                for cost, elapsed, peak in zip(costs, found[key], peaks):
                    factor = elapsed / (length * size)
                    cost.speed.append(Speed(device, length, size, factor, peak[i] if peak is not None else None))
    return costs


def _peak_on_gpu(path: Path, cases: Sequence[tuple[float, int]]) -> list[int]:
    before = torch.cuda.memory_allocated()
    model = load_model(path, device="cuda")
    peaks = []
    with torch.inference_mode():
        for seconds, size in cases:
            waveforms = torch.randn(size, round(seconds * SAMPLE_RATE), device="cuda")
            torch.cuda.reset_peak_memory_stats()
            model.extract_features(waveforms)
            peaks.append(torch.cuda.max_memory_allocated() - before)
    return peaks


def resolve_devices(device: str) -> list[str]:
    """Devices to measure on; ``auto`` is the CPU, and the GPU where there is one.

    Raises:
        UserError: an unknown device, or a GPU where there is none.
    """
    gpu = torch.cuda.is_available()
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {device}: choose auto, cpu or cuda")
    if device == "cuda" and not gpu:
        raise UserError("--device cuda: no GPU is visible; use --device cpu")
    return {"auto": ["cpu", "cuda"] if gpu else ["cpu"], "cpu": ["cpu"], "cuda": ["cuda"]}[device]


def format_costs(costs: Sequence[Cost]) -> str:
    """The tables that the command prints: what the models are, and what running them takes."""
    header = ["model", "parameters", "heads", "file MiB", "loaded MiB", "GMACs 10 s", "GMACs SUPERB"]
    rows = [
        [c.name, f"{c.num_params:,}", f"{c.num_head_params:,}", f"{c.file_bytes / MIB:.1f}",
         f"{c.loaded_bytes / MIB:.1f}", f"{c.macs_10s / 1e9:.2f}", f"{c.macs_superb / 1e9:.1f}"]
        for c in costs
    ]  # fmt: skip
    tables = [format_table(header, rows)]
    for device in dict.fromkeys(s.device for c in costs for s in c.speed):
        header = [f"on {device}", "seconds", "batch", "real-time factor", "speed-up", "peak MiB"]
        rows = []
        for case in zip(*([s for s in c.speed if s.device == device] for c in costs)):
            for cost, speed in zip(costs, case):
                peak = "-" if speed.peak_bytes is None else f"{speed.peak_bytes / MIB:.0f}"
                gain = case[0].real_time_factor / speed.real_time_factor
                rows.append([cost.name, f"{speed.seconds:g}", str(speed.batch), f"{speed.real_time_factor:.5f}",
                             f"{gain:.2f}", peak])  # fmt: skip
        tables.append(format_table(header, rows))
    return "\n\n".join(tables)


def name_files(paths: Sequence[Path]) -> dict[str, Path]:
    """Short names: the stem of the file, or its whole path where two stems are the same."""
    stems = [path.stem for path in paths]
    return {stem if stems.count(stem) == 1 else str(path): path for stem, path in zip(stems, paths)}


@command
def main() -> None:
    """Measure, print, and write JSON on request."""
    parser = make_parser(__doc__)
    parser.add_argument("models", type=Path, nargs="+", help="Model files; speed-ups are relative to the first.")
    parser.add_argument("--seconds", type=float, nargs="+", default=[1.0, 5.0, 15.0, 35.0], help="Utterance lengths.")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="Utterances that run together.")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto: the CPU, and the GPU if there is one.")
    parser.add_argument("--rounds", type=int, default=5, help="Timed runs per model and case; the median counts.")
    parser.add_argument("--out", type=Path, default=None, help="Write the same numbers as JSON.")
    options = parse_arguments(parser)
    for length in options.seconds:
        if not (math.isfinite(length) and length * SAMPLE_RATE >= MIN_INPUT_FRAMES):
            raise UserError(f"--seconds {length:g}: the models need at least {MIN_INPUT_FRAMES / SAMPLE_RATE} s")
    for flag, smallest in (("batch", min(options.batch)), ("rounds", options.rounds)):
        if smallest < 1:
            raise UserError(f"--{flag} {smallest}: it must be at least 1")
    out: Path | None = options.out
    paths, known, kept = name_files(options.models), None, contextlib.ExitStack()
    if out is not None:
        of = conditions(
            models={name: fingerprint(load_model(path)) for name, path in paths.items()}, rounds=options.rounds,
            seconds=options.seconds, batch=options.batch,
        )  # fmt: skip
        known = Journal(out.with_name(f".{out.stem}.jsonl"), of, "measurements")
        kept.enter_context(keeping(f"what was measured so far is in {known.path}"))
    with kept:
        costs = measure(
            paths,
            seconds=options.seconds,
            batch=options.batch,
            devices=resolve_devices(options.device),
            rounds=options.rounds,
            known=known,
        )
    print(format_costs(costs))
    print(f"\n{torch.get_num_threads()} CPU thread(s)")
    if out is not None and known is not None:
        content = {"cpu_threads": torch.get_num_threads(), "models": [asdict(cost) for cost in costs]}
        write_text(out, json.dumps(content, indent=2) + "\n")
        known.remove()


if __name__ == "__main__":
    main()
