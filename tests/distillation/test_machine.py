"""Which precision a machine trains in fastest."""

from __future__ import annotations

import logging

import pytest
import torch

from distillation import machine
from distillation.config import parse_recipe

X86 = "processor : 0\nflags\t\t: fpu avx512f {}\nbugs :\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd {}\n"


@pytest.fixture(autouse=True)
def _afresh():
    machine.find_precision.cache_clear()
    yield
    machine.find_precision.cache_clear()


@pytest.mark.parametrize(
    ("text", "found"),
    [(X86.format("avx512_vnni"), False), (X86.format("avx512_bf16"), True), (X86.format("amx_bf16 amx_tile"), True),
     (ARM.format("sve"), False), (ARM.format("bf16"), True), ("", False), (None, False)],
)  # fmt: skip
def test_units_of_the_processor(monkeypatch, tmp_path, caplog, text, found):
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    assert machine.has_bf16_units() == found
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for _ in range(2):
        recipe, resolved = parse_recipe(["--config", "conf/dphubert_base.yaml"])
    precision = "bf16-mixed" if found else "32-true"
    assert (recipe.trainer.accelerator, recipe.trainer.precision) == ("cpu", precision)
    assert f"precision: {precision}" in resolved, "config.yaml says what runs"
    assert caplog.text.count("units for bfloat16") == 1, "said once"


@pytest.mark.parametrize(("has_bf16", "precision"), [(True, "bf16-mixed"), (False, "16-mixed")])
def test_gpus(monkeypatch, has_bf16, precision):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16 or including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    assert machine.find_precision("gpu") == precision


def test_what_is_named_is_taken():
    flags = ["--trainer.accelerator", "cpu", "--trainer.precision", "16-mixed"]
    assert parse_recipe(["--config", "conf/dphubert_base.yaml", *flags])[0].trainer.precision == "16-mixed"
