"""Files per second of extract_features.py beside a plain loop of torch and the model's own ``embed``, on a CPU.

    python -m benchmarks.features --model final.pth --audio FOLDER [--files 400] [--threads 1]

All read the same files and write the last layer of each to a .npy file, timed in turns. Prints a table.
"""

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor

from distillation.commandline import command_of
from distillation.errors import UserError
from evaluation.tables import machine, markdown_table
from evaluation.timing import in_turns
from exporting.extraction import Extraction, measure
from exporting.features import FeatureOptions
from exporting.recordings import Recording, find_recordings
from wav2vec2 import Wav2Vec2Model, load_model
from wav2vec2.feature_extractor import SAMPLE_RATE

BATCH = 16


def read(path: Path) -> Tensor:
    """A waveform [N]; it must be 16 kHz mono."""
    samples, rate = soundfile.read(path, dtype="float32")
    if rate != SAMPLE_RATE or samples.ndim > 1:
        raise UserError(f"{path}: {rate} Hz, shape {samples.shape}: the plain loop takes 16 kHz mono alone")
    return torch.from_numpy(samples)


@torch.no_grad()
def plain_loop(model: Wav2Vec2Model, paths: list[Path], out: Path) -> None:
    """What one writes first."""
    for i, path in enumerate(paths):
        hidden, _ = model.extract_features(read(path)[None])
        np.save(out / f"{i}.npy", hidden[-1][0].numpy())


def embed_in_batches(model: Wav2Vec2Model, paths: list[Path], out: Path) -> None:
    """16 files at a time, as they come."""
    for begin in range(0, len(paths), BATCH):
        for i, features in enumerate(model.embed([read(path) for path in paths[begin : begin + BATCH]]), begin):
            np.save(out / f"{i}.npy", features.numpy())


def by_command(model: Wav2Vec2Model, recordings: list[Recording], out: Path) -> None:
    """What the command does once it has the model: headers, batches, files that nobody sees half-written."""
    sized, _ = measure(recordings)
    if Extraction(model, out, FeatureOptions(), keep=lambda file: None).run(sized, lambda seconds: None):
        raise UserError("some files cannot be read")


def run(model: Path, audio: list[Path], files: int = 400, threads: int = 1, rounds: int = 3) -> None:
    """Measure and print.

    Args:
        model: to run.
        audio: what extract_features.py takes: 16 kHz mono.
        files: at most so many of it.
        threads: of torch.
        rounds: timed runs of each.
    """
    torch.set_num_threads(threads)
    recordings, _ = find_recordings(audio)
    recordings = recordings[:: max(len(recordings) // files, 1)][:files]
    paths = [recording.path for recording in recordings]
    seconds = sum(soundfile.info(path).duration for path in paths)
    network = load_model(model)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        times = in_turns(
            {
                "plain torch loop": partial(plain_loop, network, paths, out),
                f"embed, {BATCH} at a time": partial(embed_in_batches, network, paths, out),
                "extract_features.py": partial(by_command, network, recordings, out),
            },
            rounds,
            "timing",
        )
    base = next(iter(times.values()))
    rows = [
        [name, f"{len(paths) / time:.1f}", f"{seconds / time:.0f}", f"{base / time:.2f} x"]
        for name, time in times.items()
    ]
    print(f"{len(paths)} files of {seconds / len(paths):.1f} s on average, {threads} thread(s), {machine()}\n")
    print(markdown_table(["what", "files per second", "seconds of audio per second", "faster"], rows))


main = command_of(run, __doc__)

if __name__ == "__main__":
    main()
