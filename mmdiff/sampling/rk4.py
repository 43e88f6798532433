"""The Runge-Kutta method of fourth order, for measuring others and for the last digits of a likelihood."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .exponential import combine, lagrange_weights, moments
from .sampler import Estimate, Noise, Sampler, Step


@dataclass(frozen=True)
class RK4(Sampler):
    """Exponential RK4 in ln(sigma), fourth order, deterministic: four calls a step, one if it ends at 0.

    Exact while the estimate of x0 does not change, and so good on any grid, as the classic RK4 in sigma is not.
    Source: Cox and Matthews 2002, J. Comput. Phys. 176, eq. 26 to 29, for the equation dx/dlambda = -x + D.
    """

    def walk(self, denoise: Estimate, x: Tensor, sigmas: list[float], noise: Noise) -> Iterator[Step]:
        for number, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
            x0 = mean = denoise(x, sigma)
            if sigma_next > 0:
                middle, half = math.sqrt(sigma * sigma_next), math.sqrt(sigma_next / sigma)
                a = torch.lerp(x0, x, half)
                first = denoise(a, middle)
                second = denoise(torch.lerp(first, x, half), middle)
                last = denoise(torch.lerp(2 * second - x0, a, half), sigma_next)
                weights = lagrange_weights([0.0, 0.5, 1.0], moments(math.log(sigma / sigma_next), 3))
                mean = combine([x0, (first + second) / 2, last], weights)
            x = torch.lerp(mean, x, sigma_next / sigma)
            yield Step(number, sigma, x, x0)
