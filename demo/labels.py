"""Read a synthetic corpus with one phone and one word label per frame of the models (20 ms, 50 per second).

Frame t of a HuBERT or wav2vec 2.0 extractor sees samples [320 t, 320 t + 400); its label is what is said at the middle.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import soundfile
import torch
from torch import Tensor
from tqdm import tqdm

from demo.corpus import is_silence
from distillation.errors import UserError
from wav2vec2.feature_extractor import SAMPLE_RATE

HOP, WINDOW = 320, 400
IGNORE = -100
"""Label of frames that count for nothing: rare labels, and silence among the words."""
SILENCE = "SIL"


def num_frames(num_samples: int) -> int:
    """Frames that the convolutional extractor makes of ``num_samples`` samples at 16 kHz."""
    return max(0, (num_samples - WINDOW) // HOP + 1)


@dataclass
class Utterance:
    """One utterance in memory, with its alignment as [start, end, label] in seconds."""

    id: str
    speaker: int
    text: str
    audio: Tensor
    """int16 [N]: four hours take 460 MB."""
    phones: list[list]
    words: list[list]

    @property
    def waveform(self) -> Tensor:
        """float32 [N] in [-1, 1)."""
        return self.audio.float() / 32768

    @property
    def num_frames(self) -> int:
        """T, the number of frames."""
        return num_frames(len(self.audio))


def read_split(corpus: str | Path, split: str) -> list[Utterance]:
    """Read ``train-clean-100``, ``dev-clean`` or ``keywords`` of a corpus.

    Raises:
        UserError: ``corpus`` is no finished corpus, or has no such part.
    """
    path = Path(corpus) / "align" / f"{split}.jsonl"
    if not path.is_file():
        raise UserError(f"{path} is missing: make the corpus with python -m demo.corpus")
    utterances = []
    for line in tqdm(path.read_text().splitlines(), desc=f"reading {split}", unit="utt", leave=False):
        row = json.loads(line)
        audio = torch.from_numpy(soundfile.read(Path(corpus) / row["path"], dtype="int16")[0])
        utterances.append(Utterance(row["id"], row["speaker"], row["text"], audio, row["phones"], row["words"]))
    return utterances


class FrameLabels:
    """Class numbers per frame, for the phones or words frequent enough in the training part to be learnt.

    Args:
        utterances: the training part.
        kind: ``"phones"``, where silence is class 0, or ``"words"``, where silence is ignored.
        min_count: rarer labels become ``IGNORE``.
    """

    def __init__(self, utterances: Iterable[Utterance], kind: str, min_count: int):
        self._kind = kind
        count = Counter(label for utterance in utterances for label in self._labels(utterance) if label != SILENCE)
        frequent = sorted(label for label, num in count.items() if num >= min_count)
        self.names = [SILENCE, *frequent] if kind == "phones" else frequent
        self._index = {name: i for i, name in enumerate(self.names)}

    def __len__(self) -> int:
        return len(self.names)

    def _labels(self, utterance: Utterance) -> list[str]:
        labels = [label for _, _, label in getattr(utterance, self._kind)]
        return [SILENCE if is_silence(label) else label for label in labels] if self._kind == "phones" else labels

    def __call__(self, utterance: Utterance) -> Tensor:
        """Return int64 [T]."""
        spans = getattr(utterance, self._kind)
        middle = (torch.arange(utterance.num_frames, dtype=torch.float64) * HOP + WINDOW / 2) / SAMPLE_RATE
        start, end = (torch.tensor([span[i] for span in spans], dtype=torch.float64) for i in (0, 1))
        at = torch.searchsorted(start, middle, right=True) - 1
        outside = (at < 0) | (middle >= end[at])
        classes = torch.tensor([self._index.get(label, IGNORE) for label in self._labels(utterance)])
        return torch.where(outside, self._index.get(SILENCE, IGNORE), classes[at])
