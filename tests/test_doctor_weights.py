"""Each fault of weights, gradients and averages, put into a small training, is named before step 100."""

from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mmdiff.autoencoder import ConvKL
from mmdiff.autoencoder_module import AutoencoderModule
from mmdiff.callbacks import EMA, Doctor
from mmdiff.module import DiffusionModule
from mmdiff.parameters import ParameterGroups
from tests.doctor_cases import KINDS, data, every_check, expect, fit, module, reconstruction

both = pytest.mark.parametrize("kind", KINDS)
FEW = 9  # steps, enough for what the first ones show


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without a logger write doctor.json into the working directory."""
    monkeypatch.chdir(tmp_path)


@both
@pytest.mark.parametrize("training", [module, reconstruction], ids=["diffusion", "autoencoder"])
@pytest.mark.parametrize(("factor", "name"), [(100, "too high"), (0.01, "too low")])
def test_learning_rate_100_times_off(kind: str, training: Any, factor: float, name: str) -> None:
    healthy = 0.002 if training is module else 0.003
    expect(fit(training(kind, lr=healthy * factor), data(kind), FEW), f"learning rate {name}")


def test_a_warm_up_is_not_too_low_and_a_high_rate_is_seen_within_it() -> None:
    def warm(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / 5000)

    expect(fit(module("video", scheduler=warm), data("video"), FEW))
    doctor = fit(module("video", lr=0.2, scheduler=warm), data("video"), FEW)
    expect(doctor, "learning rate too high")


@both
def test_frozen_parameters(kind: str) -> None:
    training = module(kind)
    training.model.denoiser.backbone.down.requires_grad_(False)  # type: ignore[union-attr]
    expect(fit(training, data(kind), FEW), "frozen parameters")
    asked = module(kind, groups=ParameterGroups(frozen=["model.denoiser.backbone.down.*"]))
    expect(fit(asked, data(kind), FEW))
    encoder = reconstruction(kind)
    encoder.model.encoder.requires_grad_(False)  # type: ignore[union-attr]
    expect(fit(encoder, data(kind), FEW), "frozen parameters")


@both
def test_parameters_that_no_optimizer_has(kind: str) -> None:
    class Forgets(DiffusionModule):
        def configure_optimizers(self) -> Any:
            return self.optimizer(self.model.denoiser.parameters())

    expect(fit(module(kind, cls=Forgets), data(kind), FEW), "frozen parameters")


@both
def test_unused_parameters(kind: str) -> None:
    training = module(kind)
    training.model.denoiser.backbone.spare = nn.Linear(4, 4)  # type: ignore[assignment]
    expect(fit(training, data(kind), FEW), "unused parameters")
    encoder = reconstruction(kind)
    encoder.model.spare = nn.Linear(4, 4)
    expect(fit(encoder, data(kind), FEW), "unused parameters")


def waves(lr: float) -> AutoencoderModule:
    torch.manual_seed(0)
    return AutoencoderModule(ConvKL(1, 4, [[4], [4]], width=4), optimizer=lambda p: torch.optim.AdamW(p, lr=lr))


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
@pytest.mark.parametrize(
    ("kind", "training"),
    [
        ("video", lambda lr: reconstruction("video", lr=lr)),
        ("audio", waves),
    ],
    ids=["video", "audio"],
)
def test_precision_underflow_in_an_autoencoder(kind: str, training: Any, precision: str) -> None:
    lr = 2e-4 if precision == "bf16-true" else 2e-5
    doctor = Doctor(every_check())
    with nullcontext() if precision == "bf16-true" else suppress(ValueError):  # float16 may end in NaN at once
        fit(training(lr), data(kind), FEW, doctor=doctor, precision=precision)
    assert "precision underflow" in [finding["name"] for finding in doctor.findings]
    mixed = fit(training(0.002), data(kind), FEW, precision="bf16-mixed")
    assert "precision underflow" not in [finding["name"] for finding in mixed.findings]


@both
def test_precision_underflow_in_a_backbone(kind: str) -> None:
    half = module(kind, lr=2e-4)
    half.model.denoiser.backbone.bfloat16()
    expect(fit(half, data(kind), FEW), "precision underflow")


@pytest.mark.parametrize(
    ("kind", "training"),
    [
        ("video", module),
        ("audio", reconstruction),
        pytest.param("audio", module, marks=pytest.mark.slow),
        pytest.param("video", reconstruction, marks=pytest.mark.slow),
    ],
)
def test_gradient_clipping_always_active(kind: str, training: Any) -> None:
    low = {"clip": 0.01} if training is reconstruction else {}
    settings = {} if training is reconstruction else {"gradient_clip_val": 0.01}
    expect(fit(training(kind, **low), data(kind), 95, **settings), "gradient always clipped")


@both
@pytest.mark.parametrize("training", [module, reconstruction], ids=["diffusion", "autoencoder"])
def test_ema_not_updated(kind: str, training: Any) -> None:
    class Forgets(EMA):
        def on_train_batch_end(self, *args: Any) -> None: ...

    expect(fit(training(kind), data(kind), FEW, [EMA(0.999), Forgets(0.99)]), "EMA not updated")
