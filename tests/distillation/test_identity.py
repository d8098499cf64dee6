"""Every setting of a recipe has its place: part of what a run is, or free to change."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch

from distillation.config import Recipe, flat_settings, parse_recipe
from distillation.data.manifest import Manifest
from distillation.errors import UserError
from distillation.identity import (
    DROPOUT,
    LATENCY,
    PRUNED,
    STEP_1,
    STEP_2,
    STUDENT,
    check_student,
    content_of,
    step_1_identity,
    step_2_identity,
)
from distillation.lists import Lists
from distillation.training.record import RUN, Identity, Kinds, Record, differences
from distillation.training.standing import Standing
from tests.configs import TINY
from tests.latency import write_latency
from wav2vec2 import wav2vec2_model
from wav2vec2.checkpoint import Checkpoint

# (distill.py, final_distill.py, shell recipes, which run both) -> settings. A new setting is placed here by hand.
RECIPE = {
    ("identity", "identity", "identity"): """
        seed data.sample_rate data.min_frames data.max_frames data.long data.num_buckets data.crop data.reshuffle
        data.transcripts.case data.noise.share data.noise.snr data.noise.babble data.noise.reverberation
        objective.layer_to_layer.l1 objective.layer_to_layer.l2 objective.layer_to_layer.cos
        objective.layer_to_layer.cos_type objective.layer_to_layer.layers
        objective.prediction_layer.l1 objective.prediction_layer.l2 objective.prediction_layer.cos
        objective.prediction_layer.cos_type objective.prediction_layer.layers objective.prediction_layer.heads
        objective.hint.layers objective.hint.last objective.hint.hint
        objective.masking.probability objective.masking.span objective.masking.spans objective.masking.min_space
        objective.masking.min_spans objective.masking.layers objective.masking.last objective.masking.hint
        objective.temporal_relation.layer objective.temporal_relation.intra objective.temporal_relation.attention
        objective.temporal_relation.layers objective.temporal_relation.relative
        objective.ctc.weight objective.ctc.distill objective.ctc.temperature objective.ctc.vocabulary
        objective.scale_gradients objective.extractor_gradient""",
    ("identity", "elsewhere", "identity"): """
        student.thin.num_layers student.thin.width student.thin.heads student.thin.ffn student.thin.channels
        student.thin.pos_conv_kernel student.thin.pos_conv_groups student.thin.time_reduction
        student.thin.reuse_attention student.thin.dropout student.thin.input_dropout
        student.layers.layers student.layers.norms student.layers.ffn_dropout student.layers.input_dropout
        student.slice.num_params student.dropout
        pruning.units pruning.cost pruning.target_sparsity pruning.target pruning.macs_seconds pruning.multiple_of
        pruning.warmup_steps pruning.drop_rates optim.decays""",
    ("elsewhere", "identity", "identity"): "final.decays",
    ("rates", "elsewhere", "rates"): """
        pruning.lr_masks pruning.lr_lagrangian pruning.constant_lr optim.max_steps optim.max_epochs optim.lr
        optim.freeze_steps optim.lr_new
        optim.warmup_steps optim.warmup_ratio optim.schedule optim.betas optim.eps optim.weight_decay optim.clip""",
    ("elsewhere", "rates", "rates"): """
        final.max_steps final.max_epochs final.lr final.freeze_steps final.lr_new
        final.warmup_steps final.warmup_ratio final.schedule final.betas
        final.eps final.weight_decay final.clip""",
    ("free", "free", "free"): """
        data.seconds_per_batch data.utterances_per_batch data.num_workers data.valid_seconds_per_batch
        data.max_bad_share trainer.accelerator trainer.devices trainer.num_nodes trainer.precision
        trainer.teacher_precision trainer.recompute trainer.batches_per_update trainer.log_every
        trainer.validate_every trainer.checkpoint_every trainer.checkpoint_minutes trainer.max_skipped_updates""",
    # names of files and folders, whose content counts, and what is only checked or asked for
    ("elsewhere", "elsewhere", "elsewhere"): """
        base teacher_ckpt teacher_id teacher_layers teacher_width student_ckpt exp_dir data.tsv_dir data.train
        data.valid data.transcripts.train data.transcripts.valid data.transcripts.audio data.noise.folders
        data.noise.impulse_responses pruning.latency continue_with_changes""",
}  # fmt: skip


def names_of(kind: type, prefix: str = "") -> Iterator[str]:
    """All settings, those of sections that are null by default too."""
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        kinds = (hints[field.name], *get_args(hints[field.name]))
        section = next((k for k in kinds if isinstance(k, type) and dataclasses.is_dataclass(k)), None)
        if section is None:
            yield prefix + field.name
        else:
            yield from names_of(section, f"{prefix}{field.name}.")


def test_every_setting_of_a_recipe_is_placed():
    found: dict[tuple[str, str, str], set[str]] = {}
    for name in names_of(Recipe):
        first, second = STEP_1.of(name), STEP_2.of(name)
        both = next(kind for kind in ("identity", "rates", "free", "elsewhere") if kind in (first, second))
        found.setdefault((first, second, both), set()).add(name)
    assert found == {place: set(names.split()) for place, names in RECIPE.items()}


@pytest.fixture(scope="module")
def lists() -> Lists:
    frames = np.array([20000, 30000])
    kinds = ("train", "valid")
    return Lists(*(Manifest(Path("/data"), [f"{kind}/a.flac", f"{kind}/b.flac"], frames) for kind in kinds))


@pytest.fixture(scope="module")
def model():
    return wav2vec2_model(**TINY)


def recipe_of(*flags: object) -> Recipe:
    return parse_recipe(["--config", "conf/demo.yaml", "--teacher_ckpt", "t.pth", *map(str, flags)])[0]


@pytest.fixture(scope="module")
def verdicts(lists, model):
    """What becomes of the same command with other flags: of its step 1, of the student for step 2, of its step 2."""

    def identities(recipe: Recipe) -> tuple[Identity, Identity]:
        content = content_of(recipe, model, lists)
        return step_1_identity(recipe, content), step_2_identity(recipe, content, model, {})

    first, second = (Record.start(identity) for identity in identities(recipe_of()))
    student = Checkpoint(model, model.config, extra={RUN: first.entry(500, length=500, **{PRUNED: {}})})

    def run(*flags: object, on_request: bool = False) -> list[str]:
        step_1, step_2 = identities(recipe_of(*flags))
        found = []
        for attempt in (
            lambda: first.go_on(step_1, 500, Path("E/ckpts/last.ckpt"), on_request),
            lambda: check_student(student, "pruned.pth", step_1, on_request),
            lambda: second.go_on(step_2, 200, Path("E/final/ckpts/last.ckpt"), on_request),
        ):
            try:
                record = attempt()
            except UserError as error:
                found.append(str(error))
            else:
                found.append("same" if record is None or len(record.history) == 1 else "applied")
                if record is not None:
                    record.say_last_change()
        return found

    return run


@pytest.mark.parametrize(
    "flags",
    [
        ["--seed", 1],
        ["--data.min_frames", 9000],
        ["--data.seconds_per_batch", 40],  # another update
        ["--data.utterances_per_batch", 4],
        ["--trainer.batches_per_update", 2],
        ["--objective.layer_to_layer.l1", 0.5],
        ["--objective.layer_to_layer", "null", "--objective.hint", "{}"],
        ["--objective.hint", "{}"],  # another section is set
    ],
)
def test_what_a_run_is_cannot_change(verdicts, flags):
    for on_request in (False, True):
        first, student, second = verdicts(*flags, on_request=on_request)
        for verdict in (first, second):
            assert "last.ckpt is of a run with other settings: " in verdict and " -> " in verdict
            assert "cannot change in the middle of a run: use another --exp_dir" in verdict
        assert ("pruned.pth was made by another recipe: " in student) != on_request


@pytest.mark.parametrize(
    "flags",
    [
        ["--pruning.target_sparsity", 0.3],
        ["--pruning.target", "20k"],
        ["--pruning.cost", "macs"],
        ["--pruning.multiple_of", 8],
        ["--pruning.units", "[head]"],
        ["--student.slice", "{num_params: 9}"],
    ],
)
def test_step_2_takes_the_student_of_its_recipe(verdicts, flags):
    first, student, second = verdicts(*flags)
    assert "cannot change in the middle" in first and "was made by another recipe" in student and second == "same"


def test_length_and_rates_change_on_request(verdicts):
    for flags, step in ((["--optim.lr", 0.5], 0), (["--optim.max_steps", 900], 0), (["--final.max_steps", 900], 2),
                        (["--pruning.lr_lagrangian", 1.0], 0), (["--final.schedule", "constant"], 2)):  # fmt: skip
        refused, applied = verdicts(*flags), verdicts(*flags, on_request=True)
        assert "give --continue_with_changes, or use another --exp_dir, or move E" in refused[step]
        assert applied == (["applied", "same", "same"] if step == 0 else ["same", "same", "applied"])
        assert refused[2 - step] == "same"
        assert ("was made by another recipe" in refused[1]) == (step == 0)


@pytest.mark.parametrize(
    "flags",
    [
        ["--trainer.devices", 2],
        ["--trainer.precision", "bf16-mixed"],
        ["--data.num_workers", 3],
        ["--trainer.validate_every", 7],
        ["--data.seconds_per_batch", 10, "--trainer.batches_per_update", 2],  # the same update
    ],
)
def test_machine_and_intervals_change_at_any_time(verdicts, flags, caplog):
    with caplog.at_level("INFO"):
        assert verdicts(*flags) == ["applied", "same", "applied"]
    assert caplog.text.count(f"{flags[0][2:]} ") == 2 and " -> " in caplog.text


def test_a_step_2_of_older_versions_had_no_dropout(lists, model):
    recipe = recipe_of()
    identity = step_2_identity(recipe, content_of(recipe, model, lists), model, {})
    older = {name: value for name, value in identity.settings.items() if name != DROPOUT}
    record = Record([{"update": 0, "settings": older}])
    with pytest.raises(UserError, match=r"other settings: dropout of step 2 none -> of the student; .* another --exp"):
        record.go_on(identity, 5, Path("E/final/ckpts/last.ckpt"), True)


def test_names_of_folders_do_not_count(verdicts):
    assert verdicts("--data.tsv_dir", "x", "--exp_dir", "y", "--teacher_layers", 3) == ["same"] * 3


def test_content_counts_wherever_it_lies(lists, model):
    recipe = recipe_of()
    same = Lists(*(dataclasses.replace(manifest, root=Path("/mnt")) for manifest in lists.manifests.values()))
    content = content_of(recipe, model, lists)
    assert content_of(recipe, model, same) == content
    for kind in ("train", "valid"):
        for other in (
            dataclasses.replace(lists.manifests[kind], paths=[f"{kind}/a.flac", f"{kind}/c.flac"]),
            dataclasses.replace(lists.manifests[kind], num_frames=np.array([20000, 30001])),
        ):
            assert differences(
                content, content_of(recipe, model, dataclasses.replace(lists, **{kind: other}))
            ).keys() == {f"{kind} list"}
    other_teacher = copy.deepcopy(model)
    with torch.no_grad():
        other_teacher.encoder.transformer.layers[3].final_layer_norm.bias[0] += 1e-7
    assert differences(content, content_of(recipe, other_teacher, lists)).keys() == {"teacher"}
    heads = {"0.weight": next(model.parameters()).detach()}
    identities = [
        step_2_identity(recipe, content, *pair) for pair in ((model, {}), (model, heads), (other_teacher, {}))
    ]
    assert len({identity.settings[STUDENT] for identity in identities}) == 3
    started, described = step_1_identity(recipe, content, model), step_1_identity(recipe, content)
    assert "student.thin" not in started.settings, "what the file replaces does not count"
    for before, after in ((started, described), (described, started)):
        with pytest.raises(UserError, match="student model cannot change"):
            Record.start(before).go_on(after, 3, Path("E/ckpts/last.ckpt"), True)


def test_the_content_of_a_latency_table_counts_where_it_is_used(lists, model, tmp_path):
    def identity(name: str, *flags: object) -> Identity:
        recipe = recipe_of("--pruning.latency", tmp_path / name, *flags)
        return step_1_identity(recipe, content_of(recipe, model, lists))

    milliseconds = ["--pruning.cost", "milliseconds"]
    write_latency(tmp_path / "a.json", TINY)
    shutil.copy(tmp_path / "a.json", tmp_path / "moved.json")
    write_latency(tmp_path / "b.json", TINY, factor=1.01)
    record = Record.start(identity("a.json", *milliseconds))
    assert record.go_on(identity("moved.json", *milliseconds), 3, Path("last.ckpt"), False) is record
    with pytest.raises(UserError, match=f"{LATENCY} .* cannot change in the middle of a run"):
        record.go_on(identity("b.json", *milliseconds), 3, Path("last.ckpt"), True)
    assert record.go_on(identity("gone.json", *milliseconds), 3, Path("last.ckpt"), False) is record, "nor after step 1"
    for flags in ([], [*milliseconds, "--pruning.units", "[]"]):
        assert identity("a.json", *flags).settings == identity("b.json", *flags).settings


@pytest.mark.parametrize(
    "flags",
    [
        ["--pruning.target", "20k", "--pruning.target_sparsity"],  # a share beside a target
        ["--pruning.macs_seconds"],  # of what is not counted
    ],
)
def test_settings_of_budgets_that_are_not_used_do_not_count(lists, model, flags):
    recipes = [recipe_of(*flags, value) for value in (0.3, 0.4)]
    first, second = (step_1_identity(recipe, content_of(recipe, model, lists)).settings for recipe in recipes)
    assert first == second


def test_lengths_in_epochs_count_as_epochs(lists, model):
    """How many updates they are is found out once, when the run starts: cut in another way, epochs pack otherwise."""
    recipe = recipe_of("--optim.max_epochs", 3, "--optim.warmup_ratio", 0.1)
    settings = step_1_identity(recipe, content_of(recipe, model, lists)).settings
    assert settings["optim.max_steps"] is settings["optim.warmup_steps"] is None
    in_steps = step_1_identity(recipe_of("--optim.max_steps", 8), content_of(recipe, model, lists))
    changed = Record.start(step_1_identity(recipe, content_of(recipe, model, lists)))
    changed = changed.go_on(in_steps, 2, Path("E/ckpts/last.ckpt"), True)
    longer = step_1_identity(recipe_of("--optim.max_steps", 9), content_of(recipe, model, lists))
    with pytest.raises(UserError, match=r"max_steps 8 -> 9; .* give --continue_with_changes"):
        changed.go_on(longer, 4, Path("E/ckpts/last.ckpt"), False)
    run = Standing(Path("last.ckpt"), Record([]), 7, {RUN: {"length": 40, "epochs": 3}})
    assert run.resolve(recipe.optim, lambda epochs: 41).max_steps == 40
    longer = dataclasses.replace(recipe.optim, max_epochs=4)
    assert run.resolve(longer, lambda epochs: 10 * epochs + 13).max_steps == 53
    with pytest.raises(UserError, match=r"last\.ckpt stands at update 7, after the last of 5: ask for more"):
        run.resolve(dataclasses.replace(recipe.optim, max_epochs=None, max_steps=5), lambda epochs: 0)
    run.content[RUN]["length"] = -5
    with pytest.raises(UserError, match=r"last\.ckpt: damaged, it has -5 for its length"):
        run.resolve(recipe.optim, lambda epochs: 41)


def test_a_setting_that_one_version_lacks_is_no_difference():
    kinds = Kinds(frozenset(), frozenset({"free"}), frozenset())
    record = Record.start(Identity({"seed": 1, "gone": 2, "old.a": 3}, kinds))
    assert record.go_on(Identity({"seed": 1, "new": 5}, kinds), 3, Path("x"), False) is record
    with pytest.raises(UserError, match=r"old \(set\) -> null; old cannot change"):
        record.go_on(Identity({"seed": 1, "old": None}, kinds), 3, Path("x"), False)


def test_history_of_what_ran_from_which_update():
    kinds = Kinds(frozenset(), frozenset({"free"}), frozenset({"lr"}))
    first = Record.start(Identity({"lr": 1.0, "free": "a", "seed": 0}, kinds))
    second = first.go_on(Identity({"lr": 2.0, "free": "a", "seed": 0}, kinds), 10, Path("x"), True)
    third = Record.read({RUN: second.entry(20)}, "x").go_on(
        Identity({"lr": 2.0, "free": "b", "seed": 0}, kinds), 20, Path("x"), False
    )
    assert third.settings == {"lr": 2.0, "free": "b", "seed": 0}
    assert third.history[1:] == [
        {"update": 10, "changed": {"lr": [1.0, 2.0]}},
        {"update": 20, "changed": {"free": ["a", "b"]}},
    ]


@pytest.mark.parametrize(
    "history", [None, [], [{"update": 0}], [{"update": 0, "settings": {"a": 1}}, {"update": "x", "changed": {}}],
                [{"update": 0, "settings": {"a": 1}}, {"update": 1, "changed": {"lr": 3}}],
                [{"update": 0, "settings": {7: 1}}], 7]
)  # fmt: skip
def test_a_damaged_record_is_refused(history):
    with pytest.raises(UserError, match=r"x\.ckpt: damaged, its record of the run cannot be read"):
        Record.read({RUN: {"update": 1, "history": history}}, "x.ckpt")
    assert Record.read({}, "x.ckpt") is None


def test_flat_settings_are_plain():
    flat = flat_settings(recipe_of())
    assert flat["optim.betas"] == [0.9, 0.999] and flat["data.tsv_dir"] == "data" and flat["data.noise"] is None


def test_a_run_of_a_version_without_other_budgets_was_pruned_by_parameters(lists, model):
    def identity(*flags: object) -> Identity:
        recipe = recipe_of(*flags)
        return step_1_identity(recipe, content_of(recipe, model, lists))

    new = ("cost", "target", "macs_seconds", "multiple_of")
    settings = {name: v for name, v in identity().settings.items() if name.rpartition(".")[2] not in new}
    old = Record([{"update": 0, "settings": settings}])
    assert old.go_on(identity(), 5, Path("last.ckpt"), False) is old
    student = Checkpoint(model, model.config, extra={RUN: old.entry(500, length=500)})
    check_student(student, "pruned.pth", identity(), False)
    for flags in (["--pruning.cost", "macs"], ["--pruning.multiple_of", 8], ["--pruning.target", "0.4M"]):
        with pytest.raises(UserError, match=f"{flags[0][2:]} .*cannot change in the middle of a run"):
            old.go_on(identity(*flags), 5, Path("last.ckpt"), True)
        with pytest.raises(UserError, match=f"pruned.pth was made by another recipe: .*{flags[0][2:]} "):
            check_student(student, "pruned.pth", identity(*flags), False)
