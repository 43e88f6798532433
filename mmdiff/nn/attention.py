"""Attention over chosen axes of (B, C, *axes), and to the tokens of a condition.

L length of a sequence, H heads, D head width. Attention runs as (B, H, L, D) through scaled_dot_product_attention.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .norm import group_norm
from .rotary import Rotation, frequencies, rotate, rotation


def check_heads(name: str, channels: int, head_channels: int) -> None:
    """Raises ValueError where heads of `head_channels` do not fill the channels."""
    if head_channels < 1 or channels % head_channels:
        raise ValueError(f"{name}={channels} is not a multiple of head_channels={head_channels}")


def attend_tokens(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of queries (B, H, N, D) to keys and values (B, H, L, D) of tokens; mask (B, L), True = attend.

    A row that may attend to nothing gets zero.
    """
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v)
    some = mask.any(dim=1)[:, None, None, None]
    attend = mask[:, None, None, :] | ~some  # a softmax over nothing would be NaN
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attend) * some


class AxisAttention(nn.Module):
    """Residual self-attention over the axes that `pattern` names; the other axes are batch.

    pattern: indices of axes after B and C, so for video [0] is time, [1, 2] is space, [0, 1, 2] is all.
    Queries and keys are normalised (Dehghani et al. 2023, sec. 2) and get rotary positions. Starts as the identity.
    """

    def __init__(self, channels: int, pattern: Sequence[int], axes: int, head_channels: int = 32) -> None:
        super().__init__()
        check_heads("channels", channels, head_channels)
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
        q, k, v = self.qkv(y).unflatten(-1, (3, -1, self.head_channels)).unbind(-3)  # (N, L, H, D) each
        table = self.table([x.shape[2 + i] for i in self.pattern], x.device)
        q, k = self.turn(self.query_norm(q), table), self.turn(self.key_norm(k), table)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        y = y.transpose(1, 2).flatten(2)  # (N, L, C)
        return x + rearrange(self.out(y), f"{outer} -> {inner}", b=x.shape[0], **sizes)

    def table(self, sizes: Sequence[int], device: torch.device) -> Rotation:
        """(L, 1, R) angles of positions counted in steps, an equal share of the channels for each axis."""
        turns = frequencies(self.head_channels // len(sizes) // 2, 10_000, device)
        positions = [torch.arange(n, device=device, dtype=torch.float32) for n in sizes]
        cos, sin = rotation(positions, [turns] * len(sizes))
        return Rotation(cos.flatten(0, -2)[:, None], sin.flatten(0, -2)[:, None])

    @staticmethod
    def turn(x: Tensor, table: Rotation) -> Tensor:
        """x turned, its neighbouring channels as pairs. The channels change their order, to which scores are blind."""
        width = table.cos.shape[-1]
        halves = x[..., :width].unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        return rotate(halves if width == x.shape[-1] else torch.cat([halves, x[..., width:]], dim=-1), table)


class CrossAttention(nn.Module):
    """Residual attention from every position of (B, C, *axes) to the tokens of a condition.

    tokens (B, L, W), mask (B, L) bool with True = attend. A row that may attend to nothing gets the output's
    bias alone. Starts as the identity.
    """

    def __init__(self, channels: int, tokens_width: int, head_channels: int = 32) -> None:
        super().__init__()
        check_heads("channels", channels, head_channels)
        self.head_channels = head_channels
        self.norm, self.tokens_norm = group_norm(channels), nn.LayerNorm(tokens_width)
        self.query, self.key_value = nn.Linear(channels, channels), nn.Linear(tokens_width, 2 * channels)
        self.query_norm, self.key_norm = nn.RMSNorm(head_channels), nn.RMSNorm(head_channels)
        self.out = nn.Linear(channels, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.norm(x).flatten(2).transpose(1, 2)  # (B, N, C)
        q = self.query(y).unflatten(-1, (-1, self.head_channels))
        k, v = self.key_value(self.tokens_norm(tokens)).unflatten(-1, (2, -1, self.head_channels)).unbind(-3)
        q, k, v = (z.transpose(1, 2) for z in (self.query_norm(q), self.key_norm(k), v))
        y = attend_tokens(q, k, v, mask).transpose(1, 2).flatten(2)
        return x + self.out(y).transpose(1, 2).reshape(x.shape)
