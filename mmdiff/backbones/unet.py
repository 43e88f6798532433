"""U-Net over one, two or three axes: waveforms (T), spectrograms (T, F), videos (T, H, W).

B batch, C channels, D width of the noise embedding. Time is axis 2, so `(B, C, T)`, `(B, C, T, F)`, `(B, C, T, H, W)`.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from ..nn.attention import AxisAttention, CrossAttention
from ..nn.conv import Resample, convolution, fold_cells, pool_time, unfold_cells
from ..nn.embed import NoiseEmbedding
from ..nn.norm import group_norm
from .blocks import Block, GatedBlock, ResBlock, activated
from .condition import Condition, check_input
from .share import Shareable


class UNet(Shareable):
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
        dilations: dilation over time of each block of a level, one for each of `blocks`; default 1. [1, 2, 4, 8] are
            WaveGrad's (Chen et al. 2021), [1, 2, 4, ..., 512] DiffWave's (Kong et al. 2021).
        gated: WaveNet's gated blocks, as in DiffWave, in the place of residual blocks of two convolutions.
        activation: makes the activation for so many channels, e.g. `mmdiff.nn.Snake`; default SiLU.
        checkpoint: keep only the inputs of blocks in memory and run each again for its gradients: about a third more
            time for a fraction of the memory, and the same gradients.

    The control taps (see `mmdiff.backbones.control`) are the skips of the way down and the middle's output:
    `tap_channels` are their channels, on axis `tap_axis`, `hint_channels` those of the stem's output; the submodules
    named in `after_taps` run after them.

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
        dilations: Sequence[int] | None = None,
        gated: bool = False,
        activation: Callable[[int], nn.Module] | None = None,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        levels = len(multipliers)
        out_channels = in_channels if out_channels is None else out_channels
        factors = [(2,) * axes] * (levels - 1) if factors is None else factors
        kernels = [(3,) * axes] if kernels is None else kernels
        attend = [[]] * levels if attend is None else attend
        cross = [tokens_width > 0] * levels if cross is None else cross
        patch = (1,) * axes if patch is None else patch
        dilations = (1,) * blocks if dilations is None else dilations
        numbers = {"in_channels": in_channels, "out_channels": out_channels, "channels": channels, "blocks": blocks}
        check_numbers(axes, multipliers, {**numbers, "head_channels": head_channels}, dropout)
        check_lengths(f"{levels} multipliers need", levels - 1, {"factors": factors})
        check_lengths(f"{levels} multipliers need", levels, {"attend": attend, "cross": cross})
        check_lengths(f"blocks={blocks} needs", blocks, {"dilations": dilations})
        check_tuples(axes, {"factors": factors, "kernels": kernels, "patch": [patch]})
        check_slots(cross, {"tokens": tokens_width, "vector": vector_width, "concat": concat_channels})
        check_dilations(dilations, kernels)
        self.in_channels, self.checkpoint = in_channels, checkpoint
        self.tokens_width, self.vector_width, self.concat_channels = tokens_width, vector_width, concat_channels
        self.patch, self.factors = tuple(patch), [tuple(f) for f in factors]
        self.multiples = [p * math.prod(f[i] for f in factors) for i, p in enumerate(patch)]

        width, cells = 4 * channels, math.prod(patch)
        widths = [channels * m for m in multipliers]
        self.embed = NoiseEmbedding(width, vector_width)
        self.stem = convolution((in_channels + concat_channels) * cells, channels, (3,) * axes)

        def block(c_in: int, level: int, dilation: int = 1) -> Block:
            c = widths[level]
            if gated:
                res: nn.Module = GatedBlock(c_in, c, width, kernels, dropout, dilation)
            else:
                res = ResBlock(c_in, c, width, kernels, dropout, dilation, activation)
            return Block(
                res,
                [AxisAttention(c, pattern, axes, head_channels) for pattern in attend[level]],
                CrossAttention(c, tokens_width, head_channels) if cross[level] else None,
            )

        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        self.shrink, self.grow = nn.ModuleList(), nn.ModuleList()
        c = channels
        for level in range(levels):
            before, c = c, widths[level]
            self.down.append(nn.ModuleList(block(c if i else before, level, d) for i, d in enumerate(dilations)))
            if level < levels - 1:
                self.shrink.append(Resample(c, c, factors[level]))
                self.grow.append(Resample(widths[level + 1], c, factors[level], up=True))
            self.up.append(nn.ModuleList(block(2 * c, level, d) for d in dilations))
        self.middle = nn.ModuleList([block(c, levels - 1), block(c, levels - 1)])
        self.norm, self.activation = group_norm(channels), activated(channels, activation)
        self.head = convolution(channels, out_channels * cells, (3,) * axes, zero=True)
        self.hint_channels, self.tap_axis = channels, 1
        self.tap_channels = [w for w in widths for _ in range(blocks)] + [c]
        self.after_taps = ("up", "grow", "norm", "activation", "head")

    def forward(
        self, x: Tensor, c_noise: Tensor, cond: Condition | None = None, control: Sequence[Tensor] | None = None
    ) -> Tensor:
        """The network's output, (B, out_channels, *axes); `control`, where given, is added to the taps."""
        taps, embeddings = self.descend(x, c_noise, cond, None)
        if control is not None:
            if len(control) != len(taps):
                raise ValueError(f"control has {len(control)} tensors, but the network has {len(taps)} taps")
            taps = [tap + added for tap, added in zip(taps, control, strict=True)]
        tokens, mask = (None, None) if cond is None else (cond.tokens, cond.mask)
        x = taps.pop()
        for level in reversed(range(len(self.up))):
            for block in self.up[level]:  # type: ignore[attr-defined]
                x = self.run(block, x, embeddings[level], tokens, mask, taps.pop())
            if level:
                x = self.grow[level - 1](x)
        return unfold_cells(self.head(self.activation(self.norm(x))), self.patch)

    def taps(
        self, x: Tensor, c_noise: Tensor, cond: Condition | None = None, hint: Tensor | None = None
    ) -> list[Tensor]:
        """The skips, from the first block's on, and the middle's output: the first half of the network.

        hint: (B, hint_channels, *axes / patch), added to the stem's output.
        """
        return self.descend(x, c_noise, cond, hint)[0]

    def descend(
        self, x: Tensor, c_noise: Tensor, cond: Condition | None, hint: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The taps, and the noise embedding of each level."""
        check_input(
            x,
            c_noise,
            cond,
            in_channels=self.in_channels,
            multiples=self.multiples,
            tokens_width=self.tokens_width,
            vector_width=self.vector_width,
            concat_channels=self.concat_channels,
        )
        tokens, mask, vector, concat = (
            (None,) * 4 if cond is None else (cond.tokens, cond.mask, cond.vector, cond.concat)
        )
        if concat is not None:
            x = torch.cat([x, concat.to(x.dtype)], dim=1)
        embedding = pool_time(self.embed(c_noise, vector), self.patch[0])  # (B, D) or (B, D, T)
        x = self.stem(fold_cells(x, self.patch))
        if hint is not None:
            if hint.shape != x.shape:
                raise ValueError(f"hint has shape {tuple(hint.shape)}; the stem's output, {tuple(x.shape)}, is due")
            x = x + hint
        taps, embeddings = [], []
        for level, blocks in enumerate(self.down):
            for block in blocks:  # type: ignore[attr-defined]
                x = self.run(block, x, embedding, tokens, mask)
                taps.append(x)
            embeddings.append(embedding)
            if level < len(self.shrink):
                x = self.shrink[level](x)
                embedding = pool_time(embedding, self.factors[level][0])
        for block in self.middle:
            x = self.run(block, x, embedding, tokens, mask)
        return [*taps, x], embeddings

    def run(self, block: nn.Module, *inputs: Tensor | None) -> Tensor:
        """The block's output, its inner activations kept only if there is no `checkpoint`."""
        if self.checkpoint and torch.is_grad_enabled():
            return recompute(block, *inputs, use_reentrant=False)  # type: ignore[no-any-return]
        return block(*inputs)  # type: ignore[no-any-return]


def check_numbers(axes: int, multipliers: Sequence[int], numbers: Mapping[str, int], dropout: float) -> None:
    """Raises ValueError where a number is out of its range."""
    if axes not in (1, 2, 3):
        raise ValueError(f"axes={axes} must be 1, 2 or 3")
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name}={number} must be at least 1")
    if not multipliers or multipliers[0] != 1 or min(multipliers) < 1:
        raise ValueError(
            f"multipliers={list(multipliers)} must start with 1, for `channels` is the first level's width, "
            "and hold whole numbers from 1 up"
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout} must be from 0 to below 1")


def check_lengths(due: str, expected: int, given: Mapping[str, Sequence[object]]) -> None:
    """Raises ValueError where a list has not one entry for each thing that it describes."""
    for name, entries in given.items():
        if len(entries) != expected:
            raise ValueError(f"{name} has {len(entries)} entries, but {due} {expected}")


def check_tuples(axes: int, given: Mapping[str, Sequence[Sequence[int]]]) -> None:
    """Raises ValueError where a tuple has not one number from 1 up for each axis."""
    for name, entries in given.items():
        for entry in entries:
            if len(entry) != axes or min(entry) < 1:
                raise ValueError(f"{name}: {list(entry)} must be {axes} numbers from 1 up, one for each of axes={axes}")
    if not given["kernels"]:
        raise ValueError("kernels=[] leaves no convolution; give at least one kernel")


def check_slots(cross: Sequence[bool], widths: Mapping[str, int]) -> None:
    """Raises ValueError where the slots of a condition and the cross-attention that reads its tokens disagree."""
    for name, width in widths.items():
        if width < 0:
            raise ValueError(f"the width of cond.{name}, {width}, must be 0 (no such slot) or more")
    if any(cross) and not widths["tokens"]:
        raise ValueError("cross is set, but tokens_width=0: give the width of the text encoder's tokens")
    if widths["tokens"] and not any(cross):
        raise ValueError(f"tokens_width={widths['tokens']}, but cross is False in every level: nothing would read them")


def check_dilations(dilations: Sequence[int], kernels: Sequence[Sequence[int]]) -> None:
    """Raises ValueError for a dilation below 1, or one that no kernel can show."""
    if min(dilations) < 1:
        raise ValueError(f"dilations={list(dilations)} must be whole numbers from 1 up")
    if max(dilations) > 1 and all(kernel[0] == 1 for kernel in kernels):
        raise ValueError(f"dilations={list(dilations)} act on time, but no kernel of {kernels} is longer than 1 there")
