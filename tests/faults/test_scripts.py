"""A signal to a shell recipe, as a batch system sends it, saves and requeues."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from tests.faults.test_processes import wait_for
from tests.helpers import ROOT, shell_environment


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_slurm_job_is_requeued(server, tiny_flags, corpus, tmp_path, number):
    """The batch script with a stand-in for the shell recipe's data and a stand-in for scontrol."""
    exp, log, bin_dir = tmp_path / "run", tmp_path / "log", tmp_path / "bin"
    bin_dir.mkdir()
    (bin_dir / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/requeued\n')
    (bin_dir / "scontrol").chmod(0o755)
    flags = [str(flag) for flag in tiny_flags]
    config, teacher = Path(flags[1]), Path(flags[3])
    command = ["bash", "scripts/slurm_dphubert.sh", corpus, config.stem, *flags[2:],
               "--exp_dir", exp, "--optim.max_steps", 2000]  # fmt: skip
    environment = shell_environment(server.bin, SLURM_JOB_ID="4711", SLURM_NTASKS="1", SLURM_SUBMIT_DIR=str(ROOT))
    environment["PATH"] = f"{bin_dir}{os.pathsep}{environment['PATH']}"
    script = tmp_path / "spooled.sh"  # as SLURM runs it, from elsewhere
    shutil.copy(ROOT / "scripts/slurm_dphubert.sh", script)
    command[1] = script
    with log.open("w") as file:
        job = subprocess.Popen([str(word) for word in command], env=environment, stdout=file, stderr=file, cwd=tmp_path)
    assert teacher.is_file()
    wait_for(exp / "ckpts/last.ckpt", log)
    job.send_signal(number)
    assert job.wait(60) == 75, log.read_text()
    assert (tmp_path / "requeued").read_text() == "requeue 4711\n"
    assert f"stopped: {number.name} at update" in log.read_text(), "the signal that the user sent"
    assert not (exp / "pruned.pth").exists() and not (exp / ".lock").exists()
    assert 0 < torch.load(exp / "ckpts/last.ckpt", weights_only=True)["global_step"] < 2000
