"""Where the samples of one audio stream lie on the file's clock: positions, priming, padding and gaps.

A position counts samples on the file's clock: position 0 is presented at 0 s, negative ones before. Containers that
count time in milliseconds (Matroska, FLV) tell a position only to the nearest one; where every frame has the same
length N, the frames lie on a lattice of N samples, and the nearest point of the lattice is exact.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import av

# Samples that decoding must start early for the wanted ones to be right: AAC overlaps one frame, and spectral band
# replication remembers some more; an MP3 frame borrows up to 511 bytes from those before (25 frames at 8 kbit/s) and
# overlaps; Opus is to start 80 ms early (RFC 7845, 4.6) and has converged in half a second; Vorbis overlaps one block,
# of up to 8192.
_PREROLL = {"aac": 4 * 2048, "mp3": 27 * 1152, "mp3float": 27 * 1152, "opus": 24000, "vorbis": 8192}
_LOSSLESS = ("flac", "alac", "wavpack")  # and pcm_*: a packet is decoded by itself
_OTHER_S = 1  # of preroll for a codec that is not listed


def preroll(codec: str, sample_rate: int) -> int:
    """Samples to decode before the first wanted one."""
    if codec in _LOSSLESS or codec.startswith("pcm_"):
        return 0
    return _PREROLL.get(codec, _OTHER_S * sample_rate)


@dataclass(frozen=True)
class Timeline:
    """Positions of frames from their timestamps.

    unit: samples per tick of the stream's clock. origin: position of some frame's first sample. step: length of every
    frame in samples, None where it varies.
    """

    unit: Fraction
    origin: int
    step: int | None

    @cached_property
    def exact(self) -> bool:
        """Timestamps tell positions by themselves: a sample is a whole number of ticks."""
        return self.unit.numerator == 1

    @cached_property
    def slack(self) -> float:
        """A frame whose position is off by no more samples than this follows the one before without a gap."""
        return float(3 * self.unit / 2) + 1

    def position(self, pts: int) -> int:
        """Position of a frame with this timestamp, in whole samples."""
        if self.exact:  # in whole numbers, as fractions are slow
            ticks = self.unit.denominator
            return (2 * pts + ticks) // (2 * ticks)
        raw = pts * self.unit
        if self.step is None:
            return round(raw)
        lattice = self.origin + round((raw - self.origin) / self.step) * self.step
        return lattice if abs(lattice - raw) <= self.unit * Fraction(3, 5) + 1 else round(raw)

    def ticks(self, position: int) -> int:
        """Timestamp at or before a position."""
        return math.floor(position / self.unit)


@dataclass(frozen=True)
class Lead:
    """A packet at the beginning of a stream. pts: ticks. skip: samples it says to drop. discard: it is not heard."""

    pts: int
    skip: int
    discard: bool


def timeline(
    leads: Sequence[Lead], lengths: Sequence[int], unit: Fraction, codec: str, extradata: bytes | None
) -> tuple[Timeline, int]:
    """(timeline, position of the first sample that is heard) from the first packets and the lengths of their frames."""
    step = lengths[0] if len(set(lengths)) == 1 else None
    lead = next((lead for lead in leads if lead.skip), None) or next((x for x in leads if not x.discard), leads[0])
    skip = lead.skip
    if codec == "vorbis":
        step = _vorbis_step(extradata)
        if not any(x.skip or x.discard for x in leads):
            skip = lengths[0]  # of the first packet only the half that overlaps with the second is there
    start = lead.pts * unit + skip
    if skip and unit > 1:  # a coarse clock counts from the first sample heard, and the priming was taken off rounded
        start = round(start / unit) * unit
    first = round(start)
    return Timeline(unit, first - skip, step), first


def _vorbis_step(extradata: bytes | None) -> int | None:
    """Samples of which the length of every Vorbis packet is a multiple: a quarter of the short block."""
    place = (extradata or b"").find(b"\x01vorbis")
    if place < 0 or len(extradata or b"") < place + 29:
        return None
    return (1 << (extradata[place + 28] & 15)) // 4 if extradata else None


def skipped(packet: av.Packet) -> tuple[int, int]:
    """Samples to drop at the start and at the end of what a packet gives (AV_PKT_DATA_SKIP_SAMPLES)."""
    if not packet.has_sidedata("skip_samples"):
        return 0, 0
    data = bytes(packet.get_sidedata("skip_samples"))
    return int.from_bytes(data[:4], "little"), int.from_bytes(data[4:8], "little")
