"""Faults in what follows a gradient: it is clipped in every step, or no average follows the weights."""

import statistics
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from ..callbacks.ema import EMA
from .check import Check, Finding, Run, local

EARLY, CLIPPED = 50, 40  # steps that may be as steep as they like, and those after them that are judged
ABOVE = 25.0  # times the limit; an autoencoder's sums of losses may well be 10 times above a limit of 1
PROBES, VALUES = 16, 256
DUE = 40  # steps


class Clipped(Check):
    """A limit of the gradient's norm so low that every step is cut by far."""

    def begin(self, run: Run) -> Iterable[Finding]:
        self.seen: dict[int, int] = {}  # gradients of each optimizer
        self.norms: dict[int, list[float]] = {}
        self.told = False
        return ()

    def gradients(self, run: Run, optimizer: torch.optim.Optimizer) -> Iterable[Finding]:
        limit = run.trainer.gradient_clip_val or getattr(run.module, "clip", None)
        by_value = run.trainer.gradient_clip_algorithm == "value"
        if self.told or by_value or not isinstance(limit, (int, float)) or not limit > 0:
            return
        self.seen[id(optimizer)] = seen = self.seen.get(id(optimizer), 0) + 1
        if seen <= EARLY:
            return
        norms = self.norms.setdefault(id(optimizer), [])
        gradients = [local(p.grad) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(get_total_norm(gradients)))
        if norms[-1] <= limit or len(norms) >= CLIPPED:
            self.told = True
        middle = statistics.median(norms)
        if len(norms) >= CLIPPED and min(norms) > limit and middle > ABOVE * limit:
            yield Finding(
                "gradient always clipped",
                f"each of {len(norms)} gradients was cut to the norm {limit:g}; they have {middle:.3g} in the middle, "
                "so the limit decides the step and not the gradient",
                f"Raise gradient_clip_val (an AutoencoderModule's clip) to about {2 * middle:.2g}",
            )


class Averages(Check):
    """An EMA that does not follow the weights."""

    def begin(self, run: Run) -> Iterable[Finding]:
        self.emas = [callback for callback in run.trainer.callbacks if isinstance(callback, EMA)]  # type: ignore[attr-defined]
        weights = [(name, p) for name, p in run.module.named_parameters() if p.requires_grad and p.numel()]
        self.names = [name for name, _ in weights[:: max(1, len(weights) // PROBES)]]
        self.weights = self._values(dict(weights))
        self.averages = [self._values(ema.average) for ema in self.emas]
        self.done = not self.emas
        return ()

    def step(self, run: Run) -> Iterable[Finding]:
        if self.done or not run.due(DUE):
            return
        self.done = True
        weights = self._values(dict(run.module.named_parameters()))
        for ema, before in zip(self.emas, self.averages, strict=True):
            now = self._values(ema.average)
            moved = [float((weights[n] - self.weights[n]).norm()) for n in self.names]
            followed = [float((now[n] - before[n]).norm()) if n in now and n in before else 0.0 for n in self.names]
            if sum(moved) > 0 and sum(followed) < 1e-4 * sum(moved):
                yield Finding(
                    "EMA not updated",
                    f"in {run.steps} steps the weights moved and the average of {type(ema).__name__} did not",
                    "Look at its decay (0.999 averages over some 1,000 steps) and at whether its hooks are called: an "
                    "overriding on_train_batch_end must call super's",
                )

    def _values(self, tensors: dict[str, Any]) -> dict[str, Tensor]:
        return {
            name: local(tensors[name]).reshape(-1)[:VALUES].float().clone() for name in self.names if name in tensors
        }
