"""Samples while training: from which weights, by which logger, in which files, and what they leave alone."""

import json
import random
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import soundfile
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from audio.show import ShowAudio
from mmdiff.autoencoder import Chain, Pool, Subsample
from mmdiff.autoencoder_module import AutoencoderModule
from mmdiff.backbones import UNet
from mmdiff.callbacks import EMA, Reconstructions, Samples, Show
from mmdiff.callbacks.ema import PowerFunction
from mmdiff.conditioning import LowRes
from mmdiff.density import LogNormal
from mmdiff.model import DiffusionModel
from mmdiff.module import DiffusionModule
from mmdiff.precond import EDM
from mmdiff.run.samples import read_shots
from mmdiff.sampling import Ancestral
from mmdiff.sigmas import Flow
from tests.small_autoencoder import network
from video.files import read_video
from video.show import ShowVideo


class Keep(Show):
    """Draws from every global generator, as a careless decoder would."""

    def __init__(self) -> None:
        self.shown: list[tuple[Any, ...]] = []

    def __call__(self, experiment: Any, tag: str, data: Tensor, rate: float, captions: list[str], step: int) -> None:
        self.shown.append((tag, data.clone(), rate, captions, step))

    def files(self, stem: Path, clip: Tensor, rate: float) -> list[Path]:
        torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
        path = stem.with_name(f"{stem.name}.wav")
        path.write_bytes(b"")
        return [path]


class Logger(pl.loggers.logger.DummyLogger):
    """A logger whose experiment can take pictures."""

    @property
    def experiment(self) -> Any:
        return SimpleNamespace(add_image=None)


class Weights(pl.loggers.logger.DummyLogger):
    """A logger with the methods of Lightning's W&B logger."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[tuple[str, str, list[str], list[str]]] = []

    @property
    def experiment(self) -> Any:
        return object()

    def log_audio(self, key: str, audios: list[str], step: int | None = None, **kwargs: Any) -> None:
        self.taken.append(("audio", key, audios, kwargs["caption"]))

    log_video = log_image = None  # type: ignore[assignment]


def data(n: int = 6, shape: tuple[int, ...] = (1, 8), rate: float = 16.0) -> DataLoader[Any]:
    x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    items = [{"x": x[i], "caption": f"clip {i}", "rate": torch.tensor(rate)} for i in range(n)]
    return DataLoader(items, batch_size=6)  # type: ignore[arg-type]


def module(upsample: bool = False, dropout: float = 0.0) -> DiffusionModule:
    torch.manual_seed(1)
    net = UNet(1, 1, channels=8, multipliers=(1,), concat_channels=2 * upsample, dropout=dropout)
    net.head.weight.data.normal_(std=0.1)
    conditioner = LowRes(Subsample(2)) if upsample else None
    return DiffusionModule(DiffusionModel(net, EDM(), conditioner, Pool([2])), LogNormal())


def trainer(folder: Path, **settings: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    quiet |= {"enable_model_summary": False, "num_sanity_val_steps": 0, "max_epochs": 2, "default_root_dir": folder}
    return pl.Trainer(**{**quiet, **settings})


def shown(folder: Path, logger: Any = None, upsample: bool = False, **settings: Any) -> list[tuple[Any, ...]]:
    keep = Keep()
    callback = Samples(keep, **{"steps": 2, "count": 3, **settings})
    run = trainer(folder, logger=Logger() if logger is None else logger, callbacks=[callback])
    run.fit(module(upsample), data(), data())
    return keep.shown


def test_samples_have_the_captions_shape_and_rate_of_the_data(tmp_path: Path) -> None:
    first, second = shown(tmp_path)
    tag, clips, rate, captions, step = first
    assert (tag, rate, captions, step) == ("samples/raw", 16.0, ["clip 0", "clip 1", "clip 2"], 1)
    assert clips.shape == (3, 1, 8)
    assert torch.isfinite(clips).all()
    assert second[4] == 2
    assert not torch.equal(second[1], clips)


def test_every_setting_of_samples_counts(tmp_path: Path) -> None:
    _, clips, *_ = shown(tmp_path)[0]
    for change in ({"sampler": Ancestral(1.0)}, {"sigmas": Flow()}, {"steps": 5}):
        assert not torch.allclose(shown(tmp_path, **change)[0][1], clips, atol=1e-5), change
    torch.testing.assert_close(shown(tmp_path, count=2)[0][1], clips[:2], rtol=1e-4, atol=1e-4)
    assert len(shown(tmp_path, every=2)) == 1
    _, latents, rate, *_ = shown(tmp_path, decode=False)[0]
    assert latents.shape == (3, 1, 4)
    assert rate == 8.0
    own = shown(tmp_path, prompts=[f"prompt {i}" for i in range(8)])[0]  # more than the batch has items
    assert own[3] == [f"prompt {i}" for i in range(8)]
    assert own[1].shape == (8, 1, 8)


@pytest.mark.parametrize("settings", [{"count": 0}, {"every": 0}, {"prompts": []}])
def test_settings_that_leave_nothing_to_show_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))}="):
        Samples(Keep(), **settings)


def test_samples_of_an_upsampler(tmp_path: Path) -> None:
    assert shown(tmp_path, upsample=True)[0][1].shape == (3, 1, 8)


@pytest.mark.parametrize("order", ["averages first", "samples first"])
def test_samples_are_of_the_raw_weights_and_of_each_average(order: str, tmp_path: Path) -> None:
    """Bit for bit what the same callback makes after the training, with those weights put in by hand."""
    keep, trained = Keep(), module()
    samples, averages = Samples(keep, steps=2, count=3), [EMA(0.5), EMA(PowerFunction(0.1))]
    callbacks = [*averages, samples] if order == "averages first" else [samples, *averages]
    trainer(tmp_path, logger=Logger(), callbacks=callbacks).fit(trained, data(), data())
    last = {tag: clips for tag, clips, *_ in keep.shown[-3:]}
    assert list(last) == ["samples/raw", "samples/ema-decay=0.5", "samples/ema-width=0.1"]
    batch = samples.chosen(next(iter(data())))
    trained.eval()
    with torch.inference_mode():
        assert torch.equal(samples.made(trained, batch).data, last["samples/raw"])
        for ema in averages:
            average = {name: value.clone() for name, value in ema.average.items()}
            trained.load_state_dict({**trained.state_dict(), **average})
            assert torch.equal(samples.made(trained, batch).data, last[f"samples/ema-{ema.decay}"])
    assert len({clips.sum().item() for clips in last.values()}) == 3


def test_samples_leave_the_training_as_it_is(tmp_path: Path) -> None:
    """With dropout, which draws from the global generator, and a decoder that does."""
    weights = []
    for callbacks in ([EMA(0.5)], [EMA(0.5), Samples(Keep(), steps=2)]):
        trained = module(dropout=0.3)
        torch.manual_seed(5)
        trainer(tmp_path, logger=Logger(), callbacks=callbacks, max_epochs=4).fit(trained, data(), data())
        weights.append(torch.cat([p.detach().flatten() for p in trained.parameters()]))
    assert torch.equal(*weights)


class Held(TorchDispatchMode):
    """Bytes of the tensors that operations have made and that still live; `most` at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in given:
            size = out.untyped_storage().nbytes()
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(out, self._free, size)
        return out

    def _free(self, size: int) -> None:
        self.now -= size


class Wide(nn.Module):
    """Many weights for little data: 4 MB in 16 layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(256, 256) for _ in range(16))

    def forward(self, x: Tensor, c_noise: Tensor, cond: Any = None) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


@pytest.mark.parametrize("averages", [0, 1, 2])
def test_no_second_network_is_held_while_samples_are_made(averages: int, tmp_path: Path) -> None:
    trained = DiffusionModule(DiffusionModel(Wide(), EDM()), LogNormal())
    samples = Samples(Keep(), steps=2, count=1)
    emas = [EMA(0.1 + 0.1 * i) for i in range(averages)]
    run = trainer(tmp_path, max_epochs=1, callbacks=[*emas, samples])
    batches = data(shape=(1, 256))
    run.fit(trained, batches, batches)
    samples.batch = samples.chosen(next(iter(batches)))
    trained.eval()
    with Held() as held:
        samples.on_validation_end(run, trained)
    size = sum(p.numel() * p.element_size() for p in trained.parameters())
    assert 0 < held.most < size / 4, f"{held.most} bytes beside weights of {size}"
    with Held() as copied:
        kept = [p.detach().clone() for p in trained.parameters()]
    assert copied.most == size > 0, f"a copy of {len(kept)} tensors would have been seen"
    assert len(read_shots(tmp_path)[-1].files) == 1 + averages


def test_samples_are_files_in_the_folder_whatever_the_logger(tmp_path: Path) -> None:
    given = Weights()
    for logger in (False, CSVLogger(tmp_path, name="csv"), given):
        shown(tmp_path, logger=logger)
    folders = [tmp_path, tmp_path / "csv" / "version_0"]
    for folder in folders:
        shots = read_shots(folder)
        assert [shot.step for shot in shots] == [1, 2]
        assert shots[0].captions == ["clip 0", "clip 1", "clip 2"]
        assert shots[0].files == {"raw": [["raw-0.wav"], ["raw-1.wav"], ["raw-2.wav"]]}
        assert all((shot.folder / name).is_file() for shot in shots for (name,) in shot.files["raw"])
    kind, key, files, captions = given.taken[0]
    assert (kind, key, captions) == ("audio", "samples/raw", ["clip 0", "clip 1", "clip 2"])
    assert all(Path(file).is_file() for file in files)


def test_a_fast_development_run_leaves_no_samples(tmp_path: Path) -> None:
    callback = Samples(ShowVideo(), steps=2)
    trainer(tmp_path, fast_dev_run=True, callbacks=[callback]).fit(module(), data(), data())
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_goes_on_keeps_its_count_and_drops_later_samples(tmp_path: Path) -> None:
    """Of 5 validations, every second has samples; the checkpoint is of the third, and the file of the fourth is old."""

    def fit(epochs: int, ckpt: Path | None) -> None:
        run = trainer(tmp_path, max_epochs=epochs, callbacks=[Samples(Keep(), steps=2, every=2)])
        run.fit(module(), data(), data(), ckpt_path=ckpt)
        run.save_checkpoint(tmp_path / f"{epochs}.ckpt")

    fit(3, None)
    fit(5, tmp_path / "3.ckpt")
    assert [shot.step for shot in read_shots(tmp_path)] == [2, 4]
    fit(3, None)
    assert [shot.step for shot in read_shots(tmp_path)] == [2]
    fit(5, tmp_path / "3.ckpt")
    (tmp_path / "samples" / "step_00000004" / "samples.json").write_text("{")  # cut short: it counts as none
    assert [shot.step for shot in read_shots(tmp_path)] == [2]


def test_samples_that_are_not_finite_are_shown_as_nothing_and_do_not_end_the_training(tmp_path: Path) -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor, c_noise: Tensor, cond: Any = None) -> Tensor:
            return self.scale * x + (0 if self.training else torch.nan)

    broken = DiffusionModule(DiffusionModel(Broken(), EDM()), LogNormal())
    run = trainer(tmp_path, callbacks=[Samples(ShowAudio(), steps=2, count=1)], limit_val_batches=1, max_epochs=1)
    with pytest.warns(UserWarning, match="raw weights hold values that are not finite"):
        run.fit(broken, data(shape=(1, 4000), rate=8000.0), data(shape=(1, 4000), rate=8000.0))
    waveform, _ = soundfile.read(tmp_path / "samples" / "step_00000001" / "raw-0.wav")
    assert np.abs(waveform).max() == 0


def test_an_autoencoder_shows_clips_beside_their_reconstructions(tmp_path: Path) -> None:
    keep = Keep()
    trained = AutoencoderModule(network())
    run = trainer(tmp_path, logger=Logger(), callbacks=[EMA(0.5), Reconstructions(keep, count=2)])
    run.fit(trained, data(shape=(1, 16)), data(shape=(1, 16)))
    last = {tag: (clips, rate) for tag, clips, rate, *_ in keep.shown[-3:]}
    assert list(last) == ["samples/data", "samples/raw", "samples/ema"]
    x = next(iter(data(shape=(1, 16))))["x"][:2]
    assert torch.equal(last["samples/data"][0], x)
    with torch.inference_mode():
        assert torch.equal(last["samples/raw"][0], trained.eval().model.reconstruct(x).x)
    assert not torch.equal(last["samples/ema"][0], last["samples/raw"][0])

    keep = Keep()
    trained = AutoencoderModule(network(), front=Chain([Pool([2])]))
    trainer(tmp_path, logger=Logger(), callbacks=[Reconstructions(keep, count=2)]).fit(
        trained, data(shape=(1, 32)), data(shape=(1, 32))
    )
    assert [clips.shape for _, clips, *_ in keep.shown] == [(2, 1, 32)] * 4, "what the front encoded is decoded by it"


def test_shows_write_files_that_play(tmp_path: Path) -> None:
    clip = torch.linspace(-1, 1, 4)[None, :, None, None].expand(3, 4, 9, 7)
    (video,) = ShowVideo().files(tmp_path / "a", clip * 1.5, 4.0)
    frames = read_video(video)
    assert frames.frames.shape[:2] == (3, 4)
    assert frames.fps == 4
    level = frames.frames.float().mean(dim=(0, 2, 3))
    assert (level.diff() > 50).all(), "frames rise from black to white"
    sound, picture = ShowAudio().files(tmp_path / "b", torch.full((1, 800), 2.0), 8000.0)
    waveform, rate = soundfile.read(sound)
    assert (waveform.shape, rate) == ((800,), 8000)
    assert waveform.min() > 0.99, "too loud is clipped, not scaled"
    assert Image.open(picture).format == "PNG"
    (mel,) = ShowAudio().files(tmp_path / "c", torch.arange(20.0).expand(1, 10, 20), 50.0)
    pixels = np.asarray(Image.open(mel))
    assert pixels.shape == (20, 10)
    assert pixels[0, 0] == 255 > pixels[-1, 0] == 0, "low notes are below"


def test_shows_write_events_that_tensorboard_reads(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="", version="")
    with logger.experiment as writer:
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


def test_the_index_of_samples_is_plain_json(tmp_path: Path) -> None:
    shown(tmp_path)
    record = json.loads((tmp_path / "samples" / "step_00000001" / "samples.json").read_text())
    assert set(record) == {"step", "captions", "files"}
