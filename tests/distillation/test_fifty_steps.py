"""Speed changes nothing: the losses of fifty training steps with and without each faster form of an operation."""

from __future__ import annotations

import pytest
import torch

from distillation.objectives import LayerToLayer, ObjectiveConfig, Objectives, Teacher
from distillation.optimisation import OptimConfig
from distillation.sparsity import PruningConfig, make_prunable
from wav2vec2 import kernels, wav2vec2_model
from wav2vec2.kernels import FORMS, usual_forms

# in float32 and without dropout; with it, another stream of random numbers drops other units
FASTER = [name for name in FORMS if name not in ("dropout", "written_out")]
# without a group norm there is none to fold; the layouts of this teacher and student give equal bits
UNUSED = [(name, "layer_norm") for name in FASTER if name in ("folded_norm", "channels_last")]


def train(config, batches) -> list[float]:
    torch.manual_seed(0)
    teacher = wav2vec2_model(**config)
    student = make_prunable(teacher, PruningConfig()).train()
    settings = ObjectiveConfig(layer_to_layer=LayerToLayer.Config(layers=[[0], [2, 4]]))
    objectives, frozen = Objectives(settings, student, teacher), Teacher(teacher)
    params = [p for p in [*student.parameters(), *objectives.parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW(params, 3e-5, eps=OptimConfig().eps)
    losses = []
    for i, (waveforms, lengths) in enumerate(batches):
        torch.manual_seed(i)  # the same masks
        loss = objectives(frozen, student, waveforms, lengths).total
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([2400, 1800])
    waveforms = [0.1 * torch.randn(2, 2400, generator=generator) for _ in range(50)]
    return [(w, lengths if i % 2 else None) for i, w in enumerate(waveforms)]


@pytest.fixture(scope="module")
def usual_losses():
    return {}


@pytest.mark.parametrize("form", ["all", *(pytest.param(form, marks=pytest.mark.slow) for form in FASTER)])
@pytest.mark.parametrize("mode", ["group_norm", "layer_norm"])
def test_losses_of_fifty_steps(tiny_config, batches, usual_losses, monkeypatch, form, mode):
    no_dropout = {name: 0.0 for name in tiny_config if name.endswith("dropout")}
    config = {**tiny_config, **no_dropout, "encoder_pos_conv_kernel": 32, "extractor_mode": mode}
    monkeypatch.setattr(kernels, "_choices", dict.fromkeys(kernels.PROBLEMS, True))
    monkeypatch.setattr(kernels, "MIN_MACS", 0)
    if mode not in usual_losses:
        with usual_forms(FORMS):
            usual_losses[mode] = train(config, batches)
    with usual_forms(set(FORMS) - (set(FASTER) if form == "all" else {form})):
        found = train(config, batches)
    assert found == pytest.approx(usual_losses[mode], abs=1e-5)
    assert len(set(found)) == 50
    if (form, mode) not in UNUSED:
        assert found != usual_losses[mode]
