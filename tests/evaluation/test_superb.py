"""Scores against the published ones, and the ten tasks with programs that stand in for s3prl and the scorers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distillation.errors import UserError
from distillation.stopping import Signalled, Stopped
from evaluation import superb
from evaluation.superb_score import COLUMNS, leaderboard_score, overall_score, published, read_results, table
from tests.helpers import ROOT
from wav2vec2 import load_model, save_model

# what stands in for run_downstream: it leaves the checkpoints that the tasks test and prints their metrics
PROGRAM = """
import json, os, pathlib, signal, sys, time
words = [word for word in sys.argv[1:] if word != "-a"]
flags = dict(zip(words[::2], words[1::2]))
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps(flags) + "\\n")
if flags["-m"] == "train":
    folder = pathlib.Path(flags["-p"])
    if os.environ.get("SLOW") == flags["-d"]:
        def end(number, frame):
            (folder / "got").write_text(signal.Signals(number).name)
            sys.exit(1)
        for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
            signal.signal(getattr(signal, name), end)
        (folder / "begun").touch()
        time.sleep(60)
    for name in ("dev-best", "dev-clean-best", "best-states-dev", "states-20000", "states-40000"):
        (folder / f"{name}.ckpt").touch()
    sys.exit(os.environ.get("FAIL") == flags["-d"])
name = flags.get("-e", "")
value = 0.05 if "states-40000" in name else 0.06
value += 0.01 * ("fold1" in name)
for label in ("test per:", "test acc:", "sv-voxceleb1/test-EER:", "test slot_type_f1:", "test slot_value_cer:"):
    print(label, value)
print("test-clean wer: 10.47")
"""
SCORE = 'echo "maxTWV: 0.0$(echo "$1" | tr -dc 0-9 | tail -c 1)5"'
DSCORE = "echo '*** OVERALL *** 7.5'; echo '*** OVERALL *** 5.92'; echo '*** OVERALL *** 6.1'"


@pytest.fixture
def world(tmp_path, monkeypatch) -> Path:
    checkout, data = tmp_path / "s3prl", tmp_path / "data"
    (checkout / "s3prl" / "downstream" / "diarization").mkdir(parents=True)
    (checkout / "s3prl" / "run_downstream.py").touch()
    (checkout / "s3prl" / "downstream" / "diarization" / "score.sh").write_text(DSCORE)
    for folder in {folder for task in superb.TASKS.values() for folder in task.data.values()}:
        (data / folder).mkdir(parents=True, exist_ok=True)
    scorer = data / "quesst14Database" / "scoring"
    scorer.mkdir()
    (scorer / "score-TWV-Cnxe.sh").write_text(SCORE)
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setattr(superb, "RUN", (sys.executable, str(tmp_path / "program.py")))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    return tmp_path


def calls(world: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (world / "calls").read_text().splitlines()]


def run(world: Path, model: Path, *tasks: str, upstream: str = "dphubert") -> dict[str, float]:
    path = superb.run(
        superb.Superb(model, world / "data", world / "out", world / "s3prl", "cpu", upstream), list(tasks)
    )
    return json.loads(path.read_text())


@pytest.mark.slow
def test_ten_tasks(world, teacher_path):
    results = run(world, teacher_path)
    assert set(results) == set(COLUMNS)
    assert results == pytest.approx({
        "PR": 6.0, "ASR": 10.47, "KS": 6.0, "IC": 6.0, "SF_F1": 6.0, "SF_CER": 6.0, "SID": 6.0, "ER": 6.2, "ASV": 5.0,
        "SD": 5.92, "QbE": 0.045,
    })  # fmt: skip
    made = calls(world)
    (sid,) = (call for call in made if call.get("-d") == "voxceleb1")
    assert "config.optimizer.lr=5e-3" in sid["-o"] and sid["-u"] == "dphubert" and sid["-k"] == str(teacher_path)
    assert f"config.downstream_expert.datarc.file_path={world / 'data' / 'VoxCeleb1'}" in sid["-o"]
    folds = [call["-o"] for call in made if call.get("-d") == "emotion"]
    assert [f"test_fold=fold{i}" in folds[i - 1] for i in range(1, 6)] == [True] * 5
    # QbE: five states on dev, the best of them on eval
    layers = [(call["-l"], call["-t"]) for call in made if call.get("-d") == "quesst14_dtw"]
    assert layers == [*((str(i), "dev") for i in range(5)), ("4", "eval")]
    assert run(world, teacher_path) == results and calls(world) == made  # nothing again


def test_a_stopped_task_goes_on_where_it_was(world, teacher_path, monkeypatch):
    monkeypatch.setenv("FAIL", "speech_commands")
    with pytest.raises(UserError, match=r"train\.log: .* ended with 1"):
        run(world, teacher_path, "PR", "KS")
    assert set(json.loads((world / "out" / "results.json").read_text())) == {"PR"}
    monkeypatch.delenv("FAIL")
    before = len(calls(world))
    assert set(run(world, teacher_path, "PR", "KS")) == {"PR", "KS"}
    again = calls(world)[before:]
    assert [call["-m"] for call in again] == ["train", "evaluate"] and again[0]["-u"] == "dphubert"


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_a_signal_reaches_s3prl_and_the_same_command_goes_on(world, teacher_path, server, monkeypatch, name):
    python = world / "python"
    python.write_text(f'#!/bin/sh\nshift 3\nexec "{sys.executable}" -S "{world}/program.py" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("S3PRL", str(world / "s3prl"))
    monkeypatch.setenv("SLOW", "speech_commands")
    out = world / "out"
    words = ["-m", "evaluation.superb", teacher_path, world / "data", "PR", "KS", "SF", "--out", out, "--device", "cpu"]
    process = server.start(*words, python=python)
    process.until((out / "KS" / "begun").exists)
    process.kill(getattr(signal, name))
    stopped = process.wait()
    assert stopped.code == 75 and (out / "KS" / "got").read_text() == name
    assert stopped.error.startswith(f"stopped: {name}: the finished tasks are in {out / 'results.json'}, what the ")
    assert set(json.loads((out / "results.json").read_text())) == {"PR"} and not (out / ".lock").exists()
    monkeypatch.delenv("SLOW")
    before = len(calls(world))
    assert server.start(*words, python=python).wait().code == 0
    again = [(call["-m"], call.get("-d")) for call in calls(world)[before:]]
    assert again == [("train", "speech_commands"), ("evaluate", None), ("train", "ctc"), ("evaluate", None)]
    assert set(json.loads((out / "results.json").read_text())) == {"PR", "KS", "SF_F1", "SF_CER"}


def test_what_is_tested_is_not_tested_again(world, teacher_path, monkeypatch):
    """Of five folds, ten checkpoints and so on; unless the checkpoint is another."""
    tested = []

    def stop_at_third(self, log, *words, **options):
        if "evaluate" in words:
            tested.append(log.parent.name)
            if len(tested) == 3:
                raise Signalled(signal.SIGTERM)
        return run_program(self, log, *words, **options)

    run_program = superb.Superb.run
    monkeypatch.setattr(superb.Superb, "run", stop_at_third)
    with pytest.raises(Stopped, match="SIGTERM: the finished tasks are in"):
        run(world, teacher_path, "ER")
    for fold, content in (("fold1", None), ("fold2", b"trained again")):  # what it holds counts, not its date
        checkpoint = world / "out" / "ER" / fold / superb.TASKS["ER"].best
        checkpoint.write_bytes(content or checkpoint.read_bytes())
    results = run(world, teacher_path, "ER")
    assert tested == ["fold1", "fold2", "fold3", "fold2", "fold3", "fold4", "fold5"]
    assert results["ER"] == pytest.approx(6.2)


def test_results_are_those_of_one_model(world, teacher_path, tmp_path):
    run(world, teacher_path, "PR")
    shutil.copy(teacher_path, tmp_path / "moved.pth")
    assert set(run(world, tmp_path / "moved.pth", "PR")) == {"PR"}
    other = load_model(teacher_path)
    with torch.no_grad():
        other.encoder.transformer.layers[0].attention.k_proj.bias[0] += 1
    save_model(tmp_path / "other.pth", other)
    for model, upstream in ((tmp_path / "other.pth", "dphubert"), (teacher_path, "starhubert")):
        with pytest.raises(UserError, match="another model or upstream: use another --out"):
            run(world, model, "PR", upstream=upstream)


def test_an_upstream_without_the_first_state(world, teacher_path):
    run(world, teacher_path, "KS", "QbE", upstream="starhubert")
    assert [call["-u"] for call in calls(world) if call["-m"] == "train"] == ["starhubert"]
    layers = [call["-l"] for call in calls(world) if call.get("-t") == "dev" and "-l" in call]
    assert layers == ["0", "1", "2", "3"]


def test_mistakes(world, teacher_path, tmp_path):
    with pytest.raises(UserError, match="no task 'TTS'; there are PR, ASR"):
        run(world, teacher_path, "TTS")
    (world / "data" / "VoxCeleb1").rmdir()
    with pytest.raises(UserError, match="VoxCeleb1: missing, SID needs it"):
        run(world, teacher_path, "SID")
    (world / "s3prl" / "s3prl" / "run_downstream.py").unlink()
    with pytest.raises(UserError, match="no checkout of s3prl"):
        run(world, teacher_path, "SID")
    with pytest.raises(UserError, match=r"log\.txt: no line with 'test per'"):
        superb.read_metric("nothing", "test per", 1, Path("log.txt"))


@pytest.mark.slow
def test_the_script_explains_itself(tmp_path):
    environment = {
        **os.environ,
        "NO_VENV": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    command = ["bash", str(ROOT / "scripts" / "superb.sh"), "--help"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and "DATA_ROOT" in result.stdout, result.stderr


# Scores


@pytest.mark.parametrize(
    ("name", "overall", "leaderboard"),
    [
        ("DPHuBERT", 78.9, 866), ("STaRHuBERT", 79.5, 887), ("STaRHuBERT-L", 79.8, 896), ("DPWavLM", 80.2, 926),
        ("HuBERT Base", 80.8, 941),
    ],
)  # fmt: skip
def test_published_scores(name, overall, leaderboard):
    assert round(overall_score(published()[name]), 1) == overall
    assert round(leaderboard_score(published()[name])) == leaderboard


@pytest.mark.parametrize(
    ("name", "overall", "leaderboard"),
    [("ARMHuBERT-S", 77.5, 828), ("ARMHuBERT-S 100h", 76.8, 800), ("DPHuBERT 100h", 77.7, 819),
     ("STaRHuBERT 100h", 77.8, 831)],
)  # fmt: skip
def test_scores_published_with_other_roundings(name, overall, leaderboard):
    """STaR's table gives scores of models whose leaderboard score comes out up to 2 of 1000 away from their tasks'."""
    assert round(overall_score(published()[name]), 1) == overall
    assert abs(leaderboard_score(published()[name]) - leaderboard) < 2


def test_command(server, tmp_path):
    path = tmp_path / "mine" / "results.json"
    path.parent.mkdir()
    path.write_text(json.dumps(published()["DPHuBERT"]))
    result = server.run("-m", "evaluation.superb_score", path)
    assert result.stdout.rstrip().endswith("mine: overall 78.9, leaderboard 866")
    assert "| **mine** | 78.9 | 866 |" in result.stdout and "| HuBERT Base | 80.8 | 941 |" in result.stdout
    rows = table(published()).splitlines()
    assert len(rows) == 2 + len(published()) and float(rows[2].split("|")[2]) >= float(rows[-1].split("|")[2])


def test_files_that_are_no_results(tmp_path):
    path = tmp_path / "results.json"
    for content, message in (
        ("{", "no results file"), ("[]", "must map columns"), ('{"KS": 1}', "without IC, PR"),
        (json.dumps({**published()["DPHuBERT"], "KS": "96"}), "KS is '96', not a number"),
    ):  # fmt: skip
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            read_results(path)
