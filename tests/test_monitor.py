"""Loss by noise level, speed, memory and the distance of the averages."""

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmdiff.autoencoder_module import AutoencoderModule
from mmdiff.backbones import UNet
from mmdiff.callbacks import EMA, History, LossByNoiseLevel, Monitor
from mmdiff.callbacks.monitor import distance, items_of, media_s_of
from mmdiff.density import LogNormal
from mmdiff.levels import PerStep
from mmdiff.model import DiffusionModel
from mmdiff.module import DiffusionModule
from mmdiff.precond import EDM
from mmdiff.run.history import read_history
from mmdiff.run.levels import range_middle, range_name
from tests.small_autoencoder import adversarial, network


class Given(pl.LightningModule):
    """Returns levels and losses that the batch names, and moves one weight by 1 each step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return {"loss": -self.weight.sum(), "sigma": batch["sigma"], "items": batch["items"]}

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return {"sigma": batch["sigma"], "items": 2 * batch["items"]}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.weight], lr=1.0)


def batches(sigma: Tensor, items: Tensor, size: int = 2) -> DataLoader[Any]:
    rows = [{"sigma": s, "items": v, "duration_s": torch.tensor(3.0)} for s, v in zip(sigma, items, strict=True)]
    return DataLoader(rows, batch_size=size)  # type: ignore[arg-type]


def fit(folder: Path, module: pl.LightningModule, *data: Any, ckpt: Path | None = None, **settings: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    quiet |= {"enable_model_summary": False, "max_epochs": 1, "default_root_dir": folder, "num_sanity_val_steps": 1}
    run = pl.Trainer(**{**quiet, **settings})
    run.fit(module, *data, ckpt_path=ckpt)
    return run


SIGMA = torch.tensor([0.05, 0.5, 5.0, 50.0, 0.5, 0.7, 1.0, 0.099])
ITEMS = torch.tensor([1.0, 2.0, 3.0, 4.0, 6.0, 0.0, math.nan, 8.0])  # of 0 nothing counts, of NaN nobody knows


def test_each_range_has_the_mean_loss_of_its_items(tmp_path: Path) -> None:
    callbacks = [History(), LossByNoiseLevel([0.1, 1.0, 10.0])]
    fit(tmp_path, Given(), batches(SIGMA, ITEMS), batches(SIGMA, ITEMS), callbacks=callbacks, log_every_n_steps=2)
    curves = read_history(tmp_path)
    assert curves["train_at/below_0.1"] == [(2, 1.0), (4, 8.0)]  # what has been since it last logged
    assert curves["train_at/0.1_to_1"] == [(2, 2.0), (4, 6.0)]
    assert curves["train_at/1_to_10"] == [(2, 3.0)]  # sigma 1 itself would be here
    assert curves["train_at/above_10"] == [(2, 4.0)]
    assert curves["val_at/below_0.1"] == [(4, 9.0)]
    assert curves["val_at/0.1_to_1"] == [(4, 8.0)]
    assert {name for name in curves if "_at/" in name} == {
        f"{stage}_at/{name}" for stage in ("train", "val") for name in ("below_0.1", "0.1_to_1", "1_to_10", "above_10")
    }


def test_time_steps_with_levels_of_their_own_count_at_their_geometric_mean(tmp_path: Path) -> None:
    sigma = torch.tensor([[0.0, 2.0, 8.0], [0.0, 0.0, 0.0], [0.2, 0.2, 0.2], [0.5, 0.5, 0.0]])
    items = torch.tensor([1.0, 2.0, 3.0, 5.0])
    levels = LossByNoiseLevel([1.0, 3.9, 4.1])
    fit(tmp_path, Given(), batches(sigma, items), callbacks=[History(), levels], log_every_n_steps=2)
    assert read_history(tmp_path) == {
        "train_at/3.9_to_4.1": [(2, 1.0)], "train_at/below_1": [(2, 4.0)], "epoch": [(2, 0.0)],
    }  # fmt: skip


@pytest.mark.parametrize("levels", [None, PerStep()])
def test_ranges_of_a_diffusion_training_add_up_to_its_loss(levels: Any, tmp_path: Path) -> None:
    """Weighted by their items, the ranges of a logged step have the mean that was logged as its loss."""
    torch.manual_seed(0)
    net = UNet(1, 1, channels=8, multipliers=(1,))
    module = DiffusionModule(DiffusionModel(net, EDM()), LogNormal(), levels=levels)
    x = torch.randn(8, 1, 16)
    data = DataLoader([{"x": one} for one in x], batch_size=4)  # type: ignore[arg-type]
    counts = {}

    class Count(LossByNoiseLevel):
        def _log(self, stage: str, trainer: pl.Trainer) -> None:
            counts[stage] = self.sums[stage][1].tolist()
            super()._log(stage, trainer)

    count = Count()
    fit(tmp_path, module, data, data, callbacks=[History(), count], log_every_n_steps=2, max_epochs=2)
    curves = read_history(tmp_path)
    for stage, items in (("train", 8), ("val", 8)):
        assert sum(counts[stage]) == items
        means = {name: curve[-1][1] for name, curve in curves.items() if name.startswith(f"{stage}_at/")}
        last = {name: n for name, n in zip(count.names, counts[stage], strict=True) if n}
        mean = sum(n * means[f"{stage}_at/{name}"] for name, n in last.items()) / items
        if stage == "val":  # of training only the last batch's loss is logged
            assert mean == pytest.approx(curves["val/loss"][-1][1], rel=1e-5)
        assert math.isfinite(mean)


def test_held_out_loss_has_the_same_noise_and_levels_at_every_validation(tmp_path: Path) -> None:
    """A network that does not move has the same loss, in each range too, whatever was drawn in between."""
    net = UNet(1, 1, channels=8, multipliers=(1,))
    module = DiffusionModule(DiffusionModel(net, EDM()), LogNormal(), optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    data = DataLoader([{"x": one} for one in torch.randn(8, 1, 16)], batch_size=4)  # type: ignore[arg-type]
    fit(tmp_path, module, data, data, callbacks=[History(), LossByNoiseLevel()], log_every_n_steps=1, max_epochs=3)
    curves = read_history(tmp_path)
    held_out = [curve for name, curve in curves.items() if name == "val/loss" or name.startswith("val_at/")]
    assert len(held_out) > 3
    for curve in held_out:
        assert [step for step, _ in curve] == [2, 4, 6]
        assert len({value for _, value in curve}) == 1
    assert len({value for _, value in curves["train/loss"]}) == 6, "training draws anew"


def test_what_was_gathered_goes_on_after_a_resume(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = {"log_every_n_steps": 3, "max_epochs": 2}
    sigma, items = SIGMA.repeat(2), torch.arange(1.0, 17.0)

    def callbacks() -> list[pl.Callback]:
        return [History(), LossByNoiseLevel([0.1, 1.0])]

    fit(whole, Given(), batches(sigma, items), callbacks=callbacks(), **settings)
    first = fit(parts, Given(), batches(sigma, items), callbacks=callbacks(), **{**settings, "max_epochs": 1})
    assert first.global_step == 8, "two steps after it last logged"
    first.save_checkpoint(parts / "x.ckpt")
    fit(parts, Given(), batches(sigma, items), callbacks=callbacks(), ckpt=parts / "x.ckpt", **settings)
    assert read_history(parts) == read_history(whole)


@pytest.mark.parametrize("edges", [[], [1.0, 1.0], [2.0, 1.0], [0.0, 1.0], [-1.0]])
def test_edges_that_do_not_rise_are_refused(edges: list[float]) -> None:
    with pytest.raises(ValueError, match="must be positive and rise"):
        LossByNoiseLevel(edges)


def test_a_range_lies_where_its_name_says() -> None:
    for low, high in ((0.032, 0.1), (1e-7, 1e-5), (1.0, 3.2), (10.0, 1e20)):
        assert range_middle(range_name(low, high)) == pytest.approx(math.sqrt(low * high), rel=1e-5)
    assert range_middle(range_name(None, 0.1)) < 0.1
    assert range_middle(range_name(10.0, None)) > 10


def test_modules_without_levels_have_no_such_curves(tmp_path: Path) -> None:
    module = AutoencoderModule(network(), adversarial=adversarial())
    data = DataLoader([{"x": x, "duration_s": 0.5} for x in torch.randn(8, 1, 16)], batch_size=2)  # type: ignore[arg-type]
    callbacks = [History(), EMA(0.5), LossByNoiseLevel(), Monitor()]
    fit(tmp_path, module, data, data, callbacks=callbacks, log_every_n_steps=2)
    curves = read_history(tmp_path)
    assert not any("_at/" in name for name in curves)
    assert [step for step, _ in curves["speed/items_per_s"]] == [2, 4]
    assert curves["ema/distance"][-1][1] > 0


def test_speed_memory_and_distance_are_what_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that says how long everything took: 1 s to wait, 3 s for a step, 100 s for a validation."""
    now = [0.0]
    monkeypatch.setattr("mmdiff.callbacks.monitor.time.perf_counter", lambda: now[0])

    class Clock(Given):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            now[0] += 3.0

        def validation_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            now[0] += 50.0

    class Wait(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            now[0] += 1.0

    ema, monitor = EMA(0.5), Monitor()
    data = batches(torch.ones(8), torch.ones(8))
    settings = {"log_every_n_steps": 2, "val_check_interval": 2, "limit_val_batches": 2, "num_sanity_val_steps": 0}
    module = Clock()
    fit(tmp_path, module, data, data, callbacks=[Wait(), ema, History(), monitor], **settings)
    curves = read_history(tmp_path)
    assert curves["speed/steps_per_s"] == [(2, 0.25), (4, 0.25)]
    assert curves["speed/items_per_s"] == [(2, 0.5), (4, 0.5)]
    assert curves["speed/media_s_per_s"] == [(2, 1.5), (4, 1.5)]
    assert curves["speed/waiting"] == [(2, 0.25), (4, 0.25)]
    assert monitor.seconds == {"waiting for data": 4.0, "training steps": 12.0, "validation and samples": 200.0}
    assert 0.05 < curves["memory/host_gib"][-1][1] < 64
    average = float(ema.average["weight"])
    weight = float(module.weight.detach())
    assert weight == 5
    assert curves["ema/distance"][-1][1] == pytest.approx(abs(weight - average) / weight, rel=1e-6)


def test_distance_is_over_the_parameters_of_the_average() -> None:
    module = nn.Linear(3, 2)
    average = {"weight": module.weight.detach() + 1}
    expected = math.sqrt(6) / float(module.weight.detach().norm())
    assert distance(module, average) == pytest.approx(expected, rel=1e-6)
    nn.init.zeros_(module.weight)
    assert distance(module, {"weight": torch.zeros(2, 3)}) == 0


def test_items_and_seconds_of_every_kind_of_batch() -> None:
    x = torch.zeros(4, 3)
    assert [items_of(b) for b in (x, [x, x], {"x": x}, {"x": {"video": x}}, {"caption": ["a", "b"]})] == [4, 4, 4, 4, 2]
    assert [items_of(b) for b in ({}, 3, torch.zeros(()), {"rate": 2.0})] == [0, 0, 0, 0]
    two = torch.tensor([1.0, 2.5])
    assert media_s_of({"x": x, "duration_s": two}) == 3.5
    assert media_s_of({"duration_s": {"video": two, "audio": two + 1}}) == 3.5
    assert media_s_of({"x": x}) == 0
