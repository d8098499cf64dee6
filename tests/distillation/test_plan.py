"""What a shell recipe derives for another teacher, other audio and this machine, and what it refuses at its start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from distillation import machine, plan
from distillation.config import parse_recipe
from distillation.data.conversion import COPIES
from distillation.deriving import matched_layers
from distillation.errors import Problems, UserError
from distillation.identity import step_1_identity
from distillation.plan import answers, make_plan, read_words, save_recipe
from distillation.training.record import Record
from tests.configs import TINY, first_layers
from tests.helpers import HF_SIZE, ROOT, write_noise
from tests.latency import write_latency
from wav2vec2 import save_model, wav2vec2_model

BASE = ROOT / "conf" / "dphubert_base.yaml"


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A model of transformers with 5 layers, 24 wide."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hf") / "my-hubert"
    transformers.HubertModel(transformers.HubertConfig(**HF_SIZE | {"num_hidden_layers": 5})).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def audio(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("audio") / "Speech"
    for speaker in "ab":
        write_noise(root / speaker / "1.wav", 2, 0, rate=22050, channels=2)
    return root


@pytest.fixture
def librispeech(tmp_path) -> Path:
    for part in ("train-clean-100", "dev-clean"):
        write_noise(tmp_path / "Libri" / part / "1" / "1" / "1.flac", 2, 0)
    return tmp_path / "Libri"


@pytest.fixture
def gpus(monkeypatch):
    """So many of them, as far as is asked."""

    def set_count(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)

    machine.find_precision.cache_clear()
    yield set_count
    machine.find_precision.cache_clear()


def problems(*words: object) -> list[str]:
    with pytest.raises(Problems) as error:
        read_words([str(word) for word in words])
    assert all("\n" not in message for message in error.value.messages)
    return error.value.messages


@pytest.mark.parametrize(
    ("layers", "matched"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (4, [1, 3, 4]), (6, [2, 4, 6]), (12, [4, 8, 12]), (24, [8, 16, 24]),
     (48, [16, 32, 48])],
)  # fmt: skip
def test_each_third_is_matched(layers, matched):
    assert matched_layers(layers) == matched


def test_the_rule_gives_the_published_layers():
    for name in ("dphubert_base", "dphubert_large", "dphubert_xlarge", "dpxlsr_300m", "demo"):
        recipe, _ = parse_recipe(["--config", str(ROOT / "conf" / f"{name}.yaml")])
        assert recipe.objective.layer_to_layer.layers == [[0], matched_layers(recipe.teacher_layers)]


def test_any_teacher_and_any_audio(teacher, audio):
    flags = ["--teacher_id", str(teacher), "--optim.max_steps", "20", "--final.max_steps", "10", "--optim.lr", "1e-3"]
    made = read_words([str(audio), "--adapt", "--config", str(BASE), *flags])
    recipe = made.recipe
    assert (recipe.teacher_layers, recipe.teacher_width) == (5, 24)
    assert recipe.objective.layer_to_layer.layers == [[0], [2, 3, 5]]
    assert (recipe.data.train, recipe.data.long, recipe.data.min_frames) == ("train.tsv", "split", 8000)
    assert (recipe.data.tsv_dir, recipe.exp_dir) == (Path("data/Speech"), Path("exp/dphubert_my-hubert_speech"))
    assert (recipe.data.seconds_per_batch, recipe.trainer.batches_per_update) == (20, 4)
    assert (recipe.optim.warmup_steps, recipe.final.warmup_steps, recipe.pruning.warmup_steps) == (6, 2, 12)
    assert recipe.pruning.constant_lr and recipe.trainer.log_every == 1 and recipe.optim.lr == 1e-3
    parameters = transformers.HubertModel.from_pretrained(teacher).named_parameters()
    assert made.sizes[0] == sum(p.numel() for name, p in parameters if "masked" not in name) + 20  # the dummy weight

    # the file says the same as all flags
    save_recipe(made)
    path = Path("exp/dphubert_my-hubert_speech/recipe.yaml")
    assert parse_recipe(["--config", str(path)]) == parse_recipe(["--config", str(BASE), *made.words])
    assert "optim.lr" not in path.read_text() and yaml.safe_load(path.read_text())["optim"]["lr"] == 1e-3
    assert answers(made)[:6] == ["plan", "data/Speech", str(teacher), "pretrained/my-hubert.hf.pth",
                                 "exp/dphubert_my-hubert_speech", "conv,head,interm"]  # fmt: skip

    # a run that has begun keeps the recipe that it began with
    (path.parent / "ckpts").mkdir()
    (path.parent / "ckpts" / "last.ckpt").touch()
    before = path.read_text()
    save_recipe(read_words([str(audio), "--adapt", "--config", str(BASE), *flags, "--optim.lr", "2e-3"]))
    assert path.read_text() == before


def test_flags_win_over_what_is_derived(teacher, audio):
    flags = ["--teacher_id", str(teacher), "--objective.layer_to_layer.layers", "[[0],[1,5]]", "--exp_dir", "mine",
             "--data.long", "drop", "--data.seconds_per_batch", "16", "--optim.max_steps", "100",
             "--optim.warmup_steps", "7"]  # fmt: skip
    made = read_words([str(audio), "--adapt", "--config", str(BASE), *flags])
    recipe = made.recipe
    assert recipe.objective.layer_to_layer.layers == [[0], [1, 5]] and recipe.exp_dir == Path("mine")
    assert (recipe.data.long, recipe.data.seconds_per_batch, recipe.optim.warmup_steps) == ("drop", 16, 7)
    named = {"objective.layer_to_layer.layers", "exp_dir", "data.long", "data.seconds_per_batch", "optim.warmup_steps"}
    assert not named & made.derived.settings.keys(), "what is said to be derived is"


@pytest.mark.parametrize(("count", "batches", "seconds"), [(1, 4, 160), (2, 4, 160), (3, 6, 640 / 6), (8, 8, 80)])
def test_the_published_recipe_on_any_number_of_gpus(gpus, librispeech, monkeypatch, count, batches, seconds):
    """Nothing else is derived, and the update stays the published one."""
    gpus(count)
    for part in ("train-clean-360", "train-other-500"):
        write_noise(librispeech / part / "1" / "1" / "1.flac", 2, 0)
    Path("pretrained").mkdir()
    config = wav2vec2_model(**TINY).config
    monkeypatch.setattr(plan, "teacher_config", lambda recipe: config)
    monkeypatch.setattr(plan, "_check_models", lambda plan: None)
    monkeypatch.setattr(plan, "check_size", lambda *args: None)
    monkeypatch.setattr(plan, "for_teacher", lambda *args: None)
    made = make_plan(librispeech, BASE, [], adapt=True)
    published, _ = parse_recipe(["--config", str(BASE)])
    assert not made.problems and made.world_size == count
    assert made.recipe.trainer.batches_per_update == batches
    assert made.recipe.data.seconds_per_batch == pytest.approx(seconds)
    changed = {"trainer.batches_per_update", "data.seconds_per_batch"} if 4 % count else set()
    assert made.derived.settings.keys() == changed and made.recipe.exp_dir == published.exp_dir
    assert made.recipe.trainer.precision == "bf16-mixed" and made.recipe.trainer.accelerator == "gpu"


def test_train_clean_100_alone(teacher, librispeech):
    made = read_words([str(librispeech), "--adapt", "--config", str(BASE), "--teacher_id", str(teacher)])
    assert (made.recipe.data.train, made.recipe.data.tsv_dir) == ("train100.tsv", Path("data"))
    assert made.recipe.exp_dir == Path("exp/dphubert_my-hubert_100h")
    (message,) = problems(librispeech, "--config", BASE, "--teacher_id", teacher, "--teacher_layers", "null",
                          "--teacher_width", "null", "--objective.layer_to_layer.layers", "[[0],[5]]")  # fmt: skip
    assert "gives train100.tsv, valid.tsv and no train960.tsv" in message
    assert "name the recipe dphubert_base_100h, or add --data.train train100.tsv" in message


def test_named_recipes_follow_the_list_alone_and_refuse_other_teachers(teacher, audio):
    recipe = ROOT / "conf" / "dpxlsr_300m.yaml"
    flags = ["--teacher_layers", "5", "--teacher_width", "24", "--objective.layer_to_layer.layers", "[[0],[5]]"]
    made = read_words([str(audio), "--config", str(recipe), "--teacher_id", str(teacher), *flags])
    assert made.derived.settings == {"data.train": "train.tsv", "data.tsv_dir": Path("data/Speech")}
    assert made.recipe.data.long == "drop"
    (message,) = problems(audio, "--config", recipe, "--teacher_id", teacher)
    assert f"{teacher}: layers 5, but the recipe is for a teacher of layers 24" in message


def test_all_problems_at_once(teacher, tmp_path):
    (tmp_path / "empty").mkdir()
    words = ["--config", BASE, "--teacher_id", teacher, "--trainer.accelerator", "gpu"]
    found = problems(tmp_path / "none", *words)
    assert [any(part in message for message in found) for part in ("no such folder", "none is visible", "layers 5")]
    assert len(found) == 3
    found = problems(tmp_path / "empty", *words[:2], "--teacher_id", tmp_path / "empty")
    assert len(found) == 2 and "config.json: no such file" in found[0] and "holds no audio files" in found[1]
    wrong = ["--pruning.target_sparsity", "0.999", "--optim.max_steps", "10"]
    assert "parameters stay" in problems(tmp_path / "none", "--adapt", *words[:4], *wrong)[-1]
    assert not (tmp_path / "exp").exists() and not (tmp_path / "data").exists(), "nothing is made"


def test_budgets_are_looked_at(audio, tmp_path):
    """Each wrong one is one line, before anything runs."""
    torch.manual_seed(0)
    path = tmp_path / "teacher.pth"
    save_model(path, wav2vec2_model(**TINY))
    write_latency(tmp_path / "latency.json", TINY)
    write_latency(tmp_path / "other.json", first_layers(TINY, 3))
    words = [audio, "--adapt", "--config", BASE, "--teacher_ckpt", path, "--pruning.cost"]
    made = read_words(
        [*map(str, words), "milliseconds", "--pruning.latency", "latency.json", "--pruning.target", "40ms"]
    )
    assert made.budget.cost.text(made.budget.target) == "40 ms" and "--pruning.latency" in made.words
    for flags, said in (
        (["macs", "--pruning.target", "1TMACs"], "the teacher has 1.666 GMACs (SUPERB), there is nothing to prune"),
        (["macs", "--pruning.target_sparsity", 0.999], "without any conv, head, interm units 0.001001 GMACs (10 s) of"),
        (["milliseconds", "--pruning.latency", "other.json"], "other.json is of another model (encoder_num_layers 3"),
        (["milliseconds", "--pruning.latency", "none.json"], "none.json: no such latency table; make it with python"),
    ):
        (message,) = problems(*words, *flags)
        assert said in message
    for flags, said in (
        (["macs", "--pruning.target", 500], "pruning.target is 500, and its unit is missing"),
        (["milliseconds"], "pruning.cost is milliseconds: measure the machine that will run the model by python -m"),
    ):
        with pytest.raises(UserError, match=said):
            read_words([str(word) for word in [*words, *flags]])


def test_lists_of_other_audio(teacher, librispeech, audio):
    """Those of another LibriSpeech in the default folder are left alone; where a folder is named, it is told."""
    lists = Path("data")
    lists.mkdir()
    for name in ("train100.tsv", "valid.tsv"):
        (lists / name).write_text(f"{audio}\na/1.wav\t32000\n")
    words = [str(librispeech), "--adapt", "--config", str(BASE), "--teacher_id", str(teacher)]
    assert read_words(words).recipe.data.tsv_dir == Path("data/Libri")
    Path("mine").mkdir()
    for name in ("train100.tsv", "valid.tsv"):
        (Path("mine") / name).write_text((lists / name).read_text())
    (message,) = problems(*words, "--data.tsv_dir", "mine")
    assert message.startswith(f"mine/train100.tsv lists audio of {audio}, not of {librispeech}: name another")
    for root in (librispeech, librispeech.parent / "Libri"):
        for name in ("train100.tsv", "valid.tsv"):
            (lists / name).write_text(f"{root}\ntrain-clean-100/1/1/1.flac\t32000\n")
        made = read_words(words)
        assert made.recipe.data.tsv_dir == lists and answers(made)[1] == "", "they are not made again"
    (lists / "valid.tsv").rename(lists / "own.tsv")
    assert answers(read_words([*words, "--data.valid", "own.tsv"]))[1] == "", "nor where they have other names"


def test_a_converted_teacher_stands_for_itself(audio, tmp_path):
    torch.manual_seed(0)
    save_model(tmp_path / "teacher.pth", wav2vec2_model(**TINY))
    made = read_words([str(audio), "--adapt", "--config", str(BASE), "--teacher_ckpt", str(tmp_path / "teacher.pth")])
    assert made.recipe.teacher_layers == 4 and answers(made)[2] == ""
    assert made.recipe.exp_dir == Path("exp/dphubert_teacher_speech")
    (message,) = problems(
        audio, "--adapt", "--config", BASE, "--teacher_ckpt", tmp_path / "no.pth", "--teacher_id", "null"
    )
    assert message == f"{tmp_path / 'no.pth'}: no such file, and no --teacher_id to make it from"


def test_copies_are_of_the_audio_that_they_were_made_of(teacher, audio):
    copies = Path("data/Speech/audio").resolve()
    copies.mkdir(parents=True)
    for name in ("train.tsv", "valid.tsv"):
        (copies.parent / name).write_text(f"{copies}\na/1.flac\t32000\n")
    words = [str(audio), "--adapt", "--config", str(BASE), "--teacher_id", str(teacher)]
    assert "lists audio of" in problems(*words)[0]
    (copies / COPIES).write_text(json.dumps({"of": {"data": str(audio)}}) + "\n")
    read_words(words)


def adapted(audio: Path, *flags: object) -> plan.Plan:
    return read_words([str(audio), "--adapt", "--config", str(BASE), *map(str, flags)])


def test_broken_files_do_not_move_the_lists(teacher, librispeech):
    Path("data").mkdir()
    for name in ("train100.tsv", "valid.tsv"):
        (Path("data") / name).write_text(f"{librispeech}\ntrain-clean-100/1/1/1.flac\t32000\n")
    (Path("data") / "broken.tsv").write_text("/x/y.flac\tunreadable\tno audio\n")
    assert adapted(librispeech, "--teacher_id", teacher).recipe.data.tsv_dir == Path("data")


def test_other_parts_of_librispeech(teacher, librispeech, tmp_path):
    write_noise(librispeech / "train-clean-360" / "1" / "1" / "1.flac", 2, 0)
    made = adapted(librispeech, "--teacher_id", teacher)
    assert made.recipe.data.train == "train100.tsv"
    assert any("without train-other-500" in why for _, why in made.derived.reasons)
    write_noise(tmp_path / "Only" / "train-clean-360" / "1" / "1" / "1.flac", 2, 0)
    made = adapted(tmp_path / "Only", "--teacher_id", teacher)
    assert (made.recipe.data.train, made.recipe.data.long, made.recipe.data.min_frames) == ("train.tsv", "drop", 32000)


def test_audio_in_the_folder_of_lists(teacher):
    """Nothing is written among the audio."""
    write_noise(Path("data") / "mine" / "a" / "1.wav", 2, 0)
    for audio in (Path("data/mine"), Path("data")):
        assert adapted(audio, "--teacher_id", teacher).recipe.data.tsv_dir == Path("lists") / audio.name


def test_a_mistyped_file_is_not_made_of_the_default_teacher(audio):
    found = problems(audio, "--adapt", "--config", BASE, "--teacher_ckpt", "nope.pth")
    assert found == ["nope.pth: no such file; with --teacher_id it is made of that teacher"]


def test_a_longer_run_keeps_what_it_derived(teacher, audio):
    flags = ["--teacher_id", teacher, "--exp_dir", "run"]
    save_recipe(made := adapted(audio, *flags, "--optim.max_steps", 100))
    (Path("run") / "ckpts").mkdir()
    (Path("run") / "ckpts" / "last.ckpt").touch()
    longer = adapted(audio, *flags, "--optim.max_steps", 200, "--continue_with_changes")
    assert longer.recipe.pruning == made.recipe.pruning and longer.recipe.optim.max_steps == 200
    assert longer.recipe.continue_with_changes and "--continue_with_changes" in answers(longer)


def test_recipes_of_the_user(teacher, audio):
    """With a base, and with settings that are derived otherwise; flags win over both."""
    content = "data: {min_frames: 12000}\noptim: {max_steps: 100}\nobjective: {layer_to_layer: {l2: 0.5}}\n"
    Path("mine.yaml").write_text(f"base: {BASE}\n{content}")
    made = adapted(audio, "--config", "mine.yaml", "--teacher_id", teacher, "--data.long", "crop")
    recipe = made.recipe
    assert (recipe.data.train, recipe.data.min_frames, recipe.data.long) == ("train.tsv", 12000, "crop")
    assert recipe.objective.layer_to_layer.l2 == 0.5 and recipe.objective.layer_to_layer.layers == [[0], [2, 3, 5]]
    assert (recipe.teacher_layers, recipe.optim.max_steps, recipe.optim.warmup_steps) == (5, 100, 30)
    assert not {"data.min_frames", "data.long"} & made.derived.settings.keys()


def test_epochs_and_single_values_of_what_is_derived(teacher, audio):
    flags = ["--teacher_id", teacher, "--optim.max_epochs", 2, "--final.max_epochs", 1]
    recipe = adapted(audio, *flags).recipe
    assert (recipe.optim.warmup_ratio, recipe.final.warmup_ratio) == (0.3, 0.2)
    flags = ["--teacher_id", teacher, "--optim.max_steps", 100, "--pruning.drop_rates.head", 0.3]
    made = adapted(audio, *flags, "--trainer.batches_per_update", 1)
    assert made.recipe.pruning.drop_rates == {"conv": 0.1, "head": 0.3, "interm": 0.1}
    save_recipe(made)
    assert parse_recipe(["--config", str(made.recipe.exp_dir / "recipe.yaml")])[0] == made.recipe
    assert (made.recipe.trainer.batches_per_update, made.recipe.data.seconds_per_batch) == (1, 20)


def test_students_that_need_weights(teacher, audio, tmp_path):
    slice = ["--student.slice.num_params", 20000, "--pruning.units", "[]"]
    assert adapted(audio, "--teacher_id", teacher, *slice).sizes[1] <= 20000
    torch.manual_seed(0)
    save_model(tmp_path / "student.pth", wav2vec2_model(**TINY))
    path = tmp_path / "student.pth"
    assert adapted(audio, "--teacher_ckpt", path, "--student_ckpt", path).sizes is not None


def test_batches_of_a_gpu_are_not_searched_on_a_cpu(teacher, audio, monkeypatch):
    monkeypatch.setenv("FIT_BATCH", "1")
    assert "leave it out" in problems(audio, "--adapt", "--config", BASE, "--teacher_id", teacher)[0]


def test_a_folder_of_another_run_is_told_at_once(teacher, audio):
    flags = ["--teacher_id", teacher, "--exp_dir", "run", "--optim.max_steps", 100]
    Record.start(step_1_identity(adapted(audio, *flags).recipe, {"teacher": "some digest"})).write(Path("run"))
    (Path("run") / "ckpts").mkdir()
    (Path("run") / "ckpts" / "last.ckpt").touch()
    assert adapted(audio, *flags, "--optim.lr", 0.5, "--trainer.devices", 1).recipe.optim.lr == 0.5, "distill.py asks"
    words = [audio, "--adapt", "--config", BASE, *flags, "--seed", 3, "--trainer.batches_per_update", 2]
    found = problems(*words, "--trainer.accelerator", "gpu")
    assert len(found) == 2 and "seed 2022 -> 3" in found[1] and "cannot change in the middle of a run" in found[1]


CTC = ("--adapt", "--config", ROOT / "conf" / "dpctc_base.yaml")
NEW_HEAD = ("--objective.ctc.vocabulary", "transcripts", "--objective.ctc.distill", 0)


def test_a_recogniser_is_planned_with_what_is_said(teacher, librispeech):
    """Lists without transcripts are made again, those of other audio are not replaced."""
    words = [str(word) for word in (librispeech, *CTC, "--teacher_id", teacher, *NEW_HEAD)]
    (librispeech / "dev-clean" / "1" / "1" / "1-1.trans.txt").write_text("1 A B\n")
    made = read_words(words)
    assert answers(made)[1:2] == ["data"] and answers(made)[6:10] == ["", "data/valid.jsonl", "", "auto"]
    assert made.recipe.data.long == "drop" and made.sizes is not None
    (message,) = problems(*words[:-4])
    assert "CTC" in message and str(teacher) in message
    Path("data").mkdir()
    for name in ("train100.tsv", "valid.tsv"):
        (Path("data") / name).write_text(f"{librispeech}\ntrain-clean-100/1/1/1.flac\t32000\n")
    assert answers(read_words(words))[1] == "data", "what is said is not there yet"
    for name in ("train100.jsonl", "valid.jsonl"):
        (Path("data") / name).write_text('{"audio_filepath": "x", "text": "A"}\n')
    assert answers(read_words(words))[1] == ""
    (Path("data") / "valid.jsonl").unlink()
    other = librispeech.parent / "other"
    other.mkdir()
    Path("mine").mkdir()
    for name in ("train100.tsv", "valid.tsv"):
        (Path("mine") / name).write_text(f"{other}\na.flac\t32000\n")
    (message,) = problems(*words, "--data.tsv_dir", "mine")
    assert message.startswith(f"mine/train100.tsv lists audio of {other}, not of {librispeech}")
    (message,) = problems(*words, "--data.noise.folders", "[nowhere]")
    assert message == "data.noise.folders: nowhere is not a folder"
    own = ("--data.transcripts.train", librispeech / "train-clean-100", "--data.transcripts.valid", "gone.jsonl")
    assert problems(*words, *map(str, own)) == ["gone.jsonl: no such file or folder"]
