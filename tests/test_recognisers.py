"""Recognisers through the stages, as processes: CTC and noise in the loop, resumed, spread; a hub model to a WER."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import HubertConfig, HubertForCTC

import export
from distillation.config import parse_recipe
from distillation.data.manifest import Manifest
from distillation.errors import UserError
from distillation.lists import case_of, prepared_to_write, read_lists, wanted_vocabulary
from distillation.recognition.decoding import greedy_decoder
from distillation.recognition.manifests import find_sources
from distillation.recognition.preparation import write_transcripts
from distillation.students import CopiedLayers, StudentConfig, build_student
from evaluation import recognition
from evaluation.recognition import Measuring, measure, table
from exporting import verify
from exporting.source import ExportOptions
from tests.helpers import (
    HF_BASE,
    ROOT,
    assert_same_run,
    metrics,
    run_error,
    run_exported_here,
    run_here,
    run_shell,
    tiny_hf,
    weights,
    write_noise,
)
from wav2vec2 import CheckpointError, load_model, save_model
from wav2vec2.checkpoint import load_checkpoint, with_output_layer

VOCABULARY = ["<pad>", "|", "A", "B", "C"]
TEXTS = ["ab c", "A", "CAB BA", "b b", "ccab", "A C"]


@pytest.fixture(scope="module")
def spoken(tmp_path_factory) -> Path:
    """LibriSpeech-shaped with transcripts: 14 training and 4 validation utterances."""
    root = tmp_path_factory.mktemp("spoken")
    for split, count in (("train-clean-100", 14), ("dev-clean", 4)):
        for i in range(count):
            write_noise(root / split / f"{i % 3}" / "1" / f"{i % 3}-1-{i}.flac", 1 + (i * 7 % 10) / 10, i)
        for speaker in range(3):
            lines = [f"{speaker}-1-{i} {TEXTS[i % len(TEXTS)]}\n" for i in range(speaker, count, 3)]
            (root / split / f"{speaker}" / "1" / f"{speaker}-1.trans.txt").write_text("".join(lines))
    return root


@pytest.fixture(scope="module")
def lists(spoken, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("lists")
    run_here("prepare_data.py", "--data", spoken, "--out", out, "--transcripts", spoken)
    return out


@pytest.fixture(scope="module")
def recogniser(teacher_path, tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("recogniser") / "teacher.pth"
    save_model(path, with_output_layer(load_model(teacher_path), VOCABULARY))
    return path


@pytest.fixture(scope="module")
def flags(tiny_flags, recogniser, lists) -> list[object]:
    """Features, CTC, the teacher's logits, noise: everything at once."""
    return [
        *tiny_flags, "--teacher_ckpt", recogniser, "--data.tsv_dir", lists, "--data.crop", "false",
        "--data.transcripts", "{}", "--objective.ctc.weight", 0.5, "--objective.ctc.distill", 0.5,
        "--data.noise.share", 0.7, "--data.noise.babble", 0.5,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def reference(server, flags, tmp_path_factory) -> Path:
    """Both steps, never interrupted."""
    exp = tmp_path_factory.mktemp("reference") / "run"
    server.run("distill.py", *flags, "--exp_dir", exp)
    server.run("prune.py", "--distilled_ckpt", exp / "ckpts/last.ckpt")
    server.run("final_distill.py", *flags, "--student_ckpt", exp / "pruned.pth", "--exp_dir", exp / "final")
    return exp


def test_the_chain_ends_in_a_recogniser(reference, recogniser, lists):
    for folder in (reference, reference / "final"):
        row = metrics(folder)[-1]
        assert {"train/ctc/ctc", "train/ctc/logits", "train/ctc/impossible", "valid/wer", "valid/cer"} <= row.keys()
        assert float(row["valid/cer"]) > 0 and float(row["train/ctc/impossible"]) == 0
    before, pruned, final = (load_model(path) for path in (
        recogniser, reference / "pruned.pth", reference / "final" / "final.pth"))  # fmt: skip
    assert pruned.vocabulary == final.vocabulary == VOCABULARY
    assert not torch.equal(before.aux.weight, pruned.aux.weight), "step 1 trains the output layer"
    assert not torch.equal(pruned.aux.weight, final.aux.weight), "and so does step 2"
    found = measure(final, Measuring(lists / "valid.jsonl", snr=[10.0]), "final.pth")
    assert found["clean"]["wer"] == pytest.approx(float(metrics(reference / "final")[-1]["valid/wer"]), abs=1e-3)
    assert found.keys() == {"clean", "10 dB"} and found["clean"].keys() == {"wer", "cer"}
    assert "| final | 7 | " in table([("final", 7, found)]) and "WER, 10 dB" in table([("final", 7, found)])
    settings = load_checkpoint(reference / "final" / "final.pth").extra["run"]["history"][0]["settings"]
    assert settings["vocabulary"] == " ".join(VOCABULARY) and settings["noise"].startswith("made; ")


def test_two_processes_equal_accumulation(reference, server, flags, tmp_path):
    server.run("distill.py", *flags, "--exp_dir", tmp_path / "ddp", "--trainer.devices", 2)
    for ours, theirs in zip(metrics(tmp_path / "ddp"), metrics(reference), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert value == theirs[name] or float(value) == pytest.approx(float(theirs[name]), rel=1e-4), name
    left, right = weights(tmp_path / "ddp/ckpts/last.ckpt"), weights(reference / "ckpts/last.ckpt")
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-5, atol=1e-6)


def test_workers_change_nothing(reference, server, flags, tmp_path):
    server.run("distill.py", *flags, "--exp_dir", tmp_path / "workers", "--data.num_workers", 2)
    assert_same_run(reference, tmp_path / "workers")


def test_killed_runs_resume_exactly(reference, server, flags, tmp_path):
    words = ["distill.py", *flags, "--exp_dir", tmp_path / "killed", "--trainer.checkpoint_every", 1]
    process = server.start(*words)
    process.until(lambda: (tmp_path / "killed" / "ckpts" / "last.ckpt").is_file())
    process.kill(signal.SIGKILL)
    process.wait()
    server.run(*words)
    assert_same_run(reference, tmp_path / "killed")


def test_noise_is_part_of_what_a_run_is(reference, flags, tmp_path):
    other = [*flags, "--exp_dir", reference, "--data.noise.snr", "[5,10]"]
    assert "data.noise.snr [0.0, 20.0] -> [5.0, 10.0]; data.noise.snr cannot" in run_error("distill.py", *other)
    none = [*flags, "--exp_dir", reference, "--data.noise", "null"]
    assert "data.noise (set) -> null" in run_error("distill.py", *none)


def test_mistakes_in_one_line(flags, lists, spoken, teacher_path, tmp_path):
    def error(*more: object) -> str:
        return run_error("distill.py", *flags, "--exp_dir", tmp_path / "exp", *more)

    assert "set data.crop false and leave data.long at drop (they are true and drop)" in error("--data.crop", "true")
    assert "objective.ctc needs to know what is said: set data.transcripts" in error("--data.transcripts", "null")
    assert "has no output layer, which objective.ctc takes over" in error("--teacher_ckpt", teacher_path)
    missing = error("--data.train", "train960.tsv")
    assert "train960.jsonl: no such file; prepare_data.py --transcripts writes it" in missing
    assert "data.noise.folders" in error("--data.noise.folders", f"[{tmp_path / 'none'}]")
    with pytest.raises(UserError, match=r"objective\.ctc\.vocabulary is model, and the model has no output layer"):
        recipe = parse_recipe([*map(str, flags), "--objective.ctc.vocabulary", "model"])[0]
        wanted_vocabulary(recipe, *[load_model(teacher_path)] * 2)
    assert not (tmp_path / "exp").exists()


def test_the_case_of_transcripts_follows_the_output_layer(flags, recogniser, tmp_path):
    assert case_of(None) == case_of(VOCABULARY) == "upper"
    assert case_of(["<pad>", "<unk>", "|", "a"]) == "lower" and case_of(["<pad>", "|", "a", "B"]) == "keep"
    assert case_of(["<pad>", "|", "A", "ß", "ΐ", "ა"]) == "upper", "some letters have no capital of their own"
    assert case_of(["<pad>", "|", "a", "ß"]) == "lower"
    recipe = parse_recipe([str(word) for word in flags])[0]
    model = load_model(recogniser)
    for symbols, text in ((VOCABULARY, "AB C"), (["<pad>", "|", "a", "b", "c"], "ab c")):
        found = read_lists(recipe, model, symbols)
        assert found.train.texts[0] == text and found.vocabulary == symbols
        assert found.speller(["x", text]).counts.tolist() == [0, 4]


def test_whose_symbols_the_output_layer_has(flags, recogniser, teacher_path):
    """A student without an output layer, such as a thin one, gets one over its teacher's symbols."""
    plain, teacher = load_model(teacher_path), load_model(recogniser)
    words = [str(word) for word in flags]
    auto = parse_recipe(words)[0]
    assert wanted_vocabulary(auto, plain, teacher) == VOCABULARY and wanted_vocabulary(auto, plain, plain) is None
    assert prepared_to_write(auto, teacher, VOCABULARY) is teacher
    made = prepared_to_write(auto, plain, VOCABULARY)
    assert made.vocabulary == VOCABULARY and made.aux.out_features == 5 and plain.aux is None
    new = parse_recipe([*words, "--objective.ctc.vocabulary", "transcripts"])[0]
    assert wanted_vocabulary(new, teacher, teacher) is None
    assert prepared_to_write(new, teacher, ["<pad>", "|", "X"]).aux.out_features == 3


def test_json_lines_say_what_is_said_in_the_lists(lists, spoken, tmp_path, caplog):
    rows = [json.loads(line) for line in (lists / "train100.jsonl").read_text().splitlines()]
    listed = (lists / "train100.tsv").read_text().splitlines()[1:]
    assert len(rows) == len(listed) == 14 and {row["text"] for row in rows} <= set(TEXTS)
    for row, line in zip(rows, listed):
        name, frames = line.split("\t")
        assert row["audio_filepath"].endswith(name) and row["duration"] == int(frames) / 16000
    (tmp_path / "audio").mkdir()
    for i, rate in enumerate((44100, 16000, 16000, 16000)):
        write_noise(tmp_path / "audio" / f"{i}" / "x.flac", 1, i, rate)
    (tmp_path / "audio" / "said.tsv").write_text(
        "0/x.flac\tone\n1/x.flac\ttwo\n1/x.flac\ttwo\n2/x.flac\tthree\ngone.flac\tfour\n"
    )
    words = ["--data", tmp_path / "audio", "--out", tmp_path / "out", "--convert", tmp_path / "out" / "audio"]
    run_here("prepare_data.py", *words, "--valid_fraction", 0.5, "--transcripts", tmp_path / "audio")
    found = [json.loads(line) for name in ("train", "valid") for line in (tmp_path / "out" / f"{name}.jsonl").open()]
    assert sorted(row["text"] for row in found) == ["one", "three", "two"], "each once, of converted files too"
    assert all(Path(row["audio_filepath"]).is_relative_to(tmp_path / "out" / "audio") for row in found)
    assert "says nothing about 1 of the" in caplog.text
    (tmp_path / "audio" / "said.tsv").unlink()
    assert f"{tmp_path / 'audio'}: nothing in it says what is spoken; known are" in run_error(
        "prepare_data.py", *words, "--transcripts", tmp_path / "audio"
    )


def test_of_common_voice_nothing_rejected_or_kept_to_test_is_learnt(tmp_path):
    clips = tmp_path / "cv" / "clips"
    rows = {"train": "ab", "dev": "c", "test": "d", "invalidated": "e"}
    for name, said in rows.items():
        for letter in said:
            write_noise(clips / f"{letter}.flac", 1, ord(letter))
        lines = [f"x\t{letter}.flac\tsays {letter}" for letter in said]
        (tmp_path / "cv" / f"{name}.tsv").write_text("\n".join(["client_id\tpath\tsentence", *lines]) + "\n")
    lengths = "".join(f"{letter}.flac\t1000\n" for letter in "abcde")
    (tmp_path / "cv" / "clip_durations.tsv").write_text(f"clip\tduration[ms]\n{lengths}")
    assert [path.name for path in find_sources(tmp_path / "cv")] == ["train.tsv"]
    write_transcripts(tmp_path / "cv", {"all.tsv": Manifest(clips, [f"{x}.flac" for x in "abcde"], np.full(5, 16000))},
                      tmp_path, None, 16000)  # fmt: skip
    said = [json.loads(line)["text"] for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert said == ["says a", "says b"]
    (tmp_path / "cv" / "train.tsv").unlink()
    (tmp_path / "cv" / "validated.tsv").write_text("client_id\tpath\tsentence\nx\tc.flac\tsays c\n")
    assert [path.name for path in find_sources(tmp_path / "cv")] == ["validated.tsv"]


def test_a_folder_of_transformers_keeps_its_symbols(reference, lists, tmp_path, monkeypatch, exported_here):
    monkeypatch.setattr(verify, "BATCHES", [[0.05]])
    final = reference / "final" / "final.pth"
    export.run(final, "hf", tmp_path / "folder", ExportOptions())
    assert load_model(tmp_path / "folder").vocabulary == VOCABULARY
    ours, theirs = (measure(load_model(path), Measuring(lists / "valid.jsonl"), path) for path in
                    (final, tmp_path / "folder"))  # fmt: skip
    assert ours == theirs
    (tmp_path / "folder" / "vocab.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"vocab\.json: no vocabulary of an output layer"):
        load_model(tmp_path / "folder")


def test_few_layers_of_a_recogniser_keep_its_symbols(recogniser):
    teacher = load_model(recogniser)
    student = build_student(StudentConfig(layers=CopiedLayers(layers=[1, 2])), teacher)
    assert student.vocabulary == VOCABULARY and torch.equal(student.aux.weight, teacher.aux.weight)


def test_error_rates_of_what_is_a_recogniser_and_can_be_used(reference, teacher_path, lists, tmp_path, caplog, capsys):
    final = reference / "final" / "final.pth"
    rows = [json.loads(line) for line in (lists / "valid.jsonl").read_text().splitlines()]
    rows += [{"audio_filepath": "gone.flac", "text": "A"}, {"audio_filepath": rows[0]["audio_filepath"], "text": "AÄ"}]
    (tmp_path / "valid.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def run(*words: object) -> str:
        with monkeypatch_argv("recognition", *words):
            recognition.main()
        return capsys.readouterr().out

    found = run(teacher_path, final, "--data", tmp_path / "valid.jsonl", "--device", "cpu", "--seconds_per_batch", 1)
    assert str(final) in found and str(teacher_path) not in found
    for said in ("is no recogniser: left out", "1 left out: 1 missing audio", "the output layer has no Ä"):
        assert said in caplog.text
    for words, message in (
        ([teacher_path, "--data", lists / "valid.jsonl"], "is no recogniser, it has no output layer"),
        ([final, "--data", lists / "valid.jsonl", "--snr", 200], "--snr [200.0]: they must lie in [-100, 100] dB"),
        ([final, "--data", lists / "valid.jsonl", "--device", "toaster"], "--device: device 'toaster': no such device"),
        ([final, "--data", tmp_path / "none.jsonl"], "none.jsonl"),
    ):
        with pytest.raises(SystemExit) as stop:
            run(*words)
        assert stop.value.code == 2 and message in capsys.readouterr().err


@contextlib.contextmanager
def monkeypatch_argv(*words: object):
    log = logging.getLogger("distillation.data.loaders")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", list(map(str, words)))
        try:
            yield
        finally:
            log.setLevel(logging.NOTSET)  # the command wants less of it


def test_segments_of_long_recordings_keep_their_places(tmp_path):
    for name in ("a", "b"):
        write_noise(tmp_path / "data" / name / "long.wav", 6, 0)
    kaldi = tmp_path / "kaldi"
    kaldi.mkdir()
    (kaldi / "wav.scp").write_text("".join(f"{n} {tmp_path}/data/{n}/long.wav\n" for n in "ab"))
    (kaldi / "segments").write_text("".join(f"{n}{i} {n} {i} {i + 1.5}\n" for n in "ab" for i in (0, 3)))
    (kaldi / "text").write_text("".join(f"{n}{i} WORD {n.upper()}\n" for n in "ab" for i in (0, 3)))
    words = ["--data", tmp_path / "data", "--out", tmp_path / "out", "--valid_fraction", 0.5]
    run_here("prepare_data.py", *words, "--transcripts", kaldi)
    rows = [json.loads(line) for name in ("train", "valid") for line in (tmp_path / "out" / f"{name}.jsonl").open()]
    assert [(row.get("offset"), row["duration"]) for row in rows] == [(None, 1.5), (3.0, 1.5)] * 2


@pytest.mark.slow
def test_from_a_model_of_transformers_to_a_compressed_recogniser(server, spoken, tmp_path, monkeypatch, exported_here):
    """The shell recipe: head and vocabulary kept, lists and transcripts made, error rates of both at the end."""
    convs = {"conv_dim": [16] * 7, "conv_kernel": [10, 3, 3, 3, 3, 2, 2], "conv_stride": [5, 2, 2, 2, 2, 2, 2]}
    model = tiny_hf(HubertForCTC, HubertConfig, **HF_BASE, **convs, vocab_size=5, pad_token_id=4)
    folder = tmp_path / "my-recogniser"
    model.save_pretrained(folder)
    symbols = {"a": 0, "b": 1, "c": 2, "|": 3, "[PAD]": 4}
    (folder / "vocab.json").write_text(json.dumps(symbols))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "[PAD]", "word_delimiter_token": "|"}))
    exp = tmp_path / "exp"
    words = [spoken, "--teacher_id", folder, "--teacher_ckpt", tmp_path / "teacher.pth", "--exp_dir", exp]
    words += ["--data.tsv_dir", tmp_path / "lists", "--optim.max_steps", 2, "--final.max_steps", 2]
    words += ["--data.num_workers", 0, "--trainer.accelerator", "cpu", "--data.seconds_per_batch", 8]
    words += ["--data.valid_seconds_per_batch", 8, "--data.max_frames", 64000, "--trainer.precision", "32-true"]
    printed = run_shell("run_recogniser.sh", *words, "--dry_run", python=server.bin)
    assert "2 updates" in printed and not exp.exists() and not (tmp_path / "lists").exists()
    printed = run_shell("run_recogniser.sh", *words, python=server.bin)
    final = exp / "final" / "final.pth"
    assert load_model(final).vocabulary == ["<pad>", "a", "b", "c", "|"]
    assert f"| {tmp_path / 'teacher.pth'} |" in printed and f"| {final} |" in printed and "WER" in printed
    assert f"Done: {final}" in printed
    again = run_shell("run_recogniser.sh", *words, python=server.bin)
    assert "is up to date" in again or "is complete" in again

    from transformers import pipeline

    monkeypatch.setattr(verify, "BATCHES", [[0.05]])
    export.run(final, "hf", tmp_path / "recogniser", ExportOptions())
    recognise = pipeline("automatic-speech-recognition", model=str(tmp_path / "recogniser"), trust_remote_code=True)
    waveform, _ = soundfile.read(next(spoken.rglob("*.flac")), dtype="float32")
    with torch.no_grad():
        logits, frames = load_model(final)(torch.from_numpy(waveform)[None], torch.tensor([len(waveform)]))
    (expected,) = greedy_decoder(["<pad>", "a", "b", "c", "|"])(logits, frames)
    assert " ".join(recognise(waveform)["text"].split()) == expected
    onnx_asr = pytest.importorskip("onnx_asr")
    monkeypatch.setattr("exporting.onnx_asr.run_exported", run_exported_here)
    export.run(final, "onnx-asr", tmp_path / "onnx", ExportOptions())
    monkeypatch.syspath_prepend(tmp_path / "onnx")
    import wav2vec2_ctc  # noqa: F401

    assert onnx_asr.load_model("wav2vec2-ctc", tmp_path / "onnx").recognize(waveform).strip() == expected


def test_the_recipe_says_how_it_is_run():
    assert "AUDIO_WITH_TRANSCRIPTS" in run_shell("run_recogniser.sh", "--help")
    text = (ROOT / "conf" / "dpctc_base.yaml").read_text()
    assert "run_recogniser.sh" in text
