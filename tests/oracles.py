"""Data whose exact denoiser, probability-flow path, mean and covariance are formulas, for tests and benchmarks.

A mixture of two Gaussians of equal, isotropic covariance is Gaussian across the axis through their means; along it the
probability-flow ODE is one-dimensional, and keeps the value of the distribution function.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmdiff.precond import Precond
from mmdiff.sampling import Denoise


@dataclass(frozen=True)
class Mixture:
    """share N(m + gap u, std^2) + (1 - share) N(m - gap u, std^2), u a unit vector, all in `dim` dimensions.

    gap = 0 is one Gaussian. Points have shape (B, dim).
    """

    dim: int
    std: float = 0.5
    gap: float = 1.0
    share: float = 0.3
    centre: Tensor = field(init=False, compare=False, repr=False)
    axis: Tensor = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        angles = torch.arange(1, self.dim + 1, dtype=torch.float64)
        object.__setattr__(self, "centre", 0.3 * angles.cos())
        object.__setattr__(self, "axis", angles.sin() / angles.sin().norm())

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The exact D(x, sigma), the mean of x0 given x. sigma of shape ()."""
        centre, axis = self.centre.to(x), self.axis.to(x)
        variance = self.std**2 + sigma**2
        if self.gap == 0:
            return torch.lerp(centre.expand_as(x), x, self.std**2 / variance)
        along = (x - centre) @ axis
        side = torch.tanh(self.gap * along / variance + math.log(self.share / (1 - self.share)) / 2)
        return (
            torch.lerp(centre.expand_as(x), x, self.std**2 / variance)
            + (self.gap * sigma**2 / variance * side)[:, None] * axis
        )

    def flow(self, x: Tensor, sigma: float, sigma_next: float) -> Tensor:
        """The exact solution of the probability-flow ODE from x at sigma to sigma_next, in float64."""
        here, there = math.hypot(self.std, sigma), math.hypot(self.std, sigma_next)
        moved = (x - self.centre) * (there / here)
        if self.gap == 0:
            return self.centre + moved
        along = (x - self.centre) @ self.axis
        end = self._quantile(*self._tails(along, here), there)
        return self.centre + moved + (end - along * (there / here))[:, None] * self.axis

    def sample(self, count: int, generator: torch.Generator, sigma: float = 0.0) -> Tensor:
        """(count, dim) float64 draws of x0 + sigma eps."""
        side = torch.where(torch.rand(count, generator=generator, dtype=torch.float64) < self.share, 1.0, -1.0)
        eps = torch.randn(count, self.dim, generator=generator, dtype=torch.float64)
        return self.centre + self.gap * side[:, None] * self.axis + math.hypot(self.std, sigma) * eps

    def mean(self) -> Tensor:
        return self.centre + (2 * self.share - 1) * self.gap * self.axis

    def covariance(self, sigma: float = 0.0) -> Tensor:
        spread = 4 * self.share * (1 - self.share) * self.gap**2
        eye = torch.eye(self.dim, dtype=torch.float64)
        return (self.std**2 + sigma**2) * eye + spread * torch.outer(self.axis, self.axis)

    def _tails(self, along: Tensor, std: float) -> tuple[Tensor, Tensor]:
        """Both tails of the distribution along the axis: each is accurate where it is small."""

        def tail(z: Tensor) -> Tensor:
            right, left = torch.special.ndtr((z - self.gap) / std), torch.special.ndtr((z + self.gap) / std)
            return self.share * right + (1 - self.share) * left

        def upper(z: Tensor) -> Tensor:
            right, left = torch.special.ndtr((self.gap - z) / std), torch.special.ndtr((-self.gap - z) / std)
            return self.share * right + (1 - self.share) * left

        return tail(along), upper(along)

    def _quantile(self, below: Tensor, above: Tensor, std: float) -> Tensor:
        """The point with these tails, by bisection on the smaller one."""
        low, high = torch.full_like(below, -self.gap - 12 * std), torch.full_like(below, self.gap + 12 * std)
        for _ in range(60):
            middle = (low + high) / 2
            under, over = self._tails(middle, std)
            left = torch.where(below < above, under < below, over > above)
            low, high = torch.where(left, middle, low), torch.where(left, high, middle)
        return (low + high) / 2


def through_network(denoise: Denoise, precond: Precond) -> Denoise:
    """The same D by way of a network F = (D - c_skip x) / c_out that sees c_in x, as a parametrisation makes it."""

    def wrapped(x: Tensor, sigma: Tensor) -> Tensor:
        c_skip, c_out, c_in, _ = precond(sigma)

        def network(scaled: Tensor) -> Tensor:
            return (denoise(scaled / c_in, sigma) - c_skip * (scaled / c_in)) / c_out

        return c_skip * x + c_out * network(c_in * x)

    return wrapped


def torch_noise(seed: int) -> Callable[[Tensor], Tensor]:
    """Noise from one generator, for batches of many points."""
    generator = torch.Generator().manual_seed(seed)
    return lambda like: torch.randn(like.shape, generator=generator, dtype=like.dtype)


def distance(got: Tensor, expected: Tensor) -> float:
    return (got - expected).abs().max().item()
