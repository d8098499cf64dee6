"""What the benchmarks' tests share: a small corpus of speech, and a folder as the demo leaves it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.minisuperb import evaluate
from demo.corpus import CorpusSettings, make_corpus
from tests.configs import TINY
from wav2vec2 import save_model, wav2vec2_model


@pytest.fixture(scope="session")
def spoken(tmp_path_factory) -> tuple[Path, CorpusSettings]:
    """A few synthesised sentences of each of five speakers, and what they were made with."""
    out = tmp_path_factory.mktemp("made") / "corpus"
    settings = CorpusSettings(train_speakers=3, train_utterances=10, dev_speakers=2, dev_utterances=8)
    make_corpus(out, settings)
    return out, settings


@pytest.fixture
def small(spoken, tmp_path, monkeypatch) -> Path:
    """A folder as scripts/demo.sh leaves it, tiny, and settings to match."""
    demo = tmp_path / "demo"
    demo.mkdir()
    torch.manual_seed(0)
    save_model(demo / "teacher.pth", wav2vec2_model(**TINY))
    save_model(demo / "final.pth", wav2vec2_model(**{**TINY, "encoder_ff_interm_features": [8] * 4}))
    (demo / "corpus").symlink_to(spoken[0])
    monkeypatch.setattr(evaluate, "CORPUS", spoken[1])
    monkeypatch.setattr(evaluate, "MIN_COUNT", {"words": 2, "phones": 3})
    monkeypatch.setattr(evaluate, "NUM_CHOOSING", 2)
    monkeypatch.setattr(evaluate, "NUM_TRIPLES", 20)
    monkeypatch.setattr(evaluate, "training_sentences", lambda _: [])
    return demo
