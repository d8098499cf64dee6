"""What a model takes from a whole waveform, streamed: its mean and variance, and those of the first layer's norm.

Where a piece of long audio is run with the statistics of the whole, its convolutions give what they give in the whole.

Shapes: B waveforms, K kernel size of the first convolution.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


class Moments:
    """Mean [D] and covariance [D, D] of vectors that come in blocks, in float64 (Chan et al., 1983, eq. 2.1)."""

    def __init__(self, size: int) -> None:
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64)
        self._scatter = torch.zeros(size, size, dtype=torch.float64)

    def add(self, vectors: Tensor) -> None:
        """[n, D]."""
        num = len(vectors)
        if num == 0:
            return
        vectors = vectors.double()
        mean = vectors.mean(0)
        centered, change = vectors - mean, mean - self.mean
        total = self.count + num
        self._scatter += centered.t() @ centered + torch.outer(change, change) * (self.count * num / total)
        self.mean += change * (num / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """Divided by the number of vectors."""
        return self._scatter / max(self.count, 1)


@dataclass(frozen=True)
class Statistics:
    """Of whole waveforms, in float64 (but on MPS, which has none)."""

    mean: Tensor  # [B]
    variance: Tensor  # [B]
    window_mean: Tensor  # [B, K], of the stretches of K samples that the first convolution sees
    window_covariance: Tensor  # [B, K, K]

    def normalized(self, eps: float) -> "Statistics":
        """Of the same waveforms after ``normalize``."""
        scale = torch.rsqrt(self.variance + eps)
        return Statistics(
            torch.zeros_like(self.mean),
            self.variance * scale.square(),
            (self.window_mean - self.mean[:, None]) * scale[:, None],
            self.window_covariance * scale.square()[:, None, None],
        )

    def to(self, device: torch.device) -> "Statistics":
        """On another device."""
        dtype = torch.float32 if device.type == "mps" else torch.float64
        return Statistics(*(tensor.to(dtype).to(device) for tensor in vars(self).values()))


class StatisticsStream:
    """Collects the :class:`Statistics` of one waveform that comes in blocks of any length."""

    def __init__(self, kernel_size: int, stride: int) -> None:
        self.kernel_size, self.stride = kernel_size, stride
        self._samples, self._windows = Moments(1), Moments(kernel_size)
        self._rest = torch.empty(0)  # from the first sample of the next window on
        self._skip = 0  # samples before that one, where windows do not touch

    def add(self, samples: Tensor) -> None:
        """The next samples [n]."""
        self._samples.add(samples[:, None])
        rest = torch.cat([self._rest, samples])
        skipped = min(self._skip, len(rest))
        rest, self._skip = rest[skipped:], self._skip - skipped
        if len(rest) >= self.kernel_size:
            windows = rest.unfold(0, self.kernel_size, self.stride)
            self._windows.add(windows)
            step = len(windows) * self.stride
            self._skip = max(step - len(rest), 0)
            rest = rest[step:]
        self._rest = rest

    def result(self) -> Statistics:
        """Of what came so far, B = 1."""
        samples, windows = self._samples, self._windows
        return Statistics(samples.mean, samples.covariance[0], windows.mean[None], windows.covariance[None])
