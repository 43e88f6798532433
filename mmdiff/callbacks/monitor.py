"""Speed, memory and the distance of the averages: what a run costs and whether it moves."""

import resource
import sys
import time
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .ema import all_of
from .history import is_log_step, log_now


class Monitor(pl.Callback):
    """Logs, every log_every_n_steps steps, over the steps since it last did:

    - speed/items_per_s and speed/media_s_per_s, seconds of clips per second, of all processes together, taking the
      others to do as much as the first; and speed/steps_per_s. Validation is not counted.
    - speed/waiting: the share of the time that the first process waited for its batches.
    - memory/host_gib and, with CUDA, memory/device_gib: most that the first process has had so far.
    - ema/distance: of each `EMA`, ||weights - average|| / ||weights||, over the parameters that it averages.

    Nothing of it is in a checkpoint: what a machine does is not part of an exact resume. seconds: those spent so far
    waiting, training and validating, for the record of the run.
    """

    def __init__(self) -> None:
        self.seconds = {"waiting for data": 0.0, "training steps": 0.0, "validation and samples": 0.0}
        self._start_window()
        self.step = 0
        self.before = time.perf_counter()

    def _start_window(self) -> None:
        self.items, self.waited_s, self.worked_s = 0, 0.0, 0.0
        self.media_s: Tensor | float = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        self._start_window()
        self.step, self.before = trainer.global_step, time.perf_counter()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.waited_s += self._spent("waiting for data")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.worked_s += self._spent("training steps")
        self.items += items_of(batch)
        self.media_s = self.media_s + media_s_of(batch)
        if not is_log_step(trainer):
            return
        elapsed_s, world = self.waited_s + self.worked_s, trainer.world_size
        found = {
            "speed/steps_per_s": (trainer.global_step - self.step) / elapsed_s,
            "speed/items_per_s": world * self.items / elapsed_s,
            "speed/waiting": self.waited_s / elapsed_s,
            "memory/host_gib": host_gib(),
        }
        if media_s := float(self.media_s):
            found["speed/media_s_per_s"] = world * media_s / elapsed_s
        device = trainer.strategy.root_device
        if device.type == "cuda":
            found["memory/device_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        found |= ema_distances(trainer, pl_module)
        log_now(trainer, found)
        self._start_window()
        self.step, self.before = trainer.global_step, time.perf_counter()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._spent("training steps")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._spent("validation and samples")

    def _spent(self, on: str) -> float:
        """Seconds since this was last asked, which were spent `on` this."""
        now = time.perf_counter()
        spent_s, self.before = now - self.before, now
        self.seconds[on] += spent_s
        return spent_s


def ema_distances(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
    """ema/distance, or ema/distance/DECAY of each of several. All processes must ask together."""
    averages = [ema for ema in all_of(trainer) if ema.average]
    names = ["ema/distance"] if len(averages) == 1 else [f"ema/distance/{ema.decay}" for ema in averages]
    return {name: distance(pl_module, ema.average) for name, ema in zip(names, averages, strict=True)}


@torch.no_grad()
def distance(module: torch.nn.Module, average: Mapping[str, Tensor]) -> float:
    """||weights - average|| / ||weights|| over the parameters in `average`, one at a time, 0 where all are 0."""
    parameters = [(p, average[name].to(p.device)) for name, p in module.named_parameters() if name in average]
    apart = torch.stack([_square(p - mean) for p, mean in parameters]).sum()
    size = torch.stack([_square(p) for p, _ in parameters]).sum()
    return float((apart / size).sqrt()) if size else 0.0


def _square(values: Tensor) -> Tensor:
    total = torch.linalg.vector_norm(values.detach(), dtype=torch.float32).square()
    return total.full_tensor() if isinstance(total, DTensor) else total


def host_gib() -> float:
    """Most memory that this process has had, in GiB."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**30 if sys.platform == "darwin" else 2**20)  # macOS says bytes, Linux KiB


def items_of(batch: Any) -> int:
    """Clips in a batch of the suite's data modules, or in a tensor or sequence of them; 0 of anything else."""
    if isinstance(batch, Mapping):
        batch = next(iter(batch.values()), ())
        return items_of(batch) if isinstance(batch, (Mapping, Tensor, list, tuple)) else 0
    if isinstance(batch, (list, tuple)) and batch and isinstance(batch[0], Tensor):
        batch = batch[0]
    return len(batch) if isinstance(batch, (list, tuple)) or (isinstance(batch, Tensor) and batch.ndim) else 0


def media_s_of(batch: Any) -> Tensor | float:
    """Seconds of the clips in a batch that says their "duration_s", of several modalities the first's; a tensor stays
    on its accelerator, which is not waited for."""
    lengths = batch.get("duration_s") if isinstance(batch, Mapping) else None
    if isinstance(lengths, Mapping):
        return media_s_of({"duration_s": next(iter(lengths.values()), None)})
    return lengths.sum() if isinstance(lengths, Tensor) else 0.0
