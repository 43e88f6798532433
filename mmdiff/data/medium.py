"""What reports and curation need of a kind of media: a seam that `video` and `audio` fill.

A package adds its `Medium` through the packaging entry-point group `mmdiff.media`; nothing here knows which there are.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar

MediaSource = str | Path | bytes


FAULTS = ("black", "frozen", "silent", "single frame")


@dataclass(frozen=True)
class Piece:
    """A stretch of an item, in seconds after its beginning; `end_s` None is its end."""

    start_s: float = 0.0
    end_s: float | None = None

    @property
    def whole(self) -> bool:
        return self.start_s == 0 and self.end_s is None

    def split(self, total_s: float, most_s: float | None) -> "list[Piece]":
        """Equal parts of at most `most_s` seconds; total_s: length of the item."""
        end_s = total_s if self.end_s is None else self.end_s
        parts = 1 if most_s is None else max(1, math.ceil((end_s - self.start_s) / most_s - 1e-6))
        if parts == 1:
            return [self]
        step_s = (end_s - self.start_s) / parts
        edges = [self.start_s + step_s * index for index in range(parts)]
        return [Piece(a, b) for a, b in zip(edges, [*edges[1:], self.end_s], strict=True)]


@dataclass(frozen=True)
class Fingerprint:
    """Of what is seen or heard. bits: 32 bytes that near copies share all but a few bits of; values: the same coarsely,
    in steps of 1/255 of the range, so that a candidate can be confirmed; length_s: of the clip."""

    bits: bytes
    values: bytes
    length_s: float


@dataclass(frozen=True)
class Seen:
    """What a look at a piece found.

    facts: geometry, in the words of the prepared JSON (duration s, fps Hz, width, height, num_frames, sample_rate Hz,
    channels, num_samples). measures: numbers to filter by. faults: of FAULTS.
    picture: a small JPEG or PNG for a contact sheet.
    """

    facts: Mapping[str, float | int | str]
    measures: Mapping[str, float]
    fingerprint: Fingerprint
    faults: tuple[str, ...] = ()
    picture: bytes = b""


@dataclass(frozen=True)
class Encoded:
    """A media file made of a piece: its bytes, suffix with the dot, facts as in `Seen`, and what was done to it."""

    data: bytes
    suffix: str
    facts: Mapping[str, float | int | str]
    changes: tuple[str, ...] = field(default=())


class Medium(ABC):
    """Settings of one kind of media, and how its files are cut, measured and written. A frozen dataclass; picklable.

    Every method takes a path or the bytes of a media file and `name`, which errors name.
    All raise `mmdiff.data.media.MediaError` for a file that cannot be used.
    """

    extensions: ClassVar[tuple[str, ...]]
    tellers: ClassVar[Mapping[str, tuple[str, ...]]] = {}  # change by a data module -> its arguments that ask for it

    @abstractmethod
    def measures(self) -> Sequence[str]:
        """Names of the numbers that `look` gives with these settings."""

    @abstractmethod
    def pieces(self, source: MediaSource, name: str) -> tuple[list[Piece], float]:
        """(the stretches between scene changes, or the whole item; the item's length in seconds)."""

    @abstractmethod
    def look(self, source: MediaSource, name: str, piece: Piece, caption: str = "") -> Seen:
        """Facts, measures, faults and fingerprint of a piece. caption: for scores that compare with text."""

    @abstractmethod
    def encode(self, source: MediaSource, name: str, suffix: str, piece: Piece) -> Encoded:
        """The piece as a media file, its bytes untouched where there is nothing to change."""

    def key(self) -> str:
        """What besides the settings decides the output: versions of encoders, digests of weights."""
        return ""

    @abstractmethod
    def changes(self, facts: Mapping[str, Any], sample: Any) -> tuple[str, ...]:
        """What a decoder did to an item of these facts to make `sample` (see `mmdiff.data.clips.Sample`): of retimed,
        resized, cropped, padded, cut, resampled and mixed."""


def medium_path(name: str) -> str:
    """Class path of the medium that a package has added as `name`. Raises ValueError naming those that there are."""
    found = {entry.name: entry for entry in entry_points(group="mmdiff.media")}
    if name not in found:
        raise ValueError(f"media {name!r} is unknown; there are {', '.join(sorted(found))}")
    return found[name].value.replace(":", ".")


def medium_of(data: object) -> Medium | None:
    """The default medium of a data module: that of the package which its class, or a class under it, comes from."""
    names = {entry.name: entry for entry in entry_points(group="mmdiff.media")}
    for cls in type(data).__mro__:
        entry = names.get(cls.__module__.partition(".")[0])
        if entry is not None:
            medium: Medium = entry.load()()
            return medium
    return None
