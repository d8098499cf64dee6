"""Transcribed utterances that can be used: what lists say, checked against the audio and written in one way."""

from __future__ import annotations

import functools
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from distillation.data.audio import AudioError, Header, read_header
from distillation.data.config import MIN_INPUT_FRAMES
from distillation.data.kaldi import BY_COMMAND, MALFORMED, NOT_FOUND, OVERSHOOT
from distillation.data.manifest import Manifest, write_lines
from distillation.errors import UserError
from distillation.recognition.letters import Case, Letters
from distillation.recognition.manifests import Row, read_rows
from wav2vec2.feature_extractor import SAMPLE_RATE
from wav2vec2.vocabulary import SPACE

logger = logging.getLogger(__name__)

LEFT_OUT = "left_out.tsv"  # in the folder of a run: path, place in its list, reason

AUDIO = "--audio (of a recipe: --data.transcripts.audio)"
# kind of a row that cannot be used -> what to do where all are so
ADVICE = {
    NOT_FOUND: f"do its paths start from another folder? Name it with {AUDIO}",
    MALFORMED: "is it a list of this kind?",
    BY_COMMAND: "run the commands of wav.scp, and name what they give there",
    "unreadable audio": "copy them again, or convert formats that cannot be read here with prepare_data.py --convert",
    "not 16 kHz mono": f"convert the files with prepare_data.py --convert and name their new folder with {AUDIO}",
    "outside its audio": "do start and end belong to these files?",
    "too short for a frame": f"the models need {MIN_INPUT_FRAMES} samples",
    "empty transcript": "is the text in this file?",
    f"{SPACE} in the transcript": "it stands for the space: replace it",
    "longer than its audio allows": "do the transcripts belong to these files?",
}
_, _, _, UNREADABLE, WRONG_FORMAT, OUTSIDE, TOO_SHORT, EMPTY, WITH_SPACE, TOO_LONG = ADVICE


class Utterance(NamedTuple):
    """A stretch of a file and what is said in it, with single spaces; ``start`` and ``num_frames`` in samples."""

    path: Path
    num_frames: int
    text: str
    start: int = 0
    place: str = ""  # in its list


class LeftOut(NamedTuple):
    """A row that cannot be used; ``kind`` is one of ``ADVICE``."""

    path: Path
    place: str
    kind: str
    detail: str

    def __str__(self) -> str:
        return f"{self.path}{self.detail and f': {self.detail}'}"


@dataclass
class Transcripts:
    """What a list or folder gives."""

    source: Path
    utterances: list[Utterance]
    left_out: list[LeftOut] = field(default_factory=list)

    @property
    def manifest(self) -> Manifest:
        """The same as batches are made of."""
        paths = [os.path.abspath(u.path) for u in self.utterances]  # noqa: PTH100  # links stay
        root = Path(os.path.commonpath([os.path.dirname(path) for path in paths]))  # noqa: PTH120
        return Manifest(
            root,
            [os.path.relpath(path, root) for path in paths],
            np.array([u.num_frames for u in self.utterances], dtype=np.int64),
            np.array([u.start for u in self.utterances], dtype=np.int64),
            [u.text for u in self.utterances],
        )

    def require_some(self) -> None:
        """Raise a UserError where no utterance can be used: the commonest reason, and what to do."""
        if not self.utterances:
            kind = Counter(row.kind for row in self.left_out).most_common(1)[0][0]
            raise UserError(
                f"{self.source}: none of its {len(self.left_out)} utterances can be used: "
                f"{summary(self.left_out)}; {ADVICE[kind]}"
            )


def read_sets(sources: Sequence[Path], audio: Path | None = None, case: Case = "upper") -> list[Transcripts]:
    """Read and check transcribed utterances of one run, whose transcripts are all written in the same letters.

    Args:
        sources: files or folders of one of ``distillation.recognition.manifests.FORMATS``.
        audio: folder of the audio, as for ``distillation.recognition.manifests.AudioFolders``.
        case: as for ``distillation.recognition.letters.Letters``.

    Raises:
        UserError: nothing there, a line of another format, or a source without any usable utterance.
    """
    lists = [read_rows(source, audio) for source in sources]
    letters = Letters.of(case, (row.text for rows in lists for row in rows))
    found = []
    for source, rows in zip(sources, lists):
        transcripts = Transcripts(source, [])
        again = functools.lru_cache(maxsize=1000)(read_header)  # segments name a recording again and again
        for row in tqdm(rows, f"reading headers of {source.name}", leave=False, disable=None):
            checked = _checked(row, letters, read_header if row.is_whole else again)
            if isinstance(checked, LeftOut):
                transcripts.left_out.append(checked)
            else:
                transcripts.utterances.append(checked)
        transcripts.require_some()
        found.append(transcripts)
    return found


def _checked(row: Row, letters: Letters, header_of: Callable[[Path], Header]) -> Utterance | LeftOut:
    def unusable(kind: str, detail: str = "") -> LeftOut:
        return LeftOut(row.path, row.place, kind, detail)

    if row.fault:
        return unusable(*row.fault)
    text = letters.write(row.text)
    if not text or SPACE in text:
        return unusable(WITH_SPACE if text else EMPTY)
    try:
        length, rate, channels = header_of(row.path)
    except AudioError as error:
        return unusable(NOT_FOUND if isinstance(error.__context__, FileNotFoundError) else UNREADABLE, error.reason)
    if rate != SAMPLE_RATE or channels != 1:
        return unusable(WRONG_FORMAT, f"{rate} Hz, {channels} channels")
    start, end = round(row.start * SAMPLE_RATE), length if row.end is None else round(row.end * SAMPLE_RATE)
    if start > length or end > length + OVERSHOOT * SAMPLE_RATE:
        return unusable(OUTSIDE, f"samples {start} to {end} of {length}")
    num_frames = min(end, length) - start
    if num_frames < MIN_INPUT_FRAMES:
        return unusable(TOO_SHORT, f"{num_frames} samples")
    return Utterance(row.path, num_frames, text, start, row.place)


def shortages(utterances: Sequence[Utterance], frames_of: Callable[[Tensor], Tensor]) -> list[str]:
    """Why transcripts cannot be written in the frames of their audio; empty for those that can.

    CTC needs a frame for each character, and one for a blank between two equal ones.

    Args:
        utterances: [B].
        frames_of: frames in which a character can be written, [B] from samples [B].
    """
    frames = frames_of(torch.tensor([u.num_frames for u in utterances])).tolist()
    return [_shortage(u.text, count) for u, count in zip(utterances, frames)]


def _shortage(text: str, frames: int) -> str:
    if 2 * len(text) <= frames:  # nearly all, without a look at their characters
        return ""
    doubled = sum(map(str.__eq__, text, text[1:]))
    if len(text) + doubled <= frames:
        return ""
    return f"{frames} frames for {len(text)} characters" + (f", {doubled} doubled" if doubled else "")


def learnable(transcripts: Transcripts, frames_of: Callable[[Tensor], Tensor]) -> Transcripts:
    """What CTC can learn: without those with :func:`shortages`.

    Their loss is infinite; in frames that time reduction has merged it is not, but nothing that is decoded spells them.

    Raises:
        UserError: nothing is left.
    """
    pairs = list(zip(transcripts.utterances, shortages(transcripts.utterances, frames_of)))
    too_long = [LeftOut(u.path, u.place, TOO_LONG, reason) for u, reason in pairs if reason]
    result = Transcripts(
        transcripts.source, [u for u, reason in pairs if not reason], [*transcripts.left_out, *too_long]
    )
    result.require_some()
    return result


def summary(rows: Sequence[LeftOut]) -> str:
    """How many rows of each kind, and the first of each."""
    counts = Counter(row.kind for row in rows).most_common()
    return ", ".join(
        f"{count} {kind} (first {next(row for row in rows if row.kind == kind)})" for kind, count in counts
    )


def report_left_out(sets: Sequence[Transcripts], exp_dir: Path) -> None:
    """Log what is left out, and list it in ``left_out.tsv``, which is removed where there is nothing."""
    for transcripts in sets:
        if rows := transcripts.left_out:
            total = len(rows) + len(transcripts.utterances)
            of = transcripts.source, len(rows), total, exp_dir / LEFT_OUT
            logger.warning("%s: %d of %d left out, see %s: %s", *of, summary(rows))
    listing = exp_dir / LEFT_OUT
    lines = []
    for path, place, kind, detail in (row for transcripts in sets for row in transcripts.left_out):
        cells = (str(path), place, f"{kind}: {detail}" if detail else kind)
        lines.append("\t".join(re.sub(r"[\t\r\n]", " ", cell) for cell in cells))
    if lines:
        write_lines(listing, lines)
    else:
        listing.unlink(missing_ok=True)  # of an earlier start
