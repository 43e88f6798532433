"""What every backbone is given: data, noise levels and the slots of a condition, and one check of them.

B batch, C channels, T time, L tokens. Time is axis 2.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from ..nn.conv import check_sizes


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


def check_input(
    x: Tensor,
    c_noise: Tensor,
    cond: Condition | None,
    *,
    in_channels: int,
    multiples: Sequence[int],
    tokens_width: int = 0,
    vector_width: int = 0,
    concat_channels: int = 0,
) -> None:
    """Raises ValueError, with the sizes at fault, where an input does not fit the backbone.

    x (B, in_channels, *axes) with each axis a multiple of its entry of `multiples`; c_noise (B,) or (B, T);
    cond.tokens (B, L, tokens_width), cond.mask (B, L) bool, cond.vector (B, vector_width), cond.concat
    (B, concat_channels, *axes). A slot of width 0 must be empty, every other one filled; the mask may be left out.
    """
    axes = len(multiples)
    if x.ndim != 2 + axes:
        raise ValueError(f"x has shape {tuple(x.shape)}; axes={axes} takes {2 + axes} dimensions")
    if x.shape[1] != in_channels:
        raise ValueError(f"x has {x.shape[1]} channels, but the network was built with in_channels={in_channels}")
    check_sizes(x.shape[2:], multiples)
    by_item, by_step = x.shape[:1], (x.shape[0], x.shape[2])  # a set of these would be compiled anew for every size
    if c_noise.shape != by_item and c_noise.shape != by_step:
        raise ValueError(f"c_noise has shape {tuple(c_noise.shape)}; x {tuple(x.shape)} needs (B,) or (B, T)")
    tokens, vector, concat = (None,) * 3 if cond is None else (cond.tokens, cond.vector, cond.concat)
    for name, setting, slot, axis, width in (
        ("tokens", "tokens_width", tokens, -1, tokens_width),
        ("vector", "vector_width", vector, -1, vector_width),
        ("concat", "concat_channels", concat, 1, concat_channels),
    ):
        found = 0 if slot is None else slot.shape[axis]
        if found != width:
            raise ValueError(f"cond.{name} has width {found}, but the network was built with {setting}={width}")
        if slot is not None and slot.shape[0] != x.shape[0]:
            raise ValueError(f"cond.{name} has a batch of {slot.shape[0]}, but x has {x.shape[0]}")
    if concat is not None and concat.shape[2:] != x.shape[2:]:
        raise ValueError(f"cond.concat has sizes {tuple(concat.shape[2:])}, but x has {tuple(x.shape[2:])}")
    mask = None if cond is None else cond.mask
    if mask is not None and tokens is not None and mask.shape != tokens.shape[:2]:
        raise ValueError(f"cond.mask has shape {tuple(mask.shape)}, but cond.tokens is {tuple(tokens.shape)}")
