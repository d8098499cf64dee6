"""Every shipped recipe: it parses, its student has the published size, it trains as a process, its file loads."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from benchmarks.trial import fitted, recipe_names
from distillation.budget import SUPERB_SAMPLES
from distillation.build import starting_student
from distillation.config import parse_recipe, recipe_chain
from distillation.objectives import Objectives
from distillation.optimisation import lr_factor, param_groups
from distillation.students import StudentConfig, ThinStudent, backbone_params, build_student
from tests.configs import TINY
from tests.helpers import ROOT
from wav2vec2 import Wav2Vec2Model, load_model, save_model, wav2vec2_model
from wav2vec2.architecture import HUBERT_BASE
from wav2vec2.counting import count_params

CONF = ROOT / "conf"
RECIPES = recipe_names()
# what SPEC's table of fixed students says: learning rate, epochs, utterances, GPUs x accumulation, mask probability
PUBLISHED = {
    "fithubert": (5e-4, 100, 3, 2 * 4, None),
    "fitw2v2": (5e-4, 100, 3, 2 * 4, None),
    "maskhubert_960h": (5e-4, 200, 18, 2 * 4, 0.8),
    "armhubert_960h": (5e-3, 200, 18, 2 * 4, 0.8),
    "armhubert_s_960h": (5e-3, 100, 18, 2 * 4, 0.8),
    "armhubert_s_100h": (5e-3, 200, 6, 2 * 3, 0.4),
    "armwavlm_s_960h": (5e-3, 100, 18, 2 * 4, 0.8),
    "armwavlm_s_100h": (5e-3, 200, 6, 2 * 3, 0.4),
    "starhubert": (1e-3, 100, 18, 2 * 4, None),
    "starhubert_100h": (1e-3, 200, 6, 2 * 3, None),
    "starhubert_l": (1e-3, 100, 18, 2 * 4, None),
    "starhubert_s": (1e-3, 100, 18, 2 * 4, None),
    "starhubert_xs": (1e-3, 100, 18, 2 * 4, None),
}
NEW = ["dphubert_star", "dphubert_mask", "dpwavlm_star"]
# backbone, and all heads
SIZES = {
    "maskhubert_960h": (None, 26_635_840),
    "armhubert_960h": (None, 26_448_448),
    "armhubert_s_960h": (None, 22_394_080),
    "armhubert_s_100h": (None, 22_394_080),
    "armwavlm_s_960h": (None, 22_394_080),
    "armwavlm_s_100h": (None, 22_394_080),
    "fithubert": (None, 31_629_632),
    "fitw2v2": (None, 31_629_632),
    "starhubert": (22_308_592, 22_308_592),
    "starhubert_100h": (22_308_592, 22_308_592),
    "starhubert_l": (26_626_672, 26_626_672),
    "distilhubert": (23_491_200, 23_491_200 + 3_543_552),
}


def parse(name: str, *flags: object):
    return parse_recipe(["--config", str(CONF / f"{name}.yaml"), *map(str, flags)])[0]


@pytest.fixture(scope="module")
def hubert_base() -> Wav2Vec2Model:
    """Of the published size, at random."""
    torch.manual_seed(0)
    return wav2vec2_model(**HUBERT_BASE)


@pytest.fixture(scope="module")
def built(hubert_base):
    """Student and objectives of a recipe, at the published size."""
    hubert_base.mask_embedding = torch.zeros(768)

    def build(name: str) -> tuple[Wav2Vec2Model, Objectives]:
        recipe = parse(name)
        student = starting_student(recipe, hubert_base)
        return student, Objectives(recipe.objective, student, hubert_base)

    return build


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(built, name):
    student, objectives = built(name)
    backbone, total = SIZES[name]
    assert backbone_params(student) + objectives.num_params() == total
    assert backbone in (None, backbone_params(student))
    assert student.get_num_params().item() == sum(p.numel() for p in student.parameters())


@pytest.mark.parametrize("name", ["fithubert", "fitw2v2"])
def test_size_with_the_last_head_only(built, name):
    student, objectives = built(name)
    last = sum(p.numel() for p in objectives.parts["hint"].heads[-1].parameters())
    assert backbone_params(student) + last == 22_492_064


@pytest.mark.parametrize(
    ("name", "millions"), [("starhubert_l", 26.63), ("starhubert_s", 14.10), ("starhubert_xs", 9.39)]
)
def test_sizes_known_to_two_decimals(built, name, millions):
    assert round(backbone_params(built(name)[0]) / 1e6, 2) == millions


@pytest.mark.parametrize(("name", "giga"), [("starhubert", 463.5), ("starhubert_l", 511.9)])
def test_published_macs(built, name, giga):
    assert round(built(name)[0].get_num_macs(SUPERB_SAMPLES).item() / 1e9, 1) == giga


def test_widths_that_have_the_published_figures():
    """STaRHuBERT-L, -S and -XS. Of one width both figures are linear in the FFN units, so that two models tell all."""
    with torch.device("meta"):
        teacher = wav2vec2_model(**HUBERT_BASE)

    def figures(width: int, ffn: int) -> np.ndarray:
        with torch.device("meta"):
            thin = ThinStudent(width=width, heads=8, ffn=ffn, channels=[128, 256, width])
            model = build_student(StudentConfig(thin=thin), teacher)
        num_params = count_params(model) - model.feature_extractor.dummy_weight.numel()
        return np.array([num_params, model.get_num_macs(SUPERB_SAMPLES).item()])

    units = np.arange(64, 2049, 8)
    large, small, smallest = [], [], []
    for width in range(192, 641, 16):
        one, two = figures(width, 8), figures(width, 16)
        params, macs = (one + (units[:, None] / 8 - 1) * (two - one)).T
        both = (np.round(params / 1e6, 2) == 26.63) & (np.round(macs / 1e9, 1) == 511.9)
        large += [(width, n) for n in units[both].tolist() if n % 16 == 0]
        small += [(width, n) for n in units[np.round(params / 1e6, 1) == 14.1].tolist()]
        smallest += [(width, n) for n in units[np.round(params / 1e6, 2) == 9.39].tolist()]
    assert large == [(432, 1392)] and len(small) == 22
    assert smallest == [(192, 1360), (224, 1016), (272, 616), (288, 504)]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name):
    recipe = parse(name)
    lr, epochs, utterances, batches, probability = PUBLISHED[name]
    assert (recipe.optim.lr, recipe.optim.max_epochs) == (lr, epochs)
    assert (recipe.data.utterances_per_batch, recipe.trainer.batches_per_update) == (utterances, batches)
    assert (recipe.optim.betas, recipe.optim.eps, recipe.optim.weight_decay) == ((0.9, 0.98), 1e-6, 0.01)
    assert recipe.optim.decays == "all_but_biases"
    assert recipe.optim.clip is None and recipe.optim.warmup_ratio == 0.05 and recipe.final is None
    assert recipe.optim.schedule == ("cosine" if name.startswith("star") else "linear")
    assert recipe.data.train == ("train100.tsv" if "100h" in name else "train960.tsv")
    assert not recipe.data.crop and not recipe.pruning.units
    masking = recipe.objective.masking
    assert (masking.probability if masking else None) == probability
    assert masking is None or (masking.span, masking.min_space, masking.last, masking.hint) == (10, 1, 1.0, 0.1)
    assert masking is None or (masking.spans, masking.min_spans) == ("released", 2)
    released = "released" if name.startswith("arm") else None
    assert recipe.objective.scale_gradients == released and recipe.objective.extractor_gradient == 1
    thin = recipe.student.thin
    assert thin.reuse_attention == released and (thin.time_reduction == 2) == name.startswith("fit")
    assert (thin.dropout, thin.input_dropout, thin.num_layers) == (0.1, 0.05, 12)
    assert thin.heads == (8 if name.startswith("star") else 12)


def test_published_settings_of_distilhubert():
    recipe = parse("distilhubert")
    optim = recipe.optim
    assert (optim.lr, optim.max_steps, optim.max_epochs, optim.warmup_ratio, optim.clip) == (
        2e-4,
        200_000,
        None,
        0.07,
        5,
    )
    assert (optim.betas, optim.eps, optim.weight_decay, optim.decays) == ((0.9, 0.98), 1e-6, 0.01, "all_but_biases")
    data = recipe.data
    assert data.utterances_per_batch * recipe.trainer.batches_per_update == 24
    assert (data.max_frames, data.long, data.crop) == (250_000, "crop", False)
    prediction = recipe.objective.prediction_layer
    assert (prediction.layers, prediction.heads, prediction.cos_type) == ([4, 8, 12], "two_linear", "log_sig")
    assert (prediction.l1, prediction.l2, prediction.cos) == (1, 0, 1)
    assert recipe.objective.extractor_gradient == 0.1


def test_the_released_student_of_distilhubert(built, hubert_base):
    """Copied but for the norms around its layers: none before the projection, and a fresh one."""
    student, _ = built("distilhubert")
    assert student.encoder.feature_projection.layer_norm is None
    norm = student.encoder.transformer.layer_norm
    assert (norm.weight == 1).all() and not norm.bias.any()
    ours, theirs = student.state_dict(), hubert_base.state_dict()
    for name in ours.keys() - {"encoder.transformer.layer_norm.weight", "encoder.transformer.layer_norm.bias"}:
        assert torch.equal(ours[name], theirs[name])
    rates = ("encoder_projection_dropout", "encoder_attention_dropout", "encoder_ff_interm_dropout", "encoder_dropout")
    assert [student.config[rate] for rate in rates] == [0.0, 0.1, 0.1, 0.1]


def test_what_decays_in_armhubert(built):
    """All but biases: 28 one-dimensional tensors, of norms and the mask embedding; the decay adds up to e^-9.8."""
    student, objectives = built("armhubert_960h")
    student.feature_extractor.dummy_weight.requires_grad_(False)
    optim = parse("armhubert_960h").optim
    decayed, plain = param_groups(torch.nn.ModuleDict({"s": student, "o": objectives}), None, optim)
    vectors = [p for p in decayed["params"] if p.dim() == 1]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.01, 0.0) and len(vectors) == 28
    assert sum(p.numel() for p in vectors) == 25 * 480 + 480 + 480 + 128  # norms of layers, encoder and projection
    utterances, steps = 281_241, 200 * (281_241 // 18 + 1) // 8
    folds = sum(0.01 * optim.lr * lr_factor(step, round(0.05 * steps), steps, "linear") for step in range(steps))
    assert utterances // 18 * 200 // 8 == pytest.approx(steps, rel=1e-3) and folds == pytest.approx(9.8, abs=0.05)


@pytest.mark.parametrize("name", NEW)
def test_new_recipes_prune_as_dphubert_does(name):
    recipe, base = parse(name), parse("dphubert_base")
    assert (recipe.pruning, recipe.optim, recipe.final, recipe.data) == (
        base.pruning,
        base.optim,
        base.final,
        base.data,
    )
    assert recipe.objective.layer_to_layer is None


@pytest.mark.parametrize("name", RECIPES)
def test_headers_say_what_to_expect(name):
    header = re.match(r"(#.*\n)+", (CONF / f"{name}.yaml").read_text())[0]
    script = re.search(r"scripts/(\S+)( \S+)?", header)
    assert (ROOT / "scripts" / script[1]).is_file()
    if name == "demo":
        return
    assert "# Hardware: " in header and "# Expected: " in header and " M parameters" in header
    assert ("# As released" in header) != ("no published counterpart" in header)
    if script[1] == "run_students.sh":
        assert script[2].strip() == name and parse(name).exp_dir == Path("exp") / name
    for file in re.findall(r"\b\w+\.yaml", header):
        assert (CONF / file).is_file()


@pytest.mark.parametrize("name", sorted({*PUBLISHED, "distilhubert", *NEW}))
def test_recipes_hold_only_what_differs(name):
    *bases, own = (yaml.safe_load(path.read_text()) for path in recipe_chain(CONF / f"{name}.yaml"))

    def repeated(ours: dict, theirs: dict, path: str) -> list[str]:
        found = []
        for key, value in ours.items():
            if isinstance(value, dict) and isinstance(theirs.get(key), dict):
                found += repeated(value, theirs[key], f"{path}{key}.")
            elif key in theirs and theirs[key] == value:
                found.append(path + key)
        return found

    merged: dict = {}
    for base in bases:
        merge(merged, base)
    assert repeated(own, merged, "") == []


def merge(into: dict, new: dict) -> None:
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value


# As processes, on a tiny teacher with students to match


@pytest.fixture(scope="module")
def teachers(tiny_config, tmp_path_factory) -> dict[str, Path]:
    """HuBERT and WavLM, with mask embeddings as the converters write them."""
    torch.manual_seed(0)
    wavlm = {key: value for key, value in tiny_config.items() if key not in ("encoder_num_heads", "encoder_head_dim")}
    wavlm |= {
        "encoder_total_num_heads": [4] * 4,
        "encoder_remaining_heads": [[0, 1, 2, 3]] * 4,
        "encoder_num_buckets": 16,
        "encoder_max_distance": 40,
    }
    folder = tmp_path_factory.mktemp("teachers")
    for name, config in (("hubert", tiny_config), ("wavlm", wavlm)):
        save_model(folder / f"{name}.pth", wav2vec2_model(**config), mask_embedding=torch.rand(24))
    return {name: folder / f"{name}.pth" for name in ("hubert", "wavlm")}


def scaled_down(name: str, teachers: dict[str, Path], tsv_dir: Path) -> list[object]:
    """Flags that fit a recipe to the tiny teacher and five updates on the CPU; the method stays what it is."""
    recipe = parse(name)
    flags: dict[str, object] = {
        "teacher_ckpt": teachers["wavlm" if "wavlm" in name else "hubert"],
        "data.tsv_dir": tsv_dir,
        "data.train": "train100.tsv",
        "data.min_frames": 8000,
        "data.num_workers": 0,
        "optim.max_epochs": "null",
        "optim.max_steps": 5,
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.batches_per_update": 2,
        "trainer.log_every": 1,
        "trainer.validate_every": 5,
    }
    if recipe.data.utterances_per_batch is not None:
        flags["data.utterances_per_batch"] = 3
    else:
        flags["data.seconds_per_batch"] = 5
    if recipe.pruning.units:
        flags |= {"pruning.target_sparsity": 0.3, "pruning.warmup_steps": 2}
    if recipe.final is not None:
        flags["final.max_steps"] = 2
    of_teacher = fitted(name, TINY)[2:]  # without --config
    return [*of_teacher, *(word for key, value in flags.items() for word in (f"--{key}", value))]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*PUBLISHED, "distilhubert", *NEW}))
def test_five_updates_as_a_process(script, teachers, tsv_dir, tmp_path, name):
    exp = tmp_path / "exp"
    flags = ["--config", CONF / f"{name}.yaml", *scaled_down(name, teachers, tsv_dir)]
    result = script("distill.py", *flags, "--exp_dir", exp)
    assert "in heads that only training uses" in result.stderr
    rows = (exp / "metrics.csv").read_text().splitlines()
    assert len(rows) == 6 and "nan" not in "".join(rows)
    final = exp / "final.pth"
    if parse(name).pruning.units:
        script("prune.py", "--distilled_ckpt", exp / "ckpts/last.ckpt")
        final = exp / "pruned.pth"
    if name == "dphubert_mask":  # has a mask embedding besides its heads, which step 2 goes on with
        result = script("final_distill.py", *flags, "--student_ckpt", final, "--exp_dir", exp / "final")
        assert "start afresh" not in result.stderr
        final = exp / "final" / "final.pth"
        assert "mask_embedding" in torch.load(final, weights_only=True)["distill_linear_projs"]
    model, teacher = load_model(final), load_model(teachers["hubert"])
    for samples in (400, 9000, 9300):
        waveforms = torch.randn(2, samples)
        states, targets = model.extract_features(waveforms)[0], teacher.extract_features(waveforms)[0]
        assert {s.shape[1] for s in states} == {targets[0].shape[1]} and all(s.isfinite().all() for s in states)


def test_an_unknown_student_is_one_line(script_error, teachers, tsv_dir, tmp_path):
    flags = [
        "--config",
        CONF / "fithubert.yaml",
        *scaled_down("fithubert", teachers, tsv_dir),
        "--exp_dir",
        tmp_path / "e",
    ]
    assert "--student.wide: no such setting; there are thin, layers, slice" in script_error(
        "distill.py", *flags, "--student.wide.width", 4
    )
    line = script_error("distill.py", *flags, "--student.layers.layers", "[1]")
    assert "student: thin and layers are set, a student can be only one of them" in line
    assert "heads is 5: it must divide the width 16" in script_error("distill.py", *flags, "--student.thin.heads", 5)
    recipe = script_error("distill.py", "--config", CONF / "fithuber.yaml")
    assert "no such recipe; those in conf/ are " in recipe and "fithubert" in recipe and "starhubert_xs" in recipe
    assert not (tmp_path / "e").exists()
