"""What a run reads: lists of audio or transcribed utterances, their symbols, and the noise that the student hears."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from distillation.config import Recipe
from distillation.data.config import DataConfig
from distillation.data.manifest import Manifest, read_tsv
from distillation.data.noise import Noise
from distillation.errors import UserError
from distillation.recognition.labels import Speller, make_vocabulary
from distillation.recognition.letters import Case, capital
from distillation.recognition.transcripts import Transcripts, learnable, read_sets, report_left_out, shortages
from wav2vec2 import Wav2Vec2Model
from wav2vec2.checkpoint import with_output_layer
from wav2vec2.vocabulary import written

logger = logging.getLogger(__name__)


@dataclass
class Lists:
    """What there is to train and to validate on.

    Attributes:
        train: to train on.
        valid: to validate on.
        vocabulary: symbols of the student's output layer; None where nothing is written down.
        noise: for the student; None for none.
        transcripts: that the lists come from, and what these leave out.
    """

    train: Manifest
    valid: Manifest
    vocabulary: list[str] | None = None
    noise: Noise | None = None
    transcripts: Sequence[Transcripts] = ()

    @property
    def manifests(self) -> dict[str, Manifest]:
        """By the names of their use."""
        return {"train": self.train, "valid": self.valid}

    @property
    def speller(self) -> Speller | None:
        """Writes labels."""
        return None if self.vocabulary is None else Speller(self.vocabulary)

    def report(self, exp_dir: Path) -> None:
        """Log what transcripts leave out, and list it in the folder of the run."""
        if self.transcripts:
            report_left_out(self.transcripts, exp_dir)


def read_lists(recipe: Recipe, student: Wav2Vec2Model, known: list[str] | None) -> Lists:
    """Read what a recipe names.

    Args:
        recipe: all of its settings.
        student: dense; its frames decide what can be written in them.
        known: symbols of its output layer; None for one that is yet to come.

    Raises:
        UserError: a list that cannot be read, or gives nothing to train on.
    """
    data = recipe.data
    noise = None if data.noise is None else Noise(data.noise, recipe.seed, data.sample_rate)
    if data.transcripts is None:
        if recipe.objective.ctc is not None:
            raise UserError("objective.ctc needs to know what is said: set data.transcripts")
        train, valid = (read_tsv(data.tsv_dir / name) for name in (data.train, data.valid))
        return Lists(train, valid, noise=noise)
    found = _read_transcripts(data, [data.transcribed("train"), data.transcribed("valid")], known)
    if recipe.objective.ctc is not None:
        found[0] = learnable(found[0], student.symbol_frames)
    train, valid = found[0].manifest, found[1].manifest
    vocabulary = known or make_vocabulary(train.texts or [])
    for transcripts in found:
        look_at(transcripts, vocabulary, student)
    return Lists(train, valid, vocabulary, noise, found)


def read_valid(recipe: Recipe, vocabulary: list[str] | None) -> Manifest:
    """The validation list of a recipe alone.

    Args:
        recipe: all of its settings.
        vocabulary: symbols of the output layer; decides in which case transcripts are written.

    Raises:
        UserError: it cannot be read.
    """
    data = recipe.data
    if data.transcripts is None:
        return read_tsv(data.tsv_dir / data.valid)
    return _read_transcripts(data, [data.transcribed("valid")], vocabulary)[0].manifest


def _read_transcripts(data: DataConfig, sources: list[Path], vocabulary: list[str] | None) -> list[Transcripts]:
    assert data.transcripts is not None
    for source in sources:
        if not source.exists():
            made = source.suffix == ".jsonl"
            advice = "; prepare_data.py --transcripts writes it, or set data.transcripts" if made else " or folder"
            raise UserError(f"{source}: no such file{advice}")
    case = case_of(vocabulary) if data.transcripts.case == "auto" else data.transcripts.case
    return read_sets(sources, data.transcripts.audio, case)


def wanted_vocabulary(recipe: Recipe, student: Wav2Vec2Model, teacher: Wav2Vec2Model) -> list[str] | None:
    """Symbols that the student's output layer has, or is to get from its teacher; None for those of the transcripts.

    Raises:
        UserError: the recipe wants what neither has.
    """
    wanted = "auto" if recipe.objective.ctc is None else recipe.objective.ctc.vocabulary
    known = student.vocabulary or teacher.vocabulary
    if wanted == "model" and known is None:
        raise UserError(
            "objective.ctc.vocabulary is model, and the model has no output layer with a vocabulary: convert a "
            "fine-tuned one with --ctc, or set it to transcripts"
        )
    return None if wanted == "transcripts" else known


def prepared_to_write(recipe: Recipe, student: Wav2Vec2Model, vocabulary: list[str] | None) -> Wav2Vec2Model:
    """The student with the output layer that the recipe's objective wants: its own, or a new one."""
    ctc = recipe.objective.ctc
    if ctc is None or vocabulary is None:
        return student
    if student.vocabulary is not None and ctc.vocabulary != "transcripts":
        logger.info("output layer: the model's own, %d symbols", len(vocabulary))
        return student
    logger.info("output layer: a new one, %d symbols", len(vocabulary))
    torch.manual_seed(recipe.seed)
    return with_output_layer(student, vocabulary)


def case_of(vocabulary: list[str] | None) -> Case:
    """Of the letters that an output layer writes; capitals where there is none."""
    letters = "".join(map(written, vocabulary or []))
    has_upper, has_lower = letters != letters.lower(), any(capital(letter) != letter for letter in letters)
    if has_upper and has_lower:
        return "keep"
    return "lower" if has_lower else "upper"


def look_at(transcripts: Transcripts, vocabulary: list[str], student: Wav2Vec2Model) -> None:
    """Say what can never be written right.

    Raises:
        UserError: nothing of a list can be written.
    """
    source, texts = transcripts.source, [u.text for u in transcripts.utterances]
    speller = Speller(vocabulary)
    unknown = speller.unknown(texts)
    if unknown and not any(character in speller.ids for text in texts for character in text if character != " "):
        raise UserError(
            f"{source}: the output layer has none of its characters, which are {' '.join(unknown[:20])}: is it of "
            "another language? objective.ctc.vocabulary transcripts makes a new one"
        )
    if unknown:
        logger.warning("%s: the output layer has no %s, which count as errors", source, " ".join(unknown[:50]))
    if hopeless := sum(map(bool, shortages(transcripts.utterances, student.symbol_frames))):
        of = source, hopeless, len(texts)
        logger.warning("%s: %d of %d transcripts have more characters than frames and count as errors", *of)
