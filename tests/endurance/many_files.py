"""Features of 20,000 files in nested folders where 256 files may be open, stopped twice, two of them broken.

    python -m tests.endurance.many_files [--files 20000] [--stops 2]

Every file must have its features after the last run, none computed twice, the broken ones listed, the exit code 1;
and a sample must be what the model gives for the file alone. Needs requirements/dev.txt.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import torch
from tqdm import tqdm

from tests.configs import TINY
from tests.helpers import ROOT
from wav2vec2 import save_model, wav2vec2_model

OPEN_FILES = 256


def prepare(folder: Path, count: int) -> list[Path]:
    """A model and the corpus; the paths of what is sound."""
    torch.manual_seed(0)
    save_model(folder / "model.pth", wav2vec2_model(**TINY))
    draw, paths = np.random.default_rng(0), []
    for i in tqdm(range(count), "writing", unit="file"):
        name = "same.flac" if i % 970 < 97 else f"{i}.wav"
        path = folder / "audio" / f"{i % 10}" / f"{i % 97}" / f"{i // 970}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        samples = 0.1 * draw.standard_normal(draw.integers(3_000, 12_000))
        soundfile.write(path, samples.astype(np.float32), 16_000)
        paths.append(path)
    for path in paths[7], paths[count // 2]:
        path.write_bytes(path.read_bytes()[:100])
    broken = {paths[7], paths[count // 2]}
    return [path for path in dict.fromkeys(paths) if path not in broken]


def run(folder: Path, stop_at: int | None) -> tuple[int, str]:
    """One run, stopped when so many files are there; exit code and what it printed."""
    words = [sys.executable, "extract_features.py", "model.pth", "audio", "--out", "out"]
    words = [*words[:1], str(ROOT / words[1]), *words[2:]]
    limit = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))  # noqa: E731
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen(words, cwd=folder, stderr=log, stdout=log, preexec_fn=limit)
        journal = folder / "out" / "features.jsonl"
        while stop_at is not None and process.poll() is None:
            if journal.is_file() and journal.read_bytes().count(b"\n") > stop_at:
                process.send_signal(random.choice((signal.SIGTERM, signal.SIGINT)))
                break
            time.sleep(0.2)
        code = process.wait()
        log.seek(0)
        return code, log.read()


def main() -> None:
    """Run and check; exit code 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--stops", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        sound = prepare(folder, arguments.files)
        for i in range(arguments.stops):
            code, log = run(folder, arguments.files * (i + 1) // (arguments.stops + 1))
            print(f"run {i + 1}: exit code {code}: {log.strip().splitlines()[-1]}")
            assert code == 75, log
        lines = (folder / "out" / "features.jsonl").read_text().splitlines()[1:]
        finished = [folder / "out" / f"{json.loads(line)['key']}.npy" for line in lines]
        written = {path: path.stat().st_mtime_ns for path in finished}
        begin = time.monotonic()
        code, log = run(folder, None)
        print(f"last run, {time.monotonic() - begin:.0f} s: exit code {code}\n{log.strip()}")
        assert code == 1, log
        targets = {folder / "out" / path.relative_to(folder / "audio").with_suffix(".npy"): path for path in sound}
        assert set((folder / "out").rglob("*.npy")) == targets.keys()
        assert all(path.stat().st_mtime_ns == then for path, then in written.items())
        assert len((folder / "out" / "broken.tsv").read_text().splitlines()) == 2
        model = wav2vec2_model(**TINY)
        model.load_state_dict(torch.load(folder / "model.pth", weights_only=True)["state_dict"])
        for target in random.sample(sorted(targets), 50):
            samples = torch.from_numpy(soundfile.read(targets[target], dtype="float32")[0])
            torch.testing.assert_close(torch.from_numpy(np.load(target)), model.embed(samples)[0], atol=2e-5, rtol=1e-4)
        begin = time.monotonic()
        code, log = run(folder, None)
        assert code == 1 and f"{len(sound)} of {len(sound) + 2} files were finished before" in log, log
        print(f"run again, {time.monotonic() - begin:.0f} s: nothing to do but the 2 broken files")


if __name__ == "__main__":
    main()
