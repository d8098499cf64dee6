"""Which runs a sweep has, and what a list is that is a setting's one value."""

from __future__ import annotations

import pytest

from distillation.errors import UserError
from distillation.sweep import runs_of

DEMO = ["--config", "conf/demo.yaml", "--exp_dir", "E"]


def runs(*flags: str) -> dict[str, list[str]]:
    """Folder -> flags without those that all share."""
    found = {}
    for run in runs_of([*DEMO, *flags]):
        assert run.flags[:4] == DEMO and run.flags[-2:] == ["--exp_dir", str(run.exp_dir)]
        found[str(run.exp_dir)] = run.flags[4:-2]
    return found


def test_a_run_per_value():
    assert runs("--pruning.target_sparsity", "[0.3, 0.75]", "--seed=7") == {
        "E/target_sparsity=0.3": ["--seed", "7", "--pruning.target_sparsity", "0.3"],
        "E/target_sparsity=0.75": ["--seed", "7", "--pruning.target_sparsity", "0.75"],
    }


def test_several_lists_give_their_product():
    found = runs("--optim.lr", "[1e-3,2e-3]", "--final.lr", "[1e-4,2e-4]", "--trainer.recompute=[true,false]")
    assert len(found) == 8 and next(iter(found)) == "E/optim.lr=1e-3,final.lr=1e-4,recompute=true"
    assert ["--optim.lr", "2e-3", "--final.lr", "2e-4", "--trainer.recompute", "false"] in found.values()


def test_a_list_that_the_setting_takes_is_one_value():
    found = runs(
        "--pruning.units", "[conv,head]", "--objective.layer_to_layer.layers", "[[0],[2,6]]", "--seed", "[1,2]"
    )
    assert list(found) == ["E/seed=1", "E/seed=2"]
    assert found["E/seed=1"][:2] == ["--pruning.units", "[conv,head]"]
    found = runs("--pruning.units", "[[head],[conv,head]]")
    assert list(found) == ["E/units=head", "E/units=conv_head"]
    found = runs("--objective.layer_to_layer.layers", "[[[0],[6]],[[0],[3,6]]]", "--optim.betas", "[0.9,0.98]")
    assert len(found) == 2
    targets = ["--pruning.cost", "macs", "--pruning.target", "[500 GMACs,1.2TMACs]"]
    assert list(runs(*targets, "--pruning.multiple_of", "[1,8]")) == [
        "E/target=500_GMACs,multiple_of=1", "E/target=500_GMACs,multiple_of=8", "E/target=1.2TMACs,multiple_of=1",
        "E/target=1.2TMACs,multiple_of=8",
    ]  # fmt: skip
    assert list(runs("--teacher_id", "[org/a,org/b]")) == ["E/teacher_id=org_a", "E/teacher_id=org_b"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seed", "3"], "nothing to sweep: give a flag a list of values"),
        (["--seed", "[3]"], "--seed [3]: a sweep needs at least two values"),
        (["--seed", "[3,3]"], "E/seed=3 and E/seed=3 would be the same run: name each value once"),
        (["--optim.lr", "[0.01,1.0e-2]"], "E/lr=0.01 and E/lr="),
        (["--data.tsv_dir", "[a/b,a_b]"], "two runs of the sweep would be in E/tsv_dir=a_b"),
        (["--seed", "[1,2]", "--seed", "[3,4]"], "give one list of values for a setting"),
        (["--exp_dir", "[a,b]"], "and none for the folder"),
        (["--pruning.target_sparsity", "[0.5,1.5]"], "pruning.target_sparsity is 1.5"),
        (["--pruning.goal", "[0.5,0.6]"], "--pruning.goal: no such setting; there are units"),
        (["--pruning.target", "[0.5,0.6]"], "pruning.target is 0.5, and its unit is missing"),
        (["--pruning.target", "[20k,35ms]"], "pruning.target is 35ms, and pruning.cost is params"),
        (["--seed", "[1,2]", "x"], "x: a flag is needed here"),
    ],
)
def test_mistakes_are_told_before_anything_runs(flags, message):
    with pytest.raises(UserError) as caught:
        runs_of([*DEMO, *flags])
    assert message in str(caught.value)
