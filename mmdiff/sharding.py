"""Weights, gradients and optimizer states spread over processes: torch's FSDP2 by Lightning's ModelParallelStrategy.

Each process keeps its share of every weight. The whole of a block's weights is gathered while the block runs.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method


def shard(module: nn.Module, mesh: DeviceMesh, parts: Iterable[nn.Module] = (), methods: Iterable[str] = ()) -> None:
    """Spreads `module`'s weights, those of `parts` part by part; once, however often it is called.

    mesh: of the strategy. parts: modules in it that are called as modules. methods: that are called from outside
    beside forward, and need whole weights too.
    Raises ValueError where the mesh also splits single layers, of which our networks say nothing.
    """
    if (split := mesh["tensor_parallel"].size()) > 1:
        raise ValueError(
            f"ModelParallelStrategy has tensor_parallel_size={split}, but the networks do not split their layers: set "
            "tensor_parallel_size: 1 and data_parallel_size to the number of processes"
        )
    if isinstance(module, FSDPModule) or not any(True for _ in module.parameters()):
        return
    for part in [*parts, module]:
        # Of the outermost too, so that whoever looks between two passes (an EMA, a checkpoint) always finds shares.
        fully_shard(part, mesh=mesh["data_parallel"], reshard_after_forward=True)
    for method in methods:
        register_fsdp_forward_method(module, method)


@contextmanager
def kept_whole(module: nn.Module) -> Iterator[None]:
    """After what `module` runs in this context its weights stay whole until their gradients are there."""
    if isinstance(module, FSDPModule):
        module.set_reshard_after_forward(False)
    try:
        yield
    finally:
        if isinstance(module, FSDPModule):
            module.set_reshard_after_forward(True)


def blocks(module: nn.Module) -> list[nn.Module]:
    """What a backbone runs one after another: the outermost members of its module lists that have weights."""
    listed = isinstance(module, nn.ModuleList)
    found: list[nn.Module] = []
    for child in module.children():
        if listed and not isinstance(child, nn.ModuleList):
            found += [child] if any(True for _ in child.parameters()) else []
        else:
            found += blocks(child)
    return found
