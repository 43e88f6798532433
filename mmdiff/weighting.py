"""How much an error counts in training: its distance, and its weight at each noise level.

The loss is a distance on the network's own target. With D = c_skip x + c_out F its square is |D - x0|^2 / c_out^2, so a
weight of |D - x0|^2 that a paper gives becomes that weight times c_out^2 here, whatever the network predicts. SNR is
1 / sigma^2. B batch, C channels, T time; sigma (B,) or (B, T), positive: known parts count in no loss.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .precond import Precond
from .sigmas import DDPM


class Distance(ABC):
    """Distance of a prediction from its target: `whole` of the mean of `element` over all that shares a noise level."""

    @abstractmethod
    def element(self, error: Tensor) -> Tensor:
        """Of each element; error: prediction minus target, of any shape."""

    def whole(self, mean: Tensor) -> Tensor:
        """Of all the elements, from their mean."""
        return mean


@dataclass(frozen=True)
class MSE(Distance):
    """Mean square."""

    def element(self, error: Tensor) -> Tensor:
        return error.square()


@dataclass(frozen=True)
class L1(Distance):
    """Mean absolute value."""

    def element(self, error: Tensor) -> Tensor:
        return error.abs()


@dataclass(frozen=True)
class PseudoHuber(Distance):
    """sqrt(m + c^2) - c of the mean square m: m / 2c where the error is far below c, its root where it is far above.

    The paper's distance of n elements, sqrt(|e|^2 + n c^2) - sqrt(n) c, divided by sqrt(n); its c = 0.00054 sqrt(n) is
    0.00054 here. Source: arXiv 2310.14189, sec. 3.3.
    """

    c: float = 0.00054

    def __post_init__(self) -> None:
        _check_positive("c", self.c, "0.00054 is the paper's")

    def element(self, error: Tensor) -> Tensor:
        return error.square()

    def whole(self, mean: Tensor) -> Tensor:
        return mean / ((mean + self.c**2).sqrt() + self.c)  # the difference without its cancellation


class Weighting(ABC):
    """Weight of a distance at its noise level."""

    @abstractmethod
    def weigh(self, error: Tensor, sigma: Tensor, precond: Precond) -> Tensor:
        """The weighted error, of the shape that error and sigma share, (B,) or (B, T). sigma is positive."""


@dataclass(frozen=True)
class Natural(Weighting):
    """No weight: the network's own target counts alike at every level. For Eps it is L_simple (2006.11239, eq. 14)."""

    def weigh(self, error: Tensor, sigma: Tensor, precond: Precond) -> Tensor:
        return error


class OfEstimate(Weighting):
    """A weight that is given for the square error of the estimate, |D - x0|^2."""

    @abstractmethod
    def of_estimate(self, sigma: Tensor) -> Tensor:
        """Weight of |D - x0|^2 at sigma, of sigma's shape."""

    def weigh(self, error: Tensor, sigma: Tensor, precond: Precond) -> Tensor:
        return error * self.of_estimate(sigma) * precond(sigma)[1].square()


@dataclass(frozen=True)
class MinSNR(OfEstimate):
    """min(SNR, gamma): low noise, whose SNR is huge, does not outweigh the rest. Source: arXiv 2303.09556, sec. 3.4.

    Times c_out^2 it is min(SNR, gamma) / SNR for Eps, / (SNR + 1) for V, and the same on the estimate for all.
    """

    gamma: float = 5.0

    def __post_init__(self) -> None:
        _check_positive("gamma", self.gamma, "5 is the paper's")

    def of_estimate(self, sigma: Tensor) -> Tensor:
        return sigma.pow(-2).clamp(max=self.gamma)


@dataclass(frozen=True)
class P2(OfEstimate):
    """SNR / (k + SNR)^gamma: the eps loss with low noise, which shows only fine detail, weighted down.

    gamma: 0 is the eps loss itself, 1 the paper's. Source: arXiv 2204.00227.
    """

    gamma: float = 1.0
    k: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.gamma < math.inf:
            raise ValueError(f"gamma={self.gamma} must be 0 or positive; 1 is the paper's")
        _check_positive("k", self.k, "1 is the paper's")

    def of_estimate(self, sigma: Tensor) -> Tensor:
        snr = sigma.pow(-2)
        return snr * (self.k + snr) ** -self.gamma


@dataclass(frozen=True)
class EDM(OfEstimate):
    """1 / sigma^2 + 1 / sigma_data^2; with `precond.EDM` of the same sigma_data it is no weight.

    Source: arXiv 2206.00364, table 1 (lambda).
    """

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        _check_positive("sigma_data", self.sigma_data, "the data's standard deviation, 0.5 for pixels")

    def of_estimate(self, sigma: Tensor) -> Tensor:
        return sigma.pow(-2) + self.sigma_data**-2


@dataclass(frozen=True)
class ELBO(OfEstimate):
    """SNR / 2: the diffusion part of the variational bound, in nats for each unit of ln(SNR), in continuous time.

    Under a density that is uniform in ln(sigma) (`LogUniform`), the mean loss times 2 ln(sigma_max / sigma_min) is that
    part of the bound, in nats per dimension. Source: arXiv 2107.00630, sec. 5.
    """

    def of_estimate(self, sigma: Tensor) -> Tensor:
        return sigma.pow(-2) / 2


@dataclass(frozen=True)
class Sigmoid(OfEstimate):
    """SNR sigmoid(bias - ln(SNR)): the eps loss, fading where the noise is low.

    bias: ln(SNR) at which it has faded to a half; lower asks for less detail. The papers state it for a density that is
    uniform in ln(SNR): with another density, that density multiplies it, as it does every weight.
    Source: arXiv 2303.00848 and 2410.19324.
    """

    bias: float = 0.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.bias):
            raise ValueError(f"bias={self.bias} must be finite; 0 fades where signal and noise are of one size")

    def of_estimate(self, sigma: Tensor) -> Tensor:
        return sigma.pow(-2) * torch.sigmoid(self.bias + 2 * sigma.log())


@dataclass(frozen=True)
class VLB(OfEstimate):
    """The variational bound's weight: under `density.Table(table)` the mean loss is the whole diffusion part, in nats
    per dimension.

    It is train_steps (SNR_next - SNR) / 2, where next is the table's level below (arXiv 2006.11239, eq. 12 with the
    posterior's variance, as 2107.00630, eq. 13). At the lowest level SNR_next is infinite; the decoder is a Gaussian of
    variance sigma^2 there, whose weight is train_steps SNR / 2. A sigma between two levels counts as the upper one.
    """

    table: DDPM = field(default_factory=DDPM)

    def of_estimate(self, sigma: Tensor) -> Tensor:
        table = self.table.table
        snr = table.pow(-2)
        weight = len(table) / 2 * torch.cat([snr[:1], -snr.diff()])  # in float64: neighbours are nearly equal
        index = torch.searchsorted(table.to(sigma.device, sigma.dtype), sigma.contiguous()).clamp(max=len(table) - 1)
        return weight.to(sigma.device, sigma.dtype)[index]


class LearnedUncertainty(nn.Module, Weighting):
    """error / exp(u) + u, with u(sigma) learned beside the network: at the optimum every level's loss is about 1.

    u is a linear map of random Fourier features of ln(sigma) / 4, zero before training. It is stored with the training
    checkpoint and is no part of an exported model. Source: arXiv 2312.02696, eq. 14 to 16.
    weighting: applied first (default none). features: of ln(sigma); more resolve finer changes.
    """

    frequency: Tensor
    phase: Tensor

    def __init__(self, weighting: Weighting | None = None, features: int = 128) -> None:
        super().__init__()
        if features < 1:
            raise ValueError(f"features={features} must be at least 1; 128 is the paper's")
        self.weighting = weighting or Natural()
        generator = torch.Generator().manual_seed(0)  # the same features in every run, whatever the global seed
        self.register_buffer("frequency", 2 * math.pi * torch.randn(features, generator=generator))
        self.register_buffer("phase", 2 * math.pi * torch.rand(features, generator=generator))
        self.linear = nn.Linear(features, 1, bias=False)
        nn.init.zeros_(self.linear.weight)

    def u(self, sigma: Tensor) -> Tensor:
        """ln of the expected loss at sigma, of sigma's shape."""
        features = math.sqrt(2) * torch.cos(sigma.log()[..., None] / 4 * self.frequency + self.phase)
        return self.linear(features.to(self.linear.weight))[..., 0].to(sigma) / math.sqrt(len(self.frequency))

    def weigh(self, error: Tensor, sigma: Tensor, precond: Precond) -> Tensor:
        u = self.u(sigma)
        return self.weighting.weigh(error, sigma, precond) * (-u).exp() + u


def _check_positive(name: str, value: float, usual: str) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name}={value} must be positive and finite; {usual}")
