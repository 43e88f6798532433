"""What the structure of mp4, mov and Ogg says of the sound in them, before anything is decoded.

Sources: ISO 14496-12 (boxes), RFC 3533 (Ogg).
"""

from typing import BinaryIO

from mmdiff.data.containers import OGG_PAGE, boxes, size_of


def movie_timescale(file: BinaryIO) -> int:
    """Ticks per second in which an mp4 or mov counts the length of its edits; 1000 where it does not say."""
    size = size_of(file)
    for kind, start, length in boxes(file, 0, size):
        if kind == b"moov":
            for inner, place, _ in boxes(file, start + 8, start + length):
                if inner == b"mvhd":
                    file.seek(place + 8)
                    header = file.read(28)
                    scale = header[20:24] if header[:1] == b"\x01" else header[12:16]
                    return int.from_bytes(scale, "big") or 1000
    return 1000


def before_last_page(file: BinaryIO) -> int:
    """Position, in samples, at which the last page of an Ogg file with one stream of sound begins; 0 if unknown."""
    size = size_of(file)
    file.seek(max(0, size - 4 * OGG_PAGE))
    tail = file.read()
    last = tail.rfind(b"OggS\x00")
    place = tail.rfind(b"OggS\x00", 0, last) if last > 0 else -1
    granule = int.from_bytes(tail[place + 6 : place + 14], "little", signed=True) if place >= 0 else 0
    return max(0, granule)  # -1: no packet ends on that page
