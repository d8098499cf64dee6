"""The command on pairs of files laid out as the released ones: what it writes, and every wrong turn in one line."""

from __future__ import annotations

import argparse
import collections
import hashlib
import logging
import os
import pickletools
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import convert_from_checkpoint
from distillation.objectives import ObjectiveConfig, Objectives
from distillation.objectives.hint import Hint
from distillation.objectives.masking import Masking
from tests.helpers import ROOT
from tests.released_students import (
    SCHEDULE,
    TINY,
    foreign,
    importable,
    lightning,
    released_heads,
    released_states,
    settings_file,
    student_state,
)
from wav2vec2 import load_model, wav2vec2_model
from wav2vec2.checkpoint import load_checkpoint

Run = Callable[..., str]


@pytest.fixture(autouse=True)
def _one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)


def write(name: str, content: dict[str, Any] | None = None, **changes: Any) -> None:
    """``s.ckpt`` and ``s.yaml`` of a tiny student."""
    content = content or lightning(student_state(TINY[name]))
    with importable():
        torch.save(content, "s.ckpt")
    Path("s.yaml").write_text(yaml.dump(settings_file(TINY[name] | changes), sort_keys=False))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command as from the shell; it must exit with 2, one line and no file if it ``fails``."""

    def call(*arguments: object, fails: bool = False) -> str:
        arguments = arguments or ("--checkpoint", "s.ckpt", "--config", "s.yaml")
        monkeypatch.setattr(sys, "argv", ["convert_from_checkpoint.py", *map(str, arguments)])
        if not fails:
            convert_from_checkpoint.main()
            return ""
        with pytest.raises(SystemExit) as exit_:
            convert_from_checkpoint.main()
        error = capsys.readouterr().err
        assert exit_.value.code == 2 and not list(Path().rglob("*.pth")) and not list(Path().rglob("*.tmp"))
        assert error.startswith("error: ") and error.count("\n") == 1, error
        return error

    return call


@pytest.mark.slow
def test_as_a_process(tmp_path: Path) -> None:
    """Without fairseq, s3prl or Lightning imported."""
    write("armhubert")
    flags = ["--checkpoint", "s.ckpt", "--config", "s.yaml", "--out", "made/arm.pth"]
    script = ROOT / "convert_from_checkpoint.py"
    done = subprocess.run([sys.executable, script, *flags], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "dropped from s.ckpt: teacher_model.* (2 tensors)" in done.stderr
    assert [path.name for path in Path("made").iterdir()] == ["arm.pth"]
    assert load_model("made/arm.pth").config["encoder_reuse_attention"] == [False, True, False]


def test_the_file_names_both_of_its_sources(run: Run) -> None:
    write("starhubert")
    run()
    digests = [hashlib.sha256(Path(name).read_bytes()).digest() for name in ("s.ckpt", "s.yaml")]
    content = {"revision": None, "sha256": hashlib.sha256(b"".join(digests)).hexdigest()}
    assert load_checkpoint("pretrained/s.student.pth").extra["source"] == {"id": "s.ckpt", **content}


@pytest.mark.parametrize("num_frames", [12, 13])
@pytest.mark.parametrize("name", ["fithubert", "maskhubert", "armhubert", "armwavlm"])
def test_heads_go_on_with_the_objective_that_made_them(name: str, num_frames: int, run: Run) -> None:
    """The heads of the file fit the recipe's objective, and give the released projections."""
    write(name)
    run()
    student = load_checkpoint("pretrained/s.student.pth")
    flat = {key: value for key, value in student.config.items() if key not in ("encoder_time_reduction",)}
    wide = {"encoder_embed_dim": 20, "encoder_head_dim": 5, "encoder_use_projection": None}
    teacher = wav2vec2_model(**{**flat, **wide})
    teacher.mask_embedding = torch.zeros(20)
    config = ObjectiveConfig(hint=Hint.Config()) if name == "fithubert" else ObjectiveConfig(masking=Masking.Config())
    objectives = Objectives(config, student.model, teacher)
    assert objectives.load_head_state(student.heads, "s.student.pth")

    tensors, waveforms = student_state(TINY[name]), torch.randn(1, 400 + 320 * (num_frames - 1))
    expected = released_heads(tensors, released_states(tensors, TINY[name], waveforms)[1:])
    (part,) = objectives.parts.values()
    with torch.no_grad():
        found = part.predictions(student.model.run(waveforms)[0].layers, num_frames)
    for prediction, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(prediction, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", TINY)
def test_the_files_as_their_authors_uploaded_them(name: str, run: Run) -> None:
    """Their pickles name these and no more, where the class of the schedule cannot be imported."""
    write(name)
    with zipfile.ZipFile("s.ckpt") as archive:
        (pickled,) = [archive.read(member) for member in archive.namelist() if member.endswith("data.pkl")]
    named = {argument for opcode, argument, _ in pickletools.genops(pickled) if opcode.name == "GLOBAL"}
    assert {str(argument).replace(" ", ".") for argument in named} == {
        "collections.OrderedDict", SCHEDULE, "torch.FloatStorage", "torch._utils._rebuild_tensor_v2",
    }  # fmt: skip
    assert "s3prl" not in sys.modules
    run()
    assert load_model("pretrained/s.student.pth").num_layers == TINY[name]["encoder_layers"]


def test_what_other_versions_of_lightning_put_into_files(run: Run) -> None:
    """Callbacks by their class, whose name the file then holds, and scores of numpy."""
    checkpoint = foreign("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")
    attributes = foreign("pytorch_lightning.utilities.parsing.AttributeDict", dict)
    others = {
        "callbacks": {checkpoint: {"best_model_score": np.float64(0.5), "best_model_path": Path("a.ckpt")}},
        "hyper_parameters": attributes(gpus=2, cfg=argparse.Namespace(lr=5e-4)),
        "loops": {"losses": collections.deque([0.5, 0.25], 100)},
    }
    write("maskhubert", lightning(student_state(TINY["maskhubert"])) | others)
    run()
    assert load_model("pretrained/s.student.pth").num_layers == 3


def test_what_is_dropped_and_counted(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    state = student_state(TINY["starhubert"])
    write("starhubert", lightning(state | {"final_proj.weight": torch.ones(2, 16), "final_proj.bias": torch.ones(2)}))
    run()
    assert "teacher_model.* (2 tensors), final_proj.* (2 tensors)" in caplog.text
    num_params = sum(tensor.numel() for tensor in state.values())
    assert f"{num_params:,} parameters and 0 in heads, 3 layers" in caplog.text
    assert f"{len(state)} tensors saved, 4 dropped" in caplog.text


class Evil:
    """Creates a file when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch witness",)


def test_code_in_either_file_is_not_run(run: Run) -> None:
    write("starhubert", lightning(student_state(TINY["starhubert"])) | {"callbacks": {Evil: Evil()}})
    assert "s.ckpt: refused, nothing was run" in run(fails=True)
    write("starhubert")
    for line in ("a: !!python/object/apply:os.system ['touch witness']", "!!python/object:os.environ {}"):
        Path("s.yaml").write_text(line)
        assert "s.yaml: not valid YAML" in run(fails=True)
    write("starhubert", conv_feature_layers="__import__('os').system('touch witness')")
    assert "s.yaml: conv_feature_layers" in run(fails=True)
    assert not Path("witness").exists()


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_truncated_checkpoint(share: float, run: Run) -> None:
    write("starhubert")
    content = Path("s.ckpt").read_bytes()
    Path("s.ckpt").write_bytes(content[: int(len(content) * share)])
    assert "s.ckpt: damaged, incomplete" in run(fails=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no section 'distiller'"),
        ("- 1\n- 2", "no section 'distiller'"),
        ((ROOT / "conf/fithubert.yaml").read_text(), "no section 'distiller'"),
        ("distiller: [1, 2", "s.yaml: not valid YAML"),
        ("distiller: \x00", "s.yaml: not valid YAML"),
        ("[" * 1500, "s.yaml: not valid YAML"),
        ("distiller: !!bool x", "s.yaml: not valid YAML"),
        ("a: &a {x: 1}\ndistiller: {<<: [*a, *a]}", "s.yaml: has YAML aliases"),
        ("# " + "x" * 20_000, "s.yaml: over 20000 bytes"),
    ],
)
def test_settings_of_another_layout(text: str, message: str, run: Run) -> None:
    write("starhubert")
    Path("s.yaml").write_text(text)
    assert message in run(fails=True)


def test_files_that_do_not_belong_together(run: Run) -> None:
    write("armhubert")
    Path("s.yaml").write_text(yaml.dump(settings_file(TINY["maskhubert"])))
    assert "s.ckpt with s.yaml: its tensors do not fit its config" in run(fails=True)
    assert "none.ckpt: no such file" in run("--checkpoint", "none.ckpt", "--config", "s.yaml", fails=True)
    assert "none.yaml: no such file" in run("--checkpoint", "s.ckpt", "--config", "none.yaml", fails=True)
    error = run("--checkpoint", "s.ckpt", fails=True)
    assert "s.ckpt is a released student" in error and "by --config" in error


@pytest.mark.parametrize("normalize", ["auto", "yes"])
def test_normalization(normalize: str, run: Run) -> None:
    write("starhubert")
    run("--checkpoint", "s.ckpt", "--config", "s.yaml", "--normalize", normalize)
    assert load_model("pretrained/s.student.pth").normalize_waveform is (normalize == "yes")


@pytest.mark.parametrize("tensor", ["encoder.layer_norm.weight", "proj_head.1.lin_proj.bias"])
def test_values_that_are_not_finite(tensor: str, run: Run) -> None:
    state = student_state(TINY["maskhubert"])
    state[tensor][0] = float("nan")
    write("maskhubert", lightning(state))
    assert "not finite; nothing saved" in run(fails=True)
