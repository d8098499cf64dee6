"""What the tests of report.py share: the folder of a finished run, and a check of its pages."""

from __future__ import annotations

import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import torch

from distillation.config import parse_recipe, save_resolved
from wav2vec2 import Wav2Vec2Model, load_model, prune, save_model

VOID = {"meta", "br", "wbr"}
CSV = """step,train/loss,train/distill,train/l1,train/cos,sparsity/expected,sparsity/target,lagrangian/lambda1,\
lagrangian/lambda2,lr/weights,lr/biases_norms,lr/log_alpha,speed/audio_seconds_per_second,valid/distill,valid/l1
2,1.5,0.5,0.9,-0.4,0.02,0.1,0.0,0.0,1e-4,1e-4,0.02,30,,
3,,,,,,,,,,,,,-0.1,0.7
4,1.2,nan,0.8,-0.5,0.05,0.3,-0.1,0.2,2e-4,2e-4,0.02,33,,
"""
CSV_STEP_2 = """step,train/loss,train/distill,lr/weights,speed/audio_seconds_per_second
2,0.1,0.1,1e-4,50
"""


def write_run(folder: Path, flags: Sequence[object], student: Wav2Vec2Model, teacher: Path) -> Path:
    """What a finished run leaves. Its final model is the teacher itself, with identity heads.

    Args:
        folder: of the run.
        flags: of its recipe.
        student: with masks.
        teacher: model file.
    """
    (folder / "final").mkdir(parents=True)
    _, resolved = parse_recipe([str(word) for word in flags])
    for part, table in ((folder, CSV), (folder / "final", CSV_STEP_2)):
        save_resolved(resolved, part)
        (part / "metrics.csv").write_text(table)
    heads = {f"{i}.{k}": v for i in range(3) for k, v in {"weight": torch.eye(24), "bias": torch.zeros(24)}.items()}
    save_model(folder / "pruned.pth", prune(student)[0], heads)
    save_model(folder / "final" / "final.pth", load_model(teacher), heads)
    state = {f"student.{name}": value for name, value in student.state_dict().items()}
    checkpoint = {"student_config": student.config, "state_dict": state, "heads": heads, "global_step": 4}
    (folder / "ckpts").mkdir()
    torch.save(checkpoint, folder / "ckpts" / "last.ckpt")
    return folder


def keep_step_1(run: Path) -> Path:
    """Take the run back to where its step 1 was pruned."""
    shutil.rmtree(run / "final")
    return run


def log_cost(run: Path, name: str, values: Sequence[float]) -> None:
    """Have the metrics of step 1 say what the masked model is expected to cost.

    Args:
        run: folder.
        name: of the cost.
        values: one per row of updates.
    """
    header, *rows = CSV.splitlines()
    left = list(values)
    rows = [f"{row},{left.pop(0) if row.endswith(',,') else ''}" for row in rows]
    (run / "metrics.csv").write_text("\n".join([f"{header},cost/{name}", *rows]) + "\n")


class Page(HTMLParser):
    """Fails on unbalanced tags; collects headings and anything that a browser would fetch or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []
        self.headings: list[str] = []
        self.optional = {"th", "tr", "td", "li"}
        self.feed(text)
        assert not [tag for tag in self.open if tag not in self.optional]

    def handle_starttag(self, tag, attrs):
        if tag in ("script", "link", "img", "iframe"):
            self.outside.append(tag)
        self.outside += [value for name, value in attrs if name in ("src", "href") or name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open[-1] != tag and self.open[-1] in self.optional:
            self.open.pop()
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def check_page(text: str) -> list[str]:
    """The headings of a page that needs nothing from outside and has no number that is none."""
    page = Page(text)
    assert page.outside == [] and "@import" not in text and "url(" not in text and "http" not in text
    for drawing in text.split("<svg")[1:]:
        for value in ElementTree.fromstring("<svg" + drawing.split("</svg>")[0] + "</svg>").iter():
            assert all("nan" not in v and "inf" not in v for k, v in value.attrib.items() if k != "aria-label")
    return page.headings
