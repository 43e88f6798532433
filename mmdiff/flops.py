"""Floating-point operations of a call: matrix products, convolutions and attention, two for each multiply-add."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import (
    conv_flop_count,
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
    shape_wrapper,
)

aten = torch.ops.aten
Shape = Sequence[int]


def _convolution_backward(grad: Shape, x: Shape, w: Shape, *rest: Any, out_shape: object = None) -> int:
    """The gradients of the input and of the weight each cost what the forward does; grouped convolutions too."""
    _, _, _, _, transposed, _, _, needed = rest
    return conv_flop_count(list(x), list(w), list(grad), transposed) * (needed[0] + needed[1])


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


# torch's formulas, and what they leave out (attention on a CPU) or count too high (weights of grouped convolutions).
FORMULAS: Mapping[Any, Callable[..., int]] = {
    **flop_registry,
    aten.convolution_backward: shape_wrapper(_convolution_backward),
    aten._scaled_dot_product_flash_attention_for_cpu: shape_wrapper(_attention),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(_attention_backward),
}


class _Counter(TorchDispatchMode):
    """Adds up the operations of every kernel; torch's FlopCounterMode cannot be used where autograd.grad is called."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = FORMULAS.get(func._overloadpacket)
        if formula is None:  # in inference mode a matmul arrives whole, and is counted by what it is made of
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        return out


def count_flops(call: Callable[[], object]) -> int:
    """Of one run of `call`, forwards and backwards alike; what is computed again (attention's scores) counts again.

    Element-wise work, norms, Fourier transforms and interpolation are not counted. Source: torch.utils.flop_counter.
    """
    with _Counter() as counter:
        call()
    return counter.total
