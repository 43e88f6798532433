"""What a check of the doctor sees of a training, and what it finds."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

GROUP = "mmdiff.doctor"  # entry points of packages that add checks: functions of no argument that give a list of them


@dataclass(frozen=True)
class Finding:
    """A fault. name: as in docs/troubleshooting.md. found: one sentence with the numbers. cure: what to do."""

    name: str
    found: str
    cure: str

    def __str__(self) -> str:
        return f"{self.name}: {self.found}. {self.cure}"


@dataclass
class Run:
    """The training that is looked at. config: its resolved tree, {} where there is none."""

    trainer: pl.Trainer
    module: pl.LightningModule
    config: Mapping[str, Any] = field(default_factory=dict)
    first_step: int = 0  # where it began, or was resumed

    @property
    def steps(self) -> int:
        """Optimizer steps since it began, or was resumed."""
        return self.trainer.global_step - self.first_step

    @property
    def last(self) -> bool:
        """Whether no step is to follow."""
        return 0 < self.trainer.max_steps <= self.trainer.global_step

    def due(self, steps: int) -> bool:
        """Whether so many steps are done, or all of a shorter training."""
        return self.steps >= steps or self.last

    @property
    def resumed(self) -> bool:
        return self.first_step > 0

    @property
    def whole(self) -> bool:
        """Whether every process holds all weights, so that a part of the module can be called alone."""
        return not any(isinstance(p, DTensor) for p in self.module.parameters())

    def arguments(self, *path: str) -> Any:
        """The value at a path of the config, such as ("model", "init_args", "start_from"); None where there is none."""
        node: Any = self.config
        for name in path:
            node = node.get(name) if isinstance(node, Mapping) else None
        return node

    def as_trained(self) -> AbstractContextManager[Any]:
        """Within it the module computes in the precision of its training steps."""
        return self.trainer.precision_plugin.forward_context()

    def items(self) -> Sequence[Any] | None:
        """The items (`mmdiff.data.items.Item`) of the training data; None for data that does not tell them."""
        return getattr(self.dataset(), "items", None)

    def dataset(self) -> Any:
        """That of the training data, None where there is none."""
        return getattr(self.trainer.train_dataloader, "dataset", None)


class Check:
    """Looks for one kind of fault. A hook yields what it finds at that moment; all of them may be left out.

    It changes nothing of the training: no weight, no buffer, no random generator.
    """

    def begin(self, run: Run) -> Iterable[Finding]:
        """Before the first batch; the state of an earlier training is forgotten."""
        return ()

    def batch(self, run: Run, batch: Mapping[str, Any]) -> Iterable[Finding]:
        """A training batch, on its device, before its step."""
        return ()

    def gradients(self, run: Run, optimizer: torch.optim.Optimizer) -> Iterable[Finding]:
        """Before a step of an optimizer: gradients are whole, in true scale, and not clipped."""
        return ()

    def step(self, run: Run) -> Iterable[Finding]:
        """After a training batch, whose optimizer step may still be held back by accumulation."""
        return ()


def added_checks() -> list[Check]:
    """Those that packages add through the entry-point group `mmdiff.doctor`."""
    return [check for entry in sorted(entry_points(group=GROUP), key=lambda e: e.name) for check in entry.load()()]


def clips(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The data of a batch by name: x, or latents; of several modalities x.video, ..."""
    found: dict[str, Tensor] = {}
    for name in ("x", "latents"):
        value = batch.get(name)
        parts = value.items() if isinstance(value, Mapping) else [("", value)]
        found |= {f"{name}.{part}".rstrip("."): x for part, x in parts if isinstance(x, Tensor) and x.ndim >= 3}
    return found


def keys_of(batch: Mapping[str, Any]) -> list[str] | None:
    """The names of a batch's items, None where it has none."""
    keys = batch.get("key")
    return [str(key) for key in keys] if isinstance(keys, (list, tuple)) else None


def local(value: Tensor) -> Tensor:
    """The part of a tensor that this process holds, without its gradient."""
    value = value.detach()
    return value.to_local() if isinstance(value, DTensor) else value


def named(names: Sequence[str], most: int = 3) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())
