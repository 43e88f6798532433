"""A backbone made a denoiser: D(x, sigma) -> x0.

B batch, C channels, T time (axis 2). sigma is the true noise-to-signal ratio, of shape (), (B,) or (B, T).
"""

import torch
from torch import Tensor, nn

from .conditioning import Cond
from .precond import Precond


def expand_like(value: Tensor, x: Tensor) -> Tensor:
    """(), (B,) or (B, T) -> shape that broadcasts to x (B, C, T, ...)."""
    if value.ndim == 0:
        return value
    if value.ndim == 2:
        value = value[:, None]  # (B, 1, T)
    return value.reshape(*value.shape, *(1,) * (x.ndim - value.ndim))


class Denoiser(nn.Module):
    """D(x, sigma) = c_skip * x + c_out * backbone(c_in * x, c_noise, cond) (Karras et al. 2022, eq. 7)."""

    def __init__(self, backbone: nn.Module, precond: Precond) -> None:
        super().__init__()
        self.backbone, self.precond = backbone, precond

    def network(self, x: Tensor, sigma: Tensor, cond: Cond | None) -> Tensor:
        """The backbone's own output for x at sigma, in float32."""
        *_, c_in, c_noise = self.precond(sigma)
        if c_noise.ndim == 0:
            c_noise = c_noise.expand(x.shape[0])
        return self.backbone(expand_like(c_in, x) * x, c_noise, cond).float()

    def forward(self, x: Tensor, sigma: Tensor, cond: Cond | None = None) -> Tensor:
        sigma = sigma.to(x.device)
        c_skip, c_out, *_ = self.precond(sigma)
        return expand_like(c_skip, x) * x + expand_like(c_out, x) * self.network(x, sigma, cond)

    def loss(self, x0: Tensor, sigma: Tensor, cond: Cond | None = None, noise: Tensor | None = None) -> Tensor:
        """Mean square error (B,) on the network's own target, (x0 - c_skip x) / c_out: eps, v, EDM's or flow's loss.

        sigma (B,) or (B, T); steps where it is 0 are given and count in no loss. Raises ValueError where none is left.
        """
        noise = torch.randn_like(x0) if noise is None else noise
        x = x0 + expand_like(sigma, x0) * noise
        c_skip, c_out, *_ = self.precond(sigma)
        free = expand_like(sigma > 0, x0)
        target = (x0 - expand_like(c_skip, x0) * x) / torch.where(free, expand_like(c_out, x0), 1)
        error = torch.where(free, (self.network(x, sigma, cond) - target) ** 2, 0)
        share = free.expand_as(x0).flatten(1).float().mean(dim=1)
        if (share == 0).any():
            raise ValueError("sigma is 0 at every time step of an item: nothing is left to learn from it")
        return error.flatten(1).mean(dim=1) / share
