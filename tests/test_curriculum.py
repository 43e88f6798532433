"""Small and short clips first: in pictures and in sound, and where a run is resumed."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from audio.render import WorldDataModule as Sounds
from mmdiff.autoencoder import ConvKL
from mmdiff.autoencoder_module import AutoencoderModule
from mmdiff.backbones import UNet
from mmdiff.checkpoint import AtomicCheckpointIO
from mmdiff.data.curriculum import Curriculum, Stage
from mmdiff.density import LogNormal
from mmdiff.model import DiffusionModel
from mmdiff.module import DiffusionModule
from mmdiff.precond import EDM
from tests.small_autoencoder import trainer
from video.render import WorldDataModule as Pictures

VIDEO = """
class_path: mmdiff.data.curriculum.Curriculum
init_args:
  stages:
    - epochs: 1
      data:
        class_path: video.render.WorldDataModule
        init_args: {count: 8, frames: 2, size: [8, 8], batch_size: 4, val_count: 2}
    - epochs: 2
      data:
        class_path: video.render.WorldDataModule
        init_args: {count: 6, frames: 4, size: [8, 8], batch_size: 2, val_count: 2}
    - data:
        class_path: video.render.WorldDataModule
        init_args: {count: 4, frames: 4, size: [16, 16], batch_size: 2, val_count: 2}
"""
SIZES = [(4, 3, 2, 8, 8)] * 2 + [(2, 3, 4, 8, 8)] * 6 + [(2, 3, 4, 16, 16)] * 4


class Shapes(pl.Callback):
    """The shapes of the batches and the first number of each."""

    def __init__(self) -> None:
        self.trained: list[tuple[int, ...]] = []
        self.values: list[float] = []
        self.validated: set[tuple[int, ...]] = set()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, _: int) -> None:
        self.trained.append(tuple(batch["x"].shape))
        self.values.append(float(batch["x"].double().sum()))

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, *_: Any
    ) -> None:
        self.validated.add(tuple(batch["x"].shape))


class Save(pl.Callback):
    """A checkpoint after every step, and at the end of every validation and epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"step {trainer.global_step}.ckpt")

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            trainer.save_checkpoint(self.folder / f"validation {trainer.global_step}.ckpt")

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"epoch {trainer.global_step}.ckpt")


def curriculum(text: str = VIDEO) -> Curriculum:
    parser = ArgumentParser()
    parser.add_subclass_arguments(pl.LightningDataModule, "data")
    built = parser.instantiate_classes(parser.parse_object({"data": yaml.safe_load(text)}))
    return built.data  # type: ignore[no-any-return]


def module() -> DiffusionModule:
    torch.manual_seed(0)
    net = UNet(3, 3, channels=4, multipliers=(1, 2), factors=[[1, 2, 2]], head_channels=4)
    return DiffusionModule(DiffusionModel(net, EDM()), LogNormal())


def fit(trained: pl.LightningModule, data: Any, ckpt: Path | None = None, **settings: Any) -> tuple[pl.Trainer, Shapes]:
    shapes = Shapes()
    callbacks = [shapes, *settings.pop("callbacks", [])]
    given = {"max_epochs": 5, "reload_dataloaders_every_n_epochs": 1, "plugins": [AtomicCheckpointIO()], **settings}
    run = trainer(callbacks=callbacks, **given)
    run.fit(trained, datamodule=data, ckpt_path=ckpt)
    return run, shapes


def test_clips_grow_longer_and_then_larger_as_the_config_says() -> None:
    _, shapes = fit(module(), curriculum())
    assert shapes.trained == SIZES
    assert shapes.validated == {(2, 3, 4, 16, 16)}  # the same held-out data from the first epoch on


def test_a_run_resumed_at_any_step_is_in_the_right_stage_bit_for_bit(tmp_path: Path) -> None:
    whole, shapes = module(), None
    _, shapes = fit(whole, curriculum(), callbacks=[Save(tmp_path)])
    at = {"step": (1, 2, 3, 5, 8, 9), "validation": (2, 5, 8, 10), "epoch": (2, 5, 8, 10)}  # a stage ends at 2 and at 8
    for name in (f"{when} {step}" for when, steps in at.items() for step in steps):
        rest, step = module(), int(name.split()[1])
        _, seen = fit(rest, curriculum(), tmp_path / f"{name}.ckpt")
        assert seen.trained == SIZES[step:], name
        assert seen.values == shapes.values[step:], name
        assert all(torch.equal(a, b) for a, b in zip(rest.parameters(), whole.parameters(), strict=True)), name


def test_sound_grows_longer_and_an_autoencoder_learns_from_it_by_workers() -> None:
    def stage(samples: int, epochs: int | None, workers: int) -> Stage:
        data = Sounds(count=4, samples=samples, sample_rate=8000, batch_size=2, num_workers=workers, val_count=2)
        return Stage(data, epochs)

    trained = AutoencoderModule(ConvKL(1, 2, [[2], [2]], width=4))
    _, shapes = fit(trained, Curriculum([stage(64, 2, 1), stage(256, None, 0)]), max_epochs=3)
    assert shapes.trained == [(2, 1, 64)] * 4 + [(2, 1, 256)] * 2


def test_wrong_stages_and_a_trainer_that_would_stay_in_the_first_are_refused() -> None:
    data = Pictures(count=2, frames=2, size=(8, 8), fps=4.0, batch_size=2, val_count=1)
    with pytest.raises(ValueError, match="stages has 1 entries; a curriculum needs two or more"):
        Curriculum([Stage(data)])
    with pytest.raises(ValueError, match=r"stages\[0\]: epochs=None must be at least 1; only the last has none"):
        Curriculum([Stage(data), Stage(data)])
    with pytest.raises(ValueError, match="the last of the stages lasts to the end: leave out its epochs=3"):
        Curriculum([Stage(data, 1), Stage(data, 3)])
    with pytest.raises(ValueError, match="reload_dataloaders_every_n_epochs: 1, which is 0"):
        fit(module(), Curriculum([Stage(data, 1), Stage(data)]), reload_dataloaders_every_n_epochs=0)
