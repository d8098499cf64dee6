"""Where the task's loss belongs, and what noise in training is worth: error rates and words, clean and in noise.

    scripts/demo.sh demo_out                             # once: the corpus and the tiny teacher
    python -m benchmarks.recognisers --demo demo_out     # then hours on the CPU; run again to resume

All compressed models have one size, and all compressed recognisers were trained for equally many updates:

- compress_tune: the teacher is compressed by its features, then fine-tuned with CTC;
- tune_compress: it is fine-tuned, then compressed by features alone; the output layer is the teacher's, behind the map
  with which the student's last layer has learnt to predict the teacher's;
- tune_ctc: it is fine-tuned, then compressed with CTC in the loop (objective.ctc);
- tune_ctc_noise: the same with data.noise (babble of the batch and noise made on the spot);
- features, features_noise: compressed by features, for the words of mini-SUPERB; features is what compress_tune tunes.

Every run goes through the ordinary stages. Noise to test in is of other kinds than noise to train in (noises.py), the
same for all models. With --arms and --seeds a part is trained, e.g. by two processes at once; what is finished is
measured and shown. Prints two tables, writes recognisers.json and recognisers.svg.
"""

import json
import logging
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.minisuperb.evaluate import STRENGTHS, Data, Features, start
from benchmarks.noises import make_noises
from benchmarks.plots import write
from benchmarks.runs import ROOT, read_row, train
from demo.frame_probe import linear_probe
from demo.labels import IGNORE, Utterance
from distillation.commandline import make_parser, parse_arguments
from distillation.config import RECIPES
from distillation.data.noise import at_level
from distillation.errors import UserError, command
from distillation.stopping import keeping, run_child
from evaluation.recognition import Measuring, measure
from evaluation.tables import markdown_table
from wav2vec2 import Wav2Vec2Model, save_model
from wav2vec2.checkpoint import load_checkpoint, write_text
from wav2vec2.counting import count_params

logger = logging.getLogger(__name__)

DEMO = RECIPES / "demo.yaml"
SNRS = (20.0, 10.0, 5.0, 0.0)
CONDITIONS = ("clean", *(f"{snr:g} dB" for snr in SNRS))
NOISE: dict[str, Any] = {"share": 0.5, "snr": [0.0, 20.0], "babble": 0.5}
CTC: dict[str, Any] = {"weight": 0.3, "distill": 0.3}
TITLES = {
    "compress_tune": "compressed, then fine-tuned",
    "tune_compress": "fine-tuned, then compressed by features",
    "tune_ctc": "fine-tuned, then compressed with CTC",
    "tune_ctc_noise": "the same with noise",
    "features": "compressed by features",
    "features_noise": "the same with noise",
}
RECOGNISERS = ("compress_tune", "tune_compress", "tune_ctc", "tune_ctc_noise")


@dataclass
class Setup:
    """What is compared."""

    demo: Path = Path("demo_out")
    """Folder that scripts/demo.sh has left: teacher.pth and its corpus."""
    out: Path | None = None
    """Folder of the runs; DEMO/recognisers by default."""
    arms: list[str] = field(default_factory=lambda: list(TITLES))
    """Any of compress_tune, tune_compress, tune_ctc, tune_ctc_noise, features, features_noise."""
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    """A run each."""
    steps: tuple[int, int] = (850, 350)
    """Updates of both steps where a fine-tuned teacher is compressed."""
    features: tuple[int, int] = (350, 150)
    """Updates of both steps of the others; the rest, to as many in all, fine-tunes compress_tune."""
    tuning: int = 1500
    """Updates of the teacher's own fine-tuning."""
    num_params: int = 388_000
    """Size of the compressed models, without output layer."""

    @property
    def folder(self) -> Path:
        """Of the runs."""
        return (self.out or self.demo / "recognisers").resolve()

    @property
    def transcripts(self) -> list[Path]:
        """To train and to measure on."""
        return [(self.demo / "corpus" / "LibriSpeech" / part).resolve() for part in ("train-clean-100", "dev-clean")]


def recipe_of(
    setup: Setup, teacher: Path, seed: int, steps: tuple[int, int], objective: dict[str, Any], noise: bool
) -> dict[str, Any]:
    """The demo recipe on whole transcribed utterances, to the wanted size."""
    model = load_checkpoint(teacher).model
    before = count_params(model)
    first, second = steps
    faster = max(1.0, read_row(DEMO).optim.max_steps / first)
    train_set, valid_set = setup.transcripts
    return {
        "base": str(DEMO),
        "teacher_ckpt": str(teacher),
        "seed": seed,
        "data": {
            "crop": False,
            "transcripts": {"train": str(train_set), "valid": str(valid_set)},
            "noise": NOISE if noise else None,
        },
        "objective": objective,
        "pruning": {
            "target_sparsity": 1 - (setup.num_params + count_params(model.aux)) / before,
            "warmup_steps": round(0.6 * first),
            "lr_lagrangian": 0.015 * faster,
            "lr_masks": 0.05 * faster,
        },
        "optim": {"max_steps": first, "warmup_steps": max(1, first // 10)},
        "final": {"max_steps": second, "warmup_steps": max(1, second // 10)},
        "trainer": {"validate_every": first, "checkpoint_every": first},
    }


def tune(setup: Setup, model: Path, exp: Path, seed: int, updates: int) -> Path:
    """Fine-tune a model, or go on; the recogniser."""
    final, (train_set, valid_set) = exp / "final.pth", setup.transcripts
    if (exp / "results.json").is_file():
        return final
    words = [
        sys.executable, ROOT / "finetune_ctc.py", model, "--train", train_set, "--valid", valid_set, "--exp_dir", exp,
        "--max_steps", updates, "--freeze_steps", 50, "--seconds_per_batch", 20, "--lr", 1e-3, "--head_lr", 5e-3,
        "--validate_every", updates, "--workers", 0, "--seed", seed, "--accelerator", "cpu",
    ]  # fmt: skip
    exp.mkdir(parents=True, exist_ok=True)
    with (exp / "log.txt").open("a") as log:
        if run_child(list(map(str, words)), stdout=log, stderr=log):
            raise UserError(f"finetune_ctc.py failed, see {exp / 'log.txt'}")
    return final


def behind_the_map(path: Path) -> Path:
    """A student compressed by features, whose output layer gets what its last layer predicts of the teacher's.

    The map is the objective's, of the last matched layer, and linear: it is multiplied into the output layer.
    """
    out = path.with_name("mapped.pth")
    if not out.is_file():
        checkpoint = load_checkpoint(path)
        model, last = checkpoint.model, max(int(name.partition(".")[0]) for name in checkpoint.heads)
        weight, bias = (checkpoint.heads[f"{last}.{name}"] for name in ("weight", "bias"))
        assert model.aux is not None
        with torch.no_grad():
            model.aux.bias.add_(model.aux.weight @ bias)
            model.aux.weight.copy_(model.aux.weight @ weight)
        save_model(out, model)
    return out


def run(setup: Setup, arm: str, seed: int) -> Path:
    """Train what is not trained yet; the model to measure.

    Raises:
        Signalled: a signal asked for it; the stage has saved.
        UserError: a stage failed, or a folder holds a run with other settings.
    """
    plain, exp = (setup.demo / "teacher.pth").resolve(), setup.folder / arm / f"seed{seed}"
    if arm == "compress_tune":
        return tune(setup, run(setup, "features", seed), exp, seed, sum(setup.steps) - sum(setup.features))
    if arm.startswith("features"):
        return train(exp, recipe_of(setup, plain, seed, setup.features, {}, arm.endswith("noise")))
    teacher = tune(setup, plain, setup.folder / "teacher", 0, setup.tuning)
    if arm == "tune_compress":
        return behind_the_map(train(exp, recipe_of(setup, teacher, seed, setup.steps, {}, False)))
    return train(exp, recipe_of(setup, teacher, seed, setup.steps, {"ctc": CTC}, arm.endswith("noise")))


def words_in_noise(model: Wav2Vec2Model, data: Data, noise: Path) -> list[float]:
    """Words per frame in percent, by condition: the probe of mini-SUPERB, fitted on clean audio."""
    features, label = Features(model.extract_features), data.labels["words"]
    train_set = features(data.train)
    choose = torch.tensor([u.speaker in data.choosing for u in data.train for _ in range(u.num_frames)])
    tests = [features(data.test), *(features(disturbed(data.test, snr, noise)) for snr in SNRS)]
    known, expected = (torch.cat([label(u) for u in some]) for some in (data.train, data.test))
    found = linear_probe(
        torch.cat(train_set), known, torch.cat([frames for test in tests for frames in test]), len(label), steps=600,
        strengths=STRENGTHS, choose=choose,
    )  # fmt: skip
    counted = expected != IGNORE
    return [100 * (part == expected)[counted].float().mean().item() for part in found.split(len(expected))]


def disturbed(utterances: list[Utterance], snr: float, noise: Path) -> list[Utterance]:
    """The same utterances in noise."""
    disturb = at_level(snr, [noise], 0)
    result = []
    for number, u in enumerate(utterances):
        (waveform,), _ = disturb([u.waveform.numpy()], number)
        samples = (32768 * torch.from_numpy(waveform)).round().clamp(-32768, 32767).to(torch.int16)
        result.append(Utterance(u.id, u.speaker, u.text, samples, u.phones, u.words))
    return result


def measured(path: Path, kind: str, function: Any) -> list[float]:
    """What a function says of a model file, kept beside it."""
    kept = path.with_suffix(f".{kind}.json")
    if not kept.is_file():
        write_text(kept, json.dumps(function(load_checkpoint(path).model.eval())))
    return json.loads(kept.read_text())


def table(rows: dict[str, list[list[float]]]) -> str:
    """Markdown: per model and condition the mean over seeds, and their standard deviation."""

    def cell(values: tuple[float, ...]) -> str:
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.1f}{spread}"

    lines = [[name, *(cell(values) for values in zip(*runs, strict=True))] for name, runs in rows.items() if runs]
    return markdown_table(["model", *CONDITIONS], lines)


def draw(rates: dict[str, list[list[float]]], words: dict[str, list[list[float]]]) -> Figure:
    """Error rates and words against the level of the noise."""
    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    titles = "word error rate, %", "mini-SUPERB, words per frame, %"
    for axis, rows, title in zip(figure.subplots(1, 2), (rates, words), titles):
        for i, (name, runs) in enumerate(rows.items()):
            means = [statistics.mean(values) for values in zip(*runs, strict=True)]
            style = {"color": "0.3", "linestyle": "--"} if name == "teacher" else {"color": f"C{i - 1}"}
            axis.plot(range(len(CONDITIONS)), means, marker="o", markersize=4, label=name, **style)
        axis.set_xticks(range(len(CONDITIONS)), CONDITIONS)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.2)
        if rows:
            axis.legend(fontsize=7.5)
    return figure


def compare(setup: Setup) -> None:
    """Train, measure, print and plot.

    Raises:
        Stopped: a signal asked for it.
        UserError: a setting or a file that does not fit.
    """
    if unknown := [arm for arm in setup.arms if arm not in TITLES]:
        raise UserError(f"--arms: no arm {unknown[0]!r}; there are {', '.join(TITLES)}")
    plain, out = setup.demo / "teacher.pth", setup.folder
    for path in (plain, *setup.transcripts):
        if not path.exists():
            raise UserError(f"{path}: no such file; run scripts/demo.sh {setup.demo} first")
    logging.getLogger("distillation.data.loaders").setLevel(logging.WARNING)
    noise = make_noises(out / "noise")
    measuring = Measuring(setup.transcripts[1], snr=list(SNRS), noise=[noise])
    rates: dict[str, list[list[float]]] = {}
    words: dict[str, list[list[float]]] = {}

    def error_rates(model: Wav2Vec2Model) -> list[float]:
        return [found["wer"] for found in measure(model, measuring, "model").values()]

    with keeping(f"the runs, also the one that was training, are in {out}"):
        _, data = start(setup.demo, None, "teacher.pth")
        runs = [(arm, seed) for seed in setup.seeds for arm in setup.arms]
        finals = {key: run(setup, *key) for key in tqdm(runs, desc="train", unit="run", dynamic_ncols=True)}
        if any(arm in RECOGNISERS for arm in setup.arms):
            rates["teacher"] = [
                measured(tune(setup, plain.resolve(), out / "teacher", 0, setup.tuning), "wer", error_rates)
            ]
        if any(arm not in RECOGNISERS for arm in setup.arms):
            words["teacher"] = [measured(plain.resolve(), "noise", lambda model: words_in_noise(model, data, noise))]
        for (arm, _), final in tqdm(finals.items(), desc="measure", unit="model", dynamic_ncols=True):
            if arm in RECOGNISERS:
                rates.setdefault(TITLES[arm], []).append(measured(final, "wer", error_rates))
            else:
                found = measured(final, "noise", lambda model: words_in_noise(model, data, noise))
                words.setdefault(TITLES[arm], []).append(found)
    sizes = {TITLES[arm]: count_params(load_checkpoint(path).model) for (arm, _), path in finals.items()}
    content = {"conditions": CONDITIONS, "wer": rates, "words": words, "parameters": sizes}
    written = write(out, "recognisers", content, draw(rates, words))
    print(f"Word error rate, %, {len(setup.seeds)} seeds:\n\n{table(rates)}\n" if rates else "", end="")
    print(f"\nmini-SUPERB, words per frame, %:\n\n{table(words)}\n" if words else "", end="")
    print(f"\n-> {written}")


@command
def main() -> None:
    """Run the comparison."""
    parser = make_parser(__doc__)
    parser.add_class_arguments(Setup)
    compare(Setup(**vars(parse_arguments(parser))))


if __name__ == "__main__":
    main()
