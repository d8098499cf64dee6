"""Kill rank 1 of a run at random moments, and see that rank 0 ends with its line, every time.

    python -m tests.endurance.rank_kills [--kills 50] [--seed 0]

Two gloo processes on a tiny teacher and noise; some kills hit while rank 1 still imports, some while the two wait for
each other, some in training, validation and checkpoints. Rank 0 must end within a minute with one line and code 1, and
no process may outlive the minute: readers of the killed rank look for their parent every five seconds (torch's
`MP_STATUS_CHECK_INTERVAL`). Prints a table; exits with 1 when it did not. Needs requirements/dev.txt.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from evaluation.tables import machine, markdown_table
from tests.endurance.soak import prepare
from tests.helpers import ROOT

END_SECONDS = 60


def _living() -> Iterator[tuple[Path, int, int]]:
    """Folder in /proc, parent and session of every process that is no zombie."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            state, parent, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if state != "Z":
                yield folder, int(parent), int(session)


def children(parent: int) -> list[int]:
    """Ranks that rank 0 has started, not its readers."""
    found = []
    for folder, its_parent, _ in _living():
        with contextlib.suppress(OSError):
            if its_parent == parent and b"LOCAL_RANK=1" in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def in_session(leader: int) -> list[int]:
    """Living processes of the run."""
    return [int(folder.name) for folder, _, session in _living() if session == leader]


def kill_once(exp: Path, flags: dict[str, object], log: Path, delay: float) -> tuple[str, float, float, list[str]]:
    """Where it struck, how long rank 0 and the last process lived on, and what was wrong with their end."""
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        run = subprocess.Popen(
            [sys.executable, "distill.py", "--config", "conf/demo.yaml", *words, "--exp_dir", str(exp)],
            cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip
    while not (ranks := children(run.pid)):
        if run.poll() is not None:
            raise RuntimeError(log.read_text()[-2000:])
        time.sleep(0.02)
    time.sleep(delay)
    where = "training" if "update/s" in log.read_text() or (exp / "ckpts").exists() else "start"
    begin = time.monotonic()
    with contextlib.suppress(ProcessLookupError):
        os.kill(ranks[0], signal.SIGKILL)
    wrong = []
    try:
        code = run.wait(END_SECONDS)
        taken = time.monotonic() - begin
        lines = [line for line in log.read_text().replace("\r", "\n").splitlines() if line.startswith("error: ")]
        if code != 1 or len(lines) != 1 or "Traceback" in log.read_text():
            wrong.append(f"code {code}, {len(lines)} lines: {log.read_text()[-1500:]}")
    except subprocess.TimeoutExpired:
        taken = time.monotonic() - begin
        wrong.append("rank 0 lives on")
    while (left := in_session(run.pid)) and time.monotonic() - begin < END_SECONDS:
        time.sleep(0.1)
    last = time.monotonic() - begin
    if left:
        wrong.append(f"{len(left)} processes live on")
        os.killpg(run.pid, signal.SIGKILL)
    return where, taken, last, wrong


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=16.0, help="seconds from the start of rank 1 to the kill")
    options = parser.parse_args()
    base = Path(tempfile.mkdtemp(prefix="kills"))
    flags = {**prepare(base), "trainer.devices": 2, "data.num_workers": 1, "optim.max_steps": 1_000_000}
    rng, wheres, wrong = random.Random(options.seed), Counter[str](), list[str]()
    taken, lasts = list[float](), list[float]()
    for i in tqdm(range(options.kills), unit="kill"):
        exp = base / f"run{i // 5}"  # a few kills of one run: it also resumes
        where, seconds, last, found = kill_once(exp, flags, base / "log", rng.uniform(0.05, options.longest))
        wheres[where] += 1
        taken.append(seconds)
        lasts.append(last)
        wrong += found
    print(f"{machine()}, seed {options.seed}\n")
    columns = ("kills", "at the start", "in training", "seconds until rank 0 ended: median", "longest",
               "until the last process ended: longest", "wrong")  # fmt: skip
    times = (f"{value:.1f}" for value in (statistics.median(taken), max(taken), max(lasts)))
    row = (str(options.kills), str(wheres["start"]), str(wheres["training"]), *times, str(len(wrong)))
    print(markdown_table(columns, [row]))
    for text in wrong:
        print(text)
    shutil.rmtree(base)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
