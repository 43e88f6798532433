"""Noise grids to sample on: decreasing lists of sigma that end at 0.

sigma is always the true noise-to-signal ratio sigma_t / alpha_t (see `mmdiff.precond`).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, Self

import torch
from torch import Tensor

from .tables import SCHEDULES, Schedule, betas, linspace, sigma_table, zero_terminal_snr


def check_range(sigma_min: float, sigma_max: float) -> None:
    """Raise ValueError unless 0 < sigma_min < sigma_max < inf."""
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(
            f"sigma_min={sigma_min}, sigma_max={sigma_max} must satisfy 0 < sigma_min < sigma_max < inf; "
            "the usual pair is 0.002, 80"
        )


class Shift(ABC):
    """Factor that sigma is multiplied by, as a function of how many positions share what a position shows.

    A larger clip shows the same content in more positions, whose noise averages out: it needs more noise to hide as
    much. Give it as the `shift` of a grid and of the density that trains for it (`mmdiff.density.Shifted`).
    """

    @abstractmethod
    def factor(self, shape: Sequence[int]) -> float:
        """The factor for a state of `shape` (T, ...): the axes that the network sees, latents for a latent model."""


@dataclass(frozen=True)
class ResolutionShift(Shift):
    """(positions / base) ** power: 1 at `base` positions (T * H * W of the state). Source: arXiv 2403.03206, eq. 23.

    power 0.5 keeps the error of a constant clip's mean; 0 is no dependence.
    """

    base: int
    power: float = 0.5

    def __post_init__(self) -> None:
        if self.base < 1:
            raise ValueError(f"base={self.base} must be at least 1: the number of positions that needs no shift")
        if not math.isfinite(self.power):
            raise ValueError(f"power={self.power} must be finite; 0.5 is the square root of the paper")

    def factor(self, shape: Sequence[int]) -> float:
        return (math.prod(shape) / self.base) ** self.power


@dataclass(frozen=True)
class LengthShift(Shift):
    """exp(mu), mu linear in the number of positions: base_mu at base_length, max_mu at max_length, and beyond both.

    The defaults are Flux's, whose lengths count tokens: 2 x 2 positions of its latents. Lengths here count positions.
    """

    base_length: int = 256
    max_length: int = 4096
    base_mu: float = 0.5
    max_mu: float = 1.15

    def __post_init__(self) -> None:
        if not 1 <= self.base_length < self.max_length:
            raise ValueError(
                f"base_length={self.base_length}, max_length={self.max_length} must satisfy "
                "1 <= base_length < max_length; 256, 4096 is usual"
            )
        if not (math.isfinite(self.base_mu) and math.isfinite(self.max_mu)):
            raise ValueError(f"base_mu={self.base_mu}, max_mu={self.max_mu} must be finite; 0.5, 1.15 is usual")

    def factor(self, shape: Sequence[int]) -> float:
        share = (math.prod(shape) - self.base_length) / (self.max_length - self.base_length)
        return math.exp(self.base_mu + share * (self.max_mu - self.base_mu))


def check_shift(shift: float | Shift) -> None:
    """Raise ValueError unless it is a Shift or a positive, finite number."""
    if not isinstance(shift, Shift) and not 0 < shift < math.inf:
        raise ValueError(f"shift={shift} must be positive; 1 is no shift, 3 is usual at high resolution")


def factor(shift: float | Shift) -> float:
    """The number that sigma is multiplied by. Raises ValueError for a Shift, which needs a size to give one."""
    if isinstance(shift, Shift):
        raise ValueError(f"shift={shift} depends on the clip's size: call .sized(shape) on the grid or density first")
    return shift


class Sigmas(ABC):
    """Rule that spreads a number of sampling steps over the noise levels."""

    def __call__(self, steps: int) -> Tensor:
        """(steps + 1,) float32 on the CPU, strictly decreasing, the last is 0.

        Raises ValueError if steps < 1, or where float32 cannot tell two levels apart.
        """
        if steps < 1:
            raise ValueError(f"steps={steps} must be at least 1; 20 to 50 is usual")
        sigmas = torch.cat([self.levels(steps), torch.zeros(1, dtype=torch.float64)]).float()
        if not (sigmas.isfinite().all() and (sigmas.diff() < 0).all()):
            raise ValueError(f"steps={steps}: levels of {self} are equal or infinite in float32; take fewer steps")
        return sigmas

    @abstractmethod
    def levels(self, steps: int) -> Tensor:
        """(steps,) float64 on the CPU, strictly decreasing and positive: the grid without its final 0."""

    def sized(self, shape: Sequence[int]) -> "Sigmas":
        """The grid for a state of `shape` (T, ...): itself, unless its shift depends on the size."""
        return self


class _Shifts(Sigmas):
    """Grid with a `shift`, the factor of all its levels; `unshifted` gives them without it."""

    shift: float | Shift

    def levels(self, steps: int) -> Tensor:
        return factor(self.shift) * self.unshifted(steps)  # a shift of any grid happens here and nowhere else

    @abstractmethod
    def unshifted(self, steps: int) -> Tensor:
        """As `levels`."""

    def sized(self, shape: Sequence[int]) -> Self:
        if not isinstance(self.shift, Shift):
            return self
        return replace(self, shift=self.shift.factor(shape))  # type: ignore[type-var]


@dataclass(frozen=True)
class Karras(Sigmas):
    """Grid uniform in sigma^(1/rho), from sigma_max to sigma_min. Source: arXiv 2206.00364, eq. 5."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        check_range(self.sigma_min, self.sigma_max)
        if not self.rho > 0:
            raise ValueError(f"rho={self.rho} must be positive; EDM uses 7, and 1 is a grid uniform in sigma")

    def levels(self, steps: int) -> Tensor:
        high, low = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        return linspace(high, low, steps) ** self.rho


@dataclass(frozen=True)
class Geometric(Sigmas):
    """Grid from sigma_max to sigma_min, ln(sigma) - ln(sigma_min) falling as r^rho with r uniform from 1 to 0.

    rho 1 is the geometric grid of variance-exploding models (arXiv 2011.13456, app. C), which k-diffusion calls
    exponential; another rho is its poly-exponential one, with more steps near sigma_min where rho > 1.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    rho: float = 1.0

    def __post_init__(self) -> None:
        check_range(self.sigma_min, self.sigma_max)
        if not 0 < self.rho < math.inf:
            raise ValueError(f"rho={self.rho} must be positive and finite; 1 is the geometric grid")

    def levels(self, steps: int) -> Tensor:
        low, high = math.log(self.sigma_min), math.log(self.sigma_max)
        return (low + (high - low) * linspace(1.0, 0.0, steps) ** self.rho).exp()


@dataclass(frozen=True)
class Flow(_Shifts):
    """Grid uniform in the flow time t = sigma / (1 + sigma), then multiplied by `shift`, a number or a `Shift`.

    A shift of t to `shift * t / (1 + (shift - 1) * t)` (arXiv 2403.03206, eq. 23) is a multiplication of sigma by
    `shift`.
    t_max: the first t before the shift; below 1, because t = 1 is sigma = inf.
    """

    shift: float | Shift = 1.0
    t_max: float = 0.999

    def __post_init__(self) -> None:
        check_shift(self.shift)
        if not 0 < self.t_max < 1:
            raise ValueError(f"t_max={self.t_max} must lie between 0 and 1, both excluded (t = 1 is sigma = inf)")

    def unshifted(self, steps: int) -> Tensor:
        t = linspace(self.t_max, 0.0, steps + 1)[:-1]
        return t / (1 - t)


@dataclass(frozen=True)
class Cosine(_Shifts):
    """Grid uniform in the angle atan(sigma), where alpha = cos and sigma_t = sin: the grid of `precond.V`.

    sigma_max: the first level, before the shift. shift: of ln(SNR) by -2 ln(shift), a number or a `Shift`; images of
    256 pixels a side, against 64, take 256 / 64 = 4 (arXiv 2301.11093, eq. 4 to 6).
    Source: arXiv 2102.09672, eq. 17 (without its small offset); arXiv 2202.00512, app. D.
    """

    sigma_max: float = 1000.0
    shift: float | Shift = 1.0

    def __post_init__(self) -> None:
        check_shift(self.shift)
        if not 0 < self.sigma_max < math.inf:
            raise ValueError(f"sigma_max={self.sigma_max} must be positive and finite; 1000 is usual")

    def unshifted(self, steps: int) -> Tensor:
        return linspace(math.atan(self.sigma_max), 0.0, steps + 1)[:-1].tan()


@dataclass(frozen=True)
class DDPM(Sigmas):
    """Noise levels of a discrete DDPM: `table` holds them all, a grid is a subset of `steps` of them.

    schedule: of beta, see `mmdiff.tables.betas`; cosine has no beta_start and beta_end, and refuses them.
    spacing: which indices a grid takes (arXiv 2305.08891, table 2). trailing starts at the last; leading ends at 0 and
        starts a stride below the last, so it is poor for few steps; linspace takes both ends.
    zero_terminal_snr: no signal at the last index (arXiv 2305.08891, algorithm 1), whose sigma is 1e5 for infinity;
        for a `precond.V`, `X0`, `EDM` or `Flow`: there the noise tells nothing of the data.
    """

    schedule: Schedule = "linear"
    train_steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    spacing: Literal["leading", "trailing", "linspace"] = "trailing"
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r} must be one of {', '.join(SCHEDULES)}")
        if self.spacing not in ("leading", "trailing", "linspace"):
            raise ValueError(f"spacing={self.spacing!r} must be one of leading, trailing, linspace")
        if self.train_steps < 2:
            raise ValueError(f"train_steps={self.train_steps} must be at least 2; 1000 is usual")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"beta_start={self.beta_start}, beta_end={self.beta_end} must satisfy 0 < beta_start <= beta_end < 1; "
                "1e-4, 0.02 is usual"
            )
        if self.schedule == "cosine" and (self.beta_start, self.beta_end) != (DDPM.beta_start, DDPM.beta_end):
            raise ValueError(
                f"beta_start={self.beta_start}, beta_end={self.beta_end} have no meaning with schedule='cosine', whose "
                "beta follows from alpha_bar; leave them out"
            )
        if self.zero_terminal_snr:
            _ = self.table  # raises where the schedule cannot be rescaled

    @cached_property
    def table(self) -> Tensor:
        """(train_steps,) float64 on the CPU: sigma of each index, increasing."""
        with torch.inference_mode(False):  # the cache outlives the caller's mode
            table = sigma_table(betas(self.schedule, self.train_steps, self.beta_start, self.beta_end))
            return zero_terminal_snr(table) if self.zero_terminal_snr else table

    def indices(self, steps: int) -> Tensor:
        """(steps,) int64, decreasing: the table's indices that a grid of `steps` takes."""
        n = self.train_steps
        if not 1 <= steps <= n:
            raise ValueError(f"steps={steps} must lie between 1 and train_steps={n}; the table has no more levels")
        if self.spacing == "leading":
            return torch.arange(steps - 1, -1, -1) * (n // steps)
        if self.spacing == "trailing":
            return (n - torch.arange(steps, dtype=torch.float64) * (n / steps)).round().long() - 1
        return linspace(n - 1, 0, steps).round().long()

    def levels(self, steps: int) -> Tensor:
        return self.table[self.indices(steps)]
