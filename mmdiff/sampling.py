"""Samplers: from noise to data by repeated calls of a denoiser D(x, sigma) -> x0, where x = x0 + sigma * eps.

They know no network, no schedule and no modality. The state is float32 (float64 if it starts so). Gradients flow
through the calls unless the caller forbids them: sample under `torch.no_grad()` or `torch.inference_mode()`.
x: (B, C, T, ...), any number of axes.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]  # (x, sigma of shape ()) -> x0
Noise = Callable[[Tensor], Tensor]  # like -> standard normal of its shape, dtype and device


class Step(NamedTuple):
    """What one sampling step leaves behind, for progress bars and previews."""

    number: int  # 0 for the first step
    sigma: float  # noise level at the step's start, where x0 was estimated
    x: Tensor  # state after the step, at the next noise level
    x0: Tensor  # the denoiser's estimate at the step's start


class Sampler(ABC):
    """Walk from x at noise level sigmas[0] to a sample at noise level sigmas[-1], which is 0 for a finished one."""

    def __call__(self, denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Tensor:
        """The sample, of x's shape. x: at noise level sigmas[0], e.g. `start(noise, sigmas[0])`.

        sigmas: (steps + 1,), strictly decreasing, finite, not negative. Raises ValueError otherwise.
        noise:  where a stochastic sampler takes fresh noise from; a deterministic one does not call it.
        """
        for step in self.steps(denoise, x, sigmas, noise):
            x = step.x
        return x

    def steps(self, denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        """The same walk, one `Step` at a time; the last one's x is what `__call__` returns."""
        levels = sigmas.flatten().tolist()  # one synchronisation here, none in the loop
        falling = all(high > low for high, low in pairwise(levels))
        if sigmas.ndim != 1 or len(levels) < 2 or not falling or not math.isfinite(levels[0]) or levels[-1] < 0:
            raise ValueError(
                f"sigmas={levels} must be a list of at least 2 finite, strictly decreasing numbers, none negative; "
                "a grid of mmdiff.sigmas called with a number of steps gives one"
            )
        state = x.to(torch.promote_types(x.dtype, torch.float32))

        def estimate(x: Tensor, sigma: float) -> Tensor:
            return denoise(x, torch.full((), sigma, dtype=x.dtype, device=x.device)).to(x.dtype)

        return self.walk(estimate, state, levels, noise)

    @abstractmethod
    def walk(
        self, denoise: Callable[[Tensor, float], Tensor], x: Tensor, sigmas: list[float], noise: Noise
    ) -> Iterator[Step]:
        """The method itself; its arguments are checked, and `denoise` takes sigma as a number."""


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

    def walk(
        self, denoise: Callable[[Tensor, float], Tensor], x: Tensor, sigmas: list[float], noise: Noise
    ) -> Iterator[Step]:
        for number, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
            renewed = self.eta**2 * (1 - (sigma_next / sigma) ** 2)  # share of the variance, at most 1
            up, down = sigma_next * renewed**0.5, sigma_next * (1 - renewed) ** 0.5
            x0 = denoise(x, sigma)
            x = torch.lerp(x0, x, down / sigma)  # exact in float32 at sigma 1e5, where x + ds * d is not
            if up > 0:
                x = x + up * noise(x)
            yield Step(number, sigma, x, x0)


@dataclass(frozen=True)
class Heun(Sampler):
    """Second order, deterministic: Euler, then once more with the slope averaged over the step's two ends.

    clock: the time over which the slopes are averaged. sigma is EDM's, and good only while no step divides sigma by
        much. flow, t = sigma / (1 + sigma), stays good on flow, cosine and coarse grids.
    Two calls of the denoiser a step, one if it ends at 0.
    Source: arXiv 2206.00364, algorithm 1.
    """

    clock: Literal["sigma", "flow"] = "sigma"

    def __post_init__(self) -> None:
        if self.clock not in ("sigma", "flow"):
            raise ValueError(f"clock={self.clock!r} must be sigma (Karras grids) or flow (flow grids)")

    def walk(
        self, denoise: Callable[[Tensor, float], Tensor], x: Tensor, sigmas: list[float], noise: Noise
    ) -> Iterator[Step]:
        for number, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
            x0 = denoise(x, sigma)
            x_next = torch.lerp(x0, x, sigma_next / sigma)
            if sigma_next > 0:
                # the mean of the two slopes is the Euler step of this extrapolated estimate, in either clock
                weight = self._time(sigma) / (2 * self._time(sigma_next))
                mean = torch.lerp(x0, denoise(x_next, sigma_next), weight)
                x_next = torch.lerp(mean, x, sigma_next / sigma)
            x = x_next
            yield Step(number, sigma, x, x0)

    def _time(self, sigma: float) -> float:
        return sigma if self.clock == "sigma" else sigma / (1 + sigma)


@dataclass(frozen=True)
class DPMpp2M(Sampler):
    """DPM-Solver++(2M): second order, deterministic, one call of the denoiser a step; it reuses the last estimate.

    The first step and a step that ends at 0 are of first order. Source: arXiv 2211.01095, algorithm 2.
    """

    def walk(
        self, denoise: Callable[[Tensor, float], Tensor], x: Tensor, sigmas: list[float], noise: Noise
    ) -> Iterator[Step]:
        last: tuple[float, Tensor] | None = None  # the step before: h, the fall of ln(sigma), and its x0
        for number, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
            x0 = mean = denoise(x, sigma)
            if sigma_next > 0:
                h = math.log(sigma / sigma_next)
                if last is not None:
                    mean = torch.lerp(last[1], x0, 1 + h / (2 * last[0]))  # x0 extrapolated to the step's middle
                last = h, x0
            x = torch.lerp(mean, x, sigma_next / sigma)
            yield Step(number, sigma, x, x0)


def start(noise: Tensor, sigma: Tensor | float) -> Tensor:
    """Where sampling begins: noise * sqrt(1 + sigma^2), the exact start for Gaussian data of unit variance.

    x = x0 + sigma * eps has variance 1 + sigma^2. It is the usual start of a variance-preserving model, x_t ~ N(0, 1),
    divided by alpha once (arXiv 2010.02502, eq. 14), and above EDM's noise * sigma by 8e-5 at sigma 80, 5e-3 at 10.
    noise: (B, C, T, ...) standard normal. sigma: the grid's first, shape () or a number.
    """
    return noise * math.hypot(1.0, float(sigma))


def seeded_noise(seeds: Sequence[int]) -> Noise:
    """Noise whose row i is a stream of its own, seeded with seeds[i] and drawn in float32 on the CPU.

    A sample then depends neither on its neighbours in the batch nor on the device. The stream runs on from call to
    call. Raises ValueError if `seeds` is empty, or in the call if the batch is not as long as `seeds`.
    """
    if not seeds:
        raise ValueError("seeds=[] must hold one seed for each sample of the batch, e.g. [0, 1, 2, 3]")
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def draw(like: Tensor) -> Tensor:
        if like.shape[0] != len(generators):
            raise ValueError(
                f"batch of {like.shape[0]} needs as many seeds, not {len(generators)}; give one per sample"
            )
        rows = [torch.randn(like.shape[1:], generator=generator, device="cpu") for generator in generators]
        return torch.stack(rows).to(like)

    return draw
