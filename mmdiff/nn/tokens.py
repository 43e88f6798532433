"""Transformer blocks over grids of tokens, conditioned by adaptive norms that start at zero.

B batch, N tokens of the data on a grid of `*sizes` (time first), L tokens of the condition, D width, H heads, K head
width. The noise embedding broadcasts: (B, 1, ..., D), or (B, T, 1, ..., D) with one for each time step.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attend_tokens
from .pattern import Pattern
from .rotary import Rotation, rotate

Modulation = tuple[Tensor, ...]


def linear(c_in: int, c_out: int, zero: bool = False, bias: bool = True) -> nn.Linear:
    """Linear layer with Glorot's initial weights, its bias zero; `zero` makes it give zero before training.

    After an adaptive norm a bias says nothing that the norm's shift could not, and costs a pass over the result.
    """
    layer = nn.Linear(c_in, c_out, bias=bias)
    if zero:
        nn.init.zeros_(layer.weight)
    else:
        nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without weights of its own, then `(1 + scale) * x + shift`."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


def normalized(x: Tensor, gain: Tensor) -> Tensor:
    """x (..., K) over its root mean square, times `gain`; in float32 at the least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * (gain * x.shape[-1] ** 0.5 / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) + 1e-6))


class Stream(nn.Module):
    """The weights of one stream of tokens in a block: adaptive norms, attention's projections, MLP (adaLN-zero).

    Queries and keys are normalised over each head (RMS), with a gain for each head alone: the projection can weigh
    channels. Source: Peebles & Xie 2023, arXiv 2212.09748; Henry et al. 2020, arXiv 2010.04245 (the gain).
    """

    def __init__(self, width: int, head_channels: int, mlp_ratio: int, dropout: float) -> None:
        super().__init__()
        self.head_channels = head_channels
        self.modulation = linear(width, 6 * width, zero=True)
        self.qkv, self.out = linear(width, 3 * width, bias=False), linear(width, width)
        self.gain = nn.Parameter(torch.ones(width // head_channels, 2, 1))  # of queries and of keys
        inner = mlp_ratio * width
        self.mlp = nn.Sequential(linear(width, inner, bias=False), nn.GELU(), linear(inner, width))
        self.dropout = nn.Dropout(dropout)

    def modulations(self, embedding: Tensor) -> tuple[Modulation, Modulation]:
        """Shift, scale and gate of attention, and those of the MLP."""
        parts = self.modulation(embedding).chunk(6, dim=-1)
        return parts[:3], parts[3:]

    def project(self, x: Tensor, modulation: Modulation, table: Rotation | None = None) -> tuple[Tensor, ...]:
        """Queries, keys and values of x (..., D), each (..., H, K); queries and keys turned by their positions."""
        shift, scale, _ = modulation
        packed = self.qkv(modulated(x, shift, scale)).unflatten(-1, (-1, 3, self.head_channels))
        qk, v = packed.split([2, 1], dim=-2)  # as one, for half the calls
        qk = normalized(qk, self.gain)
        qk = (qk if table is None else rotate(qk, table)).to(v.dtype)
        return *qk.unbind(-2), v.squeeze(-2)

    def mixed(self, x: Tensor, y: Tensor, modulation: Modulation) -> Tensor:
        """x plus what attention gave it, y (..., H, K)."""
        return torch.addcmul(x, modulation[2], self.dropout(self.out(y.flatten(-2))))

    def fed(self, x: Tensor, modulation: Modulation) -> Tensor:
        """x plus what the MLP makes of it."""
        shift, scale, gate = modulation
        return torch.addcmul(x, gate, self.dropout(self.mlp(modulated(x, shift, scale))))


class KeysAndValues(nn.Module):
    """The weights of a stream that is read and not written: the condition's in the last joint block."""

    def __init__(self, width: int, head_channels: int) -> None:
        super().__init__()
        self.head_channels = head_channels
        self.modulation = linear(width, 2 * width, zero=True)
        self.key_value = linear(width, 2 * width, bias=False)
        self.gain = nn.Parameter(torch.ones(width // head_channels, 1))

    def forward(self, x: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of x (B, L, D), each (B, L, H, K)."""
        shift, scale = self.modulation(embedding).chunk(2, dim=-1)
        k, v = self.key_value(modulated(x, shift, scale)).unflatten(-1, (-1, 2, self.head_channels)).unbind(-2)
        return normalized(k, self.gain).to(v.dtype), v


class TokenAttention(nn.Module):
    """Residual attention from a grid's tokens to those of the condition; it starts as the identity.

    A row that may attend to nothing gets the output's bias alone.
    """

    def __init__(self, width: int, head_channels: int) -> None:
        super().__init__()
        self.head_channels = head_channels
        self.query, self.key_value = linear(width, width), linear(width, 2 * width)
        self.gain = nn.Parameter(torch.ones(width // head_channels, 1))
        self.out = linear(width, width, zero=True)

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        y = F.layer_norm(x, x.shape[-1:], eps=1e-6).flatten(1, -2)
        q = self.query(y).unflatten(-1, (-1, self.head_channels))  # (B, N, H, K)
        k, v = self.key_value(tokens).unflatten(-1, (-1, 2, self.head_channels)).unbind(-2)
        q = normalized(q, torch.ones_like(self.gain)).to(v.dtype)
        k = normalized(k, self.gain).to(v.dtype)  # the gain of either would do
        y = attend_tokens(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)
        y = y.transpose(1, 2).flatten(-2)  # (B, N, D)
        return x + self.out(y).reshape(x.shape)


class Block(nn.Module):
    """Self-attention over a pattern, then with `cross` attention to the condition's tokens, then the MLP.

    Called with x (B, *sizes, D), tokens (B, L, D) or None, their mask (B, L) or None, the noise embedding and the
    pattern's rotary table; gives x, and the tokens for the next block: those that it was given.
    """

    def __init__(
        self, pattern: Pattern, cross: bool, width: int, head_channels: int, mlp_ratio: int, dropout: float
    ) -> None:
        super().__init__()
        self.pattern = pattern
        self.stream = Stream(width, head_channels, mlp_ratio, dropout)
        self.cross = TokenAttention(width, head_channels) if cross else None

    def forward(
        self, x: Tensor, tokens: Tensor | None, mask: Tensor | None, embedding: Tensor, table: Rotation
    ) -> tuple[Tensor, Tensor | None]:
        attention, mlp = self.stream.modulations(embedding)
        x = self.stream.mixed(x, self.pattern(*self.stream.project(x, attention, table)), attention)
        if self.cross is not None and tokens is not None:
            x = self.cross(x, tokens, mask)
        return self.stream.fed(x, mlp), tokens


class JointBlock(nn.Module):
    """Attention over the data's tokens and the condition's together, each with weights of their own (MM-DiT).

    Called as a `Block` is; gives both streams. Source: Esser et al. 2024, arXiv 2403.03206.
    """

    def __init__(self, width: int, head_channels: int, mlp_ratio: int, dropout: float) -> None:
        super().__init__()
        self.stream = Stream(width, head_channels, mlp_ratio, dropout)
        self.tokens = Stream(width, head_channels, mlp_ratio, dropout)

    def forward(
        self, x: Tensor, tokens: Tensor, mask: Tensor | None, embedding: Tensor, table: Rotation
    ) -> tuple[Tensor, Tensor]:
        attention, mlp = self.stream.modulations(embedding)
        q, k, v = (z.flatten(1, -3) for z in self.stream.project(x, attention, table))  # (B, N, H, K)
        token_attention, token_mlp = self.tokens.modulations(overall(embedding))
        token_q, token_k, token_v = self.tokens.project(tokens, token_attention)
        y, token_y = joint((q, token_q), (k, token_k), (v, token_v), mask).split([q.shape[1], tokens.shape[1]], dim=1)
        x = self.stream.mixed(x, y.reshape(*x.shape[:-1], *y.shape[-2:]), attention)
        tokens = self.tokens.mixed(tokens, token_y, token_attention)
        return self.stream.fed(x, mlp), self.tokens.fed(tokens, token_mlp)


class LastJointBlock(nn.Module):
    """A joint block whose tokens nobody reads after it: they give keys and values alone."""

    def __init__(self, width: int, head_channels: int, mlp_ratio: int, dropout: float) -> None:
        super().__init__()
        self.stream = Stream(width, head_channels, mlp_ratio, dropout)
        self.tokens = KeysAndValues(width, head_channels)

    def forward(
        self, x: Tensor, tokens: Tensor, mask: Tensor | None, embedding: Tensor, table: Rotation
    ) -> tuple[Tensor, Tensor]:
        attention, mlp = self.stream.modulations(embedding)
        q, k, v = (z.flatten(1, -3) for z in self.stream.project(x, attention, table))  # (B, N, H, K)
        token_k, token_v = self.tokens(tokens, overall(embedding))
        y = joint((q,), (k, token_k), (v, token_v), mask)
        x = self.stream.mixed(x, y.reshape(*x.shape[:-1], *y.shape[-2:]), attention)
        return self.stream.fed(x, mlp), tokens


def overall(embedding: Tensor) -> Tensor:
    """(B, 1, D): noise levels of single steps say nothing of a condition's token, so it sees their mean."""
    return embedding.flatten(1, -2).mean(dim=1, keepdim=True)


def joint(q: Sequence[Tensor], k: Sequence[Tensor], v: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    """Attention of all queries to all keys, each a stream (B, N or L, H, K) -> (B, N + L, H, K).

    mask (B, L): which keys of the last stream, the condition's, count.
    """
    if mask is not None:
        mask = F.pad(mask, (k[0].shape[1], 0), value=True)[:, None, None]  # (B, 1, 1, N + L)
    queries, keys, values = (torch.cat(list(z), dim=1).transpose(1, 2) for z in (q, k, v))
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask).transpose(1, 2)
