"""Feed every reader of files damaged and hostile ones, and see that each is refused in one line or read.

    python -m tests.endurance.fuzz_readers [--files 2400] [--seed 0] [--keep FOLDER]

A file passes when the command ends with code 0, or with code 2 and one line, within 10 s and 2 GiB, and what was in the
place of its output before is untouched or replaced by something whole. Prints a table. Needs requirements/dev.txt.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import multiprocessing
import multiprocessing.connection
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
import yaml
from tqdm import tqdm

import convert_from_checkpoint
import convert_hubert_from_hf
import distill
import prepare_data
import prune
from distillation.config import RECIPES, parse_recipe
from distillation.data.batching import Crop, MicroBatch
from distillation.data.loaders import AudioDataset
from distillation.data.manifest import Manifest, read_tsv
from distillation.errors import UserError, command
from evaluation.tables import machine, markdown_table
from tests.configs import TINY
from tests.endurance import mutations
from tests.helpers import write_noise
from tests.released_students import TINY as STUDENTS
from tests.released_students import importable, lightning, settings_file, student_state
from tests.wav2vec2.test_importers_distiller import CONV_LAYERS, distiller, state_of
from tests.wav2vec2.test_importers_distiller import TINY as DISTILHUBERT
from tests.wav2vec2.test_importers_fairseq import layout_args, teacher
from wav2vec2 import load_model, save_model, wav2vec2_model

MAX_SECONDS, MAX_BYTES = 10.0, 2 * 2**30
SENTINEL = b"what was there before"


@dataclass
class Reader:
    """A command that reads files.

    Attributes:
        seeds: good files, each a folder whose files are copied for every run.
        victim: name of the file in it to mutate; the first pattern that fits.
        mutations: ways to do it, one is drawn each time.
        run: ends as a script does; gets the folder and the path for its output.
        whole: raises unless what is at the output path is complete; None where nothing is written.
    """

    seeds: list[Path]
    victim: str
    mutations: list[mutations.Mutation]
    run: Callable[[Path, Path], None]
    whole: Callable[[Path], object] | None = None


def call(main: Callable[[], None], *args: object) -> None:
    """Run the main of a script with these words on its command line."""
    sys.argv = ["fuzz", *map(str, args)]
    main()


@command
def read_list(path: Path) -> None:
    """As the data module does."""
    read_tsv(path)


@command
def read_recipe(path: Path) -> None:
    """As the training scripts do."""
    parse_recipe(["--config", str(path)])


@command
def read_model(path: Path) -> None:
    """As users do, and a forward pass."""
    model = load_model(path)
    with torch.no_grad():
        model(torch.zeros(1, 4000))


@command
def read_audio(folder: Path, out: Path) -> None:
    """As training does, and as prepare_data.py --check does; what both leave out counts as refused."""
    names = sorted(path.name for path in folder.iterdir())
    dataset = AudioDataset(Manifest(folder, names, np.full(len(names), 8000)), 16000)
    batch = dataset[MicroBatch(0, [Crop(i, 500, 7000) for i in range(len(names))])]
    call(prepare_data.main, "--data", folder, "--out", out.parent / "lists", "--check", "--skip_broken",
         "--num_threads", 1, "--valid_fraction", 0.5)  # fmt: skip
    broken = out.parent / "lists/broken.tsv"
    if broken.exists() or batch.errors:
        raise UserError(broken.read_text() if broken.exists() else str(batch.errors))


def make_readers(folder: Path) -> dict[str, Reader]:
    """Good files of every kind, and what reads them."""
    torch.manual_seed(0)
    damage, reword, rezip, retorch, reheader, rejson = (
        getattr(mutations, name) for name in ("damage", "reword", "rezip", "retorch", "reheader", "rejson")
    )

    def seed(name: str) -> Path:
        (folder / name).mkdir(parents=True)
        return folder / name

    audio = seed("audio")
    for i, suffix in enumerate(("flac", "wav", "ogg", "aiff")):
        for name in (f"{i}a.{suffix}", f"{i}b.{suffix}"):
            write_noise(audio / name, 0.5 + i / 10, i)
    tsv = seed("tsv")
    call(prepare_data.main, "--data", audio, "--out", tsv)
    recipes = seed("yaml")
    shutil.copytree(RECIPES, recipes, dirs_exist_ok=True)
    pth, tensors = seed("pth"), seed("safetensors")
    model = wav2vec2_model(**{**TINY, "encoder_prune_attention_heads": True, "extractor_prune_conv_channels": True})
    save_model(pth / "model.pth", model, {"0.weight": torch.eye(24)}, mask_embedding=torch.zeros(24))
    save_model(tensors / "model.safetensors", model, {"0.weight": torch.eye(24)}, mask_embedding=torch.zeros(24))

    save_model(folder / "teacher.pth", wav2vec2_model(**TINY))
    run, lists = seed("ckpt"), folder / "lists"
    call(prepare_data.main, "--data", audio, "--out", lists)
    flags = [
        "--config", RECIPES / "demo.yaml", "--teacher_ckpt", folder / "teacher.pth", "--teacher_layers", 4,
        "--teacher_width", 24, "--data.tsv_dir", lists, "--data.train", "train.tsv", "--pruning.target_sparsity", 0.3,
        "--objective.layer_to_layer.layers", "[[0],[2,4]]", "--trainer.validate_every", 100,
    ]  # fmt: skip
    call(distill.main, *flags, "--optim.max_steps", 2, "--exp_dir", folder / "run")
    shutil.copy(folder / "run/ckpts/last.ckpt", run / "last.ckpt")

    hub = seed("hub")
    sizes = {
        "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 36,
        "conv_dim": (16, 20, 20), "conv_kernel": (10, 3, 3), "conv_stride": (5, 2, 2), "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
    }  # fmt: skip
    transformers.HubertModel(transformers.HubertConfig(**sizes)).save_pretrained(hub)
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(hub)
    old = seed("hub_bin")
    shutil.copy(hub / "config.json", old)
    torch.save(transformers.HubertModel.from_pretrained(hub).state_dict(), old / "pytorch_model.bin")
    fairseq = seed("fairseq")
    torch.save(layout_args(teacher("hubert"), None), fairseq / "model.pt")  # type: ignore[arg-type]
    student = seed("student")
    content = lightning(student_state(STUDENTS["fithubert"]))
    distilhubert = seed("distiller")
    with importable():
        torch.save(content, student / "s.ckpt")
        torch.save(
            distiller(state_of(DISTILHUBERT, CONV_LAYERS), Optimizer=content["optimizer_states"][0]),
            distilhubert / "states.ckpt",
        )
    (student / "s.yaml").write_text(yaml.dump(settings_file(STUDENTS["fithubert"])))

    def resume(path: Path, out: Path) -> None:
        exp = path / "run"
        (exp / "ckpts").mkdir(parents=True)
        (path / "last.ckpt").rename(exp / "ckpts/last.ckpt")
        call(distill.main, *flags, "--optim.max_steps", 3, "--continue_with_changes", "--exp_dir", exp)

    def convert(main: Callable[[], None], words: Callable[[Path], list[object]]) -> Callable[[Path, Path], None]:
        return lambda path, out: call(main, *words(path), "--out", out)

    from_hub = convert(convert_hubert_from_hf.main, lambda path: ["--model", path])
    from_student = convert(
        convert_from_checkpoint.main, lambda path: ["--checkpoint", path / "s.ckpt", "--config", path / "s.yaml"]
    )
    torch_files = [damage, rezip, rezip, retorch, retorch]
    return {
        "utterance list, .tsv": Reader([tsv], "train.tsv", [damage, reword], lambda p, out: read_list(p / "train.tsv")),
        "recipe, .yaml": Reader([recipes], "*.yaml", [damage, reword, reword], lambda p, out: read_recipes(p)),
        "audio (FLAC, WAV, OGG, AIFF)": Reader([audio], "*", [damage], read_audio),
        "model, .pth": Reader([pth], "*.pth", torch_files, lambda p, out: read_model(p / "model.pth")),
        "model, .safetensors": Reader(
            [tensors], "*.safetensors", [damage, reheader, reheader], lambda p, out: read_model(p / "model.safetensors")
        ),
        "checkpoint to prune, .ckpt": Reader(
            [run], "*.ckpt", torch_files,
            convert(prune.main, lambda path: ["--distilled_ckpt", path / "last.ckpt"]), load_model,
        ),
        "checkpoint to resume, .ckpt": Reader([run], "*.ckpt", torch_files, resume),
        "transformers weights, .safetensors": Reader([hub], "*.safetensors", [damage, reheader], from_hub, load_model),
        "transformers weights, .bin": Reader([old], "*.bin", torch_files, from_hub, load_model),
        "transformers settings, .json": Reader([hub], "*.json", [damage, rejson, rejson], from_hub, load_model),
        "fairseq, .pt": Reader(
            [fairseq], "*.pt", torch_files,
            convert(convert_from_checkpoint.main, lambda path: ["--checkpoint", path / "model.pt"]), load_model,
        ),
        "DistilHuBERT, .ckpt": Reader(
            [distilhubert], "*.ckpt", torch_files,
            convert(convert_from_checkpoint.main, lambda path: ["--checkpoint", path / "states.ckpt"]), load_model,
        ),
        "released student, .ckpt": Reader([student], "*.ckpt", torch_files, from_student, load_model),
        "released student, .yaml": Reader([student], "*.yaml", [damage, reword], from_student, load_model),
    }  # fmt: skip


def read_recipes(folder: Path) -> None:
    """The recipe that was mutated is the newest; others may build on it."""
    read_recipe(max(folder.glob("*.yaml"), key=lambda path: path.stat().st_mtime_ns))


def mutate(reader: Reader, folder: Path, rng: random.Random) -> str:
    """Copy a seed into an empty folder and spoil one file; returns the name of the mutation."""
    shutil.copytree(rng.choice(reader.seeds), folder)
    victim = rng.choice(sorted(path for path in folder.glob(reader.victim) if path.is_file()))
    while True:
        mutation = rng.choice(reader.mutations)
        with contextlib.suppress(Exception):  # what cannot be written is no file
            victim.write_bytes(mutation(victim.read_bytes(), rng))
            return f"{mutation.__name__} of {victim.name}"


def outcome(reader: Reader, folder: Path) -> str:
    """Run a reader on a spoilt folder: "read", "refused", or what is wrong."""
    out = folder.parent / "out" / "model.pth"
    out.parent.mkdir(exist_ok=True)
    out.write_bytes(SENTINEL)
    log = folder.parent / "log"
    code: object = 0
    with log.open("w") as file, redirected(file.fileno()):
        try:
            reader.run(folder, out)
        except SystemExit as stop:
            code = stop.code
        except BaseException as error:
            code = f"{type(error).__name__}: {error}"
    text = log.read_text(errors="replace")
    if code not in (0, 2):
        return f"not one line: {code}"
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    if "Traceback" in text or len(errors) != (code == 2):
        return f"not one line: {text[-300:]}"
    if code == 2 and out.read_bytes() != SENTINEL:
        return "refused, but wrote its output"
    if code == 0 and reader.whole is not None:
        reader.whole(out)
    left = [path.name for path in folder.parent.rglob(".*") if path.is_file()]
    return f"left {left[0]}" if left else ("refused" if code else "read")


@contextlib.contextmanager
def redirected(descriptor: int) -> Iterator[None]:
    """Send everything that this process prints there, also from its libraries."""
    kept = [os.dup(1), os.dup(2)]
    try:
        for standard in (1, 2):
            os.dup2(descriptor, standard)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for standard, copy in zip((1, 2), kept):
            os.dup2(copy, standard)
            os.close(copy)


def peak_bytes() -> int:
    """Largest resident size of this process since the last call."""
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def work(reader: Reader, cases: list[tuple[int, int]], base: Path, pipe: multiprocessing.connection.Connection) -> None:
    """Go through cases (number, seed), telling the parent about each before and after."""
    logging.getLogger().handlers.clear()
    torch.set_num_threads(1)
    for number, seed in cases:
        folder = base / f"{number}" / "files"
        folder.parent.mkdir()
        what = mutate(reader, folder, random.Random(seed))
        pipe.send((number, what, None))
        peak_bytes()
        try:
            result = outcome(reader, folder)
        except Exception as error:
            result = f"broken output: {type(error).__name__}: {error}"
        if (peak := peak_bytes()) > MAX_BYTES:
            result = f"took {peak / 2**30:.1f} GiB"
        pipe.send((number, what, result))
        if result in ("read", "refused"):
            shutil.rmtree(folder.parent)


def fuzz(name: str, reader: Reader, count: int, seed: int, base: Path) -> tuple[Counter[str], list[str]]:
    """Run ``count`` cases in a process that may crash or hang; how they ended, and the failures."""
    context = multiprocessing.get_context("fork")
    cases = [(number, hash((seed, number)) & 0xFFFFFFFF) for number in range(count)]
    counts: Counter[str] = Counter()
    failures = []
    base.mkdir(parents=True)
    with tqdm(total=count, desc=name, unit="file") as bar:
        while cases:
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=work, args=(reader, cases, base, theirs))
            process.start()
            theirs.close()
            number, what, result = cases[0][0], "start", None
            while True:
                try:
                    if not mine.poll(MAX_SECONDS):
                        result = f"took over {MAX_SECONDS:g} s"
                    else:
                        number, what, result = mine.recv()
                        if result is None:
                            continue
                except EOFError:
                    process.join()
                    if process.exitcode == 0:
                        cases = []
                        break
                    result = f"crashed with {process.exitcode}"
                counts[result if result in ("read", "refused") else "failed"] += 1
                if result not in ("read", "refused"):
                    failures.append(f"{name}, file {number} ({what}): {result}")
                bar.update(1)
                if result.startswith(("took over", "crashed")):
                    process.kill()
                    process.join()
                    cases = [case for case in cases if case[0] > number]
                    break
    return counts, failures


def main() -> None:
    """Print the table; exit with 1 when anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="readers whose name contains this")
    parser.add_argument("--keep", type=Path, help="folder for the files that failed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    base = Path(tempfile.mkdtemp(prefix="fuzz")) if options.keep is None else options.keep
    begin = time.monotonic()
    readers = {k: v for k, v in make_readers(base / "seeds").items() if options.only in k}
    share = -(-options.files // len(readers))
    rows, failures = [], []
    for index, (name, reader) in enumerate(readers.items()):
        counts, failed = fuzz(name, reader, share, options.seed + index, base / f"cases{index}")
        rows.append((name, share, counts["read"], counts["refused"], counts["failed"]))
        failures += failed
    rows.append(("all", *(sum(column) for column in list(zip(*rows))[1:])))
    print(f"{machine()}, seed {options.seed}, {time.monotonic() - begin:.0f} s\n")
    columns = ("file", "mutated", "read all the same", "refused in one line", "failed")
    print(markdown_table(columns, [(name, *(f"{count:,}" for count in counts)) for name, *counts in rows]))
    print("\n".join(["", *failures]))
    if options.keep is None:
        shutil.rmtree(base)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
