"""Training of autoencoders: precision, latent statistics, refusals, and that every seed finishes."""

import copy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from mmdiff.autoencoder_module import AutoencoderModule, metrics
from mmdiff.bottleneck import KL
from mmdiff.callbacks import EMA
from mmdiff.codebook import VQ
from mmdiff.latent_statistics import LatentStatistics
from tests.small_autoencoder import adversarial, fit, loader, moved, network, weights


def expect_standard(latents: Tensor, tolerance: float = 1e-5) -> None:
    """Mean 0 and variance 1 in every channel of (B, C, *axes)."""
    flat = latents.movedim(1, 0).flatten(1).double()
    torch.testing.assert_close(flat.mean(dim=1), torch.zeros(len(flat)).double(), atol=tolerance, rtol=0)
    torch.testing.assert_close(flat.var(dim=1, correction=0), torch.ones(len(flat)).double(), atol=tolerance, rtol=0)


def test_statistics_in_parts_are_those_of_the_whole() -> None:
    """To 1e-12 of the deviation for a mean of 1e4 of them, where the mean of squares loses half the digits."""
    z = 1e4 + torch.randn(11, 3, 5, 2, dtype=torch.float64)
    parts = [LatentStatistics(3), LatentStatistics(3)]
    for i, rows in enumerate((z[:1], z[1:4], z[4:])):
        parts[i % 2].add(rows)
    whole = LatentStatistics(3)
    for part in parts:
        whole.join(part.count, part.mean, part.squares)
    flat = z.movedim(1, 0).flatten(1)
    torch.testing.assert_close(whole.mean, flat.mean(dim=1), atol=0, rtol=1e-15)
    torch.testing.assert_close(whole.deviation, flat.std(dim=1, correction=0), atol=1e-12, rtol=0)


@pytest.mark.parametrize("bottleneck", [KL(), VQ(8, 2)], ids=["KL", "VQ"])
def test_latents_of_the_validation_data_have_mean_0_and_variance_1(bottleneck: Any) -> None:
    """To 1e-5, over batches of unequal sizes, with the weights at the end of training."""
    model, val = network(bottleneck), loader(7, 3)
    fit(AutoencoderModule(model, optimizer=lambda p: AdamW(p, lr=1e-2)), val=val, max_epochs=3)
    expect_standard(torch.cat([model.encode(batch["x"]) for batch in val]))


def test_the_average_is_normalised_by_its_own_statistics() -> None:
    """With an EMA the statistics are those of the averaged weights, which validation uses and export writes."""
    model, val, ema = network(KL()), loader(6, 2), EMA(0.9)
    module = AutoencoderModule(model, optimizer=lambda p: AdamW(p, lr=3e-2))
    run = fit(module, val=val, max_epochs=3, callbacks=[ema])
    raw = torch.cat([model.encode(batch["x"]) for batch in val])
    assert (raw.std(dim=(0, 2)) - 1).abs().max() > 1e-3, "raw and averaged weights are too alike to tell"
    exported = copy.deepcopy(model)
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    for callback in run.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EMA):
            state |= {name: value for name, value in callback.average.items() if name.startswith("model.")}
    exported.load_state_dict({name.removeprefix("model."): value for name, value in state.items()})
    expect_standard(torch.cat([exported.encode(batch["x"]) for batch in val]))


def test_before_a_validation_the_statistics_are_running_and_after_it_they_rest() -> None:
    model = network(KL())
    module = AutoencoderModule(model, optimizer=lambda p: SGD(p, lr=0.0))
    fit(module, val=[], max_epochs=1)  # four steps, without a validation
    latents = torch.stack([model.reconstruct(batch["x"]).latents for batch in loader()])
    torch.testing.assert_close(model.shift, latents.mean(dim=(0, 1, 3)), rtol=1e-4, atol=1e-6)
    assert not module.measured
    fit(module, val=loader(4), max_epochs=1)
    scale = model.scale.clone()
    fit(module, val=[], max_epochs=1)
    assert torch.equal(model.scale, scale)


def test_the_sanity_check_measures_nothing() -> None:
    class Stop(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append(pl_module.measured)

    seen: list[bool] = []
    fit(AutoencoderModule(network()), callbacks=[Stop()])
    assert seen == [False]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("bottleneck", [KL, lambda: VQ(8, 2)], ids=["KL", "VQ"])
def test_precisions_train_both_sides(precision: Any, bottleneck: Any) -> None:
    module = AutoencoderModule(network(bottleneck()), adversarial=adversarial(r1=0.1, features=1.0))
    before = weights(module)
    fit(module, precision=precision)
    assert weights(module).isfinite().all()
    assert moved(module, before) > 0


def test_bfloat16_takes_the_steps_of_float32_within_its_precision() -> None:
    float32 = network()
    mixed = copy.deepcopy(float32)
    before = weights(float32)
    fit(AutoencoderModule(float32, optimizer=lambda p: SGD(p, lr=0.1)))
    fit(AutoencoderModule(mixed, optimizer=lambda p: SGD(p, lr=0.1)), precision="bf16-mixed")
    assert (weights(mixed) - weights(float32)).norm() < 0.05 * moved(float32, before)


def half(init_scale: float) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=1000))


def test_float16_is_clipped_after_its_scale_is_gone() -> None:
    module = AutoencoderModule(network(), adversarial=adversarial(), optimizer=lambda p: SGD(p, lr=1.0), clip=1e-3)
    assert module.adversarial is not None
    model, discriminator = weights(module.model), weights(module.adversarial)
    fit(module, loader(2), plugins=[half(1024.0)])
    assert moved(module.model, model) == pytest.approx(1e-3, rel=1e-3)
    assert moved(module.adversarial, discriminator) == pytest.approx(1e-3, rel=1e-3)


def test_a_float16_step_that_overflows_is_left_out() -> None:
    module = AutoencoderModule(network(), optimizer=lambda p: SGD(p, lr=1.0))
    before = weights(module.model)
    fit(module, loader(2), plugins=[half(2.0**60)])
    assert moved(module.model, before) == 0
    fit(module, loader(2), plugins=[half(2.0)])
    assert moved(module.model, before) > 0


class Faulty(nn.Module):
    """A loss that is not finite from batch `at` on; with `hidden` only its gradient."""

    def __init__(self, at: int = 2, hidden: bool = False) -> None:
        super().__init__()
        self.at, self.hidden, self.count = at, hidden, 0

    def forward(self, x_hat: Tensor, x: Tensor) -> Tensor:
        if not self.training:
            return x_hat.new_zeros(())
        self.count += 1
        if self.count <= self.at:
            return (x_hat - x).square().mean()
        return (0 * x_hat).square().sum().sqrt() if self.hidden else x_hat.mean() / 0


class Remember(pl.Callback):
    """The weights and the codebook after the last good step."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.state = {name: value.clone() for name, value in pl_module.state_dict().items()}


@pytest.mark.parametrize(
    ("hidden", "message"),
    [
        (False, "the loss odd=(-inf|inf|nan) is not finite at step 2"),
        (True, r"the gradient \(grad_norm=nan\) is not finite at step 2"),
    ],
    ids=["loss", "gradient"],
)
def test_what_is_not_finite_does_not_reach_the_weights(hidden: bool, message: str) -> None:
    remember = Remember()
    losses = {"l1": nn.L1Loss(), "odd": Faulty(2, hidden)}
    module = AutoencoderModule(network(), losses=losses, adversarial=adversarial(adaptive=False))
    with pytest.raises(ValueError, match=message):
        fit(module, callbacks=[remember])
    assert all(torch.equal(value, remember.state[name]) for name, value in module.named_parameters())


def test_data_that_is_not_finite_reaches_neither_weights_nor_codebook_nor_statistics() -> None:
    remember = Remember()
    data = torch.randn(4, 1, 16)
    data[3, 0, 5] = torch.nan
    module = AutoencoderModule(network(VQ(8, 2)), adversarial=adversarial())
    with pytest.raises(ValueError, match="the loss l1=nan is not finite at step 1"):
        fit(module, loader(data=data), callbacks=[remember])
    assert all(torch.equal(value, remember.state[name]) for name, value in module.state_dict().items())


def test_a_discriminator_that_is_not_finite_is_refused() -> None:
    module = AutoencoderModule(network(), adversarial=adversarial(weight=0.0, adaptive=False))
    assert module.adversarial is not None
    nn.init.constant_(module.adversarial.discriminators[0].last.weight, torch.inf)  # type: ignore[union-attr, arg-type]
    with pytest.raises(ValueError, match=r"the loss adversarial=(nan|-?inf) is not finite at step 0"):
        fit(module)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"losses": {}}, r"losses=\{\} leave nothing to reconstruct by"),
        ({"losses": {"loss": nn.L1Loss()}}, "losses cannot be called loss"),
        ({"weights": {"stft": 1.0}}, r"weights of \['stft'\], but losses are \['l1'\]"),
        ({"weights": {"l1": -1.0}}, r"weights\['l1'\]=-1.0 must be 0 or more"),
        ({"clip": 0.0}, "clip=0.0 must be positive; null is no limit"),
        ({"accumulate": 0}, "accumulate=0 must be 1 or more"),
        ({"discriminator_optimizer": AdamW}, "discriminator_optimizer is given, but adversarial is not"),
    ],
)
def test_wrong_settings_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoencoderModule(network(), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient_clip_val": 1.0}, r"trainer.gradient_clip_val=1.0 does not work .* set model.clip"),
        ({"accumulate_grad_batches": 2}, r"trainer.accumulate_grad_batches=2 does not work .* set model.accumulate"),
    ],
)
def test_settings_of_the_trainer_that_do_nothing_are_refused_by_naming_ours(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(AutoencoderModule(network()), **settings)


def test_a_scheduler_that_waits_for_a_metric_is_refused() -> None:
    module = AutoencoderModule(network(), scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau)
    with pytest.raises(ValueError, match="ReduceLROnPlateau waits for a metric"):
        fit(module)


def test_psnr_is_of_a_range_of_2() -> None:
    x = torch.zeros(2, 1, 4)
    x_hat = torch.stack([torch.full((1, 4), 0.2), torch.full((1, 4), -0.02)])
    torch.testing.assert_close(metrics(x_hat, x)["psnr"], torch.tensor((20.0 + 40.0) / 2))
    torch.testing.assert_close(metrics(x_hat, x)["l1"], torch.tensor(0.11))


def test_what_is_logged() -> None:
    module = AutoencoderModule(network(KL()), adversarial=adversarial(r1=1.0, features=1.0))
    run = fit(module)
    train = ("loss", "l1", "psnr", "kl", "adversarial", "adversarial_weight", "features", "discriminator", "r1")
    norms = ("train/grad_norm", "train/discriminator_grad_norm", "train/clipped", "train/discriminator_clipped")
    val = ("val/loss", "val/l1", "val/psnr", "val/kl")
    assert {*(f"train/{name}" for name in train), *norms, *val} == set(run.callback_metrics)
    tested = run.test(module, loader(4), verbose=False)[0]
    assert set(tested) == {name.replace("val/", "test/") for name in val}
