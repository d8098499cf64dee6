"""What a model knows: a linear classifier on its frozen layers, as SUPERB's probes.

Shapes: N examples, K layers, D channels, C classes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

from demo.labels import IGNORE


class LayerWeightedClassifier(nn.Module):
    """A weighted sum of K standardised layers, then multinomial logistic regression."""

    def __init__(self, mean: Tensor, deviation: Tensor, num_classes: int) -> None:
        super().__init__()
        self.mean, self.scale = mean, 1 / deviation  # [K, D]
        self.layers = nn.Parameter(torch.zeros(len(mean)))
        self.classifier = nn.Linear(mean.shape[1], num_classes)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Features [N, K, D] to scores [N, C]."""
        x = (x.float() - self.mean) * self.scale
        return self.classifier(
            torch.einsum("bkd,k->bd", x, self.layers.softmax(0)) if len(self.layers) > 1 else x[:, 0]
        )

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Features [N, K, D] to classes [N]."""
        return torch.cat([self(part).argmax(1) for part in x.split(4096)])


def linear_probe(
    train: Tensor,
    labels: Tensor,
    test: Tensor,
    num_classes: int,
    *,
    steps: int = 800,
    seed: int = 0,
    strengths: tuple[float, ...] = (1e-4,),
    choose: Tensor | None = None,
) -> Tensor:
    """Fit a linear classifier and return its classes for ``test``: [M].

    AdamW on random batches of 2,048 examples with a one-cycle learning rate: the same cost for every layer and model.

    Args:
        train: [N, D], or [N, K, D] for a learnt weighted sum of K layers; standardised inside.
        labels: int64 [N]; examples labelled ``IGNORE`` are left out.
        test: [M, D] or [M, K, D].
        num_classes: C.
        steps: updates.
        seed: of the batches.
        strengths: of the regularisation (decoupled weight decay); all are fitted on the same batches.
        choose: bool [N], the examples that choose the strength instead of being fitted; needed for several strengths.
    """
    if train.dim() == 2:
        train, test = train[:, None], test[:, None]
    known = labels != IGNORE
    fitted = torch.nonzero(known if choose is None else known & ~choose)[:, 0]
    layers = [train[:, k][fitted].float() for k in range(train.shape[1])]
    mean = torch.stack([x.mean(0) for x in layers])
    deviation = torch.stack([x.std(0) for x in layers]) + 1e-4
    del layers
    candidates = [LayerWeightedClassifier(mean, deviation, num_classes) for _ in strengths]
    groups, peaks = [], []
    for candidate, strength in zip(candidates, strengths, strict=True):
        groups.append({"params": candidate.classifier.parameters(), "weight_decay": strength})
        peaks.append(1e-2)
        if train.shape[1] > 1:
            groups.append({"params": [candidate.layers], "weight_decay": 0.0})
            peaks.append(5e-2)  # a softmax of few numbers moves slowly
    optimizer = torch.optim.AdamW(groups, 5e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in trange(steps, desc="probe", unit="step", leave=False, delay=1):
        batch = fitted[torch.randint(len(fitted), (2048,), generator=generator)]
        x, y = train[batch], labels[batch]
        optimizer.zero_grad()
        torch.stack([F.cross_entropy(candidate(x), y) for candidate in candidates]).sum().backward()
        optimizer.step()
        schedule.step()
    best = candidates[0]
    if len(candidates) > 1:
        assert choose is not None
        held = known & choose
        best = max(candidates, key=lambda candidate: accuracy(candidate.predict(train[held]), labels[held]))
    return best.predict(test)


def accuracy(predicted: Tensor, labels: Tensor, without: int = IGNORE) -> float:
    """Per cent of the frames predicted right, of those labelled neither ``IGNORE`` nor ``without``."""
    known = (labels != IGNORE) & (labels != without)
    return 100 * (predicted == labels)[known].float().mean().item()
