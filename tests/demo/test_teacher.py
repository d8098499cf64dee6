import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoFeatureExtractor, HubertModel

from demo import train_teacher as training
from demo.corpus import CorpusSettings, make_corpus
from demo.frame_probe import accuracy, linear_probe
from demo.labels import IGNORE
from demo.targets import cepstra, phone_information
from demo.train_teacher import TeacherTraining, train_teacher
from distillation.errors import UserError
from distillation.stopping import Stopped
from tests.helpers import assert_same_tensors

SHIPPED = Path(training.__file__).parent / "teacher"
TINY = TeacherTraining(
    mfcc_steps=2, hidden_steps=2, supervised_steps=2, batch_size=2, crop=32, threads=1, min_depth=-100.0
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "corpus"
    make_corpus(
        out, CorpusSettings(train_speakers=2, train_utterances=6, dev_speakers=1, dev_utterances=2, keywords=False)
    )
    return out


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Labels of so small a corpus, and a short probe."""
    monkeypatch.setattr(training, "MIN_COUNT", {"words": 2, "phones": 5})
    monkeypatch.setattr(training, "linear_probe", lambda *args: linear_probe(*args, steps=20))


def test_shipped_teacher_loads_and_is_small():
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 4_000_000
    model, report = HubertModel.from_pretrained(SHIPPED, output_loading_info=True)
    assert not any(report.values())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    config = model.config
    assert (config.hidden_dropout, config.attention_dropout, config.feat_proj_dropout) == (0.1, 0.1, 0.1)
    assert (config.layerdrop, config.activation_dropout) == (0.05, 0.0)
    assert not AutoFeatureExtractor.from_pretrained(SHIPPED).do_normalize
    log = json.loads((SHIPPED / "training_log.json").read_text())
    assert log["model"]["parameters"] == model.num_parameters()
    with torch.no_grad():
        states = model.eval()(torch.randn(1, 16_000), output_hidden_states=True).hidden_states
    assert [tuple(state.shape) for state in states] == [(1, 49, 144)] * 7
    assert all(state.isfinite().all() for state in states)


def test_shipped_teacher_has_depth():
    """Its log says so: words need the upper layers, by at least 20 points."""
    words = json.loads((SHIPPED / "training_log.json").read_text())["accuracy"]["words"]
    assert len(words) == 7
    assert max(words) - words[0] >= 20


@pytest.mark.slow
def test_resumed_equals_uninterrupted(corpus, tmp_path, monkeypatch):
    log = train_teacher(corpus, tmp_path / "work", tmp_path / "whole", TINY)
    assert [stage["curve"][-1]["step"] for stage in log["stages"].values()] == [2, 2, 2]
    assert log == json.loads((tmp_path / "whole" / "training_log.json").read_text())
    assert len(log["accuracy"]["words"]) == len(log["accuracy"]["phones"]) == 7
    card = (tmp_path / "whole" / "README.md").read_text()
    assert f"| 6 | {log['accuracy']['words'][6]:.1f} | {log['accuracy']['phones'][6]:.1f} |" in card

    train_stage = training.train_stage
    trained = []

    def interrupted(model, name, *rest):
        if name == "hidden" and not trained.count("hidden"):
            trained.append(name)
            raise KeyboardInterrupt
        trained.append(name)
        return train_stage(model, name, *rest)

    monkeypatch.setattr(training, "train_stage", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_teacher(corpus, tmp_path / "work2", tmp_path / "resumed", TINY)
    assert not (tmp_path / "resumed").exists()
    train_teacher(corpus, tmp_path / "work2", tmp_path / "resumed", TINY)
    assert trained == ["mfcc", "hidden", "hidden", "supervised"]
    whole, resumed = (HubertModel.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    other = TeacherTraining(**{**vars(TINY), "supervised_steps": 3})
    with pytest.raises(UserError, match=r"supervised\.pt was made with other settings"):
        train_teacher(corpus, tmp_path / "work2", tmp_path / "other", other)
    with pytest.raises(UserError, match=r"less than --min_depth 101\.0: nothing saved"):
        train_teacher(
            corpus, tmp_path / "work2", tmp_path / "other", TeacherTraining(**{**vars(TINY), "min_depth": 101.0})
        )
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_a_stage_that_was_stopped_goes_on_bit_for_bit(corpus, tmp_path, monkeypatch):
    """Also after a crash, from its last checkpoint; and its clusters are not looked for again."""
    settings = TeacherTraining(**{**vars(TINY), "mfcc_steps": 5, "hidden_steps": 3})
    work, draw_batch, clustered, events = tmp_path / "work", training.draw_batch, [], {}
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 2)

    def strike(*args):
        drawn.append(True)
        events.pop(len(drawn), lambda: None)()
        return draw_batch(*args)

    def crash():
        raise MemoryError

    cluster = training.cluster
    monkeypatch.setattr(training, "draw_batch", strike)
    monkeypatch.setattr(training, "cluster", lambda *args: clustered.append(True) or cluster(*args))
    drawn: list = []
    events = {3: lambda: os.kill(os.getpid(), signal.SIGTERM), 5: crash}
    with pytest.raises(Stopped, match=f"SIGTERM: the finished stages and .* are in {work}; the same command goes on"):
        train_teacher(corpus, work, tmp_path / "out", settings)
    assert [path.name for path in sorted(work.iterdir())] == ["mfcc.ckpt", "mfcc.clusters"] and len(drawn) == 3
    with pytest.raises(MemoryError):
        train_teacher(corpus, work, tmp_path / "out", settings)
    other = TeacherTraining(**{**vars(settings), "mfcc_steps": 6})
    with pytest.raises(UserError, match=r"mfcc\.clusters was made with other settings"):
        train_teacher(corpus, work, tmp_path / "out", other)
    log = train_teacher(corpus, work, tmp_path / "out", settings)
    assert len(drawn) == 5 + 3 + 2 + 1 and len(clustered) == 2  # an update is lost to the crash
    assert sorted(path.name for path in work.iterdir()) == ["hidden.pt", "mfcc.pt", "supervised.pt"]
    whole = train_teacher(corpus, tmp_path / "work2", tmp_path / "whole", settings)
    for row in (row for made in (log, whole) for stage in made["stages"].values() for row in stage["curve"]):
        del row["seconds"]
    assert log == whole
    states = (HubertModel.from_pretrained(tmp_path / name).state_dict() for name in ("out", "whole"))
    assert_same_tensors(*states)


@pytest.mark.slow
def test_user_errors(corpus, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"corpus\.json is missing: make the corpus"):
        train_teacher(tmp_path, tmp_path / "work", tmp_path / "out", TINY)
    monkeypatch.setattr(training, "MIN_COUNT", {"words": 1000, "phones": 5})
    with pytest.raises(UserError, match="is too small: it needs words that occur 1000 times"):
        train_teacher(corpus, tmp_path / "work", tmp_path / "out", TINY)
    with pytest.raises(UserError, match="--hidden_steps is 0"):
        TeacherTraining(hidden_steps=0)


def test_batches(corpus):
    """Labels belong to the samples of their crop, masks come in spans, padding is unlabelled."""
    utterances = training.read_split(corpus, "train-clean-100")
    positions = [torch.arange(u.num_frames) for u in utterances]
    stage = training.Stage([positions], [1], mask_start_probability=0.05, unmasked_weight=1.0)
    settings = TeacherTraining(batch_size=40, crop=160)
    batch = training.draw_batch(utterances, stage, settings, np.random.default_rng(0))
    assert batch.waveforms.shape == (40, 159 * 320 + 400)
    padded = 0
    for waveform, label in zip(batch.waveforms, batch.labels[0], strict=True):
        known = label[label != IGNORE]
        assert torch.equal(known, torch.arange(known[0], known[0] + len(known)))
        first = waveform[: (len(known) - 1) * 320 + 400]
        assert any(
            torch.equal(u.waveform[known[0] * 320 :][: len(first)], first)
            for u in utterances
            if len(u.audio) >= len(first)
        )
        padded += len(known) < 160
    assert padded > 0
    masked = batch.mask.float().mean().item()
    assert abs(masked - (1 - 0.95**10)) < 0.06


def test_cepstra_have_one_row_per_frame(corpus):
    utterance = training.read_split(corpus, "dev-clean")[0]
    values = cepstra(utterance)
    assert values.shape == (utterance.num_frames, 39) and values.isfinite().all()


def test_phone_information():
    phones = torch.tensor([0, 0, 1, 1, IGNORE])
    assert phone_information([torch.tensor([3, 3, 5, 5, 0])], [phones]) == pytest.approx(1)
    assert phone_information([torch.tensor([1, 1, 1, 1, 0])], [phones]) == pytest.approx(0)


@pytest.mark.slow
def test_linear_probe():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4000) % 4
    features = torch.eye(6)[labels] * 3 + torch.randn(4000, 6, generator=generator)
    half = labels.clone()
    half[::2] = IGNORE  # classes 0 and 2 are never seen
    assert accuracy(linear_probe(features[:3000], labels[:3000], features[3000:], 4), labels[3000:]) > 90
    assert set(linear_probe(features[:3000], half[:3000], features[3000:], 4).tolist()) == {1, 3}
    assert accuracy(torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 2, IGNORE])) == pytest.approx(200 / 3)
    assert accuracy(torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 2, IGNORE]), without=0) == pytest.approx(50)
