"""The record of a run while it runs, and its report at the end."""

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_warn

from ..run.folder import run_folder
from ..run.record import (
    RECORD,
    batches_of,
    command,
    data_record,
    git_states,
    left_out,
    machine,
    now,
    read_record,
    versions,
    write_record,
)
from ..run.report import write_report
from .monitor import Monitor


class RunRecord(pl.Callback):
    """Writes run.json in the run's folder, and report.html when the run ends, however it ends.

    The record holds the resolved config, the seed, the size of the model, the data with its fingerprint, and a list of
    launches, one for each start: command, versions, git state, machine, first and last step, how it ended, and where
    its time went. A resumed run adds a launch to the record that is there. Only rank 0 writes.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.record: dict[str, Any] = {}
        self.loaders: dict[str, Any] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        folder = run_folder(trainer)
        self.folder = folder if stage == "fit" and trainer.is_global_zero and not trainer.fast_dev_run else None  # type: ignore[attr-defined]
        self.record = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.folder is None:
            return
        launches: list[dict[str, Any]] = []
        if trainer.global_step > 0 and (self.folder / RECORD).exists():
            launches = read_record(self.folder)["launches"]
            for launch in launches:
                if launch["status"] == "running":
                    launch["status"] = "killed"
        parameters = list(pl_module.parameters())
        given = {"train": batches_of(trainer.train_dataloader), "val": batches_of(trainer.val_dataloaders)}
        self.loaders = {
            split if len(loaders) == 1 else f"{split} {place}": loader
            for split, loaders in given.items()
            for place, loader in enumerate(loaders)
        }
        launch = {
            "command": command(),
            "folder": os.getcwd(),
            "started": now(),
            "first_step": trainer.global_step,
            "processes": trainer.world_size,
            "strategy": type(trainer.strategy).__name__,
            "precision": str(trainer.precision),
            "machine": machine(),
            "git": git_states(self.folder),
            "versions": versions(),
        }
        self.record = {
            "config": resolved_config(trainer),
            "seed": int(seed) if (seed := os.environ.get("PL_GLOBAL_SEED")) else None,
            "model": {
                "class": f"{type(pl_module).__module__}.{type(pl_module).__qualname__}",
                "parameters": sum(p.numel() for p in parameters),
                "trained": sum(p.numel() for p in parameters if p.requires_grad),
            },
            "data": data_record(self.loaders),
            "launches": [*launches, launch],
        }
        self._update(trainer, "running")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._update(trainer, "running")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end(trainer, "finished")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        words = " ".join(str(exception).split())
        self._end(trainer, f"ended by {type(exception).__name__}{': ' * bool(words)}{words}")

    def _update(self, trainer: pl.Trainer, status: str) -> None:
        if self.folder is None or not self.record:
            return
        savers = [one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)]
        saved = [path for one in savers for path in (one.best_model_path, one.last_model_path) if path]
        seconds = [c.seconds for c in trainer.callbacks if isinstance(c, Monitor)]  # type: ignore[attr-defined]
        self.record["launches"][-1] |= {
            "status": status,
            "last_step": trainer.global_step,
            "at": now(),
            "seconds": {name: round(spent_s, 2) for name, spent_s in seconds[0].items()} if seconds else {},
            "checkpoints": list(dict.fromkeys(saved)),
        }
        for split, loader in self.loaders.items():
            self.record["data"][split]["left_out"] = left_out(loader)
        write_record(self.folder, self.record)

    def _end(self, trainer: pl.Trainer, status: str) -> None:
        """The report must not turn a finished training into a failed one, nor hide why one failed."""
        if self.folder is None or not self.record:
            return
        try:
            self._update(trainer, status)
            write_report(self.folder)
        except (OSError, ValueError) as error:
            rank_zero_warn(f"no report of {self.folder}: {error}; `mmdiff report {self.folder}` makes it later")


def resolved_config(trainer: pl.Trainer) -> dict[str, Any] | None:
    """What the command line and its config files came to, or None where the trainer was made by other code."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SaveConfigCallback):
            found: dict[str, Any] = yaml.safe_load(callback.parser.dump(callback.config, skip_none=False))
            return found
    return None
