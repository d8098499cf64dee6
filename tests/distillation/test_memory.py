"""What is suggested when a GPU runs out of memory, with the memory of one that is made up."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distillation import memory
from distillation.config import TrainerConfig
from distillation.data import DataConfig

GIB = 2**20  # small ones, for weights that really exist


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
