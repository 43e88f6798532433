"""How probable a model finds data: a variational bound term by term, and the exact likelihood of its flow.

Densities are of x0 itself, so bits per dimension of 8-bit data in [-1, 1] count its 256 values. B batch, C channels,
T time; x0 (B, C, T, ...); a dimension is an element of an item; x = x0 + sigma * eps.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .denoiser import Errors
from .precond import expand_like, learned_log_variance
from .sampling import Denoise, Noise
from .sigmas import DDPM, Karras, Sigmas

LN2 = math.log(2)
FAR = 1e3  # standard deviations: stands for infinity, with finite gradients


class Likelihood(ABC):
    """Measures how many bits a dimension of data costs under a denoiser."""

    @abstractmethod
    def bits(self, denoise: Denoise, x0: Tensor, noise: Noise) -> Tensor:
        """(B,) bits per dimension, of x0 (B, C, T, ...). noise: source of every random number."""


class BoundTerms(NamedTuple):
    """Upper bound on the bits per dimension, in its parts."""

    prior: Tensor  # (B,) KL of the noisiest level from the normal distribution that sampling starts from
    terms: Tensor  # (B, steps - 1) KL of each step of the chain, from high to low noise
    decoder: Tensor  # (B,) the data given the lowest level

    @property
    def total(self) -> Tensor:
        """(B,)"""
        return self.prior + self.terms.sum(1) + self.decoder


@dataclass(frozen=True)
class VariationalBound(Likelihood):
    """-ln p(x0) <= prior + terms + decoder, for the chain of a grid. Source: arXiv 2006.11239, eq. 5 and 13.

    Args:
        sigmas, steps: the chain. `DDPM` with all its train_steps is that of the paper; one call of the denoiser a step.
        variance: of the chain's steps, from -1, the posterior's beta-tilde, to 1, beta (arXiv 2102.09672, eq. 15).
        bins: number of values that the data takes, evenly spaced in [-1, 1]: 256 for 8 bits. None: the data is
            continuous, such as latents; the decoder is a Gaussian density and the bits may be negative.
    """

    sigmas: Sigmas = field(default_factory=DDPM)
    steps: int = 1000
    variance: float = 1.0
    bins: int | None = 256

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1")
        if not -1 <= self.variance <= 1:
            raise ValueError(f"variance={self.variance} must lie between -1 (beta-tilde) and 1 (beta)")
        check_bins(self.bins)

    def __call__(self, denoise: Denoise, x0: Tensor, noise: Noise, v: Denoise | None = None) -> BoundTerms:
        """The bound for x0 (B, C, T, ...). One draw of noise for each level; its mean over draws is the bound.

        v: (x, sigma) -> (B, C, T, ...), the learned variance in the place of `variance`.
        Raises ValueError where x0 is not of `bins` values.
        """
        x0 = x0.to(torch.promote_types(x0.dtype, torch.float32))
        check_values(x0, self.bins)
        levels = self.sigmas(self.steps).to(x0)
        terms = []
        for sigma, sigma_next in pairwise(levels):
            x = x0 + sigma * noise(x0)
            spread = torch.full_like(x, self.variance) if v is None else v(x, sigma)
            nats = step_nats(x0, denoise(x, sigma), sigma, sigma_next, spread, self.bins)
            terms.append(_item_mean(nats) / LN2)
        prior = _item_mean(prior_nats(x0, levels[0])) / LN2
        return BoundTerms(prior, torch.stack(terms, 1)[:, :-1], terms[-1])

    def bits(self, denoise: Denoise, x0: Tensor, noise: Noise) -> Tensor:
        return self(denoise, x0, noise).total


def prior_nats(x0: Tensor, sigma: Tensor) -> Tensor:
    """KL of x at sigma from N(0, 1 + sigma^2), which `mmdiff.sampling.start` draws from; of x0's shape, in nats."""
    share = 1 / (1 + sigma**2)  # of the signal in the variance
    return (share * (x0**2 - 1) - torch.log1p(-share)) / 2


def step_nats(
    x0: Tensor, estimate: Tensor, sigma: Tensor, sigma_next: Tensor, v: Tensor, bins: int | None = None
) -> Tensor:
    """KL of the model's step from sigma to sigma_next from the posterior of x0; of x0's shape, in nats.

    Where sigma_next is 0 it is -ln p(x0 | x), of a Gaussian around the estimate, summed over a bin where `bins` are
    given. v: the variance, see `learned_log_variance`. sigma, sigma_next: (), (B,) or (B, T).
    Source: arXiv 2006.11239, eq. 5 and 7, in x0 + sigma * eps: the posterior has mean lerp(x0, x, r), r =
    (sigma_next / sigma)^2, and variance sigma_next^2 (1 - r).
    """
    log_variance = learned_log_variance(v, sigma, sigma_next)
    s, n = expand_like(sigma, x0), expand_like(sigma_next, x0)
    moved = (s - n) * (s + n) / s**2  # 1 - r
    last = n == 0
    posterior = torch.where(last, 1.0, n**2 * moved)
    square = (moved * (x0 - estimate)) ** 2
    kl = ((posterior + square) / log_variance.exp() - 1 + log_variance - posterior.log()) / 2
    return torch.where(last, decoder_nats(x0, estimate, log_variance, bins), kl)


def decoder_nats(x0: Tensor, mean: Tensor, log_variance: Tensor, bins: int | None) -> Tensor:
    """-ln p(x0) under N(mean, exp(log_variance)): the density (bins None), or the mass of x0's bin; of x0's shape.

    The outermost bins of [-1, 1] are open (arXiv 2006.11239, eq. 13).
    """
    if bins is None:
        return ((x0 - mean) ** 2 / log_variance.exp() + log_variance + math.log(2 * math.pi)) / 2
    half, scale = 1 / (bins - 1), (log_variance / 2).exp()
    low, high = (x0 - half - mean) / scale, (x0 + half - mean) / scale
    low = torch.where(x0 < -1 + half, -FAR, low.clamp(-FAR, FAR))
    high = torch.where(x0 > 1 - half, FAR, high.clamp(-FAR, FAR))
    flip = low + high > 0  # the tail on the left keeps its digits
    low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
    top = torch.special.log_ndtr(high)
    gap = (torch.special.log_ndtr(low) - top).clamp(max=-1e-12)
    return -(top + torch.log(-torch.expm1(gap)))


def check_bins(bins: int | None) -> None:
    """Raise ValueError unless None or a number of values from 2 up."""
    if bins is not None and bins < 2:
        raise ValueError(f"bins={bins} must be at least 2, 256 for 8-bit data, or None for continuous data")


def check_values(x0: Tensor, bins: int | None) -> None:
    """Raise ValueError where x0 takes values beside the `bins` evenly spaced ones of [-1, 1]."""
    if bins is None:
        return
    steps = (x0 + 1) * ((bins - 1) / 2)
    if x0.abs().max() > 1 + 1e-4 / bins or (steps - steps.round()).abs().max() > 0.01:
        raise ValueError(
            f"x0 takes values beside the {bins} of bins={bins} evenly spaced in [-1, 1]; "
            "bins=None is for continuous data"
        )


@dataclass(frozen=True)
class LearnedVariance:
    """Trains the variance of a backbone with 2 C channels: the bound of a step with the mean held fixed, times `scale`.

    The loss is L_simple + scale * L_vlb, L_vlb in nats per dimension, its mean over uniform levels of `table`
    multiplied by their number. A sigma between two levels steps down to the lower one.
    Source: arXiv 2102.09672, sec. 3.1 and eq. 16. bins: see `VariationalBound`; None for latents.
    """

    table: DDPM = field(default_factory=DDPM)
    scale: float = 0.001
    bins: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale={self.scale} must be positive and finite; 0.001 is the paper's")
        check_bins(self.bins)

    def __call__(self, errors: Errors, x0: Tensor, sigma: Tensor) -> Tensor:
        """Its part of the loss, (B,) or (B, T) as sigma. Raises ValueError if the backbone gives no variance."""
        if errors.extra.shape != x0.shape:
            raise ValueError(
                f"the backbone gives {errors.extra.shape[1]} channels beyond x's {x0.shape[1]}; a learned variance "
                "needs as many: set out_channels to twice in_channels"
            )
        check_values(x0, self.bins)
        level = torch.where(sigma > 0, sigma, 1)
        table = self.table.table.to(sigma.device, sigma.dtype)
        below = torch.cat([torch.zeros_like(table[:1]), table])[torch.searchsorted(table, level.contiguous())]
        nats = step_nats(x0, errors.estimate.detach(), level, below, errors.extra, self.bins)
        return self.scale * len(table) * errors.mean(nats)


class Divergence(ABC):
    """Along which directions the trace of a Jacobian is taken: the sum of e . J e over the directions e."""

    @abstractmethod
    def directions(self, x: Tensor, noise: Noise) -> list[Tensor]:
        """Each of x's shape (B, ...)."""


@dataclass(frozen=True)
class Exact(Divergence):
    """Every dimension: exact, with as many backward passes as an item has dimensions. At most 4096."""

    def directions(self, x: Tensor, noise: Noise) -> list[Tensor]:
        dims = x[0].numel()
        if dims > 4096:
            raise ValueError(f"an item has {dims} dimensions, too many for the exact divergence; use Hutchinson")
        return [e.reshape(x.shape[1:]).expand_as(x) for e in torch.eye(dims, dtype=x.dtype, device=x.device)]


@dataclass(frozen=True)
class Hutchinson(Divergence):
    """Random signs, `probes` of them, the same along the whole way: unbiased (arXiv 2011.13456, eq. 40)."""

    probes: int = 1

    def __post_init__(self) -> None:
        if self.probes < 1:
            raise ValueError(f"probes={self.probes} must be at least 1")

    def directions(self, x: Tensor, noise: Noise) -> list[Tensor]:
        return [torch.where(noise(x) < 0, -1.0, 1.0).to(x) / math.sqrt(self.probes) for _ in range(self.probes)]


@dataclass(frozen=True)
class FlowLikelihood(Likelihood):
    """Density of data under the probability-flow ODE. Source: arXiv 2011.13456, eq. 39.

    The ODE is solved for y = x / sqrt(1 + sigma^2) over the angle atan(sigma), where its field (y cos - D) / sin is
    bounded at both ends and 0 for standard normal data. The prior is that of `mmdiff.sampling.start`.

    Args:
        sigmas, steps: grid, walked upwards from 0 by RK4: four calls of the denoiser a step.
        divergence: `Hutchinson` for any size, `Exact` for few dimensions.
        tolerance: None, or that of an adaptive solver (torchdiffeq's dopri5) between the grid's ends, whatever `steps`
            lie between.
        bins: number of values of the data, for `bits` alone: a density times their spacing. None: continuous data.
    """

    sigmas: Sigmas = field(default_factory=Karras)
    steps: int = 64
    divergence: Divergence = field(default_factory=Hutchinson)
    tolerance: float | None = None
    bins: int | None = 256

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1")
        if self.tolerance is not None and not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance={self.tolerance} must lie between 0 and 1, such as 1e-5, or be None for RK4")
        check_bins(self.bins)

    def __call__(self, denoise: Denoise, x0: Tensor, noise: Noise) -> Tensor:
        """ln p(x0), (B,), in nats, of continuous x0 (B, C, T, ...). Works under no_grad and inference_mode."""
        x0 = x0.to(torch.promote_types(x0.dtype, torch.float32))
        angles = self.sigmas(self.steps).double().flip(0).atan().tolist()
        with torch.inference_mode(False), torch.enable_grad():
            x0 = x0.detach().clone()  # a tensor of inference mode cannot be differentiated
            field = _field(denoise, self.divergence.directions(x0, noise))
            state = (x0, torch.zeros(len(x0), dtype=x0.dtype, device=x0.device))
            solve = _rk4 if self.tolerance is None else _adaptive(self.tolerance)
            y, gain = solve(field, state, angles)
        normal = -(y**2 + math.log(2 * math.pi)).flatten(1).sum(1) / 2
        return normal + gain

    def bits(self, denoise: Denoise, x0: Tensor, noise: Noise) -> Tensor:
        check_values(x0, self.bins)
        spacing = 1.0 if self.bins is None else 2 / (self.bins - 1)
        return -(self(denoise, x0, noise) / x0[0].numel() + math.log(spacing)) / LN2


State = tuple[Tensor, Tensor]  # y, and the gain in ln p so far (B,)
Field = Callable[[float, State], State]  # (angle, state) -> its derivative


def _field(denoise: Denoise, directions: list[Tensor]) -> Field:
    """dy / d angle and its divergence."""

    def slope(angle: float, state: State) -> State:
        y, gain = state
        if angle <= 0:
            return torch.zeros_like(y), torch.zeros_like(gain)  # the limit: the score is finite, and times sigma
        cos, sin = math.cos(angle), math.sin(angle)
        x = (y / cos).detach().requires_grad_()
        estimate = denoise(x, torch.full((), math.tan(angle), dtype=x.dtype, device=x.device))
        divergence = torch.zeros_like(gain)
        for e in directions:
            (pulled,) = torch.autograd.grad(estimate, x, e.to(estimate), retain_graph=True)
            divergence = divergence + (e * (cos * e - pulled / cos)).flatten(1).sum(1) / sin
        return ((y * cos - estimate) / sin).detach().to(y), divergence.detach()

    return slope


def _rk4(field: Field, state: State, angles: list[float]) -> State:
    for angle, after in pairwise(angles):
        h = after - angle
        k1 = field(angle, state)
        k2 = field(angle + h / 2, _moved(state, k1, h / 2))
        k3 = field(angle + h / 2, _moved(state, k2, h / 2))
        k4 = field(after, _moved(state, k3, h))
        for k, share in ((k1, h / 6), (k2, h / 3), (k3, h / 3), (k4, h / 6)):
            state = _moved(state, k, share)
    return state


def _moved(state: State, slope: State, h: float) -> State:
    return state[0] + h * slope[0], state[1] + h * slope[1]


def _adaptive(tolerance: float) -> Callable[[Field, State, list[float]], State]:
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise ValueError(f"tolerance={tolerance} needs torchdiffeq: pip install torchdiffeq; None is RK4") from error

    def solve(field: Field, state: State, angles: list[float]) -> State:
        ends = torch.tensor([angles[0], angles[-1]], dtype=torch.float64, device="cpu").to(state[0].device)
        y, gain = odeint(
            lambda angle, s: field(float(angle), s), state, ends, rtol=tolerance, atol=tolerance, method="dopri5"
        )
        return y[-1], gain[-1]

    return solve


def _item_mean(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1)
