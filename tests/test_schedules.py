"""Learning rates by the step: their formulas, in trainings, and when a training is resumed."""

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmdiff.autoencoder_module import AutoencoderModule
from mmdiff.checkpoint import AtomicCheckpointIO
from mmdiff.schedules import Constant, Cosine, InverseSquareRoot, Schedule
from tests.small_autoencoder import adversarial, loader, network, trainer

MAKE = {
    "constant": lambda o: Constant(o, warmup=4),
    "cosine": lambda o: Cosine(o, steps=12, warmup=4, floor=0.1),
    "inverse square root": lambda o: InverseSquareRoot(o, hold=6, warmup=4),
}
WANTED = {
    "constant": lambda n: 1.0,
    "cosine": lambda n: 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (n - 4) / 8)) if 4 <= n < 12 else [1, 0.1][n >= 12],
    "inverse square root": lambda n: min(1.0, math.sqrt(6 / n)) if n else 1.0,
}


class Line(pl.LightningModule):
    """One weight with a loss of slope 1, whose optimizer has two groups; the rates that each step was taken at."""

    def __init__(self, scheduler: Any) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self.scheduler = scheduler
        self.rates: list[list[float]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.a + self.b).sum()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.rates.append([group["lr"] for group in optimizer.param_groups])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD([{"params": [self.a]}, {"params": [self.b], "lr": 0.05}], lr=0.5)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.scheduler(optimizer), "interval": "step"},
        }


def fit(scheduler: Any, steps: int, ckpt: Path | None = None, **settings: Any) -> tuple[Line, pl.Trainer]:
    module = Line(scheduler)
    run = trainer(max_steps=steps, max_epochs=None, plugins=[AtomicCheckpointIO()], **settings)
    run.fit(module, DataLoader(torch.zeros(60, 1), batch_size=1), ckpt_path=ckpt)
    return module, run


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("name", MAKE)
def test_each_optimizer_step_is_taken_at_its_rate(name: str, accumulate: int) -> None:
    module, _ = fit(MAKE[name], 15, accumulate_grad_batches=accumulate)
    share = [min(1, (n + 1) / 4) * WANTED[name](n) for n in range(15)]
    assert len(module.rates) == 15
    for (slow, fast), wanted in zip(((b, a) for a, b in module.rates), share, strict=True):
        assert (fast, slow) == (pytest.approx(0.5 * wanted), pytest.approx(0.05 * wanted))


@pytest.mark.parametrize("name", MAKE)
def test_a_run_that_is_resumed_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    whole, _ = fit(MAKE[name], 15)
    _, first = fit(MAKE[name], 7)
    first.save_checkpoint(tmp_path / "x.ckpt")
    rest, _ = fit(MAKE[name], 15, tmp_path / "x.ckpt")
    assert rest.rates == whole.rates[7:]
    assert torch.equal(rest.a, whole.a)


def test_resuming_with_another_schedule_goes_on_with_that_one_at_the_same_step(tmp_path: Path) -> None:
    _, first = fit(MAKE["cosine"], 7)
    first.save_checkpoint(tmp_path / "x.ckpt")
    longer, _ = fit(lambda o: Cosine(o, steps=24), 15, tmp_path / "x.ckpt")
    assert [rates[0] for rates in longer.rates] == pytest.approx(
        [0.5 * 0.5 * (1 + math.cos(math.pi * n / 24)) for n in range(7, 15)]
    )


def test_an_autoencoder_steps_the_schedules_of_both_optimizers() -> None:
    module = AutoencoderModule(
        network(), adversarial=adversarial(start=2), scheduler=lambda o: Cosine(o, steps=10, warmup=2), accumulate=2
    )
    run = trainer(max_epochs=2)
    run.fit(module, loader(12), loader(4))
    rates = [optimizer.param_groups[0]["lr"] for optimizer in run.optimizers]
    assert run.global_step == 6
    assert rates == pytest.approx([1e-3 * Cosine.factor(run.lr_scheduler_configs[0].scheduler, n) for n in (6, 4)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda o: Constant(o, warmup=-1), "warmup=-1 is below 0"),
        (lambda o: Cosine(o, steps=10, warmup=10), "warmup=10 must be from 0 up to, but not, steps=10"),
        (lambda o: Cosine(o, steps=10, floor=1.5), "floor=1.5 must be from 0 to 1"),
        (lambda o: InverseSquareRoot(o, hold=5, warmup=6), "hold=5 must be at least 1 and no earlier"),
    ],
)
def test_wrong_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0))


def test_the_warm_up_is_even_and_reaches_the_rate() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=8.0)
    schedule: Schedule = Constant(optimizer, warmup=8)
    rates = []
    for _ in range(9):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == [1, 2, 3, 4, 5, 6, 7, 8, 8]
