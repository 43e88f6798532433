"""Checkpoints to go on from after a kill: by the clock, when the run is told to stop, and at its end."""

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint

from ..exits import Stopped
from ..run.folder import run_folder
from .signals import StopSignals

FOLDER, PREFIX = "checkpoints", "resume-"


class Checkpoints(Checkpoint):
    """Saves RUN/checkpoints/resume-STEP.ckpt every `minutes` or `steps`, on SIGTERM and SIGINT, and at the end.

    Args:
        minutes: between two; None leaves the clock out. steps: optimizer steps between two; None leaves them out.
        keep: this callback's newest, which stay; after each save it deletes its older ones, and nobody else's. With 2
            there is another one to go on from where the newest is damaged.

    A signal waits for the end of the optimizer step, or ends a validation that is under way, which then runs anew when
    the run goes on; with several processes it waits for the validation's end. Then it saves and raises `Stopped`, of
    which `mmdiff fit` makes the exit status 143 or 130. A second signal does not wait. In the last step of a run a
    signal changes nothing: the run is at its end.

    Raises ValueError for a number that is not above 0.
    """

    def __init__(self, minutes: float | None = 30.0, steps: int | None = None, keep: int = 2) -> None:
        for name, value in (("minutes", minutes), ("steps", steps), ("keep", keep)):
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be above 0" + ("" if name == "keep" else "; null leaves it out"))
        self.minutes, self.steps, self.keep = minutes, steps, keep
        self.signals = StopSignals()
        self.folder: Path | None = None
        self.step = self.saved = 0  # optimizer steps: done, and at the last save
        self.saved_s = 0.0  # of the clock, at the last save
        self.owed = False  # a save waits for the end of the validation
        self.stopping = 0  # the signal that all processes heed
        self.leaving: Stopped | None = None  # raised when the loggers have what the last step logged

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.folder = run_folder(trainer) / FOLDER
        self.signals.remember()  # before Lightning sets its own

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.signals.install()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.signals.install()
        self.signals.held = True
        self.step = self.saved = trainer.global_step
        self.saved_s = time.monotonic()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.leaving is not None:
            raise self.leaving

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.leaving is not None:
            raise self.leaving

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:  # gradients are still being accumulated
            return
        self.step = trainer.global_step
        loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
        self._decide(trainer)
        if self.stopping and not self._at_end(trainer):
            self.leaving = Stopped(self.stopping, self._save(trainer))
        elif self.owed and fetcher is not None and not loop._should_check_val_fx(fetcher):
            self._save(trainer)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        if self.signals.received and trainer.world_size == 1 and not self._at_end(trainer):
            raise Stopped(self.signals.received)  # saved in on_exception, when averages have given way to the weights

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self._decide(trainer)
        if self.stopping and not self._at_end(trainer):
            raise Stopped(self.stopping, self._save(trainer))
        if self.owed:
            self._save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.saved != trainer.global_step:
            self._save(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, Stopped) and trainer.validating and self.signals.held and self.leaving is None:
            exception.saved = self._save(trainer)
        self.signals.restore()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.signals.restore()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Notes the run's folder in every checkpoint, so that the run goes on there."""
        if self.folder is not None:
            checkpoint["run_folder"] = str(self.folder.parent.absolute())

    def _decide(self, trainer: pl.Trainer) -> None:
        """Whether to stop and whether to save, the same in all processes; the first one's clock counts."""
        # Not in on_train_end: by then the epoch counts as done, and a run that is made longer would begin the next.
        due = self._at_end(trainer) or (self.steps is not None and self.step - self.saved >= self.steps)
        if self.minutes is not None and trainer.is_global_zero:
            due |= time.monotonic() - self.saved_s >= 60 * self.minutes
        asked = torch.tensor([self.signals.received, int(due)], device=trainer.strategy.root_device)
        if trainer.world_size > 1:
            asked = trainer.strategy.reduce(asked, reduce_op="max")
        self.stopping, owed = asked.tolist()
        self.owed |= bool(owed)

    def _at_end(self, trainer: pl.Trainer) -> bool:
        return trainer.global_step >= trainer.max_steps > 0

    def _save(self, trainer: pl.Trainer) -> str:
        """Saves, deletes the oldest of our own; returns what to say of it."""
        if getattr(trainer, "fast_dev_run", 0) or self.folder is None:
            return "nothing is saved"
        path = self.folder / f"{PREFIX}{trainer.global_step}.ckpt"
        trainer.save_checkpoint(path, False)  # all of it, not the weights alone
        self.owed, self.saved, self.saved_s = False, trainer.global_step, time.monotonic()
        if trainer.is_global_zero:
            ours = sorted(self.folder.glob(f"{PREFIX}*.ckpt"), key=lambda one: one.stat().st_mtime_ns)
            others = [one for one in ours if one != path]
            for old in others[: max(0, len(others) + 1 - self.keep)]:
                trainer.strategy.remove_checkpoint(old)
        return f"saved {path}; mmdiff fit --resume goes on"
