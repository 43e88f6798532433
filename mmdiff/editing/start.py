"""Where an edit of a whole clip starts: in the middle of a noise grid (SDEdit), or at the end of a walk back up it.

B batch, C channels, T time; clips are (B, C, T, ...). sigma is the true noise-to-signal ratio, x = x0 + sigma * eps.
"""

import math
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from mmdiff.sampling import Denoise, Noise, Sampler
from mmdiff.sampling import start as begin


def noised(x0: Tensor, sigmas: Tensor, strength: float, eps: Tensor) -> tuple[Tensor, Tensor]:
    """State to go on from and what is left of the grid, so that `strength` is the share of its steps that are run.

    Of n steps the last ceil(strength * n) are run, from x0 + sigma * eps at their first sigma. At strength 0 the grid
    left is its last level alone and the state is x0 if that is 0. At strength 1 the state is `start(eps, sigmas[0])`,
    where plain sampling begins: x0 counts nothing, and the noise is scaled once.
    x0, eps: (B, C, T, ...), eps standard normal. sigmas: (n + 1,), decreasing. Raises ValueError outside 0..1.
    Source: Meng et al. 2022 (arXiv 2108.01073), algorithm 1, in the coordinates x = x0 + sigma * eps.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength={strength} must lie between 0 (keeps the input) and 1 (ignores it)")
    steps = len(sigmas) - 1
    rest = sigmas[steps - math.ceil(strength * steps - 1e-9) :]
    return (begin(eps, rest[0]) if strength == 1 else x0 + rest[0].to(x0) * eps), rest


def sdedit(denoise: Denoise, x0: Tensor, sigmas: Tensor, strength: float, sampler: Sampler, noise: Noise) -> Tensor:
    """Clip like x0 in its coarse features and like the model's in its fine ones; see `noised` for `strength`.

    Strength 0 returns x0, strength 1 what `sampler` makes without it from the same noise, bit for bit. Any sampler,
    any grid. x0: (B, C, T, ...). Raises ValueError outside 0..1. Source: Meng et al. 2022.
    """
    x, rest = noised(x0, sigmas, strength, noise(x0))
    return x0 if len(rest) == 1 else sampler(denoise, x, rest, noise)


def invert(denoise: Denoise, x0: Tensor, sigmas: Tensor, order: Literal[1, 2] = 1) -> Tensor:
    """The noise a clip comes from: the state at sigmas[0] from which a deterministic sampler leads back to x0.

    Walks the grid upward along dx/dsigma = (x - D(x, sigma)) / sigma. order 1 is Euler, DDIM's own inversion (Song et
    al. 2021, arXiv 2010.02502, sec. 4.3): what `Ancestral(0)` makes of it differs from x0 by an error that falls with
    the step. order 2 is Heun's, and `Heun` its way back. At sigma 0 the slope is 0, its limit for data with a density.
    sigmas: (n + 1,), decreasing, as a sampler takes it. Raises ValueError for another order or grid.
    """
    levels = sigmas.flatten().tolist()
    if order not in (1, 2):
        raise ValueError(f"order={order} must be 1 (DDIM's inversion) or 2 (Heun's)")
    if len(levels) < 2 or not all(high > low >= 0 for high, low in pairwise(levels)) or not math.isfinite(levels[0]):
        raise ValueError(f"sigmas={levels} must fall strictly from a finite number to 0 or above, as a sampler's do")
    x = x0.to(torch.promote_types(x0.dtype, torch.float32))

    def estimate(x: Tensor, sigma: float) -> Tensor:
        return denoise(x, torch.full((), sigma, dtype=x.dtype, device=x.device)).to(x.dtype)

    for sigma, above in pairwise(reversed(levels)):
        x0_hat = estimate(x, sigma) if sigma > 0 else x
        x_next = torch.lerp(x0_hat, x, above / sigma) if sigma > 0 else x
        if order == 2:
            slope = (x - x0_hat) / sigma if sigma > 0 else torch.zeros_like(x)
            x_next = x + (above - sigma) * (slope + (x_next - estimate(x_next, above)) / above) / 2
        x = x_next
    return x
