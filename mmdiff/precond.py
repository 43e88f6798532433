"""What the network predicts, as four functions of sigma: D(x, sigma) = c_skip x + c_out F(c_in x, c_noise).

sigma is always the true noise-to-signal ratio sigma_t / alpha_t, and x = x0 + sigma * eps. A variance-preserving or a
flow model sees c_in * x, which is its own x_t. B batch, T time.
"""

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
    """

    table: DDPM = field(default_factory=DDPM)

    def __call__(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        table = self.table.table.to(sigma.device, sigma.dtype)
        upper = torch.searchsorted(table, sigma).clamp(1, len(table) - 1)
        low, high = table[upper - 1], table[upper]
        index = upper - 1 + (sigma / low).log() / (high / low).log()  # -inf at sigma = 0, clamped below
        c_noise = index.clamp(0, len(table) - 1)
        return torch.ones_like(sigma), -sigma, 1 / _hypot(sigma, 1.0), c_noise


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
class Flow(Precond):
    """Network predicts the velocity eps - x0 of rectified flow; c_noise is its time t = sigma / (1 + sigma).

    c_in x = x / (1 + sigma) = (1 - t) x0 + t eps. Source: arXiv 2209.03003, eq. 1 (time runs from data to noise here).
    """

    def __call__(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        alpha, t = 1 / (1 + sigma), sigma / (1 + sigma)
        return alpha, -t, alpha, t


def _hypot(sigma: Tensor, other: float) -> Tensor:
    return torch.hypot(sigma, torch.full_like(sigma, other))  # sigma^2 alone would overflow half precision at 256
