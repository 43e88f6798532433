"""Averages of the weights: several at once, beside the raw ones, whenever a checkpoint is written or resumed."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmdiff.autoencoder_module import AutoencoderModule
from mmdiff.callbacks import EMA, PowerFunction
from mmdiff.callbacks.ema import raw_weights
from mmdiff.checkpoint import AtomicCheckpointIO
from mmdiff.post_hoc import Profile
from tests.small_autoencoder import adversarial, loader, network, trainer


class Walk(pl.LightningModule):
    """A vector that each step moves by a batch's values; `dtype` of the weights."""

    def __init__(self, dtype: torch.dtype = torch.float32, tied: bool = False) -> None:
        super().__init__()
        self.a = nn.Linear(3, 1, bias=False, dtype=dtype)
        self.b = nn.Linear(3, 1, bias=True, dtype=dtype)
        if tied:
            self.b.weight = self.a.weight
        self.validated: list[Tensor] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.b(batch.to(self.b.weight.dtype)).sum() + self.a(batch.to(self.a.weight.dtype)).sum()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.validated.append(self.a.weight.detach().clone())

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


class Recorder(pl.Callback):
    """The raw weights after every optimizer step."""

    def __init__(self) -> None:
        self.steps: dict[int, dict[str, Tensor]] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step:  # else gradients are still being accumulated for the first
            self.steps[trainer.global_step] = {n: p.detach().clone() for n, p in pl_module.named_parameters()}


def data(n: int = 12) -> DataLoader[Any]:
    return DataLoader(torch.randn(n, 3, generator=torch.Generator().manual_seed(3)), batch_size=1)


def brute(steps: dict[int, dict[str, Tensor]], width: float, name: str) -> Tensor:
    """The power-function average of the stored weights, as the sum that defines it, in float64."""
    shares = Profile(width, len(steps)).shares(1, len(steps))
    return sum(share * weights[name].double() for share, weights in zip(shares, steps.values(), strict=True))  # type: ignore[return-value]


def expect_near(found: Tensor, wanted: Tensor, tolerance: float = 2e-7) -> None:
    torch.testing.assert_close(found.double(), wanted.double(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_several_averages_at_once_are_their_sums_over_all_steps(accumulate: int) -> None:
    recorder, module = Recorder(), Walk()
    emas = [EMA(0.9), EMA(PowerFunction(0.05)), EMA(PowerFunction(0.2))]
    run = trainer(callbacks=[recorder, *emas], max_epochs=3, accumulate_grad_batches=accumulate)
    run.fit(module, data(), data(1))
    assert len(recorder.steps) == 36 // accumulate
    for ema in emas[1:]:
        for name in ema.average:
            assert isinstance(ema.decay, PowerFunction)
            expect_near(ema.average[name], brute(recorder.steps, ema.decay.width, name))
    decayed = Walk().a.weight.detach() * 0 + recorder.steps[1]["a.weight"] * 0
    before = 1.0
    for n, weights in recorder.steps.items():
        d = min(0.9, (1 + n) / (10 + n))
        decayed, before = d * decayed + (1 - d) * weights["a.weight"], before * d
    torch.manual_seed(0)  # the weights the module began with
    expect_near(emas[0].average["a.weight"], decayed + before * Walk().a.weight.detach())
    # Validation used the first, and the raw weights are back, bit for bit.
    assert torch.equal(module.validated[-1], emas[0].average["a.weight"])
    assert all(torch.equal(p, recorder.steps[run.global_step][name]) for name, p in module.named_parameters())


def test_several_averages_are_saved_and_resumed_each_for_itself(tmp_path: Path) -> None:
    def run(epochs: int, ckpt: Path | None, *emas: EMA) -> pl.Trainer:
        torch.manual_seed(0)
        fit = trainer(callbacks=list(emas), max_epochs=epochs, plugins=[AtomicCheckpointIO()])
        fit.fit(Walk(), data(), ckpt_path=ckpt)
        return fit

    whole = [EMA(0.9), EMA(PowerFunction(0.1))]
    run(3, None, *whole)
    run(1, None, EMA(0.9), EMA(PowerFunction(0.1))).save_checkpoint(tmp_path / "x.ckpt")
    parts = [EMA(PowerFunction(0.1)), EMA(0.9), EMA(0.5)]  # in another order, and one more
    with pytest.warns(UserWarning, match="has no average decay=0.5; it begins with the checkpoint's weights"):
        run(3, tmp_path / "x.ckpt", *parts)
    assert all(torch.equal(whole[1].average[name], value) for name, value in parts[0].average.items())
    assert all(torch.equal(whole[0].average[name], value) for name, value in parts[1].average.items())
    assert (parts[2].updates, parts[1].updates) == (24, 36)


class SaveInside(pl.Callback):
    """Writes a checkpoint in the middle of a validation, and samples from each kind of weights."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seen: dict[str, Tensor] = {}

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.save_checkpoint(self.path)
        emas = [callback for callback in trainer.callbacks if isinstance(callback, EMA)]
        module: Any = pl_module
        for name, ema in zip(("first", "second"), emas, strict=True):
            with ema.applied(pl_module):
                self.seen[name] = module.a.weight.detach().clone()
        with raw_weights(pl_module):
            self.seen["raw"] = module.a.weight.detach().clone()
        self.seen["after"] = module.a.weight.detach().clone()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_in_the_middle_of_a_validation_holds_raw_weights_and_averages(
    tmp_path: Path, dtype: torch.dtype, tied: bool
) -> None:
    module, save, emas = Walk(dtype, tied), SaveInside(tmp_path / "x.ckpt"), [EMA(0.9), EMA(PowerFunction(0.1))]
    run = trainer(callbacks=[*emas, save], max_epochs=2, plugins=[AtomicCheckpointIO()])
    run.fit(module, data(), data(1))
    state = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in state["state_dict"].items())
    for ema in emas:
        saved = state["callbacks"][ema.state_key]["average"]
        assert all(torch.equal(saved[name], value) for name, value in ema.average.items())
        assert saved["a.weight"].dtype == torch.float32  # a step of 0.001 would be lost in bfloat16
    assert torch.equal(save.seen["first"], emas[0].average["a.weight"].to(dtype))
    assert torch.equal(save.seen["second"], emas[1].average["a.weight"].to(dtype))
    assert torch.equal(save.seen["raw"], module.a.weight)
    assert torch.equal(save.seen["after"], save.seen["first"])
    assert not torch.equal(save.seen["first"], save.seen["raw"])


def test_averages_stand_in_without_a_second_copy_of_the_weights() -> None:
    ema, module = EMA(0.9), Walk()
    trainer(callbacks=[ema]).fit(module, data())
    tensors = {ema.average[name].data_ptr() for name in ema.average} | {p.data_ptr() for p in module.parameters()}
    with ema.applied(module):
        held = {value.data_ptr() for part in (ema.average, ema.raw) for value in part.values()}
        assert held == tensors


def test_test_and_validate_use_the_average_of_the_checkpoint(tmp_path: Path) -> None:
    ema = EMA(0.9)
    first = trainer(callbacks=[ema], plugins=[AtomicCheckpointIO()])
    first.fit(Walk(), data())
    first.save_checkpoint(tmp_path / "x.ckpt")
    module = Walk()
    trainer(callbacks=[EMA(0.5)], plugins=[AtomicCheckpointIO()]).test(
        module, data(1), ckpt_path=tmp_path / "x.ckpt", verbose=False
    )
    assert torch.equal(module.validated[-1], ema.average["a.weight"])
    assert not torch.equal(module.a.weight, ema.average["a.weight"])


def test_a_run_that_trains_other_parameters_is_refused_when_it_resumes(tmp_path: Path) -> None:
    first = trainer(callbacks=[EMA(0.9)], plugins=[AtomicCheckpointIO()])
    first.fit(Walk(), data())
    first.save_checkpoint(tmp_path / "x.ckpt")
    module = Walk()
    module.b.requires_grad_(False)
    with pytest.raises(ValueError, match=r"average \(decay=0.9\) is of other parameters .* b.bias"):
        trainer(callbacks=[EMA(0.9)], plugins=[AtomicCheckpointIO()], max_epochs=2).fit(
            module, data(), ckpt_path=tmp_path / "x.ckpt"
        )


def test_averages_of_an_autoencoder_and_its_discriminator_count_the_models_steps() -> None:
    recorder, ema = Recorder(), EMA(PowerFunction(0.1))
    module = AutoencoderModule(network(), adversarial=adversarial(start=1), accumulate=2)
    trainer(callbacks=[recorder, ema], max_epochs=2).fit(module, loader(12), loader(4))
    assert ema.updates == 6
    for name in ("model.encoder.0.weight", "adversarial.discriminators.0.net.0.weight"):
        name = next(n for n in ema.average if n.split(".")[:2] == name.split(".")[:2])
        expect_near(ema.average[name], brute(recorder.steps, 0.1, name))


@pytest.mark.parametrize("width", [0.0, 0.3, float("nan")])
def test_a_width_outside_its_range_is_refused(width: float) -> None:
    with pytest.raises(ValueError, match=f"width={width} must be above 0 and at most 0.2887"):
        EMA(PowerFunction(width))


def test_only_power_functions_are_kept() -> None:
    with pytest.raises(ValueError, match="keep_every=0 must be at least 1"):
        EMA(PowerFunction(0.1), keep_every=0)
    with pytest.raises(ValueError, match="keep_every=5 is for averages of a PowerFunction, not of decay=0.999"):
        EMA(keep_every=5)
