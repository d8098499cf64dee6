"""Audio that cannot be used, updates that are not finite, data that vanishes."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from tests.helpers import assert_same_run, copy_lists, metrics, weights
from wav2vec2 import save_model, wav2vec2_model


@pytest.fixture
def bad_data(corpus, tsv_dir, noise, tmp_path) -> tuple[Path, dict[str, str]]:
    """Lists of a copy of the corpus in which some files are bad, and what is wrong with each training file."""
    root = tmp_path / "corpus"
    shutil.copytree(corpus, root)
    copy_lists(tsv_dir, root, tmp_path)
    files = sorted((root / "train-clean-100").rglob("*.flac"))
    reasons = {}

    def replace(reason: str, data: np.ndarray | bytes | None, rate: int = 16000) -> Path:
        path = files.pop()
        path.unlink()
        if isinstance(data, bytes):
            path.write_bytes(data)
        elif data is not None:
            subtype = "FLOAT" if data.dtype == np.float32 else None
            with path.open("wb") as file:
                soundfile.write(file, data, rate, subtype=subtype, format="WAV" if subtype else "FLAC")
        reasons[str(path)] = reason
        return path

    sound = soundfile.read(files[-1])[0]
    sound = np.tile(sound, 3)[: 2 * 16000]  # as long as the longest in the list
    replace("No such file", None)
    replace("", b"not audio at all")
    replace("decod", files[-1].read_bytes()[:9000])
    replace("sample rate 8000 Hz, wanted 16000", sound, 8000)
    replace("2 channels, wanted 1", np.stack([sound, sound], axis=1))
    replace("NaN or infinite", np.where(np.arange(len(sound)) % 500 == 7, np.nan, sound).astype(np.float32))
    replace("silent", 0 * sound)
    replace("clipped", np.clip(20 * sound, -1, 1))
    next((root / "dev-clean").rglob("*.flac")).write_bytes(b"x")
    return tmp_path, reasons


def test_bad_files_are_left_out_counted_and_named(server, bad_data, tiny_flags, tmp_path):
    """And a resumed run counts on."""
    lists, reasons = bad_data
    flags = [*tiny_flags, "--data.tsv_dir", lists, "--data.max_bad_share", 0.5]
    exp = tmp_path / "run"
    out = server.run("distill.py", *flags, "--exp_dir", exp).output
    unusable = {path: reason for path, reason in reasons.items() if reason not in ("silent", "clipped")}
    for path, reason in unusable.items():
        (line,) = [line for line in out.splitlines() if path in line]
        assert f"left out of the training data from now on: {path}" in line and reason in line
    assert "left out of the validation data" in out and "silent audio, e.g." in out and "clipped audio, e.g." in out
    assert len((exp / "bad_files.tsv").read_text().splitlines()) == len(unusable) + 1
    row = metrics(exp)[-1]
    assert row["skipped/files"] == str(len(unusable) + 1) and row["skipped/updates"] == "0"
    assert int(row["audio/silent"]) > 1 and int(row["audio/clipped"]) > 1
    again = tmp_path / "again"
    server.run("distill.py", *flags, "--exp_dir", again, fault=["kill", "update", 8], code=-9)
    server.run("distill.py", *flags, "--exp_dir", again)
    assert_same_run(exp, again)


def test_too_many_bad_files(server, bad_data, tiny_flags, tmp_path):
    lists, reasons = bad_data
    exp = tmp_path / "run"
    flags = [*tiny_flags, "--data.tsv_dir", lists, "--exp_dir", exp, "--data.max_bad_share", 0.2]
    message = server.run("distill.py", *flags, code=2).error
    assert "of 14 training files cannot be used, more than --data.max_bad_share 0.2" in message
    assert sum(path in message for path in reasons) == 3 and str(exp / "bad_files.tsv") in message


def assert_close(a: list[dict[str, str]], b: list[dict[str, str]]) -> None:
    """Two processes add up their gradients in another order than one."""
    for left, right in zip(a, b, strict=True):
        assert left.keys() == right.keys()
        for name in left:
            assert (left[name] == right[name] == "") or float(left[name]) == pytest.approx(float(right[name]), rel=1e-4)


@pytest.fixture
def explosive_data(tsv_dir, corpus, tmp_path) -> tuple[Path, Path]:
    """Lists of a copy of the corpus with one file of finite samples that no network survives; and that file."""
    root = tmp_path / "corpus"
    shutil.copytree(corpus, root)
    path = sorted((root / "train-clean-100").rglob("*.flac"))[4]
    num_samples = soundfile.info(path).frames
    samples = np.random.default_rng(0).choice(np.array([-3e38, 3e38], dtype=np.float32), num_samples)
    with path.open("wb") as file:
        soundfile.write(file, samples, 16000, subtype="FLOAT", format="WAV")
    copy_lists(tsv_dir, root, tmp_path)
    return tmp_path, path


def test_update_that_is_not_finite_has_no_effect(server, explosive_data, tiny_config, tiny_flags, tmp_path):
    """On all ranks; the run goes on with its metrics, and stops when there are too many."""
    lists, path = explosive_data
    teacher = tmp_path / "teacher.pth"  # with layer norms: a group norm takes even this audio
    save_model(teacher, wav2vec2_model(**{**tiny_config, "extractor_mode": "layer_norm"}))
    flags = [*tiny_flags, "--data.tsv_dir", lists, "--teacher_ckpt", teacher]
    one, two = tmp_path / "one", tmp_path / "two"
    parallel = server.start("distill.py", *flags, "--exp_dir", two, "--trainer.devices", 2)
    out = server.run("distill.py", *flags, "--exp_dir", one).output
    named = [line for line in out.splitlines() if "has no effect, its loss is not finite" in line]
    skipped = int(metrics(one)[-1]["skipped/updates"])
    assert len(named) == skipped > 1 and all(str(path) in line for line in named)
    assert all(torch.isfinite(tensor).all() for tensor in weights(one / "ckpts/last.ckpt").values())
    for row in metrics(one):
        assert "nan" not in row.values() and "inf" not in row.values()
    assert parallel.wait().code == 0
    assert_close(metrics(one), metrics(two))
    left, right = weights(one / "ckpts/last.ckpt"), weights(two / "ckpts/last.ckpt")
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-5, atol=1e-6)

    message = server.run("distill.py", *flags, "--exp_dir", tmp_path / "x", "--trainer.max_skipped_updates", 1, code=2)
    assert "2 updates had a loss or gradient that is not finite" in message.error and str(path) in message.error


def test_uneven_ranks_never_wait(server, bad_data, tiny_flags, tmp_path):
    """One rank has nothing to validate, and micro-batches without a readable file."""
    lists, _ = bad_data
    (lists / "valid.tsv").write_text("\n".join((lists / "valid.tsv").read_text().splitlines()[:2]) + "\n")
    flags = [*tiny_flags, "--data.tsv_dir", lists, "--data.max_bad_share", 1, "--data.utterances_per_batch", 1]
    one, two = tmp_path / "one", tmp_path / "two"
    parallel = server.start("distill.py", *flags, "--exp_dir", two, "--trainer.devices", 2)
    server.run("distill.py", *flags, "--exp_dir", one)
    assert parallel.wait().code == 0
    assert_close(metrics(one), metrics(two))


def test_vanished_mount(server, corpus, tsv_dir, tiny_flags, tmp_path):
    root, exp = tmp_path / "corpus", tmp_path / "run"
    shutil.copytree(corpus, root)
    copy_lists(tsv_dir, root, tmp_path)
    flags = [*tiny_flags, "--data.tsv_dir", tmp_path, "--exp_dir", exp, "--optim.max_steps", 24]
    run = server.start("distill.py", *flags)
    run.until((exp / "ckpts/last.ckpt").exists)
    root.rename(tmp_path / "elsewhere")
    finished = run.wait()
    assert finished.code == 2 and f"{root} is gone" in finished.error
    saved = torch.load(exp / "ckpts/last.ckpt", weights_only=True)
    assert saved["guard"]["bad"] == {"train": {}, "valid": {}}, "nothing was saved after the mount vanished"
    (tmp_path / "elsewhere").rename(root)
    server.run("distill.py", *flags)
    server.run("distill.py", *flags[:-4], "--exp_dir", tmp_path / "reference", *flags[-2:])
    assert_same_run(tmp_path / "reference", exp)
