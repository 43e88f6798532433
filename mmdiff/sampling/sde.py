"""DPM-Solver++ of the reverse SDE: multistep, stochastic, with noise that does not depend on the number of steps."""

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from .brownian import Brownian
from .dpmpp import extrapolated_mean
from .sampler import Estimate, Noise, Sampler, Step


@dataclass(frozen=True)
class _MultistepSDE(Sampler):
    """dx = (1 + eta) (x - D) dln(sigma) + sqrt(2 eta) sigma dw, whose law at every sigma is that of x0 + sigma eps.

    Over a step of h = ln(sigma / sigma_next): x_next = q x + (1 - q) mean(D) + noise, q = e^(-(1 + eta) h),
    the noise of standard deviation sigma_next sqrt(1 - e^(-2 eta h)).
    """

    eta: float = 1.0
    memory: ClassVar[int]  # estimates of past steps that are kept

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 10:
            raise ValueError(f"eta={self.eta} must lie between 0 (the ODE) and 10; 1 renews noise as DDPM does")

    def walk(self, denoise: Estimate, x: Tensor, sigmas: list[float], noise: Noise) -> Iterator[Step]:
        brownian = Brownian.like(x, noise, self.eta) if self.eta > 0 and sigmas[1] > 0 else None
        past: list[tuple[float, Tensor]] = []  # ln(sigma) and x0, newest first
        for number, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
            x0 = mean = denoise(x, sigma)
            past = [(math.log(sigma), x0), *past[: self.memory]]
            if sigma_next > 0:
                mean = self._mean(past, math.log(sigma / sigma_next))
            x = torch.lerp(mean, x, (sigma_next / sigma) ** (1 + self.eta))
            if brownian is not None and sigma_next > 0:
                x = x + brownian(sigma, sigma_next)
            yield Step(number, sigma, x, x0)

    @abstractmethod
    def _mean(self, past: list[tuple[float, Tensor]], h: float) -> Tensor:
        """The estimate that stands for D over the coming step."""


@dataclass(frozen=True)
class DPMpp2MSDE(_MultistepSDE):
    """SDE-DPM-Solver++(2M): one call of the denoiser a step, with a share of the noise renewed as `eta` says.

    eta: 0 is `DPMpp2M`, 1 the reverse SDE of DDPM. The noise is a Brownian path over sigma that `noise` seeds, the same
    for every number of steps. The first step and one that ends at 0 are of first order.
    Source: arXiv 2211.01095, section 5 and eq. 18; eta as in k-diffusion.
    """

    memory = 1

    def _mean(self, past: list[tuple[float, Tensor]], h: float) -> Tensor:
        if len(past) == 1:
            return past[0][1]
        return torch.lerp(past[1][1], past[0][1], 1 + h / (2 * (past[1][0] - past[0][0])))


@dataclass(frozen=True)
class DPMpp3MSDE(_MultistepSDE):
    """The same with two past estimates and exact integrals. eta: 0 is `DPMpp3M`, 1 the reverse SDE of DDPM.

    Source: arXiv 2211.01095, section 5 and eq. 9 with n = 3; see `DPMpp3M` on the published code.
    """

    memory = 2

    def _mean(self, past: list[tuple[float, Tensor]], h: float) -> Tensor:
        return extrapolated_mean(past, h, 1 + self.eta)
