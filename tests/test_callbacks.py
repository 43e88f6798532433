"""The average of the weights, and samples while training."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from audio.show import ShowAudio
from mmdiff.autoencoder import Pool, Subsample
from mmdiff.backbones import UNet
from mmdiff.callbacks import EMA, Samples, Show
from mmdiff.checkpoint import AtomicCheckpointIO
from mmdiff.conditioning import LowRes
from mmdiff.density import LogNormal
from mmdiff.model import DiffusionModel
from mmdiff.module import DiffusionModule
from mmdiff.precond import EDM
from mmdiff.sampling import Ancestral
from mmdiff.sigmas import Flow
from video.show import ShowVideo


class Counter(pl.LightningModule):
    """One weight that goes up by 1 with every optimizer step, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.frozen = nn.Parameter(torch.full((1,), 7.0), requires_grad=False)
        self.validated: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return -self.weight.sum()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.validated.append(float(self.weight))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.weight], lr=1.0)


def trainer(**settings: Any) -> pl.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(accelerator="cpu", num_sanity_val_steps=0, **{**quiet, **settings})


def averages(steps: int, decay: float) -> list[float]:
    average, result = 0.0, []
    for n in range(1, steps + 1):
        d = min(decay, (1 + n) / (10 + n))
        average = d * average + (1 - d) * n
        result.append(average)
    return result


def ones(n: int) -> DataLoader[Any]:
    return DataLoader(torch.ones(n, 1))


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.99])
def test_average_is_its_recursion_and_validation_uses_it(decay: float) -> None:
    ema, module = EMA(decay), Counter()
    trainer(max_epochs=3, callbacks=[ema]).fit(module, ones(2), ones(1))
    expected = averages(6, decay)
    assert float(ema.average["weight"]) == pytest.approx(expected[-1], rel=1e-5)
    assert module.validated == pytest.approx(expected[1::2], rel=1e-5)
    assert float(module.weight) == 6  # the raw weight is back
    assert set(ema.average) == {"weight"}


def test_average_counts_optimizer_steps_not_batches() -> None:
    ema = EMA(0.3)
    trainer(max_epochs=1, accumulate_grad_batches=2, callbacks=[ema]).fit(Counter(), ones(4))
    assert float(ema.average["weight"]) == pytest.approx(averages(2, 0.3)[-1])


def test_checkpoint_holds_raw_weights_and_average_and_resumes(tmp_path: Path) -> None:
    ema, module = EMA(0.9), Counter()
    first = trainer(max_epochs=2, callbacks=[ema], plugins=[AtomicCheckpointIO()])
    first.fit(module, ones(2), ones(1))
    first.save_checkpoint(tmp_path / "last.ckpt")
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert float(saved["state_dict"]["weight"]) == 4
    (state,) = saved["callbacks"].values()
    assert float(state["average"]["weight"]) == pytest.approx(averages(4, 0.9)[-1], rel=1e-5)

    ema, module = EMA(0.9), Counter()
    more = trainer(max_epochs=3, callbacks=[ema], plugins=[AtomicCheckpointIO()])
    more.fit(module, ones(2), ones(1), ckpt_path=tmp_path / "last.ckpt")
    assert float(ema.average["weight"]) == pytest.approx(averages(6, 0.9)[-1], rel=1e-5)
    trainer(callbacks=[EMA()], plugins=[AtomicCheckpointIO()]).validate(
        module, ones(1), ckpt_path=tmp_path / "last.ckpt", verbose=False
    )
    assert module.validated[-1] == pytest.approx(averages(4, 0.9)[-1], rel=1e-5)
    assert float(module.weight) == 4


def test_raw_weights_come_back_after_an_exception() -> None:
    ema, module = EMA(0.9), Counter()
    ema.average = {"weight": torch.full((1,), 5.0)}
    with pytest.raises(KeyError), ema.applied(module):
        assert float(module.weight) == 5
        raise KeyError
    assert float(module.weight) == 0

    class Broken(Counter):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            raise RuntimeError("broken")

    broken = Broken()
    with pytest.raises(RuntimeError, match="broken"):
        trainer(max_epochs=1, callbacks=[EMA(0.9)]).fit(broken, ones(2), ones(1))
    assert float(broken.weight) == 2


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_decay_outside_its_range_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=f"decay={decay} must be at least 0 and below 1"):
        EMA(decay)


class Keep(Show):
    def __init__(self) -> None:
        self.shown: list[tuple[Any, ...]] = []

    def __call__(self, experiment: Any, tag: str, data: Tensor, rate: float, captions: list[str], step: int) -> None:
        self.shown.append((tag, data, rate, captions, step))


class Logger(pl.loggers.logger.DummyLogger):
    """A logger whose experiment can take pictures."""

    @property
    def experiment(self) -> Any:
        return SimpleNamespace(add_image=None)


def data(n: int = 6) -> DataLoader[Any]:
    x = torch.randn(n, 1, 8, generator=torch.Generator().manual_seed(0))
    items = [{"x": x[i], "caption": f"clip {i}", "rate": torch.tensor(16.0)} for i in range(n)]
    return DataLoader(items, batch_size=6)  # type: ignore[arg-type]


def module(upsample: bool = False) -> DiffusionModule:
    torch.manual_seed(1)
    net = UNet(1, 1, channels=8, multipliers=(1,), concat_channels=2 * upsample)
    net.head.weight.data.normal_(std=0.1)
    conditioner = LowRes(Subsample(2)) if upsample else None
    return DiffusionModule(DiffusionModel(net, EDM(), conditioner, Pool([2])), LogNormal())


def shown(logger: Any = None, upsample: bool = False, **settings: Any) -> list[tuple[Any, ...]]:
    logger = Logger() if logger is None else logger
    keep = Keep()
    callback = Samples(keep, **{"steps": 2, "count": 3, **settings})
    fit = trainer(max_epochs=2, logger=logger, callbacks=[callback])
    fit.fit(module(upsample), data(), data())
    return keep.shown


def test_samples_have_the_captions_shape_and_rate_of_the_data() -> None:
    first, second = shown()
    tag, clips, rate, captions, step = first
    assert (tag, rate, captions, step) == ("samples", 16.0, ["clip 0", "clip 1", "clip 2"], 1)
    assert clips.shape == (3, 1, 8)
    assert torch.isfinite(clips).all()
    assert second[4] == 2
    assert not torch.equal(second[1], clips)


def test_every_setting_of_samples_counts() -> None:
    _, clips, *_ = shown()[0]
    for change in ({"sampler": Ancestral(1.0)}, {"sigmas": Flow()}, {"steps": 5}):
        assert not torch.allclose(shown(**change)[0][1], clips, atol=1e-5), change
    torch.testing.assert_close(shown(count=2)[0][1], clips[:2], rtol=1e-4, atol=1e-4)
    assert len(shown(every=2)) == 1
    _, latents, rate, *_ = shown(decode=False)[0]
    assert latents.shape == (3, 1, 4)
    assert rate == 8.0


def test_samples_of_an_upsampler() -> None:
    assert shown(upsample=True)[0][1].shape == (3, 1, 8)


def test_samples_leave_the_training_as_it_is() -> None:
    weights = []
    for callbacks in ([], [Samples(Keep(), steps=2)]):
        trained = module()
        trainer(max_epochs=2, logger=Logger(), callbacks=callbacks).fit(trained, data(), data())
        weights.append(torch.cat([p.detach().flatten() for p in trained.parameters()]))
    assert torch.equal(*weights)


def test_no_samples_without_a_logger_for_pictures() -> None:
    assert shown(logger=False) == []


def test_shows_write_events_that_tensorboard_reads(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        ShowVideo()(writer, "clips", torch.rand(2, 3, 4, 8, 6) * 2 - 1, 4.0, ["a", "b"], 5)
        ShowAudio()(writer, "sound", torch.rand(2, 1, 800), 8000.0, ["c", "d"], 6)
        ShowAudio()(writer, "mel", torch.rand(1, 1, 10, 20), 50.0, ["e"], 7)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (clip,) = events.Images("clips")
    assert (clip.width, clip.height, clip.step) == (12, 8, 5)
    assert clip.encoded_image_string.startswith(b"GIF")
    (sound,) = events.Audio("sound/1")
    assert (sound.sample_rate, sound.length_frames, sound.step) == (8000, 800, 6)
    (mel,) = events.Images("mel/0")
    assert (mel.width, mel.height) == (10, 20)
