"""Decoded sound of a stream of packets: any part of it, to the sample.

C channels, T samples. In a long file decoding starts anew at fixed places, `BLOCK` samples apart, each time `early`
samples before and with a decoder without memory. So the samples of a file do not depend on what part of it is read: a
window equals the same part of the whole bit by bit, also where a decoder remembers (AAC's noise, Opus' filters).
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import av
import numpy as np
from av.audio.codeccontext import AudioCodecContext

from audio.timeline import Timeline, skipped
from mmdiff.data.media import DamagedError, MediaError, UnsupportedError

BLOCK = 1 << 17  # samples between the places at which decoding starts anew
WHOLE = 1 << 19  # samples of a file that is decoded in one go, whatever part of it is read
_SKIP_MANUAL = 1 << 29  # AV_CODEC_FLAG2_SKIP_MANUAL: priming and padding are cut here, not in the decoder


class Feed(Protocol):
    """Where the packets of one stream come from."""

    codec: str
    early: int  # samples that decoding must begin before those that are wanted

    def packets(self, pts: int | None) -> Iterator[av.Packet]:
        """Packets in their order from one that begins at or before `pts` on, or from the first one."""

    def decoder(self) -> AudioCodecContext:
        """Decoder that remembers nothing of what was decoded before; asked for after the first packet has come."""

    def close(self) -> None: ...


class BlockReader:
    """Samples of a feed.

    sample_rate: Hz. start: position of the first sample that is heard; end: after the last one, set by who opens it.
    can_seek: the position of a packet is known without those before. Raises MediaError's kinds, naming `name`.
    """

    def __init__(
        self, feed: Feed, name: str, *, sample_rate: int, channels: int, timeline: Timeline, start: int, can_seek: bool
    ) -> None:
        self.name = name
        self.feed = feed
        self.sample_rate, self.channels, self.timeline, self.can_seek = sample_rate, channels, timeline, can_seek
        self.start = self.end = start
        self._early = feed.early
        self._block: tuple[int, np.ndarray] | None = None  # (first sample, (C, T)) of the last one
        self._whole: np.ndarray | None = None  # (C, T) of a short file

    @property
    def start_s(self) -> float:
        return self.start / self.sample_rate

    @property
    def samples(self) -> int:
        return self.end - self.start

    def close(self) -> None:
        self.feed.close()
        self._block = self._whole = None

    def read(self, start: int, count: int) -> np.ndarray:
        """(C, count) float32 from sample `start` on; the range must lie within the file."""
        if self._whole is not None:
            return self._whole[:, start : start + count]
        with named(self.name, DamagedError):
            if not self.can_seek:
                return self._decode(None, self.start + start, self.start + start + count)
            pieces = []
            for place in range(start - start % BLOCK, start + count, BLOCK):
                first, last = max(start, place), min(start + count, place + BLOCK)
                pieces.append(self._of_block(place, last)[:, first - place : last - place])
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)

    def decode_whole(self) -> None:
        """Decodes and keeps all, and so finds the end; for a short file."""
        pieces = [(place, self._values(frame, keep)) for place, frame, keep in self._pieces(None)]
        self.end = max((place + piece.shape[1] for place, piece in pieces), default=self.start)
        self._whole = self._placed(iter(pieces), self.start, self.end)

    def find_end(self, target: int | None) -> None:
        """Finds the end by decoding from position `target` on; from further before where nothing is found there."""
        while True:
            ends = [place + keep for place, _, keep in self._pieces(target)]
            if ends or target is None:
                self.end = max(ends, default=self.start)
                return
            earlier = target - 60 * self.sample_rate
            target = earlier if earlier > self.start else None

    def _of_block(self, place: int, last: int) -> np.ndarray:
        """(C, at least last - place) from sample `place` on, where decoding starts anew."""
        if self._block is None or self._block[0] != place or self._block[1].shape[1] < last - place:
            first = self.start + place
            self._block = place, self._decode(first - self._early if place else None, first, self.start + last)
        return self._block[1]

    def _decode(self, anchor: int | None, first: int, last: int) -> np.ndarray:
        """(C, last - first) from position `first` on; decoding begins at `anchor`, or at the beginning of the file."""

        def pieces() -> Iterator[tuple[int, np.ndarray]]:
            for place, frame, keep in self._pieces(anchor, quiet_before=first):
                if place + keep > first:
                    yield place, self._values(frame, keep)

        return self._placed(pieces(), first, last)

    def _placed(self, pieces: Iterator[tuple[int, np.ndarray]], first: int, last: int) -> np.ndarray:
        """(C, last - first) with each piece in its place and silence in the gaps."""
        found = np.zeros((self.channels, last - first), dtype=np.float32)
        filled = first
        for place, piece in pieces:
            start, end = max(place, filled), min(place + piece.shape[1], last)
            if end > start:
                found[:, start - first : end - first] = piece[:, start - place : end - place]
            filled = max(filled, end)
            if filled >= last:
                return found
        if filled < last:
            at_s = (filled - self.start) / self.sample_rate
            raise DamagedError(f"{self.name}: the sound breaks off after {at_s:.2f} s; fetch it again or leave it out")
        return found

    def _values(self, frame: av.AudioFrame, keep: int) -> np.ndarray:
        """(C, keep) float32; full scale of an integer format is 1."""
        values: np.ndarray = frame.to_ndarray()
        if not frame.format.is_planar:
            values = values.reshape(-1, self.channels).T
        values = values[:, :keep]
        if values.dtype == np.uint8:
            return (values.astype(np.float32) - 128) / 128
        if values.dtype.kind == "i":
            bits = 8 * values.dtype.itemsize
            exact: np.ndarray = values.astype(np.float32 if bits <= 16 else np.float64)
            return (exact / 2.0 ** (bits - 1)).astype(np.float32, copy=False)  # rounded once
        return values.astype(np.float32, copy=False)

    def _pieces(self, target: int | None, quiet_before: int | None = None) -> Iterator[tuple[int, av.AudioFrame, int]]:
        """(position, frame, how many of its samples count) from a packet that begins at or before `target` on.

        Packets that cannot be decoded are passed over while they only lead to position `quiet_before`.
        """
        decoder: AudioCodecContext | None = None
        expected: int | None = None
        for packet, last in self._packets(target):
            decoder = decoder or self.feed.decoder()
            try:
                frames = decoder.decode(packet)
            except av.FFmpegError:
                if target is None or quiet_before is None or packet.pts is None:
                    raise
                if self.timeline.position(packet.pts) + self._early // 2 > quiet_before:
                    raise
                frames = []
            if last:
                frames += decoder.decode(None)
            keep = sum(frame.samples for frame in frames) - skipped(packet)[1]
            if last and self.timeline.exact and packet.duration:
                keep = min(keep, round(packet.duration * self.timeline.unit))
            for frame in frames:
                self._check(frame)
                # a frame stands where the one before ends, but after a gap; timestamps that overlap are not believed
                place = None if frame.pts is None else self.timeline.position(frame.pts)
                if place is None or (expected is not None and place - expected <= self.timeline.slack):
                    place = self.start if expected is None else expected
                yield place, frame, max(0, min(frame.samples, keep))
                expected, keep = place + frame.samples, keep - frame.samples

    def _check(self, frame: av.AudioFrame) -> None:
        found = frame.sample_rate, frame.layout.nb_channels
        if found != (self.sample_rate, self.channels):
            raise UnsupportedError(
                f"{self.name}: the sound changes from {self.sample_rate} Hz and {self.channels} channels to "
                f"{found[0]} Hz and {found[1]} within the file; cut it there"
            )

    def _packets(self, target: int | None) -> Iterator[tuple[av.Packet, bool]]:
        """(packet, it is the last) from the last one that begins at or before `target`, or from the first one."""
        held: av.Packet | None = None
        reached = False
        for packet in self.feed.packets(None if target is None else self.timeline.ticks(target)):
            if target is not None and not reached:
                if packet.pts is None:
                    continue
                if held is None or self.timeline.position(packet.pts) <= target:
                    held = packet
                    continue
                reached = True
            if held is not None:
                yield held, False
            held = packet
        if held is not None:
            yield held, True


def fresh_decoder(codec: str, extradata: bytes | None) -> AudioCodecContext:
    """Decoder that leaves priming and padding in."""
    decoder = AudioCodecContext.create(codec, "r")
    assert isinstance(decoder, AudioCodecContext)
    if extradata:
        decoder.extradata = extradata
    keep_priming(decoder)
    return decoder


def keep_priming(decoder: AudioCodecContext) -> None:
    decoder.flags2 = decoder.flags2 | _SKIP_MANUAL


@contextmanager
def named(name: str, kind: type[MediaError]) -> Iterator[None]:
    """What FFmpeg or the file system reports, as a MediaError of this kind that names the file."""
    try:
        yield
    except (av.FFmpegError, OSError, UnicodeDecodeError) as error:
        reason = re.sub(r"^\[Errno -?\d+\] ", "", str(error)).split(": '")[0]
        raise kind(f"{name}: cannot be read as audio ({reason}); fetch or convert it again, or leave it out") from error
