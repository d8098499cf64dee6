"""From a folder of audio to the lists of a recipe."""

import contextlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distillation.data.audio import CLIPPED_LEVEL, CLIPPED_SHARE, SILENCE_PEAK
from distillation.data.corpus import (
    TRAIN_PARTS,
    VALID_PARTS,
    Problem,
    choose_held_out,
    decodable,
    find_librispeech,
    librispeech_lists,
    scan,
    subset,
    usable_headers,
)
from distillation.data.manifest import Manifest, write_lines, write_tsv
from distillation.errors import UserError
from distillation.journal import Journal
from distillation.stopping import keeping
from wav2vec2.feature_extractor import SAMPLE_RATE

logger = logging.getLogger("prepare_data")
KEPT = ".prepare_data.jsonl"  # in OUT until the lists are there


@dataclass
class Preparation:
    """What prepare_data.py is asked to do."""

    data: Path
    """Folder that holds train-clean-100 and so on, or holds LibriSpeech/, or any folder of audio."""
    out: Path
    """Folder for the lists."""
    valid: Path | None = None
    """Folder of validation audio; by default the dev parts of LibriSpeech, or a held-out part of other data."""
    valid_fraction: float = 0.05
    """Share of the audio to hold out; whole top folders (speakers) where they are small enough."""
    seed: int = 0
    """Of the choice of what is held out."""
    sample_rate: int = SAMPLE_RATE
    """Required rate in Hz."""
    num_threads: int | None = None
    """Files read at once; by default twice the number of cores."""
    check: bool = False
    """Decode every file; problems are an error and listed in OUT/broken.tsv."""
    skip_broken: bool = False
    """Leave out the files that cannot be used."""

    def __post_init__(self) -> None:
        if not 0 < self.valid_fraction < 1:
            raise UserError(f"--valid_fraction {self.valid_fraction} is not between 0 and 1")
        if self.seed < 0:
            raise UserError(f"--seed {self.seed} is negative")
        if self.num_threads is not None and self.num_threads < 1:
            raise UserError(f"--num_threads {self.num_threads} is less than 1")
        for flag, folder in (("--data", self.data), ("--valid", self.valid)):
            if folder is not None and not folder.is_dir():
                raise UserError(f"{flag} {folder} is not a folder")


def prepare(config: Preparation) -> None:
    """Write the lists.

    LibriSpeech gives train100.tsv, train960.tsv (when its three training parts are there) and valid.tsv (dev-clean and
    dev-other). Any other folder gives train.tsv and valid.tsv. What is found in the files is kept until they are there.

    Raises:
        Stopped: a signal asked for it.
        UserError: no usable audio, or files that are not what was asked for.
    """
    of = {"silence": SILENCE_PEAK, "clipped": [CLIPPED_LEVEL, CLIPPED_SHARE]}
    known = Journal(config.out / KEPT, of, "findings")
    with keeping(f"what was found in the files so far is in {known.path}"):
        _prepare(config, known)
    known.remove()


def _prepare(config: Preparation, known: Journal) -> None:
    librispeech = find_librispeech(config.data)
    parts = TRAIN_PARTS + VALID_PARTS if librispeech else (".",)
    sources = [scan(librispeech or config.data, parts, config.num_threads, known)]
    if config.valid is not None:
        sources.append(scan(config.valid, (".",), config.num_threads, known))
    problems: list[Problem] = []
    manifests = [usable_headers(files, config.sample_rate, problems) for files in sources]
    if config.check:
        manifests = [decodable(manifest, config.num_threads, problems, known) for manifest in manifests]
    _report(problems, config.out, config.check, config.skip_broken)
    if config.valid is not None:
        manifests[0] = _without(manifests[0], manifests[1])

    held_out = manifests[1] if config.valid is not None else None
    if librispeech:
        lists = librispeech_lists(manifests[0], held_out)
    elif held_out is not None:
        lists = {"train.tsv": manifests[0], "valid.tsv": held_out}
    else:
        mask = choose_held_out(manifests[0], config.valid_fraction, config.seed)
        lists = {"train.tsv": subset(manifests[0], ~mask), "valid.tsv": subset(manifests[0], mask)}
    for name, manifest in lists.items():
        if not len(manifest):
            raise UserError(f"{name} would be empty: no file under {manifest.root} can be used")
    for name, manifest in lists.items():
        write_tsv(config.out / name, manifest)
        hours = manifest.num_frames.sum() / config.sample_rate / 3600
        logger.info("%s: %d utterances, %.2f h", config.out / name, len(manifest), hours)


def _without(manifest: Manifest, held_out: Manifest) -> Manifest:
    """What is not validated on, whatever link a file is found through."""
    validated = {os.path.realpath(held_out.file(i)) for i in range(len(held_out))}
    keep = np.array([os.path.realpath(manifest.file(i)) not in validated for i in range(len(manifest))], dtype=bool)
    if not keep.all():
        logger.info("%d files of --data are in --valid as well: they are not trained on", (~keep).sum())
    return subset(manifest, keep)


def _report(problems: list[Problem], out: Path, check: bool, skip_broken: bool) -> None:
    """Print a table of the problems and list them in a file; raise when they were not accepted."""
    if not problems:
        with contextlib.suppress(OSError):
            (out / "broken.tsv").unlink()  # of an earlier check
        return
    num_unusable = sum(not problem.finding.usable for problem in problems)
    first = f"{problems[0].file}: {problems[0].finding.kind}, {problems[0].finding.detail}"
    if not check and not skip_broken:
        raise UserError(
            f"{first} ({num_unusable} such files): repair them, or leave them out with --skip_broken; --check tells all"
        )
    lines = [f"{problem.file}\t{problem.finding.kind}\t{problem.finding.detail}" for problem in problems]
    write_lines(out / "broken.tsv", lines)
    print(f"{'problem':<16} {'files':>7} {'left out':>9}  first")
    for kind in dict.fromkeys(problem.finding.kind for problem in problems):
        same = [problem for problem in problems if problem.finding.kind == kind]
        left_out = "no" if same[0].finding.usable else "yes"
        print(f"{kind:<16} {len(same):>7} {left_out:>9}  {same[0].file}: {same[0].finding.detail}")
    if not skip_broken:
        raise UserError(
            f"{len(problems)} files have problems, see {out / 'broken.tsv'}; no list was written: repair them, or "
            f"leave out the {num_unusable} unusable ones (and keep the silent and clipped ones) with --skip_broken"
        )
    logger.warning("%d unusable files left out, see %s", num_unusable, out / "broken.tsv")
