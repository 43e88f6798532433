"""The folder and the curves of a run: any logger, kills, resumes."""

import json
import math
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmdiff.backbones import UNet
from mmdiff.callbacks import EMA, History, LossByNoiseLevel
from mmdiff.density import LogNormal
from mmdiff.model import DiffusionModel
from mmdiff.module import DiffusionModule
from mmdiff.precond import EDM
from mmdiff.run.folder import run_folder
from mmdiff.run.history import HISTORY, HistoryFile, read_history
from video.render import WorldDataModule


class Line(pl.LightningModule):
    """Fits one weight; logs in every way that Lightning has."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.pause_s = 0.0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        time.sleep(self.pause_s)
        loss = (batch.mean() - self.weight).square().sum()
        self.log("train/loss", loss)
        self.log("train/whole", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", (batch.mean() - self.weight).square().sum())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.weight], lr=0.05)


def data(n: int = 12) -> DataLoader[Any]:
    return DataLoader(torch.randn(n, 1, generator=torch.Generator().manual_seed(0)))


def trainer(folder: Path, **settings: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    quiet |= {"enable_model_summary": False, "log_every_n_steps": 3, "max_epochs": 2, "default_root_dir": folder}
    return pl.Trainer(**{**quiet, **settings})


def steps(name: str, folder: Path) -> list[int]:
    return [step for step, _ in read_history(folder).get(name, [])]


class Named(pl.loggers.logger.DummyLogger):
    """A logger that names its runs, as most services' do."""

    def __init__(self, folder: Path | str) -> None:
        super().__init__()
        self.folder = folder

    @property
    def save_dir(self) -> str:
        return str(self.folder)

    @property
    def name(self) -> str:
        return "project"

    @property
    def version(self) -> str:
        return "a1b2"


def test_the_folder_is_the_version_folder_of_the_first_logger(tmp_path: Path) -> None:
    board, csv = TensorBoardLogger(tmp_path, name="x"), CSVLogger(tmp_path, name="y", version=7)
    for logger, folder in (
        (board, "x/version_0"),
        ([csv, board], "y/version_7"),
        (Named(tmp_path), "project/a1b2"),
        (False, "."),
    ):
        assert run_folder(trainer(tmp_path, logger=logger)) == tmp_path / folder
    with pytest.raises(ValueError, match="s3://bucket/project/a1b2 is a URL"):
        run_folder(trainer(tmp_path, logger=Named("s3://bucket")))


@pytest.mark.parametrize("logger", ["none", "tensorboard", "csv"])
def test_history_holds_what_was_logged_at_the_optimizers_steps(logger: str, tmp_path: Path) -> None:
    kinds: dict[str, Any] = {"tensorboard": TensorBoardLogger, "csv": CSVLogger}
    run = trainer(tmp_path, logger=logger in kinds and kinds[logger](tmp_path), callbacks=[History()])
    folder = run_folder(run)
    run.fit(Line(), data(), data(2))
    curves = read_history(folder)
    assert [step for step, _ in curves["train/loss"]] == [3, 6, 9, 12, 15, 18, 21, 24]
    assert [step for step, _ in curves["val/loss"]] == [12, 24]
    assert [step for step, _ in curves["train/whole"]] == [12, 24]
    weight, losses = 0.0, []
    for _ in range(2):
        for x in data():
            losses.append((float(x) - weight) ** 2)
            weight += 0.05 * 2 * (float(x) - weight)
    assert [value for _, value in curves["train/loss"]] == pytest.approx(losses[2::3], rel=1e-5)
    lines = [json.loads(line) for line in (folder / HISTORY).read_text().splitlines()]
    values = [(line["step"], name) for line in lines for name in line if name != "step"]
    assert len(values) == len(set(values)), "a value is written once"


def test_steps_are_the_optimizers_with_accumulated_gradients(tmp_path: Path) -> None:
    trainer(tmp_path, accumulate_grad_batches=2, log_every_n_steps=2, callbacks=[History()]).fit(Line(), data())
    assert steps("train/loss", tmp_path) == [2, 4, 6, 8, 10, 12]


def diffusion() -> DiffusionModule:
    torch.manual_seed(1)
    net = UNet(3, 3, channels=8, multipliers=(1,))
    return DiffusionModule(DiffusionModel(net, EDM()), LogNormal())


def test_a_resumed_run_goes_on_in_the_file_without_doubles(tmp_path: Path) -> None:
    """From step 7, in the middle of an epoch, where the file has lines up to 12 and one that is cut short: the curves
    are bit for bit those of a run of one piece, by noise level too."""

    def fit(folder: Path, most: int, ckpt: Path | None = None) -> None:
        clips = WorldDataModule(count=16, frames=2, size=(8, 8), fps=4.0, batch_size=2, val_count=4)
        saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=7, save_top_k=-1)
        callbacks = [History(), LossByNoiseLevel(), EMA(0.5), saver]
        settings = {"log_every_n_steps": 2, "max_epochs": 3, "max_steps": most, "enable_checkpointing": True}
        trainer(folder, callbacks=callbacks, **settings).fit(diffusion(), clips, ckpt_path=ckpt)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fit(whole, 20)
    fit(parts, 12)
    assert steps("train/loss", parts)[-1] == 12
    with open(parts / HISTORY, "a") as file:
        file.write('{"step": 14, "train/lo')
    fit(parts, 20, parts / "step=7.ckpt")
    mine, theirs = read_history(parts), read_history(whole)
    assert [step for step, _ in mine["train/loss"]] == list(range(2, 21, 2))
    assert [step for step, _ in mine["val/loss"]] == [8, 16]
    assert mine == theirs
    found = [json.loads(line)["step"] for line in (parts / HISTORY).read_text().splitlines()]
    assert found == sorted(found)


def test_a_new_run_in_the_same_folder_starts_its_curves_anew(tmp_path: Path) -> None:
    trainer(tmp_path, callbacks=[History()]).fit(Line(), data())
    trainer(tmp_path, max_epochs=1, callbacks=[History()]).fit(Line(), data())
    assert steps("train/loss", tmp_path) == [3, 6, 9, 12]


def test_a_step_that_a_checkpoint_holds_is_in_the_file_before_it(tmp_path: Path) -> None:
    """Else a kill after the checkpoint and before Lightning logs would lose the step for good."""

    class Look(Checkpoint):
        seen: list[int]

        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            self.seen = steps("train/loss", tmp_path)
            assert (trainer.global_step in self.seen) == (trainer.global_step % 3 == 0)

    look = Look()
    trainer(tmp_path, max_epochs=1, callbacks=[look, History()], enable_checkpointing=True).fit(Line(), data())
    assert look.seen == [3, 6, 9, 12]


def _train_slowly(folder: Path) -> None:
    module = Line()
    module.pause_s = 0.005
    trainer(folder, log_every_n_steps=1, max_epochs=100, callbacks=[History()]).fit(module, data())


def test_a_killed_run_leaves_its_curves(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_train_slowly, args=(tmp_path,))
    process.start()
    end = time.monotonic() + 60
    while len(steps("train/loss", tmp_path)) < 20:
        assert time.monotonic() < end
        assert process.is_alive()
        time.sleep(0.02)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    found = steps("train/loss", tmp_path)
    assert found == list(range(1, len(found) + 1))


def test_values_that_are_not_finite_leave_gaps_in_plain_json(tmp_path: Path) -> None:
    file = HistoryFile(tmp_path / HISTORY)
    file.cut(0)
    file.write(1, {"loss": math.nan})
    file.write(2, {"loss": math.inf})
    file.write(3, {"loss": 1.5})
    assert "NaN" not in file.path.read_text()
    values = [value for _, value in read_history(tmp_path)["loss"]]
    assert math.isnan(values[0])
    assert math.isnan(values[1])
    assert values[2] == 1.5


def test_a_module_that_draws_into_its_logger_works_where_there_is_none(tmp_path: Path) -> None:
    class Draws(Line):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            if self.logger is not None:
                self.logger.experiment.add_image("x", batch, 0)  # type: ignore[attr-defined]

    run = trainer(tmp_path, callbacks=[History()])
    run.fit(Draws(), data(), data(2))
    assert steps("train/loss", tmp_path)[-1] == 24
    assert run_folder(run) == tmp_path, "who asks late is told the same"
    assert run.log_dir == str(tmp_path)


def test_a_fast_development_run_leaves_no_file(tmp_path: Path) -> None:
    trainer(tmp_path, fast_dev_run=True, callbacks=[History()]).fit(Line(), data(), data(2))
    assert not (tmp_path / HISTORY).exists()
