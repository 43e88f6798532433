"""The folder of a run: where its config, record, curves, samples and report lie."""

import os
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger


def run_folder(trainer: pl.Trainer) -> Path:
    """The version folder of the trainer's first logger, or default_root_dir where there is none; it may not exist yet.

    All processes must call it together, best in `setup`, and keep the path: it is that of rank 0, since a logger that
    counts versions would count the folder of rank 0 too. Raises ValueError where it is a URL.
    """
    folder = trainer.strategy.broadcast(_local(trainer))
    if "://" in folder:
        raise ValueError(f"the run's folder {folder} is a URL; a run needs a local one: set trainer.default_root_dir")
    return Path(folder)


def _local(trainer: pl.Trainer) -> str:
    logger = trainer.logger
    if logger is None:
        return os.fspath(trainer.default_root_dir)
    if isinstance(logger, (TensorBoardLogger, CSVLogger)):
        return os.fspath(logger.log_dir)
    version = logger.version  # as Lightning's ModelCheckpoint names it
    return os.path.join(
        logger.save_dir or trainer.default_root_dir,
        str(logger.name or ""),
        version if isinstance(version, str) else f"version_{version or 0}",
    )
