"""What a measured time depends on besides what is timed."""

import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch


def conditions(**settings: Any) -> dict[str, Any]:
    """For the first line of a `distillation.journal.Journal`: times of two machines never end in one table.

    Args:
        settings: of the measurement, in plain JSON types.

    Returns:
        These, the machine, the versions and the threads of torch at this moment.
    """
    return {
        "cores": os.cpu_count(),
        "cpu": _cpu(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "threads": torch.get_num_threads(),
        **settings,
    }


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
