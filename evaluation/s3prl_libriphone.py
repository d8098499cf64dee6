"""LibriSpeech as phones, for s3prl's phone recognition where its package lacks ``downstream/ctc/corpus``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from distillation.data.audio import read_header


def read_lexicon(paths: Sequence[str | Path]) -> dict[str, list[str]]:
    """Word to phones; the first pronunciation counts."""
    lexicon: dict[str, list[str]] = {}
    for path in paths:
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            word, *phones = line.split()
            lexicon.setdefault(word.upper(), phones)
    return lexicon


class LibriPhoneDataset(Dataset):
    """Utterances of parts of LibriSpeech with their phones, of similar length side by side.

    Args:
        split: names of the parts, e.g. ``["train-clean-100"]``.
        tokenizer: of s3prl; encodes phones separated by spaces.
        bucket_size: utterances that one item holds; 1 for single ones.
        path: the LibriSpeech folder.
        lexicon: files of ``WORD PHONE PHONE ...``.
        kwargs: the rest of the corpus section of the config.
    """

    def __init__(
        self, split: Sequence[str], tokenizer: Any, bucket_size: int, path: str, lexicon: Sequence[str], **kwargs: Any
    ) -> None:
        self.bucket_size = bucket_size
        words = read_lexicon(lexicon)
        found: list[tuple[int, str, list[int]]] = []
        for part in split:
            for transcript in sorted((Path(path) / part).rglob("*.trans.txt")):
                for line in transcript.read_text(encoding="utf-8").splitlines():
                    name, *text = line.split()
                    if unknown := [word for word in text if word.upper() not in words]:
                        raise ValueError(f"{transcript}: {unknown[0]} is in none of the lexicon files {list(lexicon)}")
                    phones = " ".join(phone for word in text for phone in words[word.upper()])
                    file = transcript.with_name(f"{name}.flac")
                    found.append((read_header(file).num_frames, str(file), tokenizer.encode(phones)))
        if not found:
            raise ValueError(f"{path}: no transcripts under {', '.join(split)}")
        found.sort(reverse=True)
        self.items = [(file, phones) for _, file, phones in found]

    def __len__(self) -> int:
        return len(self.items) if self.bucket_size == 1 else max(1, len(self.items) - self.bucket_size + 1)

    def __getitem__(self, index: int) -> Any:
        if self.bucket_size == 1:
            return self.items[index]
        return self.items[index : index + self.bucket_size]
