"""A clip whose frames can be told apart by their grey level."""

import torch


def ramp(frames: int, height: int = 48, width: int = 64) -> torch.Tensor:
    """(3, T, H, W): frame t is a flat grey of its own level, with a bright left half of the first channel."""
    level = torch.linspace(-0.8, 0.8, frames).view(1, frames, 1, 1)
    clip = level.expand(3, frames, height, width).clone()
    clip[0, :, :, : width // 2] += 0.2
    return clip
