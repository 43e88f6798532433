"""Random access to the frames of a video file by their times on the file's clock.

T frames, H W space. Times are in seconds on the file's clock: its container's timeline after edit lists, the same for
picture and sound, what a player shows; it may begin before or after 0.
"""

import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from mmdiff.data.media import DamagedError, TooLargeError, UnsupportedError
from video.backends import Backend, BackendName
from video.source import MediaSource
from video.track import Track

MAX_PIXELS = 4096 * 4096  # of one frame
MAX_BYTES = 1 << 29  # of all frames of one call, as RGB
_ROUNDING_S = 1e-6
_APART_S = 0.5  # frames further apart are sought one by one where a keyframe lies between


class VideoReader:
    """Open video file. Opening reads the header and the first packets; an hour-long file opens in milliseconds.

    Cheap: `start_s`, `fps`, `size`, `pixel_aspect`. Local, reading only around: `times_between`, `read_at`, `end_s`.
    Of the whole file, demuxed once at first use: `times_s`, `ends_s`, `len`, `read`.
    backend: "pyav" (the reference), or "decord" or "torchcodec", which then decode what PyAV has indexed; a file that
    they would get wrong is refused with UnsupportedError.

    Use it as a context manager. It may be pickled when its source is a path or bytes; a copy, and a reader that finds
    itself in a forked process, opens the file anew.
    Raises MediaError kinds that name `name` (default: the path), the reason and the cure: UnreachableError,
    NotMediaError, NoStreamError, DamagedError, TooLargeError (a frame of more than `max_pixels`, before it is decoded;
    a call of more than `max_bytes`), UnsupportedError (HDR, interlaced, turned by other than quarters, frames of
    several sizes). ValueError for an unknown backend.
    """

    def __init__(
        self,
        source: MediaSource,
        *,
        name: str | None = None,
        backend: BackendName = "pyav",
        max_pixels: int = MAX_PIXELS,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self.name = name or (os.fspath(source) if isinstance(source, str | os.PathLike) else "video data")
        self.backend = backend
        self._source = source
        self._max_pixels = max_pixels
        self._max_bytes = max_bytes
        self._index: tuple[list[int], int] | None = None
        self._end: int | None = None
        self._size: tuple[int, int] | None = None
        self._open()

    def _open(self) -> None:
        self._pid = os.getpid()
        self._backend: Backend | None = None
        self._track = Track(self._source, self.name, self._max_pixels)
        try:
            if self.backend != "pyav":
                self._refuse_ahead()
                first = self._read([self._track.first])
                self._backend = Backend(self.backend, self._source, self.name, self.times_s, first)
        except BaseException:
            self._track.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._track.close()
        self._drop_backend()

    def _drop_backend(self) -> None:
        if self._backend is not None and self._pid != os.getpid():
            self._backend.abandon()
        self._backend = None

    def __getstate__(self) -> dict[str, Any]:
        if not isinstance(self._source, str | os.PathLike | bytes):
            raise TypeError(f"{self.name}: a reader of an open file cannot be pickled; give it the path or the bytes")
        return {key: value for key, value in self.__dict__.items() if key not in ("_track", "_backend")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    @property
    def _own(self) -> Track:
        """The track of this process: file positions, and the threads of some backends, do not survive a fork."""
        if self._pid != os.getpid():
            self._drop_backend()
            self._open()
        return self._track

    # -- the clock

    @property
    def start_s(self) -> float:
        """When the first frame is shown."""
        return self._seconds(self._own.first)

    @property
    def end_s(self) -> float:
        """When the last frame stops being shown."""
        if self._end is None:
            self._end = self._index[1] if self._index else self._own.end()
        return self._seconds(self._end)

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s

    @property
    def fps(self) -> Fraction:
        """Average rate, as the container says, else as its frames are."""
        if self._own.rate is not None:
            return self._own.rate
        times, end = self._all()
        span = (times[-1] - times[0]) * self._own.base
        return (len(times) - 1) / span if span else 1 / ((end - times[0]) * self._own.base)

    @property
    def times_s(self) -> list[float]:
        """When each frame is shown, in order."""
        return [self._seconds(time) for time in self._all()[0]]

    @property
    def ends_s(self) -> list[float]:
        """When each frame stops being shown: when the next one is."""
        times, end = self._all()
        return [self._seconds(time) for time in [*times[1:], end]]

    def __len__(self) -> int:
        return len(self._all()[0])

    def times_between(self, start_s: float, end_s: float, *, before: int = 0) -> list[float]:
        """When the frames of [start_s, end_s) are shown, and up to `before` more just before start_s.

        With before=1 the first one is the frame that is on the screen at start_s, if any is. A microsecond's rounding
        of the bounds is allowed for.
        """
        track = self._own
        low, high = self._ticks(start_s), self._ticks(end_s)
        if self._index is None:
            found = track.times_between(low, high, before) if high > low else []
        else:
            times = self._index[0]
            first = int(np.searchsorted(times, low))
            found = times[max(0, first - before) : int(np.searchsorted(times, high))]
        return [self._seconds(time) for time in found]

    # -- the pictures

    @property
    def pixel_aspect(self) -> Fraction:
        """Width of a pixel over its height as the file asks to be shown; pictures are read as stored, unstretched."""
        return self._own.pixel_aspect

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the pictures as `read` gives them, upright. Decodes the first frame."""
        if self._size is None:
            self._size = tuple(self.read_at([self.start_s]).shape[2:])  # type: ignore[assignment]
        assert self._size is not None
        return self._size

    def read(self, indices: Sequence[int]) -> Tensor:
        """Frames of these indices of `times_s`, (3, T, H, W) uint8. Raises IndexError for one beyond the last.

        The channels lie innermost in memory, as decoders write them.
        """
        times = self._all()[0]
        return self._read([times[index] for index in indices])

    def read_at(self, times_s: Sequence[float]) -> Tensor:
        """Frames that are first shown at exactly these times, (3, T, H, W) uint8, in this order."""
        base = self._own.base
        return self._read([round(time * base.denominator / base.numerator) for time in times_s])

    def _read(self, times: list[int]) -> Tensor:
        if not times:
            raise ValueError(f"{self.name}: no frame is asked for; give at least one")
        track = self._own
        self._check_bytes(len(times))
        places: dict[int, list[int]] = {}
        for place, time in enumerate(times):
            places.setdefault(time, []).append(place)
        if self._backend is not None:
            index = {time: place for place, time in enumerate(self._all()[0])}
            unknown = [time for time in places if time not in index]
            if unknown:
                raise DamagedError(f"{self.name}: no frame is first shown at {self._seconds(unknown[0])} s")
            return self._backend.frames([index[time] for time in times])
        clip = _Clip(self.name, len(times))
        for wanted in self._groups(sorted(places)):
            take = _into(clip, places)
            track.frames(set(wanted), take)
        assert clip.pixels is not None
        return torch.from_numpy(clip.pixels).permute(3, 0, 1, 2)

    def _check_bytes(self, count: int) -> None:
        height, width = self._track.coded
        if count * height * width * 3 > self._max_bytes:
            raise TooLargeError(
                f"{self.name}: {count} frames of {width}x{height} are over {self._max_bytes} bytes; "
                "read fewer at once, or give max_bytes"
            )

    def _refuse_ahead(self) -> None:
        height, width = self._track.coded
        if self.backend == "decord" and len(self) * height * width * 3 > self._max_bytes:
            raise UnsupportedError(
                f"{self.name}: decord decodes ahead, up to all {len(self)} frames of {width}x{height}, which is over "
                f"{self._max_bytes} bytes; use backend='pyav'"
            )

    def _groups(self, times: list[int]) -> Iterator[list[int]]:
        """Splits where a seek to a later keyframe saves decoding what lies between."""
        apart = round(_APART_S / self._track.base)
        group = times[:1]
        for last, time in itertools.pairwise(times):
            if time - last > apart:
                key = self._track.keyframe_before(time)
                if key is not None and key > last:
                    yield group
                    group = []
            group.append(time)
        yield group

    # -- ticks and seconds

    def _all(self) -> tuple[list[int], int]:
        if self._index is None:
            self._index = self._own.all_times()
        return self._index

    def _seconds(self, ticks: int) -> float:
        base = self._track.base
        return ticks * base.numerator / base.denominator

    def _ticks(self, time_s: float) -> int:
        """First tick at or after `time_s`, but for rounding."""
        if math.isinf(time_s):
            return 1 << 62 if time_s > 0 else -(1 << 62)
        base = self._track.base
        return math.ceil((time_s - _ROUNDING_S) * base.denominator / base.numerator)


class _Clip:
    """Frames written one by one into one (T, H, W, 3) uint8 array, so that no second copy is ever held."""

    def __init__(self, name: str, count: int) -> None:
        self.name = name
        self.count = count
        self.pixels: np.ndarray | None = None

    def put(self, place: int, picture: np.ndarray) -> None:
        if self.pixels is None:
            self.pixels = np.empty((self.count, *picture.shape), dtype=np.uint8)
        if self.pixels.shape[1:] != picture.shape:
            raise UnsupportedError(f"{self.name}: the frame size changes within the file; cut it where it does")
        self.pixels[place] = picture


def _into(clip: _Clip, places: dict[int, list[int]]) -> Callable[[int, np.ndarray], None]:
    def take(time: int, picture: np.ndarray) -> None:
        for place in places[time]:
            clip.put(place, picture)

    return take
