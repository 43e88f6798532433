"""Euler and Heun with churn: algorithm 2 of EDM (arXiv 2206.00364)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from .sampler import Estimate, Noise, Sampler, Step


@dataclass(frozen=True, kw_only=True)
class _Churned(Sampler):
    """What Euler and Heun share: before a step they may raise the noise level from sigma to sigma (1 + gamma).

    s_churn: gamma is s_churn / steps, at most sqrt(2) - 1. 0 is deterministic; EDM uses 0 to 80.
    s_tmin, s_tmax: noise levels between which it happens, both included.
    s_noise: standard deviation of the noise added; EDM uses 1 to 1.007 against a denoiser's loss of detail.
    The four are checked: without s_churn the other three would do nothing, so a change of them is refused.
    """

    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.s_churn) and self.s_churn >= 0):
            raise ValueError(f"s_churn={self.s_churn} must be 0 (deterministic) or more; EDM uses up to 80")
        if not 0 <= self.s_tmin < self.s_tmax:
            raise ValueError(f"s_tmin={self.s_tmin}, s_tmax={self.s_tmax} must satisfy 0 <= s_tmin < s_tmax")
        if not 0 <= self.s_noise < math.inf:
            raise ValueError(f"s_noise={self.s_noise} must be a number from 0; 1 keeps the noise level true")
        if self.s_churn == 0 and (self.s_tmin, self.s_tmax, self.s_noise) != (0.0, math.inf, 1.0):
            raise ValueError(
                f"s_tmin={self.s_tmin}, s_tmax={self.s_tmax}, s_noise={self.s_noise} do nothing with s_churn=0; "
                "give s_churn too, e.g. 40"
            )

    def _churn(self, x: Tensor, sigma: float, steps: int, noise: Noise) -> tuple[Tensor, float]:
        """x with more noise, and its noise level (algorithm 2, lines 4 to 6)."""
        gamma = min(self.s_churn / steps, math.sqrt(2) - 1)
        if gamma == 0 or not self.s_tmin <= sigma <= self.s_tmax:
            return x, sigma
        return x.add(noise(x), alpha=self.s_noise * sigma * math.sqrt(gamma * (2 + gamma))), sigma * (1 + gamma)


@dataclass(frozen=True)
class Euler(_Churned):
    """First order, with churn: algorithm 2 of EDM without its second slope. Without churn it is `Ancestral(0)`.

    One call of the denoiser a step. Source: arXiv 2206.00364, algorithm 2; see `s_churn` and its companions there.
    """

    def walk(self, denoise: Estimate, x: Tensor, sigmas: list[float], noise: Noise) -> Iterator[Step]:
        for number, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
            x, sigma = self._churn(x, sigma, len(sigmas) - 1, noise)
            x0 = denoise(x, sigma)
            x = torch.lerp(x0, x, sigma_next / sigma)
            yield Step(number, sigma, x, x0)


@dataclass(frozen=True)
class Heun(_Churned):
    """Second order: Euler, then once more with the slope averaged over the step's two ends; with churn stochastic.

    clock: the time over which the slopes are averaged. sigma is EDM's, and good only while no step divides sigma by
        much. flow, t = sigma / (1 + sigma), stays good on flow, cosine and coarse grids.
    Two calls of the denoiser a step, one if it ends at 0.
    Source: arXiv 2206.00364, algorithm 1, and 2 for s_churn > 0.
    """

    clock: Literal["sigma", "flow"] = "sigma"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clock not in ("sigma", "flow"):
            raise ValueError(f"clock={self.clock!r} must be sigma (Karras grids) or flow (flow grids)")

    def walk(self, denoise: Estimate, x: Tensor, sigmas: list[float], noise: Noise) -> Iterator[Step]:
        for number, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
            x, sigma = self._churn(x, sigma, len(sigmas) - 1, noise)
            x0 = denoise(x, sigma)
            x_next = torch.lerp(x0, x, sigma_next / sigma)
            if sigma_next > 0:
                # the mean of the two slopes is the Euler step of this extrapolated estimate, in either clock
                weight = self._time(sigma) / (2 * self._time(sigma_next))
                mean = torch.lerp(x0, denoise(x_next, sigma_next), weight)
                x_next = torch.lerp(mean, x, sigma_next / sigma)
            x = x_next
            yield Step(number, sigma, x, x0)

    def _time(self, sigma: float) -> float:
        return sigma if self.clock == "sigma" else sigma / (1 + sigma)
