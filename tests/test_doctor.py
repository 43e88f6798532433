"""Each fault that the doctor knows, put into a small training of video and of sound, is named before step 100."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from audio.mel import Mel
from mmdiff.autoencoder import Chain, ConvKL
from mmdiff.autoencoder_module import AutoencoderModule
from mmdiff.callbacks import EMA, Doctor
from mmdiff.conditioning import Cond, Text
from mmdiff.config import build
from mmdiff.data.loader import ClipLoader
from mmdiff.density import LogNormal, LogUniform, Shifted
from mmdiff.doctor.sampling import Levels, SampledLike
from mmdiff.io import save
from mmdiff.module import DiffusionModule
from mmdiff.sigmas import Flow, Karras
from tests.doctor_cases import (
    KINDS,
    LATENTS,
    backbone,
    data,
    every_check,
    expect,
    fit,
    module,
    plain,
    reconstruction,
)

both = pytest.mark.parametrize("kind", KINDS)
FEW = 9  # steps, enough for what the first batches show


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without a logger write doctor.json into the working directory."""
    monkeypatch.chdir(tmp_path)


def changed(**values: Any) -> Any:
    return lambda batch: {**batch, **values}


def with_x(change: Any) -> Any:
    return lambda batch: {**batch, "x": change(batch["x"])}


@both
@pytest.mark.parametrize("training", [module, reconstruction], ids=["diffusion", "autoencoder"])
def test_a_healthy_training_has_no_findings(kind: str, training: Any) -> None:
    expect(fit(training(kind), data(kind), 30, [EMA(0.98)], gradient_clip_val=1.0 if training is module else None))


# --- the data


@both
def test_nan_batch(kind: str) -> None:
    def poison(batch: dict[str, Any]) -> dict[str, Any]:
        x = batch["x"].clone()
        x[1].flatten()[3] = torch.nan
        return {**batch, "x": x}

    doctor = Doctor(every_check())
    with pytest.raises(ValueError, match="not finite"):
        fit(reconstruction(kind), data(kind, poison), FEW, doctor=doctor)
    assert [finding["name"] for finding in doctor.findings] == ["NaN batch"]
    assert doctor.findings[0]["step"] == 0
    assert "world-0-" in doctor.findings[0]["found"], "the item is named"


@both
@pytest.mark.parametrize("training", [module, reconstruction], ids=["diffusion", "autoencoder"])
def test_blank_clips(kind: str, training: Any) -> None:
    def blank(x: Tensor) -> Tensor:
        return torch.cat([torch.full_like(x[:3], -1.0 if kind == "video" else 0.0), x[3:]])

    doctor = fit(training(kind), data(kind, with_x(blank)), FEW)
    expect(doctor, "blank clips")


@pytest.mark.parametrize("training", [module, reconstruction], ids=["diffusion", "autoencoder"])
def test_frozen_clips(training: Any) -> None:
    doctor = fit(training("video"), data("video", with_x(lambda x: x[:, :, :1].expand_as(x))), FEW)
    expect(doctor, "frozen clips")


@both
def test_the_same_clip_under_every_name(kind: str) -> None:
    doctor = fit(module(kind), data(kind, with_x(lambda x: x[:1].expand_as(x))), FEW)
    assert "same clip repeated" in [finding["name"] for finding in doctor.findings]


@both
def test_a_sampler_that_gives_one_item_again_and_again(kind: str) -> None:
    class Stuck(ClipLoader):
        def __iter__(self) -> Any:
            for batch in super().__iter__():
                assert batch is not None
                yield {k: v[:1].expand_as(v) if isinstance(v, Tensor) else v[:1] * len(v) for k, v in batch.items()}
                first = batch
                break
            for _ in range(len(self) - 1):
                yield {k: v[:1].expand_as(v) if isinstance(v, Tensor) else v[:1] * len(v) for k, v in first.items()}

    source = data(kind)
    source.train_dataloader = lambda: _like(source, Stuck)  # type: ignore[method-assign]
    expect(fit(reconstruction(kind), source, FEW), "same clip repeated")


def _like(source: Any, cls: type[ClipLoader], shuffle: bool = True) -> ClipLoader:
    """The loader of the training data, of another class or without its shuffling."""
    from mmdiff.data.bad import BadItems
    from mmdiff.data.batches import Plan
    from mmdiff.data.clips import collate

    plan = Plan((tuple(range(len(source.train))),), (source.batch_size,), shuffle, 0)
    return cls(source.train, plan, collate, BadItems("train", source.train.items, 0.0), train=True)


@both
@pytest.mark.parametrize("training", [module, reconstruction], ids=["diffusion", "autoencoder"])
def test_data_not_shuffled(kind: str, training: Any) -> None:
    source = data(kind)
    source.train_dataloader = lambda: _like(source, ClipLoader, shuffle=False)  # type: ignore[method-assign]
    expect(fit(training(kind), source, FEW), "data not shuffled")


def test_a_plain_loader_that_does_not_shuffle_and_a_module_of_others() -> None:
    class Foreign(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(16, 16)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return (self.net(batch[0]) - batch[0]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    clips = torch.utils.data.TensorDataset(torch.randn(64, 1, 16))
    expect(fit(Foreign(), DataLoader(clips, batch_size=4, shuffle=True), FEW))
    expect(fit(Foreign(), DataLoader(clips, batch_size=4), FEW), "data not shuffled")


@both
def test_time_flipped(kind: str) -> None:
    expect(fit(reconstruction(kind), data(kind, with_x(lambda x: x.flip(2))), FEW), "time flipped")


def test_channels_swapped() -> None:
    expect(fit(module("video"), data("video", with_x(lambda x: x.flip(1))), FEW), "channels swapped")


@pytest.mark.parametrize("swap", [lambda x: x.flip(1), lambda x: x[:, :1].expand_as(x)], ids=["left-right", "mono"])
def test_stereo_swapped(swap: Any) -> None:
    stereo = data("audio", with_x(swap), channels=2)
    training = AutoencoderModule(ConvKL(2, 4, [[4], [4]], width=4), optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3))
    expect(fit(training, stereo, FEW), "channels swapped")


# --- the space that is denoised


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder of an autoencoder whose weights are random; measured: whether its latents' statistics were."""

    def make(kind: str, measured: bool) -> tuple[Path, Any]:
        folder = tmp_path_factory.mktemp("model")
        video = {"class_path": "mmdiff.autoencoder.ConvKL", "init_args": {
            "channels": 3, "latent_channels": 4, "steps": [[1, 2, 2]], "width": 4, "kernel": [1, 3, 3]}}  # fmt: skip
        sound = {"class_path": "mmdiff.autoencoder.Chain", "init_args": {"parts": [
            {"class_path": "audio.mel.Mel", "init_args": {
                "sample_rate": 8000, "n_fft": 512, "hop_length": 256, "mels": 16}},
            {"class_path": "mmdiff.autoencoder.ConvKL", "init_args": {
                "channels": 1, "latent_channels": 4, "steps": [[2, 2]], "width": 4}}]}}  # fmt: skip
        tree = video if kind == "video" else sound
        torch.manual_seed(3)
        model = build(tree)
        if measured:
            x = next(iter(data(kind).train_dataloader()))["x"]
            with torch.no_grad():
                z = model.encode(x).movedim(1, 0).flatten(1)
            core = model.parts[1] if kind == "audio" else model
            core.normalise(z.mean(1), z.std(1))
        return save(model, tree, folder / "autoencoder"), tree

    return make


@both
@pytest.mark.parametrize("measured", [False, True], ids=["never validated", "random weights"])
def test_autoencoder_untrained(kind: str, measured: bool, untrained: Any) -> None:
    folder, tree = untrained(kind, measured)
    doctor = fit(module(kind, build(tree), autoencoder_weights=str(folder)), data(kind), FEW)
    names = {finding["name"] for finding in doctor.findings}
    assert "autoencoder untrained or mismatched" in names
    assert names <= {"autoencoder untrained or mismatched", "latent scale"}


def test_autoencoder_of_another_hop(untrained: Any) -> None:
    folder, tree = untrained("audio", True)
    mel = {**tree["init_args"]["parts"][0]["init_args"], "hop_length": 128}
    other = {**tree, "init_args": {"parts": [{"class_path": "audio.mel.Mel", "init_args": mel},
                                             tree["init_args"]["parts"][1]]}}  # fmt: skip
    config = {"model": {"init_args": {"autoencoder_weights": str(folder)}}}
    doctor = fit(module("audio", build(other), autoencoder_weights=str(folder)), data("audio"), 2, config=config)
    assert "hop_length is 256, here 128" in doctor.findings[0]["found"]


@both
@pytest.mark.parametrize("factor", [0.25, 4.0])
def test_latent_scale_off_by_4(kind: str, factor: float) -> None:
    doctor = fit(module(kind, sigma_data=factor * LATENTS[kind]), data(kind), FEW)
    expect(doctor, "latent scale")


def test_wrong_sample_rate() -> None:
    fast = plain("audio", sample_rate=16000)
    expect(fit(module("audio", fast), data("audio"), FEW), "wrong sample rate")
    expect(fit(reconstruction("audio", front=fast), data("audio"), FEW), "wrong sample rate")


def test_wrong_hop_between_two_spectrograms() -> None:
    training = module("audio", Chain([plain("audio")]))
    training.judge = Mel(8000, 512, 128, 16)
    expect(fit(training, data("audio"), FEW), "wrong hop")


# --- sampling


@both
@pytest.mark.parametrize(
    ("density", "grid"),
    [
        (Shifted(LogNormal(0, 1), 3.0), Flow(1.0)),
        (LogNormal(0, 1), Flow(3.0)),
        (LogUniform(0.15, 120.0), Karras(0.002, 80.0)),
    ],
    ids=["shift not sampled", "shift not trained", "range"],
)
def test_sampling_levels_that_were_not_trained(kind: str, density: Any, grid: Any) -> None:
    doctor = Doctor([*every_check(), Levels({"the cascade": grid})])
    expect(fit(module(kind, density=density), data(kind), 2, doctor=doctor), "sampling levels")


@pytest.mark.parametrize(
    ("density", "grid"),
    [(Shifted(LogNormal(0, 1), 3.0), Flow(3.0)), (LogNormal(0, 1), Flow(1.0)), (LogNormal(), Karras())],
)
def test_a_grid_that_goes_with_its_training_is_no_finding(density: Any, grid: Any) -> None:
    doctor = Doctor([Levels({"the cascade": grid})])
    expect(fit(module("video", density=density), data("video"), 2, doctor=doctor))


def test_a_cascade_of_another_rate_or_hop() -> None:
    mel = {"sample_rate": 8000, "n_fft": 512, "hop_length": 128, "mels": 16}
    tree = {"rate": 16000, "stages": {"decode": {"class_path": "mmdiff.cascade.Decode", "init_args": {
        "autoencoder": {"class_path": "audio.mel.Mel", "init_args": mel}}}}}  # fmt: skip
    doctor = fit(module("audio"), data("audio"), 2, doctor=Doctor([SampledLike(tree)]))
    expect(doctor, "wrong rate", "wrong hop")
    films = {"rate": 8, "stages": {}}
    expect(fit(module("video"), data("video"), 2, doctor=Doctor([SampledLike(films)])), "wrong rate")


# --- the condition


class Deaf(nn.Module):
    """A backbone that is given its condition and forgets it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net = backbone(kind, 3 if kind == "video" else 1, tokens_width=0, vector_width=0, cross=None)

    def forward(self, x: Tensor, c_noise: Tensor, cond: Cond | None = None) -> Tensor:
        return self.net(x, c_noise, None)


@both
def test_captions_that_the_backbone_ignores(kind: str) -> None:
    doctor = fit(module(kind, network=Deaf(kind)), data(kind), FEW)
    expect(doctor, "captions not reaching the network", "unused parameters")


@both
def test_captions_that_are_all_empty(kind: str) -> None:
    doctor = fit(module(kind), data(kind, lambda batch: {**batch, "caption": [""] * len(batch["x"])}), FEW)
    expect(doctor, "captions not reaching the network")


@both
def test_captions_that_the_conditioner_loses(kind: str) -> None:
    class Lost(Text):
        def encode(self, prompts: list[str]) -> Cond:
            return super().encode(["a"] * len(prompts))

    training = module(kind)
    training.model.conditioner = Lost(training.model.conditioner.encoder)  # type: ignore[union-attr,arg-type]
    expect(fit(training, data(kind), FEW), "captions not reaching the network")


@both
def test_conditioning_all_dropped(kind: str) -> None:
    expect(fit(module(kind, dropout=1.0), data(kind), FEW), "conditions all dropped")
    expect(fit(module(kind, dropout=0.5), data(kind), FEW))


# --- padding


def masked(batch: dict[str, Any]) -> dict[str, Any]:
    """The last half of every clip is padding, and said to be."""
    x, steps = batch["x"], batch["x"].shape[2]
    mask = torch.arange(steps).expand(len(x), steps) < steps // 2
    return {**batch, "mask": mask, "duration_s": batch["duration_s"] / 2}


@both
def test_padding_in_the_loss(kind: str) -> None:
    class Blind(DiffusionModule):
        def mask(self, batch: dict[str, Any], latents: Tensor) -> Tensor | None:
            return None

    expect(fit(module(kind, cls=Blind), data(kind, masked), FEW), "padding in the loss")
    expect(fit(module(kind), data(kind, masked), FEW))
    expect(fit(reconstruction(kind), data(kind, masked), 2), "padding in the loss")


@both
def test_a_mask_that_counts_padding(kind: str) -> None:
    def wrong(batch: dict[str, Any]) -> dict[str, Any]:
        made = masked(batch)
        return {**made, "mask": torch.ones_like(made["mask"])}

    expect(fit(module(kind), data(kind, wrong), 2), "padding in the loss")
