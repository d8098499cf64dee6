"""Milliseconds of a latency table: straight lines by hand, expectations over masks, and files that are refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from distillation.budget import Budget, Milliseconds
from distillation.errors import UserError
from distillation.latency import Curve, LatencyTable, Surface, read_latency
from distillation.sparsity import Lagrangian, PruningConfig, make_prunable
from tests.configs import TINY, first_layers
from tests.latency import latency_content, write_latency
from wav2vec2 import prune, wav2vec2_model


def curve(units: list[int], ms: list[float], **options: bool) -> Curve:
    return Curve({"units": units, "ms": ms}, **options)


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return wav2vec2_model(**TINY).eval()


@pytest.fixture
def table() -> LatencyTable:
    return LatencyTable(latency_content(TINY), "latency.json")


def test_straight_lines_between_and_beyond_what_was_measured():
    found = curve([4, 8, 16], [2.0, 4.0, 12.0])
    for units, ms in ((4, 2), (6, 3), (8, 4), (12, 8), (16, 12), (2, 1), (0, 0), (20, 16)):
        assert found(units).item() == found(torch.tensor(float(units))).item() == ms, units
    assert curve([4, 8], [1.0, 4.0])(0).item() == 0, "never negative"
    assert curve([4], [3.0])(1).item() == curve([4], [3.0])(9).item() == 3
    units = torch.tensor(12.0, dtype=torch.float64, requires_grad=True)
    found(units).backward()
    assert units.grad.item() == 1  # 8 ms over 8 units


def test_a_block_takes_by_itself_what_the_first_two_sizes_say():
    for ms, base in (([3.0, 5.0, 12.0], 1), ([2.0, 6.0, 12.0], 0), ([3.0, 3.0, 12.0], 3)):
        found = curve([4, 8, 16], ms, from_zero=True)
        assert found(0).item() == base and [found(n).item() for n in (4, 8, 16)] == ms
        assert found.expected(8, 1).item() == ms[1] and found.expected(0, 0).item() == 0
        assert found.expected(torch.tensor(4.0), torch.tensor(0.25)).item() == pytest.approx(ms[0] - 0.75 * base)


def test_all_units_may_take_less():
    found = curve([4, 15, 16], [2.0, 8.0, 5.0])
    for units, ms in ((4, 2), (15, 8), (15.5, 8 + 3 / 11), (16, 5)):
        assert found(units).item() == pytest.approx(ms)
        at = torch.tensor(float(units), dtype=torch.float64, requires_grad=True)
        found(at).backward()
        assert found(at).item() == pytest.approx(ms) and at.grad.item() == pytest.approx(6 / 11), "none gains by rising"
    assert curve([15, 16], [8.0, 5.0], from_zero=True)(0).item() == pytest.approx(0, abs=1e-9)
    found = Curve({"units": [8, 12], "ms": [2.0, 1.5]}, multiple_of=8)
    assert [found(n).item() for n in (0, 4, 8, 12)] == [0, 1, 2, 1.5], "fewer units never take more than the first size"
    assert curve([4, 15, 16], [2.0, 8.0, 20.0])(15.5).item() == 14, "a step upwards is as it was measured"
    found = Surface({"inputs": [2, 3, 4], "units": [7, 8], "ms": [[3, 2], [4, 3], [1, 9]]})
    assert (found(3, 7).item(), found(4, 7).item(), found(3, 8).item(), found(4, 8).item()) == (4, 1, 3, 9)


@pytest.mark.parametrize(
    ("units", "factor"),  # of the time without the last channel
    [(["conv"], 0.8), (["conv", "interm"], 1.0)],
)
def test_masks_reach_a_target_where_all_units_take_less(teacher, units, factor):
    """Masks alone, from the published start, at which 12 channels are 11.9."""
    content = latency_content(TINY)
    for i, entry in enumerate(content["conv"]):
        entry["units"].insert(-1, 11)
        entry["ms"] = [[*row[:-1], row[-1], factor * row[-1]] for row in entry["ms"]]
        if i:
            entry["inputs"].insert(-1, 11)
            entry["ms"] = [*entry["ms"][:-1], entry["ms"][-1], [factor * ms for ms in entry["ms"][-1]]]
    table, config = LatencyTable(content, "x"), PruningConfig(units=units, warmup_steps=200)
    masked = make_prunable(teacher, config)
    budget = Budget.of_share(Milliseconds(table), table(teacher).item(), 0.2)
    lagrangian = Lagrangian(budget, config)
    masks = torch.optim.Adam([mask.log_alpha for mask in masked.masks().values()], 0.02)
    multipliers = torch.optim.Adam(lagrangian.parameters(), 0.02, maximize=True)
    for step in range(600):
        lagrangian(budget.cost(masked), step).backward()
        for optimizer in (masks, multipliers):
            optimizer.step()
            optimizer.zero_grad()
    assert lagrangian.sparsity(budget.cost(masked)).item() == pytest.approx(0.2, abs=0.005)


def test_blocks_of_one_unit():
    """Nothing is there to go on with a line from; without the unit, the block is gone."""
    for units, ms in (([1], [3.0]), ([0, 1], [2.0, 3.0])):
        found = curve(units, ms, from_zero=True)
        assert found(1).item() == found(torch.tensor(1.0)).item() == 3
        assert found.expected(torch.tensor(1.0), 1.0).item() == 3 and found.expected(0, 0).item() == 0


def test_surfaces_in_both_directions():
    found = Surface({"inputs": [2, 4], "units": [4, 8], "ms": [[4, 6], [8, 14]]})
    for num_in, num_out, ms in (
        (2, 4, 4),
        (4, 8, 14),
        (3, 6, 8),
        (2, 6, 5),
        (3, 4, 6),
        (1, 4, 2),
        (5, 4, 10),
        (2, 10, 7),
    ):
        assert found(num_in, num_out).item() == ms, (num_in, num_out)
    first = Surface({"inputs": [1], "units": [4, 8], "ms": [[4, 6]]})
    assert first(1, 5).item() == 4.5


def test_a_model_takes_what_its_blocks_take(table, teacher):
    """Worked out from the file: of the whole model, and of one with half of everything."""
    content = latency_content(TINY)
    blocks = [content[name][0]["ms"] for name in ("attention", "feed_forward")]
    convs = [entry["ms"][-1][-1] for entry in content["conv"]]
    whole = 0.7 + sum(convs) + content["projection"]["ms"][-1] + 4 * (blocks[0][-1] + blocks[1][-1])
    assert table(teacher).item() == pytest.approx(whole, rel=1e-12)

    masked = make_prunable(teacher, PruningConfig(units=["conv", "head", "interm", "attlayer"]))
    half = {mask: torch.full((len(mask),), 0.5, dtype=torch.float64) for mask in masked.masks().values()}
    channels = 12 * 0.5 + 0.5**12  # one is always kept
    expected = 0.7 + table.projection(channels) + table.conv[0](1, channels)
    expected += sum(surface(channels, channels) for surface in list(table.conv)[1:])
    # 4 heads and 40 units, each there with 1/2, and the attention itself with 1/2 besides
    expected += 4 * table.attention["0"].expected(1.0, 0.5 * (1 - 0.5**4))
    expected += 4 * table.feed_forward["0"].expected(20.0, 1 - 0.5**40)
    assert table(masked, half.__getitem__).item() == pytest.approx(expected.item(), rel=1e-12)


def test_layers_have_curves_of_their_own(teacher):
    content = latency_content(TINY)
    (entry,) = content["attention"]
    content["attention"] = [{**entry, "layers": [0, 2, 3]}, {"layers": [1], "units": [4], "ms": [100.0]}]
    before = LatencyTable(latency_content(TINY), "x")(teacher)
    assert (LatencyTable(content, "x")(teacher) - before).item() == pytest.approx(100 - entry["ms"][-1])


def test_it_moves_and_is_copied_with_what_holds_it(table, teacher):
    budget = Budget.of_share(Milliseconds(table), table(teacher).item(), 0.5)
    lagrangian = Lagrangian(budget, PruningConfig())
    assert lagrangian.state_dict().keys() == {"lambda1", "lambda2"}, "names in checkpoints"
    moved = copy.deepcopy(lagrangian).to("meta")
    assert {buffer.device.type for buffer in moved.buffers()} == {"meta"}
    assert {buffer.device.type for buffer in lagrangian.buffers()} == {"cpu"}
    assert copy.deepcopy(table)(teacher) == table(teacher)


# Files


def refusal(path, model=None) -> str:
    with pytest.raises(UserError) as error:
        read_latency(path).check(model)
    assert "\n" not in str(error.value) and str(error.value).startswith(str(path))
    return str(error.value)


def test_files_that_are_none(tmp_path):
    path = tmp_path / "latency.json"
    for make, said in (
        (lambda: None, f"no such latency table; make it with python -m evaluation.latency TEACHER --out {path}"),
        (path.mkdir, "no such latency table"),
        (lambda: (path.rmdir(), path.write_bytes(b"[" * 100_000)), "not a latency table, damaged"),
        (lambda: path.write_bytes(b"\xff\xfe"), "not a latency table, damaged"),
        (lambda: path.write_text(json.dumps(latency_content(TINY))[:-9]), "not a latency table, damaged"),
        (lambda: path.write_bytes(b" " * 10_000_001), "too large for a latency table"),
    ):
        make()
        assert said in refusal(path)


FULL = latency_content(TINY)
CONV, (ATTENTION,) = FULL["conv"], FULL["attention"]


@pytest.mark.parametrize(
    "changes",
    [
        {"config": None},
        {"config": {}},
        {"seconds": "ten"},
        {"fixed": None},
        {"fixed": -1},
        {"fixed": float("nan")},
        {"fixed": 10**400},
        {"conv": CONV[:-1]},
        {"conv": [*CONV[:-1], {**CONV[-1], "ms": CONV[-1]["ms"][:-1]}]},
        {"conv": [{"inputs": [1], "units": [12], "ms": [1.0]}, *CONV[1:]]},
        {"conv": [{"inputs": [1], "units": [12], "ms": [[[1.0]]]}, *CONV[1:]]},
        {"projection": {"units": [6, 12]}},
        {"projection": {"units": [6, 12], "ms": [1.0]}},
        {"projection": {"units": [12, 6], "ms": [1.0, 2.0]}},
        {"projection": {"units": [], "ms": []}},
        {"projection": {"units": [6, 12], "ms": [2.0, 1.9]}},
        {"projection": {"units": [6, 11, 12], "ms": [2.0, 1.9, 3.0]}},
        {"projection": {"units": [8, 12], "ms": [2.0, 1.9]}, "multiple_of": 3},
        {"conv": [{"inputs": [1], "units": [6, 12], "ms": [[2.0, 1.9]]}, *CONV[1:]]},
        {"conv": [CONV[0], {"inputs": [6, 12], "units": [12], "ms": [[2.0], [1.9]]}, *CONV[2:]]},
        {"multiple_of": "eight"},
        {"multiple_of": 0},
        {"multiple_of": True},
        {"attention": []},
        {"attention": [{**ATTENTION, "layers": [0, 1, 2]}]},
        {"attention": [{**ATTENTION, "layers": ["x"]}]},
        {"attention": [{**ATTENTION, "layers": [0, 1, 2, float("inf")]}]},
        {"attention": [{**ATTENTION, "ms": [1e308] * len(ATTENTION["ms"])}]},
        {"config": {**FULL["config"], "encoder_ff_interm_features": [None] * 4}},
        {"attention": [{"layers": [0, 1, 2, 3], "units": [0], "ms": [1.0]}]},
    ],
)
def test_damaged_tables(tmp_path, changes):
    """Times that fall are among them, but for a last step to all units."""
    path = tmp_path / "latency.json"
    path.write_text(json.dumps({**FULL, **changes}))
    assert "latency.json: not a latency table, damaged, or with times that fall" in refusal(path)


def test_tables_of_another_model(table, teacher, tmp_path):
    path = tmp_path / "latency.json"
    others = {
        "encoder_num_layers 3, not 4": first_layers(TINY, 3),
        "encoder_embed_dim 48, not 24": {**TINY, "encoder_embed_dim": 48},
        "extractor_mode layer_norm, not group_norm": {**TINY, "extractor_mode": "layer_norm"},
        "encoder_time_reduction 2, not None": {**TINY, "encoder_time_reduction": 2},
        "other kernels or strides": {**TINY, "extractor_conv_layer_config": [(12, 10, 5)] * 7},
        "interm of [40, 40, 40, 39], not [40, 40, 40, 40]": {**TINY, "encoder_ff_interm_features": [40, 40, 40, 39]},
    }
    for difference, config in others.items():
        write_latency(path, config)
        assert f"is of another model ({difference}): measure this one" in refusal(path, teacher)
    write_latency(path, TINY)
    uneven = wav2vec2_model(**TINY, encoder_head_channels=[[[2, 3]] * 4] * 4)
    assert "(heads of unequal width, whose times are not measured)" in refusal(path, uneven)
    # what is already smaller has the same blocks
    masked = make_prunable(teacher, PruningConfig(units=["conv", "head", "ffnlayer"]))
    for mask in masked.masks().values():
        mask.log_alpha.data.fill_(-1.0)[0] = 1.0
    write_latency(path, TINY)
    read_latency(path).check(prune(masked)[0])
