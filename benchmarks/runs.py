"""Recipes as runs of a comparison: scaled to a length and a size, and trained by the ordinary stages."""

import math
import os
import resource
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from distillation.budget import Parameters
from distillation.config import Recipe, flat_settings, parse_recipe
from distillation.errors import UserError
from distillation.identity import FREE, NAMES
from distillation.optimisation import OptimConfig
from distillation.stopping import run_child
from distillation.students import StudentConfig, ThinStudent, build_student
from distillation.training.record import describe, differences
from wav2vec2 import Wav2Vec2Model
from wav2vec2.checkpoint import write_text
from wav2vec2.counting import count_params

ROOT = Path(__file__).parent.parent
CPU_SECONDS = "cpu_seconds.txt"  # a line per stage that ran, in the folder of a run: nan until it ends


def used_params(model: Wav2Vec2Model) -> int:
    """Parameters that ``extract_features`` uses."""
    return count_params(model) - count_params(model.encoder.transformer.upsampler)


def fit_thin(wanted: ThinStudent, teacher: Wav2Vec2Model, budget: int) -> ThinStudent:
    """The thin student of the wanted size, as deep as the teacher, whose ratio of FFN units and width is closest."""
    convs, config = teacher.config["extractor_conv_layer_config"], teacher.config
    heads = math.gcd(*(n for n in config.get("encoder_num_heads") or config["encoder_total_num_heads"]))
    step = math.lcm(heads, config["encoder_pos_conv_groups"])
    candidates = []
    for width in range(step, teacher.embed_dim + 1, step):

        def student(ffn: int, width: int = width) -> ThinStudent:
            return replace(
                wanted,
                num_layers=teacher.num_layers,
                width=width,
                heads=heads,
                ffn=ffn,
                channels=[convs[0][0] // 4, convs[0][0] // 2, width],
                pos_conv_kernel=config["encoder_pos_conv_kernel"],
                pos_conv_groups=config["encoder_pos_conv_groups"],
            )

        with torch.random.fork_rng():
            least, more = (used_params(build_student(StudentConfig(thin=student(n)), teacher)) for n in (1, 2))
        ffn = 1 + round((budget - least) / (more - least))
        if ffn >= 1:
            candidates.append((abs(math.log(ffn / width * wanted.width / wanted.ffn)), student(ffn)))
    if not candidates:
        raise UserError(f"no thin student of {budget:,} parameters fits this teacher")
    return min(candidates, key=lambda candidate: candidate[0])[1]


def sized(recipe: Recipe, teacher: Wav2Vec2Model, budget: int) -> dict[str, Any]:
    """The settings that give a recipe's student ``budget`` parameters; copied layers have the size they have.

    Raises:
        UserError: it prunes to another cost, or has nothing that could be sized.
    """
    if recipe.pruning.units:
        if recipe.pruning.cost != Parameters.name:
            raise UserError(f"pruning.cost is {recipe.pruning.cost}, and the students are to have as many parameters")
        return {"pruning": {"target": None, "target_sparsity": 1 - budget / count_params(teacher)}}
    if recipe.student.slice is not None:
        return {"student": {"slice": {"num_params": budget}}}
    if recipe.student.thin is not None:
        return {"student": {"thin": asdict(fit_thin(recipe.student.thin, teacher, budget))}}
    if recipe.student.layers is None:
        raise UserError("it prunes nothing, and its student is the whole teacher: there is no size to set")
    return {}


def scaled(recipe: Recipe, steps: int) -> dict[str, Any]:
    """The settings that give a recipe ``steps`` updates, both steps together, every phase its share of them.

    Masks and multipliers move by their rates in every update: shorter runs raise these in proportion, longer ones
    reach the target in any case.

    Raises:
        UserError: the recipe's length is in epochs.
    """
    own, own_final = recipe.optim, recipe.final if recipe.pruning.units else None
    if own.max_epochs is not None or (own_final is not None and own_final.max_epochs is not None):
        raise UserError("its length is in epochs: give max_steps, of which a comparison takes the shares")
    second = 0 if own_final is None else own_final.max_steps
    first = round(steps * own.max_steps / (own.max_steps + second))
    if first < 1 or steps - first < (own_final is not None):
        raise UserError(f"{steps} updates leave none for step {2 if first else 1}")
    settings: dict[str, Any] = {
        "optim": _lengths(own, first),
        "trainer": {"validate_every": first, "checkpoint_every": first},
    }
    if own_final is not None:
        settings["final"] = _lengths(own_final, steps - first)
    if pruning := recipe.pruning if recipe.pruning.units else None:
        faster = max(1.0, own.max_steps / first)
        settings["pruning"] = {
            "warmup_steps": round(pruning.warmup_steps * first / own.max_steps),
            "lr_lagrangian": pruning.lr_lagrangian * faster,
            "lr_masks": pruning.lr_masks * faster,
        }
    return settings


def _lengths(optim: OptimConfig, steps: int) -> dict[str, int]:
    share = steps / optim.max_steps
    return {
        "max_steps": steps,
        "warmup_steps": max(1, round(optim.warmup_steps * share)),
        "freeze_steps": round(optim.freeze_steps * share),
    }


def merged(*settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with sections, the later ones over the earlier."""
    result: dict[str, Any] = {}
    for one in settings:
        for key, value in one.items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = merged(result[key], value) if both else value
    return result


def read_row(path: Path) -> Recipe:
    """A recipe to compare.

    Raises:
        UserError: it is none.
    """
    return parse_recipe(["--config", str(path)])[0]


def train(exp: Path, settings: dict[str, Any]) -> Path:
    """Run the stages that are not finished; the final model. Writes the recipe and the seconds they take into ``exp``.

    Args:
        exp: folder of the run.
        settings: what a recipe holds; ``base`` is a path.

    Raises:
        Signalled: a signal asked for it; the stage has saved.
        UserError: a stage failed, or the folder holds a run with other settings, its recipe's among them.
    """
    path = exp / "recipe.yaml"
    settings = {**settings, "base": os.path.relpath(settings["base"], exp)}
    text = yaml.safe_dump(settings, sort_keys=False)
    if path.is_file() and path.read_text() != text:
        raise UserError(f"{path}: made with other settings; use another --out, or remove {exp}")
    if not path.is_file():
        write_text(path, text)
    if (began := exp / "config.yaml").is_file():
        settings_then, settings_now = (flat_settings(read_row(one)) for one in (began, path))
        changed = differences(settings_then, settings_now)
        changed = {name: pair for name, pair in changed.items() if name not in NAMES | FREE}
        if changed:
            raise UserError(f"{exp}: made with other settings, {describe(changed)}; use another --out, or remove it")
    pruned = bool(read_row(path).pruning.units)
    final = exp / "final" / "final.pth" if pruned else exp / "final.pth"
    if final.is_file():
        return final
    stages: list[list[object]] = [["distill.py", "--config", path, "--exp_dir", exp]]
    if pruned:
        stages.append(["prune.py", "--distilled_ckpt", exp / "ckpts" / "last.ckpt"])
        stages.append(["final_distill.py", "--config", path, "--student_ckpt", exp / "pruned.pth",
                       "--exp_dir", exp / "final"])  # fmt: skip
    counted = exp / CPU_SECONDS
    with (exp / "log.txt").open("a") as log:
        for stage in stages:
            command = [sys.executable, str(ROOT / str(stage[0])), *map(str, stage[1:])]
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            earlier = counted.read_text() if counted.is_file() else ""
            write_text(counted, f"{earlier}nan {stage[0]}\n")  # what is killed along with this process is not known
            try:
                code = run_child(command, stdout=log, stderr=log)
            finally:  # what a stage took before it was stopped counts too
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
                write_text(counted, f"{earlier}{spent:.1f} {stage[0]}\n")
            if code:
                last = (exp / "log.txt").read_text().strip().splitlines()[-1]
                raise UserError(f"{stage[0]} failed, see {exp / 'log.txt'}: {last}")
    return final


def cpu_seconds(exp: Path) -> float:
    """CPU seconds that all stages of a run have taken so far; NaN where some were not counted."""
    path = exp / CPU_SECONDS
    return sum(float(line.split()[0]) for line in path.read_text().splitlines()) if path.is_file() else math.nan


def finals_in(folder: Path) -> dict[str, list[Path]]:
    """The final models of a comparison's finished runs, by recipe and in the order of their seeds.

    Raises:
        UserError: there is none.
    """
    finals: dict[str, list[Path]] = {}
    runs = [run for run in folder.glob("*/seed*") if run.name.removeprefix("seed").isdecimal()]
    for run in sorted(runs, key=lambda run: (run.parent.name, int(run.name.removeprefix("seed")))):
        for path in (run / "final" / "final.pth", run / "final.pth"):
            if path.is_file():
                finals.setdefault(run.parent.name, []).append(path)
                break
    if not finals:
        raise UserError(f"{folder}: no finished run of benchmarks.compare_methods in it")
    return finals
