"""Faults of the weights: frozen, unused, moving too fast, too slowly or not at all."""

import statistics
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..autoencoder_module import AutoencoderModule
from ..backbones import ControlNet
from ..module import DiffusionModule
from ..parameters import matches
from ..text import PretrainedText
from .check import Check, Finding, Run, local, named

PROBES, VALUES = 32, 1024  # tensors that are watched, and values of each
DUE = 8  # steps
FAST, SLOW = 0.2, 1e-3  # of its size a weight moves in a step, in the middle, at the highest rate of the schedule
FAINT = 1e-7  # of a gradient; Adam's eps is 1e-8
LOST = 0.5  # of values that stay as they are, or of gradients that are zero


UNDERFLOW = "precision underflow"
MIXED = "Keep the weights in float32: trainer.precision bf16-mixed or 16-mixed in the place of bf16-true or 16-true"


class Frozen(Check):
    """Parameters that should train and do not: frozen with nothing loaded into them, or in no optimizer."""

    def begin(self, run: Run) -> Iterable[Finding]:
        names = {id(p): name for name, p in run.module.named_parameters()}
        given = {
            id(p) for optimizer in run.trainer.optimizers for group in optimizer.param_groups for p in group["params"]
        }
        lost = [name for name, p in run.module.named_parameters() if p.requires_grad and id(p) not in given]
        name, cure = "frozen parameters", "Unfreeze them (requires_grad_), or give them to the optimizer"
        if lost:
            yield Finding(name, f"{len(lost)} parameters need a gradient and are in no optimizer: {named(lost)}", cure)
        asked = run.module.groups.frozen if isinstance(run.module, DiffusionModule | AutoencoderModule) else []
        still = [names[id(p)] for p in should_train(run.module) if not p.requires_grad]
        still = [each for each in still if not matches(each, asked)]
        if still and not run.resumed and run.arguments("model", "init_args", "start_from") is None:
            yield Finding(
                name,
                f"{len(still)} of {len(names)} parameters are frozen as they were drawn at random: {named(still)}",
                f"{cure}; to fine-tune others, load trained weights first (start_from) and name these in groups.frozen",
            )


def should_train(module: nn.Module) -> list[nn.Parameter]:
    """Parameters of a module of ours that nothing but its training gives values to."""
    parts: list[nn.Module | None]
    if isinstance(module, DiffusionModule):
        parts = [module.model.denoiser, module.model.conditioner]
    elif isinstance(module, AutoencoderModule):
        parts = [module.model, module.adversarial]
    else:
        return []
    loaded = {
        id(p)
        for part in module.modules()
        if isinstance(part, (PretrainedText, ControlNet))
        for p in (part.backbone if isinstance(part, ControlNet) else part).parameters()
    }
    return [p for part in parts if part is not None for p in part.parameters() if id(p) not in loaded]


class Unused(Check):
    """Parameters of an optimizer that no loss depends on."""

    def begin(self, run: Run) -> Iterable[Finding]:
        self.used: set[int] = set()
        self.steps: dict[int, int] = {}  # of each optimizer
        self.told: set[int] = set()
        return ()

    def gradients(self, run: Run, optimizer: torch.optim.Optimizer) -> Iterable[Finding]:
        if id(optimizer) in self.told:
            return
        self.steps[id(optimizer)] = self.steps.get(id(optimizer), 0) + 1
        for group in optimizer.param_groups:
            self.used |= {id(p) for p in group["params"] if p.grad is not None}
        if self.steps[id(optimizer)] < DUE and not run.due(DUE):
            return
        self.told.add(id(optimizer))
        names = {id(p): name for name, p in run.module.named_parameters()}
        unused = [
            names.get(id(p), "a parameter")
            for group in optimizer.param_groups
            for p in group["params"]
            if p.requires_grad and id(p) not in self.used
        ]
        if unused:
            yield Finding(
                "unused parameters",
                f"{len(unused)} parameters got no gradient in {self.steps[id(optimizer)]} steps: {named(unused)}",
                "Remove them, or look at where the network should call them and does not",
            )


class Probe:
    """Some values of a parameter, to see how they move."""

    def __init__(self, name: str, parameter: nn.Parameter) -> None:
        self.name, self.parameter = name, parameter
        self.size = float(self._part(parameter).float().norm())
        self.before = self._part(parameter).clone()
        self.gradient: Tensor | None = None

    def _part(self, value: Tensor) -> Tensor:
        flat = local(value).reshape(-1)
        return flat[:: max(1, len(flat) // VALUES)]

    def hold(self) -> None:
        """Notes the gradient, and the values before the step."""
        gradient = self.parameter.grad
        self.gradient = None if gradient is None else self._part(gradient).clone()
        self.before = self._part(self.parameter).clone()

    def moved(self) -> float:
        """By how much of its size before training, in the step since `hold`."""
        return float((self._part(self.parameter).float() - self.before.float()).norm()) / self.size

    def lost(self) -> float:
        """Share of the values with a gradient that the step left as they were."""
        assert self.gradient is not None
        driven = self.gradient != 0
        return float((self._part(self.parameter) == self.before)[driven].float().mean()) if bool(driven.any()) else 0.0


class Moving(Check):
    """A learning rate far from what the weights' sizes ask for, and steps that their precision swallows.

    The rate is judged at the highest that the schedule comes to, so that a warm-up is not too low. Fine-tuning, which
    may be as slow as it likes, is a run with `start_from`, or a resumed one.
    """

    def begin(self, run: Run) -> Iterable[Finding]:
        self.probes: dict[int, list[Probe]] = {}
        self.moves: dict[int, list[float]] = {}
        self.zeros: dict[int, list[float]] = {}
        self.losses: dict[int, list[float]] = {}
        self.held: torch.optim.Optimizer | None = None
        self.told: set[int] = set()
        self.tuned = run.resumed or run.arguments("model", "init_args", "start_from") is not None
        names = {id(p): name for name, p in run.module.named_parameters()}
        for optimizer in run.trainer.optimizers:
            found = [
                Probe(names.get(id(p), "a parameter"), p)
                for group in optimizer.param_groups
                for p in group["params"]
                if p.requires_grad and p.ndim >= 2 and p.numel() and group["lr"] is not None
            ]
            found = [probe for probe in found if probe.size > 1e-6]  # what starts at zero has no size to move by
            self.probes[id(optimizer)] = found[:: max(1, len(found) // PROBES)]
            eps = optimizer.param_groups[0].get("eps")
            half = any(probe.parameter.dtype == torch.float16 for probe in found)
            if half and eps is not None and float(torch.tensor(eps, dtype=torch.float16)) == 0:
                yield Finding(
                    UNDERFLOW, f"the optimizer's eps={eps:g} is 0 in float16, in which the weights are", MIXED
                )

    def gradients(self, run: Run, optimizer: torch.optim.Optimizer) -> Iterable[Finding]:
        yield from self._judge(run)
        if id(optimizer) in self.told:
            return
        for probe in self.probes.get(id(optimizer), ()):
            probe.hold()
        self.held = optimizer

    def step(self, run: Run) -> Iterable[Finding]:
        yield from self._judge(run)

    def _judge(self, run: Run) -> Iterable[Finding]:
        """What came of the step that `gradients` saw begin."""
        optimizer, self.held = self.held, None
        if optimizer is None:
            return
        place, probes = id(optimizer), self.probes[id(optimizer)]
        driven = [probe for probe in probes if probe.gradient is not None]
        if not driven:
            return
        now, highest = rates(optimizer)
        # Behind a layer that is zero at first there is hardly a gradient, and nothing moves at any rate.
        moved = [p.moved() for p in driven if float(p.gradient.float().square().mean()) > FAINT**2]  # type: ignore[union-attr]
        if now > 0 and len(moved) >= min(3, len(driven)):
            self.moves.setdefault(place, []).append(statistics.median(moved) * highest / now)
        self.losses.setdefault(place, []).append(statistics.median(probe.lost() for probe in driven))
        self.zeros.setdefault(place, []).append(
            statistics.median(float((probe.gradient == 0).float().mean()) for probe in driven)  # type: ignore[union-attr]
        )
        if len(self.losses[place]) < DUE and not (run.last and len(self.losses[place]) >= 4):
            return
        self.told.add(place)
        yield from self._lost(run, place, driven) or self._rate(place, highest)

    def _lost(self, run: Run, place: int, probes: list[Probe]) -> list[Finding]:
        kept = statistics.median(self.losses[place][2:])
        half = [probe for probe in probes if probe.parameter.dtype in (torch.float16, torch.bfloat16)]
        if half and kept > LOST:
            dtype = str(half[0].parameter.dtype).removeprefix("torch.")
            return [Finding(
                UNDERFLOW,
                f"{kept:.0%} of the weights stay as they are in a step, which adds less than {dtype} can resolve",
                MIXED,
            )]  # fmt: skip
        zero = statistics.median(self.zeros[place][2:])
        if str(run.trainer.precision).startswith("16") and zero > LOST:
            return [Finding(
                UNDERFLOW,
                f"{zero:.0%} of the gradient's values are zero in float16",
                "Use trainer.precision bf16-mixed, or 16-mixed, which scales the loss",
            )]  # fmt: skip
        return []

    def _rate(self, place: int, highest: float) -> list[Finding]:
        moves = self.moves.get(place, [])
        if len(moves) < DUE // 2:
            return []
        moved = statistics.median(moves)
        if moved > FAST:
            return [Finding(
                "learning rate too high",
                f"at the learning rate {highest:.2g} a step moves the weights by {moved:.2g} of their size, where "
                "0.003 to 0.03 is usual",
                f"Lower it, by about {moved / 0.01:.0f} times",
            )]  # fmt: skip
        if moved < SLOW and not self.tuned:
            return [Finding(
                "learning rate too low",
                f"at the learning rate {highest:.2g} a step moves the weights by {moved:.2g} of their size, where "
                "0.003 to 0.03 is usual",
                f"Raise it, by about {0.01 / max(moved, 1e-9):.0f} times; to fine-tune so slowly, say start_from",
            )]  # fmt: skip
        return []


def rates(optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    """(learning rate now, highest that the schedule comes to), of the group where it is highest."""
    now = max(float(group["lr"]) for group in optimizer.param_groups)
    names = ("lr", "initial_lr", "max_lr")
    highest = max(float(group.get(name, 0.0) or 0.0) for group in optimizer.param_groups for name in names)
    return now, highest
