"""How named parts of a network run: compiled, or a second time in place of being remembered."""

from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute


class Compile(pl.Callback):
    """Compiles parts of the network with `torch.compile`. Names of weights, and so checkpoints, stay what they were.

    modules: patterns of a shell for the names of modules; of nested ones that match, the outermost are compiled.
        ["model.denoiser.backbone"] is all of a backbone, ["model.denoiser.backbone.*"] each of its blocks for itself,
        which is compiled sooner.
    backend, mode, dynamic, fullgraph: as of `torch.compile`. dynamic: True where sizes change from batch to batch.

    Raises ValueError for a pattern that no module's name matches.
    """

    def __init__(
        self,
        modules: list[str],
        backend: str = "inductor",
        mode: str | None = None,
        dynamic: bool | None = None,
        fullgraph: bool = False,
    ) -> None:
        check_patterns(modules)
        self.modules, self.backend, self.mode = modules, backend, mode
        self.dynamic, self.fullgraph = dynamic, fullgraph

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for part in outermost(pl_module, self.modules) if stage == "fit" else ():
            part.compile(backend=self.backend, mode=self.mode, dynamic=self.dynamic, fullgraph=self.fullgraph)


class Recompute(pl.Callback):
    """Activation checkpointing: keeps only the inputs of parts of the network, and runs each again for its gradients.

    modules: patterns as of `Compile`, of parts whose forward draws from no generator that it is given; what torch's own
    draws, such as dropout, is drawn again. The gradients are the same, for about a third more time; memory falls to the
    inputs and what the largest part needs. `mmdiff.backbones` has its own argument for this, checkpoint.

    Raises ValueError for a pattern that no module's name matches.
    """

    def __init__(self, modules: list[str]) -> None:
        check_patterns(modules)
        self.modules = modules
        self.parts: list[nn.Module] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.parts = outermost(pl_module, self.modules)
            for part in self.parts:
                part.forward = partial(again, part.forward)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for part in self.parts:
            del part.forward  # the class's own shows again
        self.parts = []


def again(forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    """The result of `forward`, whose inner activations are not kept where gradients are to follow."""
    if torch.is_grad_enabled():
        return recompute(forward, *inputs, use_reentrant=False, **named)
    return forward(*inputs, **named)


def outermost(module: nn.Module, patterns: list[str]) -> list[nn.Module]:
    """Modules whose names match and that lie in no other such. Raises ValueError for a pattern that matches none."""
    found: dict[str, nn.Module] = {}
    used = set()
    for name, part in module.named_modules():
        hit = [pattern for pattern in patterns if fnmatchcase(name, pattern)]
        if hit and not isinstance(part, nn.ModuleList | nn.ModuleDict):  # these only hold others
            used.update(hit)
            if not any(name.startswith(f"{outer}.") for outer in found):
                found[name] = part
    if idle := [pattern for pattern in patterns if pattern not in used]:
        names = ", ".join(name for name, _ in module.named_children())
        raise ValueError(f"modules: none has a name that matches {idle[0]!r}; names begin with one of: {names}")
    return list(found.values())


def check_patterns(patterns: list[str]) -> None:
    """Raises ValueError where there is none."""
    if not patterns:
        raise ValueError("modules=[] names no part of the network; model.denoiser.backbone is all of a backbone")
