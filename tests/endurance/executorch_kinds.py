"""Every kind of student as a file of ExecuTorch, in a fresh process and in sequences of lengths against PyTorch.

    python -m tests.endurance.executorch_kinds

Takes several minutes: tests/test_export_executorch.py has one model with all that is special in it. Prints a table;
ends with a traceback where a kind differs. Needs requirements/dev.txt.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

import export
from evaluation.tables import machine, markdown_table
from exporting.source import ExportOptions, Source
from tests.configs import TINY, first_layers
from tests.exports import EVERYTHING, KINDS, LARGE, MAP_REUSE, THIN, VOCABULARY, WAVLM, make
from tests.test_export_executorch import run_in_one_method

HEADS = {"aux_num_out": len(VOCABULARY)}
ALL: dict[str, dict[str, Any]] = {
    **KINDS,
    "maps through a second softmax": {**THIN, **MAP_REUSE, "encoder_reuse_softmax": True},
    "DistilHuBERT": {"encoder_projection_layer_norm": False},
    "Large, fine-tuned": {**LARGE, **HEADS},
    "WavLM with all heads": WAVLM,
    "everything, fine-tuned": {**EVERYTHING, **HEADS},
}


def main() -> None:
    """Export, run, print."""
    rows = []
    for name, changes in tqdm(ALL.items(), "exporting", unit="kind"):
        with tempfile.TemporaryDirectory() as folder:
            path, begin, printed = Path(folder, "model.pth"), time.monotonic(), io.StringIO()
            make(path, first_layers({**TINY, **changes}, 2))
            with contextlib.redirect_stdout(printed):
                export.run(path, "executorch", None, ExportOptions(max_seconds=3))
            says = run_in_one_method(path.with_suffix(".pte"), Source.read(path))
            difference = printed.getvalue().split("PyTorch ")[1].split()[0]
            rows.append([name, difference, str(says["min_samples"]), f"{time.monotonic() - begin:.0f}"])
    print(f"{machine()}\n\n{markdown_table(['kind', 'largest difference', 'fewest samples', 'seconds'], rows)}")


if __name__ == "__main__":
    main()
