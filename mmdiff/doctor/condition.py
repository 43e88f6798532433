"""Faults on the way from a batch's captions, labels and numbers to the network.

B batch, D width.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..cascade import droppable
from ..conditioning import Cond, Label, Number, Text
from ..module import DiffusionModule
from .check import Check, Finding, Run
from .space import first

ENOUGH = 32  # conditions to judge by
ITEMS = 4
DATA = ("x", "latents", "mask", "low", "hint")  # of a batch, what is no condition that guidance leaves out


class Dropped(Check):
    """Conditions that are all the same in training although the batch's differ: every one is dropped."""

    def begin(self, run: Run) -> Iterable[Finding]:
        self.seen, self.same, self.differ = 0, True, False
        self.handle: RemovableHandle | None = None
        if isinstance(run.module, DiffusionModule) and droppable(run.module.model.conditioner):
            assert run.module.model.conditioner is not None
            self.handle = run.module.model.conditioner.register_forward_hook(self._note)
        return ()

    @torch.no_grad()
    def _note(self, conditioner: Any, args: Any, cond: Cond) -> None:
        """What training gives the network; between two steps the conditioner itself may learn."""
        if not conditioner.training:
            return
        rows = summary(cond).detach().float()
        self.seen += len(rows)
        if len(rows) == 1:
            with still(conditioner):
                rows = torch.cat([rows, summary(conditioner.null(args[0])).float()])
        self.same = self.same and alike(rows)

    def batch(self, run: Run, batch: Mapping[str, Any]) -> Iterable[Finding]:
        if self.handle is not None and not self.differ and run.whole:
            part = first(batch, ITEMS)
            with torch.no_grad(), run.as_trained(), still(run.module.model):  # type: ignore[arg-type]
                if len(next(iter(part.values()))) == 1:
                    other = run.module.model.null(part)  # type: ignore[operator,union-attr]
                    rows = [summary(_condition(run.module.model, part)), summary(other)]
                else:
                    rows = [summary(_condition(run.module.model, part))]
                self.differ = not alike(torch.cat(rows).float())
        return ()

    def step(self, run: Run) -> Iterable[Finding]:
        if self.handle is None or not (self.seen >= ENOUGH or not self.same or (run.due(20) and self.seen >= 8)):
            return
        self.handle.remove()
        self.handle = None
        if self.same and self.differ:
            yield Finding(
                "conditions all dropped",
                f"the network was given the same condition for all of the first {self.seen} clips, although their "
                "captions or labels differ",
                "Lower the conditioner's dropout: 0.1 is usual, and 1 trains without any condition",
            )


class Unheard(Check):
    """Captions that change nothing: they are empty, the conditioner loses them, or the network does not listen."""

    def begin(self, run: Run) -> Iterable[Finding]:
        self.kept: dict[str, Any] | None = None
        self.captions: list[str] = []
        self.read: set[str] = set()
        self.done = not (isinstance(run.module, DiffusionModule) and droppable(run.module.model.conditioner))
        if not self.done:
            parts = run.module.model.conditioner.modules()  # type: ignore[union-attr]
            self.read = {part.key for part in parts if isinstance(part, (Text, Label, Number))} or {"caption"}
        return ()

    def batch(self, run: Run, batch: Mapping[str, Any]) -> Iterable[Finding]:
        if self.done:
            return ()
        captions = batch.get("caption")
        if "caption" in self.read and isinstance(captions, list) and len(self.captions) < ENOUGH:
            self.captions += captions
        part = first(batch, ITEMS)
        if self.kept is None and any(len({str(value) for value in part.get(key, ())}) > 1 for key in self.read):
            self.kept = part
        return ()

    @torch.no_grad()
    def step(self, run: Run) -> Iterable[Finding]:
        # Before the first steps a network's last layer is zero, and nothing changes what it says.
        half = any(p.dtype in (torch.float16, torch.bfloat16) for p in run.module.parameters())
        if self.done or not run.whole or not run.due(40 if half else 8):
            return
        self.done = True
        name, model = "captions not reaching the network", run.module.model
        if self.captions and not any(self.captions):
            yield Finding(
                name,
                f"the captions of the first {len(self.captions)} clips are all empty, and the conditioner reads them",
                "Set data.caption to first or random, and look at the data's captions: mmdiff data report",
            )
            return
        if self.kept is None:
            return
        kept, other = self.kept, turned(self.kept)
        with run.as_trained(), still(model):  # type: ignore[arg-type]
            cond, changed = _condition(model, kept), _condition(model, other)
            if all(torch.equal(a, b) for a, b in zip(_slots(cond), _slots(changed), strict=True)):
                yield Finding(
                    name,
                    "the conditioner gives the same for other captions",
                    "Look at its mask and at the key of the batch that it reads",
                )
                return
            latents = model.latents(kept).float()  # type: ignore[operator,union-attr]
            generator = torch.Generator().manual_seed(0)
            noise = torch.randn(latents.shape, generator=generator).to(latents)
            heard = False
            for level in (0.5, 2.0):
                sigma = torch.full((len(latents),), level, device=latents.device)
                a, b = (model.bind(c)(latents + level * noise, sigma) for c in (cond, changed))  # type: ignore[operator,union-attr]
                heard = heard or not torch.equal(a, b)
        if not heard:
            yield Finding(
                name,
                f"after {run.steps} steps the network's output is the same, to the last bit, for other captions",
                "Give the backbone what takes the condition (tokens_width with cross-attention, vector_width), and "
                "look at whether it uses them",
            )


def summary(cond: Cond) -> Tensor:
    """(B, D) of each item's condition."""
    if cond.vector is not None:
        return cond.vector
    if cond.tokens is None:
        return cond.concat.flatten(2).mean(2) if cond.concat is not None else torch.zeros(0, 0)
    if cond.mask is None:
        return cond.tokens.mean(1)
    counts = cond.mask.unsqueeze(-1).to(cond.tokens)
    return (cond.tokens * counts).sum(1) / counts.sum(1).clamp(min=1)


def turned(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with each item's conditions replaced by those of the one before."""
    return {name: value if name in DATA else _roll(value) for name, value in batch.items()}


def _roll(value: Any) -> Any:
    if isinstance(value, Tensor) and value.ndim:
        return value.roll(1, 0)
    return [value[-1], *value[:-1]] if isinstance(value, list) and value else value


def alike(rows: Tensor) -> bool:
    """Whether all rows (B, D) are the first one, up to rounding."""
    return bool((rows - rows[0]).abs().max() <= 1e-6 * rows.abs().max())


def _condition(model: Any, batch: Mapping[str, Any]) -> Cond:
    latents = batch["latents"] if "latents" in batch else model.latents(batch)
    generators = [torch.Generator().manual_seed(place) for place in range(len(latents))]
    return model.conditioner({**batch, "latents": latents}, generators)


def _slots(cond: Cond) -> list[Tensor]:
    return [slot for slot in (cond.tokens, cond.vector) if slot is not None]


@contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, each module back in its own mode afterwards, and the random generators as they were."""
    modes = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
