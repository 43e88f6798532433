"""U-Net over one, two or three axes: waveforms (T), spectrograms (T, F), videos (T, H, W).

B batch, C channels, D width of the noise embedding. Time is axis 2, so `(B, C, T)`, `(B, C, T, F)`, `(B, C, T, H, W)`.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from ..nn.attention import AxisAttention, CrossAttention
from ..nn.conv import Resample, check_sizes, convolution, fold_cells, pool_time, unfold_cells
from ..nn.embed import NoiseEmbedding
from ..nn.norm import AdaGroupNorm, group_norm


class Condition(Protocol):
    """What a backbone reads of a condition: `mmdiff.conditioning.Cond`, or any object with these four attributes."""

    @property
    def tokens(self) -> Tensor | None: ...
    @property
    def mask(self) -> Tensor | None: ...
    @property
    def vector(self) -> Tensor | None: ...
    @property
    def concat(self) -> Tensor | None: ...


class ResBlock(nn.Module):
    """Residual block with adaptive group norm (Dhariwal & Nichol 2021); the kernels follow one another in each half."""

    def __init__(self, c_in: int, c_out: int, width: int, kernels: Sequence[Sequence[int]], dropout: float) -> None:
        super().__init__()
        ones = (1,) * len(kernels[0])
        self.norm_in, self.norm_out = group_norm(c_in), AdaGroupNorm(c_out, width)
        self.conv_in = nn.Sequential(*(convolution(c_out if i else c_in, c_out, k) for i, k in enumerate(kernels)))
        last = len(kernels) - 1
        self.conv_out = nn.Sequential(*(convolution(c_out, c_out, k, zero=i == last) for i, k in enumerate(kernels)))
        self.dropout = nn.Dropout(dropout)
        self.skip = convolution(c_in, c_out, ones) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        y = self.conv_in(nn.functional.silu(self.norm_in(x)))
        y = nn.functional.silu(self.norm_out(y, embedding))
        return self.skip(x) + self.conv_out(self.dropout(y))


class Block(nn.Module):
    """A residual block, then self-attention over each pattern in turn, then attention to the tokens."""

    def __init__(self, res: ResBlock, attentions: Sequence[AxisAttention], cross: CrossAttention | None) -> None:
        super().__init__()
        self.res, self.attentions, self.cross = res, nn.ModuleList(attentions), cross

    def forward(self, x: Tensor, embedding: Tensor, tokens: Tensor | None, mask: Tensor | None) -> Tensor:
        x = self.res(x, embedding)
        for attention in self.attentions:
            x = attention(x)
        return x if self.cross is None else self.cross(x, tokens, mask)


class UNet(nn.Module):
    """Residual U-Net over `axes` axes: forward(x, c_noise, cond) -> (B, out_channels, *sizes of x).

    Args:
        axes: 1 for (B, C, T), 2 for (B, C, T, F), 3 for (B, C, T, H, W).
        in_channels, out_channels: channels of x and of the result (default: the same).
        channels: width of the first level; `multipliers` gives each level's as a multiple of it.
        factors: one tuple for each step between levels, by what each axis is divided; default 2 on every axis. A 1
            keeps an axis, so [1, 2, 2] keeps time.
        blocks: residual blocks in each level, down and up alike.
        kernels: kernels that follow one another in a convolution. Default one of 3 on every axis;
            [[1, 3, 3]] leaves time to attention, [[1, 3, 3], [3, 1, 1]] is (2+1)-D (Tran et al. 2018).
        attend: for each level a list of patterns, each a list of axes to attend over (0 is time): default none.
            [[[0]], [[0], [1, 2]]] is time in the first level, then time and space in turn in the second.
        cross: for each level whether it attends to the tokens; default every level where `tokens_width` is given.
        tokens_width, vector_width, concat_channels: widths of the slots of a condition; 0 where there is none.
        patch: cells that become channels before the first level and steps again after the last.
        head_channels: channels of an attention head. dropout: rate inside residual blocks.

    Raises ValueError for settings that disagree, sizes the factors do not divide, and a condition that the network was
    not built for. The result is exactly zero before training. Source: Ronneberger et al. 2015; Ho et al. 2022 (video).
    """

    def __init__(
        self,
        axes: int,
        in_channels: int,
        out_channels: int | None = None,
        channels: int = 64,
        multipliers: Sequence[int] = (1, 2, 4),
        factors: Sequence[Sequence[int]] | None = None,
        blocks: int = 1,
        kernels: Sequence[Sequence[int]] | None = None,
        attend: Sequence[Sequence[Sequence[int]]] | None = None,
        cross: Sequence[bool] | None = None,
        tokens_width: int = 0,
        vector_width: int = 0,
        concat_channels: int = 0,
        patch: Sequence[int] | None = None,
        head_channels: int = 32,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        levels = len(multipliers)
        if axes not in (1, 2, 3):
            raise ValueError(f"axes={axes} must be 1, 2 or 3")
        if blocks < 1:
            raise ValueError(f"blocks={blocks} must be at least 1")
        if not multipliers or multipliers[0] != 1:
            raise ValueError(
                f"multipliers={list(multipliers)} must start with 1: `channels` is the first level's width"
            )
        factors = [(2,) * axes] * (levels - 1) if factors is None else factors
        kernels = [(3,) * axes] if kernels is None else kernels
        attend = [[]] * levels if attend is None else attend
        cross = [tokens_width > 0] * levels if cross is None else cross
        patch = (1,) * axes if patch is None else patch
        for name, given, expected in (
            ("factors", factors, levels - 1),
            ("attend", attend, levels),
            ("cross", cross, levels),
        ):
            if len(given) != expected:
                raise ValueError(f"{name} has {len(given)} entries, but {levels} multipliers need {expected}")
        for name, tuples in (("factors", factors), ("kernels", kernels), ("patch", [patch])):
            for entry in tuples:
                if len(entry) != axes or min(entry) < 1:
                    raise ValueError(
                        f"{name}: {list(entry)} must be {axes} numbers from 1 up, one for each of axes={axes}"
                    )
        if any(cross) and not tokens_width:
            raise ValueError("cross is set, but tokens_width=0: give the width of the text encoder's tokens")
        self.tokens_width, self.vector_width, self.concat_channels = tokens_width, vector_width, concat_channels
        self.patch, self.factors = tuple(patch), [tuple(f) for f in factors]
        self.multiples = [p * math.prod(f[i] for f in factors) for i, p in enumerate(patch)]
        self.reads_tokens = any(cross)

        width, cells = 4 * channels, math.prod(patch)
        widths = [channels * m for m in multipliers]
        self.embed = NoiseEmbedding(width, vector_width)
        self.stem = convolution((in_channels + concat_channels) * cells, channels, (3,) * axes)

        def block(c_in: int, level: int) -> Block:
            c = widths[level]
            return Block(
                ResBlock(c_in, c, width, kernels, dropout),
                [AxisAttention(c, pattern, axes, head_channels) for pattern in attend[level]],
                CrossAttention(c, tokens_width, head_channels) if cross[level] else None,
            )

        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        self.shrink, self.grow = nn.ModuleList(), nn.ModuleList()
        c = channels
        for level in range(levels):
            self.down.append(nn.ModuleList(block(c if i == 0 else widths[level], level) for i in range(blocks)))
            c = widths[level]
            if level < levels - 1:
                self.shrink.append(Resample(c, c, factors[level]))
                self.grow.append(Resample(widths[level + 1], c, factors[level], up=True))
            self.up.append(nn.ModuleList(block(2 * c, level) for _ in range(blocks)))
        self.middle = nn.ModuleList([block(c, levels - 1), block(c, levels - 1)])
        self.norm = group_norm(channels)
        self.head = convolution(channels, (out_channels or in_channels) * cells, (3,) * axes, zero=True)

    def forward(self, x: Tensor, c_noise: Tensor, cond: Condition | None = None) -> Tensor:
        self.check(x, c_noise, cond)
        tokens, mask = (cond.tokens, cond.mask) if cond is not None and self.reads_tokens else (None, None)
        if cond is not None and cond.concat is not None:
            x = torch.cat([x, cond.concat.to(x.dtype)], dim=1)
        embedding = self.embed(c_noise, None if cond is None else cond.vector)  # (B, D) or (B, D, T)
        embedding = pool_time(embedding, self.patch[0])
        x = self.stem(fold_cells(x, self.patch))
        skips, embeddings = [], []
        for level, blocks in enumerate(self.down):
            for block in blocks:  # type: ignore[attr-defined]
                x = block(x, embedding, tokens, mask)
                skips.append(x)
            embeddings.append(embedding)
            if level < len(self.shrink):
                x = self.shrink[level](x)
                embedding = pool_time(embedding, self.factors[level][0])
        for block in self.middle:
            x = block(x, embedding, tokens, mask)
        for level in reversed(range(len(self.up))):
            for block in self.up[level]:  # type: ignore[attr-defined]
                x = block(torch.cat([x, skips.pop()], dim=1), embeddings[level], tokens, mask)
            if level:
                x = self.grow[level - 1](x)
        return unfold_cells(self.head(nn.functional.silu(self.norm(x))), self.patch)

    def check(self, x: Tensor, c_noise: Tensor, cond: Condition | None) -> None:
        """Raises ValueError where the input does not fit the network."""
        if x.ndim != 2 + len(self.patch):
            raise ValueError(
                f"x has shape {tuple(x.shape)}; axes={len(self.patch)} takes {2 + len(self.patch)} dimensions"
            )
        check_sizes(x.shape[2:], self.multiples)
        if c_noise.shape not in {(x.shape[0],), (x.shape[0], x.shape[2])}:
            raise ValueError(f"c_noise has shape {tuple(c_noise.shape)}; x {tuple(x.shape)} needs (B,) or (B, T)")
        for name, width in (
            ("tokens", self.tokens_width),
            ("vector", self.vector_width),
            ("concat", self.concat_channels),
        ):
            slot = None if cond is None else getattr(cond, name)
            found = 0 if slot is None else slot.shape[1 if name == "concat" else -1]
            if found != width:
                setting = "concat_channels" if name == "concat" else f"{name}_width"
                raise ValueError(f"cond.{name} has width {found}, but the network was built with {setting}={width}")
        if cond is not None and cond.concat is not None and cond.concat.shape[2:] != x.shape[2:]:
            raise ValueError(f"cond.concat has sizes {tuple(cond.concat.shape[2:])}, but x has {tuple(x.shape[2:])}")
