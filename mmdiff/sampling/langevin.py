"""Samplers that walk about at each noise level, by Langevin dynamics with the score (D - x) / sigma^2."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .ancestral import ancestral_step
from .sampler import Estimate, Noise, Sampler, Step


def langevin_step(x: Tensor, x0: Tensor, sigma: float, snr: float, noise: Noise) -> Tensor:
    """x + a score + sqrt(2 a) z at one level, a = 2 (snr sigma)^2; x0 = D(x, sigma).

    Song et al. take a = 2 (snr |z| / |score|)^2, where |z| / |score| is near sigma. With sigma itself no sample
    depends on its batch, and the size of a step does not depend on the noise that it adds.
    """
    share = 2 * snr**2
    return torch.lerp(x, x0, share).add(noise(x), alpha=math.sqrt(2 * share) * sigma)


def _check(snr: float, name: str, count: int) -> None:
    if not 0 < snr <= 0.5:
        raise ValueError(f"snr={snr} must lie between 0 (excluded) and 0.5; 0.16 is usual, beyond 0.7 steps diverge")
    if count < 1:
        raise ValueError(f"{name}={count} must be at least 1")


@dataclass(frozen=True)
class Langevin(Sampler):
    """Annealed Langevin dynamics: `repeats` steps at each level, then the next level; at the end the estimate of x0.

    repeats: at each level of the grid, also at a last one above 0. snr: size of a step, see `langevin_step`.
    Biased by the size of its steps: a noise level's variance comes out up to 1 + snr^2 times too large.
    Source: Song and Ermon, arXiv 1907.05600, algorithm 1; the closing denoising step is arXiv 2009.05475's.
    """

    repeats: int = 5
    snr: float = 0.16

    def __post_init__(self) -> None:
        _check(self.snr, "repeats", self.repeats)

    def walk(self, denoise: Estimate, x: Tensor, sigmas: list[float], noise: Noise) -> Iterator[Step]:
        for number, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
            for _ in range(self.repeats):
                x = langevin_step(x, denoise(x, sigma), sigma, self.snr, noise)
            x0 = denoise(x, sigma)
            if sigma_next == 0:
                x = x0
            elif number == len(sigmas) - 2:
                for _ in range(self.repeats):
                    x = langevin_step(x, denoise(x, sigma_next), sigma_next, self.snr, noise)
            yield Step(number, sigma, x, x0)


@dataclass(frozen=True)
class PredictorCorrector(Sampler):
    """A step down, then `corrections` Langevin steps at the new level: 1 + corrections calls a step, 1 if it ends at 0.

    eta: of the step down, as in `Ancestral`: 1 is the ancestral predictor, 0 the probability-flow ODE.
    corrections: at each level above 0. snr: size of a Langevin step.
    Source: Song et al., arXiv 2011.13456, algorithms 1 and 2.
    """

    eta: float = 1.0
    corrections: int = 1
    snr: float = 0.16

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta={self.eta} must lie between 0 (probability-flow ODE) and 1 (ancestral)")
        _check(self.snr, "corrections", self.corrections)

    def walk(self, denoise: Estimate, x: Tensor, sigmas: list[float], noise: Noise) -> Iterator[Step]:
        for number, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
            x0 = denoise(x, sigma)
            x = ancestral_step(x, x0, sigma, sigma_next, self.eta, noise)
            if sigma_next > 0:
                for _ in range(self.corrections):
                    x = langevin_step(x, denoise(x, sigma_next), sigma_next, self.snr, noise)
            yield Step(number, sigma, x, x0)
