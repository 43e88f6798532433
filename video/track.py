"""The video stream of one open file, by PyAV: its packets' times, and its frames decoded from a place on.

T frames, H W space. Times are integers in units of `Track.base` seconds ("ticks") on the file's clock: its container's
timeline after edit lists, what a player shows, which may begin before or after 0.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from mmdiff.data.media import DamagedError, NoStreamError, NotMediaError, TooLargeError, UnsupportedError
from video.demux import Demuxer
from video.picture import turn_of
from video.source import MediaSource

_HDR = {16: "PQ (SMPTE ST 2084)", 18: "HLG (ARIB STD-B67)"}  # transfer functions of ITU-T H.273
# within half a level of 255; swscale's default is up to three levels off, and three times faster, as 8 bits are read
_EXACT = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
_FIELDS = "interlaced; make full frames of it first, e.g. ffmpeg -i IN -vf bwdif OUT.mp4"
_HEAD_PACKETS = 600  # how far the first keyframe is looked for
_REORDER = 32  # more packets than any codec delays a frame


class Packet(NamedTuple):
    """A frame's packet. pts, dts: ticks (dts may be unknown). length: how long it is shown, ticks, 0 if unknown."""

    pts: int
    dts: int | None
    length: int
    key: bool
    shown: bool  # False: decoded only because others need it, by the edit list


class Track:
    """Open video stream. It must be closed, and must not be used in two processes or threads at once.

    name: how errors call the file. base: seconds of a tick. coded: (H, W) as stored, before any rotation.
    pixel_aspect: width of a pixel over its height. rate: the container's average rate or None.
    timed: False when the file has no presentation times (bare H.264, avi with B-frames); then the k-th frame is shown
    at the k-th decoding time, or at k / rate, and every access decodes from the start.
    Raises MediaError kinds, see `VideoReader`.
    """

    def __init__(self, source: MediaSource, name: str, max_pixels: int) -> None:
        self.name = name
        self._max_pixels = max_pixels
        self._reformatter = VideoReformatter()
        self._turns: dict[int, Callable[[np.ndarray], np.ndarray]] = {}  # by rotation; reading the matrix is slow
        self._origin: int | None = None
        self._demuxer = Demuxer(source, name)
        try:
            self._describe()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._demuxer.close()

    def _describe(self) -> None:
        stream, codec = self._demuxer.stream, self._demuxer.stream.codec_context
        if codec is None:
            raise UnsupportedError(f"{self.name}: its video codec is not known here; convert it to H.264")
        self.coded = (codec.height, codec.width)
        if codec.height * codec.width > self._max_pixels:
            raise TooLargeError(
                f"{self.name}: {codec.width}x{codec.height} is over the limit of {self._max_pixels} pixels; "
                "shrink it, or give max_pixels"
            )
        self._refuse_hdr(int(codec.color_trc or 0))
        self.pixel_aspect = Fraction(stream.sample_aspect_ratio or 1)
        rate = stream.average_rate or stream.guessed_rate
        self.rate = Fraction(rate) if rate and 0 < rate <= 1000 else None
        self.timed = True
        self.base = Fraction(stream.time_base or 1)
        if self._demuxer.container.format.name == "avi" and codec.has_b_frames:
            self.timed = False  # an avi has no presentation times, and what FFmpeg guesses is out of order
        head = self._head()
        if not head and stream.frames == 0 and self.coded == (0, 0):
            raise NotMediaError(f"{self.name}: its video stream is empty; download or export it again")
        if not head:
            raise NoStreamError(f"{self.name}: no video frames; give a file that has some")
        keys = [packet for packet in head if packet.key]
        self._origin = min(packet.pts if packet.dts is None else packet.dts for packet in head)
        self._keyed = bool(keys)
        self._floor = self._first_decodable(head, keys[0].pts) if keys else min(packet.pts for packet in head)
        shown = [packet.pts for packet in head if self._is_shown(packet)]
        if not shown:
            raise DamagedError(f"{self.name}: none of its first {len(head)} frames is to be shown; convert it again")
        self.first = min(shown)

    def _head(self) -> list[Packet]:
        """Packets from the start on until no later one can be shown before those after the first keyframe."""
        head: list[Packet] = []
        keyed = False
        first: int | None = None
        for packet in self._packets(self._demuxer.walk()):
            head.append(packet)
            keyed = keyed or packet.key
            if keyed and packet.shown:
                first = packet.pts if first is None else min(first, packet.pts)
            later = first is not None and packet.dts is not None and packet.dts >= first  # pts are never under dts
            if later or len(head) >= _HEAD_PACKETS:
                break
        return head

    def _first_decodable(self, head: list[Packet], key: int) -> int:
        """Tick of the first frame that can be decoded: the first keyframe, or one behind it that is shown before it.

        In a file that was cut such frames miss those they refer to, and the decoder leaves them out.
        """
        place = next(index for index, packet in enumerate(head) if packet.key)
        if all(packet.pts >= key for packet in head[place:]):
            return key
        decoder = self._demuxer.stream.codec_context
        with contextlib.suppress(av.FFmpegError):
            for data in self._demuxer.walk(place):
                for frame in decoder.decode(data if data.size else None):
                    if not frame.is_corrupt and frame.pts is not None:
                        return min(key, frame.pts)
        return key

    def _count_time(self) -> None:
        self.timed = False
        self.rate = self.rate or Fraction(25)
        self.base = 1 / self.rate

    def _is_shown(self, packet: Packet) -> bool:
        # a file that was cut begins with frames before its first keyframe, which nobody can decode
        return packet.shown and packet.pts >= self._floor

    # -- the times

    def _go(self, pts: int, kept: bool = True) -> tuple[bool, Iterator[av.Packet]]:
        """(whether it is the file's start, packets from a keyframe at or before `pts` on, as far as is known).

        kept: the packets of the last walk will do, where they reach.
        """
        decoder = self._demuxer.stream.codec_context
        if kept and not self.timed and self._demuxer.start_is_kept():
            decoder.flush_buffers()
            return True, self._demuxer.walk()
        found = self._demuxer.kept_before(pts) if kept and self.timed and self._keyed else None
        if found is not None:
            decoder.flush_buffers()
            return found[1], self._demuxer.walk(found[0])
        if self.timed and self._keyed and pts > self.first and self._demuxer.seek(pts):
            return False, self._demuxer.walk()
        self._demuxer.rewind(self._origin if self.timed else None)
        return True, self._demuxer.walk()

    def keyframe_before(self, pts: int) -> int | None:
        """The indexed keyframe at or before `pts`, if the container has an index; a hint only (it counts in dts)."""
        return self._demuxer.keyframe_before(pts) if self.timed else None

    def _packets(self, walk: Iterator[av.Packet]) -> Iterator[Packet]:
        """Without timestamps the packets are counted from the start."""
        for count, data in enumerate(walk):
            if data.size == 0:
                continue
            if count == 0 and data.dts is None and data.pts is None:
                self._count_time()
            stamp = data.dts if data.dts is not None else count
            pts, dts = (data.pts, data.dts) if self.timed else (stamp, stamp)
            if pts is None:
                raise UnsupportedError(
                    f"{self.name}: some frames have no presentation time; rewrite it, e.g. ffmpeg -i IN OUT.mp4"
                )
            yield Packet(pts, dts, data.duration or 0, data.is_keyframe, not data.is_discard)

    def all_times(self) -> tuple[list[int], int]:
        """(ticks of every shown frame in order, the end of the last one), by demuxing the whole file."""
        times: set[int] = set()
        end, count = self.first, 0
        for packet in self._packets(self._go(self.first)[1]):
            count += 1
            if self._is_shown(packet):
                times.add(packet.pts)
                end = max(end, packet.pts + self.length(packet))
        entries = len(self._demuxer.stream.index_entries)
        if (
            self._demuxer.container.format.name.startswith("mov") and count < entries
        ):  # the index of others holds less or more
            raise DamagedError(
                f"{self.name}: cut off, {count} of {entries} frames are there; download or export it again"
            )
        self._check_claim(end)
        return sorted(times), end

    def times_between(self, low: int, high: int, before: int = 0) -> list[int]:
        """Ticks of the shown frames in [low, high), and of up to `before` frames just before; demuxes only around."""
        target = low
        while True:
            at_start, walk = self._go(target)
            first_key: int | None = None
            times: set[int] = set()
            beyond = 0
            for packet in self._packets(walk):
                if packet.key and first_key is None:
                    first_key = packet.pts
                if self._is_shown(packet) and packet.pts < high:
                    times.add(packet.pts)
                beyond += packet.pts >= high
                if beyond > _REORDER or (packet.dts is not None and packet.dts >= high):
                    break
            reach = self.first if at_start else first_key
            # frames before the keyframe that follow it in the file (open GOP) are an incomplete lot
            earlier = sorted(time for time in times if time < low and (at_start or reach is None or time >= reach))
            if at_start or (reach is not None and reach <= low and len(earlier) >= before):
                return (earlier[-before:] if before else []) + sorted(time for time in times if time >= low)
            target = min(target, reach if reach is not None else target) - max(1, round(Fraction(1, 2) / self.base))

    def end(self) -> int:
        """When the last frame stops being shown, ticks; found behind the last keyframe where the container can seek."""
        claims = [self._claimed_end(), self._claimed_container_end()]
        known = [claim for claim in claims if claim is not None]
        if self.timed and known:
            _, walk = self._go(max(known) + round(1 / self.base))
            packets = [packet for packet in self._packets(walk) if self._is_shown(packet)]
            if packets:
                end = max(packet.pts + self.length(packet) for packet in packets)
                self._check_claim(end)
                return end
        return self.all_times()[1]

    def length(self, packet: Packet) -> int:
        """How long a frame is shown, ticks: as the file says, else one period of the average rate."""
        if packet.length > 0:
            return packet.length
        return max(1, round(1 / (self.rate * self.base))) if self.rate else 1

    def _claimed_end(self) -> int | None:
        stream = self._demuxer.stream
        return None if stream.duration is None else (stream.start_time or 0) + int(stream.duration)

    def _claimed_container_end(self) -> int | None:
        duration = self._demuxer.container.duration
        start = self._demuxer.container.start_time or 0
        return None if duration is None else int((start + duration) * Fraction(1, av.time_base) / self.base)

    def _check_claim(self, end: int) -> None:
        claim = self._claimed_end()
        if claim is None and len(self._demuxer.container.streams) == 1:
            claim = self._claimed_container_end()
        if claim is None or not self.timed:
            return
        claimed_s, real_s = float((claim - self.first) * self.base), float((end - self.first) * self.base)
        if claimed_s > 1.2 * real_s + 1:
            raise DamagedError(
                f"{self.name}: claims {claimed_s:.6g} s but its frames end after {real_s:.6g} s; "
                "download or export it again"
            )

    # -- decoding

    def frames(self, wanted: set[int], take: Callable[[int, np.ndarray], None]) -> None:
        """Decodes the frames of these ticks and gives each to `take` once.

        take(pts, picture): picture (H, W, 3) uint8 as a player shows it. The order is that of presentation, but for
        frames that needed another seek. Raises DamagedError when one cannot be decoded.
        """
        done: set[int] = set()

        def give(pts: int, frame: av.VideoFrame) -> None:
            take(pts, self._picture(frame))
            done.add(pts)

        problem = ""
        for attempt, target in enumerate(self._places(min(wanted))):
            at_start, walk = self._go(target, kept=attempt == 0)
            problem = self._decode(walk, wanted - done, at_start, give) or problem
            if wanted == done:
                return
            if at_start:
                break
        raise DamagedError(
            f"{self.name}: {len(wanted - done)} of {len(wanted)} frames cannot be decoded{problem}; "
            "download or export it again"
        )

    def _places(self, low: int) -> Iterator[int]:
        """Where to try to decode from: seeks may land late, and frames before a keyframe may need the one before."""
        yield low
        for back_s in (1, 5, 20):
            yield min(low - round(back_s / self.base), low - 1)
        if (low - self.first) * self.base < 60:
            yield self.first

    def _decode(
        self, walk: Iterator[av.Packet], wanted: set[int], at_start: bool, give: Callable[[int, av.VideoFrame], None]
    ) -> str:
        """Decodes to the last wanted frame; returns what went wrong.

        Some decoders start anywhere and go on after errors, with wrong pictures. So a frame counts only from the first
        keyframe on, in both orders, and after an error from the next keyframe on.
        """
        decoder = self._demuxer.stream.codec_context
        good_from = self._floor if at_start else None
        waiting = self._keyed
        last = max(wanted)
        stamps: deque[int] = deque()  # the k-th decoded frame takes the k-th when the file has no presentation times
        problem = ""
        for count, data in enumerate(walk):
            if data.is_keyframe:
                waiting = False
                good_from = data.pts if good_from is None and self.timed else good_from
            elif waiting and data.size:
                continue
            stamps.append(data.dts if data.dts is not None else count)
            try:
                frames = decoder.decode(data if data.size else None)
                broken = data.is_corrupt
            except av.FFmpegError as error:
                problem, frames, broken = f" ({error})", [], True
            for frame in frames:
                pts = frame.pts if self.timed else stamps.popleft()
                if pts in wanted and good_from is not None and pts >= good_from and not frame.is_corrupt:
                    give(pts, frame)
                if pts is not None and pts >= last:
                    return problem
            if broken:
                good_from, waiting = None, self._keyed
        return problem

    def _picture(self, frame: av.VideoFrame) -> np.ndarray:
        if frame.interlaced_frame:
            raise UnsupportedError(f"{self.name}: {_FIELDS}")
        if frame.width * frame.height > self._max_pixels:
            raise TooLargeError(
                f"{self.name}: a frame of {frame.width}x{frame.height} is over {self._max_pixels} pixels"
            )
        self._refuse_hdr(int(frame.color_trc))
        # one thread: with the default, swscale starts a pool for each clip, five times slower on small ones
        exact = {"interpolation": _EXACT} if frame.format.components[0].bits > 8 else {}
        if frame.rotation not in self._turns:
            self._turns[frame.rotation] = turn_of(frame, self.name)
        picture = self._reformatter.reformat(frame, format="rgb24", threads=1, **exact).to_ndarray()
        return self._turns[frame.rotation](picture)

    def _refuse_hdr(self, transfer: int) -> None:
        if transfer in _HDR:
            raise UnsupportedError(
                f"{self.name}: HDR in {_HDR[transfer]}; map it to standard range first, e.g. ffmpeg -i IN "
                "-vf zscale=t=linear,tonemap=hable,zscale=p=bt709:t=bt709:m=bt709,format=yuv420p OUT.mp4"
            )
