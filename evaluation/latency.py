"""Measure what every block of a model takes on this machine, by the units that it has: the table of a latency budget.

    python -m evaluation.latency teacher.pth --out latency.json [--device cpu] [--threads 1] [--seconds 10]
    python distill.py --config conf/X.yaml --pruning.cost milliseconds --pruning.latency latency.json

Models of many sizes are cut out of the given one and run whole; each block is timed where it stands. Then others, of
random sizes, tell how far the table's predictions are from what a whole model takes. Everything is measured in turns,
so that whatever else the machine does meets all sizes alike. Writes the table, and a page beside it that shows it. Run
again, it goes on after a stop.
"""

import json
import logging
import statistics
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distillation.commandline import make_parser, parse_arguments
from distillation.data.config import MIN_INPUT_FRAMES
from distillation.errors import UserError, command
from distillation.journal import Journal
from distillation.latency import LatencyTable
from distillation.stopping import keeping
from evaluation.block_times import PROTOCOL, WHOLE, Sample, measure, survivors, with_masks
from evaluation.conditions import conditions
from evaluation.cost import resolve_devices
from evaluation.latency_page import render
from evaluation.tables import format_table
from wav2vec2 import Wav2Vec2Model, load_model
from wav2vec2.architecture import architecture
from wav2vec2.checkpoint import fingerprint, write_text
from wav2vec2.feature_extractor import SAMPLE_RATE

logger = logging.getLogger(__name__)

MAX_SECONDS = 3600
MOST = {"threads": 1024, "rounds": 1000, "multiple_of": 1024}
MAX_TURNS = 50  # of rows and columns; a few are enough
DOUBTFUL = 0.1  # error of a prediction


def table_of(model: Wav2Vec2Model, samples: Sequence[Sample]) -> dict[str, Any]:
    """Times by numbers of units, as the file has them; what more units take is never less, but for all of them.

    Args:
        model: dense, with all units.
        samples: with the times of their blocks.
    """
    whole = architecture(model.config)
    conv = []
    for i in range(len(whole.conv)):
        found: dict[tuple[int, int], list[float]] = {}
        for sample in samples:
            num_in = sample.found.conv[i - 1] if i else 1
            found.setdefault((num_in, sample.found.conv[i]), []).append(sample.ms[f"conv.{i}"])
        inputs, units = (sorted(set(sizes)) for sizes in zip(*found))
        ms = rising(torch.tensor([[statistics.median(found[pair, unit]) for unit in units] for pair in inputs]))
        conv.append({"inputs": inputs, "units": units, "ms": _rounded(ms)})
    projection = _curve(((sample.found.conv[-1], sample.ms["projection"]) for sample in samples), rising)
    kinds: dict[str, dict[Any, list[int]]] = {"attention": {}, "feed_forward": {}}
    for i, layer in enumerate(model.encoder.transformer.layers):
        if layer.attention is not None and layer.attention.num_heads:
            kind = (layer.attention.reuse, layer.attention.keep_map, whole.heads[i])
            kinds["attention"].setdefault(kind, []).append(i)
        if layer.feed_forward is not None:
            kinds["feed_forward"].setdefault(whole.interm[i], []).append(i)
    blocks = {
        name: [
            {"layers": layers, **_curve(((getattr(sample.found, units)[i], sample.ms[f"{name}.{i}"])
                                         for sample in samples for i in layers), smooth)}
            for layers in kinds[name].values()
        ]
        for name, units, smooth in (("attention", "heads", monotone), ("feed_forward", "interm", rising))
    }  # fmt: skip
    rest = [2 * sample.ms[WHOLE] - sum(sample.ms.values()) for sample in samples]
    fixed = max(0.0, statistics.median(rest))
    return {"fixed": float(f"{fixed:.5g}"), "conv": conv, "projection": projection, **blocks}


def _curve(found: Iterable[tuple[int, float]], smooth: Callable[[Tensor], Tensor]) -> dict[str, list[Any]]:
    """Medians by units, without what noise makes fall."""
    times: dict[int, list[float]] = {}
    for size, ms in found:
        times.setdefault(size, []).append(ms)
    units = sorted(times)
    return {"units": units, "ms": _rounded(smooth(torch.tensor([statistics.median(times[n]) for n in units])))}


def rising(ms: Tensor) -> Tensor:
    """Times [K] or [I, K] that rise up to the last size, that of all units, which is left as it is.

    All units are often a round number, for which the machine may have faster code.
    """
    if ms.dim() == 1:
        return torch.cat([monotone(ms[:-1]), ms[-1:]])
    if min(ms.shape) == 1:
        return rising(ms.flatten()).view(ms.shape)
    inner = torch.cat([monotone(ms[:-1, :-1]), monotone(ms[:-1, -1])[:, None]], dim=1)
    return torch.cat([inner, rising(ms[-1])[None]])


def monotone(ms: Tensor) -> Tensor:
    """Times [K] or [I, K] that do not fall in any direction, as close as can be: noise alone makes them fall.

    Where they do, neighbours share their mean (isotonic regression by pooling adjacent violators), along rows and
    columns in turn.
    """
    if ms.dim() == 1:
        return torch.tensor(_isotonic(ms.tolist()), dtype=ms.dtype)
    for _ in range(MAX_TURNS):
        if (ms.diff(dim=0) >= 0).all() and (ms.diff(dim=1) >= 0).all():
            break
        ms = torch.stack([monotone(row) for row in ms])
        ms = torch.stack([monotone(column) for column in ms.t()]).t()
    return ms.cummax(0).values.cummax(1).values  # of what rounding leaves


def _isotonic(values: list[float]) -> list[float]:
    pools: list[tuple[float, int]] = []  # mean of so many neighbours
    for value in values:
        mean, count = value, 1
        while pools and pools[-1][0] > mean:
            before, more = pools.pop()
            mean, count = (before * more + mean * count) / (more + count), more + count
        pools.append((mean, count))
    return [mean for mean, count in pools for _ in range(count)]


def scaled(content: Any, factor: float, is_time: bool = False) -> Any:
    """The same table with all of its times multiplied."""
    if isinstance(content, dict):
        return {key: scaled(value, factor, is_time or key in ("ms", "fixed")) for key, value in content.items()}
    if isinstance(content, list):
        return [scaled(value, factor, is_time) for value in content]
    return float(f"{factor * content:.5g}") if is_time else content


def _rounded(ms: Tensor) -> Any:
    def rounded(value: Any) -> Any:
        return [rounded(entry) for entry in value] if isinstance(value, list) else float(f"{value:.5g}")

    return rounded(ms.tolist())


def predictions(table: LatencyTable, model: Wav2Vec2Model, samples: Sequence[Sample]) -> list[list[float]]:
    """[predicted, measured] milliseconds of models that are cut out of ``model``."""
    masked = with_masks(model)
    found = []
    for sample in samples:
        kept = survivors(masked, sample.sizes)
        predicted = table(masked, lambda mask, kept=kept: kept[mask].double()).item()
        found.append([float(f"{ms:.5g}") for ms in (predicted, sample.ms[WHOLE])])
    return found


def errors_of(pairs: Iterable[Sequence[float]]) -> list[float]:
    """How far predictions are from what was measured, as shares of that."""
    return [abs(predicted / measured - 1) for predicted, measured in pairs]


def describe(content: dict[str, Any]) -> str:
    """The tables that the command prints: what blocks take, and how good predictions are."""
    rows = [["convolutions, all channels", f"{sum(entry['ms'][-1][-1] for entry in content['conv']):.2f}", ""]]
    rows.append(["projection", f"{content['projection']['ms'][-1]:.2f}", ""])
    for name, unit in (("attention", "head"), ("feed_forward", "unit")):
        for entry in content[name]:
            units, ms = entry["units"], entry["ms"]
            last = -2 if len(units) > 2 else -1  # all units may be faster
            each = f"{(ms[last] - ms[0]) / (units[last] - units[0]):.4f} per {unit}" if len(units) > 1 else ""
            layers = f"{len(entry['layers'])} layer{'s' if len(entry['layers']) > 1 else ''}"
            rows.append([f"{name}, each of {layers}", f"{ms[-1]:.2f}", each])
    rows.append(["the rest", f"{content['fixed']:.2f}", ""])
    whole, *others = content["check"]
    errors = errors_of(others)
    rows.append(["the whole model", f"{whole[1]:.2f}", f"predicted {whole[0]:.2f}"])
    least, most = (choose(ms for _, ms in others) for choose in (min, max))
    return (
        f"{format_table(['block', 'ms', ''], rows)}\n\n{len(others)} other models of {least:.4g} to {most:.4g} ms: "
        f"predictions are {statistics.median(errors):.1%} off (median), at most {max(errors):.1%}"
    )


@command
def main() -> None:
    """Measure, print, write."""
    parser = make_parser(__doc__)
    parser.add_argument("model", type=Path, help="The teacher (.pth), or another model that is to be pruned.")
    parser.add_argument(
        "--out", type=Path, default=Path("latency.json"), help="Table to write; its page goes beside it."
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda.")
    parser.add_argument("--threads", type=int | None, help="CPU threads; by default what torch takes.")
    parser.add_argument("--seconds", type=float, default=10.0, help="Audio of the utterance that is timed.")
    parser.add_argument("--rounds", type=int, default=3, help="Visits to each of the models; the fastest counts.")
    parser.add_argument(
        "--multiple_of", type=int, default=1, help="Measure at such sizes, for a recipe that prunes so."
    )
    options = parse_arguments(parser)
    out: Path = options.out
    if out.suffix != ".json":
        raise UserError(f"--out {out}: name a .json file")
    if not MIN_INPUT_FRAMES / SAMPLE_RATE <= options.seconds <= MAX_SECONDS:
        raise UserError(
            f"--seconds {options.seconds:g}: it must lie between {MIN_INPUT_FRAMES / SAMPLE_RATE} and {MAX_SECONDS}"
        )
    for flag, most in MOST.items():
        value = getattr(options, flag)
        if value is not None and not 1 <= value <= most:
            raise UserError(f"--{flag} {value}: it must lie between 1 and {most}")
    if options.device not in ("cpu", "cuda"):
        raise UserError(f"--device {options.device}: choose cpu or cuda")
    [device] = resolve_devices(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    model = load_model(options.model)
    if model.masks():
        raise UserError(f"{options.model}: has masks; name a dense model")
    if architecture(model.config).uneven:
        raise UserError(f"{options.model}: its heads are of unequal width, and tables hold times of whole ones")
    settings = {"device": device, "seconds": options.seconds, "multiple_of": options.multiple_of}
    measured = conditions(model=fingerprint(model), **settings, rounds=options.rounds, protocol=PROTOCOL)
    known = Journal(out.with_name(f".{out.stem}.jsonl"), measured, "times")
    with keeping(f"what was measured so far is in {known.path}"):
        designed, others = measure(model, device, options.seconds, options.rounds, options.multiple_of, known)
    content = {
        "model": options.model.name, "config": model.config, **settings,
        "measured": {**measured, "date": str(date.today())}, **table_of(model, designed),
    }  # fmt: skip
    # medians of blocks know nothing of what disturbs one or the other block in every run
    pairs = predictions(LatencyTable(content, out), model, designed)
    content = scaled(content, statistics.median(measured / predicted for predicted, measured in pairs))
    content["check"] = predictions(LatencyTable(content, out), model, others)
    write_text(out, json.dumps(content) + "\n")
    write_text(out.with_suffix(".html"), render(content) + "\n")
    known.remove()
    print(describe(content))
    whole, *pairs = content["check"]
    if max(statistics.median(errors_of(pairs)), *errors_of([whole])) > DOUBTFUL:
        logger.warning("predictions are far off: was the machine busy? Measure again, with more --rounds")
    print(f"-> {out}, {out.with_suffix('.html')}")


if __name__ == "__main__":
    main()
