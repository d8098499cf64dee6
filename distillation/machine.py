"""What the machine at hand is good for: where to train, and in which precision."""

import functools
import logging
import re
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

CPUINFO = Path("/proc/cpuinfo")
BF16_UNITS = {"amx_bf16", "avx512_bf16", "bf16"}  # Intel's matrix and vector units (AMD has the latter), ARM's


def find_accelerator() -> str:
    """ "gpu" where one is visible, else "cpu"."""
    return "gpu" if torch.cuda.device_count() else "cpu"


def has_bf16_units() -> bool:
    """Whether the processor computes in bfloat16 itself. Others emulate it: a training step then takes 2.5 to 3 times
    as long as in float32 (Intel Xeon with AVX-512 alone)."""
    try:
        text = CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return flags is not None and not BF16_UNITS.isdisjoint(flags[1].split())


@functools.cache  # said once
def find_precision(accelerator: str) -> str:
    """The fastest precision of the training step, as Lightning names it; a line in the log says which and why.

    Args:
        accelerator: "gpu" or "cpu".
    """
    if accelerator == "cpu":
        has_units = has_bf16_units()
        found = "bf16-mixed" if has_units else "32-true"
        reason = f"this processor has {'' if has_units else 'no '}units for bfloat16"
    elif torch.cuda.device_count() and not torch.cuda.is_bf16_supported(including_emulation=False):
        found, reason = "16-mixed", f"{torch.cuda.get_device_name()} has no bfloat16"
    else:
        found, reason = "bf16-mixed", "GPUs since Ampere have bfloat16"
    logger.info("precision: %s, since %s (--trainer.precision for another)", found, reason)
    return found
