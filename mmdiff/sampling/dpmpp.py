"""DPM-Solver++, deterministic: exponential integrators in lambda = -ln(sigma) on the estimate of x0.

Exact while the estimate does not change, so a step may be as long as the grid likes. A step that ends at 0 returns the
estimate. Source: arXiv 2211.01095.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .exponential import combine, lagrange_weights, moments
from .sampler import Estimate, Noise, Sampler, Step


@dataclass(frozen=True)
class DPMpp2S(Sampler):
    """DPM-Solver++(2S): second order, two calls of the denoiser a step (one if it ends at 0), no memory of past steps.

    r: where in the step, counted in ln(sigma), the second call is; 0.5 is the midpoint rule.
    Source: arXiv 2211.01095, algorithm 1.
    """

    r: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.r <= 1:
            raise ValueError(f"r={self.r} must lie between 0 (excluded) and 1; 0.5 is the midpoint rule")

    def walk(self, denoise: Estimate, x: Tensor, sigmas: list[float], noise: Noise) -> Iterator[Step]:
        for number, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
            x0 = mean = denoise(x, sigma)
            if sigma_next > 0:
                between = sigma * (sigma_next / sigma) ** self.r
                mean = torch.lerp(x0, denoise(torch.lerp(x0, x, between / sigma), between), 0.5 / self.r)
            x = torch.lerp(mean, x, sigma_next / sigma)
            yield Step(number, sigma, x, x0)


@dataclass(frozen=True)
class DPMpp2M(Sampler):
    """DPM-Solver++(2M): second order, deterministic, one call of the denoiser a step; it reuses the last estimate.

    The first step and a step that ends at 0 are of first order. Source: arXiv 2211.01095, algorithm 2.
    """

    def walk(self, denoise: Estimate, x: Tensor, sigmas: list[float], noise: Noise) -> Iterator[Step]:
        last: tuple[float, Tensor] | None = None  # the step before: h, the fall of ln(sigma), and its x0
        for number, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
            x0 = mean = denoise(x, sigma)
            if sigma_next > 0:
                h = math.log(sigma / sigma_next)
                if last is not None:
                    mean = torch.lerp(last[1], x0, 1 + h / (2 * last[0]))  # x0 extrapolated to the step's middle
                last = h, x0
            x = torch.lerp(mean, x, sigma_next / sigma)
            yield Step(number, sigma, x, x0)


@dataclass(frozen=True)
class DPMpp3M(Sampler):
    """DPM-Solver++(3M): third order, deterministic, one call of the denoiser a step; it reuses the last two estimates.

    The first step is of first order, the second of second; they cost little where sigma is large beside the data.
    Source: arXiv 2211.01095, eq. 9 with n = 3, integrated exactly. The published code has half of the second
    derivative's term, and second order (tests/test_sampling_diffusers.py shows it).
    """

    def walk(self, denoise: Estimate, x: Tensor, sigmas: list[float], noise: Noise) -> Iterator[Step]:
        past: list[tuple[float, Tensor]] = []  # ln(sigma) and x0, newest first
        for number, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
            x0 = mean = denoise(x, sigma)
            past = [(math.log(sigma), x0), *past[:2]]
            if sigma_next > 0:
                mean = extrapolated_mean(past, math.log(sigma / sigma_next))
            x = torch.lerp(mean, x, sigma_next / sigma)
            yield Step(number, sigma, x, x0)


def extrapolated_mean(past: list[tuple[float, Tensor]], h: float, rate: float = 1.0) -> Tensor:
    """Mean of the polynomial through `past` over the coming step, with the weight that the equation gives each time.

    past: ln(sigma) and x0, newest first. h: fall of ln(sigma). rate: 1 + eta of an SDE, 1 for the ODE.
    """
    nodes = [(past[0][0] - level) / h for level, _ in past]  # 0, then negative; 1 is the step's end
    return combine([x0 for _, x0 in past], lagrange_weights(nodes, moments(rate * h, len(nodes))))
