"""Rotary positions: pairs of channels of queries and keys turned by angles, so that scores see distances alone.

R turned channels of a head. Angles are float32: half precision tells steps beyond 256 no longer apart.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """Cosines, and sines signed for each half of the channels, both (n0 or 1, n1 or 1, ..., R)."""

    cos: Tensor
    sin: Tensor


def frequencies(count: int, base: float, device: torch.device | None = None) -> Tensor:
    """Radians per unit of position, (count,): from 1 down, geometrically, to almost 1 / base (Su et al. 2021)."""
    return base ** (-torch.arange(count, device=device, dtype=torch.float32) / count)


def rotation(positions: Sequence[Tensor | None], turns: Sequence[Tensor]) -> Rotation:
    """The table of a grid: each axis turns channels of its own.

    positions: for each axis the positions (n,) of its steps, None for an axis that has none (it broadcasts).
    turns: the frequencies (f,) of each axis that has positions, in their order. R is twice their number.
    """
    axes = [i for i, position in enumerate(positions) if position is not None]
    sizes = [1 if position is None else position.shape[0] for position in positions]
    parts = []
    for i, turn in zip(axes, turns, strict=True):
        angles = positions[i][:, None] * turn  # type: ignore[index]
        parts.append(angles.reshape(*(n if j == i else 1 for j, n in enumerate(sizes)), -1))
    cos = torch.cat([part.cos().expand(*sizes, -1) for part in parts], dim=-1)
    sin = torch.cat([part.sin().expand(*sizes, -1) for part in parts], dim=-1)
    return Rotation(torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1))


def rotate(x: Tensor, table: Rotation) -> Tensor:
    """x (..., D), its first R channels turned: channel j with channel j + R / 2. Computed in float32 at the least."""
    width = table.cos.shape[-1]
    turned = x[..., :width].to(torch.promote_types(x.dtype, torch.float32))
    swapped = turned.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    turned = torch.addcmul(turned * table.cos, swapped, table.sin).to(x.dtype)
    return turned if width == x.shape[-1] else torch.cat([turned, x[..., width:]], dim=-1)
