"""What the network predicts, as four functions of sigma: D(x, sigma) = c_skip x + c_out F(c_in x, c_noise).

sigma is always the true noise-to-signal ratio sigma_t / alpha_t, and x = x0 + sigma * eps. A variance-preserving or a
flow model sees c_in * x, which is its own x_t. B batch, T time.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmdiff.sigmas import DDPM

SIGMA_FLOOR = 1e-4  # below it ln(sigma) stays put, so that a known part (sigma = 0) has a finite c_noise


class Precond(ABC):
    """Preconditioning of a network. Known parts have sigma 0: all four numbers stay finite there, and c_out is 0."""

    @abstractmethod
    def __call__(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """c_skip, c_out, c_in, c_noise, each of sigma's shape: (), (B,) or (B, T). sigma: float32, not negative.

        The network's own target (x0 - c_skip x) / c_out is 0 / 0 where sigma is 0; such parts count in no loss.
        """


@dataclass(frozen=True)
class Eps(Precond):
    """Network predicts the noise eps (DDPM). Source: arXiv 2006.11239, eq. 14.

    c_noise is the index of sigma in `table`, interpolated in ln(sigma) and clamped to [0, train_steps - 1].
    Refuses a table with zero terminal SNR: at sigma = inf x is the noise, and to know eps is to know nothing of x0.
    """

    table: DDPM = field(default_factory=DDPM)

    def __post_init__(self) -> None:
        if self.table.zero_terminal_snr:
            raise ValueError(
                "table with zero_terminal_snr=True: a network that predicts eps cannot be trained there; "
                "use mmdiff.precond.V (arXiv 2305.08891, sec. 3.2)"
            )

    def __call__(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        table = self.table.table.to(sigma.device, sigma.dtype)
        upper = torch.searchsorted(table, sigma.contiguous()).clamp(1, len(table) - 1)
        low, high = table[upper - 1], table[upper]
        index = upper - 1 + (sigma / low).log() / (high / low).log()  # -inf at sigma = 0, clamped below
        c_noise = index.clamp(0, len(table) - 1)
        return torch.ones_like(sigma), -sigma, 1 / _hypot(sigma, 1.0), c_noise


@dataclass(frozen=True)
class X0(Precond):
    """Network predicts the data x0; c_noise is the angle atan(sigma). Source: arXiv 2202.00512, sec. 4.

    A known part (sigma 0) is passed unchanged all the same: c_skip jumps from 0 to 1 there, and c_out from 1 to 0.
    """

    def __call__(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        known = (sigma == 0).to(sigma.dtype)
        return known, 1 - known, 1 / _hypot(sigma, 1.0), sigma.atan()


@dataclass(frozen=True)
class V(Precond):
    """Network predicts v = alpha eps - sigma_t x0; c_noise is the angle atan(sigma). Source: arXiv 2202.00512, app. D.

    The same as EDM(sigma_data=1) but for the sign of the target and for c_noise.
    """

    def __call__(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        norm = _hypot(sigma, 1.0)
        return norm**-2, -sigma / norm, 1 / norm, sigma.atan()


@dataclass(frozen=True)
class EDM(Precond):
    """Network's input and target have unit variance when the data has variance sigma_data^2.

    c_noise = ln(sigma) / 4, sigma held at 1e-4 from below (SIGMA_FLOOR). Source: arXiv 2206.00364, table 1.
    """

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        if not self.sigma_data > 0:
            raise ValueError(
                f"sigma_data={self.sigma_data} must be positive: the data's standard deviation, "
                "0.5 for pixels in [-1, 1], 1 for unit-variance latents"
            )

    def __call__(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        norm = _hypot(sigma, self.sigma_data)
        c_noise = sigma.clamp_min(SIGMA_FLOOR).log() / 4
        return (self.sigma_data / norm) ** 2, sigma * (self.sigma_data / norm), 1 / norm, c_noise


@dataclass(frozen=True)
class VE(Precond):
    """Network predicts sigma times the score of x, which is -eps (NCSN++): D = x + sigma F, Tweedie's formula.

    c_in is 1: the network sees x itself, whose size grows with sigma. c_noise = ln(sigma / 2), sigma held at 1e-4 from
    below. Source: arXiv 2011.13456, eq. 9; arXiv 2206.00364, table 1.
    """

    def __call__(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        one = torch.ones_like(sigma)
        return one, sigma.clone(), one, (sigma.clamp_min(SIGMA_FLOOR) / 2).log()


@dataclass(frozen=True)
class Flow(Precond):
    """Network predicts the velocity eps - x0 of rectified flow; c_noise is its time t = sigma / (1 + sigma).

    c_in x = x / (1 + sigma) = (1 - t) x0 + t eps. Source: arXiv 2209.03003, eq. 1 (time runs from data to noise here).
    """

    def __call__(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        alpha, t = 1 / (1 + sigma), sigma / (1 + sigma)
        return alpha, -t, alpha, t


def convert(prediction: Tensor, x: Tensor, sigma: Tensor, source: Precond, target: Precond) -> Tensor:
    """What a `target` network would have to predict for the same D as a `source` network that predicts `prediction`.

    D is eliminated: F' = ((c_skip - c_skip') x + c_out F) / c_out', the factors in float64. Exact up to the rounding of
    the two terms, which the formula itself enlarges where they cancel: eps from x0 at small sigma by 1 / sigma, x0 from
    eps at large sigma by sigma. V, Flow and EDM(1) turn into one another without loss at any sigma.

    prediction, x: (B, C, T, ...). sigma: (), (B,) or (B, T).
    Raises ValueError where a sigma is 0: D is x there whatever the network says, so nothing can be told from D.
    """
    exact = sigma.to("cpu", torch.float64)  # (c_skip - c_skip') cancels in float32; no float64 on some devices
    if not bool((exact > 0).all()):
        raise ValueError(f"sigma={exact.min():g} must be positive: a known part (sigma 0) has no prediction to convert")
    (skip, out, *_), (new_skip, new_out, *_) = source(exact), target(exact)
    of_x, of_prediction = (skip - new_skip) / new_out, out / new_out
    return expand_like(of_x.to(x), x) * x + expand_like(of_prediction.to(x), x) * prediction


def learned_log_variance(v: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """ln of the variance of x at sigma_next given x at sigma, between its two limits as the network's v says.

    v = -1 is the lower limit, of data that is a single point: sigma_next^2 (1 - sigma_next^2 / sigma^2), the one of
    `Ancestral(eta=1)`; v = 1 the upper one, of standard normal data: (sigma^2 - sigma_next^2) (1 + sigma_next^2) /
    (1 + sigma^2). Times alpha^2 at sigma_next they are beta-tilde and beta of a variance-preserving chain. Where
    sigma_next is 0 the lower limit is 0, which has no logarithm: half the upper one is taken (a linear table of 1000
    gives 0.55, the value that the paper clips to).

    v: (B, C, T, ...), the second half of a backbone's 2 C channels. sigma > sigma_next >= 0: (), (B,) or (B, T).
    Source: arXiv 2102.09672, eq. 15, with the factor (v + 1) / 2 of its code.
    """
    s, n = expand_like(sigma, v), expand_like(sigma_next, v)
    gap = ((s - n) * (s + n)).log()
    upper = gap + 2 * (_hypot(n, 1.0) / _hypot(s, 1.0)).log()
    lower = torch.where(n > 0, gap + 2 * (n / s).log(), upper - math.log(2))
    return torch.lerp(lower.expand_as(v), upper.expand_as(v), (v + 1) / 2)


def expand_like(value: Tensor, x: Tensor) -> Tensor:
    """(), (B,) or (B, T) -> shape that broadcasts to x (B, C, T, ...)."""
    if value.ndim == 0:
        return value
    if value.ndim == 2:
        value = value[:, None]  # (B, 1, T)
    return value.reshape(*value.shape, *(1,) * (x.ndim - value.ndim))


def _hypot(sigma: Tensor, other: float) -> Tensor:
    return torch.hypot(sigma, torch.full_like(sigma, other))  # sigma^2 alone would overflow half precision at 256
