"""Waveforms of any rate at another, by a windowed sinc, on the CPU or a GPU.

Output sample n lies at t = n * from / to input samples and is sum_i x[i] h(i - t), where h is the ideal low-pass filter
under a Kaiser window: h(t) = 2 f sinc(2 f t) I0(beta sqrt(1 - (t / w)^2)) / I0(beta) for |t| < w. Its cutoff f lies
midway between pass band and stop band, relative to the lower of the two rates; beta and w follow from the attenuation
and the width of the transition (Kaiser 1974; Oppenheim and Schafer, Discrete-Time Signal Processing, section 7.5.3).
Interpolating between samples with such a filter: Smith, https://ccrma.stanford.edu/~jos/resample/.

Only ``to / gcd`` positions between two input samples occur (phases), and each comes back every ``from / gcd`` input
samples: the outputs of a few phases that follow each other are one matrix product over all their recurrences.

Shapes: N input samples, M output samples, P phases in a product, W input samples that they see, R recurrences.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .feature_extractor import SAMPLE_RATE
from .inputs import check_index

PASS_BAND = 0.9125  # of the lower Nyquist frequency, above which the stop band begins; as soxr's HQ
ATTENUATION = 120.0  # dB in the stop band; 16-bit audio has a noise floor of -98
LOWEST_RATE, HIGHEST_RATE = 1_000, 768_000  # Hz, of telephones' low bands to recorders of bats
PHASES = 160  # at most in one product: enough for a fast one, few enough that W is mostly filter; all of 44.1 kHz
BLOCK = 1 << 22  # elements R * W of one product


def check_rate(rate: int) -> int:
    """A sample rate in Hz.

    Raises:
        ValueError: no whole number, or one that no recording has.
    """
    hertz = f"must be in Hz, from {LOWEST_RATE} to {HIGHEST_RATE}, such as 44100"
    return check_index("sample_rate", rate, LOWEST_RATE, HIGHEST_RATE, hertz)


def resampled_length(num_samples: int, rate: int, to: int = SAMPLE_RATE) -> int:
    """Samples at ``to`` Hz that so many at ``rate`` Hz become: rounded, a half up."""
    return (2 * num_samples * to + rate) // (2 * rate)


def resample(waveform: Tensor, rate: int, to: int = SAMPLE_RATE) -> Tensor:
    """A waveform at another rate; zeros lie before and after it.

    Args:
        waveform: [N] at ``rate`` Hz, float; computed in float32 or, if it is float64, in that.
        rate: in Hz.
        to: in Hz.

    Returns:
        [M] at ``to`` Hz, in the type and on the device of ``waveform``; M is `resampled_length`.

    Raises:
        ValueError: a rate that is none.
    """
    divisor = math.gcd(check_rate(rate), check_rate(to))
    down, up = rate // divisor, to // divisor
    if down == up:
        return waveform
    several = max(PHASES // up, 1)  # few phases are taken several times: one product gives more
    down, up = down * several, up * several
    num_samples = resampled_length(len(waveform), rate, to)
    output = waveform.new_empty(-(-num_samples // up), up)  # [R, all phases]
    with torch.autocast(waveform.device.type, enabled=False):
        for first in range(0, min(up, num_samples), PHASES):
            part = output[:, first : first + PHASES]
            start, kernels = make_kernels(range(first, first + part.shape[1]), down, up)
            kernels = kernels.to(torch.promote_types(waveform.dtype, torch.float32)).to(waveform.device)
            rows = max(BLOCK // len(kernels), 1)
            for row in range(0, len(part), rows):
                block = part[row : row + rows]
                begin = start + row * down
                piece = padded_slice(waveform, begin, begin + (len(block) - 1) * down + len(kernels))
                block.copy_(piece.to(kernels.dtype).unfold(0, len(kernels), down) @ kernels)
    return output.flatten()[:num_samples]


def padded_slice(waveform: Tensor, begin: int, end: int) -> Tensor:
    """Samples [begin, end) of [N], zeros where there are none."""
    num_samples = len(waveform)
    before, after = min(max(-begin, 0), end - begin), min(max(end - num_samples, 0), end - begin)
    return F.pad(waveform[max(begin, 0) : max(end, 0)], (before, after))


@functools.lru_cache(maxsize=4)  # a list of short files has one rate
def make_kernels(phases: range, down: int, up: int) -> tuple[int, Tensor]:
    """The filter at the positions of some phases.

    Args:
        phases: which of the ``up``.
        down: input samples in which all phases occur once.
        up: phases.

    Returns:
        The first input sample that they see, for the first recurrence, and float64 [W, P].
    """
    band = min(1.0, up / down)  # the lower Nyquist frequency, relative to that of the input
    transition = math.pi * band * (1 - PASS_BAND)  # radians per input sample
    half_width = (ATTENUATION - 8) / (2.285 * transition) / 2
    beta = 0.1102 * (ATTENUATION - 8.7)
    cutoff = band * (1 + PASS_BAND) / 2  # 2 f
    start = math.floor(phases[0] * down / up - half_width) + 1
    end = math.ceil(phases[-1] * down / up + half_width)
    position = torch.tensor(phases, dtype=torch.float64) * down / up
    time = torch.arange(start, end, dtype=torch.float64)[:, None] - position
    window = torch.special.i0(beta * (1 - (time / half_width).square()).clamp(min=0).sqrt())
    window = window / torch.special.i0(torch.tensor(beta, dtype=torch.float64))
    kernels = cutoff * torch.sinc(cutoff * time) * window
    return start, kernels.where(time.abs() < half_width, 0.0)
