"""Audio that libsndfile does not read, decoded by the program ffmpeg."""

import contextlib
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from distillation.data.audio import CHECK_BLOCK, AudioError
from distillation.errors import UserError

# Formats that libsndfile cannot read, or not to their end (MP2), and ffmpeg can.
FFMPEG_SUFFIXES = frozenset((
    ".m4a", ".m4b", ".mp4", ".m4v", ".mov", ".aac", ".3gp", ".3g2", ".wma", ".asf", ".webm", ".mka", ".mkv", ".amr",
    ".ape", ".wv", ".tta", ".tak", ".mpc", ".spx", ".ac3", ".eac3", ".dts", ".mp2", ".ra", ".rm", ".dsf", ".avi",
    ".flv",
))  # fmt: skip
# Of the AU format: magic, where the samples begin, their bytes, encoding, rate, channels; and the encoding float32.
AU_HEADER, AU_FLOAT = struct.Struct(">4s5I"), 6


@contextlib.contextmanager
def ffmpeg_decode(path: Path) -> Iterator[tuple[int, Iterator[np.ndarray]]]:
    """The first sound track of a file, decoded by the program ffmpeg: rate, and float32 blocks ``[n, C]`` to its end.

    Raises:
        AudioError: ffmpeg cannot decode all of it. Raised by the blocks too.
        UserError: a signal ended ffmpeg.
    """
    words = ["ffmpeg", "-nostdin", "-v", "error", "-i", f"file:{path}", "-map", "0:a:0"]
    words += ["-c:a", "pcm_f32be", "-f", "au", "pipe:1"]
    with (
        tempfile.TemporaryFile() as complaints,
        # A session of its own: Ctrl-C is for this process, which then ends ffmpeg.
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=complaints, start_new_session=True) as process,
    ):
        pipe = process.stdout
        assert pipe is not None

        def finish() -> None:
            """Ffmpeg goes on after an error and ends with code 0: what it says tells."""
            code = process.wait()
            if code < 0:
                raise UserError(f"{path}: a signal ended ffmpeg (exit code {code}): run again")
            complaints.seek(0)
            said = complaints.read().decode("utf-8", "replace").strip()
            if code or said:
                first = said.split("\n")[0].rpartition("] ")[2]
                raise AudioError(path, f"ffmpeg: {first or f'exit code {code}'}")

        def blocks(num_channels: int) -> Iterator[np.ndarray]:
            size = 4 * num_channels
            while data := pipe.read(size * (CHECK_BLOCK // num_channels)):
                whole = len(data) // size * size
                yield np.frombuffer(data[:whole], ">f4").reshape(-1, num_channels).astype(np.float32)
            finish()

        try:
            head = pipe.read(AU_HEADER.size)
            if len(head) < AU_HEADER.size:
                finish()
                raise AudioError(path, "ffmpeg gives no audio")
            magic, begin, _, encoding, rate, num_channels = AU_HEADER.unpack(head)
            assert (magic, encoding) == (b".snd", AU_FLOAT), head
            pipe.read(begin - AU_HEADER.size)
            yield rate, blocks(num_channels)
        finally:
            process.kill()
