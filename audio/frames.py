"""Sound of bare frames without a container: MP3 and MPEG Layer II, and AAC as ADTS, found by their headers.

Such a file has no index, and where its n-th frame lies can only be counted: opening reads the headers of all frames
once, and from then on any frame is one read away. The decoder is FFmpeg's.
Sources: ISO 11172-3 and 13818-3 (MPEG audio), ISO 13818-7 (ADTS), the tags of Xing, VBRI and LAME.
"""

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import BinaryIO

import av
from av.audio.codeccontext import AudioCodecContext

from audio.blocks import BlockReader, fresh_decoder, named
from audio.timeline import Timeline, preroll
from mmdiff.data.containers import size_of
from mmdiff.data.media import DamagedError, NoStreamError

_RATES = (44100, 48000, 32000)  # Hz, of MPEG 1; version 2 has half of them, 2.5 a quarter
_KBITS = {  # by version 1 or 2, and layer
    (1, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (2, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_ENCODERS = (b"LAME", b"Lavf", b"Lavc", b"L3.9")  # whose tags tell delay and padding
_DELAY = 529  # samples by which every Layer III decoder is late
_CHUNK = 1 << 20  # bytes
_HEAD = 7  # bytes of an ADTS header, the longer of the two
_TAGS = (b"TAG", b"APE", b"LYR", b"ID3")  # what may follow the last frame


@dataclass(frozen=True)
class _Kind:
    """What the frames of a file share. length: (bytes, place) -> bytes of the frame whose header is there, or 0."""

    codec: str
    length: Callable[[bytes, int], int]


class FrameFeed:
    """Frames of an open file as packets; a tick is a sample. places, lengths: of each frame in the file, bytes."""

    def __init__(self, source: str | BinaryIO, codec: str, places: "array[int]", lengths: "array[int]") -> None:
        self._file = open(source, "rb") if isinstance(source, str) else source
        self._owned = isinstance(source, str)
        self._places, self._lengths = places, lengths
        self.codec = codec
        self.step, self.origin, self.base = 1, 0, Fraction(1)
        self.early = 0

    def begin(self, step: int, origin: int, sample_rate: int) -> None:
        """Frame n has `step` samples, from position origin + n * step on."""
        self.step, self.origin, self.base = step, origin, Fraction(1, sample_rate)
        self.early = preroll(self.codec, sample_rate)
        if self.codec == "mp3float":  # as many frames as hold the 511 bytes that one may borrow, and two that overlap
            held = min(self._lengths) - 36  # without header and side information
            self.early = min(self.early, step * (2 + -(-511 // held))) if held > 0 else self.early

    def close(self) -> None:
        if self._owned:
            self._file.close()

    def decoder(self) -> AudioCodecContext:
        return fresh_decoder(self.codec, None)

    def packets(self, pts: int | None) -> Iterator[av.Packet]:
        first = 0 if pts is None else max(0, (pts - self.origin) // self.step)
        for index in range(min(first, len(self._places) - 1), len(self._places)):
            self._file.seek(self._places[index])
            packet = av.Packet(self._file.read(self._lengths[index]))
            packet.pts = packet.dts = self.origin + index * self.step
            packet.time_base = self.base
            yield packet


def open_frames(source: str | BinaryIO, file: BinaryIO, name: str) -> BlockReader | None:
    """Reader of a file of bare frames, or None when it is something else.

    file: `source`, opened. Raises MediaError's kinds, naming `name`.
    """
    size = size_of(file)
    start = _after_tags(file)
    file.seek(start)
    head = file.read(1 << 13)
    kind = _kind(head)
    if kind is None:
        return None
    places, lengths = array("Q"), array("H")
    for place, length in _scan(file, start, size, kind):
        places.append(place)
        lengths.append(length)
    if places[-1] + lengths[-1] > size:
        raise DamagedError(f"{name}: cut off within its last frame; fetch it again or leave it out")
    first = head[: kind.length(head, 0)]
    tag = _Tag.of(first) if kind.codec.startswith("mp") else None
    if tag is not None:
        places, lengths = places[1:], lengths[1:]  # the frame of the tag is silence
    if not places:
        raise NoStreamError(f"{name}: no audio samples; leave it out")
    if tag is not None and tag.frames > len(places) + 1:
        raise DamagedError(f"{name}: cut off, {len(places)} of {tag.frames} frames are there; fetch it again")
    feed = FrameFeed(source, kind.codec, places, lengths)
    try:
        with named(name, DamagedError):
            return _reader(feed, name, len(places), tag)
    except BaseException:
        feed.close()
        raise


def _reader(feed: FrameFeed, name: str, count: int, tag: "_Tag | None") -> BlockReader:
    decoder = feed.decoder()
    frames: list[av.AudioFrame] = []
    for packet in feed.packets(None):
        frames += decoder.decode(packet)
        if len(frames) > 2:
            break
    if not frames:
        raise NoStreamError(f"{name}: no audio samples; leave it out")
    rate = frames[-1].sample_rate
    skip = tag.delay + _DELAY if tag and tag.delay else 0
    feed.begin(frames[-1].samples, -skip, rate)
    reader = BlockReader(
        feed,
        name,
        sample_rate=rate,
        channels=frames[-1].layout.nb_channels,
        timeline=Timeline(Fraction(1), -skip, feed.step),
        start=0,
        can_seek=True,
    )
    padding = max(0, tag.padding - _DELAY) if tag else 0
    reader.end = count * feed.step - skip - padding
    return reader


@dataclass(frozen=True)
class _Tag:
    """What the first frame of an MP3 says of all. frames: their number, 0 if unknown. delay, padding: samples."""

    frames: int
    delay: int
    padding: int

    @classmethod
    def of(cls, frame: bytes) -> "_Tag | None":
        if frame[36:40] == b"VBRI":
            return cls(int.from_bytes(frame[50:54], "big"), 0, 0)
        mono, first = frame[3] >> 6 == 3, frame[1] >> 3 & 3 == 3
        place = 4 + ((17 if mono else 32) if first else (9 if mono else 17))
        if frame[place : place + 4] not in (b"Xing", b"Info"):
            return None
        flags = int.from_bytes(frame[place + 4 : place + 8], "big")
        frames = int.from_bytes(frame[place + 8 : place + 12], "big") if flags & 1 else 0
        place += 8 + 4 * (flags & 1) + 4 * (flags >> 1 & 1) + 100 * (flags >> 2 & 1) + 4 * (flags >> 3 & 1)
        if frame[place : place + 4] not in _ENCODERS:
            return cls(frames, 0, 0)
        both = int.from_bytes(frame[place + 21 : place + 24], "big")
        return cls(frames, both >> 12, both & 4095)


def _after_tags(file: BinaryIO) -> int:
    """Place after the ID3 tags at the beginning."""
    place = 0
    while True:
        file.seek(place)
        head = file.read(10)
        if head[:3] != b"ID3" or len(head) < 10:
            return place
        place += 10 + sum((byte & 127) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
        place += 10 if head[5] & 16 else 0


def _kind(head: bytes) -> _Kind | None:
    """What frames begin here, None if these are none; a second one must follow the first, or the end."""
    if len(head) < _HEAD or head[0] != 255 or head[1] & 224 != 224:
        return None
    kind = _adts(head) if head[1] & 246 == 240 else _mpeg(head)
    if kind is None:
        return None
    length = kind.length(head, 0)
    second = head[length : length + _HEAD]
    return kind if length and (len(second) < _HEAD or kind.length(second, 0)) else None


def _adts(head: bytes) -> _Kind:
    key = (head[1] & 254, head[2] & 252)  # all but protection; profile and rate

    def length(data: bytes, at: int) -> int:
        if data[at] != 255 or (data[at + 1] & 254, data[at + 2] & 252) != key:
            return 0
        bytes_of = (data[at + 3] & 3) << 11 | data[at + 4] << 3 | data[at + 5] >> 5
        return bytes_of if bytes_of > _HEAD else 0

    return _Kind("aac", length)


def _mpeg(head: bytes) -> _Kind | None:
    version, layer, rate = {3: 1, 2: 2, 0: 4}.get(head[1] >> 3 & 3, 0), 4 - (head[1] >> 1 & 3), head[2] >> 2 & 3
    if not version or layer not in (2, 3) or rate == 3:
        return None
    samples = 576 if layer == 3 and version > 1 else 1152
    hertz = _RATES[rate] // version
    lengths = [0] * 256  # by the third byte
    for index, kbits in enumerate(_KBITS[min(version, 2), layer]):
        for low in range(16):
            if kbits and low >> 2 == rate:
                lengths[index << 4 | low] = samples // 8 * kbits * 1000 // hertz + (low >> 1 & 1)
    key = head[1] & 254

    def length(data: bytes, at: int) -> int:
        return lengths[data[at + 2]] if data[at] == 255 and data[at + 1] & 254 == key else 0

    return _Kind("mp3float" if layer == 3 else "mp2float", length)


def _scan(file: BinaryIO, start: int, size: int, kind: _Kind) -> Iterator[tuple[int, int]]:
    """(place, length) of all frames. What is no frame is passed over until two follow one another."""
    length = kind.length
    place = start
    while place + _HEAD <= size:
        file.seek(place)
        data = file.read(_CHUNK)
        at, end = 0, len(data) - _HEAD
        while at <= end:
            step = length(data, at)
            if step:
                yield place + at, step
                at += step
                continue
            if data[at : at + 3] in _TAGS and data[at : at + 3] != b"ID3":
                return
            at = _next_frame(data, at + 1, kind)
        place += at
        if not data or (len(data) < _CHUNK and at > end):
            return


def _next_frame(data: bytes, at: int, kind: _Kind) -> int:
    """Where the next two frames begin in these bytes; their end when they do not."""
    while True:
        at = data.find(b"\xff", at)
        if at < 0 or at + _HEAD > len(data):
            return len(data) - _HEAD + 1
        step = kind.length(data, at)
        if step and (at + step + _HEAD > len(data) or kind.length(data, at + step)):
            return at
        at += 1
