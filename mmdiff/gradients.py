"""The size of a gradient, over all that an optimizer steps and all processes that hold a part of it."""

from collections.abc import Iterable

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Euclidean norm () of the gradients there are, 0 without any. With sharded ones, all processes must call it."""
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
