"""Multistep sampling of a consistency model, whose one call already is a sample."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from .sampler import Estimate, Noise, Sampler, Step


@dataclass(frozen=True)
class Consistency(Sampler):
    """Jump to the estimate, add fresh noise up to the next level, jump again: one call a step.

    For a network trained so that D(x, sigma) is the end of the ODE's path through x, not the mean of x0.
    sigma_min: noise that the network leaves in its samples, 0.002 in the paper; so much less is added.
    Source: arXiv 2303.01469, algorithm 1.
    """

    sigma_min: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.sigma_min < math.inf:
            raise ValueError(f"sigma_min={self.sigma_min} must be a number from 0; the paper's models use 0.002")

    def walk(self, denoise: Estimate, x: Tensor, sigmas: list[float], noise: Noise) -> Iterator[Step]:
        for number, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
            x = x0 = denoise(x, sigma)
            if sigma_next > self.sigma_min:
                x = x0.add(noise(x0), alpha=math.sqrt(sigma_next**2 - self.sigma_min**2))
            yield Step(number, sigma, x, x0)
