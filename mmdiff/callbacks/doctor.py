"""The doctor that comes along: names faults of a training while it begins, and those that come later."""

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import SaveConfigCallback
from torch import Tensor

from ..data.media import whole_file
from ..doctor.check import Check, Finding, Run
from ..run.folder import run_folder

DOCTOR = "doctor.json"


class Doctor(pl.Callback):
    """Warns of each fault once, with its cure, and writes all to doctor.json in the run's folder.

    That is a list of {"name", "found", "cure", "step"}; docs/troubleshooting.md has a section for each name.
    checks: default all that there are (`mmdiff.doctor.all_checks`). without: names of findings that are no faults here.

    Most faults are named within the first 100 steps, after which little is looked at. Changes nothing of the training.
    """

    def __init__(self, checks: Sequence[Check] | None = None, without: Sequence[str] = ()) -> None:
        from ..doctor import all_checks  # whose checks need the callbacks of this package

        self.checks = list(all_checks() if checks is None else checks)
        self.without = set(without)
        self.findings: list[dict[str, Any]] = []
        self.config: Mapping[str, Any] = {}  # the resolved tree, where no SaveConfigCallback tells it
        self.run: Run | None = None
        self.path: Path | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"findings": self.findings}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.findings = list(state_dict["findings"])

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.run = None
        self.path = run_folder(trainer) / DOCTOR if stage == "fit" and not trainer.fast_dev_run else None  # type: ignore[attr-defined]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        saved = [c for c in trainer.callbacks if isinstance(c, SaveConfigCallback)]  # type: ignore[attr-defined]
        config = saved[0].config.as_dict() if saved else self.config
        self.run = Run(trainer, pl_module, config, trainer.global_step)
        self._write()
        self._ask(Check.begin.__name__)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._ask(Check.batch.__name__, _mapping(batch))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._ask(Check.gradients.__name__, optimizer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._ask(Check.step.__name__)

    def _ask(self, hook: str, *seen: Any) -> None:
        """One hook of all checks. One that fails is left out from then on: its fault must not end a training."""
        if self.run is None:
            return
        for check in list(self.checks):
            try:
                findings = list(getattr(check, hook)(self.run, *seen))
            except Exception as error:
                self.checks.remove(check)
                kind, line = type(error).__name__, " ".join(str(error).split())
                warnings.warn(f"doctor: {type(check).__name__} is left out, it failed ({kind}: {line})", stacklevel=2)
            else:
                self._note(findings)

    def _note(self, findings: Iterable[Finding]) -> None:
        """Keeps what is new; a name comes once."""
        assert self.run is not None
        for finding in findings:
            if finding.name in self.without or any(known["name"] == finding.name for known in self.findings):
                continue
            self.findings.append({**asdict(finding), "step": self.run.trainer.global_step})
            self._write()
            # On every process: another one's batch may be fine.
            warnings.warn(f"doctor: {finding} (docs/troubleshooting.md)", stacklevel=2)

    def _write(self) -> None:
        assert self.run is not None
        if self.path is not None and self.run.trainer.is_global_zero and (self.findings or self.path.exists()):
            with whole_file(self.path) as temporary:
                temporary.write_text(json.dumps(self.findings, indent=1, ensure_ascii=False) + "\n", "utf-8")


def _mapping(batch: Any) -> Mapping[str, Any]:
    """A batch as a mapping; of one that is a tensor, or begins with one, that is x."""
    if isinstance(batch, Mapping):
        return batch
    first = batch[0] if isinstance(batch, (list, tuple)) and batch else batch
    return {"x": first} if isinstance(first, Tensor) else {}
