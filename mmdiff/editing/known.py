"""Parts of a clip that are given: denoisers that keep them, resampling that fits the rest to them, clips with gaps.

B batch, C channels, T time; clips are (B, C, T, ...). A mask is bool, True where the clip is given.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from mmdiff.denoiser import expand_like
from mmdiff.sampling import Ancestral, Denoise, Noise, Sampler, Step
from mmdiff.sampling.sampler import Estimate


def inpaint(denoise: Denoise, known: Tensor, mask: Tensor, noise: Noise | None = None) -> Denoise:
    """Denoiser that returns `known` where `mask` is True (replacement, Song et al. 2021, arXiv 2011.13456, I.2).

    An estimate that is exact there keeps a state that starts at known + sigma * eps at known + sigma * eps of falling
    sigma under every sampler, and known at the end. noise: draw that eps anew in each call, as the source does, so
    that the state may start anywhere; it costs samplers of higher order their order.
    known: (B, C, T, ...) in the space `denoise` works in. mask: bool, broadcastable to it, True = given.
    Raises ValueError if the mask is not bool. The rest is not drawn from the model's conditional distribution, only
    near it: see `Repaint` and `known_steps`.
    """
    check_mask(mask)

    def keep(x: Tensor, sigma: Tensor) -> Tensor:
        if noise is not None:
            x = torch.where(mask, known + expand_like(sigma, x) * noise(x), x)
        return torch.where(mask, known.to(x.dtype), denoise(x, sigma).to(x.dtype))

    return keep


def known_steps(denoise: Denoise, known: Tensor, steps: Tensor) -> Denoise:
    """Denoiser that shows the model time steps without noise and says so: their sigma is 0.

    For a model that was trained with one noise level per time step, sigma (B, T). Unlike `inpaint` it samples from the
    model's own conditional distribution. The sampler goes on with sigma (); what its state holds at those steps is
    not read. known: (B, C, T, ...). steps: bool (T,) or (B, T), True = given. Raises ValueError for other masks.
    """
    check_mask(steps)
    if steps.ndim not in (1, 2) or steps.shape[-1] != known.shape[2]:
        raise ValueError(
            f"steps has shape {tuple(steps.shape)}; known {tuple(known.shape)} needs (T,) or (B, T) with "
            f"T={known.shape[2]}"
        )
    steps = steps if steps.ndim == 2 else steps[None]

    def keep(x: Tensor, sigma: Tensor) -> Tensor:
        given = steps.expand(x.shape[0], -1)  # (B, T)
        levels = sigma[:, None] if sigma.ndim == 1 else sigma
        levels = torch.where(given, torch.zeros_like(levels), levels)
        where = expand_like(given, x)
        clean = torch.where(where, known.to(x.dtype), x)
        return torch.where(where, clean, denoise(clean, levels).to(x.dtype))

    return keep


@dataclass(frozen=True)
class Repaint(Sampler):
    """Walk of `sampler` that goes back up after every `jump` steps and down again, `resamples` times in all.

    Each pass down lets the part that an `inpaint` leaves free move to what is given, so that the result comes nearer
    to the conditional distribution. resamples = 1 is `sampler` alone; it costs that many times its calls.
    A `Step`'s number is its place on the grid, so numbers come again.
    Source: Lugmayr et al. 2022 (arXiv 2201.09865), algorithm 1; in x = x0 + sigma * eps a jump adds noise of variance
    sigma_up^2 - sigma^2.
    """

    sampler: Sampler = field(default_factory=lambda: Ancestral(1.0))
    jump: int = 1
    resamples: int = 10

    def __post_init__(self) -> None:
        if self.jump < 1 or self.resamples < 1:
            raise ValueError(f"jump={self.jump} steps and resamples={self.resamples} must both be at least 1")

    def walk(self, denoise: Estimate, x: Tensor, sigmas: list[float], noise: Noise) -> Iterator[Step]:
        for first in range(0, len(sigmas) - 1, self.jump):
            levels = sigmas[first : first + self.jump + 1]
            for turn in range(self.resamples):
                if turn:
                    x = x + (levels[0] ** 2 - levels[-1] ** 2) ** 0.5 * noise(x)
                for step in self.sampler.walk(denoise, x, levels, noise):
                    x = step.x
                    yield step._replace(number=first + step.number)


def outpaint(clip: Tensor, axis: int, before: int = 0, after: int = 0) -> tuple[Tensor, Tensor]:
    """A clip with room around it along an axis, and the mask (1, 1, *axes) of what is given.

    axis 2 is time (continuation is `after`), 3 and up are height and width, or frequency. The room holds the nearest
    given step, so that whatever looks across the edge sees no jump. Raises ValueError for an axis that the clip
    has not, and where no room is asked for.
    """
    if not 2 <= axis < clip.ndim:
        raise ValueError(f"axis={axis} must be one of 2 (time) to {clip.ndim - 1} for a clip of {tuple(clip.shape)}")
    if before < 0 or after < 0 or before + after == 0:
        raise ValueError(f"before={before}, after={after} must not be negative, nor both 0: how many steps to add")
    size = clip.shape[axis]
    place = torch.arange(-before, size + after, device=clip.device)
    given = (place >= 0) & (place < size)
    shape = [1, 1, *(len(place) if a == axis else n for a, n in enumerate(clip.shape) if a >= 2)]
    mask = given.view(*(len(place) if a == axis else 1 for a in range(clip.ndim))).expand(shape)
    return clip.index_select(axis, place.clamp(0, size - 1)), mask


def infill(clip: Tensor, places: Sequence[int], length: int) -> tuple[Tensor, Tensor]:
    """A clip of `length` time steps whose step places[i] is the i-th of `clip`, and the mask (1, 1, length, 1...).

    Both ends given: places (0, length - 1); every k-th: range(0, length, k). Between given steps the clip is
    interpolated, outside held. Raises ValueError unless the places rise within the length, one for each step.
    """
    places = list(places)
    rising = all(a < b for a, b in pairwise(places))
    if not places or len(places) != clip.shape[2] or not rising or places[0] < 0 or places[-1] >= length:
        raise ValueError(
            f"places={places} must be {clip.shape[2]} rising numbers in 0..{length - 1}, one for each step of the clip"
        )
    at = torch.tensor(places, device=clip.device)
    time = torch.arange(length, device=clip.device)
    right = torch.searchsorted(at, time).clamp(max=len(places) - 1)
    left = (torch.searchsorted(at, time, right=True) - 1).clamp(min=0)
    share = ((time - at[left]) / (at[right] - at[left]).clamp(min=1)).clamp(0, 1).to(clip)
    share = share.view(-1, *(1,) * (clip.ndim - 3))
    full = torch.lerp(clip.index_select(2, left), clip.index_select(2, right), share)
    return full, torch.isin(time, at).view(1, 1, -1, *(1,) * (clip.ndim - 3))


def check_mask(mask: Tensor) -> None:
    """Raises ValueError unless the mask is bool."""
    if mask.dtype != torch.bool:
        raise ValueError(f"the mask has dtype {mask.dtype}; it must be bool, True where the clip is given")
