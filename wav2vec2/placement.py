"""The device and number type that a model is loaded to."""

import torch

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # what every layer runs in


def check_placement(device: str | int | torch.device, dtype: torch.dtype) -> torch.device:
    """The device, after a number of that type has been there and back.

    Raises:
        ValueError: no such device on this machine or in this build of torch, or not a type that models run in.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype!r}")
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device {device!r}: no such device; give cpu, cuda, cuda:0, mps or the like") from None
    if place.type == "meta":
        raise ValueError(f"device {device!r}: holds no values, so nothing can be loaded to it")
    try:
        torch.zeros(1, device=place, dtype=dtype).item()
    except torch.OutOfMemoryError:  # the device is there
        raise
    except (NotImplementedError, ImportError, AssertionError):
        raise ValueError(f"device {device!r}: this build of torch does not run on it") from None
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device {device!r} with {dtype}: {str(error).splitlines()[0]}") from None
    return place
