"""What is not finite never reaches a weight, an average or a checkpoint, in any process, and its batch is kept."""

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmdiff.autoencoder import ConvKL
from mmdiff.autoencoder_module import AutoencoderModule
from mmdiff.backbones import UNet
from mmdiff.callbacks import EMA, Checkpoints, FiniteSteps
from mmdiff.checkpoint import AtomicCheckpointIO
from mmdiff.density import LogNormal
from mmdiff.exits import NonFiniteError
from mmdiff.model import DiffusionModel
from mmdiff.module import DiffusionModule
from mmdiff.precond import EDM
from tests.survivors import FRAMES, assert_same, fit, log, write_config

BAD = 4  # the batch, counted from 0, in which something is not finite


class Half(torch.autograd.Function):
    """The identity, whose gradient is not finite where it is told so."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bad: bool) -> Tensor:
        ctx.bad = bad
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * (math.inf if ctx.bad else 1.0), None


class Hurt(nn.Module):
    """A layer whose output, or gradient, or only one value of it that the loss never sees, is not finite at times."""

    def __init__(self, layer: nn.Module, how: str) -> None:
        super().__init__()
        self.layer, self.how, self.bad = layer, how, False

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        out = self.layer(*args, **kwargs)
        if self.how == "activation" and self.bad:
            out = torch.cat([out[:, :1] * math.nan, out[:, 1:]], dim=1)
        if self.how == "hidden activation" and self.bad:  # the loss is finite, the gradient is not
            out = torch.where(torch.ones_like(out).bool(), out, out / 0)
            out = out + (out.detach() * 0 + out * 0).sqrt() * 0
        return Half.apply(out, self.how == "gradient" and self.bad)


class Foreign(pl.LightningModule):
    """Somebody's module, whose loss can be infinite without a gradient that shows it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.net, self.how = Hurt(nn.Linear(4, 4), how), how

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.net.bad = bool(batch["bad"][0])
        loss = self.net(batch["x"].flatten(1)[:, :4]).square().mean()
        return loss + (math.inf if self.how == "loss" and self.net.bad else 0.0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Hurting(pl.Callback):
    def __init__(self, hurt: Hurt) -> None:
        self.hurt = hurt

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.hurt.bad = bool(batch["bad"][0])


def batches(how: str) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    rows = [
        {"x": torch.randn(2, 4, 4, generator=generator), "bad": torch.tensor(i == BAD), "caption": f"clip {i}"}
        for i in range(8)
    ]
    if how == "data":
        rows[BAD]["x"][0, 0, 0] = math.nan
    return DataLoader(rows, batch_size=1)  # type: ignore[arg-type]


def module_of(kind: str, how: str) -> tuple[pl.LightningModule, list[pl.Callback]]:
    torch.manual_seed(1)
    if kind == "foreign":
        return Foreign(how), []
    if kind == "diffusion":
        backbone = UNet(2, in_channels=2, channels=4, multipliers=[1], head_channels=4)
        backbone.stem = hurt = Hurt(backbone.stem, how)
        module: pl.LightningModule = DiffusionModule(DiffusionModel(backbone, EDM()), LogNormal())
    else:
        model = ConvKL(2, 2, [[1, 1]], width=4)
        model.encoder[0] = hurt = Hurt(model.encoder[0], how)  # type: ignore[index,operator]
        module = AutoencoderModule(model, accumulate=2)
    return module, [Hurting(hurt)]


def trained(module: pl.LightningModule, root: Path, how: str, callbacks: list[pl.Callback], **options: Any) -> EMA:
    ema = EMA(0.5)
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, default_root_dir=root, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[*callbacks, ema], plugins=options.pop("plugins", [AtomicCheckpointIO()]),
        **options,
    )  # fmt: skip
    trainer.fit(module, batches(how))
    return ema


CASES = [(kind, how) for kind in ("diffusion", "autoencoder") for how in ("data", "activation", "gradient")]
CASES += [("foreign", how) for how in ("data", "loss", "gradient", "hidden activation")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "how"), CASES)
def test_the_step_is_stopped_and_its_batch_kept(tmp_path: Path, kind: str, how: str) -> None:
    steps = BAD // 2
    accumulate = {} if kind == "autoencoder" else {"accumulate_grad_batches": 2}
    module, hurting = module_of(kind, "none")
    before = trained(module, tmp_path / "before", "none", [*hurting, Checkpoints()], max_steps=steps, **accumulate)
    hurt, hurting = module_of(kind, how)
    saves = Checkpoints(minutes=None, steps=1, keep=9)
    callbacks = [*hurting, FiniteSteps(), saves]
    with pytest.raises(NonFiniteError, match=rf"is not finite at step {steps}; the weights are as they were"):
        trained(hurt, tmp_path, how, callbacks, **accumulate)
    weights = {name.replace(".layer", ""): value for name, value in hurt.state_dict().items()}
    if kind != "autoencoder":  # whose latents' mean and deviation are not trained, but estimated in the forward pass
        assert_same(weights, {name.replace(".layer", ""): value for name, value in module.state_dict().items()})
    assert all(value.isfinite().all() for name, value in hurt.named_parameters())
    newest = sorted((tmp_path / "checkpoints").iterdir())[-1]
    assert newest.name == f"resume-{steps}.ckpt"
    checkpoint = AtomicCheckpointIO().load_checkpoint(newest)
    [average] = [state["average"] for name, state in checkpoint["callbacks"].items() if "EMA" in name]
    assert_same(
        {k.replace(".layer", ""): v for k, v in average.items()},
        {k.replace(".layer", ""): v for k, v in before.average.items()},
    )
    kept = torch.load(tmp_path / "bad_batch.pt", weights_only=True)
    assert [batch["batch"]["caption"] for batch in kept["batches"]][:1] == [[f"clip {BAD}"]]
    assert (kept["step"], kept["epoch"]) == (steps, 0)
    if how in ("data", "activation", "loss"):
        assert "the loss" in kept["reason"]


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    """By whatever way they came there."""

    class Break(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                pl_module.net.layer.weight.data[0, 0] = math.inf

    callbacks = [FiniteSteps(), Break(), Checkpoints(minutes=None, steps=1)]
    with pytest.raises(
        NonFiniteError, match=r"net.layer.weight has 1 values that are not finite at step 3: no checkpoint"
    ):
        trained(Foreign("none"), tmp_path, "none", callbacks)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["resume-1.ckpt", "resume-2.ckpt"]


class Scaled(Foreign):
    """Whose gradient overflows where the scale of the loss is above `limit`."""

    def __init__(self, limit: float) -> None:
        super().__init__("none")
        self.limit, self.scales = limit, list[float]()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        scaler: Any = self.trainer.precision_plugin.scaler  # type: ignore[attr-defined]
        self.scales.append(scaler.get_scale())
        self.net.how, self.net.bad = "gradient", self.scales[-1] > self.limit
        return self.net(batch["x"].flatten(1)[:, :4]).square().mean()


def mixed(scale: float) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2))


@pytest.mark.filterwarnings("ignore")
def test_the_scaler_leaves_out_steps_until_its_scale_is_one_and_goes_on_exactly(tmp_path: Path) -> None:
    whole = Scaled(8.0)
    saves = Checkpoints(minutes=None, steps=1, keep=9)
    trained(whole, tmp_path, "none", [FiniteSteps(), saves], plugins=[AtomicCheckpointIO(), mixed(32.0)])
    assert whole.scales == [32.0, 16.0, 8.0, 8.0, 16.0, 8.0, 8.0, 16.0], (
        "halved at an overflow, doubled after two steps"
    )
    for step in (1, 4, 7):
        again = Scaled(8.0)
        trainer = pl.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, default_root_dir=tmp_path / "again", callbacks=[EMA(0.5)],
            enable_progress_bar=False, enable_model_summary=False, plugins=[AtomicCheckpointIO(), mixed(4.0)],
        )  # fmt: skip
        path = tmp_path / "checkpoints" / f"resume-{step}.ckpt"
        state = AtomicCheckpointIO().load_checkpoint(path)
        assert state["MixedPrecision"]["scale"] == whole.scales[step]
        trainer.fit(again, batches("none"), ckpt_path=path, weights_only=True)
        assert again.scales[0] == whole.scales[step]
    with pytest.raises(NonFiniteError, match="the gradient is not finite at step"):
        trained(Scaled(0.0), tmp_path / "b", "none", [FiniteSteps()], plugins=[AtomicCheckpointIO(), mixed(4.0)])


def test_it_costs_little() -> None:
    """Beside a step: no state of its own grows."""
    callback = FiniteSteps()
    for index in range(100):
        callback.on_train_batch_start(_Trainer(0), Foreign("none"), {}, index)  # type: ignore[arg-type]
    assert len(callback.batches) == 16


class _Trainer:
    def __init__(self, step: int) -> None:
        self.global_step = step


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_command_exits_4_in_all_processes(tmp_path: Path, ranks: int) -> None:
    """One process has a loss that is not finite; its gradient is."""
    trainer = {"strategy": "ddp", "devices": 2} if ranks > 1 else {}
    path = write_config(tmp_path, "poisoned", FRAMES, saves={"steps": 1, "minutes": None}, max_steps=9, **trainer)
    assert path.is_file()
    assert fit(tmp_path, ranks=ranks) == [4] * ranks, log(tmp_path)
    run = tmp_path / "runs" / "lightning_logs" / "version_0"
    names = sorted(one.name for one in run.glob("bad_batch*"))
    assert names == (["bad_batch.pt"] if ranks == 1 else ["bad_batch-rank1.pt", "bad_batch.pt"])
    finite = [torch.load(run / name, weights_only=True)["batches"][0]["finite"] for name in reversed(names)]
    assert finite == ([False] if ranks == 1 else [True, False]), "the second process had it"
    assert sorted(one.name for one in (run / "checkpoints").iterdir()) == ["resume-1.ckpt", "resume-2.ckpt"]
