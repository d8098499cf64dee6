"""Damaged and hostile files made of good ones; every mutation is a function of a seeded generator."""

from __future__ import annotations

import io
import json
import random
import re
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import torch

from tests.released_students import importable

Mutation = Callable[[bytes, random.Random], bytes]

WORDS = [
    "0", "-1", "1", "7", "1e9", "10000000000", "99999999999999999999", "1e400", ".nan", "nan", "-.inf", "null", "true",
    "''", "[]", "{}", "[[[[]]]]", "x", "\t", "\n", "\r\n", "\0", "\u2028", "ä", "\udcff", "../../../etc/passwd",
    "/dev/zero",
    "!!python/object/apply:os.system ['true']", "&a [*a, *a]", "*a", "<<: *a", "? [", "- ", ": ", "#", "---",
    "%YAML 9.9",
    "base: demo.yaml", "[" * 5000, "{a: " * 5000, "a" * 100_000, "1_000", "0x10", "1:30", "2020-01-01", "=",
]  # fmt: skip
NUMBERS = [0, -1, 1, 2, 3, 7, 255, 65536, 10**6, 10**9, 2**31, 2**31 - 1, 2**32, 2**63, 2**63 - 1, -(2**63), 10**30]
VALUES: list[Any] = [
    None, True, "", "x", "a" * 10_000, float("nan"), float("inf"), -0.5, 1e308, [], {}, [[]], [None], (), [0] * 10_000,
    {"x": 1}, b"bytes", *NUMBERS,
]  # fmt: skip


def damage(data: bytes, rng: random.Random) -> bytes:
    """What disks, networks and editors do: bits flipped, bytes changed, pieces cut off, left out, doubled or moved."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5, 50))):
        at = rng.randrange(len(content) + 1) if rng.random() < 0.6 else min(len(content), rng.randrange(128))
        size = rng.choice((1, 2, 4, 16, 256, 5000))
        kind = rng.randrange(8)
        if kind == 0 and at < len(content):
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            content[at : at + size] = rng.randbytes(size)
        elif kind == 2:
            del content[at:]
        elif kind == 3:
            del content[at : at + size]
        elif kind == 4:
            content[at:at] = content[at : at + size]
        elif kind == 5:
            content[at:at] = rng.randbytes(size)
        elif kind == 6:
            number = rng.choice(NUMBERS) % 2**64
            content[at : at + 8] = struct.pack(rng.choice("<>") + "Q", number)
        else:
            content[at : at + size] = bytes([rng.choice((0, 255, 10, 128))]) * size
    return bytes(content)


def reword(data: bytes, rng: random.Random) -> bytes:
    """Text with words and numbers in the wrong places."""
    text = data.decode()
    for _ in range(rng.choice((1, 1, 2, 4))):
        spots = [match.span() for match in re.finditer(r"[\w.+-]+|[^\w\s]|\s+", text)] or [(0, 0)]
        begin, end = rng.choice(spots)
        if rng.random() < 0.3:
            other = rng.choice(spots)
            word = text[other[0] : other[1]]
        else:
            word = rng.choice(WORDS)
        text = text[:begin] + word + text[rng.choice((begin, end)) :]
    return text.encode("utf-8", "surrogateescape")


def rezip(data: bytes, rng: random.Random) -> bytes:
    """A torch file whose checksums fit although a part of it was changed."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    pickled = next(name for name in members if name.endswith("data.pkl"))
    for _ in range(rng.choice((1, 1, 2))):
        name = pickled if rng.random() < 0.7 else rng.choice(list(members))
        if rng.random() < 0.1:
            members.pop(name, None)
        elif name in members:
            members[name] = damage(members[name], rng)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", rng.choice((zipfile.ZIP_STORED,) * 4 + (zipfile.ZIP_DEFLATED,))) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def retorch(data: bytes, rng: random.Random) -> bytes:
    """A torch file that is whole, with values in it that make no sense."""
    buffer = io.BytesIO()
    with importable():
        content = torch.load(io.BytesIO(data), weights_only=False)
        for _ in range(rng.choice((1, 1, 2, 3))):
            content = _replace(content, rng)
        torch.save(content, buffer, _use_new_zipfile_serialization=rng.random() < 0.9)
    return buffer.getvalue()


def rejson(data: bytes, rng: random.Random) -> bytes:
    """A JSON file that is valid, with values in it that make no sense."""
    content = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        content = _replace(content, rng)
    return json.dumps(content, default=repr).encode()


def reheader(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose header is valid JSON that lies."""
    size = int.from_bytes(data[:8], "little")
    header = rejson(data[8 : 8 + size], rng)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def _replace(value: Any, rng: random.Random) -> Any:
    """The same tree with something else in place of one of its nodes."""
    keys: list[Any] = []
    if isinstance(value, dict | list | tuple):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    if not keys or rng.random() < 0.05:
        return _strange_tensor(value, rng) if isinstance(value, torch.Tensor) else rng.choice(VALUES)
    key = rng.choice(keys)
    if isinstance(value, dict):
        value = dict(value)
        kind = rng.randrange(10)
        if kind == 0:
            value.pop(key)
        elif kind == 1:
            value[rng.choice([*keys, "x", 0])] = value.pop(key)
        else:
            value[key] = _replace(value[key], rng)
        return value
    items = list(value)
    items[key] = _replace(items[key], rng)
    if rng.random() < 0.1:
        items = items * rng.choice((0, 2, 100))
    return tuple(items) if isinstance(value, tuple) else items


def _strange_tensor(tensor: torch.Tensor, rng: random.Random) -> Any:
    kind = rng.randrange(12)
    if kind == 0:
        return tensor.flatten()[: tensor.numel() // 2]
    if kind == 1:
        return tensor.to(rng.choice((torch.int64, torch.complex64, torch.bool, torch.float16, torch.float64)))
    if kind == 2:
        return torch.full_like(tensor, rng.choice((float("nan"), float("inf"), 1e38, 0)))
    if kind == 3:
        return torch.zeros(1).expand(2**40)
    if kind == 4:
        return torch.zeros(1).expand(tensor.shape)
    if kind == 5:
        return tensor[None]
    if kind == 6 and tensor.dim() == 2:
        return tensor.to_sparse()
    if kind == 7:
        return tensor.new_empty(0)
    if kind == 8:
        return torch.empty(tensor.shape, device="meta")
    if kind == 9 and tensor.dim() >= 2:
        return tensor.transpose(0, 1)
    if kind == 10:
        return torch.nn.Parameter(tensor.float())
    return rng.choice(VALUES)
