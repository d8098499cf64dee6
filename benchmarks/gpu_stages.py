"""The stages as processes on a GPU: killed and resumed, out of memory, batches that fit, features, exports."""

from __future__ import annotations

import csv
import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from benchmarks.trial import SMALL, fitted, worst, write_noise
from exporting.formats import FORMATS
from wav2vec2 import load_model, save_model, wav2vec2_model
from wav2vec2.architecture import HUBERT_BASE
from wav2vec2.counting import count_params

ROOT = Path(__file__).parents[1]
UPDATES, CHECKPOINT = 40, 10
LEFT_GIB = 4.0  # of the GPU's memory when a run is to run out of it: its context, models and optimizer
FEATURES = 1e-2  # largest difference to the CPU's: torch lets convolutions round float32 to 10 bits of mantissa
PATIENCE = 120.0  # seconds that a command may take
RESUMED = 0.02  # largest relative difference of the last loss: a GPU adds gradients up in another order each time
Values = dict[str, Any]


class Stages:
    """Runs the commands of the toolkit in a folder of noise and random teachers.

    Args:
        folder: to write to.
        device: cuda or cpu.
    """

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = folder, device
        self.accelerator = "gpu" if device == "cuda" else "cpu"
        self.teacher, self.run_folder = folder / "small.pth", folder / "run"
        torch.manual_seed(0)
        save_model(self.teacher, wav2vec2_model(**SMALL))
        self.lists, self.audio = folder / "lists", folder / "audio"
        self.audio.mkdir()
        self.lists.mkdir()
        self.seconds = 15.0 if device == "cuda" else 2.0  # of the longest recording; a CPU only tries the checks
        for name, count, longest in (("train", 14, self.seconds), ("valid", 3, self.seconds / 2)):
            write_noise(self.audio, self.lists / f"{name}.tsv", [longest * (1 - i / 50) for i in range(count)])

    def checks(self) -> dict[str, Callable[[], Values]]:
        """What to look at, in this order: later ones use what earlier ones leave."""
        return {
            "killed and resumed": self.killed_and_resumed,
            "pruned, and step 2": self.second_step,
            "extract_features.py": self.features,
            "export.py": self.exports,
        }

    def checks_of_memory(self) -> dict[str, Callable[[], Values]]:
        """What needs all of a GPU's memory."""
        return {"fit_batch.py": self.fit_batch, "out of memory": self.out_of_memory}

    def process(self, *words: object) -> list[str]:
        """The command line of a script."""
        return [sys.executable, "-W", "ignore", *map(str, words)]

    def run(self, *words: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        """A script, to its end.

        Raises:
            AssertionError: another exit code; with the end of what it said.
        """
        ran = subprocess.run(self.process(*words), cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
        assert ran.returncode == code, f"{words[0]} ended with {ran.returncode}: {ran.stderr[-3000:]}"
        return ran

    def flags(self, name: str = "dphubert_base", config: dict[str, Any] = SMALL, **changes: object) -> list[object]:
        """Of a recipe on a teacher of this config, in float32 and a few short updates."""
        settings: dict[str, object] = {
            "teacher_ckpt": self.teacher,
            "data.tsv_dir": self.lists,
            "data.train": "train.tsv",
            "data.valid": "valid.tsv",
            "data.min_frames": 8000,
            "data.seconds_per_batch": self.seconds + 1,
            "data.num_workers": 2,
            "optim.max_steps": UPDATES,
            "optim.warmup_steps": 5,
            "final.max_steps": 5,
            "pruning.warmup_steps": 20,
            "trainer.accelerator": self.accelerator,
            "trainer.devices": 1,
            "trainer.precision": "32-true",
            "trainer.batches_per_update": 2,
            "trainer.log_every": 5,
            "trainer.validate_every": 20,
            "trainer.checkpoint_every": CHECKPOINT,
            **{key.replace("__", "."): value for key, value in changes.items()},
        }
        return [*fitted(name, config), *(f"--{key}={value}" for key, value in settings.items())]

    def killed_and_resumed(self) -> Values:
        """Step 1, killed after a checkpoint and started again, against a run that was left alone."""
        whole, killed = self.folder / "whole", self.run_folder
        self.run("distill.py", *self.flags(), "--exp_dir", whole)
        words = self.process("distill.py", *self.flags(), "--exp_dir", killed)
        with (self.folder / "killed.log").open("w+") as log:
            process = subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=log)
            begin = time.monotonic()
            try:
                while process.poll() is None and not (killed / "ckpts" / "last.ckpt").exists():
                    assert time.monotonic() - begin < PATIENCE, "no checkpoint yet"
                    time.sleep(0.02)
            finally:
                process.kill()
            code = process.wait()
            log.seek(0)
            assert code < 0, f"the run ended with {code} before it could be killed: {log.read()[-3000:]}"
        done = torch.load(killed / "ckpts" / "last.ckpt", map_location="cpu", weights_only=True)["global_step"]
        assert done < UPDATES, "the run was over before it could be killed"
        self.run("distill.py", *self.flags(), "--exp_dir", killed)
        rows, others = (list(csv.DictReader((folder / "metrics.csv").open())) for folder in (whole, killed))
        assert [row["step"] for row in rows] == [row["step"] for row in others], "updates are missing, or there twice"
        weights, resumed = (
            torch.load(folder / "ckpts" / "last.ckpt", map_location="cpu", weights_only=True)["state_dict"]
            for folder in (whole, killed)
        )
        last, again = ([float(row["train/loss"]) for row in run if row["train/loss"]][-1] for run in (rows, others))
        difference = abs(last - again) / abs(last)
        assert difference <= RESUMED, f"the last loss is {again} after a kill, {last} without"
        largest = worst((weights[name] - resumed[name]).abs().max().item() for name in weights)
        return {"killed at update": done, "loss differs by": difference, "weights differ by": largest}

    def second_step(self) -> Values:
        """Pruning, and distilling what is left; where there is no run yet, it is made."""
        checkpoint = self.run_folder / "ckpts" / "last.ckpt"
        if not checkpoint.exists():
            self.run("distill.py", *self.flags(), "--exp_dir", self.run_folder)
        self.run("prune.py", "--distilled_ckpt", checkpoint)
        pruned, final = self.run_folder / "pruned.pth", self.run_folder / "final"
        self.run("final_distill.py", *self.flags(), "--student_ckpt", pruned, "--exp_dir", final)
        return {"parameters": count_params(load_model(self.model))}

    @property
    def model(self) -> Path:
        """What is left after both steps, or the teacher where they have not been made."""
        final = self.run_folder / "final" / "final.pth"
        return final if final.exists() else self.teacher

    def features(self) -> Values:
        """Of all recordings by the command, against the CPU in this process."""
        out = self.folder / "features"
        self.run("extract_features.py", self.model, self.audio, "--out", out, "--device", self.device)
        recordings = sorted(self.audio.glob("*.flac"))
        waveforms = [torch.from_numpy(soundfile.read(path, dtype="float32")[0]) for path in recordings]
        expected = load_model(self.model).embed(waveforms)
        found = [torch.from_numpy(np.load(out / f"{path.stem}.npy")) for path in recordings]
        difference = worst(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected))
        assert difference <= FEATURES, f"features differ from the CPU's by {difference}"
        return {"recordings": len(recordings), "differ from the CPU's by": difference}

    def exports(self) -> Values:
        """The formats whose packages are there; the command compares each with PyTorch."""
        formats = ["safetensors", "torch-export"]
        if all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript")):
            formats.append("onnx")
        for name in formats:
            self.run("export.py", self.model, "--to", name, "--out", self.folder / f"model{FORMATS[name].suffix}")
        return {"formats": formats}

    def base_teacher(self) -> Path:
        """Of the published size."""
        path = self.folder / "base.pth"
        if not path.exists():
            save_model(path, wav2vec2_model(**HUBERT_BASE))
        return path

    def fit_batch(self) -> Values:
        """The largest micro-batches of the published recipe on a teacher of the published size."""
        flags = [*fitted("dphubert_base", HUBERT_BASE), "--teacher_ckpt", self.base_teacher(), "--trainer.devices=1"]
        ran = self.run("fit_batch.py", *flags, "--exp_dir", self.folder / "fitted")
        assert (self.folder / "fitted" / "batch.yaml").exists()
        return {"found": ran.stdout.splitlines()[0]}

    def out_of_memory(self) -> Values:
        """A batch for which there is no room ends in one line that says which would fit."""
        flags = self.flags("dphubert_base", HUBERT_BASE, teacher_ckpt=self.base_teacher(),
                           data__seconds_per_batch=160, trainer__precision="bf16-mixed")  # fmt: skip
        torch.cuda.empty_cache()
        taken = torch.empty(int(torch.cuda.mem_get_info()[0] - LEFT_GIB * 2**30), dtype=torch.uint8, device="cuda")
        try:
            ran = self.run("distill.py", *flags, "--exp_dir", self.folder / "absurd", code=2)
        finally:
            del taken
            torch.cuda.empty_cache()
        errors = [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and errors[0].startswith("error: out of GPU memory"), ran.stderr[-3000:]
        assert "Traceback" not in ran.stderr, ran.stderr[-3000:]
        return {"said": errors[0]}
