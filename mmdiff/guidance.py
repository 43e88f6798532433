"""Guidance: functions from denoisers to a denoiser, so that samplers need not know of it."""

import math

import torch
from torch import Tensor

from mmdiff.sampling import Denoise


def cfg(pos: Denoise, neg: Denoise, scale: float) -> Denoise:
    """Denoiser at neg + scale * (pos - neg): guided towards `pos` and away from `neg`.

    `neg` bound to the null prompt is classifier-free guidance (arXiv 2207.12598, eq. 6 with scale = 1 + w), to another
    prompt a negative prompt, to a weaker model autoguidance (arXiv 2406.02507, eq. 3).
    scale: 1 is `pos` alone and never calls `neg`, 0 is `neg` alone and never calls `pos`, above 1 guides.
    Raises ValueError if the scale is not finite.
    """
    if not math.isfinite(scale):
        raise ValueError(f"scale={scale} must be finite; 1 is no guidance, 2 to 8 is usual")
    if scale == 1:
        return pos
    if scale == 0:
        return neg

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.lerp(neg(x, sigma), pos(x, sigma), scale)

    return guided
