"""What one layer knows: a linear classifier per frame on fixed features."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.minisuperb.labels import IGNORE


def linear_probe(
    train: Tensor, labels: Tensor, test: Tensor, num_classes: int, steps: int = 800, seed: int = 0
) -> Tensor:
    """Fit a linear classifier on ``train`` [N, D] and ``labels`` [N]; return its classes for ``test`` [M, D]: [M].

    Features are standardised with the mean and deviation of ``train``; frames labelled ``IGNORE`` are left out.
    AdamW on random batches of 2,048 frames with a one-cycle learning rate: the same cost for every layer and model.
    """
    generator = torch.Generator().manual_seed(seed)
    known = labels != IGNORE
    train, labels = train[known].float(), labels[known]
    mean, deviation = train.mean(0), train.std(0) + 1e-4
    train = (train - mean) / deviation
    classifier = nn.Linear(train.shape[1], num_classes)
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    optimizer = torch.optim.AdamW(classifier.parameters(), 5e-3, weight_decay=1e-4, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, steps)
    for _ in range(steps):
        batch = torch.randint(len(train), (2048,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(classifier(train[batch]), labels[batch]).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return torch.cat([classifier((part.float() - mean) / deviation).argmax(1) for part in test.split(8192)])


def accuracy(predicted: Tensor, labels: Tensor, without: int = IGNORE) -> float:
    """Per cent of the frames predicted right, of those labelled neither ``IGNORE`` nor ``without``."""
    known = (labels != IGNORE) & (labels != without)
    return 100 * (predicted == labels)[known].float().mean().item()
