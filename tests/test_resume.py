"""Every checkpoint of a run, whoever made it and at whichever moment, leads to the end of that run, bit by bit."""

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from mmdiff.autoencoder import ConvKL
from mmdiff.autoencoder_module import AutoencoderModule
from mmdiff.backbones import UNet
from mmdiff.callbacks import EMA, Checkpoints, ExactResume, FiniteSteps
from mmdiff.checkpoint import AtomicCheckpointIO
from mmdiff.density import LogNormal
from mmdiff.model import DiffusionModel
from mmdiff.module import DiffusionModule
from mmdiff.precond import EDM
from tests.clip_files import NumberModule, write_numbers
from tests.survivors import assert_same

STEPS = 13


class Clips(NumberModule):
    """Clips of (B, 1, 4, 1) of 7 files, five of them for training, in batches of one; two for validation."""

    def __init__(self, path: str) -> None:
        super().__init__(path, batch_size=1, val_share=0.3)

    def decoder(self) -> Any:
        from tests.clip_files import Numbers

        return Numbers(steps=4)


class Recorded(pl.Callback):
    """What was logged, by the batch and what it was of."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, str, float]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._note(trainer, "train/")

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self._note(trainer, "val/")

    def _note(self, trainer: Any, prefix: str) -> None:
        batch = trainer.fit_loop.epoch_loop.total_batch_idx
        logged = trainer.fit_loop.epoch_loop._batches_that_stepped
        values = {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith(prefix)}
        self.rows += [(batch, f"{name} at {logged}", value) for name, value in sorted(values.items())]


class Foreign(pl.LightningModule):
    """Draws from the global generators, in training and in validation, and counts its validations."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(8, 4), nn.Dropout(0.5), nn.Linear(4, 1))
        self.register_buffer("validations", torch.zeros(()))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        loss = (self.net(batch["x"] + torch.randn_like(batch["x"])) - 1).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.log("val/noise", torch.randn(()), batch_size=1)

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.validations += 1

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


def module_of(kind: str) -> pl.LightningModule:
    torch.manual_seed(3)
    if kind == "foreign":
        return Foreign()
    if kind == "diffusion":
        backbone = UNet(2, in_channels=2, channels=4, multipliers=[1], head_channels=4, dropout=0.2)
        return DiffusionModule(DiffusionModel(backbone, EDM()), LogNormal())
    return AutoencoderModule(ConvKL(2, 2, [[1, 1]], width=4), accumulate=3)


def trained(
    kind: str,
    data: Path,
    root: Path,
    options: dict[str, Any],
    ckpt: Path | None = None,
    saves: tuple[Any, ...] = (),
    steps: int = STEPS,
) -> tuple[dict[str, Any], list[tuple[int, str, float]]]:
    """The final state, and what was logged."""
    recorded, ema = Recorded(), EMA(0.9)
    trainer = pl.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, default_root_dir=root, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=1, plugins=[AtomicCheckpointIO()], log_every_n_steps=1,
        callbacks=[FiniteSteps(), ExactResume(), ema, recorded, *(saves or (Checkpoints(),))], **options,
    )  # fmt: skip
    module = module_of(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, Clips(str(data)), ckpt_path=ckpt, weights_only=True)
    counts = trainer.fit_loop.epoch_loop.batch_progress.state_dict()
    state = {
        "weights": module.state_dict(), "ema": dict(ema.average), "step": trainer.global_step, "counts": counts,
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers], "random": torch.get_rng_state(),
    }  # fmt: skip
    return state, recorded.rows


MOMENTS = {
    "validation in the epoch": {"val_check_interval": 2, "check_val_every_n_epoch": None},
    "validation at its end": {"val_check_interval": 1.0},
    "validation every other": {"check_val_every_n_epoch": 2},
    "accumulated, validated amid": {
        "accumulate_grad_batches": 3,
        "val_check_interval": 2,
        "check_val_every_n_epoch": None,
    },
    "accumulated, no validation": {"accumulate_grad_batches": 3, "limit_val_batches": 0},
}


def check_all_checkpoints(kind: str, moment: str, tmp_path: Path, every: int) -> None:
    options = dict(MOMENTS[moment])
    if kind == "autoencoder":
        options.pop("accumulate_grad_batches", None)
    data, root = write_numbers(tmp_path / "data", [str(n) for n in range(7)]), tmp_path / "whole"
    common: dict[str, Any] = {"save_top_k": -1, "filename": "{epoch}-{step}"}
    saves = (
        ModelCheckpoint(root / "steps", every_n_train_steps=1, **common),
        ModelCheckpoint(root / "epochs", every_n_epochs=1, **common),
        Checkpoints(minutes=None, steps=1, keep=100),
    )
    whole, rows = trained(kind, data, root, options, saves=saves)
    found = sorted(root.rglob("*.ckpt"))
    assert len(found) > STEPS, "made at many moments"
    assert len({row[1].split("/")[0] for row in rows}) == (1 if options.get("limit_val_batches") == 0 else 2)
    for path in found[::every]:
        again, later = trained(kind, data, tmp_path / "again", options, ckpt=path)
        where = str(path.relative_to(root))
        if f"={STEPS}" in where or f"-{STEPS}" in where:  # nothing is left to do
            again |= {"counts": whole["counts"], "random": whole["random"]}
        assert_same(again, whole, where)
        assert later == rows[len(rows) - len(later) :], where


@pytest.mark.parametrize("steps", [2, 3, 4], ids=lambda steps: f"{steps}-steps")
def test_a_finished_run_that_is_made_longer_goes_on_where_it_was(tmp_path: Path, steps: int) -> None:
    """In the middle of an epoch of five batches, and, at 2 and 4 steps, at a validation."""
    options = MOMENTS["validation in the epoch"]
    data = write_numbers(tmp_path / "data", [str(n) for n in range(7)])
    whole, rows = trained("diffusion", data, tmp_path / "whole", options)
    trained("diffusion", data, tmp_path / "short", options, steps=steps)
    (last,) = (tmp_path / "short").rglob(f"resume-{steps}.ckpt")
    longer, later = trained("diffusion", data, tmp_path / "longer", options, ckpt=last)
    assert_same(longer, whole, f"after {steps} steps")
    assert later == rows[len(rows) - len(later) :]


QUICK = [
    ("diffusion", "accumulated, validated amid"),
    ("autoencoder", "validation in the epoch"),
    ("foreign", "validation at its end"),
]


@pytest.mark.parametrize(("kind", "moment"), QUICK)
def test_every_seventh_checkpoint_leads_to_the_same_end(tmp_path: Path, kind: str, moment: str) -> None:
    check_all_checkpoints(kind, moment, tmp_path, every=7)


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("kind", ["diffusion", "autoencoder", "foreign"])
def test_every_checkpoint_leads_to_the_same_end(tmp_path: Path, kind: str, moment: str) -> None:
    """python -m pytest tests/test_resume.py --slow"""
    check_all_checkpoints(kind, moment, tmp_path, every=1)
