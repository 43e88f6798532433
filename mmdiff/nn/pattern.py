"""Which tokens of a grid attend to which: patterns as data.

B batch, H heads, D head width, L tokens that attend to one another. Grids are (B, *sizes, H, D), time first.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_HEADS = 65_535  # of CUDA's attention kernels: heads are a grid's second or third dimension


@dataclass(frozen=True)
class Pattern:
    """Self-attention over some axes of a grid, in windows where told; the other axes are batch.

    axes: that are attended over, ascending: [0] is time, [1, 2] is space, [0, 1, 2] is all.
    window: tokens of a window on every axis of the grid, 0 for the whole axis; None for no windows. Windows do not
        overlap; the last is shorter where they do not fill the axis.
    shifted: whether windows start half a window earlier, so that two blocks in turn connect all of an axis (Liu et
        al. 2021, section 3.2, without their cyclic shift: the first window is shorter).
    """

    axes: tuple[int, ...]
    window: tuple[int, ...] | None = None
    shifted: bool = False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of queries, keys and values (B, *sizes, H, D) -> (B, *sizes, H, D)."""
        batch, *sizes, heads, width = q.shape
        pads = [self.pad(axis, size) for axis, size in enumerate(sizes)]
        padded = [front + size + back for size, (front, back) in zip(sizes, pads, strict=True)]
        parts, groups, over, rest = self.plan(padded, heads)
        fill = [n for pair in reversed(pads) for n in pair]

        def split(x: Tensor) -> Tensor:  # (B, *sizes, H, D) -> (B', H', L, D); a view where there are no windows
            x = F.pad(x, (0, 0, 0, 0, *fill)) if any(fill) else x
            x = x.reshape(batch, *parts, *x.shape[-2:]).permute(0, *groups, *over, *rest, -2, -1)
            return x.flatten(0, len(groups)).flatten(1, len(over)).flatten(2, -2).transpose(1, 2)

        mask = None
        if any(fill):  # what was filled in is no key; every window holds a token that was not
            mask = split(torch.ones(batch, *sizes, 1, 1, dtype=torch.bool, device=q.device))[:, :1].mT
        y = F.scaled_dot_product_attention(split(q), split(k), split(v), attn_mask=mask).transpose(1, 2)
        order = [*groups, *over, *rest]
        y = y.reshape(batch, *(parts[i - 1] for i in order), heads, width)
        y = y.permute(0, *(1 + order.index(i) for i in range(1, 1 + len(order))), -2, -1)
        y = y.reshape(batch, *padded, heads, width)
        for axis, (front, _) in enumerate(pads):
            y = y.narrow(1 + axis, front, sizes[axis])
        return y

    def length(self, axis: int, size: int) -> int:
        """Tokens of a window on this axis: all of them where the window is no shorter."""
        window = 0 if self.window is None else self.window[axis]
        return window if 0 < window < size else size

    def pad(self, axis: int, size: int) -> tuple[int, int]:
        """Tokens to add before and after an axis, so that windows fill it."""
        length = self.length(axis, size)
        if axis not in self.axes or length == size:
            return 0, 0
        front = -(length // 2) % length if self.shifted else 0
        return front, -(front + size) % length

    def plan(self, sizes: Sequence[int], heads: int) -> tuple[list[int], list[int], list[int], list[int]]:
        """Sizes with attended axes as (windows, length), and which of these dimensions (from 1 on) are batch, attended
        over, and heads: axes after the attended ones count as heads, so that nothing need move in memory.
        """
        last = self.axes[-1] if math.prod(sizes[self.axes[-1] + 1 :]) * heads <= MAX_HEADS else len(sizes)
        parts: list[int] = []
        groups: list[int] = []
        over: list[int] = []
        rest: list[int] = []
        for axis, size in enumerate(sizes):
            if axis in self.axes:
                length = self.length(axis, size)
                parts += [size // length, length]
                groups.append(len(parts) - 1)
                over.append(len(parts))
            else:
                parts.append(size)
                (rest if axis > last else groups).append(len(parts))
        return parts, groups, over, rest
