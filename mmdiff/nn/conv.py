"""Convolutions and resampling over 1, 2 or 3 axes.

B batch, C channels, T time (always axis 2), `*axes` T and what follows it.
"""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

CONVOLUTIONS: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {
    1: nn.Conv1d,
    2: nn.Conv2d,
    3: nn.Conv3d,
}


class TimeConv3d(nn.Conv3d):
    """3-D convolution with a kernel (k, 1, 1), run as a 2-D one over (T, H W): half the time on one core."""

    def forward(self, x: Tensor) -> Tensor:
        planes = x.flatten(3)  # (B, C, T, H W)
        weight, padding, dilation = self.weight.flatten(3), (self.padding[0], 0), (self.dilation[0], 1)
        return F.conv2d(planes, weight, self.bias, 1, padding, dilation).unflatten(3, x.shape[3:])  # type: ignore[arg-type]


def convolution(
    c_in: int, c_out: int, kernel: Sequence[int], zero: bool = False, dilation: Sequence[int] | None = None
) -> nn.Module:
    """Convolution of stride 1 that keeps sizes: a kernel of odd lengths, and a dilation, one of each per axis.

    `zero` initialises it to give zero, so that a residual branch starts as the identity.
    """
    if any(k % 2 == 0 for k in kernel):
        raise ValueError(f"kernel={tuple(kernel)} has an even length; only odd ones keep the size")
    dilation = (1,) * len(kernel) if dilation is None else tuple(dilation)
    padding = tuple(k // 2 * d for k, d in zip(kernel, dilation, strict=True))
    over_time = len(kernel) == 3 and kernel[0] > 1 and kernel[1] == kernel[2] == 1
    kind = TimeConv3d if over_time else CONVOLUTIONS[len(kernel)]
    layer = kind(c_in, c_out, tuple(kernel), padding=padding, dilation=dilation)  # type: ignore[arg-type]
    if zero:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


def pool_time(embedding: Tensor, factor: int) -> Tensor:
    """(B, D, T) -> (B, D, T / factor) by mean; (B, D) has no time and is returned as it is."""
    if embedding.ndim == 2 or factor == 1:
        return embedding
    return F.avg_pool1d(embedding, factor)


class Resample(nn.Module):
    """Divides (down) or multiplies (up) each axis by its factor: fold steps into channels, then mix them linearly.

    Folding loses nothing, where pooling does: (B, C, *axes) -> (B, C', *axes / factors), or times factors for `up`.
    """

    def __init__(self, c_in: int, c_out: int, factors: Sequence[int], up: bool = False) -> None:
        super().__init__()
        self.factors, self.up = tuple(factors), up
        cells = math.prod(self.factors)
        ones = (1,) * len(self.factors)
        self.mix = convolution(c_in, c_out * cells, ones) if up else convolution(c_in * cells, c_out, ones)

    def forward(self, x: Tensor) -> Tensor:
        return unfold_cells(self.mix(x), self.factors) if self.up else self.mix(fold_cells(x, self.factors))


def fold_cells(x: Tensor, factors: Sequence[int]) -> Tensor:
    """(B, C, T f0, ...) -> (B, C f0 f1 ..., T, ...): each cell of `factors` steps becomes channels."""
    b, c, *sizes = x.shape
    split = [n for size, f in zip(sizes, factors, strict=True) for n in (size // f, f)]
    k = len(factors)
    x = x.reshape(b, c, *split).permute(0, 1, *range(3, 2 + 2 * k, 2), *range(2, 2 + 2 * k, 2))
    return x.reshape(b, -1, *(size // f for size, f in zip(sizes, factors, strict=True)))


def unfold_cells(x: Tensor, factors: Sequence[int]) -> Tensor:
    """Inverse of `fold_cells`: (B, C f0 f1 ..., T, ...) -> (B, C, T f0, ...)."""
    b, _, *sizes = x.shape
    k = len(factors)
    x = x.reshape(b, -1, *factors, *sizes)
    order = [axis for i in range(k) for axis in (2 + k + i, 2 + i)]
    return x.permute(0, 1, *order).reshape(b, -1, *(size * f for size, f in zip(sizes, factors, strict=True)))


def legal_sizes(size: int, multiple: int) -> str:
    """The legal sizes next to `size`, for an error message: multiples of `multiple`."""
    low = size // multiple * multiple
    return " or ".join(str(n) for n in (low, low + multiple) if n > 0)


def check_sizes(sizes: Sequence[int], multiples: Sequence[int]) -> None:
    """Raises ValueError naming each axis whose size is no multiple of what divides it, and its nearest sizes."""
    names = {1: ("T",), 2: ("T", "F"), 3: ("T", "H", "W")}[len(multiples)]
    faults = [
        f"{name}={size} is not a multiple of {multiple}; nearest: {legal_sizes(size, multiple)}"
        for name, size, multiple in zip(names, sizes, multiples, strict=True)
        if size < 1 or size % multiple
    ]
    if faults:
        raise ValueError(", and ".join(faults))
