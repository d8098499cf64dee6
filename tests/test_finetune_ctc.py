"""Fine-tuning: a language of tones is learnt to few errors; freezing, resuming, transcripts, decoding, mistakes."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from finetuning.batches import LengthBatches, SpeechDataset
from finetuning.config import FinetuneConfig, FinetuneRun
from finetuning.ctc import CTCModule, head_frames
from finetuning.training import finetune

import export
from distillation.errors import UserError
from distillation.recognition.decoding import beam_decoder, greedy_decoder
from distillation.recognition.transcripts import Utterance, make_vocabulary, read_transcripts
from distillation.stopping import Stopped
from distillation.training.record import Record
from distillation.training.standing import Standing
from exporting import verify
from exporting.source import ExportOptions
from tests.configs import first_layers
from wav2vec2 import load_model, save_model, wav2vec2_model
from wav2vec2.checkpoint import load_checkpoint

TONES = {"A": 300.0, "B": 700.0, "C": 1500.0, "D": 3000.0, " ": 0.0}
VOCABULARY = ["<pad>", "|", "A", "B", "C", "D"]


def say(text: str, random: np.random.Generator) -> np.ndarray:
    """80 ms of a character's tone and 40 ms of silence each, in noise."""
    time = np.arange(1280) / 16_000
    parts = [np.concatenate([np.sin(2 * np.pi * TONES[c] * time), np.zeros(640)]) for c in text]
    wave = np.concatenate(parts)
    return (0.3 * wave + 0.01 * random.standard_normal(len(wave))).astype(np.float32)


def make_corpus(folder: Path, count: int, seed: int) -> Path:
    """LibriSpeech-shaped, words of one to three characters."""
    random = np.random.default_rng(seed)
    chapter = folder / "1" / "2"
    chapter.mkdir(parents=True)
    lines = []
    for i in range(count):
        words = ["".join(random.choice(list("ABCD"), random.integers(1, 4))) for _ in range(random.integers(2, 5))]
        soundfile.write(chapter / f"1-2-{i:04d}.flac", say(" ".join(words), random), 16_000)
        lines.append(f"1-2-{i:04d} {' '.join(words)}")
    (chapter / "1-2.trans.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def tones(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tones")
    return make_corpus(folder / "train", 160, 0), make_corpus(folder / "valid", 24, 1)


@pytest.fixture(scope="module")
def random_model(tmp_path_factory, tiny_config) -> Path:
    torch.manual_seed(0)
    changes = {"encoder_layer_drop": 0.0, "encoder_dropout": 0.0}
    path = tmp_path_factory.mktemp("model") / "model.pth"
    save_model(path, wav2vec2_model(**first_layers({**tiny_config, **changes}, 2)))
    return path


def run(
    model: Path, tones: tuple[Path, Path], exp_dir: Path, beam_size: int = 0, on_request: bool = False, **changes
) -> dict[str, float]:
    settings = {
        "max_steps": 140, "freeze_steps": 20, "lr": 5e-3, "head_lr": 5e-3, "seconds_per_batch": 24.0,
        "train_extractor": True, **changes,
    }  # fmt: skip
    config = FinetuneConfig(**settings)
    settings = {"validate_every": config.max_steps // 2, "beam_size": beam_size, "accelerator": "cpu", "workers": 0}
    return finetune(FinetuneRun(str(model), *tones, exp_dir, config, **settings, continue_with_changes=on_request))


@pytest.mark.slow
def test_tones_are_learnt_and_travel_to_transformers(random_model, tones, tmp_path, monkeypatch, exported_here):
    results = run(random_model, tones, tmp_path / "exp")
    assert results["wer"] < 30 and results["cer"] < 10  # without a word written both are 100
    assert json.loads((tmp_path / "exp" / "results.json").read_text()) == results
    rows = list(csv.DictReader((tmp_path / "exp" / "metrics.csv").open()))
    measured = [float(row["valid/wer"]) for row in rows if row.get("valid/wer")]
    assert len(measured) == 2 and measured[-1] == pytest.approx(results["wer"], abs=1e-3)
    checkpoint = load_checkpoint(tmp_path / "exp" / "final.pth")
    assert checkpoint.extra["vocabulary"] == VOCABULARY

    from transformers import pipeline

    monkeypatch.setattr(verify, "BATCHES", [[0.05]])
    export.run(tmp_path / "exp" / "final.pth", "hf", tmp_path / "recogniser", ExportOptions())
    recognise = pipeline("automatic-speech-recognition", model=str(tmp_path / "recogniser"), trust_remote_code=True)
    utterance = read_transcripts(tones[1])[0]
    decode = greedy_decoder(VOCABULARY)
    waveform, _ = soundfile.read(utterance.path, dtype="float32")
    with torch.no_grad():
        logits, frames = checkpoint.model(torch.from_numpy(waveform)[None], torch.tensor([len(waveform)]))
    (expected,) = decode(logits, frames)
    assert " ".join(recognise(waveform)["text"].split()) == expected != ""


def test_the_freeze_trains_the_output_layer_alone(random_model, tones, tmp_path):
    before = load_model(random_model).state_dict()
    run(random_model, tones, tmp_path / "a", max_steps=4, freeze_steps=3, train_extractor=False)
    after = load_model(tmp_path / "a" / "final.pth").state_dict()
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"encoder"}
    standing = Standing(tmp_path / "last.ckpt", Record([]))
    module = CTCModule(load_model(random_model), VOCABULARY, FinetuneConfig(freeze_steps=1), standing)
    dataset = SpeechDataset(read_transcripts(tones[1]), VOCABULARY)
    module.log = lambda *args, **kwargs: None
    module.training_step(dataset[[0, 1]], 0).backward()
    learning = {name for name, parameter in module.model.named_parameters() if parameter.grad is not None}
    assert learning == {"aux.weight", "aux.bias"}


@pytest.mark.slow
def test_a_stopped_run_resumes(random_model, tones, tmp_path):
    run(random_model, tones, tmp_path, max_steps=8, freeze_steps=2)
    steps = [int(row["step"]) for row in csv.DictReader((tmp_path / "metrics.csv").open())]
    with pytest.raises(UserError, match=r"last\.ckpt is of a run with other settings: max_steps 8 -> 16; to go on"):
        run(random_model, tones, tmp_path, max_steps=16, freeze_steps=2)
    run(random_model, tones, tmp_path, max_steps=16, freeze_steps=2, on_request=True)
    again = [int(row["step"]) for row in csv.DictReader((tmp_path / "metrics.csv").open())]
    assert again[: len(steps)] == steps and max(again) > max(steps) and len(set(again)) == len(again)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["ckpts", "final.pth", "history.yaml", "metrics.csv", "results.json"]
    start, change = yaml.safe_load((tmp_path / "history.yaml").read_text())
    assert start["settings"]["max_steps"] == 8
    assert change == {"update": 8, "changed": {"max_steps": [8, 16], "validate_every": [4, 8]}}
    assert [path.name for path in (tmp_path / "ckpts").iterdir()] == ["last.ckpt"]

    other = load_model(random_model)  # neither its weights nor its results may be taken for this one's
    with torch.no_grad():
        other.encoder.transformer.layers[0].attention.k_proj.bias[0] += 1
    save_model(tmp_path / "other.pth", other)
    with pytest.raises(UserError, match=r"weights \w{12} -> \w{12}; weights cannot change in the middle of a run"):
        run(tmp_path / "other.pth", tones, tmp_path, max_steps=16, freeze_steps=2, on_request=True)


@pytest.mark.slow
def test_a_stopped_and_killed_run_ends_as_an_uninterrupted_one(random_model, tones, tmp_path, monkeypatch):
    settings = {"max_steps": 8, "freeze_steps": 2, "seconds_per_batch": 12.0}  # validates and saves after 4
    model = load_model(random_model)
    dropping = wav2vec2_model(**{**model.config, "encoder_dropout": 0.3})
    dropping.load_state_dict(model.state_dict())
    save_model(tmp_path / "dropping.pth", dropping)
    run(tmp_path / "dropping.pth", tones, tmp_path / "whole", **settings)
    step = CTCModule.training_step

    def killed(self, batch, batch_idx):
        if self.global_step == 6:
            raise KeyError("killed")
        return step(self, batch, batch_idx)

    def stopped(self, batch, batch_idx):
        if self.global_step == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch, pytest.raises(Stopped, match="SIGUSR1 at update 3: saved in"):
        patch.setattr(CTCModule, "training_step", stopped)
        run(tmp_path / "dropping.pth", tones, tmp_path / "cut", **settings)
    with monkeypatch.context() as patch, pytest.raises(KeyError, match="killed"):
        patch.setattr(CTCModule, "training_step", killed)
        run(tmp_path / "dropping.pth", tones, tmp_path / "cut", **settings)
    run(tmp_path / "dropping.pth", tones, tmp_path / "cut", **settings)
    whole, cut = (load_model(tmp_path / name / "final.pth").state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert (tmp_path / "whole" / "metrics.csv").read_text() == (tmp_path / "cut" / "metrics.csv").read_text()


def test_greedy_decoding_by_hand():
    ids = [2, 2, 0, 2, 1, 1, 0, 3, 3, 0, 5, 1, 4]
    log_probs = torch.nn.functional.one_hot(torch.tensor([ids]), 6).float().log()
    assert greedy_decoder(VOCABULARY)(log_probs, torch.tensor([13])) == ["AA BD C"]
    assert greedy_decoder(VOCABULARY)(log_probs, torch.tensor([4])) == ["AA"]


def test_a_beam_adds_what_greedy_decoding_cannot():
    pytest.importorskip("flashlight")
    # two frames: blank is best in each, but the alignments A-, -A and AA together outweigh it
    probs = torch.tensor([[[0.5, 0.01, 0.46, 0.01, 0.01, 0.01]] * 2])
    frames = torch.tensor([2])
    assert greedy_decoder(VOCABULARY)(probs.log(), frames) == [""]
    assert beam_decoder(VOCABULARY, 10)(probs.log(), frames) == ["A"]


def test_rows_that_cannot_be_used_are_left_out_of_a_run(random_model, tones, tmp_path, caplog):
    train = read_transcripts(tones[0])
    assert len(train) == 160 and make_vocabulary(train) == VOCABULARY
    assert train[0].num_frames == soundfile.info(train[0].path).frames
    impossible = f"{train[0].path}\t{'ABCD' * 100}"
    lines = [f"{u.path}\t  {u.text.lower().replace(' ', '   ')} " for u in train[:8]]
    lists = tmp_path / "train.tsv", tmp_path / "valid.tsv"
    lists[0].write_text("\n".join([*lines, "gone.wav\tA", impossible]))
    lists[1].write_text("\n".join([lines[0], impossible]))
    run(random_model, lists, tmp_path / "exp", max_steps=2, freeze_steps=0, seconds_per_batch=100)
    (gone, long) = (tmp_path / "exp" / "left_out.tsv").read_text().splitlines()
    assert gone == f"{tmp_path}/gone.wav\t{lists[0]} line 9\tmissing audio: No such file or directory"
    assert long.startswith(f"{train[0].path}\t{lists[0]} line 10\tlonger than its audio allows: ")
    assert long.endswith(" frames for 400 characters")
    assert "train.tsv: 2 of 10 left out" in caplog.text
    assert "valid.tsv: 1 of 2 transcripts have more characters than frames and count as errors" in caplog.text
    rows = list(csv.DictReader((tmp_path / "exp" / "metrics.csv").open()))
    assert all(0 < float(row["train/loss"]) < math.inf for row in rows if row["train/loss"])
    content = load_checkpoint(tmp_path / "exp" / "final.pth").extra["run"]["history"][0]["settings"]
    assert content["case"] == "upper" and "audio" not in content
    assert content["train list"].startswith("8 utterances") and content["valid list"].startswith("2 utterances")
    lists[0].write_text(impossible)
    with pytest.raises(UserError, match=r"train\.tsv: none of its 1 utterances can be used: 1 longer than its audio"):
        run(random_model, lists, tmp_path / "other", max_steps=2, freeze_steps=0)


def lists_of(tones: tuple[Path, Path], folder: Path, damaged: int) -> tuple[Path, Path]:
    """Lists of 4 utterances each, of which the first ``damaged`` are cut short behind their headers."""
    lists = folder / "train.tsv", folder / "valid.tsv"
    for source, listing in zip(tones, lists):
        lines = []
        for number, (path, _, text, *_) in enumerate(read_transcripts(source)[:4]):
            copy = folder / f"{listing.stem}{number}.flac"
            copy.write_bytes(path.read_bytes()[: path.stat().st_size // (2 if number < damaged else 1)])
            lines.append(f"{copy.name}\t{text}")
        listing.write_text("\n".join(lines))
    return lists


def test_damaged_audio_is_left_out_of_its_batch(random_model, tones, tmp_path, monkeypatch, caplog):
    """Where it makes a batch alone, in training, validation and the last measurement; and resuming is exact."""
    lists = lists_of(tones, tmp_path, 1)
    settings = {"max_steps": 8, "freeze_steps": 1, "seconds_per_batch": 0.1}  # saves after 4, all utterances once
    assert run(random_model, lists, tmp_path / "whole", **settings)["cer"] > 0
    left_out = [line.split("\t") for line in (tmp_path / "whole" / "left_out.tsv").read_text().splitlines()]
    for kind, (path, place, reason) in zip(("train", "valid"), left_out, strict=True):
        assert (path, place) == (f"{tmp_path}/{kind}0.flac", f"{tmp_path}/{kind}.tsv line 1")
        assert reason.startswith("damaged audio: ")
        assert caplog.text.count(f"{kind}.tsv: 1 left out, see {tmp_path}/whole/left_out.tsv: 1 damaged audio") == 1
    step = CTCModule.training_step

    def killed(self, batch, batch_idx):
        if self.global_step == 6:
            raise KeyError("killed")
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch, pytest.raises(KeyError, match="killed"):
        patch.setattr(CTCModule, "training_step", killed)
        run(random_model, lists, tmp_path / "cut", **settings)
    run(random_model, lists, tmp_path / "cut", **settings)
    whole, cut = (load_model(tmp_path / name / "final.pth").state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_too_much_damaged_audio_ends_a_run(random_model, tones, tmp_path):
    lists = lists_of(tones, tmp_path, 0)
    settings = {"max_steps": 4, "freeze_steps": 1}
    run(random_model, lists, tmp_path / "exp", **settings)
    lists = lists_of(tones, tmp_path, 2)
    with pytest.raises(UserError, match=r"valid\.tsv: 2 of 4 utterances cannot be decoded"):
        run(random_model, lists, tmp_path / "exp", **settings)  # which only measures
    with pytest.raises(UserError, match=r"train\.tsv: 2 of 4 utterances cannot be decoded so far, .* prepare_data\.py"):
        run(random_model, lists, tmp_path / "other", **settings)
    batch = SpeechDataset(read_transcripts(lists[0]), VOCABULARY)[[1, 2, 0, 3]]
    assert len(batch.waveforms) == len(batch.texts) == 2 and len(batch.left_out) == 2


def test_nothing_hides_what_cannot_be_learnt(random_model, tones):
    utterance = read_transcripts(tones[1])[0]._replace(text="ABCD" * 100)
    module = CTCModule(load_model(random_model), VOCABULARY, FinetuneConfig(), Standing(Path("x"), Record([])))
    module.log = lambda *args, **kwargs: None
    assert module.training_step(SpeechDataset([utterance], VOCABULARY)[[0]], 0) == math.inf


@pytest.mark.parametrize("merged", [None, 2, 3])
def test_the_output_layer_writes_once_in_merged_frames(tiny_config, merged):
    model = wav2vec2_model(**{**tiny_config, "encoder_time_reduction": merged, "aux_num_out": 5}).eval()
    lengths = torch.arange(400, 6000, 160)
    with torch.no_grad():
        logits, frames = model(torch.randn(len(lengths), int(lengths.max())), lengths)
    distinct = [len(row[:count].unique_consecutive(dim=0)) for row, count in zip(logits, frames)]
    assert head_frames(model, lengths).tolist() == distinct


def test_a_segment_is_read_from_its_start(tones):
    path = read_transcripts(tones[1])[0].path
    batch = SpeechDataset([Utterance(path, 4000, "A", 1000)], VOCABULARY)[[0]]
    assert np.array_equal(batch.waveforms[0].numpy(), soundfile.read(path, dtype="float32")[0][1000:5000])


def test_batches_lose_nothing_hold_the_budget_and_change():
    utterances = [Utterance(Path("x"), n, "A") for n in torch.randint(8_000, 240_000, (97,)).tolist()]
    batches = LengthBatches(utterances, 40.0, 0)
    first, second = batches.epoch(0), batches.epoch(1)
    for epoch in (first, second):
        assert sorted(i for batch in epoch for i in batch) == list(range(97))
        assert all(len(b) * max(utterances[i].num_frames for i in b) <= 40 * 16_000 for b in epoch)
        assert len(epoch) < 40
    assert sorted(map(sorted, first)) != sorted(map(sorted, second))
    both = [*first, *second]
    for start in (0, 3, len(first), len(first) + 2):  # a resumed run goes on where the other was
        stream = iter(LengthBatches(utterances, 40.0, 0, start))
        assert list(itertools.islice(stream, len(both) - start)) == both[start:]
    fixed = LengthBatches(utterances, 40.0, None)
    assert list(fixed) == list(fixed)
    alone = LengthBatches([Utterance(Path("x"), 10**6, "A")] * 2, 10.0, 0)
    assert [len(batch) for batch in alone.epoch(0)] == [1, 1]


def test_mistakes_in_settings():
    with pytest.raises(UserError, match="--freeze_steps 5: it must be at least 0 and less than --max_steps 5"):
        FinetuneConfig(max_steps=5, freeze_steps=5)


def test_mistakes_on_the_command_line(random_model, tones, script_error, tmp_path):
    words = [random_model, "--train", tones[0], "--valid", tones[1], "--exp_dir", tmp_path / "exp"]
    assert "--validate_every must be at least 1" in script_error("finetune_ctc.py", *words, "--validate_every", 0)
    assert f"--audio {tmp_path / 'no'} is not a folder" in script_error(
        "finetune_ctc.py", *words, "--audio", tmp_path / "no"
    )
    assert "no such file" in script_error("finetune_ctc.py", tmp_path / "no.pth", *words[1:], "--accelerator", "cpu")
    assert not (tmp_path / "exp").exists()
