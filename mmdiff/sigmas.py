"""Noise grids to sample on: decreasing lists of sigma that end at 0.

sigma is always the true noise-to-signal ratio sigma_t / alpha_t (see `mmdiff.precond`).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor


def check_range(sigma_min: float, sigma_max: float) -> None:
    """Raise ValueError unless 0 < sigma_min < sigma_max < inf."""
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(
            f"sigma_min={sigma_min}, sigma_max={sigma_max} must satisfy 0 < sigma_min < sigma_max < inf; "
            "the usual pair is 0.002, 80"
        )


class Sigmas(ABC):
    """Rule that spreads a number of sampling steps over the noise levels."""

    def __call__(self, steps: int) -> Tensor:
        """(steps + 1,) float32 on the CPU, strictly decreasing, the last is 0. Raises ValueError if steps < 1."""
        if steps < 1:
            raise ValueError(f"steps={steps} must be at least 1; 20 to 50 is usual")
        return torch.cat([self.levels(steps), torch.zeros(1, dtype=torch.float64)]).float()

    @abstractmethod
    def levels(self, steps: int) -> Tensor:
        """(steps,) float64 on the CPU, strictly decreasing and positive: the grid without its final 0."""


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
        return _linspace(high, low, steps) ** self.rho


@dataclass(frozen=True)
class Flow(Sigmas):
    """Grid uniform in the flow time t = sigma / (1 + sigma), then multiplied by `shift`.

    A shift of t to `shift * t / (1 + (shift - 1) * t)` (arXiv 2403.03206, eq. 23) is a multiplication of sigma by
    `shift`; it happens here and nowhere else.
    t_max: the first t before the shift; below 1, because t = 1 is sigma = inf.
    """

    shift: float = 1.0
    t_max: float = 0.999

    def __post_init__(self) -> None:
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift={self.shift} must be positive; 1 is no shift, 3 is usual at high resolution")
        if not 0 < self.t_max < 1:
            raise ValueError(f"t_max={self.t_max} must lie between 0 and 1, both excluded (t = 1 is sigma = inf)")

    def levels(self, steps: int) -> Tensor:
        t = _linspace(self.t_max, 0.0, steps + 1)[:-1]
        return self.shift * t / (1 - t)


@dataclass(frozen=True)
class Cosine(Sigmas):
    """Grid uniform in the angle atan(sigma), where alpha = cos and sigma_t = sin: the grid of `precond.V`.

    Source: arXiv 2102.09672, eq. 17 (without its small offset); arXiv 2202.00512, app. D.
    """

    sigma_max: float = 1000.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_max < math.inf:
            raise ValueError(f"sigma_max={self.sigma_max} must be positive and finite; 1000 is usual")

    def levels(self, steps: int) -> Tensor:
        return _linspace(math.atan(self.sigma_max), 0.0, steps + 1)[:-1].tan()


@dataclass(frozen=True)
class DDPM(Sigmas):
    """Noise levels of a discrete DDPM: `table` holds them all, a grid is a subset of `steps` of them.

    schedule: of beta: linear (arXiv 2006.11239), scaled_linear (linear in sqrt(beta), latent diffusion), or cosine
        (arXiv 2102.09672, eq. 17, beta capped at 0.999; beta_start and beta_end are not used).
    spacing: which indices a grid takes (arXiv 2305.08891, table 2). trailing starts at the last; leading ends at 0 and
        starts a stride below the last, so it is poor for few steps; linspace takes both ends.
    """

    schedule: Literal["linear", "scaled_linear", "cosine"] = "linear"
    train_steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    spacing: Literal["leading", "trailing", "linspace"] = "trailing"

    def __post_init__(self) -> None:
        if self.schedule not in ("linear", "scaled_linear", "cosine"):
            raise ValueError(f"schedule={self.schedule!r} must be one of linear, scaled_linear, cosine")
        if self.spacing not in ("leading", "trailing", "linspace"):
            raise ValueError(f"spacing={self.spacing!r} must be one of leading, trailing, linspace")
        if self.train_steps < 2:
            raise ValueError(f"train_steps={self.train_steps} must be at least 2; 1000 is usual")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"beta_start={self.beta_start}, beta_end={self.beta_end} must satisfy 0 < beta_start <= beta_end < 1; "
                "1e-4, 0.02 is usual"
            )

    @cached_property
    def table(self) -> Tensor:
        """(train_steps,) float64 on the CPU: sigma of each index, increasing."""
        with torch.inference_mode(False):  # the cache outlives the caller's mode
            n = self.train_steps
            if self.schedule == "cosine":
                t = _linspace(0.0, 1.0, n + 1)
                bar = ((t + 0.008) / 1.008 * (math.pi / 2)).cos() ** 2
                beta = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
            elif self.schedule == "scaled_linear":
                beta = _linspace(self.beta_start**0.5, self.beta_end**0.5, n) ** 2
            else:
                beta = _linspace(self.beta_start, self.beta_end, n)
            log_alpha_bar = torch.log1p(-beta).cumsum(0)
            return (torch.expm1(-log_alpha_bar)).sqrt()  # sigma^2 = (1 - alpha_bar) / alpha_bar

    def indices(self, steps: int) -> Tensor:
        """(steps,) int64, decreasing: the table's indices that a grid of `steps` takes."""
        n = self.train_steps
        if not 1 <= steps <= n:
            raise ValueError(f"steps={steps} must lie between 1 and train_steps={n}; the table has no more levels")
        if self.spacing == "leading":
            return torch.arange(steps - 1, -1, -1) * (n // steps)
        if self.spacing == "trailing":
            return (n - torch.arange(steps, dtype=torch.float64) * (n / steps)).round().long() - 1
        return _linspace(n - 1, 0, steps).round().long()

    def levels(self, steps: int) -> Tensor:
        return self.table[self.indices(steps)]


def _linspace(start: float, end: float, n: int) -> Tensor:
    return torch.linspace(start, end, n, dtype=torch.float64, device="cpu")
