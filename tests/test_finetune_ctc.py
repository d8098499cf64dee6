"""Fine-tuning: a language of tones is learnt to few errors; freezing, resuming, transcripts, decoding, mistakes."""

from __future__ import annotations

import csv
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

import export
import lightning
from distillation.data.batching import Crop, MicroBatch
from distillation.data.loaders import AudioDataset
from distillation.errors import UserError
from distillation.recognition.decoding import beam_decoder, greedy_decoder
from distillation.recognition.labels import Speller, make_vocabulary
from distillation.recognition.transcripts import Transcripts, Utterance, read_sets
from distillation.stopping import Stopped
from exporting import verify
from exporting.source import ExportOptions
from finetune_ctc import Flags, finetune, split
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


def run(model: Path, tones: tuple[Path, Path], exp_dir: Path, *others: object, **changes) -> dict[str, float]:
    settings = {
        "max_steps": 140, "freeze_steps": 20, "lr": 5e-3, "head_lr": 5e-3, "seconds_per_batch": 24.0,
        "train_extractor": True, "accelerator": "cpu", "workers": 0, **changes,
    }  # fmt: skip
    settings.setdefault("validate_every", settings["max_steps"] // 2)
    return finetune(Flags(*tones, exp_dir, **settings), model, [str(word) for word in others])


def utterances_of(source: Path) -> list[Utterance]:
    return read_sets([source])[0].utterances


def learnt(exp_dir: Path) -> list[dict[str, str]]:
    """Rows of metrics without the times."""
    rows = csv.DictReader((exp_dir / "metrics.csv").open())
    return [{name: value for name, value in row.items() if not name.startswith("speed/")} for row in rows]


def settings_of(exp_dir: Path) -> dict:
    return load_checkpoint(exp_dir / "final.pth").extra["run"]["history"][0]["settings"]


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
    utterance = utterances_of(tones[1])[0]
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
    state = torch.load(tmp_path / "a" / "ckpts" / "last.ckpt", weights_only=True)["optimizer_states"][0]
    groups = {group["name"]: group["params"] for group in state["param_groups"]}
    steps = {name: {int(state["state"][i]["step"]) for i in params} for name, params in groups.items()}
    assert steps == {"weights": {1}, "biases_norms": {1}, "new": {4}}, "nothing has moments of what it did not learn in"


def test_a_recogniser_keeps_its_output_layer(random_model, tones, tmp_path, caplog):
    run(random_model, tones, tmp_path / "a", max_steps=2, freeze_steps=1)
    recogniser = tmp_path / "a" / "final.pth"
    before = load_model(recogniser)
    run(recogniser, tones, tmp_path / "b", max_steps=2, freeze_steps=1, lr=1e-9, head_lr=1e-9)
    after = load_model(tmp_path / "b" / "final.pth")
    assert torch.allclose(before.aux.weight, after.aux.weight, atol=1e-6) and after.vocabulary == VOCABULARY
    run(recogniser, tones, tmp_path / "c", "--objective.ctc.vocabulary", "transcripts", max_steps=2, freeze_steps=1)
    assert not torch.allclose(before.aux.weight, load_model(tmp_path / "c" / "final.pth").aux.weight, atol=1e-2)
    other = tmp_path / "other.tsv"
    other.write_text("".join(f"{u.path}\tÄÖÜ\n" for u in utterances_of(tones[0])[:4]))
    with pytest.raises(UserError, match=r"other\.tsv: the output layer has none of its characters, which are Ä Ö Ü"):
        run(recogniser, (other, other), tmp_path / "d", max_steps=2, freeze_steps=1)
    lines = "".join(f"{u.path}\t{u.text}Ä\n" for u in utterances_of(tones[0])[:4])
    other.write_text(lines)
    run(recogniser, (other, other), tmp_path / "e", max_steps=2, freeze_steps=1)
    assert "other.tsv: the output layer has no Ä, which count as errors" in caplog.text


@pytest.mark.slow
def test_a_stopped_run_resumes(random_model, tones, tmp_path):
    run(random_model, tones, tmp_path, max_steps=8, freeze_steps=2)
    steps = [int(row["step"]) for row in csv.DictReader((tmp_path / "metrics.csv").open())]
    with pytest.raises(UserError, match=r"of a run with other settings: optim\.max_steps 8 -> 16; to go on"):
        run(random_model, tones, tmp_path, max_steps=16, freeze_steps=2)
    run(random_model, tones, tmp_path, "--continue_with_changes", max_steps=16, freeze_steps=2)
    again = [int(row["step"]) for row in csv.DictReader((tmp_path / "metrics.csv").open())]
    assert again[: len(steps)] == steps and max(again) > max(steps) and len(set(again)) == len(again)
    left = {path.name for path in tmp_path.iterdir() if not path.name.startswith("events")}
    assert left == {"ckpts", "config.yaml", "final.pth", "history.yaml", "hparams.yaml", "metrics.csv", "results.json"}
    start, change = yaml.safe_load((tmp_path / "history.yaml").read_text())
    assert start["settings"]["optim.max_steps"] == 8
    assert change["update"] == 8 and change["changed"]["optim.max_steps"] == [8, 16]
    assert [path.name for path in (tmp_path / "ckpts").iterdir()] == ["last.ckpt"]

    other = load_model(random_model)  # neither its weights nor its results may be taken for this one's
    with torch.no_grad():
        other.encoder.transformer.layers[0].attention.k_proj.bias[0] += 1
    save_model(tmp_path / "other.pth", other)
    with pytest.raises(UserError, match=r"teacher \w{12} -> \w{12}; .*teacher cannot change in the middle of a run"):
        run(tmp_path / "other.pth", tones, tmp_path, "--continue_with_changes", max_steps=16, freeze_steps=2)


@pytest.mark.slow
def test_a_stopped_and_killed_run_ends_as_an_uninterrupted_one(random_model, tones, tmp_path, monkeypatch):
    settings = {"max_steps": 8, "freeze_steps": 2, "seconds_per_batch": 12.0}  # validates and saves after 4
    model = load_model(random_model)
    dropping = wav2vec2_model(**{**model.config, "encoder_dropout": 0.3})
    dropping.load_state_dict(model.state_dict())
    save_model(tmp_path / "dropping.pth", dropping)
    run(tmp_path / "dropping.pth", tones, tmp_path / "whole", **settings)
    step = lightning.DistillModule.training_step

    def killed(self, batch, batch_idx):
        if self.global_step == 6:
            raise KeyError("killed")
        return step(self, batch, batch_idx)

    def stopped(self, batch, batch_idx):
        if self.global_step == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch, pytest.raises(Stopped, match="SIGUSR1 at update 3: saved in"):
        patch.setattr(lightning.DistillModule, "training_step", stopped)
        run(tmp_path / "dropping.pth", tones, tmp_path / "cut", **settings)
    with monkeypatch.context() as patch, pytest.raises(KeyError, match="killed"):
        patch.setattr(lightning.DistillModule, "training_step", killed)
        run(tmp_path / "dropping.pth", tones, tmp_path / "cut", **settings)
    run(tmp_path / "dropping.pth", tones, tmp_path / "cut", **settings)
    whole, cut = (load_model(tmp_path / name / "final.pth").state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert learnt(tmp_path / "whole") == learnt(tmp_path / "cut")


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
    train = utterances_of(tones[0])
    assert len(train) == 160 and make_vocabulary(u.text for u in train) == VOCABULARY
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
    content = settings_of(tmp_path / "exp")
    assert content["data.transcripts.case"] == "auto" and "data.transcripts.audio" not in content
    assert content["train list"].startswith("8 utterances") and content["valid list"].startswith("2 utterances")
    lists[0].write_text(impossible)
    with pytest.raises(UserError, match=r"train\.tsv: none of its 1 utterances can be used: 1 longer than its audio"):
        run(random_model, lists, tmp_path / "other", max_steps=2, freeze_steps=0)


def lists_of(tones: tuple[Path, Path], folder: Path, damaged: int) -> tuple[Path, Path]:
    """Lists of 4 utterances each, of which the first ``damaged`` are cut short behind their headers."""
    lists = folder / "train.tsv", folder / "valid.tsv"
    for source, listing in zip(tones, lists):
        lines = []
        for number, (path, _, text, *_) in enumerate(utterances_of(source)[:4]):
            copy = folder / f"{listing.stem}{number}.flac"
            copy.write_bytes(path.read_bytes()[: path.stat().st_size // (2 if number < damaged else 1)])
            lines.append(f"{copy.name}\t{text}")
        listing.write_text("\n".join(lines))
    return lists


def test_damaged_audio_is_left_out_of_its_batch(random_model, tones, tmp_path, monkeypatch, caplog):
    """Where it makes a batch alone, in training, validation and the last measurement; and resuming is exact."""
    lists = lists_of(tones, tmp_path, 1)
    settings = {"max_steps": 8, "freeze_steps": 1}  # saves after 4, all utterances once
    alone = "--data.utterances_per_batch", 1, "--data.max_bad_share", 0.3
    assert run(random_model, lists, tmp_path / "whole", *alone, **settings)["cer"] > 0
    bad = (tmp_path / "whole" / "bad_files.tsv").read_text().splitlines()
    assert sorted(line.split("\t")[0] for line in bad) == [f"{tmp_path}/train0.flac", f"{tmp_path}/valid0.flac"]
    assert caplog.text.count(f"left out of the training data from now on: {tmp_path}/train0.flac") == 1
    step = lightning.DistillModule.training_step

    def killed(self, batch, batch_idx):
        if self.global_step == 6:
            raise KeyError("killed")
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch, pytest.raises(KeyError, match="killed"):
        patch.setattr(lightning.DistillModule, "training_step", killed)
        run(random_model, lists, tmp_path / "cut", *alone, **settings)
    run(random_model, lists, tmp_path / "cut", *alone, **settings)
    whole, cut = (load_model(tmp_path / name / "final.pth").state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_too_much_damaged_audio_ends_a_run(random_model, tones, tmp_path):
    lists = lists_of(tones, tmp_path, 2)
    with pytest.raises(UserError, match=r"2 of 4 (training|validation) files cannot be used, .* prepare_data\.py"):
        run(random_model, lists, tmp_path / "exp", max_steps=4, freeze_steps=1)


def test_rows_that_cannot_be_read_take_their_text_with_them(tones, tmp_path):
    lists = lists_of(tones, tmp_path, 2)
    found = utterances_of(lists[0])
    dataset = AudioDataset(Transcripts(lists[0], found).manifest, 16_000, Speller(VOCABULARY))
    batch = dataset[MicroBatch(0, [Crop(i, 0, found[i].num_frames) for i in (1, 2, 0, 3)])]
    assert batch.labels.texts == [found[2].text, found[3].text] and len(batch.errors) == 2
    spelled = "".join(VOCABULARY[i] for i in batch.labels.symbols).replace("|", " ")
    assert spelled == found[2].text + found[3].text and batch.labels.counts.tolist() == [
        len(u.text) for u in found[2:4]
    ]


@pytest.mark.parametrize("merged", [None, 2, 3])
def test_the_output_layer_writes_once_in_merged_frames(tiny_config, merged):
    model = wav2vec2_model(**{**tiny_config, "encoder_time_reduction": merged, "aux_num_out": 5}).eval()
    lengths = torch.arange(400, 6000, 160)
    with torch.no_grad():
        logits, frames = model(torch.randn(len(lengths), int(lengths.max())), lengths)
    distinct = [len(row[:count].unique_consecutive(dim=0)) for row, count in zip(logits, frames)]
    assert model.symbol_frames(lengths).tolist() == distinct


def test_a_segment_is_read_from_its_start(tones):
    path = utterances_of(tones[1])[0].path
    manifest = Transcripts(tones[1], [Utterance(path, 4000, "A", 1000)]).manifest
    batch = AudioDataset(manifest, 16_000, Speller(VOCABULARY))[MicroBatch(0, [Crop(0, 0, 4000)])]
    assert np.array_equal(batch.waveforms[0].numpy(), soundfile.read(path, dtype="float32")[0][1000:5000])


def test_flags_of_recipes_go_on():
    words = "--trainer.devices 2 m.pth --train t --optim.eps 1e-6 --lr 1 --data.crop=false --seed 3".split()  # noqa: SIM905
    own, others = split(words)
    assert own == ["m.pth", "--train", "t", "--lr", "1", "--seed", "3"]
    assert others == ["--trainer.devices", "2", "--optim.eps", "1e-6", "--data.crop=false"]


def test_mistakes_in_settings():
    with pytest.raises(UserError, match="--freeze_steps 5: it must be at least 0 and less than --max_steps 5"):
        Flags(Path("a"), Path("b"), Path("c"), max_steps=5, freeze_steps=5)


def test_mistakes_on_the_command_line(random_model, tones, script_error, tmp_path):
    words = [random_model, "--train", tones[0], "--valid", tones[1], "--exp_dir", tmp_path / "exp"]
    assert "validate_every is 0: it must be at least 1" in script_error(
        "finetune_ctc.py", *words, "--validate_every", 0
    )
    assert f"--audio {tmp_path / 'no'} is not a folder" in script_error(
        "finetune_ctc.py", *words, "--audio", tmp_path / "no"
    )
    assert "no such file" in script_error("finetune_ctc.py", tmp_path / "no.pth", *words[1:], "--accelerator", "cpu")
    assert not (tmp_path / "exp").exists()
