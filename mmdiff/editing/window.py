"""Clips longer than a model was trained on, and clips without an end: a denoiser over windows in time.

B batch, C channels, T time; clips are (B, C, T, ...).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmdiff.conditioning import Cond
from mmdiff.sampling import Denoise

Bind = Callable[[Tensor], Denoise]  # indices (L,) of a window's time steps -> the denoiser of that window


@dataclass(frozen=True)
class Window:
    """Denoiser of any length made of one of `length` time steps: the weighted mean of overlapping windows' estimates.

    length: of a window, what the model was trained on; a shorter clip is one window. overlap: steps that a window
    shares with the next, over which one fades into the other; the last window shares more where the length asks for
    it. loop: time has no end: windows also cross from the last step to the first, so that the end flows into the
    start, and no join is the edge of every window.
    The weights of every step sum to one, so a denoiser that acts on each step alone stays what it is.
    Source: Bar-Tal et al. 2023 (MultiDiffusion, arXiv 2302.08113), eq. 5.
    """

    length: int
    overlap: int
    loop: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < self.length:
            raise ValueError(f"overlap={self.overlap} must lie in 0..length-1={self.length - 1}; half is usual")
        if self.loop and self.overlap < 1:
            raise ValueError("overlap=0 leaves the seam of a loop open; give at least 1")

    def windows(self, total: int) -> list[Tensor]:
        """The time steps of each window over a clip of `total` steps, long (L,)."""
        size = min(self.length, total)
        stride = max(1, min(self.length - self.overlap, size))
        if self.loop:
            count = max(2, math.ceil(total / stride))  # one window alone has its edges at one join
            starts = [round(i * total / count) for i in range(count)]
        else:
            starts = [*range(0, total - size, stride), total - size]
        return [(start + torch.arange(size)) % total for start in starts]

    def weights(self, total: int) -> list[Tensor]:
        """The weight (L,) of each window's steps, float32; over all windows those of a step sum to one."""
        windows = self.windows(total)
        place = torch.arange(len(windows[0]), dtype=torch.float64)
        ramp = torch.minimum(place + 1, len(place) - place).clamp(max=self.overlap + 1)
        whole = torch.zeros(total, dtype=torch.float64)
        for steps in windows:
            whole = whole.index_add(0, steps, ramp)
        return [(ramp / whole[steps]).float() for steps in windows]

    def __call__(self, bind: Bind) -> Denoise:
        """The denoiser of the whole clip. bind: a window's time steps -> its denoiser, with its condition (`cut`)."""

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            mean = None
            for steps, weight in zip(self.windows(x.shape[2]), self.weights(x.shape[2]), strict=True):
                steps, weight = steps.to(x.device), weight.to(x).view(-1, *(1,) * (x.ndim - 3))
                levels = sigma[:, steps] if sigma.ndim == 2 else sigma
                part = weight * bind(steps)(x.index_select(2, steps), levels)
                mean = torch.zeros_like(x, dtype=part.dtype) if mean is None else mean
                mean = mean.index_add(2, steps, part)
            assert mean is not None  # there is always a window
            return mean

        return denoise


def window(denoise: Denoise, length: int, overlap: int, loop: bool = False) -> Denoise:
    """`Window` of a denoiser whose condition is the same at all times, such as a prompt."""
    return Window(length, overlap, loop)(lambda steps: denoise)


def cut(cond: Cond | None, steps: Tensor) -> Cond | None:
    """The condition of the time steps `steps`, long (L,): what has x's axes must have its length."""
    if cond is None:
        return None
    slots = {"concat": cond.concat, "known": cond.known, "mean": cond.mean}
    return replace(cond, **{name: slot.index_select(2, steps) for name, slot in slots.items() if slot is not None})
