"""Training: its randomness is a function of seed, epoch and batch; losses it logs; what the optimizer gets."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmdiff.autoencoder import ConvKL, Identity, Subsample
from mmdiff.backbones import UNet
from mmdiff.conditioning import Label, LowRes
from mmdiff.density import LogNormal
from mmdiff.io import save
from mmdiff.model import DiffusionModel
from mmdiff.module import DiffusionModule
from mmdiff.precond import EDM, Flow


def make(seed: int = 0, density: LogNormal | None = None, **settings: Any) -> DiffusionModule:
    torch.manual_seed(1)
    net = UNet(1, 1, channels=8, multipliers=(1,), vector_width=4)
    model = DiffusionModel(net, EDM(), Label("class", 3, 4, dropout=0.5))
    with torch.no_grad():  # off the zeros that a fresh network starts from
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return DiffusionModule(model, density or LogNormal(), seed=seed, **settings)


def batch(n: int = 4) -> dict[str, Tensor]:
    """Clips that are flat but for a little noise, at a level that their class tells."""
    noise, classes = torch.randn(n, 1, 8, generator=torch.Generator().manual_seed(0)), torch.arange(n) % 3
    return {"x": classes[:, None, None] - 1 + 0.1 * noise, "class": classes}


def test_loss_is_a_function_of_its_key_alone() -> None:
    module, data = make(), batch()
    state = torch.get_rng_state()
    losses = [float(module.loss(data, key)) for key in ((0, 0, 0), (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert torch.equal(torch.get_rng_state(), state)
    assert losses[0] == losses[1]
    assert len(set(losses)) == 4
    assert float(make(seed=1).loss(data, (0, 0, 0))) != losses[0]
    assert float(make(density=LogNormal(1.0)).loss(data, (0, 0, 0))) != losses[0]


def test_conditions_are_dropped_in_training_alone() -> None:
    module, data = make(), batch()
    other = {**data, "class": (data["class"] + 1) % 3}
    module.eval()
    assert module.loss(data, (0, 0, 0)) != module.loss(other, (0, 0, 0))
    module.train()
    module.model.conditioner.dropout = 1.0
    assert module.loss(data, (0, 0, 0)) == module.loss(other, (0, 0, 0))


def test_an_upsampler_is_given_the_low_clip_of_its_own_latents() -> None:
    model = DiffusionModel(UNet(1, 1, channels=8, multipliers=(1,), concat_channels=2), Flow(), LowRes(Subsample(2)))
    module = DiffusionModule(model, LogNormal())
    seen: list[Tensor] = []
    model.denoiser.backbone.register_forward_pre_hook(lambda net, args: seen.append(args[2].concat))
    data = batch()
    module.eval().model.conditioner.level = 0.0
    module.loss(data, (0, 0, 0)).backward()
    assert torch.equal(seen[0][:, :1, ::2], data["x"][:, :, ::2])


def test_the_autoencoder_is_a_trained_one_and_stays_as_it_is(tmp_path: Path) -> None:
    sizes = {"channels": 1, "latent_channels": 3, "steps": [[2]], "width": 4}
    trained = ConvKL(**sizes)  # type: ignore[arg-type]
    trained.shift.fill_(0.5)
    save(trained, {"class_path": "mmdiff.autoencoder.ConvKL", "init_args": sizes}, tmp_path / "ae")
    model = DiffusionModel(UNet(1, 3, channels=8), EDM(), autoencoder=ConvKL(**sizes)).train()  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the autoencoder ConvKL has weights, but autoencoder_weights is not given"):
        DiffusionModule(model, LogNormal())
    module = DiffusionModule(model, LogNormal(), autoencoder_weights=str(tmp_path / "ae")).train()
    assert not model.autoencoder.training
    assert not any(p.requires_grad for p in model.autoencoder.parameters())
    optimizer = module.configure_optimizers()
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in model.denoiser.parameters()}
    x = torch.randn(2, 1, 32)
    torch.testing.assert_close(model.encode(x), trained.encode(x))
    assert isinstance(DiffusionModel(nn.Identity(), EDM()).autoencoder, Identity)


def test_condition_and_null_of_a_model() -> None:
    model = make().model.eval()
    data = batch()
    assert torch.equal(model.condition(data).vector, model.conditioner.table.weight[data["class"]])
    assert torch.equal(model.null(data).vector, model.conditioner.table.weight[3].expand(4, 4))
    x, sigma, cond = data["x"], torch.tensor(0.5), model.condition(data)
    assert torch.equal(model.bind(cond)(x, sigma), model.denoiser(x, sigma, cond))
    plain = DiffusionModel(nn.Identity(), EDM())
    assert plain.condition(data) is None
    assert plain.null(data) is None


class Log(pl.Callback):
    """Keeps what was logged at every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.steps.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def trainer(**settings: Any) -> pl.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(accelerator="cpu", num_sanity_val_steps=0, **{**quiet, **settings})


def loader(n: int = 8) -> DataLoader[Any]:
    data = batch(n)
    return DataLoader([{name: value[i] for name, value in data.items()} for i in range(n)], batch_size=4)


def test_training_lowers_the_loss_and_logs_it() -> None:
    log = Log()
    module = make(optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01))
    fit = trainer(max_epochs=25, callbacks=[log])
    fit.fit(module, loader(), loader())
    assert set(log.steps[-1]) >= {"train/loss", "train/grad_norm", "val/loss"}
    losses = [step["train/loss"] for step in log.steps]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert log.steps[-1]["train/grad_norm"] > 0
    validated = [fit.validate(module, loader(), verbose=False)[0]["val/loss"] for _ in range(2)]
    assert validated[0] == validated[1]
    assert fit.test(module, loader(), verbose=False)[0]["test/loss"] == pytest.approx(validated[0])


def test_same_seed_same_weights() -> None:
    weights = []
    for noise in (0, 99):
        module = make()
        torch.manual_seed(noise)  # the global generator has no say
        trainer(max_steps=3).fit(module, loader())
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.equal(*weights)


def test_scheduler_steps_with_every_optimizer_step() -> None:
    rates: list[float] = []

    class Rates(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    module = make(
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
    )
    trainer(max_steps=3, callbacks=[Rates()]).fit(module, loader())
    assert rates == [1.0, 0.5, 0.25]
