"""Features of many recordings: read ahead, batches of similar length, long ones piece by piece, written behind."""

import errno
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from distillation.data.audio import AUDIO_SUFFIXES, AudioError, probe
from distillation.data.ffmpeg import FFMPEG_SUFFIXES
from distillation.data.looking import in_threads
from distillation.data.resampling import AudioFile, resampled_length, stretch
from distillation.errors import UserError
from exporting.features import FeatureFile, FeatureOptions
from exporting.recordings import Failure, Recording
from wav2vec2 import Wav2Vec2Model, load_model
from wav2vec2.checkpoint import replacing
from wav2vec2.embed import batches_by_length, pad
from wav2vec2.feature_extractor import SAMPLE_RATE
from wav2vec2.long_audio import long_states, statistics_of
from wav2vec2.placement import check_placement

# oneDNN keeps what it prepares for each of the last 1,024 shapes, and every batch has a shape of its own: gigabytes
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

AHEAD = 2  # batches that are read while one is computed
LONG_AT_ONCE = 10.0  # s of a long recording that the convolutions take: more is no faster, and memory is for attention
READERS = 2
# of a name that is too long, or of a folder: no fault of the disk's, and the other files can be written
UNWRITABLE = (errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EEXIST)
Stamp = tuple[int, int]  # size in bytes and time of the last change in ns


class Sized(NamedTuple):
    """A recording, its samples at 16 kHz as the header has it, and what tells its file from another."""

    recording: Recording
    num_samples: int
    stamp: Stamp


class Done(NamedTuple):
    """A file of features that is written."""

    item: Sized
    target: Path
    num_frames: int


def load_on(model: str, device: str) -> Wav2Vec2Model:
    """A model on the device of ``--device``; UserError for one that does not exist."""
    try:
        check_placement(device, torch.float32)
    except ValueError as error:
        raise UserError(f"--device: {error}") from None
    return load_model(model, device=device)


def measure(recordings: list[Recording]) -> tuple[list[Sized], list[Failure]]:
    """Lengths, by the headers; and what has none."""
    paths = list(dict.fromkeys(recording.path for recording in recordings))

    def look(path: Path) -> tuple[int, Stamp] | AudioError:
        try:
            if path.suffix.lower() in FFMPEG_SUFFIXES - AUDIO_SUFFIXES:
                raise AudioError(path, "only ffmpeg reads this format: prepare_data.py --convert")
            stamp = stamp_of(path)
            header, _ = probe(path)
            return resampled_length(header.num_frames, header.sample_rate), stamp
        except AudioError as error:
            return error

    found = {paths[i]: result for i, result in in_threads(look, paths, "opening", None, chunk=64)}
    sized, failures = [], []
    for recording in recordings:
        try:
            known = found[recording.path]
            if isinstance(known, AudioError):
                raise known
            length = stretch(recording.path, known[0], recording.start, recording.end)
            sized.append(Sized(recording, length, known[1]))
        except AudioError as error:
            failures.append(Failure(recording.place, error.reason))
    return sized, failures


def stamp_of(path: Path) -> Stamp:
    """Of a file as it is now; AudioError where it is gone."""
    try:
        status = path.stat()
    except OSError as error:
        raise AudioError(path, error.strerror or type(error).__name__) from None
    return status.st_size, status.st_mtime_ns


class Extraction:
    """Writes files of features.

    Args:
        model: in eval mode.
        out: folder to write to.
        options: what to extract.
        keep: is told of each file when it is there, by one thread at a time.
    """

    def __init__(
        self, model: Wav2Vec2Model, out: Path, options: FeatureOptions, keep: Callable[[Done], object]
    ) -> None:
        self.model, self.out, self.options, self.keep = model, out, options, keep
        self.layers = options.layer_numbers(model.num_layers)
        self.changes: list[str] = []
        """What was done to files: resampled from which rate, and so on."""
        self._shortest = model.feature_extractor.receptive_field
        self._weight = model.feature_extractor.dummy_weight

    def target(self, recording: Recording) -> Path:
        """The file of features."""
        return self.out / f"{recording.name}.{self.options.format}"

    def run(self, recordings: list[Sized], progress: Callable[[float], object]) -> list[Failure]:
        """Write all; what could not be read.

        Args:
            recordings: what to extract.
            progress: is told the seconds of audio that are done.
        """
        seconds = self.options.window
        fits = [item for item in recordings if item.num_samples <= seconds * SAMPLE_RATE]
        batches = batches_by_length([item.num_samples for item in fits], self._shortest, seconds)
        failures = self._short(deque([[fits[i] for i in batch] for batch in batches]), progress)
        for item in recordings:
            if item.num_samples > seconds * SAMPLE_RATE:
                failures += self._long(item, progress)
        return failures

    def _short(self, todo: deque[list[Sized]], progress: Callable[[float], object]) -> list[Failure]:
        """Batches: those to come are read, and the last one is written, while one is computed."""
        reading: deque[list[tuple[Sized, Future[Tensor]]]] = deque()
        writing: list[Future[list[Failure]]] = []
        failures: list[Failure] = []
        with ThreadPoolExecutor(READERS) as readers, ThreadPoolExecutor(1) as writer:
            try:
                while todo or reading:
                    while todo and len(reading) <= AHEAD:
                        reading.append([(item, readers.submit(self._read, item)) for item in todo.popleft()])
                    batch, waveforms, asked = [], [], reading.popleft()
                    for item, future in asked:
                        try:
                            waveforms.append(future.result())
                            batch.append(item)
                        except AudioError as error:
                            failures.append(Failure(item.recording.place, error.reason))
                    features = self._compute(waveforms) if waveforms else []
                    for written in writing:
                        failures += written.result()
                    writing = [writer.submit(self._write, *each) for each in zip(batch, features, strict=True)]
                    progress(sum(item.num_samples for item, _ in asked) / SAMPLE_RATE)
                for written in writing:
                    failures += written.result()
            finally:  # whoever stops waits for the files that are being read and written alone
                readers.shutdown(cancel_futures=True)
                writer.shutdown(cancel_futures=True)
        return failures

    def _read(self, item: Sized) -> Tensor:
        with self._open(item.recording) as file:
            waveform = file.read(0, file.num_samples)
        self._require_unchanged(item)
        return waveform

    def _require_unchanged(self, item: Sized) -> None:
        """What is read must be what is kept as finished."""
        if stamp_of(item.recording.path) != item.stamp:
            raise AudioError(item.recording.path, "was changed while it was read: run again")

    def _open(self, recording: Recording) -> AudioFile:
        file = AudioFile(recording.path, recording.start, recording.end)
        self.changes.extend(file.changes)
        return file

    @torch.no_grad()
    def _compute(self, waveforms: list[Tensor]) -> list[Tensor]:
        """Features [S, T, D] of each, on the CPU."""
        padded, lengths = pad(waveforms, self._shortest, self._weight)
        states, frames = self.model.extract_features(padded, lengths, num_layers=max(self.layers))
        assert frames is not None
        chosen = torch.stack([states[layer] for layer in self.layers], 1).float().cpu()  # [B, S, T, D]
        return [row[:, :count] for row, count in zip(chosen, frames.tolist())]

    def _write(self, item: Sized, features: Tensor) -> list[Failure]:
        num_frames = features.shape[1]
        try:
            with self._new_file(item, num_frames) as file:
                for layer, values in zip(self.layers, features):
                    file.write(layer, 0, values)
        except OSError as error:
            return [unwritable(item, error)]
        self.keep(Done(item, self.target(item.recording), num_frames))
        return []

    @contextmanager
    def _new_file(self, item: Sized, num_frames: int) -> Iterator[FeatureFile]:
        """The file of features, there when all of it is written."""
        target = self.target(item.recording)
        with (
            replacing(target) as temporary,
            FeatureFile(temporary, target.suffix, self.layers, num_frames, self.model.embed_dim) as file,
        ):
            yield file

    def _long(self, item: Sized, progress: Callable[[float], object]) -> list[Failure]:
        """Piece by piece, into the file as it comes."""
        model, seconds = self.model, min(self.options.window, LONG_AT_ONCE)
        try:
            with self._open(item.recording) as audio:
                windows = self.options.windows(model, audio.num_samples)
                num_frames = windows[-1].last
                with self._new_file(item, num_frames) as file:
                    statistics = statistics_of(model, audio.read, audio.num_samples, seconds)
                    for window in windows:
                        for states in long_states(model, audio.read, window, self.layers, statistics, seconds):
                            file.write(*states)
                            share = len(states.values) / (len(self.layers) * num_frames)
                            progress(share * item.num_samples / SAMPLE_RATE)
                    self._require_unchanged(item)
        except AudioError as error:
            return [Failure(item.recording.place, error.reason)]
        except OSError as error:
            return [unwritable(item, error)]
        self.keep(Done(item, self.target(item.recording), num_frames))
        return []


def unwritable(item: Sized, error: OSError) -> Failure:
    """One file of features that cannot be; what the disk as a whole refuses is raised again."""
    if error.errno not in UNWRITABLE:
        raise error
    return Failure(item.recording.place, f"{error.filename}: {error.strerror}")
