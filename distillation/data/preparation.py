"""From a folder of audio to the lists of a recipe."""

import contextlib
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from distillation.data.audio import CLIPPED_LEVEL, CLIPPED_SHARE, SILENCE_PEAK
from distillation.data.conversion import GIGABYTES_PER_HOUR, Copying, convert, fitting, require_apart, require_channel
from distillation.data.corpus import (
    Files,
    Found,
    Layout,
    Problem,
    as_they_are,
    decodable,
    describe_foreign,
    divide,
    find,
    layout_of,
    read_headers,
    without_bad_names,
)
from distillation.data.manifest import NO_NAME, UNLISTABLE, Manifest, shown, write_lines, write_lists
from distillation.data.resampling import resampled_length
from distillation.errors import UserError
from distillation.journal import Journal
from distillation.recognition.preparation import write_transcripts
from distillation.stopping import keeping
from wav2vec2.feature_extractor import SAMPLE_RATE

logger = logging.getLogger("prepare_data")
VALID_FRACTION = 0.05
MIN_RATE, MAX_RATE = 1_000, 384_000  # in Hz; what recordings have
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
    valid_fraction: float = VALID_FRACTION
    """Share of the audio to hold out; whole top folders (speakers) where they are small enough."""
    seed: int = 0
    """Of the choice of what is held out."""
    sample_rate: int = SAMPLE_RATE
    """Required rate in Hz."""
    num_threads: int | None = None
    """Files read at once; by default twice the number of cores, and one per core where copies are made."""
    check: bool = False
    """Decode every file; problems are an error and listed in OUT/broken.tsv."""
    skip_broken: bool = False
    """Leave out the files that cannot be used."""
    convert: Path | None = None
    """Folder for FLAC copies of one channel at the required rate, which the lists are then of, with links to the files
    that need none; not used where no file needs a copy. Copies that are finished are kept."""
    transcripts: Path | None = None
    """What is said: a folder or list as for finetune_ctc.py, or a folder with such lists; JSON lines are then written
    beside the lists, NAME.jsonl for NAME.tsv."""
    channel: str = "mix"
    """What the copies hold of several channels: mix (their average), or the number of one: 0, 1, ..."""

    def __post_init__(self) -> None:
        if not 0 < self.valid_fraction < 1:
            raise UserError(f"--valid_fraction {self.valid_fraction} is not between 0 and 1")
        if self.seed < 0:
            raise UserError(f"--seed {self.seed} is negative")
        if self.num_threads is not None and self.num_threads < 1:
            raise UserError(f"--num_threads {self.num_threads} is less than 1")
        if not MIN_RATE <= self.sample_rate <= MAX_RATE:
            raise UserError(f"--sample_rate {self.sample_rate} is not between {MIN_RATE} and {MAX_RATE} Hz")
        for flag, folder in (("--data", self.data), ("--valid", self.valid), ("--convert", self.convert)):
            if folder is not None and flag != "--convert" and not folder.is_dir():
                raise UserError(f"{flag} {shown(folder)} is not a folder")
            if folder is not None and UNLISTABLE.search(os.fspath(folder.resolve())):
                raise UserError(f"{flag} {shown(folder.resolve())}: {NO_NAME}")
        if self.transcripts is not None and not self.transcripts.exists():
            raise UserError(f"--transcripts {shown(self.transcripts)}: no such file or folder")
        if self.channel != "mix" and not (self.channel.isascii() and self.channel.isdigit()):
            raise UserError(f"--channel {self.channel} is neither mix nor the number of a channel: 0, 1, ...")
        if self.channel != "mix" and self.convert is None:
            raise UserError(f"--channel {self.channel} says what copies hold: add --convert FOLDER")
        if self.channel != "mix":
            self.channel = str(int(self.channel))


@dataclass(frozen=True)
class Survey:
    """What the headers of some audio say."""

    num_files: int
    """All audio files, those included whose header cannot be read."""
    hours: float
    """Of all whose header can be read, however long their container claims to be."""
    num_converted: int
    """Files that --convert would make a copy of; the others are linked."""
    hours_converted: float
    num_foreign: int
    """Files besides that only ffmpeg reads: nothing is known of their length."""
    num_unreadable: int
    lists: dict[str, Manifest] = field(default_factory=dict, compare=False)
    """What the lists would hold, in samples at the required rate; without the files that only ffmpeg reads."""

    @property
    def gigabytes(self) -> float:
        """That the copies would take."""
        return self.hours_converted * GIGABYTES_PER_HOUR


def survey(
    data: Path,
    valid: Path | None = None,
    num_threads: int | None = None,
    sample_rate: int = SAMPLE_RATE,
    valid_fraction: float = VALID_FRACTION,
    seed: int = 0,
) -> Survey:
    """Read the headers of what prepare_data.py would list; nothing is written.

    The arguments are fields of `Preparation`.

    Raises:
        UserError: there is no audio, or too little to hold some out, or a folder cannot be read.
    """
    layout = layout_of(data)
    problems: list[Problem] = []
    found = _find(layout, valid, problems)
    files = [read_headers(it.root, it.names, num_threads, None, problems) for it in found]
    manifests = []
    for it in files:
        lengths = [resampled_length(header.num_frames, header.sample_rate, sample_rate) for header in it.headers]
        manifests.append(Manifest(it.root, it.names, np.array(lengths, dtype=np.int64)))
    validation = manifests[1] if valid is not None else None
    lists = divide(manifests[0], layout, validation, valid_fraction, seed)
    return replace(_survey(files, found, len(problems), sample_rate), lists=lists)


def _survey(files: Sequence[Files], found: Sequence[Found], num_unreadable: int, sample_rate: int) -> Survey:
    headers = [header for it in files for header in it.headers]
    fit = [fits for it in files for fits in fitting(it, sample_rate)]
    wrong = [header for header, fits in zip(headers, fit, strict=True) if not fits]
    return Survey(
        num_files=sum(len(it.names) for it in found),
        hours=sum(header.num_frames / header.sample_rate for header in headers) / 3600,
        num_converted=len(wrong),
        hours_converted=sum(header.num_frames / header.sample_rate for header in wrong) / 3600,
        num_foreign=sum(len(it.foreign) for it in found),
        num_unreadable=num_unreadable,
    )


def _find(layout: Layout, valid: Path | None, problems: list[Problem]) -> list[Found]:
    """What is listed of a folder and, apart from it, of the folder of validation audio."""
    if valid is None:
        found = [find(layout.root, layout.parts)]
    else:
        validation = find(valid, ["."])
        training = sorted({part for name, parts in layout.lists.items() if name != "valid.tsv" for part in parts})
        found = [find(layout.root, training, validation.identities), validation]
    return [without_bad_names(it, problems) for it in found]


def prepare(config: Preparation) -> None:
    """Write the lists.

    LibriSpeech gives train100.tsv, train960.tsv (when its three training parts are there) and valid.tsv (dev-clean and
    dev-other, or speakers that are held out). Any other folder gives train.tsv and valid.tsv. What is found in the
    files is kept until they are there.

    Raises:
        Stopped: a signal asked for it.
        UserError: no usable audio, or files that are not what was asked for.
    """
    of = {"version": 2, "silence": SILENCE_PEAK, "clipped": [CLIPPED_LEVEL, CLIPPED_SHARE]}
    known = Journal(config.out / KEPT, of, "findings")
    with keeping(f"what was found in the files so far is in {known.path}"):
        _prepare(config, known)
    known.remove()


def _prepare(config: Preparation, known: Journal) -> None:
    layout = layout_of(config.data)
    if layout.librispeech:
        if "train.tsv" in layout.lists:
            parts = " and ".join(layout.lists["train.tsv"])
            logger.warning("train.tsv is of %s: %s holds no %s", parts, layout.root, ", ".join(layout.missing))
        elif layout.missing:
            logger.warning("train960.tsv is not written: %s holds no %s", layout.root, ", ".join(layout.missing))
    problems: list[Problem] = []
    found = _with_ffmpeg(_find(layout, config.valid, problems), config.convert is not None)
    sources = [read_headers(it.root, it.names, config.num_threads, known, problems) for it in found]
    if problems and not config.check and not config.skip_broken:
        raise _refusal(problems)
    if config.convert is None:
        manifests = [as_they_are(files, config.sample_rate) for files in sources]
    else:
        manifests = _converted(config, config.convert, sources, found, problems)
    if config.check:
        manifests = [decodable(manifest, config.num_threads, problems, known) for manifest in manifests]
    _report(problems, config.out, config.check, config.skip_broken)

    validation = manifests[1] if config.valid is not None else None
    lists = divide(manifests[0], layout, validation, config.valid_fraction, config.seed)
    for name, manifest in lists.items():
        if not len(manifest):
            raise UserError(f"{name} would be empty: no file under {manifest.root} can be used")
    write_lists(config.out, lists)
    for name, manifest in lists.items():
        hours = manifest.num_frames.sum() / config.sample_rate / 3600
        logger.info("%s: %d utterances, %.2f h", config.out / name, len(manifest), hours)
    if config.transcripts is not None:
        write_transcripts(config.transcripts, lists, config.out, config.convert, config.sample_rate)


def _with_ffmpeg(found: list[Found], converting: bool) -> list[Found]:
    """Without the files that only ffmpeg reads where it cannot be run or is not to be.

    Raises:
        UserError: there are no others.
    """
    if converting and shutil.which("ffmpeg"):
        return found
    for it in filter(lambda it: it.foreign, found):
        cure = "install ffmpeg and run again" if converting else "with ffmpeg installed --convert FOLDER makes copies"
        text = f"{describe_foreign(it.root, it.foreign)}: {cure}"
        if not it.names:
            raise UserError(f"{it.root} holds nothing else: {text}")
        logger.warning("left out: %s", text)
    return [it._replace(foreign=[]) for it in found]


def _converted(
    config: Preparation, out: Path, sources: list[Files], found: list[Found], problems: list[Problem]
) -> list[Manifest]:
    """Copies of the sources that need them; the others as they are."""
    folders = (out,) if config.valid is None else (out / "train", out / "valid")
    surveys = [_survey([files], [it], 0, config.sample_rate) for files, it in zip(sources, found, strict=True)]
    needed = [bool(numbers.num_converted or numbers.num_foreign) for numbers in surveys]
    # All that can be refused, before hours of work.
    for files, it, folder, is_needed in zip(sources, found, folders, needed, strict=True):
        if is_needed:
            require_apart(folder, (*files.names, *it.foreign), [top for each in found for top in each.tops])
            require_channel(files, config.channel)
    manifests = []
    for files, it, folder, numbers, is_needed in zip(sources, found, folders, surveys, needed, strict=True):
        if not is_needed:
            text = "%s: all %d files are %g kHz mono FLAC or WAV: nothing to convert"
            logger.info(text, files.root, len(files.names), config.sample_rate / 1000)
            manifests.append(as_they_are(files, config.sample_rate))
            continue
        text = "%s: %d of %d files (%.2f of %.2f h) are converted, copies of about %.2f GB in %s; the others are linked"
        sizes = (numbers.num_converted, numbers.num_files, numbers.hours_converted, numbers.hours, numbers.gigabytes)
        if numbers.num_files:
            logger.info(text, files.root, *sizes, folder)
        if numbers.num_foreign:
            text = "%s: %d files of other formats are converted by ffmpeg, copies of about %g GB an hour in %s"
            logger.info(text, files.root, numbers.num_foreign, GIGABYTES_PER_HOUR, folder)
        copying = Copying(folder, config.channel, config.sample_rate, config.num_threads)
        manifests.append(convert(files, it.foreign, copying, problems))
    return manifests


def _refusal(problems: list[Problem]) -> UserError:
    num_unusable = sum(not problem.finding.usable for problem in problems)
    first = f"{shown(problems[0].file)}: {problems[0].finding.kind}, {problems[0].finding.detail}"
    return UserError(
        f"{first} ({num_unusable} such files): repair them, or leave them out with --skip_broken; --check tells all"
    )


def _report(problems: list[Problem], out: Path, check: bool, skip_broken: bool) -> None:
    """Print a table of the problems and list them in a file; raise when they were not accepted."""
    if not problems:
        with contextlib.suppress(OSError):
            (out / "broken.tsv").unlink()  # of an earlier check
        return
    if not check and not skip_broken:
        raise _refusal(problems)
    num_unusable = sum(not problem.finding.usable for problem in problems)
    lines = [f"{shown(problem.file)}\t{problem.finding.kind}\t{problem.finding.detail}" for problem in problems]
    write_lines(out / "broken.tsv", lines)
    print(f"{'problem':<16} {'files':>7} {'left out':>9}  first")
    for kind in dict.fromkeys(problem.finding.kind for problem in problems):
        same = [problem for problem in problems if problem.finding.kind == kind]
        left_out = "no" if same[0].finding.usable else "yes"
        print(f"{kind:<16} {len(same):>7} {left_out:>9}  {shown(same[0].file)}: {same[0].finding.detail}")
    if not skip_broken:
        raise UserError(
            f"{len(problems)} files have problems, see {out / 'broken.tsv'}; no list was written: repair them, or "
            f"leave out the {num_unusable} unusable ones (and keep the silent and clipped ones) with --skip_broken"
        )
    logger.warning("%d unusable files left out, see %s", num_unusable, out / "broken.tsv")
