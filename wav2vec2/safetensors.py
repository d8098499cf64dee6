"""The safetensors format, read and written without its package: 8 bytes of length, a JSON header, raw values.

Format: https://huggingface.co/docs/safetensors/index#format. Little-endian machines only, as torch's wheels are.
"""

import ctypes
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

MAX_HEADER_BYTES = 100_000_000  # as the format's own library refuses longer ones
MAX_DIMS = 16
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INTEGERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
            "BOOL": torch.bool}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_safetensors(path: Path, integers: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Floating-point tensors by name, on the CPU, and the metadata.

    Memory is bounded by the size of the file.

    Args:
        path: the file.
        integers: read tensors of whole numbers too, which other models keep beside their weights.

    Raises:
        ValueError: not such a file, truncated, or with tensors of another type; one line without the file's name.
    """
    size, dtypes = path.stat().st_size, DTYPES | (INTEGERS if integers else {})
    with path.open("rb") as file:
        header, start = _read_header(file, size)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata is not a table of strings")
        tensors, end = {}, 0
        for name, entry in sorted(header.items(), key=lambda item: _offsets(*item)):
            dtype, shape, (begin, stop) = _check_entry(name, entry, dtypes)
            if begin != end or start + stop > size:
                raise ValueError(f"truncated, or {name} overlaps or leaves a hole")
            values = bytearray(stop - begin)
            file.seek(start + begin)
            if file.readinto(values) != len(values):
                raise ValueError("truncated")
            tensors[name] = (
                torch.frombuffer(values, dtype=dtype).view(shape) if values else torch.empty(shape).to(dtype)
            )
            end = stop
    if start + end != size:
        raise ValueError(f"{size - start - end} bytes more than its header lists")
    return tensors, metadata


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write floating-point tensors, on whichever device, and a table of strings."""
    with path.open("wb") as file:
        file.write(make_header({name: (t.dtype, list(t.shape)) for name, t in tensors.items()}, metadata))
        for tensor in tensors.values():
            values = tensor.detach().cpu().contiguous()
            file.write(ctypes.string_at(values.data_ptr(), values.nbytes))  # torch's own way needs numpy


def make_header(entries: Mapping[str, tuple[torch.dtype, list[int]]], metadata: Mapping[str, str]) -> bytes:
    """What a file starts with, for tensors of these types and shapes whose values follow in this order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in entries.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # values start at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text


def _read_header(file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """The header, and the byte at which the values start."""
    num_bytes = int.from_bytes(file.read(8), "little")
    if size < 8 or num_bytes > min(size - 8, MAX_HEADER_BYTES):
        raise ValueError("truncated or not a safetensors file")
    try:
        header = json.loads(file.read(num_bytes).decode())
    except (ValueError, RecursionError):
        raise ValueError("not a safetensors file: its header is no JSON") from None
    if not isinstance(header, dict):
        raise ValueError("not a safetensors file: its header is no table")
    return header, 8 + num_bytes


def _offsets(name: str, entry: Any) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(offset) is int for offset in offsets):
        raise ValueError(f"the header's entry of {name} has no two offsets")
    return offsets[0], offsets[1]


def _check_entry(
    name: str, entry: dict[str, Any], dtypes: Mapping[str, torch.dtype]
) -> tuple[torch.dtype, list[int], tuple[int, int]]:
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), _offsets(name, entry)
    if not isinstance(dtype, str) or dtype not in dtypes:
        raise ValueError(f"{name} is of type {dtype}; only {', '.join(dtypes)} are read")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"{name} has no valid shape")
    if math.prod(shape) * dtypes[dtype].itemsize != offsets[1] - offsets[0]:
        raise ValueError(f"{name} has other bytes than its shape {shape} needs")
    return dtypes[dtype], shape, offsets
