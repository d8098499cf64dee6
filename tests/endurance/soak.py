"""Kill the two-step recipe at random moments, start it again each time, and compare with a run that never was stopped.

    python -m tests.endurance.soak [--kills 50] [--seed 0] [--modes plain,readers,processes]

Runs what the shell recipes run (both steps and the pruning between them) on a tiny teacher and noise. Most kills are
SIGKILL to all processes at once, as a power cut; some hit one process alone, some are the SIGTERM of a batch system.
When a run got to its end all its models, checkpoints and metrics must be equal to the undisturbed ones, bit for bit;
then the next one starts. Prints a table; exits with 1 when anything differed. Needs requirements/dev.txt.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

from evaluation.tables import machine, markdown_table
from tests.configs import TINY
from tests.helpers import ROOT, write_noise
from wav2vec2 import save_model, wav2vec2_model

MODES = {
    "plain": {"data.num_workers": 0},
    "readers": {"data.num_workers": 2},
    "processes": {"data.num_workers": 1, "trainer.devices": 2},
}
KILLS = {"all killed": 0.7, "one process killed": 0.15, "SIGTERM": 0.15}
END_SECONDS = 60  # after which no process of a killed run may be left


def prepare(folder: Path) -> dict[str, object]:
    """Noise, a teacher, and the settings that fit conf/demo.yaml to them."""
    for split, count in (("train-clean-100", 30), ("dev-clean", 6)):
        for i in range(count):
            write_noise(folder / "corpus" / split / str(i % 3) / "1" / f"{i}.flac", 1 + (i * 7 % 10) / 10, i)
    subprocess.run(
        [sys.executable, "prepare_data.py", "--data", folder / "corpus", "--out", folder / "data"], cwd=ROOT, check=True
    )
    torch.manual_seed(0)
    save_model(folder / "teacher.pth", wav2vec2_model(**TINY))
    return {
        "teacher_ckpt": folder / "teacher.pth",
        "teacher_layers": 4,
        "teacher_width": 24,
        "data.tsv_dir": folder / "data",
        "data.seconds_per_batch": 5,
        "objective.layer_to_layer.layers": "[[0],[2,4]]",
        "pruning.warmup_steps": 60,
        "pruning.target_sparsity": 0.3,
        "optim.max_steps": 160,
        "final.max_steps": 90,
        "trainer.batches_per_update": 2,
        "trainer.log_every": 5,
        "trainer.validate_every": 8,
        "trainer.checkpoint_every": 3,
    }


class Run:
    """One start of the recipe, in a session of its own so that all of its processes can be found."""

    def __init__(self, exp: Path, flags: dict[str, object], log: Path) -> None:
        self.exp, self.log = exp, log
        words = " ".join(shlex.quote(str(word)) for name, value in flags.items() for word in (f"--{name}", value))
        script = f"source scripts/common.sh; two_steps conf/demo.yaml {shlex.quote(str(exp))} {words}"
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
                       "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}  # fmt: skip
        with log.open("w") as file:
            self.shell = subprocess.Popen(
                ["bash", "-c", script, "scripts/soak"], cwd=ROOT, env=environment, stdout=file, stderr=file,
                start_new_session=True,
            )  # fmt: skip

    def processes(self) -> list[int]:
        """Living processes of the session, the shell not counted."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, IndexError):
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == self.shell.pid and fields[0] != "Z" and int(folder.name) != self.shell.pid:
                    found.append(int(folder.name))
        return found

    def kill(self, how: str, rng: random.Random) -> None:
        """Strike, and see that nothing is left.

        Raises:
            RuntimeError: a process lives on.
        """
        if how == "SIGTERM":
            self.shell.send_signal(signal.SIGTERM)
        elif how == "all killed" or not (processes := self.processes()):
            os.killpg(self.shell.pid, signal.SIGKILL)
        else:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rng.choice(processes), signal.SIGKILL)
        deadline = time.monotonic() + END_SECONDS
        while self.shell.poll() is None or self.processes():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{how}: processes live on after {END_SECONDS} s\n{self.log.read_text()[-2000:]}")
            time.sleep(0.05)


def where(exp: Path) -> str:
    """How far a killed run had got."""
    if list(exp.rglob(".*.tmp")):
        return "writing a file"
    if not (exp / "pruned.pth").exists():
        return "step 1" if (exp / "ckpts/last.ckpt").exists() else "before the first checkpoint"
    return "step 2" if (exp / "final/ckpts/last.ckpt").exists() else "between the steps"


def differences(reference: Path, exp: Path) -> list[str]:
    """Files of two finished runs that are not the same."""
    found = []
    for name in ("ckpts/last.ckpt", "pruned.pth", "final/ckpts/last.ckpt", "final/final.pth"):
        left, right = (torch.load(folder / name, weights_only=True)["state_dict"] for folder in (reference, exp))
        if left.keys() != right.keys() or not all(torch.equal(left[key], right[key]) for key in left):
            found.append(name)
    for name in ("metrics.csv", "final/metrics.csv"):
        if table(reference / name) != table(exp / name):
            found.append(name)
    found += [str(path.relative_to(exp)) for path in exp.rglob(".*") if path.is_file()]
    return found


def table(path: Path) -> list[dict[str, str]]:
    """Rows of a metrics.csv without what the clock measures."""
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if not k.startswith("speed/")} for row in csv.DictReader(file)]


def soak(mode: str, kills: int, flags: dict[str, object], base: Path, rng: random.Random) -> tuple[list[object], bool]:
    """A row of the table, and whether all runs were equal."""
    flags = {**flags, **MODES[mode]}
    reference, exp, log = base / f"{mode}-reference", base / f"{mode}-killed", base / f"{mode}.log"
    begin = time.monotonic()
    if Run(reference, flags, log).shell.wait():
        raise RuntimeError(log.read_text()[-2000:])
    longest = 0.8 * (time.monotonic() - begin)
    hows: Counter[str] = Counter()
    wheres: Counter[str] = Counter()
    done, wrong = 0, []
    with tqdm(total=kills, desc=mode, unit="kill") as bar:
        while hows.total() < kills or done == 0 or exp.exists():
            run = Run(exp, flags, log)
            enough = hows.total() >= kills
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = run.shell.wait(None if enough else rng.uniform(0.2, longest))
                if code:
                    raise RuntimeError(f"a run failed with {code}\n{log.read_text()[-2000:]}")
                wrong += differences(reference, exp)
                shutil.rmtree(exp)
                done += 1
                continue
            how = rng.choices(list(KILLS), list(KILLS.values()))[0]
            run.kill(how, rng)
            hows[how] += 1
            wheres[where(exp)] += 1
            bar.update(1)
    row = [mode, hows.total(), *(hows[how] for how in KILLS), *(wheres[name] for name in WHERES), done,
           "all" if not wrong else f"not: {', '.join(sorted(set(wrong)))}"]  # fmt: skip
    return row, not wrong


WHERES = ("before the first checkpoint", "step 1", "between the steps", "step 2", "writing a file")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of each mode")
    parser.add_argument("--modes", default=",".join(MODES), help=f"any of {', '.join(MODES)}")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    base = Path(tempfile.mkdtemp(prefix="soak"))
    begin = time.monotonic()
    flags = prepare(base)
    rows, equal = [], True
    for mode in options.modes.split(","):
        row, same = soak(mode, options.kills, flags, base, random.Random(f"{options.seed} {mode}"))
        rows.append(row)
        equal &= same
    print(f"{machine()}, seed {options.seed}, {(time.monotonic() - begin) / 60:.0f} min\n")
    columns = ["run", "kills", *KILLS, *WHERES, "runs finished", "equal, bit for bit"]
    print(markdown_table(columns, [list(map(str, row)) for row in rows]))
    shutil.rmtree(base)
    sys.exit(not equal)


if __name__ == "__main__":
    main()
