"""Rules that look at the estimates or at the grid: adaptive projected guidance, CFG++, CFG-Zero*.

B batch, C channels, T time. sigma may be (), (B,) or (B, T); inner products and norms are an item's, over (C, T, ...).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mmdiff.denoiser import expand_like
from mmdiff.sampling import Denoise

from .rules import Bind, Guidance, check_finite
from .together import together


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each item, (B, 1, 1, ...)."""
    return (a * b).sum(dim=tuple(range(1, a.ndim)), keepdim=True)


@dataclass(frozen=True)
class APG(Guidance):
    """Adaptive projected guidance: what makes guided clips gaudy is taken out of the difference of the estimates.

    The difference d = pos - neg, with `momentum` times the one before added, is shortened to `threshold`, split into
    the part along `pos` and the part across it, and D = pos + (scale - 1) * (across + eta * along).
    scale: at least 1, which is `pos`. eta: 0 drops the part along `pos`, 1 keeps it.
    threshold: greatest root mean square of d, inf for none; the paper's norm r divided by sqrt(elements of an item),
        so that it holds for clips of every length (its 15 for SDXL is 0.06).
    momentum: below 0 steps away from the last difference, as the paper advises; above -1 and below 1. It counts calls,
        of which Heun makes two a step, and begins anew with each run: at sigmas[0].
    With eta=1, threshold=inf and momentum=0 it is `Cfg`. Source: arXiv 2410.02416, algorithm 1.
    """

    scale: float = 4.0
    eta: float = 0.0
    threshold: float = 0.06
    momentum: float = -0.5

    def __post_init__(self) -> None:
        check_finite("scale", self.scale)
        if self.scale < 1:
            raise ValueError(f"scale={self.scale} must be at least 1, the conditional estimate; Cfg takes less")
        if not math.isfinite(self.eta):
            raise ValueError(f"eta={self.eta} must be finite; 0 drops the part along the estimate, 1 keeps it")
        if not self.threshold > 0:
            raise ValueError(f"threshold={self.threshold} must be positive; inf is none")
        if not -1 < self.momentum < 1:
            raise ValueError(f"momentum={self.momentum} must lie between -1 and 1; -0.5 is usual, 0 is none")

    @property
    def reads_neg(self) -> bool:
        return self.scale != 1

    def __call__(self, pos: Denoise, neg: Denoise, sigmas: Tensor, bind: Bind | None = None) -> Denoise:
        if self.scale == 1:
            return pos
        first = float(sigmas[0])
        last: Tensor | None = None

        def guided(x: Tensor, sigma: Tensor) -> Tensor:
            nonlocal last
            d_neg, d_pos = together([neg, pos], x, sigma)
            d = d_pos - d_neg
            if self.momentum != 0:
                if last is not None and last.shape == d.shape:
                    going = expand_like(sigma < first, x)  # no branch: it would wait for the device
                    d = d + self.momentum * torch.where(going, last, 0)
                last = d
            if self.threshold < math.inf:
                size = (dot(d, d) / d[0].numel()).sqrt()
                d = d * (self.threshold / size.clamp(min=self.threshold))
            along = dot(d, d_pos) / dot(d_pos, d_pos).clamp(min=torch.finfo(x.dtype).tiny) * d_pos
            return d_pos + (self.scale - 1) * (d + (self.eta - 1) * along)

        return guided


@dataclass(frozen=True)
class CfgPP(Guidance):
    """CFG++: the guided estimate, noised again with the unconditional noise (arXiv 2406.08070, algorithm 2).

    For a step from sigma to r * sigma of first order that is neg + scale / (1 - r) * (pos - neg): exact with
    `Ancestral(0)` and, there, on any grid; other samplers get a guidance of that strength at each level.
    scale: 0 is unconditional, 1 is the conditional estimate with unconditional noise; 0.2 to 1 is usual.
    Raises ValueError, in the call, at a sigma that is not of the grid: steps with churn, or with stages between levels.
    """

    scale: float = 0.6

    def __post_init__(self) -> None:
        if not 0 <= self.scale < math.inf:
            raise ValueError(f"scale={self.scale} must be finite and not negative; 0.2 to 1 is usual")

    def __call__(self, pos: Denoise, neg: Denoise, sigmas: Tensor, bind: Bind | None = None) -> Denoise:
        if self.scale == 0:
            return neg

        def guided(x: Tensor, sigma: Tensor) -> Tensor:
            levels = sigmas.to(sigma).flip(0)
            place = torch.searchsorted(levels, sigma.contiguous()).clamp(max=len(levels) - 1)
            if not torch.equal(levels[place], sigma):
                raise ValueError(
                    f"CfgPP at sigma={sigma.flatten().tolist()[:4]}, which is no level of the grid; use a sampler that "
                    "calls at its levels alone, as Ancestral"
                )
            ratio = levels[(place - 1).clamp(min=0)] / torch.where(sigma > 0, sigma, 1)  # a known part's is 0
            d_neg, d_pos = together([neg, pos], x, sigma)
            return torch.lerp(d_neg, d_pos, expand_like(self.scale / (1 - ratio), x))

        return guided


@dataclass(frozen=True)
class CfgZero(Guidance):
    """CFG-Zero*: the unconditional velocity is scaled to fit the conditional one, and the first steps stand still.

    v = (1 - scale) s v_neg + scale v_pos with s = <v_pos, v_neg> / |v_neg|^2, an item's, in the velocities
    v = eps - x0 of rectified flow; any parametrisation has them.
    zero_steps: steps of the grid at whose start v = 0; they call no network. 0 is none, the paper's is 4 % of them.
    scale: at least 1, which is `pos`. Source: arXiv 2503.18886, algorithm 1.
    Raises ValueError, in the call, if the grid has no more steps than zero_steps.
    """

    scale: float = 4.0
    zero_steps: int = 1

    def __post_init__(self) -> None:
        check_finite("scale", self.scale)
        if self.scale < 1:
            raise ValueError(f"scale={self.scale} must be at least 1, the conditional estimate; Cfg takes less")
        if self.zero_steps < 0:
            raise ValueError(f"zero_steps={self.zero_steps} must not be negative; 1 is usual, 0 is none")

    @property
    def reads_neg(self) -> bool:
        return self.scale != 1

    def __call__(self, pos: Denoise, neg: Denoise, sigmas: Tensor, bind: Bind | None = None) -> Denoise:
        if self.zero_steps > len(sigmas) - 2:
            raise ValueError(f"zero_steps={self.zero_steps} leaves nothing of a grid of {len(sigmas) - 1} steps")

        edge = float(sigmas[self.zero_steps])

        def guided(x: Tensor, sigma: Tensor) -> Tensor:
            level = expand_like(sigma, x)
            still = sigma > edge
            if self.zero_steps and still.all():
                return x / (1 + level)  # v = 0
            if self.scale == 1:
                x0 = pos(x, sigma)
            else:
                d_neg, d_pos = together([neg, pos], x, sigma)
                # sigma v = x - (1 + sigma) x0; the factor sigma cancels in s
                v_neg, v_pos = x - (1 + level) * d_neg, x - (1 + level) * d_pos
                s = dot(v_pos, v_neg) / dot(v_neg, v_neg).clamp(min=torch.finfo(x.dtype).tiny)
                x0 = (x - torch.lerp(s * v_neg, v_pos, self.scale)) / (1 + level)
            return torch.where(expand_like(still, x), x / (1 + level), x0) if self.zero_steps else x0

        return guided
