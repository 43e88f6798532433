"""Training: its randomness is a function of seed, epoch and batch; losses it logs; what the optimizer gets."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmdiff.autoencoder import ConvKL, Identity, Pool, Subsample
from mmdiff.backbones import UNet
from mmdiff.conditioning import Label, LowRes
from mmdiff.density import Importance, LogNormal, LogUniform, Shifted, Stratified, Table
from mmdiff.export import export_model
from mmdiff.io import load, save
from mmdiff.levels import Known, Levels, Past, PerItem, PerStep
from mmdiff.likelihood import LearnedVariance
from mmdiff.model import DiffusionModel
from mmdiff.module import DiffusionModule
from mmdiff.precond import EDM, Eps, Flow
from mmdiff.sigmas import DDPM, ResolutionShift
from mmdiff.weighting import L1, LearnedUncertainty, MinSNR, PseudoHuber


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
    losses = [
        float(module.losses(data, key)["loss"]) for key in ((0, 0, 0), (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert losses[0] == losses[1]
    assert len(set(losses)) == 4
    assert float(make(seed=1).losses(data, (0, 0, 0))["loss"]) != losses[0]
    assert float(make(density=LogNormal(1.0)).losses(data, (0, 0, 0))["loss"]) != losses[0]


def test_conditions_are_dropped_in_training_alone() -> None:
    module, data = make(), batch()
    other = {**data, "class": (data["class"] + 1) % 3}
    module.eval()
    assert module.losses(data, (0, 0, 0))["loss"] != module.losses(other, (0, 0, 0))["loss"]
    module.train()
    module.model.conditioner.dropout = 1.0
    assert module.losses(data, (0, 0, 0))["loss"] == module.losses(other, (0, 0, 0))["loss"]


def test_an_upsampler_is_given_the_low_clip_of_its_own_latents() -> None:
    model = DiffusionModel(UNet(1, 1, channels=8, multipliers=(1,), concat_channels=2), Flow(), LowRes(Subsample(2)))
    module = DiffusionModule(model, LogNormal())
    seen: list[Tensor] = []
    model.denoiser.backbone.register_forward_pre_hook(lambda net, args: seen.append(args[2].concat))
    data = batch()
    module.eval().model.conditioner.level = 0.0
    module.losses(data, (0, 0, 0))["loss"].backward()
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


class Given(nn.Module):
    """Any network, elementwise, that keeps what it was given."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.gain, self.channels = nn.Parameter(torch.tensor(0.9)), channels

    def forward(self, x: Tensor, c_noise: Tensor, cond: object = None) -> Tensor:
        self.x, self.c_noise = x, c_noise
        return torch.sin(self.gain * x).repeat(1, self.channels, *(1,) * (x.ndim - 2))


def bare(density: Any = None, precond: Any = None, channels: int = 1, **settings: Any) -> DiffusionModule:
    return DiffusionModule(DiffusionModel(Given(channels), precond or EDM()), density or LogNormal(), **settings)


def clips(n: int = 64, steps: int = 8) -> dict[str, Tensor]:
    return {"x": torch.randn(n, 1, steps, generator=torch.Generator().manual_seed(5))}


def test_the_default_loss_is_the_mean_square_on_the_networks_own_target() -> None:
    """A training goes on as it began as long as the draws are these."""
    module, data = bare(), clips()
    generators = [torch.Generator().manual_seed(hash((0, 3, 1, 4, *place)) % 2**63) for place in [(), *zip(range(64))]]
    sigma = LogNormal().sample(64, generator=generators[0])
    noise = torch.stack([torch.randn(1, 8, generator=generator) for generator in generators[1:]])
    expected = module.model.denoiser.loss(data["x"], sigma, noise=noise).mean()
    assert torch.equal(module.losses(data, (3, 1, 4))["loss"], expected)


@pytest.mark.parametrize("settings", [
    {"weighting": MinSNR()}, {"distance": L1()}, {"distance": PseudoHuber(0.1)}, {"levels": PerStep()},
    {"levels": Known()}, {"levels": Past(3)}, {"density": Stratified(LogNormal())},
    {"density": Importance(LogNormal(), (3, 1))}, {"density": Shifted(LogNormal(), ResolutionShift(2))},
], ids=str)  # fmt: skip
def test_every_setting_of_the_loss_counts(settings: dict[str, Any]) -> None:
    losses = [float(bare(**given).losses(clips(), (0, 0, 0))["loss"]) for given in ({}, settings, settings)]
    assert losses[1] == losses[2]
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)


def test_importance_draws_leave_the_mean_loss_as_it_is() -> None:
    """Means of 40,000 draws within 4 standard errors; without its weight the mean would be far off."""
    module, data = bare(), {"x": torch.randn(40_000, 1, 2)}
    skewed = bare(Importance(LogNormal(), (1, 9)))
    plain, weighted = (float(m.losses(data, (0, 0, 0))["loss"]) for m in (module, skewed))
    assert weighted == pytest.approx(plain, rel=0.03)
    skewed.density = UnweightedImportance(LogNormal(), (1, 9))
    assert float(skewed.losses(data, (0, 0, 0))["loss"]) != pytest.approx(plain, rel=0.1)


class UnweightedImportance(Importance):
    def weight(self, sigma: Tensor) -> Tensor:
        return torch.ones_like(sigma)


LEVELS: list[Levels] = [PerItem(), PerStep(), Known(1, 2, 0.5), Past(3, 0.5), Known(levels=PerStep(), share=1.0)]


@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_levels_follow_the_density_where_nothing_is_known(levels: Levels) -> None:
    """Deciles of the free levels: shares within 4 standard errors. Stratified draws too, in any time step."""
    x0 = torch.zeros(4000, 1, 8)
    for density in (LogNormal(0.3, 0.7), Stratified(LogNormal(0.3, 0.7))):
        sigma = levels(density, x0, torch.Generator().manual_seed(0))
        columns = [sigma] if sigma.ndim == 1 else [sigma[:, 0], sigma[:, 4], sigma[:, -1]]
        for column in columns:
            free = column[column > 0]
            if len(free) == 0:
                continue
            for share in (0.1, 0.5, 0.9):
                below = float((free < density.quantile(torch.tensor(share))).float().mean())
                assert below == pytest.approx(share, abs=4 * (share * (1 - share) / len(free)) ** 0.5)
        if sigma.ndim == 2:
            assert sigma.shape == (4000, 8)
            middle = sigma[:, 3:6]  # neither known nor given in any of these
            rows = middle[:, 0].log() - middle[:, 0].log().mean(), middle[:, 2].log() - middle[:, 2].log().mean()
            alike = float((rows[0] * rows[1]).mean() / (rows[0].std() * rows[1].std()))
            expected = 0.0 if isinstance(levels, PerStep) or levels.levels == PerStep() else 1.0  # type: ignore[attr-defined]
            assert alike == pytest.approx(expected, abs=0.07)


def test_known_steps_are_at_zero_in_their_share_of_the_items() -> None:
    x0, generator = torch.zeros(2000, 1, 8), torch.Generator().manual_seed(0)
    known = Known(1, 2, 0.25)(LogNormal(), x0, generator) == 0
    assert known.any(1).float().mean() == pytest.approx(0.25, abs=0.04)  # 4 standard errors
    assert (known[known.any(1)] == torch.tensor([1, 0, 0, 0, 0, 0, 1, 1], dtype=torch.bool)).all()
    past = (Past(3, 0.75)(LogNormal(), x0, generator) == 0).sum(1)
    counts = torch.bincount(past, minlength=5) / 2000
    torch.testing.assert_close(counts, torch.tensor([0.25, 0.25, 0.25, 0.25, 0.0]), rtol=0, atol=0.04)


def test_a_known_step_reaches_the_network_clean_and_teaches_nothing() -> None:
    module, data = bare(levels=Known(2, 0, 1.0)), clips()
    module.losses(data, (0, 0, 0))
    seen, network = module.model.denoiser.backbone, module.model.denoiser
    c_in = network.precond(torch.zeros(()))[2]
    assert torch.equal(seen.x[:, :, :2], c_in * data["x"][:, :, :2])  # type: ignore[index, operator]
    assert seen.c_noise.shape == (64, 8)
    loss = module.losses(data, (0, 0, 0))["loss"]
    data["mask"] = torch.ones(64, 8, dtype=torch.bool)
    data["mask"][:, :2] = False
    assert torch.equal(module.losses(data, (0, 0, 0))["loss"], loss)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Known(0, 0), "first=0, last=0 must not be negative, nor both 0"),
    (lambda: Known(share=0.0), "share=0.0 must lie between"), (lambda: Past(0), "longest=0 must be at least 1"),
    (lambda: bare(levels=Known(4, 4)).losses(clips(), (0,))["loss"], "first=4, last=4 leave nothing unknown of 8"),
    (lambda: bare(levels=Past(8)).losses(clips(), (0,))["loss"], "longest=8 leaves nothing to continue in 8"),
    (lambda: bare(channels=2).losses(clips(), (0,))["loss"], "1 channels beyond the data's 1, which nothing trains"),
    (lambda: bare(variance=LearnedVariance()).losses(clips(), (0,))["loss"], "0 channels beyond x's 1"),
])  # fmt: skip
def test_levels_and_variances_that_make_no_sense_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_padding_counts_in_no_loss_in_the_space_of_the_latents_too() -> None:
    module, data = bare(), clips()
    data["mask"] = torch.ones(64, 8, dtype=torch.bool)
    whole = module.losses(data, (0, 0, 0))["loss"]
    data["mask"][:, 5:] = False
    loss = module.losses(data, (0, 0, 0))["loss"]
    assert loss != whole
    spoilt = data["x"].clone()
    spoilt[:, :, 5:] = 100.0
    assert torch.equal(module.losses({**data, "x": spoilt}, (0, 0, 0))["loss"], loss)

    data["mask"][:32] = False  # items of padding alone leave the batch's mean, rather than lower it
    half = float(module.losses(data, (0, 0, 0))["loss"])
    data["mask"] = data["mask"].flip(0)
    other = float(module.losses(data, (0, 0, 0))["loss"])
    assert (half + other) / 2 == pytest.approx(float(loss), rel=1e-5)
    data["mask"] |= data["mask"].flip(0)

    model = DiffusionModel(Given(), EDM(), autoencoder=Pool([2]))
    latent = DiffusionModule(model, LogNormal())
    # a latent step of 4 and 5 is half padding: it counts no more than 6 and 7
    halves = latent.losses({**data, "x": spoilt}, (0, 0, 0))["loss"]
    spoilt[:, :, 4] = -100.0
    assert torch.equal(latent.losses({**data, "x": spoilt}, (0, 0, 0))["loss"], halves)
    with pytest.raises(ValueError, match=r"mask has shape \(64, 7\)"):
        latent.losses({**data, "mask": data["mask"][:, :7]}, (0, 0, 0))


def test_the_learned_variance_adds_its_bound() -> None:
    table = DDPM(train_steps=50)
    losses = [
        float(bare(Table(table), Eps(table), 2, variance=LearnedVariance(table, scale)).losses(clips(), (0,))["loss"])
        for scale in (1e-9, 0.001, 0.002)
    ]
    plain = float(bare(Table(table), Eps(table)).losses(clips(), (0,))["loss"])
    assert losses[0] == pytest.approx(plain, rel=1e-5)
    assert losses[2] - losses[0] == pytest.approx(2 * (losses[1] - losses[0]), rel=1e-3)
    assert losses[1] > losses[0]


def test_learned_uncertainty_trains_with_the_model_and_is_not_exported(tmp_path: Path) -> None:
    module = make(density=LogUniform(0.01, 100.0), weighting=LearnedUncertainty(features=4))
    module.optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=0.01)
    trainer(max_steps=4).fit(module, loader())
    assert module.weighting.linear.weight.abs().sum() > 0
    state = module.state_dict()
    assert "weighting.linear.weight" in state
    sizes = {"axes": 1, "in_channels": 1, "channels": 8, "multipliers": [1], "vector_width": 4}
    tree = {"class_path": "mmdiff.model.DiffusionModel", "init_args": {
        "backbone": {"class_path": "mmdiff.backbones.UNet", "init_args": sizes},
        "precond": {"class_path": "mmdiff.precond.EDM"},
        "conditioner": {
            "class_path": "mmdiff.conditioning.Label", "init_args": {"key": "class", "classes": 3, "width": 4}
        },
    }}  # fmt: skip
    torch.save({"config": {"model": {"init_args": {"model": tree}}}, "state_dict": state}, tmp_path / "x.ckpt")
    exported = load(export_model(tmp_path / "x.ckpt", tmp_path / "m", half=False))
    for name, value in module.model.state_dict().items():
        assert torch.equal(exported.state_dict()[name], value)


YAML = """
model:
  class_path: mmdiff.module.DiffusionModule
  init_args:
    model:
      class_path: mmdiff.model.DiffusionModel
      init_args:
        backbone: {class_path: mmdiff.backbones.UNet, init_args: {axes: 1, in_channels: 1, channels: 8}}
        precond: {class_path: mmdiff.precond.Flow}
    density: {class_path: mmdiff.density.LogNormal}
    LINE
"""


@pytest.mark.parametrize(("line", "name", "expected"), [
    ("weighting: {class_path: mmdiff.weighting.MinSNR, init_args: {gamma: 3.0}}", "weighting", MinSNR(3.0)),
    ("distance: {class_path: mmdiff.weighting.PseudoHuber, init_args: {c: 0.1}}", "distance", PseudoHuber(0.1)),
    ("levels: {class_path: mmdiff.levels.Past, init_args: {longest: 4}}", "levels", Past(4)),
    ("levels: {class_path: mmdiff.levels.Known, init_args: {levels: {class_path: mmdiff.levels.PerStep}}}", "levels",
     Known(levels=PerStep())),
    ("variance: {class_path: mmdiff.likelihood.LearnedVariance, init_args: {bins: 256}}", "variance",
     LearnedVariance(bins=256)),
    ("weighting: {class_path: mmdiff.weighting.LearnedUncertainty, init_args: {features: 16}}", "weighting", None),
    ("weighting: {class_path: mmdiff.weighting.VLB, init_args: {table: {schedule: cosine}}}", "weighting", None),
], ids=["MinSNR", "PseudoHuber", "Past", "Known", "LearnedVariance", "LearnedUncertainty", "VLB"])  # fmt: skip
def test_each_part_of_the_loss_is_one_line_of_yaml(
    line: str, name: str, expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmdiff.cli import MmdiffCLI

    monkeypatch.setattr("sys.argv", ["mmdiff"])  # LightningCLI warns of arguments that it is given twice
    (tmp_path / "c.yaml").write_text(YAML.replace("LINE", line))
    cli = MmdiffCLI(
        pl.LightningModule, subclass_mode_model=True, auto_configure_optimizers=False, run=False,
        save_config_callback=None, args=["-c", str(tmp_path / "c.yaml")],
    )  # fmt: skip
    found = getattr(cli.model, name)
    assert f"mmdiff.{type(found).__module__.split('.')[1]}.{type(found).__name__}" in line
    assert expected is None or found == expected
    if name != "variance":  # whose backbone needs more channels
        assert cli.model.losses({"x": torch.randn(2, 1, 8)}, (0,))["loss"].isfinite()
