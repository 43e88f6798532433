"""A Brownian path over sigma that can be asked for at any level, in any number of steps, and is always the same.

A virtual Brownian tree (arXiv 2001.01328, section 4): the path is known where sigma is infinite and at the ends of a
fixed range; every other value is a bridge between two known ones, found by bisection, with a normal number that only
its place in the tree and the sample's own seed determine. Nothing is stored beyond the current branch.
"""

import hashlib
import math
import struct
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .sampler import Noise

HIGHEST = 2.0**24  # levels that the tree spans, from 2^24 = 1.7e7 down to 2^-24 = 6e-8
DEPTH = 14  # bisections of ln(sigma): leaves of 0.002


class Brownian:
    """The noise that the reverse SDE with `eta` adds between two levels.

    In the clock u = sigma^(-2 eta) the integral of that noise is a Brownian motion M(u), and a step to sigma_next adds
    sigma_next^(1 + eta) (M(u_next) - M(u)). So two half steps add exactly the noise of the whole one.
    seeds: 64-bit numbers, one for each sample of the batch. shape: of one sample.
    """

    def __init__(
        self, seeds: Sequence[int], shape: Sequence[int], eta: float, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.seeds, self.shape, self.eta, self.dtype, self.device = list(seeds), tuple(shape), eta, dtype, device
        self.branch: list[tuple[int, Tensor, Tensor]] = []  # node by node: its number, the path at its ends, scaled
        self.before: tuple[float, Tensor] | None = None  # the last level asked for, and the path there

    @classmethod
    def like(cls, x: Tensor, noise: Noise, eta: float) -> "Brownian":
        """A path of x's shape, seeded by 8 numbers for each sample that `noise` gives: equal noise, equal path.

        They are read back here, before the first step; the steps then wait for no device.
        """
        rows = noise(x.new_empty(x.shape[0], 8)).float().cpu().numpy()
        seeds = [int.from_bytes(hashlib.blake2b(row.tobytes(), digest_size=8).digest(), "little") for row in rows]
        return cls(seeds, x.shape[1:], eta, x.dtype, x.device)

    def __call__(self, sigma: float, sigma_next: float) -> Tensor:
        """What the step from sigma down to sigma_next adds: (B, *shape), variance sigma_next^2 (1 - e^(-2 eta h)).

        Raises ValueError unless 2^24 >= sigma > sigma_next >= 2^-24.
        """
        if not HIGHEST >= sigma > sigma_next >= 1 / HIGHEST:
            raise ValueError(
                f"sigma={sigma}, sigma_next={sigma_next} must fall within 1.7e7..6e-8 for Brownian noise; "
                "choose a grid within"
            )
        first = self._path(sigma)
        return (self._path(sigma_next) - first * (sigma_next / sigma) ** self.eta) * sigma_next

    def _path(self, sigma: float) -> Tensor:
        """M(u) / sqrt(u) at a level, which has unit variance everywhere."""
        if self.before is not None and self.before[0] == sigma:
            return self.before[1]
        level = -math.log(sigma)
        leaf, low, high = self._descend(level)
        ends = _bounds(leaf)
        if level in ends:
            value = (low, high)[ends.index(level)]
        elif self.before is not None and ends[0] < (between := -math.log(self.before[0])) < level:
            # two levels in one leaf, the second below the first: the path goes on from the first
            value = self._bridge(level, (between, ends[1]), self.before[1], high, _bits(sigma))
        else:
            value = self._bridge(level, ends, low, high, _bits(sigma))
        self.before = sigma, value
        return value

    def _descend(self, level: float) -> tuple[int, Tensor, Tensor]:
        """The leaf around `level` and the path at its two ends, from the part of the last branch that still holds."""
        if not self.branch:
            begin, end = _bounds(1)
            first = self._normal(0)
            fresh = self._normal(1)
            decay = math.exp(-self.eta * (end - begin))
            self.branch = [(1, first, first * decay + fresh * math.sqrt(1 - decay**2))]
        while len(self.branch) > 1 and not _bounds(self.branch[-1][0])[0] <= level < _bounds(self.branch[-1][0])[1]:
            self.branch.pop()
        while len(self.branch) <= DEPTH:
            node, low, high = self.branch[-1]
            begin, end = _bounds(node)
            middle = (begin + end) / 2
            value = self._bridge(middle, (begin, end), low, high, 2 * node)
            self.branch.append((2 * node, low, value) if level < middle else (2 * node + 1, value, high))
        return self.branch[-1]

    def _bridge(self, level: float, ends: tuple[float, float], low: Tensor, high: Tensor, key: int) -> Tensor:
        """The scaled path between two known places: it is stationary in ln(u), of correlation e^(-eta distance)."""
        apart = max(level - ends[0], 0.0) * self.eta, max(ends[1] - level, 0.0) * self.eta
        a, b = math.exp(-apart[0]), math.exp(-apart[1])
        free = -math.expm1(-2 * apart[0]), -math.expm1(-2 * apart[1]), -math.expm1(-2 * sum(apart))
        mean = low * (a * free[1] / free[2]) + high * (b * free[0] / free[2])
        return mean.add_(self._normal(key), alpha=math.sqrt(free[0] * free[1] / free[2]))

    def _normal(self, key: int) -> Tensor:
        """Standard normal numbers that `key` and the seeds determine, drawn on the CPU in float32."""
        rows = np.empty((len(self.seeds), *self.shape), np.float32)
        for row, seed in zip(rows, self.seeds, strict=True):
            generator = np.random.Generator(np.random.Philox(key=np.array([seed, key], np.uint64)))
            row[...] = generator.standard_normal(self.shape, np.float32)
        return torch.from_numpy(rows).to(self.device, self.dtype, non_blocking=True)


def _bounds(node: int) -> tuple[float, float]:
    """-ln(sigma) at the ends of a node: 1 is the whole range, 2 n and 2 n + 1 are the halves of n."""
    depth = node.bit_length() - 1
    width = 2 * math.log(HIGHEST) / 2**depth
    begin = (node - 2**depth) * width - math.log(HIGHEST)
    return begin, begin + width


def _bits(sigma: float) -> int:
    """A number for each level, apart from those of the nodes: the bits of a float64, whose highest but one is set."""
    return struct.unpack("<Q", struct.pack("<d", sigma))[0] | 1 << 63
