"""Long audio in pieces beside the whole at once: how alike the features are, and what they cost, on a CPU.

    python -m benchmarks.long_audio --model final.pth --audio FOLDER [--minutes '[3,10,30]'] [--spans '[40,180,1800]']

Joins the files to one waveform of each length. For every span in which frames attend to each other (what
``extract_features.py --span`` sets, with a sixth of it as context) it prints the lowest cosine of any frame to the
model run on the whole at once, and the time of both. The whole at once takes gigabytes.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.features import read
from distillation.commandline import command_of
from evaluation.tables import machine, markdown_table
from exporting.recordings import find_recordings
from wav2vec2 import Wav2Vec2Model, load_model
from wav2vec2.feature_extractor import SAMPLE_RATE
from wav2vec2.long_audio import long_states, statistics_of
from wav2vec2.windows import make_windows

AT_ONCE = 40.0  # s that the convolutions take: the default of extract_features.py
CONTEXT = 6  # a span's context is this part of it


def joined(paths: list[Path], seconds: float) -> Tensor:
    """Waveforms one after another, from the first again where they do not suffice."""
    parts: list[Tensor] = []
    while sum(map(len, parts)) < seconds * SAMPLE_RATE:
        parts.append(read(paths[len(parts) % len(paths)]))
    return torch.cat(parts)[: round(seconds * SAMPLE_RATE)]


def in_pieces(model: Wav2Vec2Model, waveform: Tensor, span: float) -> Iterator[tuple[int, int, Tensor]]:
    """All states, as extract_features.py writes them."""

    def part(begin: int, end: int) -> Tensor:
        return waveform[begin:end]

    layers = range(model.num_layers + 1)
    statistics = statistics_of(model, part, len(waveform), AT_ONCE)
    for window in make_windows(model, len(waveform), span, span / CONTEXT):
        yield from long_states(model, part, window, layers, statistics, AT_ONCE)


def run(
    model: Path,
    audio: list[Path],
    minutes: tuple[float, ...] = (3, 10, 30),
    spans: tuple[float, ...] = (40, 180, 1800),
    threads: int = 1,
) -> None:
    """Measure and print.

    Args:
        model: to run.
        audio: what extract_features.py takes: 16 kHz mono.
        minutes: lengths of the audio.
        spans: seconds in which frames attend to each other.
        threads: of torch.
    """
    torch.set_num_threads(threads)
    recordings, _ = find_recordings(audio)
    network, rows = load_model(model), []
    for length in minutes:
        waveform = joined([recording.path for recording in recordings], 60 * length)
        begin = time.perf_counter()
        with torch.inference_mode():
            whole = [state[0] for state in network.extract_features(waveform[None])[0]]
        at_once = time.perf_counter() - begin
        for span in spans:
            if span > 60 * length and span != max(spans):
                continue
            lowest = [1.0] * len(whole)
            begin = time.perf_counter()
            for layer, first, values in in_pieces(network, waveform, span):
                cosines = F.cosine_similarity(values, whole[layer][first : first + len(values)], dim=-1)
                lowest[layer] = min(lowest[layer], cosines.min().item())
            taken = time.perf_counter() - begin
            rows.append([f"{length:g}", f"{span:g}", f"{min(lowest):.6f}", f"{lowest[0]:.6f}", f"{lowest[-1]:.6f}",
                         f"{taken:.1f}", f"{at_once:.1f}"])  # fmt: skip
    print(f"{model.name}, {threads} thread(s), {machine()}\n")
    head = ["minutes", "span, s", "lowest cosine", "of layer 0", "of the last", "seconds", "whole at once, seconds"]
    print(markdown_table(head, rows))


main = command_of(run, __doc__)

if __name__ == "__main__":
    main()
