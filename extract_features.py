"""Features of audio files, one file of features each.

    python extract_features.py final.pth AUDIO... --out feats/ [--layers all] [--format safetensors]

AUDIO: files, folders and lists in any number: what libsndfile reads (WAV, FLAC, OGG, MP3, ...) at any rate; lists of
prepare_data.py, Kaldi's folders and wav.scp, and one path per line. OUT keeps the folders below the one that holds all.
.npy holds [T, D] for one layer and [S, T, D] for several; .safetensors holds layer_0, layer_4, ... [T, D] each. 50
frames per second; frame i is centred at 0.0125 + 0.02 i seconds. Run again, it goes on: OUT/features.jsonl lists what
is finished, and of which audio. What cannot be read is left out and listed in OUT/broken.tsv, and the exit code is 1.
"""

import dataclasses
import itertools
import logging
import time
from collections import Counter
from pathlib import Path

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from distillation.commandline import make_parser, parse_arguments
from distillation.data.audio import AudioError
from distillation.data.manifest import shown, write_lines
from distillation.errors import Incomplete, UserError, command, is_out_of_gpu_memory, is_out_of_memory
from distillation.journal import Journal
from distillation.stopping import keeping
from distillation.training.lock import run_lock
from exporting.extraction import Done, Extraction, Stamp, load_on, measure, stamp_of
from exporting.features import FeatureOptions
from exporting.recordings import Failure, Recording, find_recordings
from wav2vec2 import Wav2Vec2Model
from wav2vec2.checkpoint import fingerprint
from wav2vec2.feature_extractor import SAMPLE_RATE

logger = logging.getLogger(__name__)
SHOWN = 10  # failures that are printed


def run(model: str, audio: list[Path], out: Path, options: FeatureOptions, device: str) -> None:
    """Extract what OUT lacks; the arguments are the flags."""
    network = load_on(model, device)
    options.check(network)
    recordings, failures = find_recordings(audio)
    total = len(recordings) + len(failures)
    with run_lock(out, owner=True), keeping(f"the finished files are in {out}"):
        for leftover in out.rglob(".*.tmp"):  # of a run that was killed
            leftover.unlink(missing_ok=True)
        failures += _extract(network, recordings, out, options)
    _report(failures, total, out / "broken.tsv")


def _extract(network: Wav2Vec2Model, recordings: list[Recording], out: Path, options: FeatureOptions) -> list[Failure]:
    """Write what is not finished; what cannot be read."""
    layers = options.layer_numbers(network.num_layers)
    of = {"model": fingerprint(network), **dataclasses.asdict(options), "layers": layers}
    del of["window"]  # changes nothing
    finished = Journal(out / "features.jsonl", of, "finished files", "use another --out")
    done: list[Done] = []

    def keep(file: Done) -> None:
        size = file.target.stat().st_size
        finished[file.item.recording.name] = {
            **_source(file.item.recording, file.item.stamp),
            "frames": file.num_frames,
            "bytes": size,
        }
        done.append(file)

    extraction = Extraction(network, out, options, keep)
    todo = [recording for recording in recordings if not _is_finished(recording, extraction, finished)]
    if len(todo) < len(recordings):
        logger.info("%d of %d files were finished before", len(recordings) - len(todo), len(recordings))
    sized, failures = measure(todo)
    begin = time.monotonic()
    seconds = sum(item.num_samples for item in sized) / SAMPLE_RATE
    with tqdm(total=round(seconds, 1), unit="s", unit_scale=True, disable=None) as bar, logging_redirect_tqdm():
        try:
            failures += extraction.run(sized, bar.update)
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error) or is_out_of_gpu_memory(error):
                raise UserError(f"out of memory: lower --window {options.window:g}, or --span for long files") from None
            raise
    for change, number in Counter(extraction.changes).items():
        logger.info("%d files: %s", number, change)
    if too_short := sum(file.num_frames == 0 for file in done):
        logger.warning("%d files are too short for a single frame: their features are empty", too_short)
    minutes = sum(file.item.num_samples for file in done) / SAMPLE_RATE / 60
    rate = len(done) / (time.monotonic() - begin)
    logger.info("%d files, %.1f min of audio, %.1f files per second -> %s", len(done), minutes, rate, out)
    return failures


def _report(failures: list[Failure], total: int, listing: Path) -> None:
    """List what could not be used; Incomplete where anything is."""
    if not failures:
        listing.unlink(missing_ok=True)
        return
    write_lines(listing, (f"{shown(failure.what)}\t{failure.reason}" for failure in failures))
    for failure in itertools.islice(failures, SHOWN):
        logger.error("%s: %s", shown(failure.what), failure.reason)
    raise Incomplete(f"{len(failures)} of {total} files could not be used, all others are done: see {listing}")


def _source(recording: Recording, stamp: Stamp) -> dict[str, object]:
    """What tells audio from other audio without reading it."""
    stretch = {} if recording.end is None and not recording.start else {"stretch": [recording.start, recording.end]}
    return {"audio": str(recording.path), "size": stamp[0], "mtime_ns": stamp[1], **stretch}


def _is_finished(recording: Recording, extraction: Extraction, finished: Journal) -> bool:
    """Whether the features of this audio are there; UserError where they are those of another file."""
    known, target = finished.pieces.get(recording.name), extraction.target(recording)
    if not isinstance(known, dict) or not target.is_file() or target.stat().st_size != known.get("bytes"):
        return False
    try:
        stamp = stamp_of(recording.path)
    except AudioError:  # reading it will say why
        return False
    other = Path(str(known.get("audio")))
    if other != recording.path and other.is_file() and not other.samefile(recording.path):
        raise UserError(f"{target} is of {other}, and {recording.path} would take its place: use another --out")
    return _source(recording, stamp).items() <= known.items()


@command
def main() -> None:
    """Parse the command line and run."""
    parser = make_parser(__doc__)
    parser.add_argument("model", type=str, help="Model: .pth, .safetensors, a folder of export.py, or a hub id.")
    parser.add_argument("audio", type=Path, nargs="+", help="Audio files, folders and lists.")
    parser.add_argument("--out", type=Path, required=True, help="Folder to write to.")
    parser.add_class_arguments(FeatureOptions, as_group=False)
    parser.add_argument("--device", type=str, default="cpu", help="cpu or cuda.")
    arguments = vars(parse_arguments(parser))
    options = FeatureOptions(**{field.name: arguments.pop(field.name) for field in dataclasses.fields(FeatureOptions)})
    run(options=options, **arguments)


if __name__ == "__main__":
    main()
