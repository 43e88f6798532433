"""The file of a run's curves, whatever logger it has."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyExperiment

from ..run.folder import run_folder
from ..run.history import HISTORY, HistoryFile


class HistoryLogger(Logger):
    """What is logged anywhere in the trainer, in a history file, beside whatever other loggers there are."""

    def __init__(self, file: HistoryFile, trainer: pl.Trainer) -> None:
        super().__init__()
        self.file, self.trainer = file, trainer

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Takes the optimizer's steps for `step`, which counts batches where a module steps its optimizers itself."""
        if self.trainer.is_global_zero:
            self.file.write(self.trainer.global_step, metrics)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Not kept here: the run's record has the config."""

    @property
    def experiment(self) -> DummyExperiment:
        """Takes every call and does nothing, for modules that draw into their logger's experiment."""
        return DummyExperiment()

    @property
    def save_dir(self) -> str:
        """With no name and version below it, so that a run without another logger keeps its folder."""
        return str(self.trainer.default_root_dir)

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""


class History(pl.Callback):
    """Writes all that is logged to history.jsonl in the run's folder, for `mmdiff report` and `mmdiff compare`.

    Steps are those of the optimizer. A resumed run goes on in the same file: what it held of later steps than the
    checkpoint's is dropped, and logged again as they come.
    """

    def __init__(self) -> None:
        self.file: HistoryFile | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.file = None
        if stage == "fit" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.file = HistoryFile(run_folder(trainer) / HISTORY)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Not earlier: the step to go on from is known only now, and Lightning has chosen the checkpoints' folder."""
        if self.file is None:
            return
        if trainer.is_global_zero:
            self.file.cut(trainer.global_step)
        others = [logger for logger in trainer.loggers if not isinstance(logger, HistoryLogger)]
        trainer.loggers = [*others, HistoryLogger(self.file, trainer)]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes what Lightning logs after this hook: a checkpoint of this step, written in it, must not lose them."""
        if self.file is not None and trainer.is_global_zero and is_log_step(trainer):
            metrics: dict[str, Any] = {"epoch": trainer.current_epoch, **trainer._logger_connector.metrics["log"]}
            self.file.write(trainer.global_step, {name: float(value) for name, value in metrics.items()})


def is_log_step(trainer: pl.Trainer) -> bool:
    """Whether the trainer logs after this batch: every log_every_n_steps steps, counted over resumes."""
    loop = trainer.fit_loop
    if trainer.lightning_module.automatic_optimization and loop._should_accumulate():
        return False
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and (loop.epoch_loop._batches_that_stepped + 1) % every == 0


def log_now(trainer: pl.Trainer, values: dict[str, float]) -> None:
    """Gives values to every logger, at the step that Lightning itself logs at."""
    for logger in trainer.loggers:
        logger.log_metrics(values, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
