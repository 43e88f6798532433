"""Small U-Nets that use everything, and inputs for them."""

from typing import Any

import torch
from torch import Tensor, nn

from mmdiff.backbones import UNet
from mmdiff.conditioning import Cond

SIZES = {1: (12,), 2: (12, 4), 3: (4, 4, 8)}


def perturbed(net: UNet) -> UNet:
    """The network with every parameter moved off its start, zeros included, so that a test sees all of them."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return net


def small(axes: int = 2, **settings: Any) -> UNet:
    torch.manual_seed(0)
    return UNet(axes, **{"in_channels": 2, "channels": 8, "multipliers": (1, 2), "head_channels": 8, **settings})


def data(axes: int, batch: int = 2, channels: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, channels, *SIZES[axes], generator=generator), torch.rand(batch, generator=generator)


def full(axes: int, **settings: Any) -> tuple[UNet, Cond]:
    """A network that uses everything, and a condition with all four slots."""
    attend = [[], [[0], list(range(axes))]]
    slots = {"tokens_width": 6, "vector_width": 5, "concat_channels": 3}
    net = small(axes, **{"attend": attend, **slots, "out_channels": 4, **settings})
    generator = torch.Generator().manual_seed(3)
    tokens, vector, concat = (
        torch.randn(2, *shape, generator=generator) for shape in ((3, 6), (5,), (3, *SIZES[axes]))
    )
    return net, Cond(tokens, torch.tensor([[True, True, False], [True, False, False]]), vector, concat)


def without_norms(net: nn.Module) -> None:
    """Takes group norms out of a network: they mix all steps, where a test asks what convolution mixes."""
    for module in net.modules():
        if isinstance(module, nn.GroupNorm):
            module.forward = lambda x: x  # type: ignore[method-assign]
