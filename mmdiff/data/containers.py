"""What the outer structure of a file says before anything is decoded: whether all of it is there.

A file that was cut off is refused here: decoders give what is left without a word.
Sources: ISO 14496-12 (boxes), RFC 8794 (EBML), RFC 3533 (Ogg), the RIFF and RF64 specifications.
"""

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from mmdiff.data.media import DamagedError, NotMediaError, UnreachableError

_SEGMENT = b"\x18\x53\x80\x67"  # of Matroska
OGG_PAGE = 65307  # bytes at most
_STREAMED = (0, 0xFFFFFFFF, 0x7FFFFFFF, 0xFFFFFFFF - 36, 0x7FFFFFFF - 36)  # written where the length was not known


@contextmanager
def opened(source: str | bytes | BinaryIO, name: str) -> Iterator[BinaryIO]:
    """The source as a binary file at its start; closed at the end if it was opened here.

    Raises UnreachableError for a path that cannot be opened, NotMediaError for an empty file.
    """
    file: BinaryIO
    if isinstance(source, str):
        try:
            source.encode()  # neither libsndfile nor FFmpeg opens other names
            if stat.S_ISFIFO(os.stat(source).st_mode):
                raise OSError("it is a pipe, which would be waited for")
            file = open(source, "rb")
        except (OSError, ValueError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or error
            raise UnreachableError(f"{name}: cannot be read, {reason}; check the path and its permissions") from error
    else:
        file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        if size_of(file) == 0:
            raise NotMediaError(f"{name}: cannot be read, the file is empty; leave it out or fetch it again")
        file.seek(0)
        yield file
    finally:
        if file is not source:
            file.close()


def size_of(file: BinaryIO) -> int:
    """Bytes."""
    return file.seek(0, os.SEEK_END)


def check_whole(file: BinaryIO, name: str) -> None:
    """Raises DamagedError when a RIFF, ISO (mp4, mov), Matroska or Ogg file ends before its structure does."""
    size = size_of(file)
    file.seek(0)
    head = file.read(16)
    if head[:4] in (b"RIFF", b"RF64") and head[8:12] == b"WAVE":
        end = _riff_end(file, size)
    elif head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        end = max((start + length for _, start, length in boxes(file, 0, size)), default=0)
    elif head[:4] == b"\x1a\x45\xdf\xa3":
        end = _segment_end(file)
    elif head[:4] == b"OggS":
        end = _last_page_end(file, size)
    else:
        return
    if end > size:
        raise DamagedError(f"{name}: cannot be read, it is cut off: {size} of {end} bytes are there; fetch it again")


def boxes(file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(kind, place, length in bytes) of each ISO box that begins between `start` and `end`; the last may be longer."""
    while start + 8 <= end:
        file.seek(start)
        head = file.read(16)
        length, kind = int.from_bytes(head[:4], "big"), head[4:8]
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        if length == 0:  # to the end of the file
            length = end - start
        if length < 8 or not kind.isascii():
            return  # rubbish after the last box
        yield kind, start, length
        start += length


def _riff_end(file: BinaryIO, size: int) -> int:
    """Where the sound of a wav ends, by its header."""
    place = 12
    long_size = 0
    while place + 8 <= size:
        file.seek(place)
        head = file.read(24)
        length = int.from_bytes(head[4:8], "little")
        if head[:4] == b"ds64":
            long_size = int.from_bytes(head[16:24], "little")
        if head[:4] == b"data":
            if length == 0xFFFFFFFF and long_size:
                return place + 8 + long_size
            return size if length in _STREAMED else place + 8 + length
        place += 8 + length + length % 2
    return size


def _segment_end(file: BinaryIO) -> int:
    """Where the segment of a Matroska file ends; 0 where it was streamed and does not say."""
    file.seek(0)
    head = file.read(4096)
    place = head.find(_SEGMENT)
    if place < 0 or place + 12 > len(head):
        return 0
    first = head[place + 4]
    width = 8 - first.bit_length() + 1
    if not 1 <= width <= 8:
        return 0
    length = int.from_bytes(head[place + 4 : place + 4 + width], "big") & ((1 << 7 * width) - 1)
    return 0 if length == (1 << 7 * width) - 1 else place + 4 + width + length


def _last_page_end(file: BinaryIO, size: int) -> int:
    """Where the last page of an Ogg file ends."""
    start = max(0, size - 2 * OGG_PAGE)
    file.seek(start)
    tail = file.read()
    place = tail.rfind(b"OggS\x00")
    if place < 0:
        return 0
    segments = tail[place + 26] if place + 26 < len(tail) else 0
    table = tail[place + 27 : place + 27 + segments]
    if place + 27 > len(tail) or len(table) < segments:
        return size + 1
    return start + place + 27 + segments + sum(table)
