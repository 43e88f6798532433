"""The average of the weights."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmdiff.callbacks import EMA
from mmdiff.checkpoint import AtomicCheckpointIO


class Counter(pl.LightningModule):
    """One weight that goes up by 1 with every optimizer step, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.frozen = nn.Parameter(torch.full((1,), 7.0), requires_grad=False)
        self.validated: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return -self.weight.sum()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.validated.append(float(self.weight))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.weight], lr=1.0)


def trainer(**settings: Any) -> pl.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(accelerator="cpu", num_sanity_val_steps=0, **{**quiet, **settings})


def averages(steps: int, decay: float) -> list[float]:
    average, result = 0.0, []
    for n in range(1, steps + 1):
        d = min(decay, (1 + n) / (10 + n))
        average = d * average + (1 - d) * n
        result.append(average)
    return result


def ones(n: int) -> DataLoader[Any]:
    return DataLoader(torch.ones(n, 1))


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.99])
def test_average_is_its_recursion_and_validation_uses_it(decay: float) -> None:
    ema, module = EMA(decay), Counter()
    trainer(max_epochs=3, callbacks=[ema]).fit(module, ones(2), ones(1))
    expected = averages(6, decay)
    assert float(ema.average["weight"]) == pytest.approx(expected[-1], rel=1e-5)
    assert module.validated == pytest.approx(expected[1::2], rel=1e-5)
    assert float(module.weight) == 6  # the raw weight is back
    assert set(ema.average) == {"weight"}


def test_average_counts_optimizer_steps_not_batches() -> None:
    ema = EMA(0.3)
    trainer(max_epochs=1, accumulate_grad_batches=2, callbacks=[ema]).fit(Counter(), ones(4))
    assert float(ema.average["weight"]) == pytest.approx(averages(2, 0.3)[-1])


def test_checkpoint_holds_raw_weights_and_average_and_resumes(tmp_path: Path) -> None:
    ema, module = EMA(0.9), Counter()
    first = trainer(max_epochs=2, callbacks=[ema], plugins=[AtomicCheckpointIO()])
    first.fit(module, ones(2), ones(1))
    first.save_checkpoint(tmp_path / "last.ckpt")
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert float(saved["state_dict"]["weight"]) == 4
    (state,) = saved["callbacks"].values()
    assert float(state["average"]["weight"]) == pytest.approx(averages(4, 0.9)[-1], rel=1e-5)

    ema, module = EMA(0.9), Counter()
    more = trainer(max_epochs=3, callbacks=[ema], plugins=[AtomicCheckpointIO()])
    more.fit(module, ones(2), ones(1), ckpt_path=tmp_path / "last.ckpt")
    assert float(ema.average["weight"]) == pytest.approx(averages(6, 0.9)[-1], rel=1e-5)
    trainer(callbacks=[EMA()], plugins=[AtomicCheckpointIO()]).validate(
        module, ones(1), ckpt_path=tmp_path / "last.ckpt", verbose=False
    )
    assert module.validated[-1] == pytest.approx(averages(4, 0.9)[-1], rel=1e-5)
    assert float(module.weight) == 4


def test_raw_weights_come_back_after_an_exception() -> None:
    ema, module = EMA(0.9), Counter()
    ema.average = {"weight": torch.full((1,), 5.0)}
    with pytest.raises(KeyError), ema.applied(module):
        assert float(module.weight) == 5
        raise KeyError
    assert float(module.weight) == 0

    class Broken(Counter):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            raise RuntimeError("broken")

    broken = Broken()
    with pytest.raises(RuntimeError, match="broken"):
        trainer(max_epochs=1, callbacks=[EMA(0.9)]).fit(broken, ones(2), ones(1))
    assert float(broken.weight) == 2


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_decay_outside_its_range_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=f"decay={decay} must be at least 0 and below 1"):
        EMA(decay)
