"""ControlNet: a backbone that follows a hint of its own axes, such as edges, depth, pose, chroma or an envelope.

B batch, C channels, N tokens, D width, `*axes` T and what follows it.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.conv import CONVOLUTIONS, convolution
from .condition import Condition
from .share import Shareable


class Tapped(Protocol):
    """What a ControlNet needs of a backbone besides its forward, which adds `control` to the taps of the same index."""

    patch: Sequence[int]  # cells that the stem joins, for each axis
    concat_channels: int
    hint_channels: int  # of the stem's output
    tap_channels: Sequence[int]
    tap_axis: int  # of the channels of taps and stem: 1 for (B, C, *axes), -1 for (B, N, D)
    after_taps: Sequence[str]  # submodules that `taps` does not reach

    def taps(
        self, x: Tensor, c_noise: Tensor, cond: Condition | None = None, hint: Tensor | None = None
    ) -> list[Tensor]: ...


@dataclass(frozen=True)
class Slots:
    """A condition whose concat holds no hint."""

    tokens: Tensor | None
    mask: Tensor | None
    vector: Tensor | None
    concat: Tensor | None


class Zero(nn.Linear):
    """Linear map of the axis `axis`, zero before training (the paper's zero convolution)."""

    def __init__(self, channels: int, axis: int) -> None:
        super().__init__(channels, channels)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.movedim(self.axis, -1), self.weight, self.bias).movedim(-1, self.axis)


class ControlNet(Shareable):
    """`backbone` steered by a trainable copy of its first half, which sees a hint: again a backbone.

    forward(x, c_noise, cond) takes the hint as the last `hint_channels` channels of cond.concat, at the sizes of x; the
    backbone gets what stands before them. The copy's taps go through linear maps that are zero before training, and
    join the backbone's own on the way to its second half: an untrained ControlNet is its backbone, bit for bit (under
    no_grad; where gradients are due torch takes other kernels). In the first step those maps alone get a gradient,
    from the second on the copy, from the third on the hint's encoder.

    Args:
        backbone: a trained `UNet` or `DiT`. Load its weights before, or with `start_from`; before its own training it
            gives zero, and no gradient.
        hint_channels: C of the hint.
        freeze: whether the backbone keeps its weights, as in the paper; False trains it too.
        scale: of the control: 1 as trained, 0 is the bare backbone. An attribute, which may change before sampling.
        width: channels of the hint's encoder at the hint's own resolution.

    Raises ValueError for a backbone without taps, settings out of range, and a condition without a hint.
    Source: Zhang et al. 2023, arXiv 2302.05543, section 3.
    """

    def __init__(
        self, backbone: nn.Module, hint_channels: int, freeze: bool = True, scale: float = 1.0, width: int = 32
    ) -> None:
        super().__init__()
        if hint_channels < 1 or width < 1:
            raise ValueError(f"hint_channels={hint_channels} and width={width} must be at least 1")
        if not hasattr(backbone, "tap_channels"):
            raise ValueError(
                f"backbone={type(backbone).__name__} has no control taps; ControlNet wraps a UNet or a DiT"
            )
        tapped = cast(Tapped, backbone)
        patch, stem, axis = tuple(tapped.patch), tapped.hint_channels, tapped.tap_axis
        self.hint_channels, self.scale, self.as_tokens = hint_channels, scale, axis == -1
        self.concat_channels = tapped.concat_channels + hint_channels
        self.backbone = backbone.requires_grad_(not freeze)
        self.copy = first_half(backbone, tapped.after_taps).requires_grad_(True)
        self.encoder = nn.Sequential(
            convolution(hint_channels, width, (3,) * len(patch)),
            nn.SiLU(),
            convolution(width, width, (3,) * len(patch)),
            nn.SiLU(),
            CONVOLUTIONS[len(patch)](width, stem, patch, stride=patch),  # type: ignore[arg-type]
            nn.SiLU(),
        )
        self.enter = Zero(stem, axis)
        self.joins = nn.ModuleList(Zero(channels, axis) for channels in tapped.tap_channels)

    def forward(self, x: Tensor, c_noise: Tensor, cond: Condition | None = None) -> Tensor:
        hint, bare = self.split(x, cond)
        hint = self.encoder(hint.to(x.dtype))  # (B, C of the stem, *axes / patch)
        hint = self.enter(hint.flatten(2).mT if self.as_tokens else hint)
        taps = self.copy.taps(x, c_noise, bare, hint=hint)  # type: ignore[operator]
        control = [self.scale * join(tap) for join, tap in zip(self.joins, taps, strict=True)]
        return self.backbone(x, c_noise, bare, control=control)  # type: ignore[no-any-return]

    def split(self, x: Tensor, cond: Condition | None) -> tuple[Tensor, Slots]:
        """The hint, and the condition without it. Raises ValueError where there is none, or of other sizes than x."""
        own_channels = self.concat_channels - self.hint_channels
        if cond is None or cond.concat is None or cond.concat.shape[1] != self.concat_channels:
            found = 0 if cond is None or cond.concat is None else cond.concat.shape[1]
            raise ValueError(
                f"cond.concat has {found} channels; the backbone's concat_channels={own_channels} and after them "
                f"hint_channels={self.hint_channels} are due, {self.concat_channels} in all"
            )
        if cond.concat.shape[2:] != x.shape[2:]:
            raise ValueError(f"cond.concat has sizes {tuple(cond.concat.shape[2:])}, but x has {tuple(x.shape[2:])}")
        own, hint = cond.concat.split([own_channels, self.hint_channels], dim=1)
        return hint, Slots(cond.tokens, cond.mask, cond.vector, own if own.shape[1] else None)

    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Give backbone and copy the state dict of a trained backbone. Raises ValueError where it does not fit."""
        try:
            self.backbone.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"the weights are not of this {type(self.backbone).__name__}: {error}") from error
        self.copy.load_state_dict({name: weights[name] for name in self.copy.state_dict()})


def first_half(backbone: nn.Module, after: Sequence[str]) -> nn.Module:
    """A copy of the backbone without the submodules named in `after`, which its taps do not need."""
    half = copy.deepcopy(backbone)
    for name in after:
        half.set_submodule(name, nn.Identity(), strict=True)
    return half
