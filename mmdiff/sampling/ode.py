"""The probability-flow ODE with steps of adaptive length, through torchdiffeq."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from .sampler import Estimate, Noise, Sampler, Step


@dataclass(frozen=True)
class AdaptiveODE(Sampler):
    """Between any two levels of the grid as many steps as the tolerance needs; the step that ends at 0 is one of Euler.

    The equation is solved for z = x / sqrt(1 + sigma^2) in ln(sigma), whose size is that of the data everywhere. A
    grid of few levels is best: the solver begins anew at each. The batch shares its steps, and each step reads the
    error back to the host, as no other sampler does.
    rtol, atol: error allowed in one step: atol + rtol |z|, root mean square over a sample, of the batch's worst sample.
    method: dopri5, dopri8, bosh3 or adaptive_heun of torchdiffeq.
    Raises ValueError if torchdiffeq is not installed. Source: arXiv 2011.13456, section 4.3.
    """

    rtol: float = 1e-4
    atol: float = 1e-4
    method: Literal["dopri5", "dopri8", "bosh3", "adaptive_heun"] = "dopri5"

    def __post_init__(self) -> None:
        if not (0 < self.rtol < 1 and 0 < self.atol < 1):
            raise ValueError(f"rtol={self.rtol}, atol={self.atol} must lie between 0 and 1; 1e-4 is usual")
        if self.method not in ("dopri5", "dopri8", "bosh3", "adaptive_heun"):
            raise ValueError(f"method={self.method!r} must be dopri5, dopri8, bosh3 or adaptive_heun")

    def walk(self, denoise: Estimate, x: Tensor, sigmas: list[float], noise: Noise) -> Iterator[Step]:
        try:
            from torchdiffeq import odeint
        except ImportError as error:
            raise ValueError("AdaptiveODE needs torchdiffeq: pip install 'mmdiff[ode]'") from error

        def slope(level: Tensor, z: Tensor) -> Tensor:
            sigma = math.exp(float(level))
            norm = math.hypot(1.0, sigma)
            return (z / norm - denoise((z * norm).to(x.dtype), sigma)) / norm

        for number, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
            x0 = denoise(x, sigma)
            if sigma_next == 0:
                x = x0
            else:
                span = torch.tensor([math.log(sigma), math.log(sigma_next)], dtype=torch.float64, device=x.device)
                # step_t: a step ends at the segment's end. Else torchdiffeq steps over it and interpolates there, by a
                # polynomial whose error no tolerance bounds. first_step: its own guess calls the denoiser wherever the
                # first slope leads, where that is almost 0 at sigma = 0
                options = {"step_t": span[1:], "first_step": 1.0, "norm": worst_sample}
                z = x.double() / math.hypot(1.0, sigma)  # its closing polynomial cancels digits of float32
                z = odeint(slope, z, span, rtol=self.rtol, atol=self.atol, method=self.method, options=options)[-1]
                x = (z * math.hypot(1.0, sigma_next)).to(x.dtype)
            yield Step(number, sigma, x, x0)


def worst_sample(ratios: Tensor) -> Tensor:
    """Largest root mean square of the samples of a batch: an easy neighbour must not hide the error of a hard one."""
    return ratios.reshape(len(ratios), -1).square().mean(1).max().sqrt()
