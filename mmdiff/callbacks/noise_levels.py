"""Loss by noise level, of training and of validation."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from ..processes import summed
from ..run.levels import range_name
from .history import is_log_step, log_now

EDGES = (0.01, 0.032, 0.1, 0.32, 1.0, 3.2, 10.0, 32.0, 100.0)


class LossByNoiseLevel(pl.Callback):
    """Logs the mean loss of the items in each range of sigma: train_at/LOW_to_HIGH since it last logged, and val_at/.

    edges: between the ranges, in sigma, rising; default two to a factor of ten. Items under the first and over the last
    have ranges of their own, and a range without items is left out. Losses are each item's own, with their weights.

    Reads "sigma" (B,) or (B, T) and "items" (B,), 0 for items of which nothing counts, from what `training_step` and
    `validation_step` return, as `mmdiff.module.DiffusionModule`'s do; of other modules it logs nothing. An item whose
    time steps have levels of their own counts at the geometric mean of those that are not 0. Over processes, all items
    count alike. Since validation's noise and levels are fixed, its curves show the network alone.
    """

    def __init__(self, edges: Sequence[float] = EDGES) -> None:
        self.edges = torch.tensor([float(edge) for edge in edges])
        if not len(edges) or not (self.edges > 0).all() or not (self.edges.diff() > 0).all():
            raise ValueError(f"edges={list(edges)} must be positive and rise; 0.1, 1, 10 makes four ranges")
        low, high = [None, *edges], [*edges, None]
        self.names = [range_name(a, b) for a, b in zip(low, high, strict=True)]
        self.sums = {"train": self._empty(), "val": self._empty()}

    def _empty(self) -> Tensor:
        return torch.zeros(2, len(self.edges) + 1)  # sum of losses; number of items

    def state_dict(self) -> dict[str, Any]:
        return {"edges": self.edges, "train": summed(self.sums["train"])}  # as all processes write one checkpoint

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if torch.equal(state_dict["edges"], self.edges):  # else what was gathered is of other ranges
            self.sums["train"] = state_dict["train"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        resumed = self.sums["train"] if trainer.is_global_zero else self._empty()
        self.sums["train"] = resumed.to(trainer.strategy.root_device)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._add("train", outputs)
        if is_log_step(trainer):
            self._log("train", trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.sums["val"] = self._empty()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._add("val", outputs)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._log("val", trainer)

    def _add(self, stage: str, outputs: Any) -> None:
        if not isinstance(outputs, dict) or not {"sigma", "items"} <= set(outputs):
            return
        sigma, items = outputs["sigma"].detach().float(), outputs["items"].detach().float()
        level = geometric_mean(sigma.flatten(1)) if sigma.ndim > 1 else sigma
        counted = (items != 0) & items.isfinite() & (level > 0)
        place = torch.bucketize(level, self.edges.to(level.device), right=True)
        inside = counted[:, None] & (
            place[:, None] == torch.arange(len(self.names), device=place.device)
        )  # (B, ranges)
        # Sums of float32 in float64 do not depend on their order, so neither on the processes nor on a resume.
        precise = torch.float32 if items.device.type == "mps" else torch.float64
        found = torch.stack([torch.where(inside, items[:, None], 0).to(precise).sum(dim=0), inside.sum(dim=0)])
        self.sums[stage] = self.sums[stage].to(found.device) + found  # an accelerator is not waited for

    def _log(self, stage: str, trainer: pl.Trainer) -> None:
        gathered = self.sums[stage].to(trainer.strategy.root_device)
        total, count = trainer.strategy.reduce(gathered, reduce_op="sum").cpu()
        self.sums[stage] = self._empty()
        found = {name: s / n for name, s, n in zip(self.names, total.tolist(), count.tolist(), strict=True) if n}
        if found:
            log_now(trainer, {f"{stage}_at/{name}": value for name, value in found.items()})


def geometric_mean(sigma: Tensor) -> Tensor:
    """Of the positive levels of each item, (B, N) -> (B,); 0 where there is none."""
    known = sigma <= 0
    logs = torch.where(known, 0, sigma.clamp(min=1e-30).log()).sum(dim=1)
    count = (~known).sum(dim=1)
    return torch.where(count > 0, (logs / count.clamp(min=1)).exp(), 0)
