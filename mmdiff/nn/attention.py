"""Attention over chosen axes of (B, C, *axes), and to the tokens of a condition.

L length of a sequence, H heads, D head width. Attention runs as (B, H, L, D) through scaled_dot_product_attention.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .norm import group_norm


def rotary(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Rotary positions over one or more axes (Su et al. 2021, eq. 34; axial as in RoPE-ND), computed in float32.

    x (B, H, L, D) with L = prod(sizes); each axis turns its own D // len(sizes) channels, rounded down to even.
    """
    share = x.shape[-1] // len(sizes) // 2 * 2
    grids = torch.meshgrid(*(torch.arange(n, device=x.device, dtype=torch.float32) for n in sizes), indexing="ij")
    frequencies = 10_000 ** (-torch.arange(0, share, 2, device=x.device, dtype=torch.float32) / share)
    angles = torch.cat([grid.reshape(-1, 1) * frequencies for grid in grids], dim=-1)  # (L, share / 2 * axes)
    turned, rest = x[..., : 2 * angles.shape[-1]].float(), x[..., 2 * angles.shape[-1] :]
    a, b = turned[..., 0::2], turned[..., 1::2]
    cos, sin = angles.cos(), angles.sin()
    turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)
    return torch.cat([turned, rest], dim=-1)


class AxisAttention(nn.Module):
    """Residual self-attention over the axes that `pattern` names; the other axes are batch.

    pattern: indices of axes after B and C, so for video [0] is time, [1, 2] is space, [0, 1, 2] is all.
    Queries and keys are normalised (Dehghani et al. 2023, sec. 2) and get rotary positions. Starts as the identity.
    """

    def __init__(self, channels: int, pattern: Sequence[int], axes: int, head_channels: int = 32) -> None:
        super().__init__()
        if channels % head_channels:
            raise ValueError(f"channels={channels} is not a multiple of head_channels={head_channels}")
        if len(set(pattern)) != len(pattern) or not set(pattern) <= set(range(axes)) or not pattern:
            raise ValueError(f"attend={list(pattern)} must name different axes out of {list(range(axes))}")
        if head_channels < 2 * len(pattern):
            raise ValueError(
                f"head_channels={head_channels} must be at least {2 * len(pattern)}: 2 for each axis of {list(pattern)}"
            )
        self.pattern, self.head_channels = tuple(pattern), head_channels
        names = ["t", "h", "w"][:axes]
        over = " ".join(names[i] for i in self.pattern)
        rest = " ".join(name for i, name in enumerate(names) if i not in self.pattern)
        self.layout = f"b c {' '.join(names)}", f"(b {rest}) ({over}) c"
        self.axis_names = names
        self.norm = group_norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.query_norm, self.key_norm = nn.RMSNorm(head_channels), nn.RMSNorm(head_channels)
        self.out = nn.Linear(channels, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        inner, outer = self.layout
        sizes = dict(zip(self.axis_names, x.shape[2:], strict=True))
        y = rearrange(self.norm(x), f"{inner} -> {outer}")
        q, k, v = rearrange(self.qkv(y), "n l (three h d) -> three n h l d", three=3, d=self.head_channels)
        over = [x.shape[2 + i] for i in self.pattern]
        q, k = rotary(self.query_norm(q), over), rotary(self.key_norm(k), over)
        y = rearrange(F.scaled_dot_product_attention(q, k, v), "n h l d -> n l (h d)")
        return x + rearrange(self.out(y), f"{outer} -> {inner}", b=x.shape[0], **sizes)


class CrossAttention(nn.Module):
    """Residual attention from every position of (B, C, *axes) to the tokens of a condition.

    tokens (B, L, W), mask (B, L) bool with True = attend. A row that may attend to nothing gets the output's
    bias alone. Starts as the identity.
    """

    def __init__(self, channels: int, tokens_width: int, head_channels: int = 32) -> None:
        super().__init__()
        if channels % head_channels:
            raise ValueError(f"channels={channels} is not a multiple of head_channels={head_channels}")
        self.head_channels = head_channels
        self.norm, self.tokens_norm = group_norm(channels), nn.LayerNorm(tokens_width)
        self.query, self.key_value = nn.Linear(channels, channels), nn.Linear(tokens_width, 2 * channels)
        self.query_norm, self.key_norm = nn.RMSNorm(head_channels), nn.RMSNorm(head_channels)
        self.out = nn.Linear(channels, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.norm(x).flatten(2).transpose(1, 2)  # (B, N, C)
        q = rearrange(self.query(y), "b n (h d) -> b h n d", d=self.head_channels)
        k, v = rearrange(
            self.key_value(self.tokens_norm(tokens)), "b l (two h d) -> two b h l d", two=2, d=self.head_channels
        )
        attend = None
        if mask is not None:
            some = mask.any(dim=1)[:, None, None, None]
            attend = mask[:, None, None, :] | ~some  # a softmax over nothing would be NaN
        y = F.scaled_dot_product_attention(self.query_norm(q), self.key_norm(k), v, attn_mask=attend)
        if mask is not None:
            y = y * some
        y = self.out(rearrange(y, "b h n d -> b n (h d)"))  # (B, N, C)
        return x + y.transpose(1, 2).reshape(x.shape)
