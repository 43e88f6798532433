"""Networks that tell data from reconstructions, patch by patch.

B batch, C channels, `*axes` T and what follows it.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from .nn.conv import CONVOLUTIONS
from .nn.norm import group_norm


class Judgement(NamedTuple):
    """score: (B, ...), one value for each patch, high for data. features: of inner layers, each (B, C, ...)."""

    score: Tensor
    features: list[Tensor]


class Discriminator(nn.Module, ABC):
    """x (B, C, *axes) -> a judgement of each scale or resolution that it looks at."""

    @abstractmethod
    def forward(self, x: Tensor) -> list[Judgement]: ...


class Patch(Discriminator):
    """Strided convolutions over 1, 2 or 3 axes that judge overlapping patches (PatchGAN, Isola et al. 2017).

    Args:
        channels: C of the data. steps: one tuple for each level, by what it divides the axes: [[1, 2, 2], [1, 2, 2]]
            judges each frame alone. width: channels of the first level, doubled by each up to eight times.

    Group norm from the second level on; no batch norm, under which an item's score would depend on its neighbours.
    """

    def __init__(self, channels: int, steps: Sequence[Sequence[int]], width: int = 64) -> None:
        super().__init__()
        if not steps or any(len(step) != len(steps[0]) for step in steps) or not 1 <= len(steps[0]) <= 3:
            raise ValueError(
                f"steps={[list(s) for s in steps]} must be tuples of one length, one for each of 1 to 3 axes"
            )
        if any(factor not in (1, 2) for step in steps for factor in step):
            raise ValueError(f"steps={[list(s) for s in steps]} must be of 1 and 2 alone")
        axes = len(steps[0])
        convolution = CONVOLUTIONS[axes]
        self.smallest = tuple(math.prod(step[axis] for step in steps) for axis in range(axes))
        widths = [channels, *(width * min(2**level, 8) for level in range(len(steps)))]
        levels: list[nn.Module] = []
        for level, (a, b, step) in enumerate(zip(widths[:-1], widths[1:], steps, strict=True)):
            kernel = tuple(2 + factor for factor in step)
            layers = [convolution(a, b, kernel, stride=tuple(step), padding=(1,) * axes)]  # type: ignore[arg-type]
            levels.append(nn.Sequential(*layers, *([group_norm(b)] if level else []), nn.LeakyReLU(0.2)))
        self.levels = nn.ModuleList(levels)
        self.last = convolution(widths[-1], 1, (3,) * axes, padding=(1,) * axes)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> list[Judgement]:
        if any(size < least for size, least in zip(x.shape[2:], self.smallest, strict=True)):
            raise ValueError(
                f"sizes {tuple(x.shape[2:])} of what is judged are below {self.smallest}: give the discriminator fewer "
                "steps of 2"
            )
        features = []
        for level in self.levels:
            x = level(x)
            features.append(x)
        return [Judgement(self.last(x), features)]
