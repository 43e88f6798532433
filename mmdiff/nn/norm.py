"""Normalisation, and its modulation by an embedding of the noise level."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def group_norm(channels: int) -> nn.GroupNorm:
    """Group norm with 32 groups, or as many as leave at least 4 channels to each and divide `channels`."""
    groups = next(g for g in range(min(32, max(1, channels // 4)), 0, -1) if channels % g == 0)
    return nn.GroupNorm(groups, channels, eps=1e-5)


class AdaGroupNorm(nn.Module):
    """Group norm, then `(1 + scale) * x + shift` from an embedding (Dhariwal & Nichol 2021, sec. 3.1).

    x (B, C, T, ...), embedding (B, D) or, one for each time step, (B, D, T).
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.affine = nn.Linear(width, 2 * channels)
        nn.init.zeros_(self.affine.weight)
        nn.init.zeros_(self.affine.bias)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        if embedding.ndim == 2:
            # a compiler fuses the passes itself, and would compile `modulate` again for every batch size
            if not torch.compiler.is_compiling():
                return self.modulate(x, embedding)
            embedding = embedding[..., None]
        scale_shift = self.affine(embedding.transpose(1, 2)).transpose(1, 2)  # (B, 2C, T or 1)
        scale, shift = scale_shift.reshape(*scale_shift.shape, *(1,) * (x.ndim - 3)).chunk(2, dim=1)
        return torch.addcmul(shift, self.norm(x), 1 + scale)

    def modulate(self, x: Tensor, embedding: Tensor) -> Tensor:
        """One scale and shift for all steps: they join the norm's own, in one pass over the items side by side."""
        scale, shift = self.affine(embedding).chunk(2, dim=1)  # (B, C) each
        weight = self.norm.weight * (1 + scale)
        bias = torch.addcmul(shift, self.norm.bias, 1 + scale)
        side_by_side = x.reshape(1, -1, *x.shape[2:])  # (1, B C, *axes)
        groups = x.shape[0] * self.norm.num_groups
        return F.group_norm(side_by_side, groups, weight.flatten(), bias.flatten(), self.norm.eps).reshape(x.shape)


class Standardize(nn.Module):
    """(B, D) minus its running mean, over its running deviation, times `gain`; a constant part of the input goes.

    The running statistics move by `rate` towards each batch in training, from the first batch's on; the batch itself is
    normalised by them alone, so that its items do not mix, as they do in batch norm.
    """

    mean: Tensor
    square: Tensor
    seen: Tensor

    def __init__(self, width: int, gain: float = 1.0, rate: float = 0.02) -> None:
        super().__init__()
        self.gain, self.rate = gain, rate
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("square", torch.ones(width))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.seen += 1
                rate = max(self.rate, 1 / int(self.seen))
                self.mean.lerp_(x.mean(dim=0), rate)
                self.square.lerp_(x.square().mean(dim=0), rate)
        deviation = (self.square - self.mean**2).clamp(min=1e-6).sqrt()
        return self.gain * (x - self.mean) / deviation
