"""What fits on a GPU, before and after it runs out of memory, with the memory of one that is made up."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distillation.config import TrainerConfig
from distillation.data.config import DataConfig
from distillation.errors import UserError
from distillation.training import memory

GIB = 2**20  # small ones, for weights that really exist


@pytest.fixture(autouse=True)
def _nothing_to_collect(monkeypatch) -> None:
    """There is no GPU whose memory would be freed, and a worker of pytest has many objects to look at."""
    monkeypatch.setattr(memory.gc, "collect", lambda: 0)


class Gpu:
    """80 GiB, of which 4 are weights; a second of audio takes 0.5, and a kernel fails above what is free."""

    def __init__(self, free: float = 76.0, per_second: float = 0.5) -> None:
        self.free, self.per_second = free, per_second

    def install(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(torch.cuda, "empty_cache", lambda: None)
        patch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
        patch.setattr(torch.cuda, "memory_allocated", lambda: 4 * GIB)
        peak = 4 + self.per_second * memory.PROBE_SECONDS
        patch.setattr(torch.cuda, "max_memory_allocated", lambda: int(peak * GIB))
        patch.setattr(torch.cuda, "mem_get_info", lambda: (int(self.free * GIB), 80 * GIB))


@pytest.fixture
def module() -> nn.Module:
    return nn.Linear(1, 1)


def ask(module: nn.Module, data: DataConfig, fails: bool = False) -> str:
    def loss(waveforms: torch.Tensor) -> torch.Tensor:
        assert waveforms.shape == (1, memory.PROBE_SECONDS * data.sample_rate)
        if fails:
            raise torch.OutOfMemoryError
        return module(waveforms.mean().view(1, 1)).sum()

    error = torch.OutOfMemoryError("CUDA out of memory")
    return memory.advice(error, module, loss, data, TrainerConfig(batches_per_update=4), has_optimizer_state=True)


def test_smaller_batches_for_the_same_update(module, monkeypatch):
    Gpu().install(monkeypatch)  # 0.9 * 76 / 0.5 = 136.8 s
    message = ask(module, DataConfig(seconds_per_batch=320.0))
    assert "about 137 s fit" in message
    assert "--data.seconds_per_batch 106.7 and --trainer.batches_per_update 12" in message
    # they do not fit in principle but did not fit in fact: at least half
    assert "--data.seconds_per_batch 50 and --trainer.batches_per_update 8" in ask(
        module, DataConfig(seconds_per_batch=100.0)
    )
    message = ask(module, DataConfig(utterances_per_batch=18))  # of up to 15.625 s: 281 s
    assert "--data.utterances_per_batch 6 and --trainer.batches_per_update 12" in message


def test_not_even_one_utterance(module, monkeypatch):
    Gpu(free=4.0).install(monkeypatch)
    message = ask(module, DataConfig())
    assert "about 7 s fit, and utterances are up to 15.625 s long: lower --data.max_frames" in message
    message = ask(module, DataConfig(), fails=True)
    assert message.startswith("out of GPU memory, and utterances") and "\n" not in message


def test_room_for_gradients_and_optimizer(monkeypatch):
    module = nn.Linear(1, GIB // 8)  # 1 of weights and biases
    Gpu(free=10.0).install(monkeypatch)
    loss = module.bias.sum
    later = memory.seconds_that_fit(module, lambda waveforms: loss(), 16000, has_optimizer_state=True)
    first = memory.seconds_that_fit(module, lambda waveforms: loss(), 16000, has_optimizer_state=False)
    assert (later, first) == pytest.approx(((9 - 1) / 0.5, (9 - 3) / 0.5))


class Limited:
    """Training steps on a card that holds so many seconds of 16 kHz audio."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.tried = seconds, []

    def __call__(self, waveforms: torch.Tensor) -> None:
        self.tried.append(len(waveforms))
        if waveforms.numel() / 16000 > self.seconds:
            raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(("room", "utterances"), [(16, 1), (40, 2), (47, 3), (200, 12), (10_000, 40)])
def test_search_finds_the_most_utterances(room, utterances, monkeypatch):
    monkeypatch.setattr(torch, "randn", lambda count, frames, device: torch.zeros(1, 1).expand(count, frames))
    step, data = Limited(room), DataConfig()  # of up to 15.625 s
    seconds = memory.search(step, data, 640.0, torch.device("cpu"))
    assert seconds == max(15.625, 0.9 * utterances * 15.625)
    assert len(step.tried) <= 12


def test_cudnn_out_of_memory_is_out_of_memory_and_a_bug_is_none():
    def step(message: str) -> None:
        raise RuntimeError(message)

    assert not memory.runs_in_memory(lambda: step("GET was unable to find an engine to execute this computation"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        memory.runs_in_memory(lambda: step("shapes differ"))


def test_probes_are_padded_where_batches_are():
    waveforms = torch.randn(3, 800)
    assert memory.probe_lengths(waveforms, DataConfig(crop=True)) is None
    assert memory.probe_lengths(waveforms, DataConfig(crop=False)).tolist() == [800, 800, 700]


def test_search_without_room_for_one():
    with pytest.raises(UserError, match=r"not even one utterance of 15\.625 s fits: lower --data\.max_frames"):
        memory.search(Limited(15), DataConfig(), 640.0, torch.device("cpu"))


@pytest.mark.parametrize(
    ("data", "count", "world_size", "seconds", "expected"),
    [
        (DataConfig(), 4, 1, 700.0, ("seconds_per_batch", 640.0, 1)),
        (DataConfig(), 4, 1, 300.0, ("seconds_per_batch", 640 / 3, 3)),
        (DataConfig(), 4, 2, 300.0, ("seconds_per_batch", 160.0, 4)),
        (DataConfig(), 4, 4, 300.0, ("seconds_per_batch", 160.0, 4)),
        (DataConfig(), 4, 4, 100.0, ("seconds_per_batch", 80.0, 8)),
        (DataConfig(utterances_per_batch=6), 4, 1, 200.0, ("utterances_per_batch", 12, 2)),
        (DataConfig(utterances_per_batch=6), 4, 1, 100.0, ("utterances_per_batch", 6, 4)),
        (DataConfig(utterances_per_batch=6), 4, 2, 80.0, ("utterances_per_batch", 4, 6)),
    ],
)
def test_the_update_stays_the_same(data, count, world_size, seconds, expected):
    found = memory.same_update(data, TrainerConfig(batches_per_update=count), world_size, seconds)
    assert found == pytest.approx(expected)
    assert found[2] % world_size == 0


@pytest.mark.parametrize("data", [DataConfig(), DataConfig(utterances_per_batch=7)])
def test_an_update_that_cannot_be_cut(data):
    with pytest.raises(UserError, match="cannot be cut into equal micro-batches"):
        memory.same_update(data, TrainerConfig(batches_per_update=1), 64, 16.0)
