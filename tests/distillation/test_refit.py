"""The closed-form fit after pruning: the formula restated, models of every kind, padding, and as a stage."""

from __future__ import annotations

import copy
import dataclasses
import math
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from distillation import refit as module
from distillation.config import parse_recipe
from distillation.data.batching import select_utterances
from distillation.data.config import DataConfig
from distillation.data.loaders import Batch, Place
from distillation.data.manifest import Manifest, read_tsv
from distillation.errors import UserError
from distillation.refit import check_refit, draw, read_all, refit
from tests.configs import TINY, first_layers
from tests.helpers import weights
from wav2vec2 import Wav2Vec2Model, prune, wav2vec2_model
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
    """FFN of a layer without attention, by numpy, with one ridge."""
    monkeypatch.setattr(module, "RIDGES", (0.1,))
    teacher = make_teacher()
    model = pruned(teacher)
    model.encoder.transformer.layers[0].attention = None
    before = copy.deepcopy(model.encoder.transformer.layers[0].feed_forward)
    batches = noise(4)
    found = refit(model, teacher, batches[1:], batches[:1])
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
    found = refit(model, teacher, noise(6, (6000, 4000)), noise(2, (6000, 4000), seed=4))
    assert model.training and all(one.after <= one.before for one in found) and len(found) >= 5
    assert any(one.ridge < math.inf for one in found)
    model.eval()
    assert distance() < 0.5 * before


def test_what_is_whole_stays_as_it_is():
    """A copy of the teacher has nothing to gain: no weight changes by a bit."""
    teacher = make_teacher()
    model = copy.deepcopy(teacher)
    found = refit(model, teacher, noise(3), noise(1, seed=4))
    assert all(one.ridge == math.inf and one.before == one.after < 1e-9 for one in found) and len(found) == 6
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), teacher.parameters()))


def test_padding_does_not_count():
    teacher = make_teacher()
    models = pruned(teacher), pruned(teacher)
    held = noise(1)
    rows = [one.waveforms[0, :length] for one, length in zip(noise(4, seed=3), (6000, 5000, 4000, 3000))]
    padded = [batch(rows[:2]), batch(rows[2:])]
    alone = [batch([row]) for row in rows]
    for model, batches in zip(models, (padded, alone)):
        refit(model, teacher, batches, held)
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters()):
        torch.testing.assert_close(p, q, rtol=2e-3, atol=2e-3, msg=name)


def test_the_ridge_is_chosen_on_held_out_audio(monkeypatch):
    """After the norm that follows, of those in the table and of leaving everything as it is."""
    teacher = make_teacher()
    batches, held = noise(3), noise(2, (5000,), seed=9)

    def fitted(ridges: tuple[float, ...]) -> tuple[Wav2Vec2Model, list[module.Fitted]]:
        monkeypatch.setattr(module, "RIDGES", ridges)
        model = pruned(teacher)
        return model, refit(model, teacher, batches, held)

    def error(model: Wav2Vec2Model) -> float:
        """Of the first layer's attention, by the forward pass."""
        wrong = square = 0.0
        with torch.no_grad():
            for one in held:
                x, t = (m.run(one.waveforms, None)[0].layer_input for m in (model, teacher))
                first, other = (m.encoder.transformer.layers[0] for m in (model, teacher))
                ours = first.layer_norm(x + first.attention(x, None, None, {})[0])
                theirs = other.layer_norm(t + other.attention(t, None, None, {})[0])
                wrong, square = wrong + (ours - theirs).square().sum(), square + theirs.square().sum()
        return float(wrong / square)

    ridges = (1e-6, 1e-2, 1e2)
    alone = {ridge: fitted((ridge,))[0] for ridge in ridges}
    errors = {ridge: error(model) for ridge, model in alone.items()} | {math.inf: error(pruned(teacher))}
    model, found = fitted(ridges)
    assert found[0].ridge == min(errors, key=errors.__getitem__) and len(set(errors.values())) == 4
    assert found[0].after == pytest.approx(min(errors.values()), rel=1e-4)
    assert found[0].before == pytest.approx(errors[math.inf], rel=1e-4)
    assert error(model) == pytest.approx(min(errors.values()), rel=1e-4)


REUSE = [False, True, False]


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (first_layers(TINY, 2), "another depth or width than the teacher: leave refit out"),
        (first_layers(TINY, 3) | {"encoder_time_reduction": 2}, "shorten the sequence of frames"),
        (first_layers(TINY, 3) | {"encoder_reuse_attention": REUSE, "encoder_layer_drop": 0.0}, "reuse attention maps"),
    ],
)
def test_refusals(config, complaint):
    student = wav2vec2_model(**config)
    with pytest.raises(UserError, match=complaint):
        check_refit(student, make_teacher())
    with pytest.raises(UserError, match=complaint):
        refit(student, make_teacher(), noise(1), noise(1))


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--final", "null"], "between prune.py and step 2, and final is null: leave refit out"),
        (["--pruning.units", "[]"], "between prune.py and step 2, and pruning.units is empty: leave refit out"),
        (["--refit.minutes", "0"], "refit.minutes is 0.0: it must be positive"),
    ],
)
def test_recipes_with_nothing_to_fit_are_refused(flags, complaint):
    with pytest.raises(UserError, match=complaint):
        parse_recipe(["--refit.minutes", "8", *flags])


class TestAudio:
    """Which audio is fitted to."""

    config = DataConfig(min_frames=8000, max_frames=120_000, seconds_per_batch=40.0, num_workers=0)

    def test_minutes_end_with_the_list_and_recordings_are_on_one_side(self):
        names = [f"{recording}.flac" for recording in range(40) for _ in range(5)]
        manifest = Manifest(Path("/nowhere"), names, np.full(200, 300_000), np.tile(np.arange(5) * 300_000, 40))
        config = dataclasses.replace(self.config, long="split")
        everything = select_utterances(manifest, config)
        for minutes in (4.0, 30.0, 1e6):
            parts = draw(manifest, config, 7, minutes)
            pieces = [set(zip(part.index.tolist(), part.start.tolist())) for part in parts]
            recordings = [{manifest.paths[index] for index in part.index} for part in parts]
            assert not pieces[0] & pieces[1] and not recordings[0] & recordings[1]
            seconds = [part.num_frames.sum() / 16_000 for part in parts]
            if minutes < 1e6:
                assert 60 * minutes <= sum(seconds) <= 60 * minutes + 7.5
            else:
                assert len(pieces[0] | pieces[1]) == len(everything.index)
            assert seconds[1] == pytest.approx(0.25 * sum(seconds), rel=0.4)
        other = draw(manifest, config, 8, 4.0)
        assert not np.array_equal(draw(manifest, config, 7, 4.0)[0].index, other[0].index)

    def test_few_minutes_of_long_utterances(self):
        manifest = Manifest(Path("/nowhere"), ["1.flac", "2.flac"], np.array([100_000, 100_000]))
        assert [len(part.index) for part in draw(manifest, self.config, 0, 0.01)] == [1, 1]
        with pytest.raises(UserError, match="all under /nowhere is one recording, and another chooses the ridge"):
            draw(Manifest(Path("/nowhere"), ["1.flac"], np.array([100_000])), self.config, 0, 8.0)

    def test_files_that_cannot_be_read(self, tsv_dir, tmp_path, caplog):
        manifest = read_tsv(tsv_dir / "train100.tsv")
        selection = select_utterances(manifest, self.config)
        place, cpu = Place(), torch.device("cpu")
        read = read_all(manifest, selection, self.config, place, cpu)
        assert sum(len(batch.waveforms) for batch in read) == len(selection.index)
        gone = dataclasses.replace(manifest, root=tmp_path)
        with pytest.raises(UserError, match=f"files cannot be used: {tmp_path}.*is the disk of the audio there"):
            read_all(gone, selection, self.config, place, cpu)
        one = dataclasses.replace(manifest, paths=list(manifest.paths))
        one.paths[selection.index[0]] = "nothing.flac"
        lenient = dataclasses.replace(self.config, max_bad_share=0.5)
        kept = read_all(one, selection, lenient, place, cpu)
        assert sum(len(batch.waveforms) for batch in kept) < len(selection.index)
        assert "refit: left out: " in caplog.text and "nothing.flac" in caplog.text


def test_as_a_stage(server, reference, tiny_flags, tmp_path):
    """Before the first update, once; a run that is killed and goes on ends with the same weights."""
    args = ["final_distill.py", *tiny_flags, "--student_ckpt", reference / "pruned.pth", "--refit.minutes", 0.3]
    whole = server.run(*args, "--exp_dir", tmp_path / "whole")
    assert "refit: layer 1 " in whole.output
    server.run(*args, "--exp_dir", tmp_path / "killed", fault=["kill", "update", 4], code=-signal.SIGKILL)
    resumed = server.run(*args, "--exp_dir", tmp_path / "killed")
    server.run(*args, "--exp_dir", tmp_path / "early", fault=["kill", "update", 1], code=-signal.SIGKILL)
    server.run(*args, "--exp_dir", tmp_path / "early")  # no checkpoint yet: fitted once more
    assert "refit" not in resumed.output.replace("refit.minutes", "")
    final, plain = weights(tmp_path / "whole" / "final.pth"), weights(reference / "final" / "final.pth")
    for other in ("killed", "early"):
        assert all(torch.equal(final[k], v) for k, v in weights(tmp_path / other / "final.pth").items())
    assert any(not torch.equal(final[k], v) for k, v in plain.items())
    # of two processes the first fits, and the other begins with what it has
    server.run(*args, "--exp_dir", tmp_path / "two", "--trainer.devices", 2)
    for name, weight in weights(tmp_path / "two" / "final.pth").items():
        torch.testing.assert_close(weight, final[name], rtol=1e-4, atol=1e-5, msg=name)
