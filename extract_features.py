"""Features of audio files, one file of features each.

    python extract_features.py final.pth AUDIO... --out feats/ [--layers all] [--format safetensors]

Reads what libsndfile reads (WAV, FLAC, OGG, MP3, ...) at any rate. .npy holds [T, D] for one layer and [S, T, D] for
several; .safetensors holds layer_0, layer_4, ... [T, D] each. 50 frames per second; frame i is centred at
0.0125 + 0.02 i seconds. Run again, it goes on: OUT/features.jsonl lists what is finished, and of which audio.
"""

import dataclasses
import logging
from pathlib import Path

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from distillation.commandline import make_parser, parse_arguments
from distillation.data.resampling import AudioFile
from distillation.errors import UserError, command
from distillation.journal import Journal
from distillation.stopping import keeping
from exporting.features import FeatureOptions, load_on, write_features
from wav2vec2.checkpoint import fingerprint
from wav2vec2.feature_extractor import SAMPLE_RATE

logger = logging.getLogger(__name__)


def run(model: str, audio: list[Path], out: Path, options: FeatureOptions, device: str) -> None:
    """Extract what OUT lacks; the arguments are the flags."""
    targets: dict[Path, Path] = {}
    for path in audio:
        target = out / f"{path.stem}.{options.format}"
        if target in targets:
            raise UserError(f"{path} and {targets[target]} would both become {target}; extract them to two folders")
        targets[target] = path
    network = load_on(model, device)
    layers = options.layer_numbers(network.num_layers)
    of = {"model": fingerprint(network), **dataclasses.asdict(options), "layers": layers}
    finished = Journal(out / "features.jsonl", of, "finished files", "use another --out")
    todo = {target: path for target, path in targets.items() if not _is_finished(target, path, finished)}
    if len(todo) < len(targets):
        logger.info("%d of %d files were finished before", len(targets) - len(todo), len(targets))
    total = 0.0
    for path in tqdm(todo.values(), "opening", unit="file", delay=1, disable=None):
        with AudioFile(path) as file:  # what cannot be opened is said now
            num_samples = file.num_samples
        options.windows(network, num_samples)
        total += num_samples / SAMPLE_RATE
    with (
        keeping(f"the finished files are in {out}"),
        tqdm(total=round(total, 1), unit="s", unit_scale=True, disable=None) as bar,
        logging_redirect_tqdm(),
    ):
        for target, path in todo.items():
            with AudioFile(path) as file:
                source = _source(path)
                file.notice()
                num_frames = write_features(network, file, target, options, bar.update)
            finished[target.name] = {**source, "frames": num_frames}
            if num_frames == 0:
                logger.warning("%s: too short for a single frame", path)
            logger.info("%s: %d frames -> %s", path, num_frames, target)


def _source(path: Path) -> dict[str, object]:
    """What tells audio from other audio without reading it."""
    status = path.stat()
    return {"audio": str(path.absolute()), "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _is_finished(target: Path, path: Path, finished: Journal) -> bool:
    if target.name not in finished or not (target.is_file() and path.is_file()):
        return False
    return _source(path).items() <= finished[target.name].items()


@command
def main() -> None:
    """Parse the command line and run."""
    parser = make_parser(__doc__)
    parser.add_argument("model", type=str, help="Model: .pth, .safetensors, a folder of export.py, or a hub id.")
    parser.add_argument("audio", type=Path, nargs="+", help="Audio files.")
    parser.add_argument("--out", type=Path, required=True, help="Folder to write to.")
    parser.add_class_arguments(FeatureOptions, as_group=False)
    parser.add_argument("--device", type=str, default="cpu", help="cpu or cuda.")
    arguments = vars(parse_arguments(parser))
    options = FeatureOptions(**{field.name: arguments.pop(field.name) for field in dataclasses.fields(FeatureOptions)})
    run(options=options, **arguments)


if __name__ == "__main__":
    main()
