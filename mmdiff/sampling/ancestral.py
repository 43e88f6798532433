"""DDPM, DDIM and Euler: one step of first order."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .sampler import Estimate, Noise, Sampler, Step


@dataclass(frozen=True)
class Ancestral(Sampler):
    """One step of first order, with a share `eta` of the noise renewed.

    eta = 0: DDIM, and Euler for EDM and for rectified flow. eta = 1: DDPM (the posterior's "small" variance).
    One call of the denoiser a step. Source: arXiv 2010.02502, eq. 12 and 16, divided by alpha.
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta={self.eta} must lie between 0 (DDIM, deterministic) and 1 (DDPM)")

    def walk(self, denoise: Estimate, x: Tensor, sigmas: list[float], noise: Noise) -> Iterator[Step]:
        for number, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
            x0 = denoise(x, sigma)
            x = ancestral_step(x, x0, sigma, sigma_next, self.eta, noise)
            yield Step(number, sigma, x, x0)


def ancestral_step(x: Tensor, x0: Tensor, sigma: float, sigma_next: float, eta: float, noise: Noise) -> Tensor:
    """x at sigma_next, from x at sigma and the estimate x0 made there; `noise` is called only where some is renewed."""
    renewed = eta**2 * (1 - (sigma_next / sigma) ** 2)  # share of the variance, at most 1
    up, down = sigma_next * renewed**0.5, sigma_next * (1 - renewed) ** 0.5
    x = torch.lerp(x0, x, down / sigma)  # exact in float32 at sigma 1e5, where x + ds * d is not
    return x.add(noise(x), alpha=up) if up > 0 else x
