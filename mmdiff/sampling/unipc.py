"""UniPC: a multistep predictor whose next call of the denoiser also corrects the step before, at no extra cost."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from .exponential import combine, lagrange_weights, moments
from .sampler import Estimate, Noise, Sampler, Step


@dataclass(frozen=True)
class UniPC(Sampler):
    """UniPC-p, deterministic: predictor of order p, corrector one higher, one call of the denoiser a step.

    The first steps and a step that ends at 0 are of lower order; the last step is not corrected.
    order: 1, 2 or 3, the predictor's; with the corrector the global error falls as the power order + 1.
    variant: the function B(h) of the paper. It matters where weights are not solved for: in the predictor of order 2
        and the corrector of the first step. bh2 is the better one for few steps.
    Source: arXiv 2302.04867, algorithms 5 and 6, eq. 5 to 9.
    """

    order: int = 3
    variant: Literal["bh1", "bh2"] = "bh2"

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3):
            raise ValueError(f"order={self.order} must be 1, 2 or 3; 2 is usual with strong guidance, 3 without")
        if self.variant not in ("bh1", "bh2"):
            raise ValueError(f"variant={self.variant!r} must be bh1 or bh2")

    def walk(self, denoise: Estimate, x: Tensor, sigmas: list[float], noise: Noise) -> Iterator[Step]:
        past: list[tuple[float, Tensor]] = []  # ln(sigma) and x0, newest first
        before = x, sigmas[0]  # where the last step began
        for number, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
            x0 = mean = denoise(x, sigma)
            now = math.log(sigma), x0
            if past:
                x = torch.lerp(self._corrected(now, past), before[0], sigma / before[1])
            past, before = [now, *past[: self.order - 1]], (x, sigma)
            if sigma_next > 0:
                mean = self._predicted(past, math.log(sigma / sigma_next))
            x = torch.lerp(mean, x, sigma_next / sigma)
            yield Step(number, sigma, x, x0)

    def _predicted(self, past: list[tuple[float, Tensor]], h: float) -> Tensor:
        if len(past) == 2:
            half = self._half(h) * h / (past[1][0] - past[0][0])
            return torch.lerp(past[0][1], past[1][1], -half)
        return _mean(past, past[0][0], h)

    def _corrected(self, now: tuple[float, Tensor], past: list[tuple[float, Tensor]]) -> Tensor:
        h = past[0][0] - now[0]
        if len(past) == 1:
            return torch.lerp(past[0][1], now[1], self._half(h))
        return _mean([*past, now], past[0][0], h)

    def _half(self, h: float) -> float:
        """The weight 1/2 of the paper's simplified cases, in parts of 1 - e^(-h)."""
        return 0.5 if self.variant == "bh2" else 0.5 * h / -math.expm1(-h)


def _mean(points: list[tuple[float, Tensor]], begin: float, h: float) -> Tensor:
    """Mean over the step of length h from ln(sigma) = begin of the polynomial through all points."""
    nodes = [(begin - level) / h for level, _ in points]
    return combine([x0 for _, x0 in points], lagrange_weights(nodes, moments(h, len(nodes))))
