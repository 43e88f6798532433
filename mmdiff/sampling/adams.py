"""Adams-Bashforth: a polynomial through past noise predictions, integrated over the coming step."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from .exponential import falling_moments, lagrange_weights
from .sampler import Estimate, Noise, Sampler, Step


@dataclass(frozen=True)
class AdamsBashforth(Sampler):
    """Multistep on the noise prediction eps = (x - D) / sigma, dx = eps dsigma; one call of the denoiser a step.

    order: 1 to 3, reached after as many steps; 1 is Euler. A step that ends at 0 is of first order.
    clock: what the polynomial is of. log, ln(sigma), is DEIS ("log rho"); sigma is the classic method, k-diffusion's
        LMS, which like Heun in sigma wants a grid without long steps.
    Source: arXiv 2204.13902, eq. 14 and 15, and its appendix on rho-based methods.
    """

    order: int = 3
    clock: Literal["log", "sigma"] = "log"

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3):
            raise ValueError(f"order={self.order} must be 1 (Euler), 2 or 3; 3 is usual")
        if self.clock not in ("log", "sigma"):
            raise ValueError(f"clock={self.clock!r} must be log (DEIS) or sigma (LMS, for Karras grids)")
        if self.order == 1 and self.clock != "log":
            raise ValueError(f"clock={self.clock!r} does nothing with order=1, Euler; leave it out or raise the order")

    def walk(self, denoise: Estimate, x: Tensor, sigmas: list[float], noise: Noise) -> Iterator[Step]:
        past: list[tuple[float, Tensor]] = []  # sigma and eps, newest first
        for number, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
            x0 = denoise(x, sigma)
            eps = (x - x0) / sigma
            past = [(sigma, eps), *past[: self.order - 1]]
            x = torch.lerp(x0, x, sigma_next / sigma)  # Euler; what follows is small where eps hardly changes
            if sigma_next > 0:
                weights = self._weights([level for level, _ in past], sigma_next)
                for (_, other), weight in zip(past[1:], weights[1:], strict=True):
                    x = torch.add(x, other - eps, alpha=weight * (sigma_next - sigma))
            yield Step(number, sigma, x, x0)

    def _weights(self, levels: list[float], sigma_next: float) -> list[float]:
        """Of each past eps in its mean over the step; they sum to 1."""
        if self.clock == "sigma":
            nodes = [(levels[0] - level) / (levels[0] - sigma_next) for level in levels]
            return lagrange_weights(nodes, [1 / (k + 1) for k in range(len(nodes))])
        h = math.log(levels[0] / sigma_next)
        nodes = [math.log(levels[0] / level) / h for level in levels]
        return lagrange_weights(nodes, falling_moments(h, len(nodes)))
