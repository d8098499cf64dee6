"""What libsndfile does not look at in the header of an audio file: sizes that are wrong or missing, and what is joined.

libsndfile cuts a promised size down to what the file holds without a word, estimates the length of an MP3 without a
Xing header and stops there, and reads the first of several joined streams alone. `inspect` says what a header promises,
and where it promises nothing, gives libsndfile another header, with which it reads to the end.
"""

import os
import re
import sys
from typing import Literal, NamedTuple

Order = Literal["little", "big"]


class ContainerError(ValueError):
    """The file cannot be read as a whole; the message says why, and names no file."""


class Container(NamedTuple):
    """What libsndfile is to open, and what the header says of the encoded audio."""

    source: "int | Reheaded"
    """The file descriptor, or a file-like object."""
    promised: int = 0
    """Bytes of audio that the header promises, 0 where it promises none."""
    held: int = 0
    """Bytes that the file holds from where the audio begins."""
    has_length: bool = True
    """Whether libsndfile can tell how many samples there are."""
    seekable: int = sys.maxsize
    """libsndfile seeks to the right place for samples up to this one."""


def cut_off(promised: int, held: int, unit: str) -> str:
    """What is said of a file that ends early."""
    return f"the header promises {promised} {unit}, the file holds {held}: cut off?"


class Reheaded:
    """A file, read only, whose first ``skip`` bytes are replaced by ``head``."""

    def __init__(self, descriptor: int, size: int, head: bytes, skip: int) -> None:
        self.descriptor, self.head, self.position = descriptor, head, 0
        self.shift = skip - len(head)
        self.size = size - self.shift

    def rewound(self) -> "Reheaded":
        """At its start again."""
        self.position = 0
        return self

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As of any file."""
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        return self.position

    def tell(self) -> int:
        """As of any file."""
        return self.position

    def read(self, count: int) -> bytes:
        """As of any file."""
        data = self.head[self.position : self.position + count]
        if len(data) < count:
            data += os.pread(self.descriptor, count - len(data), self.position + len(data) + self.shift)
        self.position += len(data)
        return data


def inspect(descriptor: int) -> Container:
    """Look at the header of an open file; the position in it stays.

    Raises:
        ContainerError: there are joined Ogg streams, or an Ogg or MP3 stream that is cut off.
        OSError: the file cannot be read.
    """
    head = os.pread(descriptor, 128, 0)
    size = os.fstat(descriptor).st_size
    if head[:4] == b"fLaC":
        return Container(descriptor)
    if head[:4] == b"OggS":
        return _inspect_ogg(descriptor, size)
    if head[:7] == b"NIST_1A":
        return _inspect_sphere(descriptor, size)
    if (found := _find_samples(descriptor, size, head)) is not None:
        return _inspect_sized(descriptor, size, head, found)
    if head[:3] == b"ID3" or head[:1] == b"\xff":
        return _inspect_mp3(descriptor, size)
    return Container(descriptor)


# WAV, RF64, AIFF, W64, CAF, AU: the size of the audio is a number in the header


class _Chunks(NamedTuple):
    """How a container divides a file into chunks of a name, a size and content."""

    first: int  # position of the first chunk
    order: Order
    name_bytes: int
    size_bytes: int
    counted: int  # bytes of name and size that the size includes
    alignment: int
    audio: bytes  # how the name of the chunk with the audio begins
    extra: int  # bytes of this chunk's content before the audio


_CHUNKS = {
    b"RIFF": _Chunks(12, "little", 4, 4, 0, 2, b"data", 0),
    b"RIFX": _Chunks(12, "big", 4, 4, 0, 2, b"data", 0),
    b"RF64": _Chunks(12, "little", 4, 4, 0, 2, b"data", 0),
    b"FORM": _Chunks(12, "big", 4, 4, 0, 2, b"SSND", 8),
    b"riff": _Chunks(40, "little", 16, 8, 24, 8, b"data", 0),
    b"caff": _Chunks(8, "big", 4, 8, 0, 1, b"data", 4),
}


class _Samples(NamedTuple):
    """The audio begins at ``start``; the ``width`` bytes at ``field`` give its size plus ``more``."""

    start: int
    field: int
    width: int
    order: Order
    more: int


def _find_samples(descriptor: int, size: int, head: bytes) -> _Samples | None:
    if head[:4] in (b".snd", b"dns."):
        order: Order = "big" if head[:4] == b".snd" else "little"
        return _Samples(int.from_bytes(head[4:8], order), 8, 4, order, 0)
    chunks = _CHUNKS.get(head[:4])
    if chunks is None:
        return None
    position, length = chunks.first, chunks.name_bytes + chunks.size_bytes
    while position + length <= size:
        entry = os.pread(descriptor, length, position)
        if entry.startswith(chunks.audio):
            field, start = position + chunks.name_bytes, position + length + chunks.extra
            if head[:4] == b"RF64" and entry[4:] == b"\xff\xff\xff\xff" and head[12:16] == b"ds64":
                return _Samples(start, 28, 8, "little", 0)
            return _Samples(start, field, chunks.size_bytes, chunks.order, chunks.counted + chunks.extra)
        content = int.from_bytes(entry[chunks.name_bytes :], chunks.order) - chunks.counted
        if content < 0:
            return None
        position += length + content + -content % chunks.alignment
    return None


def _inspect_sized(descriptor: int, size: int, head: bytes, samples: _Samples) -> Container:
    start, field, width, order, more = samples
    written = int.from_bytes(os.pread(descriptor, width, field), order)
    promised, held = written - more, max(size - start, 0)
    # Who writes to a pipe cannot know the size: the field stays 0, or says nearly the most that 31, 32 or 64 bits hold
    # (0xFFFFFFFF by ffmpeg; by sox 0x7FFFF000 in WAV, 0x7F000000 in AIFF).
    unknown = promised <= 0 or written % 2**31 >= 0x7F000000
    if promised == 0 and head[:4] in (b"RIFF", b"RIFX", b"FORM"):
        unknown = int.from_bytes(head[4:8], order) + 8 != size  # else there is no audio, and the file is complete
    if not unknown:
        return Container(descriptor, promised, held)
    new = bytearray(os.pread(descriptor, start, 0))
    new[field : field + width] = min(held + more, 2 ** (8 * width) - 1).to_bytes(width, order)
    return Container(Reheaded(descriptor, size, bytes(new), start))


def _inspect_sphere(descriptor: int, size: int) -> Container:
    head = os.pread(descriptor, 1024, 0)
    numbers = {key: int(value) for key, value in re.findall(rb"^(\w+) -\w+ (\d+)", head, re.MULTILINE)}
    try:
        start = int(head[8:16])
    except ValueError:
        return Container(descriptor)
    count = numbers.get(b"sample_count", 0) * numbers.get(b"channel_count", 1) * numbers.get(b"sample_n_bytes", 0)
    return Container(descriptor, count, max(size - start, 0))


# Ogg: pages


def _inspect_ogg(descriptor: int, size: int) -> Container:
    position, begun = 0, False
    granules = [0, 0]  # of the last two pages in which a packet ends
    is_vorbis = os.pread(descriptor, 7, 28) == b"\x01vorbis"
    while (page := os.pread(descriptor, 27 + 255, position))[:4] == b"OggS":
        segments = page[27 : 27 + page[26]] if len(page) >= 27 else b""
        end = position + 27 + len(segments) + sum(segments)
        if len(page) < 27 or len(segments) < page[26] or end > size:
            raise ContainerError("cut off in the middle of an Ogg page")
        is_first = page[5] & 2
        if is_first and begun:
            raise ContainerError(
                "several Ogg streams joined, of which only the first can be read: decode it with another program"
            )
        begun |= not is_first
        if (granule := int.from_bytes(page[6:14], "little")) < 2**63:
            granules = [granules[1], granule]
        position = end
    # libsndfile places what is in the last page by its end, as if no packet were cut short there.
    return Container(descriptor, seekable=granules[0] if is_vorbis else sys.maxsize)


# MP3: frames, of which the first can say how many there are


class _Frame(NamedTuple):
    position: int
    header: int
    length: int

    @property
    def kind(self) -> int:
        """Version, layer and sample rate, which all frames of a stream share."""
        return self.header & 0xFFFE0C00

    @property
    def tag(self) -> int:
        """Position of a Xing header, after the side information."""
        is_mpeg1, is_mono = self.header >> 19 & 3 == 3, self.header >> 6 & 3 == 3
        side = (17 if is_mono else 32) if is_mpeg1 else (9 if is_mono else 17)
        return 4 + side


_KBITS = {
    True: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    False: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_SEARCHED = 1 << 16  # bytes in which a first frame is looked for
_NO_CRC, _PADDED, _HIGHEST_RATE = 1 << 16, 1 << 9, 14 << 12
_ENDLESS = 2**31 - 1  # frames


def _inspect_mp3(descriptor: int, size: int) -> Container:
    first = _find_frame(descriptor, size, 0)
    if first is None:
        return Container(descriptor)
    for crc in (0, 2):
        tag = os.pread(descriptor, 16, first.position + first.tag + crc)
        if tag[:4] in (b"Xing", b"Info"):
            break
    else:
        return Container(_endless(descriptor, size, first, first.position), has_length=False)
    flags, frames, promised = (int.from_bytes(tag[i : i + 4], "big") for i in (4, 8, 12))
    after = first.position + first.length
    if flags & 3 != 3 or frames == 0 or promised == 0:
        return Container(_endless(descriptor, size, first, after), has_length=False)
    held = size - first.position
    if held < promised - first.length:  # not all writers count the frame that the header is in
        raise ContainerError(cut_off(promised, held, "bytes"))
    if (
        held > promised + first.length and _find_frame(descriptor, size, first.position + promised) is not None
    ):  # no mere tag
        return Container(_endless(descriptor, size, first, after), has_length=False)
    return Container(descriptor, seekable=0)  # a frame needs those before, further back than libsndfile goes


def _endless(descriptor: int, size: int, first: _Frame, start: int) -> Reheaded:
    """The frames from ``start`` on, behind a Xing header that promises more of them than there can be."""
    header = first.header & ~(15 << 12) & ~_PADDED | _HIGHEST_RATE | _NO_CRC
    frame = bytearray(_parse_frame(0, header).length)  # type: ignore[union-attr]
    frame[:4] = header.to_bytes(4, "big")
    frame[first.tag : first.tag + 12] = b"Xing" + (1).to_bytes(4, "big") + _ENDLESS.to_bytes(4, "big")
    return Reheaded(descriptor, size, bytes(frame), start)


def _parse_frame(position: int, header: int) -> _Frame | None:
    version, bitrate, rate = header >> 19 & 3, header >> 12 & 15, header >> 10 & 3
    is_layer_3 = header >> 17 & 3 == 1
    if header >> 21 != 0x7FF or version == 1 or not is_layer_3 or bitrate in (0, 15) or rate == 3:
        return None
    hertz = (44100, 48000, 32000)[rate] >> {3: 0, 2: 1, 0: 2}[version]  # MPEG 1, 2, 2.5
    kbits = _KBITS[version == 3][bitrate - 1]
    return _Frame(position, header, (144 if version == 3 else 72) * kbits * 1000 // hertz + (header >> 9 & 1))


def _find_frame(descriptor: int, size: int, start: int) -> _Frame | None:
    """The first frame after ``start`` that another follows, or the end of the file."""
    start = _skip_id3(descriptor, start)
    block = os.pread(descriptor, _SEARCHED, start)
    if block[:4] in (b"fLaC", b"OggS", *_CHUNKS):
        return None
    at = block.find(b"\xff")
    while at >= 0:
        frame = _parse_frame(start + at, int.from_bytes(block[at : at + 4], "big"))
        if frame is not None:
            end = frame.position + frame.length
            following = _parse_frame(end, int.from_bytes(os.pread(descriptor, 4, end), "big"))
            if end >= size or (following is not None and following.kind == frame.kind):
                return frame
        at = block.find(b"\xff", at + 1)
    return None


def _skip_id3(descriptor: int, position: int) -> int:
    while (tag := os.pread(descriptor, 10, position))[:3] == b"ID3" and len(tag) == 10:
        length = sum((byte & 0x7F) << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0)))
        position += 10 + length + (10 if tag[5] & 0x10 else 0)  # a footer repeats the header
    return position
