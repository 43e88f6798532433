"""What a sampler is: a walk down a list of noise levels that calls a denoiser, its start and its noise.

Samplers know no network, no schedule and no modality. The state is float32 (float64 if it starts so). Gradients flow
through the calls unless the caller forbids them: sample under `torch.no_grad()` or `torch.inference_mode()`.
x: (B, C, T, ...), any number of axes.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]  # (x, sigma of shape (), or (B, T)) -> x0
Noise = Callable[[Tensor], Tensor]  # like -> standard normal of its shape, dtype and device
Estimate = Callable[[Tensor, float | Tensor], Tensor]  # Denoise as a method sees it: sigma is a number, or (B, T)


class Step(NamedTuple):
    """What one sampling step leaves behind, for progress bars and previews."""

    number: int  # 0 for the first step
    sigma: float  # noise level at which x0 was estimated: the step's start, or above it where churn has added noise
    x: Tensor  # state after the step, at the next noise level
    x0: Tensor  # the denoiser's estimate


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

        def estimate(x: Tensor, sigma: float | Tensor) -> Tensor:
            level = sigma if isinstance(sigma, Tensor) else torch.full((), sigma, dtype=x.dtype, device=x.device)
            return denoise(x, level).to(x.dtype)

        return self.walk(estimate, state, levels, noise)

    @abstractmethod
    def walk(self, denoise: Estimate, x: Tensor, sigmas: list[float], noise: Noise) -> Iterator[Step]:
        """The method itself; its arguments are checked, and `denoise` takes sigma as a number."""


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
        # non_blocking: the host does not wait for the device; the rows are staged before the call returns
        return torch.stack(rows).to(like.device, like.dtype, non_blocking=True)

    return draw
