"""Train several methods with the same teacher, data, number of updates and parameters; compare what they keep.

    scripts/demo.sh demo_out                                # once: the corpus and the tiny teacher
    python -m benchmarks.compare_methods --demo demo_out    # then hours on the CPU; run again to resume

Every method is the demo recipe with another student, objective or pruning, and runs through the ordinary stages.
Methods that prune spend 30 % of the updates on step 2. All have one size, by default that of DistilHuBERT's two layers,
to 1 %; heads, which only training uses, come on top. The distance to the teacher is that of
benchmarks/linear_distance.py. Prints a table, writes compare.json and compare.svg.
"""

import json
import logging
import math
import os
import statistics
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from tqdm import tqdm

from benchmarks.compare_plot import draw
from benchmarks.linear_distance import linear_distances
from benchmarks.plots import write
from distillation.commandline import make_parser, parse_arguments
from distillation.config import RECIPES, parse_recipe
from distillation.errors import UserError, command
from distillation.objectives import Objectives
from distillation.stopping import keeping, run_child
from distillation.students import CopiedLayers, StudentConfig, ThinStudent, build_student
from evaluation.tables import markdown_table
from wav2vec2 import Wav2Vec2Model, load_model
from wav2vec2.checkpoint import fingerprint, load_checkpoint, write_text
from wav2vec2.counting import count_params

logger = logging.getLogger(__name__)

ROOT = Path(__file__).parent.parent
TOLERANCE = 0.01  # of the parameter budget
STEP_2_SHARE = 0.3  # of the updates of a method that prunes
DEMO_UPDATES = 500  # of step 1 in conf/demo.yaml, which the rates of its multipliers are tuned for

LAYERS = {"layer_to_layer": {"layers": [[0], [2, 4, 6]]}}
STAR: dict[str, Any] = {"temporal_relation": {"relative": True}}
MASK: dict[str, Any] = {"masking": {}}


@dataclass(frozen=True)
class Method:
    """A student, an objective, and whether it is pruned out of the teacher."""

    title: str
    objective: dict[str, Any]
    student: str = "copy"  # copy (pruned), slice, layers or thin
    ffn_ratio: float = 1.0  # of thin students, FFN units to width as published
    thin: tuple[tuple[str, Any], ...] = ()


METHODS = {
    "dphubert": Method("DPHuBERT", LAYERS),
    "slice": Method("uniform slice", LAYERS, "slice"),
    "distilhubert": Method(
        "DistilHuBERT",
        {
            "prediction_layer": {"layers": [2, 4, 6], "heads": "two_linear", "cos_type": "log_sig"},
            "extractor_gradient": 0.1,
        },
        "layers",
    ),
    "fithubert": Method("FitHuBERT", {"hint": {}}, "thin", 480 / 480, (("time_reduction", 2),)),
    "maskhubert": Method("MaskHuBERT", MASK, "thin", 640 / 480),
    "armhubert": Method(
        "ARMHuBERT", {**MASK, "scale_gradients": "released"}, "thin", 864 / 480, (("reuse_attention", "released"),)
    ),
    "starhubert": Method("STaRHuBERT", {"temporal_relation": {}}, "thin", 976 / 432),
    "dphubert_star": Method("DPHuBERT + STaR", STAR),
    "dphubert_mask": Method("DPHuBERT + masking", MASK),
    "dphubert_both": Method("DPHuBERT, layers and STaR", {**LAYERS, **STAR}),
}
DISTILHUBERT = CopiedLayers(norms="released")
DEFAULT = ["dphubert", "slice", "distilhubert", "fithubert", "starhubert", "dphubert_star"]


@dataclass
class Comparison:
    """What is compared."""

    demo: Path = Path("demo_out")
    """Folder that scripts/demo.sh has left: teacher.pth and data/."""
    out: Path | None = None
    """Folder of the runs; DEMO/compare by default."""
    methods: list[str] = field(default_factory=lambda: DEFAULT)
    """Any of dphubert, slice, distilhubert, fithubert, maskhubert, armhubert, starhubert, dphubert_star,
    dphubert_mask, dphubert_both."""
    seeds: int = 3
    """Runs per method."""
    steps: int = 1000
    """Updates per run, both steps together."""
    num_params: int | None = None
    """Size of the students; that of DistilHuBERT's two layers by default, the only one it can have."""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    """Of training; measured in float32 in any case."""


@dataclass
class Result:
    """One finished run."""

    method: str
    seed: int
    num_params: int  # of the model, without the upsampler that extract_features does not use
    num_heads: int  # parameters that only training used
    unexplained: list[float]  # per teacher layer, see linear_distance.py
    layers: list[int]  # per teacher layer, the student's layer that explains most


def used_params(model: Wav2Vec2Model) -> int:
    """Parameters that ``extract_features`` uses."""
    return count_params(model) - count_params(model.encoder.transformer.upsampler)


def fit_thin(method: Method, teacher: Wav2Vec2Model, budget: int) -> ThinStudent:
    """The thin student of the wanted size whose FFN units and width are closest to the published ratio."""
    convs, config = teacher.config["extractor_conv_layer_config"], teacher.config
    heads = math.gcd(*(n for n in config.get("encoder_num_heads") or config["encoder_total_num_heads"]))
    step = math.lcm(heads, config["encoder_pos_conv_groups"])
    candidates = []
    for width in range(step, teacher.embed_dim + 1, step):

        def student(ffn: int, width: int = width) -> ThinStudent:
            return ThinStudent(
                num_layers=teacher.num_layers,
                width=width,
                heads=heads,
                ffn=ffn,
                channels=[convs[0][0] // 4, convs[0][0] // 2, width],
                pos_conv_kernel=config["encoder_pos_conv_kernel"],
                pos_conv_groups=config["encoder_pos_conv_groups"],
                **dict(method.thin),
            )

        with torch.random.fork_rng():
            least, more = (used_params(build_student(StudentConfig(thin=student(n)), teacher)) for n in (1, 2))
        ffn = 1 + round((budget - least) / (more - least))
        if ffn >= 1:
            candidates.append((abs(math.log(ffn / width / method.ffn_ratio)), student(ffn)))
    if not candidates:
        raise UserError(f"no thin student of {budget:,} parameters fits this teacher")
    return min(candidates, key=lambda candidate: candidate[0])[1]


def recipe_of(method: Method, teacher: Wav2Vec2Model, budget: int, seed: int, comparison: Comparison) -> dict[str, Any]:
    """The demo recipe with what the method changes."""
    pruned, steps, demo = method.student == "copy", comparison.steps, comparison.demo
    first = round((1 - STEP_2_SHARE) * steps) if pruned else steps
    recipe: dict[str, Any] = {
        "base": os.path.relpath(RECIPES / "demo.yaml", demo),
        "teacher_ckpt": str(demo / "teacher.pth"),
        "teacher_layers": teacher.num_layers,
        "teacher_width": teacher.embed_dim,
        "seed": seed,
        "data": {"tsv_dir": str(demo / "data")},
        "objective": {"layer_to_layer": None, **method.objective},
        "optim": {"max_steps": first, "warmup_steps": max(1, first // 10)},
        "trainer": {"validate_every": first, "checkpoint_every": first, "precision": comparison.precision},
    }
    if pruned:
        before = count_params(teacher)
        recipe["pruning"] = {
            "target_sparsity": 1 - budget / before,
            "warmup_steps": round(0.6 * first),
            "lr_lagrangian": 0.015 * max(1.0, DEMO_UPDATES / first),
            "lr_masks": 0.05 * max(1.0, DEMO_UPDATES / first),
        }
        second = steps - first
        recipe["final"] = {"max_steps": second, "warmup_steps": max(1, second // 10)}
        return recipe
    recipe |= {"pruning": {"units": []}, "final": None}
    if method.student == "slice":
        recipe["student"] = {"slice": {"num_params": budget}}
    elif method.student == "layers":
        recipe["student"] = {"layers": asdict(DISTILHUBERT)}
    else:
        recipe["student"] = {"thin": asdict(fit_thin(method, teacher, budget))}
    return recipe


def train(exp: Path, recipe: dict[str, Any]) -> Path:
    """Run the stages that are not finished; the final model.

    Raises:
        Signalled: a signal asked for it; the stage has saved.
        UserError: a stage failed, or the folder holds a run with other settings.
    """
    pruned = recipe["pruning"].get("units") != []
    final = exp / "final" / "final.pth" if pruned else exp / "final.pth"
    path = exp / "recipe.yaml"
    recipe = {**recipe, "base": os.path.relpath(RECIPES / "demo.yaml", exp)}
    text = yaml.safe_dump(recipe, sort_keys=False)
    if path.is_file() and path.read_text() != text:
        raise UserError(f"{path}: made with other settings; use another --out, or remove {exp}")
    if final.is_file():
        return final
    write_text(path, text)
    stages: list[list[object]] = [["distill.py", "--config", path, "--exp_dir", exp]]
    if pruned:
        stages.append(["prune.py", "--distilled_ckpt", exp / "ckpts" / "last.ckpt"])
        stages.append(["final_distill.py", "--config", path, "--student_ckpt", exp / "pruned.pth",
                       "--exp_dir", exp / "final"])  # fmt: skip
    with (exp / "log.txt").open("a") as log:
        for stage in stages:
            command = [sys.executable, str(ROOT / str(stage[0])), *map(str, stage[1:])]
            if run_child(command, stdout=log, stderr=log):
                last = (exp / "log.txt").read_text().strip().splitlines()[-1]
                raise UserError(f"{stage[0]} failed, see {exp / 'log.txt'}: {last}")
    return final


def measure(name: str, seed: int, final: Path, teacher: Wav2Vec2Model, recipe_path: Path, budget: int) -> Result:
    """Sizes and distances of a finished run, kept beside it."""
    kept = final.with_suffix(".distance.json")
    model = load_checkpoint(final).model
    content = fingerprint(model)
    if kept.is_file() and (saved := json.loads(kept.read_text())).get("model") == content:
        return Result(**saved["result"])
    recipe, _ = parse_recipe(["--config", str(recipe_path)])
    num_params = used_params(model)
    if abs(num_params / budget - 1) > TOLERANCE:  # the unit at the edge of the ranking may be a whole head
        logger.warning(
            "%s: %s parameters, not within 1 %% of the budget of %s", final, f"{num_params:,}", f"{budget:,}"
        )
    num_heads = Objectives(recipe.objective, model, teacher).num_params()
    distances = linear_distances(model.eval(), teacher, recipe.data)
    result = Result(name, seed, num_params, num_heads, distances.unexplained, distances.layers)
    write_text(kept, json.dumps({"model": content, "result": asdict(result)}))
    return result


def table(results: list[Result]) -> str:
    """Per method: mean sizes; mean and spread over seeds of each teacher layer's unexplained variance in percent."""
    num_layers = len(results[0].unexplained)
    head = ["method", "parameters", "heads", *(f"layer {i}" for i in range(num_layers)), "mean"]
    rows = []
    for name in dict.fromkeys(result.method for result in results):
        runs = [result for result in results if result.method == name]
        columns = [*zip(*(run.unexplained for run in runs)), [statistics.mean(run.unexplained) for run in runs]]
        cells = [f"{100 * statistics.mean(c):.1f} ± {100 * spread(c):.1f}" for c in columns]
        sizes = (f"{statistics.mean(values):,.0f}" for values in zip(*((r.num_params, r.num_heads) for r in runs)))
        rows.append([METHODS[name].title, *sizes, *cells])
    return markdown_table(head, rows)


def spread(values: Any) -> float:
    """Standard deviation over seeds; 0 for one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def compare(comparison: Comparison) -> None:
    """Train, measure, print and plot.

    Raises:
        Stopped: a signal asked for it.
        UserError: a setting or a file that does not fit.
    """
    demo, methods, seeds, steps = comparison.demo, comparison.methods, comparison.seeds, comparison.steps
    num_params, out = comparison.num_params, comparison.out or demo / "compare"
    if unknown := [name for name in methods if name not in METHODS]:
        raise UserError(f"--methods: no method {unknown[0]!r}; there are {', '.join(METHODS)}")
    if not methods or seeds < 1 or steps < 10:
        raise UserError("name at least one method, one seed and 10 steps")
    if not (demo / "teacher.pth").is_file() or not (demo / "data" / "valid.tsv").is_file():
        raise UserError(f"{demo}: no teacher.pth and data/valid.tsv in it; run scripts/demo.sh {demo} first")
    logging.getLogger("distillation.data.loaders").setLevel(logging.WARNING)
    demo, out = demo.resolve(), out.resolve()
    comparison = replace(comparison, demo=demo)
    torch.manual_seed(0)
    teacher = load_model(demo / "teacher.pth")
    budget = num_params or used_params(build_student(StudentConfig(layers=DISTILHUBERT), teacher))
    if num_params and any(METHODS[name].student == "layers" for name in methods):
        raise UserError("--num_params: DistilHuBERT has the size of two teacher layers; leave it out of --methods")
    logger.info("teacher: %s parameters, budget of the students: %s", f"{used_params(teacher):,}", f"{budget:,}")
    results = []
    runs = [(name, seed) for seed in range(1, seeds + 1) for name in methods]
    with keeping(f"the runs, also the one that was training, are in {out}"):
        for name, seed in tqdm(runs, desc="compare", unit="run", dynamic_ncols=True):
            exp = out / name / f"seed{seed}"
            final = train(exp, recipe_of(METHODS[name], teacher, budget, seed, comparison))
            results.append(measure(name, seed, final, teacher, exp / "recipe.yaml", budget))
    results.sort(key=lambda result: (methods.index(result.method), result.seed))
    series = {
        METHODS[name].title: [result.unexplained for result in results if result.method == name] for name in methods
    }
    written = write(out, "compare", [asdict(result) for result in results], draw(series, steps))
    print(f"Variance of each teacher layer that the student leaves unexplained, %, {seeds} seeds, {steps} updates:\n")
    print(table(results))
    print(f"\n-> {written}")


@command
def main() -> None:
    """Run the comparison."""
    parser = make_parser(__doc__)
    parser.add_class_arguments(Comparison)
    compare(Comparison(**vars(parse_arguments(parser))))


if __name__ == "__main__":
    main()
