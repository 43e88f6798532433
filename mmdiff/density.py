"""Noise distributions to train on: densities of sigma, each given by its quantile function.

sigma is always the true noise-to-signal ratio sigma_t / alpha_t (see `mmdiff.precond`).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from mmdiff.sigmas import DDPM, Shift, check_range, check_shift, factor


class SigmaDensity(ABC):
    """Distribution of the noise levels of training."""

    def sample(self, n: int, device: torch.device | str = "cpu", generator: torch.Generator | None = None) -> Tensor:
        """(n,) float32 on `device`.

        generator: on any device; the numbers are drawn where it lives. None draws from torch's default generator of
        `device`, which Lightning's seed_everything seeds.
        """
        source = device if generator is None else generator.device
        u = self.uniform(n, source, generator).clamp(2.0**-26, 1 - 2.0**-24)  # 0 would be sigma = 0
        return self.quantile(u).to(device)

    def uniform(self, n: int, device: torch.device | str, generator: torch.Generator | None) -> Tensor:
        """(n,) float32 in [0, 1), each uniform: independent draws, unless the density says otherwise."""
        return torch.rand(n, device=device, generator=generator)

    @abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """sigma below which a share u of the draws lies; of u's shape, 0 < u < 1."""

    def weight(self, sigma: Tensor) -> Tensor:
        """Factor of the loss at sigma, of sigma's shape: 1, unless the density draws from another than it stands for.

        With it the mean loss is that of the density that is stood for, whichever levels are drawn more often.
        """
        return torch.ones_like(sigma)

    def sized(self, shape: Sequence[int]) -> "SigmaDensity":
        """The density for a state of `shape` (T, ...): itself, unless its shift depends on the size."""
        return self


@dataclass(frozen=True)
class LogNormal(SigmaDensity):
    """ln(sigma) ~ N(mean, std^2). The defaults are EDM's (arXiv 2206.00364, table 1).

    LogNormal(0, 1) is the logit-normal density of t = sigma / (1 + sigma) of rectified flow (arXiv 2403.03206, eq. 19).
    """

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and 0 < self.std < math.inf):
            raise ValueError(f"mean={self.mean} must be finite and std={self.std} positive; EDM uses -1.2, 1.2")

    def quantile(self, u: Tensor) -> Tensor:
        return (self.mean + self.std * torch.special.ndtri(u)).exp()


@dataclass(frozen=True)
class LogUniform(SigmaDensity):
    """ln(sigma) uniform from ln(sigma_min) to ln(sigma_max). Source: arXiv 2011.13456, app. C (variance exploding)."""

    sigma_min: float
    sigma_max: float

    def __post_init__(self) -> None:
        check_range(self.sigma_min, self.sigma_max)

    def quantile(self, u: Tensor) -> Tensor:
        return torch.lerp(
            torch.full_like(u, math.log(self.sigma_min)), torch.full_like(u, math.log(self.sigma_max)), u
        ).exp()


@dataclass(frozen=True)
class Uniform(SigmaDensity):
    """Flow time t = sigma / (1 + sigma) uniform from t_min to t_max: rectified flow. Source: arXiv 2209.03003, eq. 1.

    A part of [0, 1] trains an expert for some of the noise levels.
    """

    t_min: float = 0.0
    t_max: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.t_min < self.t_max <= 1:
            raise ValueError(f"t_min={self.t_min}, t_max={self.t_max} must satisfy 0 <= t_min < t_max <= 1")

    def quantile(self, u: Tensor) -> Tensor:
        width = self.t_max - self.t_min
        return (self.t_min + width * u) / ((1 - self.t_max) + width * (1 - u))


@dataclass(frozen=True)
class Mode(SigmaDensity):
    """Flow time t with its mode at 1/2 (scale > 0) or at both ends (scale < 0). Source: arXiv 2403.03206, eq. 20.

    scale: from -1 to 2 / (pi - 2) = 1.75; 0 is `Uniform`, and the paper's best is 1.29.
    """

    scale: float = 1.29

    def __post_init__(self) -> None:
        if not -1 <= self.scale <= 2 / (math.pi - 2):
            raise ValueError(f"scale={self.scale} must lie between -1 and 2 / (pi - 2) = 1.75, or t would turn back")

    def quantile(self, u: Tensor) -> Tensor:
        return self._time(u) / self._time(1 - u)  # t(1 - u) = 1 - t(u), without its cancellation

    def _time(self, u: Tensor) -> Tensor:
        return (1 + self.scale) * u - self.scale * (u * (math.pi / 2)).sin() ** 2


@dataclass(frozen=True)
class Cosine(SigmaDensity):
    """Angle atan(sigma) uniform between those of sigma_min and sigma_max: the density of `precond.V`.

    Source: arXiv 2102.09672, eq. 17 (without its small offset), t uniform.
    """

    sigma_min: float = 0.001
    sigma_max: float = 1000.0

    def __post_init__(self) -> None:
        check_range(self.sigma_min, self.sigma_max)

    def quantile(self, u: Tensor) -> Tensor:
        low, high = math.atan(self.sigma_min), math.atan(self.sigma_max)
        return (low + (high - low) * u).tan()


@dataclass(frozen=True)
class Table(SigmaDensity):
    """Uniform over the levels of a DDPM table. Source: arXiv 2006.11239, algorithm 1."""

    table: DDPM = field(default_factory=DDPM)

    def quantile(self, u: Tensor) -> Tensor:
        levels = self.table.table.to(u.device, u.dtype)
        return levels[(u * len(levels)).long().clamp(max=len(levels) - 1)]


@dataclass(frozen=True)
class Shifted(SigmaDensity):
    """Another density with every level multiplied by `shift`, a number or a `Shift`: what `Flow(shift)` samples on.

    Of a LogNormal it adds ln(shift) to the mean; of a Cosine it is the shifted cosine (arXiv 2301.11093, eq. 4).
    """

    density: SigmaDensity
    shift: float | Shift

    def __post_init__(self) -> None:
        check_shift(self.shift)

    def uniform(self, n: int, device: torch.device | str, generator: torch.Generator | None) -> Tensor:
        return self.density.uniform(n, device, generator)

    def quantile(self, u: Tensor) -> Tensor:
        return factor(self.shift) * self.density.quantile(u)

    def weight(self, sigma: Tensor) -> Tensor:
        return self.density.weight(sigma / factor(self.shift))

    def sized(self, shape: Sequence[int]) -> "Shifted":
        inner = self.density.sized(shape)
        if inner is self.density and not isinstance(self.shift, Shift):
            return self
        return Shifted(inner, self.shift.factor(shape) if isinstance(self.shift, Shift) else self.shift)


@dataclass(frozen=True)
class Stratified(SigmaDensity):
    """Another density, its n draws spread evenly: one in each n-th of the probability, all moved by one random offset.

    Each draw alone follows the density, so the loss has the same mean; its variance over batches falls. Source: arXiv
    2107.00630, app. I.1.
    """

    density: SigmaDensity

    def uniform(self, n: int, device: torch.device | str, generator: torch.Generator | None) -> Tensor:
        offset = torch.rand((), device=device, generator=generator)
        return (offset + torch.arange(n, device=device) / max(n, 1)) % 1

    def quantile(self, u: Tensor) -> Tensor:
        return self.density.quantile(u)

    def weight(self, sigma: Tensor) -> Tensor:
        return self.density.weight(sigma)

    def sized(self, shape: Sequence[int]) -> "Stratified":
        inner = self.density.sized(shape)
        return self if inner is self.density else Stratified(inner)


@dataclass(frozen=True)
class Importance(SigmaDensity):
    """Another density, some of its levels drawn more often and weighted down for it, so that the loss is unbiased.

    shares: relative numbers of draws, one for each of len(shares) bins of equal probability under `density`, from low
        to high noise. The variance is least where they follow the square root of the mean squared loss in each bin
        (arXiv 2102.09672, eq. 18). None may be 0: the loss there would be lost.
    """

    density: SigmaDensity
    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shares", tuple(self.shares))
        if len(self.shares) < 2 or not all(0 < share < math.inf for share in self.shares):
            raise ValueError(f"shares={self.shares} must be at least two positive numbers, one for each bin")

    @cached_property
    def _bins(self) -> tuple[Tensor, Tensor, Tensor]:
        """Lowest sigma of each bin but the first; ends (bins + 1,) of the bins in u, and in the draws' own uniform."""
        with torch.inference_mode(False):  # the cache outlives the caller's mode
            drawn = torch.tensor((0.0, *self.shares), dtype=torch.float64, device="cpu").cumsum(0)
            shares = torch.arange(1, len(self.shares), dtype=torch.float64, device="cpu") / len(self.shares)
            # A level of a table may lie across an edge. It falls into the bin above, whole, so look where it begins,
            # and set the edge a little below it, so that rounding leaves it there.
            edges = self.density.quantile(shares) * (1 - 1e-6)
            low, high = torch.zeros_like(edges), torch.ones_like(edges)
            for _ in range(60):
                middle = (low + high) / 2
                below = self.density.quantile(middle) < edges
                low, high = torch.where(below, middle, low), torch.where(below, high, middle)
            begins = torch.cat([drawn[:1], low, torch.ones_like(drawn[:1])])
            if not (begins.diff() > 1e-9).all():
                raise ValueError(f"shares={self.shares}: {self.density} has fewer levels than these bins; give fewer")
            return edges, begins, drawn / drawn[-1]

    def uniform(self, n: int, device: torch.device | str, generator: torch.Generator | None) -> Tensor:
        return self.density.uniform(n, device, generator)

    def quantile(self, u: Tensor) -> Tensor:
        _, begins, drawn = (part.to(u.device, u.dtype) for part in self._bins)
        index = (torch.searchsorted(drawn, u, right=True) - 1).clamp(0, len(self.shares) - 1)
        inside = (u - drawn[index]) / (drawn[index + 1] - drawn[index])
        eps = torch.finfo(u.dtype).eps
        return self.density.quantile(torch.lerp(begins[index], begins[index + 1], inside).clamp(eps**2, 1 - eps / 2))

    def weight(self, sigma: Tensor) -> Tensor:
        edges, begins, drawn = (part.to(sigma.device) for part in self._bins)
        ratio = (begins.diff() / drawn.diff()).to(sigma.dtype)
        return ratio[torch.searchsorted(edges.to(sigma.dtype), sigma, right=True)] * self.density.weight(sigma)

    def sized(self, shape: Sequence[int]) -> "Importance":
        inner = self.density.sized(shape)
        return self if inner is self.density else replace(self, density=inner)  # itself has its bins already
