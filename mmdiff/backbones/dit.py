"""Diffusion transformer over one, two or three axes: waveform latents (T), spectrograms (T, F), videos (T, H, W).

B batch, C channels, D width. Time is axis 2, so `(B, C, T)`, `(B, C, T, F)`, `(B, C, T, H, W)`; inside, tokens lie on a
grid (B, *sizes, D), one for each patch.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from ..nn.attention import check_heads
from ..nn.conv import fold_cells, pool_time, unfold_cells
from ..nn.embed import NoiseEmbedding
from ..nn.pattern import Pattern
from ..nn.rotary import Rotation, frequencies, rotation
from ..nn.tokens import Block, JointBlock, LastJointBlock, linear, modulated
from .condition import Condition, check_input
from .share import Shareable

SPACE_BASE, TIME_BASE = 100.0, 10_000.0  # grids of patches are short (Heo et al. 2024), clips may be long


class DiT(Shareable):
    """Diffusion transformer over the axes of `patch`: forward(x, c_noise, cond) -> (B, out_channels, *sizes of x).

    Args:
        in_channels, out_channels: channels of x and of the result (default: the same).
        patch: steps of each axis that make a token, time first; its length is the number of axes.
        attend: patterns of self-attention, each a list of axes (0 is time), in turn over the blocks: default one of all
            axes. [[1, 2], [0]] is factorised: space in even blocks, time in odd ones.
        window: tokens of a window on each axis, 0 for the whole axis: attention stays inside windows, which are shifted
            by half in every second turn of the patterns. Default none.
        width, depth: D and the number of blocks. head_channels: channels of an attention head, even.
        mlp_ratio: width of the MLP's inside, as a multiple of D.
        tokens_width, vector_width, concat_channels: widths of the slots of a condition; 0 where there is none.
        joint: whether the tokens are a second stream with weights of its own, attended to together with the data
            (MM-DiT), and not cross-attended to. Every pattern must be of all axes, without windows.
        cross: for each pattern whether its blocks attend to the tokens; default all where `tokens_width` is given.
        rate: steps of axis T per second, in Hz, as the network sees it.
        radian_s: seconds in which the fastest channels of a head turn by one radian. Positions in time are seconds, of
            a patch's start: a model sees the same motion alike at every rate. By default they are those of single steps
            at 25 per second; positions in space are counted in patches.
        dropout: rate on what attention and MLP add.
        checkpoint: keep only the inputs of blocks in memory and run each again for its gradients: about a third more
            time for a fraction of the memory, and the same gradients.

    The control taps (see `mmdiff.backbones.control`) are the outputs of the first half of the blocks, (B, N, D):
    `tap_channels` are their channels, on axis `tap_axis`, `hint_channels` those of the stem's output.

    Raises ValueError for settings that disagree, sizes that are no multiples of the patch, and a condition that the
    network was not built for. The result is exactly zero before training. Source: Peebles & Xie 2023, arXiv 2212.09748.
    """

    def __init__(
        self,
        in_channels: int,
        patch: Sequence[int],
        attend: Sequence[Sequence[int]] | None = None,
        window: Sequence[int] | None = None,
        out_channels: int | None = None,
        width: int = 384,
        depth: int = 12,
        head_channels: int = 64,
        mlp_ratio: int = 4,
        tokens_width: int = 0,
        vector_width: int = 0,
        concat_channels: int = 0,
        joint: bool = False,
        cross: Sequence[bool] | None = None,
        rate: float = 25.0,
        radian_s: float = 0.04,
        dropout: float = 0.0,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        axes = len(patch)
        out_channels = in_channels if out_channels is None else out_channels
        attend = [range(axes)] if attend is None else attend
        cross = [tokens_width > 0] * len(attend) if cross is None else cross
        check_numbers(
            {"in_channels": in_channels, "out_channels": out_channels, "width": width, "depth": depth}
            | {"mlp_ratio": mlp_ratio},
            {"tokens_width": tokens_width, "vector_width": vector_width, "concat_channels": concat_channels},
            {"rate": rate, "radian_s": radian_s},
            dropout,
        )
        check_patterns(patch, attend, window, head_channels)
        check_heads("width", width, head_channels)
        check_tokens(tokens_width, cross, len(attend))
        if joint:
            check_joint(tokens_width, cross, axes, attend, window)
        self.in_channels, self.concat_channels, self.patch = in_channels, concat_channels, tuple(patch)
        self.tokens_width, self.vector_width = tokens_width, vector_width
        self.head_channels, self.rate, self.radian_s, self.checkpoint = head_channels, rate, radian_s, checkpoint
        axes_of_blocks = [tuple(sorted(attend[i % len(attend)])) for i in range(depth)]
        self.axes_of_blocks = axes_of_blocks

        cells = math.prod(patch)
        self.embed = NoiseEmbedding(width, vector_width)
        self.stem = linear((in_channels + concat_channels) * cells, width)
        self.tokens_stem = (
            nn.Sequential(nn.LayerNorm(tokens_width), linear(tokens_width, width), nn.GELU(), linear(width, width))
            if tokens_width
            else None
        )
        self.blocks = nn.ModuleList()
        for i, over in enumerate(axes_of_blocks):
            sizes = (width, head_channels, mlp_ratio, dropout)
            if joint:
                self.blocks.append(JointBlock(*sizes) if i < depth - 1 else LastJointBlock(*sizes))
            else:
                turn, which = divmod(i, len(attend))
                pattern = Pattern(over, None if window is None else tuple(window), turn % 2 == 1)
                self.blocks.append(Block(pattern, cross[which], *sizes))
        # Zero before training by a last norm that is switched off, shift 0 and scale -1, under a head that is not zero:
        # with a zero head the network learns visibly slower.
        self.modulation = linear(width, 2 * width, zero=True)
        nn.init.constant_(self.modulation.bias[width:].data, -1.0)
        self.head = linear(width, out_channels * cells)
        half = (depth + 1) // 2
        self.tap_channels, self.tap_axis, self.hint_channels = [width] * half, -1, width
        self.after_taps = (*(f"blocks.{i}" for i in range(half, depth)), "modulation", "head")

    @classmethod
    def S(cls, in_channels: int, **settings: Any) -> Self:
        """The paper's small size: 12 blocks of 384 channels, 33 million parameters before those of conditions."""
        return cls(in_channels, width=384, depth=12, head_channels=64, **settings)

    @classmethod
    def B(cls, in_channels: int, **settings: Any) -> Self:
        """The paper's base size: 12 blocks of 768 channels, 130 million parameters."""
        return cls(in_channels, width=768, depth=12, head_channels=64, **settings)

    @classmethod
    def L(cls, in_channels: int, **settings: Any) -> Self:
        """The paper's large size: 24 blocks of 1024 channels, 458 million parameters."""
        return cls(in_channels, width=1024, depth=24, head_channels=64, **settings)

    @classmethod
    def XL(cls, in_channels: int, **settings: Any) -> Self:
        """The paper's extra-large size: 28 blocks of 1152 channels, 675 million parameters."""
        return cls(in_channels, width=1152, depth=28, head_channels=72, **settings)

    def forward(
        self, x: Tensor, c_noise: Tensor, cond: Condition | None = None, control: Sequence[Tensor] | None = None
    ) -> Tensor:
        """The network's output, (B, out_channels, *axes); `control`, where given, is added to the taps."""
        if control is not None and len(control) != len(self.tap_channels):
            raise ValueError(f"control has {len(control)} tensors, but the network has {len(self.tap_channels)} taps")
        x, tokens, mask, embedding, tables = self.enter(x, c_noise, cond, None)
        for i, (block, table) in enumerate(zip(self.blocks, tables, strict=True)):
            x, tokens = self.run(block, x, tokens, mask, embedding, table)
            if control is not None and i < len(control):
                x = x + control[i].reshape(x.shape)
        shift, scale = self.modulation(embedding).chunk(2, dim=-1)
        return unfold_cells(self.head(modulated(x, shift, scale)).movedim(-1, 1), self.patch)

    def taps(
        self, x: Tensor, c_noise: Tensor, cond: Condition | None = None, hint: Tensor | None = None
    ) -> list[Tensor]:
        """The output (B, N, D) of each block of the first half, N in row-major order of the patches.

        hint: (B, N, D), added to the stem's output.
        """
        x, tokens, mask, embedding, tables = self.enter(x, c_noise, cond, hint)
        taps = []
        for i in range(len(self.tap_channels)):
            x, tokens = self.run(self.blocks[i], x, tokens, mask, embedding, tables[i])
            taps.append(x.flatten(1, -2))
        return taps

    def enter(
        self, x: Tensor, c_noise: Tensor, cond: Condition | None, hint: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, list[Rotation]]:
        """What the blocks are given: tokens of the data and of the condition, their mask, noise embedding, tables."""
        check_input(
            x,
            c_noise,
            cond,
            in_channels=self.in_channels,
            multiples=self.patch,
            tokens_width=self.tokens_width,
            vector_width=self.vector_width,
            concat_channels=self.concat_channels,
        )
        tokens, mask, vector, concat = (
            (None,) * 4 if cond is None else (cond.tokens, cond.mask, cond.vector, cond.concat)
        )
        if concat is not None:
            x = torch.cat([x, concat.to(x.dtype)], dim=1)
        embedding = pool_time(self.embed(c_noise, vector), self.patch[0])  # (B, D) or (B, D, T / patch)
        embedding = embedding[:, None] if embedding.ndim == 2 else embedding.transpose(1, 2)
        embedding = embedding.unflatten(1, (-1, *(1,) * (len(self.patch) - 1)))  # (B, T / patch or 1, 1, ..., D)
        x = self.stem(fold_cells(x, self.patch).movedim(1, -1))  # (B, *sizes, D)
        if hint is not None:
            if hint.shape != (due := x.flatten(1, -2)).shape:
                raise ValueError(f"hint has shape {tuple(hint.shape)}; the stem's output, {tuple(due.shape)}, is due")
            x = x + hint.reshape(x.shape)
        if self.tokens_stem is not None:
            tokens = self.tokens_stem(tokens)
        tables = {axes: self.table(axes, x.shape[1:-1], x.device) for axes in set(self.axes_of_blocks)}
        return x, tokens, mask, embedding, [tables[axes] for axes in self.axes_of_blocks]

    def table(self, axes: Sequence[int], sizes: Sequence[int], device: torch.device) -> Rotation:
        """Rotary table for attention over `axes`; it broadcasts over the grid, the heads, and queries and keys.

        Each axis has an equal share of a head's channels, the first one also what is over.
        """
        pairs = self.head_channels // 2
        positions: list[Tensor | None] = [None] * len(sizes)
        turns = []
        for axis in axes:
            unit = self.patch[0] / (self.rate * self.radian_s) if axis == 0 else 1.0
            positions[axis] = torch.arange(sizes[axis], device=device, dtype=torch.float32) * unit
            share = pairs // len(axes) + (pairs % len(axes) if axis == axes[0] else 0)
            turns.append(frequencies(share, TIME_BASE if axis == 0 else SPACE_BASE, device))
        cos, sin = rotation(positions, turns)
        return Rotation(cos[..., None, None, :], sin[..., None, None, :])

    def run(
        self,
        block: nn.Module,
        x: Tensor,
        tokens: Tensor | None,
        mask: Tensor | None,
        embedding: Tensor,
        table: Rotation,
    ) -> tuple[Tensor, Tensor | None]:
        """The block's output, its inner activations kept only if there is no `checkpoint`."""
        if self.checkpoint and torch.is_grad_enabled():
            return recompute(block, x, tokens, mask, embedding, table, use_reentrant=False)  # type: ignore[no-any-return]
        return block(x, tokens, mask, embedding, table)  # type: ignore[no-any-return]


class SpatioTemporalDiT(DiT):
    """`DiT` over video (B, C, T, H, W): attention over space and over time in turn, unless `attend` says otherwise.

    attend=[[0, 1, 2]] is attention over all of space and time at once. Other arguments are those of `DiT`.
    """

    def __init__(
        self,
        in_channels: int,
        patch: Sequence[int] = (1, 2, 2),
        attend: Sequence[Sequence[int]] = ((1, 2), (0,)),
        **settings: Any,
    ) -> None:
        if len(patch) != 3:
            raise ValueError(f"patch={list(patch)} must be 3 numbers: steps of time, height and width")
        super().__init__(in_channels, patch, attend, **settings)


class DiT1D(DiT):
    """`DiT` over sequences (B, C, T), such as the latents of audio. Other arguments are those of `DiT`."""

    def __init__(self, in_channels: int, patch: Sequence[int] = (1,), **settings: Any) -> None:
        if len(patch) != 1:
            raise ValueError(f"patch={list(patch)} must be 1 number: steps of time")
        super().__init__(in_channels, patch, **settings)


def check_numbers(
    counts: Mapping[str, int], widths: Mapping[str, int], units: Mapping[str, float], dropout: float
) -> None:
    """Raises ValueError where a number is out of its range."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}={count} must be at least 1")
    for name, width in widths.items():
        if width < 0:
            raise ValueError(f"{name}={width} must be at least 0, which is none")
    for name, unit in units.items():
        if not 0 < unit < math.inf:
            raise ValueError(f"{name}={unit} must be positive and finite")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout} must be from 0 up to, but not, 1")


def check_patterns(
    patch: Sequence[int], attend: Sequence[Sequence[int]], window: Sequence[int] | None, head_channels: int
) -> None:
    """Raises ValueError where axes, patterns, windows and heads do not fit each other."""
    axes = len(patch)
    if axes not in (1, 2, 3) or min(patch) < 1:
        raise ValueError(f"patch={list(patch)} must be 1, 2 or 3 numbers from 1 up, one for each axis")
    if not attend:
        raise ValueError("attend=[] must hold a pattern at least, such as [[0]]")
    for pattern in attend:
        if not pattern or len(set(pattern)) != len(pattern) or not set(pattern) <= set(range(axes)):
            raise ValueError(f"attend: {list(pattern)} must name different axes out of {list(range(axes))}")
        if head_channels % 2 or head_channels < 2 * len(pattern):
            raise ValueError(
                f"head_channels={head_channels} must be even and at least {2 * len(pattern)}: 2 for each axis of "
                f"{list(pattern)}"
            )
    if window is not None and (len(window) != axes or min(window) < 0):
        raise ValueError(f"window={list(window)} must be {axes} numbers of tokens, one for each axis, 0 for all of it")
    unread = [
        i for i in range(axes) if window is not None and window[i] and not any(i in pattern for pattern in attend)
    ]
    if window is not None and unread:
        raise ValueError(f"window={list(window)} parts axis {unread[0]}, which no pattern of attend reads; give it 0")


def check_tokens(tokens_width: int, cross: Sequence[bool], patterns: int) -> None:
    """Raises ValueError where the blocks that attend to tokens do not fit the condition."""
    if len(cross) != patterns:
        raise ValueError(f"cross has {len(cross)} entries, but attend has {patterns}")
    if any(cross) and not tokens_width:
        raise ValueError("cross is set, but tokens_width=0: give the width of the text encoder's tokens")
    if tokens_width and not any(cross):
        raise ValueError(f"tokens_width={tokens_width}, but cross={list(cross)}: no block would read the tokens")


def check_joint(
    tokens_width: int,
    cross: Sequence[bool],
    axes: int,
    attend: Sequence[Sequence[int]],
    window: Sequence[int] | None,
) -> None:
    """Raises ValueError where joint attention cannot be: without tokens, or over less than all of both streams."""
    if not tokens_width:
        raise ValueError("joint=True, but tokens_width=0: give the width of the text encoder's tokens")
    if not all(cross) or window is not None or any(len(pattern) < axes for pattern in attend):
        raise ValueError(
            f"joint=True is attention over all axes and tokens at once, but attend={[list(a) for a in attend]}, "
            f"window={window}, cross={list(cross)}; leave these out, or cross-attend with joint=False"
        )
