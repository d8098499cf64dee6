"""One page about a run or a model: sizes, speed, the architecture found, distances and curves; and the same as JSON.

    python report.py RUN_DIR_or_MODEL.pth [--out report.html]

Writes the page and, beside it, a .json file. The page needs no network.
"""

import json
from pathlib import Path

from distillation.commandline import make_parser, parse_arguments
from distillation.errors import UserError, command
from evaluation.cost import resolve_devices
from evaluation.report_data import closing_table, collect
from evaluation.report_page import render
from wav2vec2.checkpoint import write_text


@command
def main() -> None:
    """Gather, print the closing table, write."""
    parser = make_parser(__doc__)
    parser.add_argument("run", type=Path, help="Folder of a run (--exp_dir of a stage), or a model file.")
    parser.add_argument(
        "--out", type=Path, default=None, help="Page to write; by default in the folder, or by the file."
    )
    parser.add_argument("--seconds", type=float, default=900.0, help="Most held-out audio to compute losses on.")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto: the CPU, and the GPU if there is one.")
    parser.add_argument("--rounds", type=int, default=7, help="Timed runs per model; the median counts.")
    options = parse_arguments(parser)
    run: Path = options.run
    out: Path = options.out or (run / "report.html" if run.is_dir() else run.with_suffix(".report.html"))
    if out.suffix != ".html":
        raise UserError(f"--out {out}: name an .html file; the numbers go beside it as .json")
    if not options.seconds > 0:
        raise UserError(f"--seconds {options.seconds:g}: it must be positive")
    if options.rounds < 1:
        raise UserError(f"--rounds {options.rounds}: it must be at least 1")

    report = collect(run, max_seconds=options.seconds, devices=resolve_devices(options.device), rounds=options.rounds)
    page, numbers = render(report), json.dumps(report.as_json(), indent=1, allow_nan=False)
    for path, text in ((out.with_suffix(".json"), numbers), (out, page)):
        write_text(path, text + "\n")
    print(closing_table(report))
    print(f"-> {out}, {out.with_suffix('.json')}")


if __name__ == "__main__":
    main()
