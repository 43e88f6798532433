"""Which noise levels a training batch has: one for each item, one for each time step, and none on what is known.

A known part is a part at sigma 0: the network sees it clean and it counts in no loss. B batch, T time.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .density import SigmaDensity


class Levels(ABC):
    """Draws the noise levels of a batch from a density."""

    @abstractmethod
    def __call__(self, density: SigmaDensity, x0: Tensor, generator: torch.Generator) -> Tensor:
        """sigma (B,) or (B, T) on x0's device, for latents x0 (B, C, T, ...)."""


@dataclass(frozen=True)
class PerItem(Levels):
    """(B,): one level for each item."""

    def __call__(self, density: SigmaDensity, x0: Tensor, generator: torch.Generator) -> Tensor:
        return density.sample(len(x0), device=x0.device, generator=generator)


@dataclass(frozen=True)
class PerStep(Levels):
    """(B, T): one level for each time step, independent of the others (diffusion forcing, arXiv 2407.01392, alg. 1)."""

    def __call__(self, density: SigmaDensity, x0: Tensor, generator: torch.Generator) -> Tensor:
        size = (x0.shape[0], x0.shape[2])
        sigma = density.sample(size[0] * size[1], device=x0.device, generator=generator)
        # a stratified density's draws come in order: shuffled, or the early items would have the low levels
        return sigma[torch.randperm(len(sigma), generator=generator).to(sigma.device)].reshape(size)


@dataclass(frozen=True)
class Known(Levels):
    """(B, T): the `first` and the `last` latent time steps known, in a `share` of the items; the rest as `levels` says.

    first=1 trains image-to-video, first=1 and last=1 interpolation between two frames; a share below 1 keeps the
    model able to generate from nothing.
    """

    first: int = 1
    last: int = 0
    share: float = 0.5
    levels: Levels = field(default_factory=PerItem)

    def __post_init__(self) -> None:
        if self.first < 0 or self.last < 0 or self.first + self.last == 0:
            raise ValueError(f"first={self.first}, last={self.last} must not be negative, nor both 0")
        check_share(self.share)

    def __call__(self, density: SigmaDensity, x0: Tensor, generator: torch.Generator) -> Tensor:
        steps = x0.shape[2]
        if self.first + self.last >= steps:
            raise ValueError(f"first={self.first}, last={self.last} leave nothing unknown of {steps} latent time steps")
        known = torch.zeros(steps, dtype=torch.bool)
        known[: self.first] = True
        known[steps - self.last :] = True
        chosen = torch.rand(len(x0), generator=generator) < self.share
        return without(chosen[:, None] & known, self.levels(density, x0, generator))


@dataclass(frozen=True)
class Past(Levels):
    """(B, T): a past of 1 to `longest` latent time steps known, in a `share` of the items: trains continuation."""

    longest: int
    share: float = 0.5
    levels: Levels = field(default_factory=PerItem)

    def __post_init__(self) -> None:
        if self.longest < 1:
            raise ValueError(f"longest={self.longest} must be at least 1")
        check_share(self.share)

    def __call__(self, density: SigmaDensity, x0: Tensor, generator: torch.Generator) -> Tensor:
        steps = x0.shape[2]
        if self.longest >= steps:
            raise ValueError(f"longest={self.longest} leaves nothing to continue in {steps} latent time steps")
        lengths = torch.randint(1, self.longest + 1, (len(x0),), generator=generator)
        lengths[torch.rand(len(x0), generator=generator) >= self.share] = 0
        return without(torch.arange(steps) < lengths[:, None], self.levels(density, x0, generator))


def without(known: Tensor, sigma: Tensor) -> Tensor:
    """sigma (B,) or (B, T) -> (B, T), 0 where known (B, T)."""
    per_step = sigma[:, None].expand(known.shape) if sigma.ndim == 1 else sigma
    return per_step.masked_fill(known.to(sigma.device), 0.0)


def check_share(share: float) -> None:
    """Raise ValueError unless it is a share of the items, above 0."""
    if not 0 < share <= 1:
        raise ValueError(f"share={share} must lie between 0, excluded, and 1: the share of items with known parts")
