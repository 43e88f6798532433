"""Training of autoencoders: steps, clipping, accumulation, resumption and refusals, on a network of one axis."""

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from mmdiff.autoencoder import Autoencoder, ConvKL, Reconstruction, TrainableAutoencoder
from mmdiff.autoencoder_module import AutoencoderModule
from mmdiff.bottleneck import KL, Tanh
from mmdiff.codebook import VQ
from tests.small_autoencoder import adversarial, fit, loader, moved, network, weights


@pytest.mark.parametrize("bottleneck", [KL(), Tanh()], ids=["KL", "Tanh"])
def test_the_loss_falls(bottleneck: Any) -> None:
    lines = torch.linspace(-1, 1, 16) * torch.linspace(-1, 1, 8)[:, None, None]
    module = AutoencoderModule(network(bottleneck), optimizer=lambda p: AdamW(p, lr=1e-2))
    run = fit(module, loader(data=lines), loader(data=lines), max_epochs=40, check_val_every_n_epoch=40)
    assert float(run.callback_metrics["val/l1"]) < 0.4 * float(lines.abs().mean())
    assert float(run.callback_metrics["val/psnr"]) > 15


def test_accumulating_two_batches_is_one_of_twice_the_size() -> None:
    """Equal to 1e-6 for every weight, after four steps; the losses are means, and the bottleneck has no chance."""
    one = network()
    two = copy.deepcopy(one)
    fit(AutoencoderModule(one, optimizer=lambda p: SGD(p, lr=0.3)), loader(16, 4))
    run = fit(AutoencoderModule(two, optimizer=lambda p: SGD(p, lr=0.3), accumulate=2), loader(16, 2))
    assert run.global_step == 4
    torch.testing.assert_close(weights(one), weights(two), atol=1e-6, rtol=0)


def test_discriminators_accumulate_too() -> None:
    """As above, for the discriminator against a model that stands still."""
    first = AutoencoderModule(
        network(),
        adversarial=adversarial(),
        optimizer=lambda p: SGD(p, lr=0.0),
        discriminator_optimizer=lambda p: SGD(p, lr=0.03),
        clip=None,
    )
    second = copy.deepcopy(first)
    second.accumulate = 2
    before = weights(first)
    fit(first, loader(16, 4))
    fit(second, loader(16, 2))
    assert moved(first, before) > 1e-3
    torch.testing.assert_close(weights(first), weights(second), atol=1e-6, rtol=0)


def test_the_last_window_of_an_epoch_is_a_mean_of_what_it_has() -> None:
    """Three batches, two to a step: the second step is of the third batch alone, at full strength."""
    data = torch.randn(6, 1, 16)
    accumulated = network()
    by_hand = copy.deepcopy(accumulated)
    run = fit(AutoencoderModule(accumulated, optimizer=lambda p: SGD(p, lr=0.3), accumulate=2), loader(data=data))
    assert run.global_step == 2
    optimizer = SGD(by_hand.parameters(), lr=0.3)
    for part in (data[:4], data[4:]):
        optimizer.zero_grad()
        (by_hand.reconstruct(part).x - part).abs().mean().backward()
        nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
        optimizer.step()
    torch.testing.assert_close(weights(accumulated), weights(by_hand), atol=1e-6, rtol=0)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_each_network_is_clipped_for_itself(accumulate: int) -> None:
    """With SGD of rate 1 a step that is clipped is as long as the clip, of the model and of the discriminator."""
    module = AutoencoderModule(
        network(), adversarial=adversarial(), optimizer=lambda p: SGD(p, lr=1.0), clip=1e-3, accumulate=accumulate
    )
    assert module.adversarial is not None
    model, discriminator = weights(module.model), weights(module.adversarial)
    fit(module, loader(2 * accumulate))
    assert moved(module.model, model) == pytest.approx(1e-3, rel=1e-3)
    assert moved(module.adversarial, discriminator) == pytest.approx(1e-3, rel=1e-3)


def test_without_a_clip_the_gradient_is_taken_whole() -> None:
    model = network()
    by_hand = copy.deepcopy(model)
    fit(AutoencoderModule(model, optimizer=lambda p: SGD(p, lr=1.0), clip=None), loader(2))
    x = next(iter(loader(2)))["x"]
    (100 * (by_hand.reconstruct(x).x - x).abs().mean()).backward()
    with torch.no_grad():
        for p in by_hand.parameters():
            p -= torch.zeros(()) if p.grad is None else p.grad / 100
    torch.testing.assert_close(weights(model), weights(by_hand))


class Sides(pl.Callback):
    """At each step of either optimizer: which side's parameters have gradients, and the global step."""

    def __init__(self) -> None:
        self.seen: list[tuple[bool, bool, int]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        sides = (pl_module.model, pl_module.adversarial)
        self.seen.append((*(any(p.grad is not None for p in side.parameters()) for side in sides), trainer.global_step))


def test_steps_alternate_and_neither_side_has_gradients_in_the_other_s() -> None:
    sides = Sides()
    module = AutoencoderModule(network(), adversarial=adversarial(features=1.0, r1=1.0, start=1))
    run = fit(module, loader(2 * 3), callbacks=[sides])
    assert sides.seen == [  # in the first step there is no discriminator yet
        (True, False, 0), (True, False, 1), (False, True, 2), (True, False, 2), (False, True, 3)
    ]  # fmt: skip
    assert run.global_step == 3
    assert all(p.requires_grad for p in module.parameters())


def test_max_steps_are_the_model_s_steps() -> None:
    sides = Sides()
    run = fit(AutoencoderModule(network(), adversarial=adversarial()), max_epochs=-1, max_steps=5, callbacks=[sides])
    assert run.global_step == 5
    assert [model for model, _, _ in sides.seen] == [True, False] * 5


def test_a_side_whose_rate_is_zero_stays_as_it_is() -> None:
    for still, rates in (("model", (0.0, 0.1)), ("adversarial", (0.1, 0.0))):
        module = AutoencoderModule(
            network(),
            adversarial=adversarial(r1=1.0),
            optimizer=lambda p, lr=rates[0]: SGD(p, lr=lr),
            discriminator_optimizer=lambda p, lr=rates[1]: SGD(p, lr=lr),
        )
        before = {name: weights(getattr(module, name)) for name in ("model", "adversarial")}
        fit(module)
        for name, value in before.items():
            assert (moved(getattr(module, name), value) == 0) == (name == still)


def test_each_scheduler_steps_with_its_optimizer() -> None:
    module = AutoencoderModule(
        network(),
        adversarial=adversarial(start=2),
        optimizer=lambda p: SGD(p, lr=1.0),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
        accumulate=2,
    )
    run = fit(module, loader(2 * 2 * 3))
    assert [optimizer.param_groups[0]["lr"] for optimizer in run.optimizers] == [0.5**3, 0.5]


def states(run: pl.Trainer) -> list[Any]:
    return [optimizer.state_dict() for optimizer in run.optimizers]


def test_a_resumed_training_is_the_uninterrupted_one(tmp_path: Path) -> None:
    """Bit for bit: weights, codebook, statistics, both optimizers and schedulers."""

    def build() -> AutoencoderModule:
        torch.manual_seed(0)
        return AutoencoderModule(
            network(VQ(8, 2)),
            adversarial=adversarial(start=2, r1=0.1, r1_every=3),
            optimizer=lambda p: AdamW(p, lr=1e-3),
            scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
        )

    whole = build()
    straight = fit(whole, max_epochs=4)
    half = build()
    fit(half, max_epochs=2).save_checkpoint(tmp_path / "half.ckpt")
    resumed = build()
    run = fit(resumed, max_epochs=4, ckpt=tmp_path / "half.ckpt")
    assert run.global_step == straight.global_step == 16
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    for a, b in zip(states(run), states(straight), strict=True):
        assert a["param_groups"] == b["param_groups"]
        for index, state in b["state"].items():
            assert all(torch.equal(a["state"][index][key], value) for key, value in state.items())
    assert resumed.measured


def test_noise_is_a_function_of_seed_epoch_and_batch_alone() -> None:
    def trained(seed: int, elsewhere: int) -> Tensor:
        torch.manual_seed(0)
        module = AutoencoderModule(network(KL()), seed=seed)
        torch.manual_seed(elsewhere)
        fit(module)
        return weights(module.model)

    assert torch.equal(trained(0, 1), trained(0, 2))
    assert not torch.equal(trained(0, 1), trained(1, 1))

    class Noise(ConvKL):
        def reconstruct(self, x: Tensor, generator: torch.Generator | None = None) -> Reconstruction:
            if generator is not None:
                drawn.append(generator.initial_seed())
            return super().reconstruct(x, generator)

    drawn: list[int] = []
    fit(AutoencoderModule(Noise(1, 2, [[2]], width=4)), max_epochs=2)
    assert len(set(drawn)) == len(drawn) == 8


class Double(Autoencoder):
    """A front with weights and a mode, for the tests."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(2.0))

    def encode(self, x: Tensor) -> Tensor:
        assert not self.training
        return self.gain * x

    def decode(self, z: Tensor) -> Tensor:
        return z / self.gain


def test_behind_a_front_the_model_learns_what_the_front_encodes() -> None:
    behind, plain = network(), network()
    plain.load_state_dict(behind.state_dict())
    module = AutoencoderModule(behind, front=Double())
    fit(module)
    fit(AutoencoderModule(plain), loader(data=2 * torch.cat([batch["x"] for batch in loader()])))
    assert torch.equal(weights(behind), weights(plain))
    assert module.front is not None
    assert float(next(module.front.parameters())) == 2


def test_losses_are_summed_by_their_weights() -> None:
    model = network()
    losses = {"l1": nn.L1Loss(), "l2": nn.MSELoss()}
    module = AutoencoderModule(model, losses=losses, weights={"l2": 3.0})
    x = torch.randn(2, 1, 16)
    out = model.reconstruct(x)
    terms, total = module.reconstruction(out.x, x)
    torch.testing.assert_close(terms["l2"], (out.x - x).square().mean())
    torch.testing.assert_close(total, (out.x - x).abs().mean() + 3 * (out.x - x).square().mean())


class Plain(TrainableAutoencoder):
    """An autoencoder without statistics, whose latents are fixed: what a vocoder is."""

    latent_channels = 3

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Conv1d(3, 1, 1)

    def encode(self, x: Tensor) -> Tensor:
        return x.expand(-1, 3, -1)

    def decode(self, z: Tensor) -> Tensor:
        return self.up(z)

    def reconstruct(self, x: Tensor, generator: torch.Generator | None = None) -> Reconstruction:
        return Reconstruction(self.decode(self.encode(x)), torch.zeros(()), {}, self.encode(x))

    def last_weight(self) -> Tensor:
        return self.up.weight


def test_an_autoencoder_without_statistics_trains() -> None:
    model = Plain()
    before = weights(model)
    fit(AutoencoderModule(model, adversarial=adversarial()))
    assert moved(model, before) > 0
