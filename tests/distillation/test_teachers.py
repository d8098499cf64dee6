"""Which teacher a recipe means where its file, its id or both are named, and what becomes of a file of another one."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import yaml

from distillation.config import Recipe, parse_recipe
from distillation.errors import UserError
from distillation.teacher import load_teacher
from tests.configs import TINY
from tests.helpers import ROOT, run_error
from wav2vec2 import save_model, wav2vec2_model
from wav2vec2.importers import Source, converted_file
from wav2vec2.importers.source import SOURCE

CONF = ROOT / "conf"
HUBERT = "facebook/hubert-base-ls960"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with HuBERT's file and another, as the shell recipes leave them."""
    monkeypatch.chdir(tmp_path)
    for name in ("pretrained/hubert-base-ls960.hf.pth", "there.pth"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()


def named(*argv: object) -> tuple[str | None, str]:
    """Id and file of the teacher."""
    recipe = parse_recipe(list(map(str, argv)))[0]
    return recipe.teacher_id, str(recipe.teacher_ckpt)


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_name_the_teacher_once(path: Path) -> None:
    teacher_id, file = named("--config", path)
    assert file == str(converted_file(teacher_id)) and "teacher_ckpt" not in path.read_text()
    assert Recipe().teacher_ckpt == converted_file(Recipe().teacher_id)


def test_files_of_teachers() -> None:
    files = {HUBERT: "hubert-base-ls960.hf.pth", "m/x/": "x.hf.pth", "/data/x": "x.hf.pth",
             ".": f"{Path.cwd().name}.hf.pth", "torchaudio:WAVLM_BASE": "WAVLM_BASE.torchaudio.pth"}  # fmt: skip
    assert {model: str(converted_file(model)) for model in files} == {k: f"pretrained/{v}" for k, v in files.items()}


@pytest.mark.parametrize(
    ("base", "recipe", "flags", "teacher_id", "file"),
    [
        ("", "", "", HUBERT, "pretrained/hubert-base-ls960.hf.pth"),
        ("", "", "--teacher_id org/x", "org/x", "pretrained/x.hf.pth"),
        ("", "", "--teacher_id=org/x", "org/x", "pretrained/x.hf.pth"),
        ("", "teacher_id: org/x", "", "org/x", "pretrained/x.hf.pth"),
        ("teacher_id: org/x", "teacher_id: org/y", "", "org/y", "pretrained/y.hf.pth"),
        # the id in a later place
        ("teacher_ckpt: there.pth", "teacher_id: org/x", "", "org/x", "pretrained/x.hf.pth"),
        ("", "teacher_ckpt: there.pth", "--teacher_id org/x", "org/x", "pretrained/x.hf.pth"),
        ("", "{teacher_ckpt: there.pth, teacher_id: org/y}", "--teacher_id org/x", "org/x", "pretrained/x.hf.pth"),
        # the file in a later place
        ("teacher_id: org/x", "teacher_ckpt: there.pth", "", None, "there.pth"),
        ("", "teacher_id: org/x", "--teacher_ckpt there.pth", None, "there.pth"),
        ("", "", "--teacher_ckpt there.pth", None, "there.pth"),
        ("", "", "--teacher_ckpt new.pth", HUBERT, "new.pth"),
        ("", "teacher_id: org/x", "--teacher_ckpt=new.pth", "org/x", "new.pth"),
        # both in one place
        ("", "{teacher_ckpt: there.pth, teacher_id: org/x}", "", "org/x", "there.pth"),
        ("", "teacher_id: org/y", "--teacher_ckpt there.pth --teacher_id org/x", "org/x", "there.pth"),
        # none of it
        ("teacher_ckpt: there.pth", "teacher_ckpt: null", "", HUBERT, "pretrained/hubert-base-ls960.hf.pth"),
        ("teacher_ckpt: there.pth", "teacher_id: null", "", None, "there.pth"),
        ("teacher_ckpt: there.pth", "", "--teacher_id null", None, "there.pth"),
    ],
)
def test_the_later_place_decides(base: str, recipe: str, flags: str, teacher_id: str | None, file: str) -> None:
    Path("base.yaml").write_text(base or "{}")
    Path("recipe.yaml").write_text(yaml.safe_dump({"base": "base.yaml"} | (yaml.safe_load(recipe) or {})))
    words = ["--config", "recipe.yaml", *flags.split()]
    assert named(*words) == (teacher_id, file)
    resolved = parse_recipe(words)[1]
    Path("saved.yaml").write_text(resolved)
    assert parse_recipe(["--config", "saved.yaml"])[1] == resolved
    assert named("--config", "saved.yaml", "--teacher_id", "org/z") == ("org/z", "pretrained/z.hf.pth")
    assert named("--config", "saved.yaml", "--teacher_ckpt", "there.pth") == (None, "there.pth")
    Path("more.yaml").write_text("teacher_id: org/z")
    assert named(*words[:2], "--config", "more.yaml") == ("org/z", "pretrained/z.hf.pth")


def test_no_teacher() -> None:
    with pytest.raises(UserError, match=r"^teacher_id is null: name the file of the teacher by --teacher_ckpt$"):
        named("--teacher_id", "null")
    with pytest.raises(UserError, match="--teacher_i"):  # no short forms: they would not be seen
        named("--teacher_i", "org/x")


def test_what_is_printed_is_settled(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        named("--print_config", "--config", CONF / "demo.yaml", "--teacher_id", "org/x")
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["teacher_id"], printed["teacher_ckpt"]) == ("org/x", "pretrained/x.hf.pth")
    assert named("--config", CONF / "demo.yaml", "--teacher_ckpt", "there.pth") == (None, "there.pth")


# Files


def model_file(path: str, source: Source | None = None) -> None:
    save_model(path, wav2vec2_model(**TINY), **({} if source is None else {SOURCE: source.entry()}))


def load(*flags: object) -> None:
    load_teacher(parse_recipe(["--teacher_layers", "4", "--teacher_width", "24", *map(str, flags)])[0])


def refused(*flags: object) -> str:
    with pytest.raises(UserError) as error:
        load(*flags)
    assert "\n" not in str(error.value)
    return str(error.value)


def hub_folder(name: str, content: str = "weights") -> Path:
    folder = Path(name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text(content)
    return folder


def source_of(folder: Path, name: object) -> Source:
    return Source.of(str(name), [folder / "config.json", folder / "model.safetensors"])


def test_a_file_of_another_source(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model_file("pretrained/x.hf.pth", Source("org/x", COMMIT, "0"))
    load("--teacher_id", "org/x")
    assert "teacher: pretrained/x.hf.pth, converted from org/x at 0123456\n" in caplog.text
    message = (
        "pretrained/x.hf.pth was converted from org/x at 0123456, not from {}: remove it to convert {}, or give "
        "another --teacher_ckpt; --teacher_ckpt pretrained/x.hf.pth without --teacher_id trains with org/x at 0123456"
    )
    assert refused("--teacher_id", "other/x") == message.format("other/x", "other/x")
    words = ("--teacher_id", HUBERT, "--teacher_ckpt", "pretrained/x.hf.pth")
    assert refused(*words) == message.format(HUBERT, HUBERT)
    caplog.clear()
    load("--teacher_ckpt", "pretrained/x.hf.pth")
    assert "teacher: pretrained/x.hf.pth, converted from org/x at 0123456\n" in caplog.text


@pytest.mark.parametrize("source", [None, "a line", {"id": 3}])
def test_files_that_name_no_source(caplog: pytest.LogCaptureFixture, source: object) -> None:
    """Older conversions, released files, and what others may call so."""
    caplog.set_level(logging.INFO)
    save_model("pretrained/x.hf.pth", wav2vec2_model(**TINY), **({} if source is None else {SOURCE: source}))
    load("--teacher_id", "org/x")
    assert "teacher: pretrained/x.hf.pth, which does not say what it was converted from\n" in caplog.text


def test_folders_are_known_by_what_they_hold(tmp_path: Path) -> None:
    folder = hub_folder("models/x")
    model_file("pretrained/x.hf.pth", source_of(folder, tmp_path / folder))
    load("--teacher_id", tmp_path / folder)
    load("--teacher_id", folder)
    load("--teacher_id", folder.rename(hub_folder("elsewhere") / "y"), "--teacher_ckpt", "pretrained/x.hf.pth")
    hub_folder("models/x", "others")
    for name in (folder, tmp_path / folder):
        message = refused("--teacher_id", name)
        assert message.startswith("pretrained/x.hf.pth was converted from x, ") and "remove it to convert" in message
        assert ("which has changed since" in message) == name.is_absolute()
    (folder / "model.safetensors").unlink()  # to save room
    load("--teacher_id", tmp_path / folder)
    model_file("pretrained/x.hf.pth", source_of(hub_folder("models/x"), folder))
    hub_folder("models/x", "others")
    assert "was converted from models/x, which has changed since" in refused("--teacher_id", folder)


def test_no_file_yet() -> None:
    assert refused("--teacher_id", "org/x") == (
        "pretrained/x.hf.pth: no such file; convert_hubert_from_hf.py --model org/x --out pretrained/x.hf.pth makes it"
    )
    message = run_error("distill.py", "--config", CONF / "dphubert_base.yaml", "--teacher_id", "torchaudio:WAVLM_BASE")
    assert "pretrained/WAVLM_BASE.torchaudio.pth: no such file; " in message
