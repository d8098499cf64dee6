"""The closed-form fit after pruning: the formula restated, models of every kind, padding, and as a stage."""

from __future__ import annotations

import copy
import math
import signal
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from distillation import refit as module
from distillation.data.config import DataConfig
from distillation.data.loaders import Batch, Place
from distillation.data.manifest import read_tsv
from distillation.errors import UserError
from distillation.refit import refit, some_batches
from tests.configs import TINY, first_layers
from tests.helpers import weights
from wav2vec2 import Wav2Vec2Model, load_model, prune, wav2vec2_model
from wav2vec2.checkpoint import add_masks

UNITS = {f"encoder_prune_{unit}": True for unit in ("attention_heads", "feed_forward_intermediate")}


def batch(rows: list[torch.Tensor]) -> Batch:
    lengths = torch.tensor([len(row) for row in rows])
    waveforms = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    full = bool((lengths == lengths[0]).all())
    return Batch(waveforms, None if full else lengths, 0, [], {}, lengths.sum().item() / 16_000, 0.0)


def noise(count: int, lengths: tuple[int, ...] = (6000,), seed: int = 0) -> list[Batch]:
    draw = torch.Generator().manual_seed(seed)
    return [batch([torch.randn(n, generator=draw) for n in lengths]) for _ in range(count)]


def pruned(teacher: Wav2Vec2Model, keep: float = 0.5) -> Wav2Vec2Model:
    """A student with a share of its teacher's heads and FFN units."""
    masked = add_masks(teacher, **UNITS)
    torch.manual_seed(1)
    survivors = {}
    for mask in masked.masks().values():
        survivors[mask] = torch.zeros(len(mask), dtype=torch.bool)
        survivors[mask][torch.randperm(len(mask))[: max(1, round(keep * len(mask)))]] = True
        mask.log_alpha.data.fill_(50.0)  # its value is 1
    return prune(masked, survivors)[0]


def make_teacher(kind: str = "post-norm") -> Wav2Vec2Model:
    torch.manual_seed(0)
    config = first_layers(TINY, 3)
    if kind == "pre-norm":
        config = config | {"encoder_layer_norm_first": True}
    if kind == "wavlm":
        config = {k: v for k, v in config.items() if k not in ("encoder_num_heads", "encoder_head_dim")} | {
            "encoder_total_num_heads": [4] * 3,
            "encoder_remaining_heads": [[0, 1, 2, 3]] * 3,
            "encoder_num_buckets": 16,
            "encoder_max_distance": 40,
        }
    return wav2vec2_model(**config).eval()


def test_the_formula(monkeypatch):
    """FFN of a layer without attention, by numpy, with one ridge; the first quarter of the batches is held out."""
    monkeypatch.setattr(module, "RIDGES", (0.1,))
    teacher = make_teacher()
    model = pruned(teacher)
    model.encoder.transformer.layers[0].attention = None
    before = copy.deepcopy(model.encoder.transformer.layers[0].feed_forward)
    batches = noise(4)
    found = refit(model, teacher, batches)
    assert [(one.layer, one.block) for one in found][:3] == [(1, "feed_forward"), (2, "attention"), (2, "feed_forward")]

    layer, other = model.encoder.transformer.layers[0], teacher.encoder.transformer.layers[0]
    inputs, wanted = [], []
    with torch.no_grad():
        for one in batches[1:]:
            x, t = (m.run(one.waveforms, None)[0].layer_input for m in (model, teacher))
            t = other.layer_norm(t + other.attention(t, None, None, {})[0])
            t = t + other.feed_forward(t, {})
            x = layer.layer_norm(x)
            a = F.gelu(before.intermediate_dense(x))
            inputs.append(F.pad(a, (0, 1), value=1.0).flatten(0, 1).double().numpy())
            wanted.append((t - x).flatten(0, 1).double().numpy())
    a, y = np.concatenate(inputs), np.concatenate(wanted)
    start = torch.cat([before.output_dense.weight, before.output_dense.bias[:, None]], 1).detach().double().numpy().T
    # the ridge regression of what the weights that are there leave
    pull = 0.1 * np.square(a).sum(0).mean()
    change = np.linalg.lstsq(
        np.vstack([a, math.sqrt(pull) * np.eye(a.shape[1])]),
        np.vstack([y - a @ start, np.zeros((a.shape[1], y.shape[1]))]),
        rcond=None,
    )[0]
    expected = (start + change).T
    np.testing.assert_allclose(layer.feed_forward.output_dense.weight.detach(), expected[:, :-1], atol=1e-5)
    np.testing.assert_allclose(layer.feed_forward.output_dense.bias.detach(), expected[:, -1], atol=1e-5)
    assert not np.allclose(expected, start.T, atol=1e-2)


@pytest.mark.parametrize("kind", ["post-norm", "pre-norm", "wavlm"])
def test_every_kind_of_model_comes_closer_to_its_teacher(kind):
    teacher = make_teacher(kind)
    model = pruned(teacher)
    held = noise(2, (9000, 7000), seed=5)

    def distance() -> float:
        with torch.no_grad():
            pairs = [(m.extract_features(b.waveforms, b.lengths)[0][-1] for m in (model, teacher)) for b in held]
            return sum((x - t).square().mean().item() for x, t in pairs)

    before = distance()
    model.train()
    found = refit(model, teacher, noise(8, (6000, 4000)))
    assert model.training and all(one.after <= one.before for one in found) and len(found) >= 5
    assert any(one.ridge < math.inf for one in found)
    model.eval()
    assert distance() < 0.5 * before


def test_what_is_whole_stays_as_it_is():
    """A copy of the teacher has nothing to gain: no weight changes by a bit."""
    teacher = make_teacher()
    model = copy.deepcopy(teacher)
    found = refit(model, teacher, noise(4))
    assert all(one.ridge == math.inf and one.before == one.after < 1e-9 for one in found) and len(found) == 6
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), teacher.parameters()))


def test_padding_does_not_count():
    teacher = make_teacher()
    models = pruned(teacher), pruned(teacher)
    held = noise(1)
    rows = [one.waveforms[0, :length] for one, length in zip(noise(4, seed=3), (6000, 5000, 4000, 3000))]
    padded = [held[0], batch(rows[:2]), batch(rows[2:])]
    alone = [held[0], *(batch([row]) for row in rows)]
    for model, batches in zip(models, (padded, alone)):
        refit(model, teacher, batches)
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters()):
        torch.testing.assert_close(p, q, rtol=2e-3, atol=2e-3, msg=name)


def test_refusals():
    teacher = make_teacher()
    other = wav2vec2_model(**first_layers(TINY, 2))
    with pytest.raises(UserError, match="another depth or width than the teacher: leave refit out"):
        refit(other, teacher, noise(2))


def test_minutes_are_cut_into_batches_and_end_with_the_list(tsv_dir):
    manifest = read_tsv(tsv_dir / "train100.tsv")
    config = DataConfig(min_frames=8000, max_frames=120_000, seconds_per_batch=40.0, num_workers=0)
    total = manifest.num_frames[(manifest.num_frames >= 8000) & (manifest.num_frames <= 120_000)].sum() / 16_000

    def read(minutes: float) -> Iterator[Batch]:
        return some_batches(manifest, config, 7, minutes, Place())

    some = list(read(total / 120))
    assert len(some) >= 4 and total / 2 - 1 <= sum(one.seconds for one in some) < total
    everything = list(read(1e6))
    assert sum(one.seconds for one in everything) == pytest.approx(total, abs=1.0)


def test_as_a_stage(server, reference, tiny_flags, tmp_path):
    """Before the first update, once; a run that is killed and goes on ends with the same weights."""
    args = ["final_distill.py", *tiny_flags, "--student_ckpt", reference / "pruned.pth", "--refit.minutes", 0.3]
    whole = server.run(*args, "--exp_dir", tmp_path / "whole")
    assert "refit: layer 1 " in whole.output
    server.run(*args, "--exp_dir", tmp_path / "killed", fault=["kill", "update", 4], code=-signal.SIGKILL)
    resumed = server.run(*args, "--exp_dir", tmp_path / "killed")
    assert "refit" not in resumed.output.replace("refit.minutes", "")
    final, plain = weights(tmp_path / "whole" / "final.pth"), weights(reference / "final" / "final.pth")
    assert all(torch.equal(final[k], v) for k, v in weights(tmp_path / "killed" / "final.pth").items())
    assert any(not torch.equal(final[k], v) for k, v in plain.items())
    # two processes fit the same, and go on as one
    server.run(*args, "--exp_dir", tmp_path / "two", "--trainer.devices", 2)
    for name, weight in weights(tmp_path / "two" / "final.pth").items():
        torch.testing.assert_close(weight, final[name], rtol=1e-4, atol=1e-5, msg=name)
    # without step 2 it is all that follows prune.py
    server.run(*args, "--exp_dir", tmp_path / "alone", "--final", "null")
    alone, before = load_model(tmp_path / "alone" / "final.pth"), load_model(reference / "pruned.pth")
    changed = {name for (name, p), q in zip(alone.named_parameters(), before.parameters()) if not torch.equal(p, q)}
    assert changed and all(".out_proj." in name or ".output_dense." in name for name in changed)
