"""The first steps of a real `mmdiff fit` in a temporary folder: what a run takes is read off one, not modelled."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml

STEPS = 5  # the first of which allocates, and is not timed
SECONDS = "seconds.json"


class Watch(pl.Callback):
    """Seconds of each step, without the loading of data. path: a file for them, as JSON, at the end of training."""

    def __init__(self, path: str | None = None) -> None:
        self.path = path
        self.seconds: list[float] = []
        self.begin = 0.0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.begin = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seconds.append(time.perf_counter() - self.begin)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.path is not None:
            Path(self.path).write_text(json.dumps(self.seconds), "utf-8")


def rehearsal(
    layers: Sequence[Path],
    trainer: Mapping[str, Any],
    changes: Mapping[str, Any],
    folder: Path,
    trusted: Sequence[str] = (),
) -> list[str]:
    """Arguments of a `mmdiff` that takes the first steps of a training, and writes the seconds of each to SECONDS.

    It has the config's data, callbacks and precision, a validation, samples and a checkpoint at the end; it runs on the
    CPU and has all its files in `folder`. layers: the config's files. trainer: its settings. changes: of the rest.
    """
    over = folder / "rehearsal.yaml"
    over.write_text(yaml.safe_dump({**changes, "trainer": shortened(trainer, folder)}), "utf-8")
    words = [word for layer in [*layers, over] for word in ("-c", str(layer))]
    return ["fit", *words, *(word for package in trusted for word in ("--trust-config-imports", package))]


def shortened(trainer: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What to set of the trainer for a run of STEPS steps with all its files in `folder`."""
    callbacks = trainer.get("callbacks") or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    kept = [one for one in callbacks if not one["class_path"].endswith("Checkpoint")]
    if len(kept) < len(callbacks):
        saved = {"every_n_train_steps": STEPS, "save_last": True}
        kept.append({"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": saved})
    kept.append({"class_path": "mmdiff.rehearsal.Watch", "init_args": {"path": str(folder / SECONDS)}})
    limit = trainer.get("limit_val_batches")
    return {
        "max_steps": STEPS, "max_epochs": None, "max_time": None, "callbacks": kept, "logger": True,
        "accelerator": "cpu", "devices": 1, "num_nodes": 1, "default_root_dir": str(folder),
        "enable_progress_bar": False, "enable_model_summary": False,
        "val_check_interval": STEPS * (trainer.get("accumulate_grad_batches") or 1), "check_val_every_n_epoch": None,
        "limit_val_batches": 1 if limit is None or limit >= 1 else limit,
    }  # fmt: skip
