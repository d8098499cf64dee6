"""The training module without a trainer: what is trained, what is not, and what is drawn at random."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from unittest import mock

import pytest
import torch

from distillation.build import build_step
from distillation.config import Recipe, TrainerConfig
from distillation.data.config import DataConfig
from distillation.errors import UserError
from distillation.objectives import LayerToLayer, ObjectiveConfig, Objectives
from distillation.optimisation import OptimConfig
from distillation.sparsity import PruningConfig, make_prunable
from distillation.training.guards import BatchGuard
from distillation.training.memory import TrialUpdates
from distillation.training.record import Record
from distillation.training.standing import Standing
from distillation.training.step import seed_micro_batch
from lightning import DistillModule
from wav2vec2 import kernels, load_model, save_model, wav2vec2_model
from wav2vec2.passes import PassOptions


def build(config: dict, layers: list[list[int]], pruning: PruningConfig | None):
    torch.manual_seed(0)
    teacher = wav2vec2_model(**config)
    student = make_prunable(teacher, pruning or PruningConfig(units=[]))
    settings = ObjectiveConfig(layer_to_layer=LayerToLayer.Config(layers=layers))
    recipe = Recipe(objective=settings, trainer=TrainerConfig(precision="32-true"))
    step = build_step(recipe, OptimConfig(max_steps=10, warmup_steps=2), student, teacher, pruning)
    return DistillModule(step, recipe.seed, "", Standing(Path("last.ckpt"), Record([])))


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("layers", [[[0], [2, 4]], [[0], [1, 2]]])
@pytest.mark.parametrize("alive", [None, 0.0])
def test_every_trainable_parameter_gets_a_gradient(tiny_config, pre_norm, layers, alive):
    """DDP waits for one from each; Large models have a final norm that hidden states never see."""
    module = build({**tiny_config, "encoder_layer_norm_first": pre_norm}, layers, PruningConfig())
    if alive is not None:  # every head and FFN unit gone
        for name, mask in module.student.masks().items():
            if "transformer" in name:
                torch.nn.init.constant_(mask.log_alpha, -20.0)
    module.train()
    module.step.loss(torch.randn(2, 6000), None, 3).total.backward()
    without = [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    expected = {"student.feature_extractor.dummy_weight"}
    if pre_norm:
        expected |= {f"student.encoder.transformer.layer_norm.{x}" for x in ("weight", "bias")}
    if layers[1][-1] == 2:
        above = module.student.encoder.transformer.layers[2:]
        expected |= {
            f"student.encoder.transformer.layers.{i + 2}.{name}"
            for i, layer in enumerate(above)
            for name, _ in layer.named_parameters()
            if not name.endswith("log_alpha")
        }
    assert frozen == expected


def test_a_model_from_a_file_trains_with_its_dropout(tiny_config, tmp_path):
    """The student of step 2 comes out of its file in eval, and Lightning leaves it as it is."""
    torch.manual_seed(0)
    save_model(tmp_path / "pruned.pth", wav2vec2_model(**{**tiny_config, "encoder_dropout": 0.5}))
    teacher, student = (load_model(tmp_path / "pruned.pth") for _ in range(2))
    recipe = Recipe(objective=ObjectiveConfig(layer_to_layer=LayerToLayer.Config(layers=[[0], [4]])))
    recipe.trainer.precision = "32-true"
    step = build_step(recipe, OptimConfig(), student, teacher, None)
    waveforms = torch.randn(2, 6000)
    first, second = (step.loss(waveforms, None, 0).total.item() for _ in range(2))
    assert first != second and not step.teacher.model.training
    assert all(module.training for module in step.trained.modules())


def test_teacher_is_frozen_in_eval_and_in_no_checkpoint(tiny_config):
    module = build(tiny_config, [[0], [4]], PruningConfig())
    module.train()
    assert not module.step.teacher.model.training
    assert not any(p.requires_grad for p in module.step.teacher.model.parameters())
    teacher_params = {id(p) for p in module.step.teacher.model.parameters()}
    assert not teacher_params & {id(p) for p in module.parameters()}
    waveforms = torch.randn(1, 6000)
    first = module.step.teacher(waveforms, None, PassOptions(4)).layers
    again = module.step.teacher(waveforms, None, PassOptions(4)).layers
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)) and not first[0].requires_grad
    assert len(first) == 4 and len(module.step.teacher(waveforms, None, PassOptions(2)).layers) == 2


def test_each_micro_batch_has_its_own_masks(tiny_config):
    student = build(tiny_config, [[0], [4]], PruningConfig()).student.train()

    def draw(seed: int, number: int) -> torch.Tensor:
        seed_micro_batch(seed, number)
        return torch.cat([gate.value for gate in student.draw_gates().values()])

    assert torch.equal(draw(1, 5), draw(1, 5))
    others = [draw(1, 6), draw(2, 5), draw(5, 1)]
    assert not any(torch.equal(draw(1, 5), other) for other in others)


def test_starts_as_the_teacher(tiny_config):
    """Before any training and without masks, the student's matched states are the teacher's: l1 0, cosine 1."""
    module = build(tiny_config, [[0], [2, 4]], None)
    module.eval()
    with torch.no_grad():
        terms = module.objectives(module.step.teacher, module.student, torch.randn(2, 6000), None).terms
    assert terms["l1"].item() == pytest.approx(0, abs=1e-5) and terms["cos"].item() == pytest.approx(-1, abs=1e-5)


@pytest.mark.parametrize(("per_update", "processes", "expected"), [(4, 1, 4), (4, 2, 2), (4, 4, 1), (8, 2, 4)])
def test_accumulation_keeps_the_update(per_update, processes, expected):
    trainer = TrainerConfig(batches_per_update=per_update)
    assert trainer.micro_batches(processes) == expected
    with pytest.raises(UserError, match="use 1, 2, 4"):
        trainer.micro_batches(3)


@pytest.mark.parametrize("pruning", [PruningConfig(), None])
def test_trial_updates_take_the_room_of_real_ones_and_change_nothing(tiny_config, pruning):
    module = build(tiny_config, [[0], [4]], pruning)
    before = {name: p.clone() for name, p in module.named_parameters()}
    trial = TrialUpdates(module.step, torch.float32, DataConfig())
    trial(torch.randn(2, 6000))
    moments = {p: state for p, state in trial.optimizer.state.items() if state["exp_avg"].any()}
    trained = [p for p in module.parameters() if p.requires_grad]
    assert len(moments) > 0.8 * len(trained)  # it was a real update
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    assert all(p.grad is None for p in module.parameters())
    # memory that runs out in the middle of an update leaves nothing behind
    with pytest.raises(torch.OutOfMemoryError), mock.patch.object(trial.optimizer, "step", side_effect=out_of_memory):
        trial(torch.randn(2, 6000))
    assert all(p.grad is None for p in module.parameters())


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_trials_measure_what_comes_after_the_freeze(tiny_config, monkeypatch):
    module = build(tiny_config, [[0], [4]], None)
    step = dataclasses.replace(module.step, optim=OptimConfig(max_steps=10, warmup_steps=2, freeze_steps=5))
    trial, frozen = TrialUpdates(step, torch.float32, DataConfig()), []
    forward = Objectives.forward
    monkeypatch.setattr(Objectives, "forward", lambda self, *args: (frozen.append(args[-1]), forward(self, *args))[1])
    trial(torch.randn(1, 6000))
    assert frozen == [False]


def test_batches_are_fitted_to_gpus_alone(server, tmp_path):
    command = ["fit_batch.py", "--config", "conf/dphubert_base.yaml", "--exp_dir", tmp_path]
    for flags, message in (["--trainer.accelerator", "gpu"], "none is visible"), ([], "trains on the CPU"):
        assert message in server.run(*command, *flags, code=2).error
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_keeps_the_forms_of_operations(tiny_config, monkeypatch):
    """Forms round differently: a run that goes on elsewhere takes those that it began with."""
    monkeypatch.setattr(kernels, "_choices", {"onednn": True, "shifted_bf16": False})
    module = build(tiny_config, [[0], [4]], None)
    module.guard = BatchGuard({}, 0.0, 0, Path("unused"))
    module.trainer = mock.Mock(world_size=1, loggers=[])
    checkpoint: dict = {}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["kernels"] == {"onednn": True, "shifted_bf16": False}
    kernels.use({"onednn": False})
    module.trainer.global_rank = 0
    module.on_load_checkpoint(checkpoint)
    assert kernels.choices() == {"onednn": True, "shifted_bf16": False}
    with pytest.raises(ValueError, match="no form 'x'"):
        module.on_load_checkpoint(checkpoint | {"kernels": {"x": True}})
