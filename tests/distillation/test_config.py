"""Recipes: bases, flags, errors, and what a run saves."""

from __future__ import annotations

from pathlib import Path

import pytest

from distillation.config import RECIPES, parse_recipe, recipe_chain
from distillation.errors import UserError

CONF = Path(__file__).parents[2] / "conf"


def parse(*argv: object):
    return parse_recipe([str(word) for word in argv])[0]


def test_published_settings():
    recipe = parse("--config", CONF / "dphubert_base.yaml")
    assert recipe.objective.layer_to_layer.layers == [[0], [4, 8, 12]]
    weights = recipe.objective.layer_to_layer
    assert (weights.l1, weights.l2, weights.cos, weights.cos_type) == (1, 0, 1, "raw")
    assert (recipe.optim.max_steps, recipe.optim.lr, recipe.optim.warmup_steps) == (50000, 2e-4, 15000)
    assert (recipe.final.max_steps, recipe.final.lr, recipe.final.warmup_steps) == (25000, 1e-4, 5000)
    assert (recipe.optim.weight_decay, recipe.optim.clip, recipe.optim.betas) == (0, 10, (0.9, 0.999))
    pruning = recipe.pruning
    assert (pruning.target_sparsity, pruning.warmup_steps, pruning.lr_masks, pruning.lr_lagrangian) == (
        0.75, 5000, 0.02, 0.02)  # fmt: skip
    assert (pruning.cost, pruning.target, pruning.latency, pruning.multiple_of) == ("params", None, None, 1)
    assert pruning.units == ["conv", "head", "interm"] and not pruning.drop_rates and not pruning.constant_lr
    data = recipe.data
    assert (data.min_frames, data.max_frames, data.num_buckets, data.seconds_per_batch) == (32000, 250000, 1000, 160)
    assert recipe.trainer.batches_per_update == 4  # 4 GPUs


def test_ablations_differ_in_one_thing():
    base = parse("--config", CONF / "dphubert_base.yaml")
    assert parse("--config", CONF / "dphubert_base_nocnn.yaml").pruning.units == ["head", "interm"]
    assert parse("--config", CONF / "dphubert_base_nostep2.yaml").final is None
    assert parse("--config", CONF / "dphubert_base_100h.yaml").data.train == "train100.tsv"
    predlayer = parse("--config", CONF / "dphubert_base_predlayer.yaml")
    assert predlayer.objective.layer_to_layer is None and predlayer.objective.prediction_layer.layers == [0, 4, 8, 12]
    assert predlayer.optim == base.optim and predlayer.pruning == base.pruning


def test_flags_override_recipes_and_keep_the_rest():
    recipe = parse("--config", CONF / "demo.yaml", "--objective.layer_to_layer.l1", 0.5, "--final", "null")
    assert recipe.objective.layer_to_layer.l1 == 0.5
    assert recipe.objective.layer_to_layer.layers == [[0], [2, 4, 6]]
    assert recipe.final is None


@pytest.mark.slow
def test_resolved_recipe_round_trips(tmp_path):
    for path in CONF.glob("*.yaml"):
        recipe, resolved = parse_recipe(["--config", str(path), "--seed", "7"])
        (tmp_path / "config.yaml").write_text(resolved)
        again, text = parse_recipe(["--config", str(tmp_path / "config.yaml")])
        assert again == recipe and text == resolved and recipe.seed == 7, path


def test_chain(tmp_path):
    (tmp_path / "a.yaml").write_text("seed: 1\ndata: {train: a.tsv}\noptim: {lr: 0.5}\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\ndata: {valid: b.tsv}\noptim: {lr: 0.25}\n")
    (tmp_path / "c.yaml").write_text("base: b.yaml\nseed: 3\n")
    assert [path.name for path in recipe_chain(tmp_path / "c.yaml")] == ["a.yaml", "b.yaml", "c.yaml"]
    recipe = parse("--config", tmp_path / "c.yaml")
    assert (recipe.seed, recipe.data.train, recipe.data.valid, recipe.optim.lr) == (3, "a.tsv", "b.tsv", 0.25)
    assert recipe.base is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "not valid YAML"),
        ("- 1", "a recipe is a mapping"),
        ("optim: {lrr: 1}", "recipe.yaml: .*lrr"),
        ("nothing: 1", "recipe.yaml: .*nothing"),
        ("optim: {lr: fast}", "recipe.yaml: optim.lr"),
        ("base: none.yaml", "none.yaml: no such recipe; those in conf/ are .*dphubert_base"),
        ("base: recipe.yaml", "its own base"),
        ("base: [1]", "base is"),
        ("pruning: {units: [neuron]}", "unknown unit 'neuron', choose from conv"),
        ("objective: {layer_to_layer: {layer: [1]}}", "layer_to_layer.layer: no such setting; there are .*layers"),
        ("pruning: {target: 500}", "pruning.target is 500, and its unit is missing: write 23.6M"),
        (
            "pruning: {target: 1M, units: []}",
            "pruning.target is 1M, and pruning.units is empty: this recipe prunes nothing",
        ),
        ("pruning: {target: 35ms}", "pruning.target is 35ms, and pruning.cost is params: set --pruning.cost"),
        ("pruning: {cost: time}", "recipe.yaml: pruning.cost is time: it must be one of params, macs, milliseconds$"),
        ("pruning: {cost: milliseconds}", "pruning.cost is milliseconds: measure the machine that will"),
        ("pruning: {multiple_of: 0}", "pruning.multiple_of is 0: it must be at least 1"),
        ("pruning: null", "recipe.yaml: pruning is None: a mapping of settings is needed; for no pruning"),
        ("optim: 3", "recipe.yaml: optim is 3: a mapping of settings is needed"),
        ("seed: -1", "seed is -1"),
        ("optim: {schedule: slow}", "recipe.yaml: optim.schedule is slow: it must be one of linear, cosine, constant$"),
        ("objective: {scale_gradients: true}", "scale_gradients is True: it must be one of released, paper, null$"),
        ("student: {thin: {reuse_attention: yes}}", "student.thin.reuse_attention is True: .* released, paper, null$"),
        ("objective: {masking: {spans: x}}", "objective.masking.spans is x: it must be one of released, paper$"),
        ("student: {thin: {width: x}}", "student.thin.width: Expected a <class 'int'>"),
        ("seed: 99999999999999999999999", "seed is 9"),
        ("optim: {lr: .nan}", "lr is nan: it must be positive"),
        ("objective: {hnt: {}}", "objective.hnt: no such setting; there are layer_to_layer.*hint"),
        ("seed: !!python/object/apply:os.system ['false']", "not valid YAML"),
    ],
)
def test_bad_recipes(text, message, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        parse("--config", tmp_path / "recipe.yaml")
    assert "\n" not in str(error.value)


def test_printed_settings_are_those_of_the_recipe(capsys):
    for order in (
        ["--print_config", "--config", RECIPES / "demo.yaml"],
        ["--config", RECIPES / "demo.yaml", "--print_config"],
    ):
        with pytest.raises(SystemExit):
            parse(*order)
        assert "exp_dir: demo_out/run" in capsys.readouterr().out


def test_help_of_a_section(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--objective.layer_to_layer.help")
    assert stop.value.code == 0 and "--objective.layer_to_layer.cos_type" in capsys.readouterr().out


def test_bad_files(tmp_path):
    for name, content in (("big.yaml", b"a: 1\n" * 300_000), ("binary.yaml", b"\xff\xfe\x00")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            parse("--config", tmp_path / name)
    with pytest.raises(UserError, match="--config needs"):
        parse("--config")
