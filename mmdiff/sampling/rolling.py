"""Clips of any length from a model with one noise level per time step: later steps have more noise than earlier ones.

B batch, C channels, T time; clips are (B, C, T, ...).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Literal

import torch
from torch import Tensor

from .sampler import Denoise, Estimate, Noise, Sampler, Step, start


@dataclass(frozen=True)
class Rolling(Sampler):
    """Walk in which the time steps fall one after another, so that the model never sees more than `length` of them.

    A step begins to fall some calls after the one before it, as many as let `length - context` steps fall at a time.
    The model sees these with the last `context` finished ones before them, at level 0, so it must have been trained
    with `mmdiff.levels.PerStep`. Once under way each new step costs steps / (length - context) calls, rounded up.
    length: time steps that the model was trained on. eta: share of the noise that is renewed, as in `Ancestral`.
    order: 1, or 2 with the estimate of the call before, as in `DPMpp2M`; it goes without renewed noise.
    A `Step`'s number is its share of the walk, counted in steps of the grid, so numbers come again.
    Source: diffusion forcing, Chen et al. 2024 (arXiv 2407.01392), algorithm 2 with a pyramid of levels.
    Raises ValueError unless 1 <= context < length, for eta outside 0..1, and for order 2 with an eta above 0.
    """

    length: int
    context: int
    eta: float = 0.0
    order: Literal[1, 2] = 1

    def __post_init__(self) -> None:
        if not 1 <= self.context < self.length:
            raise ValueError(
                f"context={self.context} must lie in 1..length-1={self.length - 1}: finished steps that the model sees"
            )
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta={self.eta} must lie between 0 (deterministic) and 1 (all noise renewed)")
        if self.order not in (1, 2) or (self.order == 2 and self.eta > 0):
            raise ValueError(f"order={self.order} with eta={self.eta}: it must be 1, or 2 with eta=0")

    def delay(self, steps: int) -> int:
        """Calls between the first of a time step and the first of the next, on a grid of `steps`."""
        return -(-steps // (self.length - self.context))

    def levels(self, sigmas: list[float], call: int, places: range) -> Tensor:
        """Noise levels (len(places),), float64, of the time steps `places` of the clip before call number `call`."""
        steps = len(sigmas) - 1
        wait = self.delay(steps)
        return torch.tensor([sigmas[min(max(call - wait * t, 0), steps)] for t in places], dtype=torch.float64)

    def front(self, bind: Callable[[Tensor], Denoise]) -> Denoise:
        """The denoiser of a whole clip, of which it asks for the window alone in which levels fall.

        bind: a window's time steps (L,) -> its denoiser. sigma (1 or B, T), rows equal. The estimate of steps outside
        of the window is x: they are finished, or have not begun.
        """

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            total = x.shape[2]
            falling = (sigma[0] > 0).nonzero()
            first = int(falling[0]) if len(falling) else total
            first = max(0, min(first - self.context, total - self.length))
            steps = torch.arange(first, min(first + self.length, total), device=x.device)
            part = bind(steps)(x.index_select(2, steps), sigma.index_select(1, steps.to(sigma.device)))
            return x.to(part.dtype).index_copy(2, steps, part)

        return denoise

    def walk(self, denoise: Estimate, x: Tensor, sigmas: list[float], noise: Noise) -> Iterator[Step]:
        """denoise: of the whole clip, such as `front` makes; without it every call sees all of the clip."""
        total, steps = x.shape[2], len(sigmas) - 1
        calls = steps + self.delay(steps) * (total - 1)
        last: tuple[Tensor, Tensor] | None = None
        for call in range(calls):
            before, after = (self.levels(sigmas, number, range(total)) for number in (call, call + 1))
            x0 = denoise(x, before.to(x).expand(len(x), -1))
            x = fallen(x, self.extrapolated(x0, before, after, last), before, after, self.eta, noise)
            last = x0, before
            yield Step(min(call * steps // calls, steps - 1), float(before[before > 0].min()), x, x0)

    def stream(self, denoise: Denoise, like: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Tensor]:
        """The time steps (B, C, 1, ...) of a clip without an end, each as soon as it is finished.

        What it holds does not grow with the clip. denoise: of windows (B, `length`), its condition the same at all
        times. like: (B, C, 1, ...), any values; noise draws of this shape. Raises ValueError for another T.
        """
        if like.shape[2] != 1:
            raise ValueError(f"like has shape {tuple(like.shape)}; it must be one time step, (B, C, 1, ...)")
        grid = sigmas.flatten().tolist()
        steps = len(grid) - 1
        x = torch.cat([start(noise(like), grid[0]) for _ in range(self.length)], dim=2)
        places = range(self.length)  # of x in the clip
        last: tuple[Tensor, Tensor] | None = None
        for call in count():
            before, after = (self.levels(grid, number, places) for number in (call, call + 1))
            x0 = denoise(x, before.to(x).expand(len(x), -1)).to(x.dtype)
            x = fallen(x, self.extrapolated(x0, before, after, last), before, after, self.eta, noise)
            last = x0, before
            done, left = divmod(call + 1 - steps, self.delay(steps))
            if done < 0 or left:
                continue
            yield x[:, :, done - places[0] : done - places[0] + 1].clone()
            if done + 1 - self.context > places[0]:  # the oldest step is no context any more
                x = torch.cat([x[:, :, 1:], start(noise(like), grid[0])], dim=2)
                last = x0.roll(-1, 2), self.levels(grid, call, range(places[0] + 1, places[-1] + 2))
                places = range(places[0] + 1, places[-1] + 2)

    def extrapolated(self, x0: Tensor, before: Tensor, after: Tensor, last: tuple[Tensor, Tensor] | None) -> Tensor:
        """The estimate x0 (B, C, T, ...) from `before` to `after` (T,), at order 2 led on from the last one.

        last: the estimate and the levels of the call before. A step that has only begun to fall, or ends, has none.
        Source: DPM-Solver++(2M), arXiv 2211.01095, algorithm 2, whose h is the fall of ln sigma.
        """
        if self.order == 1 or last is None:
            return x0
        previous, above = last
        share = (before / after).log() / (above / before).log() / 2  # h / (2 h of the call before)
        share = torch.where((above > before) & (after > 0), share, 0)
        return x0 + share.to(x0).view(-1, *(1,) * (x0.ndim - 3)) * (x0 - previous)


def fallen(x: Tensor, x0: Tensor, before: Tensor, after: Tensor, eta: float, noise: Noise) -> Tensor:
    """x at the levels `after` (T,), from x at `before` and the estimate x0 made there: `ancestral_step`, step by step.

    Time steps whose level stays are left as they are, bit for bit.
    """
    moving = (after < before).nonzero().flatten()
    before, after = before[moving], after[moving]
    renewed = eta**2 * (1 - (after / before) ** 2)
    shape = (-1, *(1,) * (x.ndim - 3))
    keep = ((1 - renewed).sqrt() * after / before).to(x).view(shape)
    moving = moving.to(x.device)
    part = torch.lerp(x0.index_select(2, moving), x.index_select(2, moving), keep)
    if eta > 0:
        part = part + (renewed.sqrt() * after).to(x).view(shape) * noise(part)
    return x.index_copy(2, moving, part)
