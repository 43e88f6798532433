"""Small transformers and their inputs, shared by the tests of `DiT`."""

from typing import Any

import torch
from torch import Tensor, nn

from mmdiff.backbones import DiT
from mmdiff.conditioning import Cond

PATCHES = {1: (2,), 2: (2, 1), 3: (1, 2, 2)}
SIZES = {1: (8,), 2: (6, 3), 3: (3, 4, 4)}
ATTEND = {1: [[0]], 2: [[1], [0]], 3: [[1, 2], [0]]}


def perturbed(net: nn.Module) -> Any:
    """Every parameter moved off its start, which gives zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return net


def small(axes: int = 2, **settings: Any) -> DiT:
    torch.manual_seed(0)
    defaults = {"in_channels": 2, "patch": PATCHES[axes], "width": 16, "depth": 2, "head_channels": 8}
    return DiT(**{**defaults, **settings})


def data(axes: int, batch: int = 2, channels: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, channels, *SIZES[axes], generator=generator), torch.rand(batch, generator=generator)


def full(axes: int, **settings: Any) -> tuple[DiT, Cond]:
    """A network that uses everything, and a condition with all four slots."""
    slots = {"tokens_width": 6, "vector_width": 5, "concat_channels": 3, "out_channels": 4}
    net = small(axes, **{**slots, **({} if settings.get("joint") else {"attend": ATTEND[axes]}), **settings})
    generator = torch.Generator().manual_seed(3)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    tokens, vector = torch.randn(2, 3, 6, generator=generator), torch.randn(2, 5, generator=generator)
    return net, Cond(tokens, mask, vector, torch.randn(2, 3, *SIZES[axes], generator=generator))
