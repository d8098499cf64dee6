"""One page about runs or models: sizes, speed, architectures, distances and curves; and the same as JSON.

    python report.py RUN_DIR_or_MODEL.pth [--out report.html]
    python report.py RUN_DIR_or_MODEL.pth RUN_DIR_or_MODEL.pth ... [--out compare.html]

One argument has a page of its own, several stand side by side on one page, runs by their last models. The numbers are
written beside the page as .json. The page needs no network.
"""

import os
from pathlib import Path

from distillation.commandline import make_parser, parse_arguments
from distillation.errors import UserError, command
from evaluation import compare_page, report_data, report_page, subjects
from evaluation.compare_data import compare
from evaluation.cost import resolve_devices
from wav2vec2.checkpoint import write_text


@command
def main() -> None:
    """Gather, write, print the closing table."""
    parser = make_parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="Folders of runs (--exp_dir of a stage), or model files.")
    parser.add_argument(
        "--out", type=Path, default=None,
        help="Page to write; by default in the folder of the run or by the model file; of several, compare.html in the "
        "folder that they share.",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=900.0, help="Most held-out audio to compute losses on.")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto: the CPU, and the GPU if there is one.")
    parser.add_argument("--rounds", type=int, default=7, help="Timed runs per model; the median counts.")
    parser.add_argument(
        "--if_changed", action="store_true", help="Do nothing where the page was made from the same files in this way."
    )
    options = parse_arguments(parser)
    out: Path = options.out or _default_page(options.runs)
    if out.suffix != ".html":
        raise UserError(f"--out {out}: name an .html file; the numbers go beside it as .json")
    if not options.seconds > 0:
        raise UserError(f"--seconds {options.seconds:g}: it must be positive")
    if options.rounds < 1:
        raise UserError(f"--rounds {options.rounds}: it must be at least 1")

    effort = report_data.Effort(options.seconds, resolve_devices(options.device), options.rounds)
    arguments = subjects.look_at(options.runs)
    files = subjects.hash_files(arguments)
    if options.if_changed and report_data.is_up_to_date(out, files, report_data.made_with(arguments, effort)):
        print(f"-> {out} is up to date")
        return
    report: report_data.Page
    if len(arguments) == 1:
        report = report_data.collect(arguments[0], files, effort)
        page = report_page.render(report)
    else:
        report = compare(arguments, files, effort)
        page = compare_page.render(report)
    for path, text in ((out, page), (out.with_suffix(".json"), report_data.to_json(report))):  # no numbers without page
        write_text(path, text + "\n")
    print(report_data.closing_table(report.models))
    print(f"-> {out}, {out.with_suffix('.json')}")


def _default_page(runs: list[Path]) -> Path:
    if len(runs) > 1:
        return Path(os.path.commonpath([run.resolve().parent for run in runs])) / "compare.html"
    return runs[0] / "report.html" if runs[0].is_dir() else runs[0].with_suffix(".report.html")


if __name__ == "__main__":
    main()
