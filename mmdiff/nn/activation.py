"""Activations with parameters."""

import torch
from torch import Tensor, nn


class Snake(nn.Module):
    """x + sin^2(alpha x) / alpha with one alpha for each channel (Ziyin et al. 2020): an activation that can oscillate.

    x (B, C, *axes) with any number of axes. alpha is kept as its logarithm, so it stays above 0 and the division is
    safe. The sine runs in float32 under autocast; the result has the type of x.

    Args:
        channels: C. alpha: every channel's at the start; larger for faster oscillation.
    """

    def __init__(self, channels: int, alpha: float = 1.0) -> None:
        super().__init__()
        if alpha <= 0:
            raise ValueError(f"alpha={alpha} must be above 0; the paper starts between 0.2 and 50, 1 suits most")
        self.log_alpha = nn.Parameter(torch.full((channels,), alpha).log())

    def forward(self, x: Tensor) -> Tensor:
        log_alpha = self.log_alpha.reshape(-1, *(1,) * (x.ndim - 2))  # (C, 1, ...)
        wave = torch.sin(log_alpha.exp() * x)
        return torch.addcmul(x, wave, wave * (-log_alpha).exp()).to(x.dtype)
