"""Shared fixtures: a tiny teacher, a folder of noise that looks like LibriSpeech, and the scripts as subprocesses."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.export import ExportedProgram

from exporting import graphs, verify
from tests.client import Finished, Server
from tests.configs import TINY
from tests.exports import LARGE, MASKS, VOCABULARY, make, transformers_folder
from tests.helpers import ROOT, run_error, run_exported_here, run_here, write_noise
from wav2vec2 import save_model, wav2vec2_model

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what starts processes; the longest files first, since one that starts last would run alone."""
    for item in items:
        if "server" in getattr(item, "fixturenames", ()):
            item.add_marker("process")
    cost: dict[Path, int] = {}
    for item in items:
        weight = 5 if item.get_closest_marker("slow") else bool(item.get_closest_marker("process"))
        cost[item.path] = cost.get(item.path, 0) + weight
    items.sort(key=lambda item: -cost[item.path])


@pytest.fixture(scope="module", autouse=True)
def _freeze() -> None:
    """Spare the garbage collector what is imported: it would go through all of it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_config() -> dict:
    return dict(TINY)


@pytest.fixture(scope="session")
def teacher_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random teacher of 4 layers, 24 wide."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    save_model(path, wav2vec2_model(**TINY))
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LibriSpeech-shaped: 14 training and 4 validation utterances of 1 to 2 s."""
    root = tmp_path_factory.mktemp("corpus")
    for split, count in (("train-clean-100", 14), ("dev-clean", 4)):
        for i in range(count):
            write_noise(root / split / f"{i % 3}" / "1" / f"{i}.flac", 1 + (i * 7 % 10) / 10, i)
    return root


@pytest.fixture(scope="session")
def tsv_dir(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lists of the noise corpus, made by prepare_data.py."""
    out = tmp_path_factory.mktemp("data")
    run_here("prepare_data.py", "--data", corpus, "--out", out)
    return out


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """Starts scripts as processes within milliseconds."""
    with Server() as server:
        yield server


@pytest.fixture(scope="session")
def script(server: Server) -> Callable[..., Finished]:
    """Runs a script as a process to its end."""
    return server.run


@pytest.fixture(scope="session")  # the package that a process imports from it has one place
def modules_cache(tmp_path_factory):
    """Where transformers copies the code of folders."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.fixture
def trace_once(monkeypatch):
    """The graph of one model is the same in every file that has it."""
    program, trace = None, graphs.trace

    def cached(outputs: verify.ExportedOutputs) -> ExportedProgram:
        nonlocal program
        program = program or trace(outputs)
        return program

    monkeypatch.setattr(graphs, "trace", cached)


@pytest.fixture
def exported_here(monkeypatch, modules_cache):
    """Exports are checked in this process; in fresh ones by the commands of docs/use.md, which the tests run."""
    monkeypatch.setattr(verify, "run_exported", run_exported_here)


@pytest.fixture(scope="module")
def short_batches():
    """Exports are checked on short audio alone, where the test is about something else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "BATCHES", [[0.05], [0.05, 0.4]])
        yield


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory, tiny_config, modules_cache) -> Path:
    """A pruned model for transformers, beside its .pth."""
    folder = tmp_path_factory.mktemp("hf")
    return transformers_folder(make(folder / "model.pth", tiny_config, **MASKS), folder / "pruned_hf")


@pytest.fixture(scope="session")
def ctc_folder(tmp_path_factory, tiny_config, modules_cache) -> Path:
    """A fine-tuned model for transformers, beside its .pth."""
    folder = tmp_path_factory.mktemp("ctc")
    changes = {**LARGE, "aux_num_out": len(VOCABULARY), "encoder_layer_drop": 0.0}
    return transformers_folder(make(folder / "model.pth", tiny_config, **changes), folder / "ctc_hf")


@pytest.fixture(scope="session", autouse=True)
def _no_trace_log():
    """Torch traces exports in detail where its log has a handler, as pytest gives all logs that do not propagate."""
    logging.getLogger("torch.__trace").propagate = True


@pytest.fixture(scope="session")
def script_error():
    return run_error


@pytest.fixture(scope="session")
def noise():
    return write_noise


@pytest.fixture(scope="session")
def tiny_flags(teacher_path: Path, tsv_dir: Path) -> list[object]:
    """Flags that fit conf/demo.yaml to the tiny teacher and the noise corpus: 12 updates of 2 micro-batches."""
    flags = {
        "config": ROOT / "conf" / "demo.yaml",
        "teacher_ckpt": teacher_path,
        "teacher_layers": 4,
        "teacher_width": 24,
        "data.tsv_dir": tsv_dir,
        "data.seconds_per_batch": 5,
        "objective.layer_to_layer.layers": "[[0],[2,4]]",
        "pruning.warmup_steps": 6,
        "pruning.target_sparsity": 0.3,
        "optim.max_steps": 12,
        "optim.warmup_steps": 2,
        "final.max_steps": 6,
        "trainer.batches_per_update": 2,
        "trainer.log_every": 2,
        "trainer.validate_every": 4,
        "trainer.checkpoint_every": 3,
    }
    return [word for name, value in flags.items() for word in (f"--{name}", value)]


@pytest.fixture(scope="session")
def reference(server: Server, tiny_flags: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both steps, never interrupted: E, E/pruned.pth and E/final."""
    exp = tmp_path_factory.mktemp("reference") / "run"
    server.run("distill.py", *tiny_flags, "--exp_dir", exp)
    server.run("prune.py", "--distilled_ckpt", exp / "ckpts/last.ckpt")
    server.run("final_distill.py", *tiny_flags, "--student_ckpt", exp / "pruned.pth", "--exp_dir", exp / "final")
    return exp
