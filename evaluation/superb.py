"""The ten tasks of SUPERB on one model, by s3prl's run_downstream with the published settings; run again to resume.

    S3PRL=/path/to/s3prl scripts/superb.sh final.pth DATA_ROOT [PR KS ...] --out DIR [--device cuda] [-u armhubert]

S3PRL is a checkout of s3prl 0.4.18: the package on PyPI lacks the tasks' configs and lexicons. DATA_ROOT holds, or
links to, the corpora as s3prl's SUPERB guide prepares them:

    LibriSpeech  speech_commands_v0.01  speech_commands_test_set_v0.01  fluent_speech_commands_dataset
    quesst14Database  SNIPS  VoxCeleb1  IEMOCAP  Libri2Mix (data folders train, dev and test)

QbE and SD are scored by programs that come with their data (NIST's TWV) and with s3prl's guide (dscore).
OUT/results.json collects the tasks; python -m evaluation.superb_score OUT/results.json gives the scores.
"""

import hashlib
import json
import logging
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from distillation.commandline import make_parser, parse_arguments
from distillation.errors import UserError, command
from distillation.stopping import keeping, run_child
from distillation.training.lock import run_lock
from evaluation.s3prl_upstream import UPSTREAMS
from wav2vec2 import load_model
from wav2vec2.checkpoint import fingerprint, write_text

logger = logging.getLogger(__name__)

RUN = (sys.executable, "-m", "evaluation.s3prl_upstream", "s3prl.run_downstream")
EXPERT = "config.downstream_expert"
FOLDS = tuple(f"fold{i}" for i in range(1, 6))
Results = dict[str, float]


@dataclass
class Task:
    """What differs between the tasks that train and are then tested on their best checkpoint."""

    downstream: str
    data: dict[str, str]  # settings that name corpora: key of the expert's config -> folder in DATA_ROOT
    metrics: dict[str, tuple[str, float]]  # column of the results -> what is printed before the value, and a factor
    config: str | None = None
    settings: dict[str, str] = field(default_factory=dict)  # others that the published runs change
    best: str = "dev-best.ckpt"
    split: str = "test"


TASKS = {
    name: Task(**settings)
    for name, settings in yaml.safe_load(
        Path(__file__).with_name("superb_tasks.yaml").read_text(encoding="utf-8")
    ).items()
}


@dataclass
class Superb:
    """One model, its data and its folder."""

    model: Path
    data: Path
    out: Path
    checkout: Path
    device: str
    upstream: str

    def run(self, log: Path, *words: object, program: tuple[str, ...] | None = None) -> str:
        """Run a program in the checkout and return what it printed; also kept in ``log``.

        Raises:
            Signalled: a signal, which the program was sent as well, asked to stop.
            UserError: it failed.
        """
        program = RUN if program is None else program
        root = Path(__file__).parent.parent
        paths = [str(self.checkout), str(root), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            code = run_child(
                [*program, *map(str, words)], cwd=self.checkout / "s3prl", env=environment, stdout=file,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
        printed = log.read_text(errors="replace")
        if code:
            last = (printed.strip() or "nothing was printed").splitlines()[-1]
            raise UserError(f"{log}: {Path(program[-1]).name} ended with {code}: {last}")
        return printed

    def once(self, marker: Path, log: Path, *words: object) -> None:
        """Run it unless it has been finished, which the marker tells."""
        if not marker.is_file():
            self.run(log, *words)
            marker.touch()

    def train(self, task: Task, exp: Path, more: dict[str, str] | None = None) -> None:
        """Train, or go on from the newest checkpoint."""
        config = [] if task.config is None else ["-c", task.config]
        self.once(exp / "trained", exp / "train.log", "-m", "train", "-a", "-p", exp, "-u", self.upstream, "-k",
                  self.model, "-d", task.downstream, *config, "-o", self.overrides(task, more), "--device",
                  self.device)  # fmt: skip

    def overrides(self, task: Task, more: dict[str, str] | None = None) -> str:
        """Settings in the form of run_downstream's -o."""
        data = {f"{EXPERT}.{key}": str(self.data / folder) for key, folder in task.data.items()}
        return ",,".join(f"{key}={value}" for key, value in {**data, **task.settings, **(more or {})}.items())

    def evaluate(self, task: Task, exp: Path, checkpoint: Path) -> Results:
        """Metrics of one checkpoint, kept beside it."""
        log = exp / f"{checkpoint.stem}.{task.split}.log"
        kept = log.with_suffix(".json")
        with checkpoint.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if not kept.is_file() or read_json(kept).get("checkpoint") != digest:
            printed = self.run(log, "-m", "evaluate", "-t", task.split, "-e", checkpoint, "--device", self.device)
            found = {name: read_metric(printed, *pattern, log) for name, pattern in task.metrics.items()}
            write_text(kept, json.dumps({"checkpoint": digest, "metrics": found}) + "\n")
        return read_json(kept)["metrics"]


def read_metric(
    printed: str, label: str, factor: float, log: Path, best: Callable[[list[float]], float] | None = None
) -> float:
    """The last value that is printed after a label, or the best of all."""
    found = [float(x) for x in re.findall(rf"{re.escape(label)}[^0-9\n]*([0-9]*\.?[0-9]+(?:e-?[0-9]+)?)", printed)]
    if not found:
        raise UserError(f"{log}: no line with {label!r} in it")
    return factor * (best(found) if best else found[-1])


def read_json(path: Path) -> dict[str, Any]:
    """A file that an earlier start left."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path}: damaged; move it away")
    return content


def standard(superb: Superb, task: Task, exp: Path) -> Results:
    """Train once, test the best checkpoint."""
    superb.train(task, exp)
    return superb.evaluate(task, exp, exp / task.best)


def emotion(superb: Superb, task: Task, exp: Path) -> Results:
    """The mean of five folds."""
    runs = []
    for fold in FOLDS:
        superb.train(task, exp / fold, {f"{EXPERT}.datarc.test_fold": fold})
        runs.append(superb.evaluate(task, exp / fold, exp / fold / task.best))
    return {name: statistics.mean(run[name] for run in runs) for name in task.metrics}


def speaker_verification(superb: Superb, task: Task, exp: Path) -> Results:
    """The best of all checkpoints, as s3prl's own script has it."""
    superb.train(task, exp)
    checkpoints = sorted(exp.glob("states-*.ckpt"))
    if not checkpoints:
        raise UserError(f"{exp}: no states-*.ckpt to test")
    runs = [superb.evaluate(task, exp, checkpoint) for checkpoint in checkpoints]
    return {name: min(run[name] for run in runs) for name in task.metrics}


def diarization(superb: Superb, task: Task, exp: Path) -> Results:
    """The best threshold and median filter by dscore."""
    superb.train(task, exp)
    superb.once(exp / "tested", exp / "test.log", "-m", "evaluate", "-e", exp / task.best, "--device", superb.device)
    log = exp / "score.log"
    printed = superb.run(log, exp, superb.data / "Libri2Mix" / "test",
                         program=("bash", "downstream/diarization/score.sh"))  # fmt: skip
    return {name: read_metric(printed, *pattern, log, min) for name, pattern in task.metrics.items()}


def query_by_example(superb: Superb, task: Task, exp: Path) -> Results:
    """Nothing is trained: the layer that is best on dev, on test."""
    settings = f"{superb.overrides(task)},,{EXPERT}.dtwrc.dist_method=cosine"
    scorer = superb.data / "quesst14Database" / "scoring"

    def score(layer: int, split: str) -> float:
        folder, log = exp / f"layer{layer}_{split}", exp / f"layer{layer}_{split}.score.log"
        superb.once(
            folder / "done", folder / "log.txt", "-m", "evaluate", "-t", split, "-u", superb.upstream, "-k",
            superb.model, "-l", layer, "-d", task.downstream, "-p", folder, "-o", settings, "--device", superb.device,
        )  # fmt: skip
        printed = superb.run(log, folder, scorer / f"groundtruth_quesst14_{split}", -10,
                             program=("bash", str(scorer / "score-TWV-Cnxe.sh")))  # fmt: skip
        return read_metric(printed, *task.metrics["QbE"], log)

    layers = range(load_model(superb.model).num_layers + (UPSTREAMS[superb.upstream].first is not None))
    return {"QbE": score(max(layers, key=lambda layer: score(layer, "dev")), "eval")}


SPECIAL: dict[str, Callable[[Superb, Task, Path], Results]] = {
    "ER": emotion, "ASV": speaker_verification, "SD": diarization, "QbE": query_by_example,
}  # fmt: skip


def run(superb: Superb, tasks: list[str]) -> Path:
    """Run the tasks that results.json lacks; its path.

    Raises:
        Stopped: a signal asked for it; a task goes on from the newest checkpoint that s3prl has left.
        UserError: a task, a model, a corpus or a program that is not there, or a folder of another model.
    """
    if unknown := [task for task in tasks if task not in TASKS]:
        raise UserError(f"no task {unknown[0]!r}; there are {', '.join(TASKS)}")
    measured = {"model": fingerprint(load_model(superb.model)), "upstream": superb.upstream}  # is there a model?
    if not superb.data.is_dir():
        raise UserError(f"{superb.data}: no such folder")
    if not (superb.checkout / "s3prl" / "run_downstream.py").is_file():
        raise UserError(f"S3PRL={superb.checkout}: no checkout of s3prl; git clone -b v0.4.18 its repository there")
    out = superb.out
    results_path = out / "results.json"
    kept = f"the finished tasks are in {results_path}, what the others have so far is beside it"
    with run_lock(out, owner=True), keeping(kept):
        owner = out / "model.json"
        if not owner.is_file():
            write_text(owner, json.dumps(measured, indent=1) + "\n")
        elif read_json(owner) != measured:
            raise UserError(f"{out}: holds the results of another model or upstream: use another --out")
        results: Results = read_json(results_path) if results_path.is_file() else {}
        for name in tqdm(tasks or list(TASKS), "SUPERB", unit="task"):
            task = TASKS[name]
            if task.metrics.keys() <= results.keys():
                continue
            for folder in task.data.values():
                if not (superb.data / folder).exists():
                    raise UserError(f"{superb.data / folder}: missing, {name} needs it")
            results |= SPECIAL.get(name, standard)(superb, task, out / name)
            write_text(results_path, json.dumps(results, indent=1) + "\n")
            logger.info("%s: %s", name, {key: round(results[key], 4) for key in task.metrics})
    return results_path


@command
def main() -> None:
    """Parse the command line and run."""
    parser = make_parser(__doc__, prog="scripts/superb.sh")
    parser.add_argument("model", type=Path, help="Model file.")
    parser.add_argument("data", type=Path, help="Folder of the corpora.")
    parser.add_argument("tasks", nargs="*", default=[], help=f"Any of {' '.join(TASKS)}; all by default.")
    parser.add_argument("--out", type=Path, required=True, help="Folder of this model's runs and results.")
    parser.add_argument("--device", type=str, default="cuda", help="Of torch.")
    text = f"Which states the tasks get, one of {', '.join(UPSTREAMS)}; see docs/superb.md."
    parser.add_argument("-u", "--upstream", type=str, default="dphubert", help=text)
    flags = parse_arguments(parser)
    if flags.upstream not in UPSTREAMS:
        raise UserError(f"--upstream {flags.upstream}: choose one of {', '.join(UPSTREAMS)}")
    checkout = Path(os.environ.get("S3PRL", "s3prl")).resolve()
    superb = Superb(
        flags.model.resolve(), flags.data.resolve(), flags.out.resolve(), checkout, flags.device, flags.upstream
    )
    path = run(superb, flags.tasks)
    print(f"-> {path}; python -m evaluation.superb_score {path}")


if __name__ == "__main__":
    main()
