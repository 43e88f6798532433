"""Learning rates over the steps of a training: a warm-up, then constant, cosine or inverse square root.

A schedule is a torch LRScheduler: a factor of each group's own rate, and a function of the step alone. So a run that is
resumed goes on exactly, and one that is resumed with another schedule goes on with that one, at the same step.
"""

import math
from abc import abstractmethod
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class Schedule(LRScheduler):
    """Rate of each group times `factor(n)` at optimizer step n, from 0 on. The first `warmup` steps rise evenly to it.

    Raises ValueError for a warm-up below 0.
    """

    def __init__(self, optimizer: Optimizer, warmup: int = 0) -> None:
        if warmup < 0:
            raise ValueError(f"warmup={warmup} is below 0; it is a number of optimizer steps")
        self.warmup = warmup
        super().__init__(optimizer)

    @abstractmethod
    def factor(self, n: int) -> float:
        """Share of the rate at step n, but for the warm-up."""

    def get_lr(self) -> list[float | Tensor]:
        rise = min(1.0, (self.last_epoch + 1) / self.warmup) if self.warmup else 1.0
        share = rise * self.factor(self.last_epoch)
        return [base * share for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.last_epoch, "_step_count": self._step_count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_epoch, self._step_count = state_dict["last_epoch"], state_dict["_step_count"]
        self._last_lr = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate


class Constant(Schedule):
    """The full rate after the warm-up."""

    def factor(self, n: int) -> float:
        return 1.0


class Cosine(Schedule):
    """Half a cosine from the full rate, after the warm-up, to `floor` of it at `steps` and later (arXiv 1608.03983).

    steps: optimizer steps of the whole training, those of the warm-up included. floor: share of the rate that is left.
    """

    def __init__(self, optimizer: Optimizer, steps: int, warmup: int = 0, floor: float = 0.0) -> None:
        if not 0 <= warmup < steps:
            raise ValueError(f"warmup={warmup} must be from 0 up to, but not, steps={steps}")
        if not 0 <= floor <= 1:
            raise ValueError(f"floor={floor} must be from 0 to 1: the share of the rate that is left at the end")
        self.steps, self.floor = steps, floor
        super().__init__(optimizer, warmup)

    def factor(self, n: int) -> float:
        done = min(1.0, max(0, n - self.warmup) / (self.steps - self.warmup))
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * done))


class InverseSquareRoot(Schedule):
    """The full rate up to step `hold`, then falling as sqrt(hold / n), for a training of no fixed length.

    With hold = warmup this is the schedule of the first transformer (arXiv 1706.03762); with a later one that of
    Karras et al. 2024, arXiv 2312.02696. Raises ValueError where the rate would fall before the warm-up is over.
    """

    def __init__(self, optimizer: Optimizer, hold: int, warmup: int = 0) -> None:
        if hold < max(1, warmup):
            raise ValueError(f"hold={hold} must be at least 1 and no earlier than the end of warmup={warmup}")
        self.hold = hold
        super().__init__(optimizer, warmup)

    def factor(self, n: int) -> float:
        return math.sqrt(self.hold / max(n, self.hold))
