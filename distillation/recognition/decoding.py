"""From log-probabilities of characters to text, greedily or by a beam (lexicon-free, torchaudio's flashlight binding);
and how far texts are off.

Shapes: B batch, T frames, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distillation.errors import UserError
from wav2vec2.vocabulary import SPACE, written

Decoder = Callable[[Tensor, Tensor], list[str]]
"""Log-probabilities [B, T, V] and valid frames [B] -> texts."""
RATES = ("wer", "cer")  # of words and of characters


def to_text(ids: Sequence[int], vocabulary: Sequence[str]) -> str:
    """Characters without the blank and other special symbols, with single spaces."""
    return " ".join("".join(written(vocabulary[i]) for i in ids).split())


def greedy_decoder(vocabulary: Sequence[str]) -> Decoder:
    """The best character of each frame, repetitions merged."""

    def decode(log_probs: Tensor, frames: Tensor) -> list[str]:
        best = log_probs.argmax(-1).cpu()
        rows = zip(best, frames.tolist())
        return [to_text(row[:count].unique_consecutive().tolist(), vocabulary) for row, count in rows]

    return decode


def beam_decoder(vocabulary: Sequence[str], beam_size: int) -> Decoder:
    """The best text over all alignments that a beam finds; neither lexicon nor language model.

    Raises:
        UserError: flashlight-text is not installed.
    """
    try:
        from torchaudio.models.decoder import ctc_decoder

        search = ctc_decoder(
            lexicon=None, tokens=list(vocabulary), beam_size=beam_size, blank_token=vocabulary[0], sil_token=SPACE,
            log_add=True,
        )  # fmt: skip
    except (ImportError, RuntimeError):
        raise UserError(
            f"--beam_size {beam_size}: pip install -r requirements/export.txt, or 0 for greedy decoding"
        ) from None

    def decode(log_probs: Tensor, frames: Tensor) -> list[str]:
        found = search(log_probs.float().cpu().contiguous(), frames.cpu())
        return [to_text(hypotheses[0].tokens.tolist() if hypotheses else [], vocabulary) for hypotheses in found]

    return decode


def decoders_of(vocabulary: Sequence[str], beam_size: int) -> dict[str, Decoder]:
    """Greedy decoding, and with a beam where it has a size; by what is put before the names of their rates.

    Raises:
        UserError: as :func:`beam_decoder`.
    """
    decoders = {"": greedy_decoder(vocabulary)}
    return {**decoders, "beam_": beam_decoder(vocabulary, beam_size)} if beam_size else decoders


def count_errors(texts: Sequence[str], expected: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Errors, and what they are a share of, by ``RATES``: scalars."""
    from torchmetrics.text import CharErrorRate, WordErrorRate  # takes seconds: not for --help

    found = {}
    for name, metric in zip(RATES, (WordErrorRate(), CharErrorRate())):
        metric.update(texts, expected)
        found[name] = torch.as_tensor(metric.errors), torch.as_tensor(metric.total)
    return found
