"""The model card of an exported folder, filled from report.json where there is one."""

from pathlib import Path
from typing import Any

import jinja2

from wav2vec2 import Wav2Vec2Model
from wav2vec2.architecture import architecture
from wav2vec2.counting import count_params

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")


def model_card(
    model: Wav2Vec2Model,
    name: str,
    has_ctc_head: bool,
    source: Path,
    report: dict[str, Any] | None,
    native: bool,
    padded: bool,
) -> str:
    """README.md of the folder.

    Args:
        model: dense.
        name: of the folder.
        has_ctc_head: show how to transcribe.
        source: file the model came from.
        report: content of report.json; what it has of sizes, cost and distances is shown.
        native: transformers has the class; otherwise the folder brings its code.
        padded: a padded row gives what the row alone gives.
    """
    template = jinja2.Template(TEMPLATE.read_text(encoding="utf-8"), trim_blocks=True, keep_trailing_newline=True)
    return template.render(
        model=model, parameters=count_params(model), found=architecture(model.config), name=name,
        has_ctc_head=has_ctc_head, source=source, report=report, native=native, padded=padded,
    )  # fmt: skip
