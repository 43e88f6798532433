"""Exponential moving average of the weights, beside the raw ones."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor


class EMA(pl.Callback):
    """Averages the module's trainable parameters after every optimizer step; validation and samples use the average.

    decay: of the average; in step n it is min(decay, (1 + n) / (10 + n)), so that early steps do not linger.
    A checkpoint's state_dict holds the raw weights; the averages are in this callback's state.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay} must be at least 0 and below 1; 0.999 averages over some 1,000 steps")
        self.decay, self.step = decay, 0
        self.average: dict[str, Tensor] = {}
        self.raw: dict[str, Tensor] = {}  # kept aside while the averages stand in for them

    def state_dict(self) -> dict[str, Any]:
        return {"decay": self.decay, "step": self.step, "average": self.average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step, self.average = state_dict["step"], state_dict["average"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        live = dict(trainable(pl_module))
        given = self.average or {name: p.detach().clone() for name, p in live.items()}
        self.average = {name: average.to(live[name].device) for name, average in given.items()}

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:  # gradients are still being accumulated
            return
        self.step = trainer.global_step
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        for name, p in trainable(pl_module):
            self.average[name].lerp_(p.detach(), 1 - decay)

    @torch.no_grad()
    def swap_in(self, pl_module: pl.LightningModule) -> None:
        """Puts the averages in the place of the weights."""
        self.raw = {name: p.detach().clone() for name, p in trainable(pl_module)}
        for name, p in trainable(pl_module):
            p.copy_(self.average[name])

    @torch.no_grad()
    def swap_out(self, pl_module: pl.LightningModule) -> None:
        """Puts the raw weights back, if they are aside."""
        for name, p in trainable(pl_module):
            if name in self.raw:
                p.copy_(self.raw[name])
        self.raw = {}

    @contextmanager
    def applied(self, pl_module: pl.LightningModule) -> Iterator[None]:
        """Averages in place of the weights, within the context."""
        self.swap_in(pl_module)
        try:
            yield
        finally:
            self.swap_out(pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.average:
            self.swap_in(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.swap_out(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.swap_out(pl_module)


def trainable(module: pl.LightningModule) -> Iterable[tuple[str, Tensor]]:
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad)
