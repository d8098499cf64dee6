"""What a shell recipe would do, as --dry_run prints it: the budget in its unit, and a result that meets it."""

from __future__ import annotations

import re

import pytest
import torch

from distillation.dry_run import print_plan
from distillation.plan import read_words
from tests.configs import TINY
from tests.helpers import ROOT, write_noise
from tests.latency import write_latency
from wav2vec2 import save_model, wav2vec2_model


@pytest.mark.parametrize(
    ("flags", "budget", "about"),
    [
        (["--pruning.target", "12.5k"], "12,500 parameters of 21,948 parameters", ""),
        (["--pruning.cost", "macs"], "0.01855 GMACs (10 s) of 0.07419 GMACs (10 s)", "about "),
        (["--pruning.cost", "milliseconds", "--pruning.target", "30ms"], "30 ms of 66.18 ms", "about "),
        (["--pruning.cost", "milliseconds", "--pruning.target", "4ms"], "4 ms of 66.18 ms", None),  # no slice has it
    ],
)
def test_budgets(tmp_path, monkeypatch, capsys, flags, budget, about):
    monkeypatch.chdir(tmp_path)
    for speaker in "ab":
        write_noise(tmp_path / "Speech" / speaker / "1.wav", 2, 0)
    save_model(tmp_path / "teacher.pth", wav2vec2_model(**TINY))
    write_latency(tmp_path / "latency.json", TINY)
    words = ["Speech", "--adapt", "--config", ROOT / "conf" / "dphubert_base.yaml", "--teacher_ckpt", "teacher.pth"]
    words += ["--optim.max_steps", 20, "--final.max_steps", 10, "--data.seconds_per_batch", 4]
    torch.manual_seed(0)
    print_plan(read_words([*map(str, words), *flags, "--pruning.latency", "latency.json"]))
    printed = dict(re.split(r"\s+", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert printed["budget"] == budget and "s at the final size" in printed["measured"]
    found = re.match(r"(about )?0\.0[12] M parameters, (\d+\.\d)% of the teacher's", printed.get("result", ""))
    assert (found is None) == (about is None)
    assert found is None or ((found[1] or "") == about and 10 < float(found[2]) < 90)
