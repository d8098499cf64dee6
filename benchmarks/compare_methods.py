"""Train recipes with the same teacher, data, number of updates and parameters; compare what they keep.

    scripts/demo.sh demo_out                                # once: the corpus and the tiny teacher
    python -m benchmarks.compare_methods --demo demo_out    # then hours on the CPU; run again to resume
    python -m benchmarks.compare_methods --demo demo_out --recipes '[dphubert,mine.yaml]' --num_params 388000

A row is a recipe: one of benchmarks/methods by its name, or any other for the demo's teacher by its path. It runs
through the ordinary stages, with all its lengths scaled to the same number of updates, and its student to one size, by
default that of DistilHuBERT's two layers, to 1 %; heads, which only training uses, come on top. The distance to the
teacher is that of benchmarks/linear_distance.py. Prints a table, writes compare.json and compare.svg.
"""

import json
import logging
import math
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from benchmarks.compare_plot import draw
from benchmarks.linear_distance import linear_distances
from benchmarks.plots import write
from benchmarks.runs import cpu_seconds, merged, read_row, scaled, sized, train, used_params
from distillation.commandline import make_parser, parse_arguments
from distillation.errors import UserError, command, require
from distillation.objectives import Objectives
from distillation.stopping import keeping
from distillation.students import CopiedLayers, StudentConfig, build_student
from evaluation.tables import markdown_table
from wav2vec2 import Wav2Vec2Model, load_model
from wav2vec2.checkpoint import fingerprint, load_checkpoint, write_text

logger = logging.getLogger(__name__)

METHODS = Path(__file__).parent / "methods"
TOLERANCE = 0.01  # of the parameter budget
DISTANCE = ".distance.json"  # in place of .pth
DISTILHUBERT = CopiedLayers(norms="released")
DEFAULT = ["dphubert", "slice", "distilhubert", "fithubert", "starhubert", "dphubert_star"]


@dataclass
class Comparison:
    """What is compared."""

    demo: Path = Path("demo_out")
    """Folder that scripts/demo.sh has left: teacher.pth and data/."""
    out: Path | None = None
    """Folder of the runs; DEMO/compare by default."""
    recipes: list[str] = field(default_factory=lambda: DEFAULT)
    """Names in benchmarks/methods, or paths of recipes."""
    seeds: int = 3
    """Runs per recipe."""
    steps: int = 1000
    """Updates per run, both steps together."""
    num_params: int | None = None
    """Size of the students; that of DistilHuBERT's two layers by default, the only one it can have."""
    tsv_dir: Path | None = None
    """Lists to train and validate on; DEMO/data by default."""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    """Of training; measured in float32 in any case."""


@dataclass
class Result:
    """One finished run."""

    method: str
    seed: int
    num_params: int  # of the model, without the upsampler that extract_features does not use
    num_heads: int  # parameters that only training used
    cpu_seconds: float  # of training; NaN where not counted
    unexplained: list[float]  # per teacher layer, see linear_distance.py
    layers: list[int]  # per teacher layer, the student's layer that explains most


def find_rows(names: list[str]) -> dict[str, Path]:
    """Recipes by the name of their row.

    Raises:
        UserError: there is no such recipe, or two have one name.
    """
    rows: dict[str, Path] = {}
    for name in names:
        path = Path(name) if name.endswith(".yaml") else METHODS / f"{name}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(path.stem for path in METHODS.glob("*.yaml")))
            raise UserError(f"--recipes: no recipe {name!r}; give a path that ends in .yaml, or one of {known}")
        if path.stem in rows:
            raise UserError(f"--recipes: two of them are named {path.stem!r}: the folders of their runs have that name")
        rows[path.stem] = path.resolve()
    return rows


def settings_of(path: Path, teacher: Wav2Vec2Model, budget: int, seed: int, comparison: Comparison) -> dict[str, Any]:
    """A run of a recipe: what the comparison sets, over the recipe as its base.

    Raises:
        UserError: the recipe cannot be scaled or sized.
    """
    recipe, demo = read_row(path), comparison.demo
    fixed = {
        "base": str(path),
        "teacher_ckpt": str(demo / "teacher.pth"),
        "teacher_layers": teacher.num_layers,
        "teacher_width": teacher.embed_dim,
        "seed": seed,
        "data": {"tsv_dir": str(comparison.tsv_dir or demo / "data")},
        "trainer": {"precision": comparison.precision},
    }
    try:
        return merged(fixed, scaled(recipe, comparison.steps), sized(recipe, teacher, budget))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def measure(name: str, seed: int, final: Path, teacher: Wav2Vec2Model, exp: Path, budget: int) -> Result:
    """Sizes, time and distances of a finished run, kept beside it."""
    model = load_checkpoint(final).model
    content = fingerprint(model)
    if (result := _kept(final, content)) is not None:
        return result
    recipe, num_params = read_row(exp / "recipe.yaml"), used_params(model)
    if abs(num_params / budget - 1) > TOLERANCE:  # the unit at the edge of the ranking may be a whole head
        logger.warning(
            "%s: %s parameters, not within 1 %% of the budget of %s", final, f"{num_params:,}", f"{budget:,}"
        )
    num_heads = Objectives(recipe.objective, model, teacher).num_params()
    distances = linear_distances(model.eval(), teacher, recipe.data)
    result = Result(name, seed, num_params, num_heads, cpu_seconds(exp), distances.unexplained, distances.layers)
    write_text(final.with_suffix(DISTANCE), json.dumps({"model": content, "result": asdict(result)}))
    return result


def _kept(final: Path, content: str) -> Result | None:
    try:
        saved = json.loads(final.with_suffix(DISTANCE).read_text())
        return Result(**saved["result"]) if saved["model"] == content else None
    except (OSError, ValueError, KeyError, TypeError):  # none, or one of another version
        return None


def kept_result(final: Path) -> Result:
    """What :func:`measure` has kept of a run.

    Raises:
        UserError: nothing.
    """
    result = _kept(final, fingerprint(load_checkpoint(final).model))
    if result is None:
        raise UserError(
            f"{final}: nothing is kept of its distance to the teacher; run benchmarks.compare_methods first"
        )
    return result


def table(results: list[Result]) -> str:
    """Per recipe: mean sizes and minutes; mean and spread over seeds of each teacher layer's unexplained variance."""
    num_layers = len(results[0].unexplained)
    head = ["recipe", "parameters", "heads", "minutes", *(f"layer {i}" for i in range(num_layers)), "mean"]
    rows = []
    for name in dict.fromkeys(result.method for result in results):
        runs = [result for result in results if result.method == name]
        columns = [*zip(*(run.unexplained for run in runs)), [statistics.mean(run.unexplained) for run in runs]]
        cells = [f"{100 * statistics.mean(c):.1f} ± {100 * spread(c):.1f}" for c in columns]
        sizes = (f"{statistics.mean(values):,.0f}" for values in zip(*((r.num_params, r.num_heads) for r in runs)))
        rows.append([name, *sizes, minutes(runs), *cells])
    return markdown_table(head, rows)


def minutes(results: list[Result]) -> str:
    """Mean of the minutes of training, where they were counted; nan where they never were."""
    counted = [result.cpu_seconds for result in results if not math.isnan(result.cpu_seconds)]
    return f"{statistics.mean(counted) / 60:.1f}" if counted else "nan"


def spread(values: Any) -> float:
    """Standard deviation over seeds; 0 for one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def compare(comparison: Comparison) -> None:
    """Train, measure, print and plot.

    Raises:
        Stopped: a signal asked for it.
        UserError: a setting or a file that does not fit.
    """
    demo, seeds, steps = comparison.demo.resolve(), comparison.seeds, comparison.steps
    out = (comparison.out or demo / "compare").resolve()
    paths = find_rows(comparison.recipes)
    if not paths:
        raise UserError("--recipes is empty: name at least one")
    require(comparison, "--", "be at least 1", lambda value: value >= 1, "seeds", "num_params")
    require(comparison, "--", "be at least 10", lambda value: value >= 10, "steps")
    comparison.demo, tsv_dir = demo, (comparison.tsv_dir or demo / "data").resolve()
    comparison.tsv_dir = tsv_dir
    for needed in (demo / "teacher.pth", tsv_dir / "valid.tsv"):
        if not needed.is_file():
            raise UserError(f"no {needed}; run scripts/demo.sh {comparison.demo} first")
    logging.getLogger("distillation.data.loaders").setLevel(logging.WARNING)
    torch.manual_seed(0)
    teacher = load_model(demo / "teacher.pth")
    budget = comparison.num_params or used_params(build_student(StudentConfig(layers=DISTILHUBERT), teacher))
    for name, path in paths.items():
        if comparison.num_params and read_row(path).student.layers is not None:
            raise UserError(f"--num_params: {name} has the size of the layers it copies; leave it out of --recipes")
    logger.info("teacher: %s parameters, budget of the students: %s", f"{used_params(teacher):,}", f"{budget:,}")
    results = []
    runs = [
        (name, seed, settings_of(path, teacher, budget, seed, comparison))
        for seed in range(1, seeds + 1)
        for name, path in paths.items()
    ]
    with keeping(f"the runs, also the one that was training, are in {out}"):
        for name, seed, settings in tqdm(runs, desc="compare", unit="run", dynamic_ncols=True):
            exp = out / name / f"seed{seed}"
            results.append(measure(name, seed, train(exp, settings), teacher, exp, budget))
    results.sort(key=lambda result: (list(paths).index(result.method), result.seed))
    series = {name: [result.unexplained for result in results if result.method == name] for name in paths}
    written = write(out, "compare", [asdict(result) for result in results], draw(series, steps))
    print(f"Variance of each teacher layer that the student leaves unexplained, %, {seeds} seeds, {steps} updates;")
    print("minutes of one core that training takes:\n")
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
