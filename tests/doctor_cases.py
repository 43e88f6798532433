"""Small trainings on video and on sound, sound in health, for faults to be put into."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch

import audio.doctor
import video.doctor
from audio.mel import Mel
from audio.render import WorldDataModule as Sounds
from mmdiff.autoencoder import Autoencoder, Chain, ConvKL, Pool
from mmdiff.autoencoder_module import AutoencoderModule
from mmdiff.backbones import UNet
from mmdiff.callbacks import Doctor
from mmdiff.conditioning import Text
from mmdiff.density import LogNormal, SigmaDensity
from mmdiff.doctor import Check, Origin, all_checks
from mmdiff.model import DiffusionModel
from mmdiff.module import DiffusionModule
from mmdiff.precond import EDM
from mmdiff.text import ByteTransformer
from video.render import WorldDataModule as Films

KINDS = ("video", "audio")
LATENTS = {"video": 0.35, "audio": 0.9}  # deviation of what is denoised
Change = Callable[[dict[str, Any]], dict[str, Any]]


class ChangedFilms(Films):
    """Films whose batches are changed on their way to the network."""

    change: Change

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        return self.change(batch)


class ChangedSounds(Sounds):
    """Sounds whose batches are changed on their way to the network."""

    change: Change

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        return self.change(batch)


def data(kind: str, change: Change | None = None, **settings: Any) -> Films | Sounds:
    """64 clips of 8 frames of 8 x 8, or of 0.5 s."""
    common: dict[str, Any] = {"count": 64, "batch_size": 8, "val_count": 8, **settings}
    if kind == "video":
        made: Any = ChangedFilms(**{"frames": 8, "size": (8, 8), "fps": 4.0, **common})
    else:
        made = ChangedSounds(**{"samples": 4096, "sample_rate": 8000, **common})
    made.change = change or (lambda batch: batch)
    return made


def plain(kind: str, **settings: Any) -> Autoencoder:
    """Without weights: means of 1 x 2 x 2 pixels, or a mel spectrogram."""
    if kind == "video":
        return Pool([1, 2, 2])
    return Mel(**{"sample_rate": 8000, "n_fft": 512, "hop_length": 256, "mels": 16, **settings})


def learned(kind: str) -> Autoencoder:
    """With weights, as they are drawn."""
    if kind == "video":
        return ConvKL(3, 4, [[1, 2, 2]], width=4, kernel=[1, 3, 3])
    return Chain([plain("audio"), ConvKL(1, 4, [[2, 2]], width=4)])


def backbone(kind: str, channels: int, **settings: Any) -> UNet:
    shape: dict[str, Any] = (
        {"axes": 3, "factors": [[1, 2, 2]], "kernels": [[1, 3, 3]]} if kind == "video" else {"axes": 2}
    )
    condition = {"tokens_width": 16, "vector_width": 16, "cross": [False, True]}
    common = {"in_channels": channels, "channels": 8, "multipliers": [1, 2], "head_channels": 8, **condition}
    return UNet(**{**shape, **common, **settings})


def conditioner(dropout: float = 0.1) -> Text:
    return Text(ByteTransformer(width=16, depth=1, max_words=32), dropout=dropout)


def module(
    kind: str,
    autoencoder: Autoencoder | None = None,
    sigma_data: float | None = None,
    density: SigmaDensity | None = None,
    lr: float = 0.002,
    dropout: float = 0.1,
    cls: type[DiffusionModule] = DiffusionModule,
    network: torch.nn.Module | None = None,
    **settings: Any,
) -> DiffusionModule:
    """A diffusion model and its training."""
    torch.manual_seed(0)
    space = plain(kind) if autoencoder is None else autoencoder
    channels = space.latent_channels or 3
    expected = sigma_data or (LATENTS[kind] if autoencoder is None else 1.0)
    model = DiffusionModel(network or backbone(kind, channels), EDM(expected), conditioner(dropout), space)
    return cls(model, density or LogNormal(-0.5), lambda p: torch.optim.AdamW(p, lr=lr), **settings)


def reconstruction(kind: str, lr: float = 0.003, **settings: Any) -> AutoencoderModule:
    """An autoencoder and its training."""
    torch.manual_seed(0)
    given = dict(settings)
    front = given.pop("front", plain(kind) if kind == "audio" else None)
    model = learned("video") if kind == "video" else ConvKL(1, 4, [[2, 2]], width=4)
    return AutoencoderModule(model, front=front, optimizer=lambda p: torch.optim.AdamW(p, lr=lr), **given)  # type: ignore[arg-type]


def every_check() -> list[Check]:
    """As `all_checks` gives them where both modalities are installed."""
    own = [*video.doctor.checks(), *audio.doctor.checks()]
    readers = [reader for check in own if isinstance(check, Origin) for reader in check.readings]
    core = [
        check for check in all_checks() if type(check).__module__.startswith("mmdiff.") and type(check) is not Origin
    ]
    return [*core, Origin(readers), *(check for check in own if not isinstance(check, Origin))]


def fit(
    training: pl.LightningModule,
    source: Any,
    steps: int,
    callbacks: Sequence[pl.Callback] = (),
    doctor: Doctor | None = None,
    config: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Doctor:
    """Trains with the doctor along, and gives it back."""
    doctor = doctor or Doctor(every_check())
    doctor.config = config or {}
    quiet: dict[str, Any] = {
        "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
        "accelerator": "cpu", "devices": 1, "limit_val_batches": 0, "num_sanity_val_steps": 0, "max_steps": steps,
    }  # fmt: skip
    run = pl.Trainer(**{**quiet, **settings}, callbacks=[*callbacks, doctor])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", ".*is left out, it failed")
        if isinstance(source, pl.LightningDataModule):
            run.fit(training, datamodule=source)
        else:
            run.fit(training, train_dataloaders=source)
    return doctor


def expect(doctor: Doctor, *names: str) -> None:
    """Exactly these findings, each before step 100, with a sentence and a cure."""
    found = {finding["name"]: finding for finding in doctor.findings}
    assert set(found) == set(names), [f"{f['name']}: {f['found']}" for f in doctor.findings]
    for finding in found.values():
        assert finding["step"] < 100
        assert len(finding["found"]) > 20
        assert len(finding["cure"]) > 20
