"""Which items are a batch: buckets of one shape, batch sizes of equal time, an order that (seed, epoch) alone decide.

T steps of time (frames or samples), H W pixels.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True, order=True)
class Shape:
    """What clips of one batch have in common: `steps` of T, `rate` of them a second, `size` (H, W) or (channels,).

    A rate of 0 is each file's own.
    """

    steps: int
    rate: float
    size: tuple[int, ...]

    @property
    def values(self) -> int:
        return self.steps * math.prod(self.size)

    def __str__(self) -> str:
        name = "x".join(map(str, (self.steps, *self.size)))
        return f"{name}@{self.rate:g}" if self.rate else name


@dataclass(frozen=True)
class Buckets:
    """Several shapes of clips in one data set. An item goes where the least of it is lost; a batch has one shape.

    steps: lengths to choose from, in frames or samples; durations_s: the same in seconds. The longest that the item
    fills is its own. rates: steps per second to choose from; the nearest, and lower where two are as near.
    sizes: (H, W) to choose from; the nearest in aspect, then in area. "own" is the item's own value, and None (default)
    leaves it as the data module's arguments say.
    The dearest bucket gets the data module's batch_size, and every other as many more clips as take the same time:
    costs: seconds of a clip by the bucket's name, such as {"16x64x64@8": 0.011}, as `python -m mmdiff.data.measure`
    prints them; without it time grows as values ** power, with T * H * W values (power 1: convolutions).
    Raises ValueError for a list that is empty or holds what is not above 0, or steps and durations_s together.
    """

    steps: list[int] | Literal["own"] | None = None
    durations_s: list[float] | None = None
    rates: list[float] | Literal["own"] | None = None
    sizes: list[tuple[int, int]] | Literal["own"] | None = None
    power: float = 1.0
    costs: dict[str, float] | None = None

    def __post_init__(self) -> None:
        if self.steps is not None and self.durations_s is not None:
            raise ValueError("buckets: steps and durations_s say the same in two ways; give one of them")
        for name in ("steps", "durations_s", "rates", "sizes"):
            values = getattr(self, name)
            if values is None or values == "own":
                continue
            if isinstance(values, str) or not values:
                raise ValueError(f"buckets: {name}={values!r} must be a list that is not empty, own, or left out")
            flat = [part for value in values for part in (value if name == "sizes" else [value])]
            if not all(math.isfinite(part) and part > 0 for part in flat):
                raise ValueError(f"buckets: {name}={values} holds what is not above 0")
        if not (math.isfinite(self.power) and self.power > 0):
            raise ValueError(f"buckets: power={self.power} is not above 0; 1 is time proportional to T * H * W")
        if self.costs is not None and not all(math.isfinite(cost) and cost > 0 for cost in self.costs.values()):
            raise ValueError(f"buckets: costs={self.costs} holds what is not above 0 seconds")

    def choose(self, own: Shape, asked: Shape) -> Shape:
        """The bucket of an item that is `own`, in a data module whose arguments say `asked`."""
        rate = asked.rate
        if self.rates == "own":
            rate = own.rate
        elif self.rates is not None:
            rate = min(sorted(self.rates), key=lambda value: abs(value - own.rate))
        seen = rate or own.rate
        there = math.floor(own.steps * seen / own.rate + 1e-6)  # steps that the item fills at this rate
        steps = asked.steps
        if self.steps == "own":
            steps = max(1, there)
        elif self.steps is not None or self.durations_s is not None:
            lengths = sorted(self.steps or [max(1, round(length * seen)) for length in self.durations_s or []])
            steps = max([length for length in lengths if length <= there], default=lengths[0])
        size = asked.size
        if self.sizes == "own":
            size = own.size
        elif self.sizes is not None:
            size = min((tuple(value) for value in self.sizes), key=lambda value: _unlike(value, own.size))
        return Shape(steps, rate, size)

    def batch_sizes(self, shapes: Sequence[Shape], batch_size: int) -> list[int]:
        """Clips of a batch of each shape. Raises ValueError naming a shape that `costs` lacks."""
        costs = [self._cost(shape) for shape in shapes]
        return [max(1, math.floor(batch_size * max(costs) / cost + 1e-9)) for cost in costs]

    def _cost(self, shape: Shape) -> float:
        if self.costs is None:
            return float(shape.values) ** self.power
        if str(shape) not in self.costs:
            raise ValueError(
                f"buckets: costs has no {shape}, only {', '.join(self.costs)}; measure again "
                "(python -m mmdiff.data.measure CONFIG) or leave costs out"
            )
        return self.costs[str(shape)]


def _unlike(size: Sequence[int], own: Sequence[int]) -> tuple[float, float]:
    """How far (H, W) is from the item's own: by aspect first, rounded so that equal aspects tie, then by area."""
    aspect = abs(math.log(size[1] / size[0]) - math.log(own[1] / own[0]))
    return round(aspect, 6), abs(math.log(math.prod(size)) - math.log(math.prod(own)))


@dataclass(frozen=True)
class Plan:
    """The batches of every epoch, each item in exactly one of them: a function of (seed, epoch) alone.

    groups: places of the items of each bucket. sizes: clips of a batch of each. shuffle: items within buckets, and then
    the batches of all buckets; without it every epoch goes in order.
    """

    groups: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    shuffle: bool
    seed: int

    def batches(self, epoch: int, world_size: int = 1) -> list[list[int]]:
        """The places of each batch of an epoch, over all ranks; rank r takes every world_size-th from r on.

        Their number is a multiple of `world_size`: the last large batches are halved until it is. Where all are single
        items, up to world_size - 1 of them are left out of this epoch.
        """
        generator = torch.Generator().manual_seed((self.seed * 100003 + epoch) % 2**63)
        batches: list[list[int]] = []
        for group, size in zip(self.groups, self.sizes, strict=True):
            order = torch.randperm(len(group), generator=generator).tolist() if self.shuffle else range(len(group))
            batches += [[group[place] for place in order[start : start + size]] for start in range(0, len(group), size)]
        if self.shuffle and len(self.groups) > 1:
            batches = [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]
        while len(batches) % world_size:
            most = max(map(len, batches))
            if most == 1:
                return batches[: len(batches) // world_size * world_size]
            place = max(index for index, batch in enumerate(batches) if len(batch) == most)
            half = -(-most // 2)
            batches[place : place + 1] = [batches[place][:half], batches[place][half:]]
        return batches

    def steps(self, world_size: int = 1) -> int:
        """Batches of an epoch on each rank."""
        return len(self.batches(0, world_size)) // world_size

    def digest(self, keys: Sequence[str]) -> str:
        """First 16 digits of the SHA-256 of everything that decides the batches of the items with these keys."""
        facts = json.dumps([self.groups, self.sizes, self.shuffle, self.seed, list(keys)])
        return hashlib.sha256(facts.encode()).hexdigest()[:16]


def bucketed(
    shapes: Mapping[int, Shape], buckets: Buckets, batch_size: int, *, shuffle: bool, seed: int
) -> tuple[Plan, list[Shape]]:
    """(the plan of items that have these shapes by their place, the shape of each of its groups)."""
    distinct = sorted(set(shapes.values()))
    groups = tuple(tuple(place for place, shape in shapes.items() if shape == one) for one in distinct)
    return Plan(groups, tuple(buckets.batch_sizes(distinct, batch_size)), shuffle, seed), distinct
