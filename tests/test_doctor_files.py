"""Clips that are not what their files hold: each fault between a file and the network is named, and no other."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import audio
import video
from audio.files import write_audio
from mmdiff.autoencoder import ConvKL
from mmdiff.autoencoder_module import AutoencoderModule
from mmdiff.data.cache import LatentCache
from mmdiff.data.clips import Decode, Sample
from mmdiff.data.items import Item
from mmdiff.io import save
from tests.doctor_cases import expect, fit, module
from video.files import write_video

STEPS = 3


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve films of 12 frames at 8 fps: colours that drift, on a coarse grid, so that coding keeps them."""
    folder = tmp_path_factory.mktemp("films")
    for index in range(12):
        generator = torch.Generator().manual_seed(index)
        ends = 1.6 * torch.rand(2, 3, 1, 4, 4, generator=generator) - 0.8
        clip = torch.lerp(ends[0], ends[1], torch.linspace(0, 1, 12).view(1, -1, 1, 1))
        write_video(folder / f"film_{index:02d}.mp4", clip.repeat_interleave(8, 2).repeat_interleave(8, 3), fps=8)
        (folder / f"film_{index:02d}.txt").write_text(f"film {index}\n")
    return folder


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve sounds of a second at 8 kHz in stereo: low noise that swells, another one left and right."""
    folder = tmp_path_factory.mktemp("sounds")
    for index in range(12):
        generator = torch.Generator().manual_seed(index)
        noise = torch.nn.functional.avg_pool1d(torch.randn(2, 8031, generator=generator), 32, 1)
        write_audio(folder / f"sound_{index:02d}.flac", noise / 2 * torch.linspace(0.1, 1, 8000), 8000)
        (folder / f"sound_{index:02d}.txt").write_text(f"sound {index}\n")
    return folder


class Spoilt:
    """A decoder with a fault: what it makes of a right sample."""

    def __init__(self, decode: Decode, fault: Any) -> None:
        self.decode, self.fault = decode, fault

    def __call__(self, item: Item, rng: random.Random | None) -> Sample:
        sample = self.decode(item, rng)
        assert isinstance(sample.data, Tensor)
        return Sample(self.fault(sample.data), sample.rate, sample.duration_s, sample.start_s, sample.total_s)


def spoil(source: Any, fault: Any) -> Any:
    """The data module with a decoder that has a fault."""
    decode = source.decode
    source.decoder = lambda: Spoilt(decode, fault)
    return source


def of_films(folder: Path, **settings: Any) -> video.ClipDataModule:
    given = {"frames": 8, "size": (16, 16), "resize": "cover", "batch_size": 4, "val_share": 0.0, **settings}
    return video.ClipDataModule(str(folder), **given)


def of_sounds(folder: Path, **settings: Any) -> audio.ClipDataModule:
    given = {"sample_rate": 8000, "samples": 4096, "channels": 2, "batch_size": 4, "val_share": 0.0, **settings}
    return audio.ClipDataModule(str(folder), **given)


def training(axes: int, channels: int) -> AutoencoderModule:
    torch.manual_seed(0)
    steps = [[4], [4]] if axes == 1 else [[1, 2, 2]]
    return AutoencoderModule(ConvKL(channels, 4, steps, width=4), optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3))


@pytest.mark.parametrize(
    ("fault", "name"),
    [(None, None), (lambda x: x.flip(1), "time flipped"), (lambda x: x.flip(0), "channels swapped")],
    ids=["right", "backwards", "BGR"],
)
def test_films_against_their_files(films: Path, fault: Any, name: str | None) -> None:
    source = of_films(films) if fault is None else spoil(of_films(films), fault)
    expect(fit(training(3, 3), source, STEPS), *([] if name is None else [name]))


@pytest.mark.parametrize("settings", [{"fps": 4.0, "frames": 5}, {"size": (32, 32)}, {"frames": 16, "short": "pad"}])
def test_films_that_are_resized_retimed_or_padded_are_those_of_their_files(films: Path, settings: Any) -> None:
    expect(fit(training(3, 3), of_films(films, **settings), STEPS))


@pytest.mark.parametrize(
    ("fault", "settings", "name"),
    [
        (None, {}, None),
        (None, {"channels": 1}, None),
        (None, {"samples": 10000, "short": "pad"}, None),
        (None, {"sample_rate": 6000}, None),
        (lambda x: x.flip(1), {}, "time flipped"),
        (lambda x: x.flip(1), {"channels": 1}, "time flipped"),
        (lambda x: x.flip(0), {}, "channels swapped"),
        (lambda x: x[:1].expand(2, -1), {}, "channels swapped"),
        (None, {"sample_rate": 16000}, "wrong sample rate"),
    ],
    ids=["right", "mono", "padded", "resampled", "backwards", "mono backwards", "left-right", "same twice", "made up"],
)
def test_sounds_against_their_files(sounds: Path, fault: Any, settings: Any, name: str | None) -> None:
    source = of_sounds(sounds, **settings)
    channels = settings.get("channels", 2)
    doctor = fit(training(1, channels), source if fault is None else spoil(source, fault), 5)
    expect(doctor, *([] if name is None else [name]))


def test_samples_of_the_files_own_rate_under_another(sounds: Path) -> None:
    class Raw(Spoilt):
        """Takes the samples as they are, and says that there are half as many a second."""

        def __call__(self, item: Item, rng: random.Random | None) -> Sample:
            sample = self.decode(item, rng)
            return Sample(sample.data, 4000.0, sample.duration_s, sample.start_s, sample.total_s)

    source = of_sounds(sounds)
    decode = source.decode
    source.decoder = lambda: Raw(decode, None)  # type: ignore[method-assign]
    expect(fit(training(1, 2), source, STEPS), "wrong sample rate")


@pytest.mark.parametrize("backwards", [False, True], ids=["right", "backwards"])
def test_cached_latents_of_films_that_run_backwards(films: Path, tmp_path: Path, backwards: bool) -> None:
    arguments = {"channels": 3, "latent_channels": 4, "steps": [[1, 2, 2]], "width": 4}
    torch.manual_seed(0)
    autoencoder = ConvKL(**arguments)  # type: ignore[arg-type]
    autoencoder.normalise(torch.zeros(4), torch.full((4,), 0.5))
    tree = {"class_path": "mmdiff.autoencoder.ConvKL", "init_args": arguments}
    folder = save(autoencoder, tree, tmp_path / "model")

    class Cached(LatentCache):
        def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
            return {**batch, "latents": batch["latents"].flip(2)} if backwards else batch

    source = Cached(of_films(films), str(folder), str(tmp_path / "latents"))
    doctor = fit(module("video", ConvKL(**arguments), autoencoder_weights=str(folder)), source, STEPS)  # type: ignore[arg-type]
    names = [finding["name"] for finding in doctor.findings]
    assert ("time flipped" in names) == backwards
