"""Noise distributions to train on: densities of sigma, each given by its quantile function.

sigma is always the true noise-to-signal ratio sigma_t / alpha_t (see `mmdiff.precond`).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmdiff.sigmas import DDPM, check_range


class SigmaDensity(ABC):
    """Distribution of the noise levels of training."""

    def sample(self, n: int, device: torch.device | str = "cpu", generator: torch.Generator | None = None) -> Tensor:
        """(n,) float32 on `device`, independent draws.

        generator: on any device; the numbers are drawn where it lives. None draws from torch's default generator of
        `device`, which Lightning's seed_everything seeds.
        """
        source = device if generator is None else generator.device
        u = torch.rand(n, device=source, generator=generator).clamp(2.0**-26, 1 - 2.0**-24)  # 0 would be sigma = 0
        return self.quantile(u).to(device)

    @abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """sigma below which a share u of the draws lies; of u's shape, 0 < u < 1."""


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
