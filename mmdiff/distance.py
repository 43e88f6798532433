"""Distances between two sets of clips by their features, each with its interval, and features that need no training.

N clips, D features, B batch, C channels, `*axes` T and what follows it.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Frechet distance of the normal distributions with the means and covariances of (N, D) and (M, D).

    |mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), Dowson & Landau 1982, eq. 4, in float64 and in this
    symmetric form: never negative or complex, also for fewer clips than features. It is the distance that FID and FVD
    take of their networks' features. Few clips make it larger: compare sets of equal size alone.
    Raises ValueError unless both are (at least 2, D) and finite.
    """
    a, b = _checked(a, b)
    # Roots of covariances, X' / sqrt(N - 1): the trace of (A^1/2 B A^1/2)^1/2 is the sum of singular values of
    # their product, which loses no digits to squaring.
    roots = [(x - x.mean(0)) / math.sqrt(len(x) - 1) for x in (a, b)]
    trace = sum(float(root.square().sum()) for root in roots)
    roots = [torch.linalg.qr(root).R if len(root) > root.shape[1] else root for root in roots]  # of D rows at most
    cross = float(torch.linalg.svdvals(roots[0] @ roots[1].T).sum())
    return max(0.0, float((a.mean(0) - b.mean(0)).square().sum()) + trace - 2 * cross)


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Squared maximum mean discrepancy of features (N, D) and (M, D) for the kernel (x . y / D + 1)^3, in float64.

    The unbiased estimate, which KID and KVD take of their networks' features: its mean over sets of any size is the
    distance of their distributions, so that it may be negative where they are near (Binkowski et al. 2018,
    arXiv 1801.01401; Gretton et al. 2012, eq. 3). Raises ValueError unless both are (at least 2, D) and finite.
    """
    a, b = _checked(a, b)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:  # the mean over pairs of two
        k = kernel(x, x)
        return (k.sum() - k.trace()) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * kernel(a, b).mean())


def _checked(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    for name, features in (("a", a), ("b", b)):
        if features.ndim != 2 or len(features) < 2 or features.shape[1] != a.shape[-1]:
            raise ValueError(f"{name} has shape {tuple(features.shape)}; (N, D) with N >= 2 and equal D is needed")
        if not bool(torch.isfinite(features).all()):
            raise ValueError(f"{name} holds features that are not finite")
    return a.double(), b.double()


Distance = Callable[[Tensor, Tensor], float]
GROUPS = 20  # of the jackknife
SHARES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of the clips, at which the extrapolation looks
DRAWS = 4  # subsets of each share


@dataclass(frozen=True)
class Measured:
    """A distance between two sets of clips and how far it can be trusted.

    value: of these sets. low, high: 95 % interval of what other sets of these sizes have. infinite: extrapolated to
    sets without end, with its own interval. counts: clips in each set. protocol: whatever else decides the number, such
    as the features, the size, rate and level of clips.
    """

    name: str
    value: float
    low: float
    high: float
    infinite: float
    infinite_low: float
    infinite_high: float
    counts: tuple[int, int]
    protocol: str

    def __str__(self) -> str:
        numbers = f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"
        endless = f"{self.infinite:.4g} [{self.infinite_low:.4g}, {self.infinite_high:.4g}]"
        sizes = "/".join(map(str, self.counts))
        return f"{self.name} {numbers}, extrapolated {endless}; 95 %, {sizes} clips, {self.protocol}"


def measure(distance: Distance, a: Tensor, b: Tensor, *, protocol: str, seed: int = 0) -> Measured:
    """`distance` of features (N, D) and (M, D) with its interval and its value for sets without end.

    Intervals are the jackknife's, which leaves out a twentieth of each set in turn (Efron & Stein 1981): a bootstrap's
    repeated clips would make a Frechet distance larger. The extrapolation is the line through the distances of smaller
    subsets over 1 / their size, at 0 (Chong & Forsyth 2020, arXiv 1911.07023): a Frechet distance falls along it.
    Raises ValueError for fewer than 40 clips in a set.
    """
    if min(len(a), len(b)) < 2 * GROUPS:
        raise ValueError(f"sets of {len(a)} and {len(b)} clips; an interval needs {2 * GROUPS} or more in each")
    generator = torch.Generator().manual_seed(seed)
    a, b = (x[torch.randperm(len(x), generator=generator)] for x in (a, b))  # sets often come sorted

    def both(a: Tensor, b: Tensor) -> tuple[float, float]:
        return distance(a, b), _at_infinity(distance, a, b, seed)

    value, infinite = both(a, b)
    left_out = torch.tensor([both(_without(a, group), _without(b, group)) for group in range(GROUPS)])
    spread = left_out.double().std(0, correction=0) * math.sqrt(GROUPS - 1) * 1.959964
    (low, low_i), (high, high_i) = (
        (value + sign * float(spread[0]), infinite + sign * float(spread[1])) for sign in (-1, 1)
    )
    name = getattr(distance, "__name__", type(distance).__name__).replace("_distance", "")
    return Measured(name, value, low, high, infinite, low_i, high_i, (len(a), len(b)), protocol)


def _without(x: Tensor, group: int) -> Tensor:
    keep = torch.ones(len(x), dtype=torch.bool)
    keep[group::GROUPS] = False
    return x[keep]


def _at_infinity(distance: Distance, a: Tensor, b: Tensor, seed: int) -> float:
    """The distance over 1 / share of both sets, as a line, at 0."""
    generator = torch.Generator().manual_seed(seed)
    points = []
    for share in SHARES:
        for _ in range(DRAWS if share < 1 else 1):
            parts = (x[torch.randperm(len(x), generator=generator)[: round(share * len(x))]] for x in (a, b))
            points.append((1 / share, distance(*parts)))
    x, y = torch.tensor(points, dtype=torch.float64).T
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    return float(y.mean() - slope * x.mean())


class Extractor(nn.Module, ABC):
    """Features in which clips are compared: (B, C, T, ...) in [-1, 1] -> (B, D). `mmdiff eval --features` takes one."""

    @property
    @abstractmethod
    def protocol(self) -> str:
        """All of it that decides a distance: what it is, which weights, what it makes of size, length and rate."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor: ...


class RandomFeatures(Extractor):
    """Means over space and time of a convolutional network with random weights: (B, C, *axes) -> (B, 7 * width).

    They see edges, colours, texture and motion, and nothing that must be learnt; a yardstick for recipes on the same
    data, no measure of what people see. Three levels, each halves every axis.

    axes: 1 to 3. width: features of the first level, twice and four times as many of the next two.
    """

    def __init__(self, channels: int, axes: int, width: int = 16, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.axes = axes
        self.seed = seed
        sizes = [channels, width, 2 * width, 4 * width]
        for level, (c_in, c_out) in enumerate(itertools.pairwise(sizes)):
            weight = torch.randn(c_out, c_in, *[3] * axes, generator=generator) * math.sqrt(2 / (c_in * 3**axes))
            self.register_buffer(f"weight{level}", weight)

    @property
    def protocol(self) -> str:
        return f"random features, seed {self.seed}"

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        conv = (F.conv1d, F.conv2d, F.conv3d)[self.axes - 1]
        found = []
        for level in range(3):
            x = F.leaky_relu(conv(x, getattr(self, f"weight{level}"), stride=2, padding=1), 0.2)
            found.append(x.flatten(2).mean(2))
        return torch.cat(found, dim=1)
