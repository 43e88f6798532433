"""Processes that train together: how long they wait for one another, and what is said when one of them is gone."""

import subprocess
import threading
from datetime import timedelta

import lightning.pytorch as pl
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from .exits import ProcessError

TIMEOUT = timedelta(minutes=10)
LAST_WORDS_S = 20.0  # for processes that were started here, once this one ends
SIGNS = ("gloo", "nccl", "connection", "timed out", "timeout", "broken pipe", "peer")  # what torch says of a lost rank


def shorten_timeout(trainer: pl.Trainer) -> None:
    """Waits TIMEOUT for another process where the config leaves torch's default, which is half an hour."""
    strategy = trainer.strategy
    if getattr(strategy, "_timeout", None) == default_pg_timeout:
        strategy._timeout = TIMEOUT  # type: ignore[attr-defined]


def lost(error: RuntimeError, trainer: pl.Trainer) -> ProcessError | None:
    """The error of a process whose peer died or hung, or None for any other error."""
    if trainer.world_size == 1 or not any(sign in str(error).lower() for sign in SIGNS):
        return None
    timeout = getattr(trainer.strategy, "_timeout", None)
    within = f" within {timeout.total_seconds():g} s" if isinstance(timeout, timedelta) else ""
    return ProcessError(
        f"rank {trainer.global_rank}: another process ended, or gave nothing{within}; its own message says why. Go on "
        f"with mmdiff fit --resume ({str(error).strip().splitlines()[0]})"
    )


class Ranks(pl.Callback):
    """Keeps Lightning from killing this process, before it can save or say anything, when one that it started ends.

    This process notices by itself: the next exchange with a process that is gone fails.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for thread in threading.enumerate():
            if isinstance(thread, _ChildProcessObserver):
                thread._child_processes = []


def end_children(trainer: pl.Trainer) -> None:
    """Waits a little for the processes that the trainer started, then kills what is left of them."""
    launcher = trainer.strategy.launcher
    for child in launcher.procs if isinstance(launcher, _SubprocessScriptLauncher) else []:
        try:
            child.wait(LAST_WORDS_S)
        except subprocess.TimeoutExpired:
            child.kill()
