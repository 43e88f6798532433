"""Walks over the packets of a file's video stream; the last walk is kept, so that a second need not read it again."""

import contextlib
from collections.abc import Iterator

import av

from video.source import MediaSource, named, open_container

_SEEKABLE = ("mov", "matroska", "avi")  # to their first packet, whatever its time
_KEPT_BYTES = 16 << 20


class Demuxer:
    """The packets of the first video stream, in decoding order, from wherever `seek` or `rewind` has put the file.

    container, stream: PyAV's; opening anew replaces them. name: how errors call the file.
    """

    def __init__(self, source: MediaSource, name: str) -> None:
        self.name = name
        self._source = source
        self._kept: list[av.Packet] | None = []  # since the last seek; None when they were too many
        self._kept_bytes = 0
        self._at_start = True
        self._open()

    def _open(self) -> None:
        self.container, self.stream = open_container(self._source, self.name)
        if self.stream.codec_context is not None:
            self.stream.codec_context.thread_count = 1  # clips are small; workers, not threads, give the speed

    def close(self) -> None:
        self._kept = None
        self.container.close()

    def rewind(self, origin: int | None) -> None:
        """To the start, whose first packet is at tick `origin`; by opening anew where that is None or may be missed."""
        self._forget(at_start=True)
        if origin is not None and self.container.format.name.split(",")[0] in _SEEKABLE:
            with contextlib.suppress(av.FFmpegError, OSError):
                self.container.seek(origin, stream=self.stream, backward=True)
                return
        self.container.close()
        self._open()

    def seek(self, pts: int) -> bool:
        """To a keyframe at or before `pts` as far as the container knows; False when it cannot."""
        with contextlib.suppress(av.FFmpegError, OSError):  # some containers cannot seek
            self.container.seek(pts, stream=self.stream, backward=True)
            self._forget(at_start=False)
            return True
        return False

    def keyframe_before(self, pts: int) -> int | None:
        """The indexed keyframe at or before `pts`, if the container has an index; a hint only (it counts in dts)."""
        entries = self.stream.index_entries
        place = entries.search_timestamp(pts, backward=True) if len(entries) else -1
        return entries[place].timestamp if place >= 0 else None

    def kept_before(self, pts: int) -> tuple[int, bool] | None:
        """(place of the last kept keyframe at or before `pts`, whether that is the file's start).

        None where a seek is better: there is none, or the index knows a later one behind what is kept.
        """
        if not self._kept:
            return None
        places = [
            place
            for place, packet in enumerate(self._kept)
            if packet.is_keyframe and packet.pts is not None and packet.pts <= pts
        ]
        if not places:
            return (0, True) if self._at_start else None
        hint = self.keyframe_before(pts)
        last = self._kept[-1].dts
        if hint is not None and last is not None and hint > last:
            return None
        return places[-1], self._at_start and places[-1] == 0

    def start_is_kept(self) -> bool:
        return bool(self._kept) and self._at_start

    def walk(self, place: int = 0) -> Iterator[av.Packet]:
        """The kept packets from `place` on, then the file's; at its end an empty one, which drains the decoder."""
        with named(self.name):
            yield from (self._kept or [])[place:]
            for packet in self.container.demux(self.stream):
                self._keep(packet)
                yield packet

    def _keep(self, packet: av.Packet) -> None:
        if self._kept is None or not packet.size:
            return
        self._kept.append(packet)
        self._kept_bytes += packet.size
        if self._kept_bytes > _KEPT_BYTES:
            self._kept = None

    def _forget(self, at_start: bool) -> None:
        self._kept, self._kept_bytes, self._at_start = [], 0, at_start
