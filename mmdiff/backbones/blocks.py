"""Blocks of the U-Net: residual with adaptive group norm, or gated as in WaveNet, followed by attention.

B batch, C channels, D width of the noise embedding. x (B, C, *axes), embedding (B, D) or, by time step, (B, D, T).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..nn.attention import AxisAttention, CrossAttention
from ..nn.conv import convolution
from ..nn.norm import AdaGroupNorm, group_norm


def stacked(c_in: int, c_out: int, kernels: Sequence[Sequence[int]], dilation: int, zero: bool = False) -> nn.Module:
    """Convolutions that follow one another, the first from c_in to c_out channels, dilated over time.

    `zero` initialises the last one to give zero.
    """
    last = len(kernels) - 1
    spread = (dilation, *(1 for _ in kernels[0][1:]))
    return nn.Sequential(
        *(
            convolution(c_out if i else c_in, c_out, kernel, zero and i == last, spread)
            for i, kernel in enumerate(kernels)
        )
    )


class ResBlock(nn.Module):
    """Residual block with adaptive group norm (Dhariwal & Nichol 2021); the kernels follow one another in each half."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        width: int,
        kernels: Sequence[Sequence[int]],
        dropout: float = 0.0,
        dilation: int = 1,
        activation: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.norm_in, self.norm_out = group_norm(c_in), AdaGroupNorm(c_out, width)
        self.conv_in = stacked(c_in, c_out, kernels, dilation)
        self.conv_out = stacked(c_out, c_out, kernels, dilation, zero=True)
        self.act_in, self.act_out = activated(c_in, activation), activated(c_out, activation)
        self.dropout = nn.Dropout(dropout)
        self.skip = convolution(c_in, c_out, (1,) * len(kernels[0])) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        y = self.conv_in(self.act_in(self.norm_in(x)))
        y = self.act_out(self.norm_out(y, embedding))
        return self.skip(x) + self.conv_out(self.dropout(y))


class GatedBlock(nn.Module):
    """Residual block of WaveNet as DiffWave has it (Kong et al. 2021): one dilated convolution, tanh x sigmoid, 1 x 1.

    Here behind an adaptive group norm; half the convolutions of a `ResBlock`, so twice the blocks for the same cost.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        width: int,
        kernels: Sequence[Sequence[int]],
        dropout: float = 0.0,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        ones = (1,) * len(kernels[0])
        self.norm = AdaGroupNorm(c_in, width)
        self.conv = stacked(c_in, 2 * c_out, kernels, dilation)
        self.dropout = nn.Dropout(dropout)
        self.out = convolution(c_out, c_out, ones, zero=True)
        self.skip = convolution(c_in, c_out, ones) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        signal, gate = self.conv(self.norm(x, embedding)).chunk(2, dim=1)  # (B, c_out, *axes) each
        return self.skip(x) + self.out(self.dropout(torch.tanh(signal) * torch.sigmoid(gate)))


class Block(nn.Module):
    """A residual block, then self-attention over each pattern in turn, then attention to the tokens.

    `skip`, where given, comes from the way down and is joined to x as further channels.
    """

    def __init__(self, res: nn.Module, attentions: Sequence[AxisAttention], cross: CrossAttention | None) -> None:
        super().__init__()
        self.res, self.attentions, self.cross = res, nn.ModuleList(attentions), cross

    def forward(
        self, x: Tensor, embedding: Tensor, tokens: Tensor | None, mask: Tensor | None, skip: Tensor | None = None
    ) -> Tensor:
        x = self.res(x if skip is None else torch.cat([x, skip], dim=1), embedding)
        for attention in self.attentions:
            x = attention(x)
        return x if self.cross is None else self.cross(x, tokens, mask)


def activated(channels: int, activation: Callable[[int], nn.Module] | None) -> nn.Module:
    """The activation for so many channels: SiLU where none is given."""
    return nn.SiLU() if activation is None else activation(channels)
