"""Parts of the clip itself as a condition: first frames, last ones, any, a box; one model learns a mix of such tasks.

B batch, C channels, T time, `*axes` T and what follows it. Masks are bool, True where the clip is given.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .conditioning import Batch, Cond, Conditioner, Generators


@dataclass(frozen=True, kw_only=True)
class Part(ABC):
    """Which part of a clip is given, in a `share` of the items. Raises ValueError for a share outside 0..1."""

    share: float

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share={self.share} of {type(self).__name__} must lie in 0..1")

    @abstractmethod
    def mask(self, sizes: Sequence[int], generator: torch.Generator | None) -> Tensor:
        """Bool, of `sizes` (T, ...) or with sizes of 1 that stand for all. It leaves something to generate."""


@dataclass(frozen=True, kw_only=True)
class Ends(Part):
    """The first and the last time steps, as many as are drawn from these ranges, both ends included.

    first=[1, 1] trains image-to-video, with last=[1, 1] first-and-last-frame, first=[4, 8] continuation. Of a clip that
    is too short for both, one step is left to generate.
    """

    first: tuple[int, int] = (1, 1)
    last: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, (low, high) in (("first", self.first), ("last", self.last)):
            if not 0 <= low <= high:
                raise ValueError(f"{name}={[low, high]} must be two rising numbers of time steps from 0 up")
        if self.first[1] + self.last[1] == 0:
            raise ValueError("first=[0, 0], last=[0, 0] gives nothing; leave the part out")

    def mask(self, sizes: Sequence[int], generator: torch.Generator | None) -> Tensor:
        first, last = (_between(*bounds, generator) for bounds in (self.first, self.last))
        first = min(first, sizes[0] - 1)
        last = min(last, sizes[0] - 1 - first)
        place = torch.arange(sizes[0])
        return _along_time((place < first) | (place >= sizes[0] - last), sizes)


@dataclass(frozen=True, kw_only=True)
class Steps(Part):
    """Each time step with a probability that is drawn uniformly from 0..`most`: any frames."""

    most: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.most <= 1:
            raise ValueError(f"most={self.most} must be a probability above 0")

    def mask(self, sizes: Sequence[int], generator: torch.Generator | None) -> Tensor:
        given = torch.rand(sizes[0], generator=generator) < self.most * torch.rand((), generator=generator)
        given[_between(0, sizes[0] - 1, generator)] = False
        return _along_time(given, sizes)


@dataclass(frozen=True, kw_only=True)
class Every(Part):
    """Every n-th time step from the first on, n drawn from `steps`, both ends included: interpolation."""

    steps: tuple[int, int] = (2, 4)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.steps[0] <= self.steps[1]:
            raise ValueError(f"steps={list(self.steps)} must be two rising numbers from 2 up")

    def mask(self, sizes: Sequence[int], generator: torch.Generator | None) -> Tensor:
        given = torch.arange(sizes[0]) % _between(*self.steps, generator) == 0
        given[0] &= sizes[0] > 1
        return _along_time(given, sizes)


@dataclass(frozen=True, kw_only=True)
class Box(Part):
    """All but a box over the axes after time, whose sides are shares drawn from `size`, at all times: inpainting.

    outside: the box alone is given: outpainting. along_time: the box has a length of time too.
    """

    size: tuple[float, float] = (0.25, 0.75)
    outside: bool = False
    along_time: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.size[0] <= self.size[1] <= 1:
            raise ValueError(f"size={list(self.size)} must be two rising shares in 0..1, the first above 0")

    def mask(self, sizes: Sequence[int], generator: torch.Generator | None) -> Tensor:
        box = torch.ones(*sizes, dtype=torch.bool)
        for axis in range(0 if self.along_time or len(sizes) == 1 else 1, len(sizes)):
            low, high = self.size
            share = low + (high - low) * float(torch.rand((), generator=generator))
            side = min(max(1, round(share * sizes[axis])), max(1, sizes[axis] - 1))
            start = _between(0, sizes[axis] - side, generator)
            place = torch.arange(sizes[axis])
            inside = (place >= start) & (place < start + side)
            box &= inside.view(-1, *(1,) * (len(sizes) - 1 - axis))
        given = box if self.outside else ~box
        return given & ~given.all()


class Given(Conditioner):
    """Parts of the clip as concat: a channel that is 1 where the clip is given, and the clip there, 0 elsewhere.

    parts: what is given in training; in what their shares leave nothing is, so that the model also starts from nothing.
    What is given counts in no loss. In a cascade it is `batch["given"]` (B, C, *axes) where `batch["known"]`, bool
    (B, 1, *axes), is True: the parts of an `Edit` that are known. Without it, nothing is given.
    The backbone needs concat_channels = 1 + C. Guidance keeps what is given in both predictions.
    Raises ValueError for shares that add up to more than 1.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        super().__init__()
        if sum(part.share for part in parts) > 1 + 1e-9:
            raise ValueError(f"the shares of the parts, {[part.share for part in parts]}, add up to more than 1")
        self.parts = tuple(parts)

    def forward(self, batch: Batch, generators: Generators | None = None) -> Cond:
        clip = batch["given"] if "given" in batch else batch["latents"]
        if "known" in batch:
            known = batch["known"].to(clip.device).expand(len(clip), 1, *clip.shape[2:])
        elif self.training:
            known = self.drawn(clip, generators)
        else:
            known = torch.zeros(len(clip), 1, *clip.shape[2:], dtype=torch.bool, device=clip.device)
        shown = torch.where(known, clip, torch.zeros_like(clip))
        return Cond(concat=torch.cat([known.to(clip), shown], dim=1), known=known)

    def drawn(self, clip: Tensor, generators: Generators | None) -> Tensor:
        """What is given of each item in training, (B, 1, *axes)."""
        masks = []
        for item in range(len(clip)):
            generator = None if generators is None else generators[item]
            mask, left = torch.zeros(1, dtype=torch.bool), float(torch.rand((), generator=generator))
            for part in self.parts:
                if 0 <= left < part.share:
                    mask = part.mask(clip.shape[2:], generator)
                left -= part.share
            masks.append(mask.expand(clip.shape[2:]))
        return torch.stack(masks)[:, None].to(clip.device)

    def null(self, batch: Batch) -> Cond:
        return self(batch)


def _between(low: int, high: int, generator: torch.Generator | None) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


def _along_time(steps: Tensor, sizes: Sequence[int]) -> Tensor:
    """(T,) -> (T, 1, ...)."""
    return steps.view(-1, *(1,) * (len(sizes) - 1))
