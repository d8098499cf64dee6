"""README and docs/: what can run here runs as it stands; of the rest, what is named exists and every flag is known."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from distillation.config import parse_recipe
from distillation.sweep import runs_of
from tests.configs import TINY, first_layers
from tests.helpers import ROOT
from wav2vec2 import save_model, wav2vec2_model

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "demo" / "teacher" / "README.md"]
# what the blocks of docs/use.md shall run, shortened
SHORTER = {
    "extract_features.py": "",
    "export.py": "",
    "finetune_ctc.py": "--max_steps 4 --freeze_steps 2 --validate_every 2 --accelerator cpu --workers 0",
    "evaluation.recognition": "--device cpu",
    "evaluation.cost": "--rounds 1 --seconds 1 --batch 1 --device cpu",
}
STAGES = ("distill.py", "final_distill.py", "fit_batch.py")  # their flags are the recipe's
TWO_STEPS = {
    "run_dphubert.sh": "dphubert_base", "slurm_dphubert.sh": "dphubert_base", "run_dpwavlm.sh": "dpwavlm_base_plus",
    "run_dpwav2vec2.sh": "dpwav2vec2_base", "run_recogniser.sh": "dpctc_base",
}  # fmt: skip
FOLDERS = "benchmarks|conf|demo|distillation|docs|evaluation|exporting|requirements|scripts|tests|wav2vec2"
OTHERS = ("evaluation.s3prl_upstream",)  # takes the flags of s3prl


def names(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    """The page without its blocks, in one line."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return " ".join(text.split())


def command_lines(text: str) -> Iterator[list[str]]:
    """Words of the commands of a block, without comments and variables set before them."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r"[A-Z_\d]+=", words[0]):
            words.pop(0)
        if words and words[0] not in ("for", "done"):
            yield words


def named_commands(page: Path) -> Iterator[list[str]]:
    """Commands of the blocks and of the text between them."""
    for language, text in blocks(page):
        if language == "bash":
            yield from command_lines(text)
    for span in re.findall(r"`([^`]+)`", prose(page)):
        if re.match(r"(bash |python |scripts/\w+\.sh|\w+\.py\b)", span):
            yield from command_lines(span)


@functools.cache
def help_of(script: str) -> str:
    """What ``--help`` prints; ``script`` is a file or a module."""
    stdout = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(stdout):
        patch.setattr(sys, "argv", [script, "--help"])
        with pytest.raises(SystemExit) as stop:
            if script.endswith(".py"):
                runpy.run_path(str(ROOT / script), run_name="__main__")
            else:
                runpy.run_module(script, run_name="__main__")
    assert not stop.value.code, script
    return stdout.getvalue()


def check_python(words: list[str]) -> None:
    """``SCRIPT.py ...`` or ``-m MODULE ...``."""
    script, *rest = words[1:] if words[0] == "-m" else words
    if words[0] == "-m":
        assert find_spec(script), f"no module {script}"
    else:
        assert (ROOT / script).is_file(), f"no file {script}"
    flags = [word for word in rest if word.startswith("-")]
    if script in STAGES:
        check_recipe(shlex.split(re.sub(r"--config exp/\S+", "", shlex.join(rest))))  # made by fit_batch.py
    elif flags and script not in OTHERS:
        unknown = [flag for flag in flags if not re.search(rf"(?<![\w-]){flag}(?![\w-])", help_of(script))]
        assert not unknown, f"{script}: {unknown}"


def check_recipe(flags: list[str]) -> None:
    """Flags of a recipe, values included."""
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):  # --print_config
        parse_recipe(flags)


def check_shell(script: str, words: list[str]) -> None:
    """``scripts/X.sh ...``."""
    assert (ROOT / script).is_file(), f"no file {script}"
    name = Path(script).name
    if name == "superb.sh":
        check_python(["-m", "evaluation.superb", *words])
    if name == "gpu.sh":
        for module in ("gpu_checks", "gpu", "gpu_profile"):
            check_python(["-m", f"benchmarks.{module}", *words])
    if name == "sweep.sh":
        assert len(runs_of(["--config", f"conf/{words[1]}.yaml", *words[2:]])) > 1
    if not words or name not in (*TWO_STEPS, "run_students.sh"):
        return
    if name == "run_students.sh":
        recipe, words = words[0], words[2:]
    else:
        recipe, words = TWO_STEPS[name], words[1:]
        if words and not words[0].startswith("--"):
            recipe, words = words[0], words[1:]
    words = [word for word in words if word != "--dry_run"]
    if recipe != "NAME":
        check_recipe(["--config", f"conf/{recipe}.yaml", *words])


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_what_commands_name_exists(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in named_commands(page):
        program, *rest = words
        if program in ("bash", "sbatch"):
            check_shell(rest[0], rest[1:])
        elif program.endswith(".sh"):
            assert os.access(ROOT / program, os.X_OK), f"{program} runs with bash only"
            check_shell(program, rest)
        elif program == "python":
            check_python(rest)
        elif program == "pip":
            assert rest[0] == "install" and all((ROOT / word).exists() for word in rest[1:] if "." in word), words
        else:
            assert program.endswith(".py"), f"what is {words}?"
            check_python(words)
    for span in re.findall(r"`(--\w+\.[^`]+)`", prose(page)):
        check_recipe(["--config", "conf/dphubert_base.yaml", *shlex.split(span)])
    for path in re.findall(rf"`((?:{FOLDERS})/[\w./]*)`", prose(page)):
        assert (ROOT / path).exists(), f"no {path}"


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_and_pictures_resolve(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)|<img src=\"([^\"]+)\"", text):
        path, _, anchor = "".join(target).partition("#")
        if path.startswith("https://"):
            continue
        found = page.parent / path if path else page
        assert found.is_file(), f"no {path}"
        headings = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        slugs = [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]
        assert not anchor or anchor in slugs, f"no heading for #{anchor}: {slugs}"


def test_the_front_page_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 180


def test_the_layout_map_is_that_of_the_tree():
    (layout,) = (text for language, text in blocks(README) if language == "text")
    mapped, folder = set(), ROOT
    for line in layout.splitlines():
        listed = re.match(r" *((?:\S+(?:\.py|/) ?)+)(?:   |$)", f"{line}   ")
        assert listed, f"names nothing: {line!r}"
        parent = folder if line.startswith("    ") else ROOT
        paths = [parent / name for name in listed[1].split()]
        assert all(path.exists() for path in paths), f"not there: {line!r}"
        if parent == ROOT:
            mapped.update(path.name for path in paths)
            folder = paths[0]
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    tops = {name.partition("/")[0] for name in tracked}  # of an unpacked archive without git: nothing
    assert {top for top in tops if top.endswith(".py") or ((ROOT / top).is_dir() and top[0] != ".")} <= mapped


def write_speech(folder: Path, noise) -> None:
    """A LibriSpeech of noise."""
    for part in ("train-clean-100", "dev-clean"):
        for i, text in enumerate(("A CAB", "BAD", "A DAB")):
            noise(folder / part / "1" / "2" / f"1-2-{i:04d}.flac", 1.5, i)
            with (folder / part / "1" / "2" / "1-2.trans.txt").open("a") as file:
                file.write(f"1-2-{i:04d} {text}\n")


@pytest.mark.slow
def test_the_blocks_run(server, noise, tmp_path):
    """Python blocks of all pages, and what docs/use.md does on the command line, in one folder and in order."""
    pytest.importorskip("onnxscript")
    noise(tmp_path / "audio.wav", 1.5, 0)
    write_speech(tmp_path / "LibriSpeech", noise)
    save_model(tmp_path / "final.pth", wav2vec2_model(**first_layers(TINY, 1)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ran = []
    for page in PAGES:
        for language, text in blocks(page):
            commands = []
            if language == "python":
                (tmp_path / "block.py").write_text(text)
                commands.append(["block.py"])
            elif language == "bash" and page.name == "use.md":
                for program, *words in command_lines(text):
                    if program == "python":
                        name = words[1] if words[0] == "-m" else words[0]
                        script = [] if words[0] == "-m" else [str(ROOT / words.pop(0))]
                        commands.append([*script, *words, *SHORTER[name].split()])
                        ran.append(name)
            for command in commands:
                result = subprocess.run(
                    [server.bin / "python", *command], cwd=tmp_path, env=environment, capture_output=True, text=True
                )
                assert result.returncode == 0, f"{page.name}:\n{text}\n\n{result.stdout}\n{result.stderr}"
    assert set(ran) == set(SHORTER)
    made = ("my_model", "model.onnx", "model.int8.onnx", "model.pt2", "model.safetensors", "feats", "recogniser")
    assert all((tmp_path / name).exists() for name in made)
