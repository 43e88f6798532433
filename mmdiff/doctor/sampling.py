"""Faults between training and sampling: noise levels, shift, rate, and the decoder at the end."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..autoencoder import Autoencoder, Chain
from ..config import build
from ..density import SigmaDensity
from ..module import DiffusionModule
from ..sigmas import Cosine as CosineGrid
from ..sigmas import Flow, Sigmas
from .check import Check, Finding, Run, named
from .space import differences, first

RATIO = 1.5  # by which the middle of the training's levels may differ from that of a grid with a shift
STEPS, STRAYS = 32, 4  # of a grid, and how many of them may be beyond what training draws


class Levels(Check):
    """A sampling grid that was not trained for: another shift, or levels that training never draws.

    grids: by where they come from, beside the `sigmas` of the trainer's callbacks.
    """

    def __init__(self, grids: Mapping[str, Sigmas] | None = None) -> None:
        self.grids = dict(grids or {})

    def begin(self, run: Run) -> Iterable[Finding]:
        self.done = not isinstance(run.module, DiffusionModule)
        return ()

    @torch.no_grad()
    def batch(self, run: Run, batch: Mapping[str, Any]) -> Iterable[Finding]:
        if self.done:
            return
        self.done = True
        module: Any = run.module
        grids = dict(self.grids)
        for callback in module.trainer.callbacks:
            if isinstance(grid := getattr(callback, "sigmas", None), Sigmas):
                grids[f"the callback {type(callback).__name__}"] = grid
        if not grids:
            return
        with run.as_trained():
            shape = module.model.latents(first(batch, 1)).shape[2:]
        density = module.density.sized(shape)
        for where, grid in grids.items():
            yield from unlike(density, grid.sized(shape), where)


def unlike(density: SigmaDensity, grid: Sigmas, where: str) -> Iterable[Finding]:
    """What speaks against sampling on `grid` what was trained on `density`."""
    name, cure = "sampling levels", "Give the grid and the density the same shift (mmdiff.density.Shifted) and range"
    middle = float(density.quantile(torch.tensor([0.5])))
    if isinstance(grid, (Flow, CosineGrid)):
        ratio = float(grid.shift) / middle  # type: ignore[arg-type]
        if abs(math.log(ratio)) > math.log(RATIO):
            yield Finding(
                name,
                f"training has its middle noise level at {middle:.3g}, {where} samples around {float(grid.shift):.3g}, "  # type: ignore[arg-type]
                f"its shift: they differ by a factor of {max(ratio, 1 / ratio):.2g}",
                cure,
            )
            return
    low, high = density.quantile(torch.tensor([2.0**-26, 1 - 2.0**-24])).tolist()
    levels = grid(STEPS)[:-1]
    outside = levels[(levels < 0.99 * low) | (levels > 1.01 * high)]
    if len(outside) > STRAYS:
        yield Finding(
            name,
            f"{where} samples at noise levels down to {float(levels[-1]):.3g} and up to {float(levels[0]):.3g}, of "
            f"which {len(outside)} of {STEPS} lie beyond {low:.3g} to {high:.3g}, all that training draws",
            cure,
        )


class SampledLike(Check):
    """A cascade's stage that makes clips at another rate than the training's, or decodes with other settings.

    cascade: the tree of its YAML.
    """

    def __init__(self, cascade: Mapping[str, Any]) -> None:
        self.cascade = cascade

    def begin(self, run: Run) -> Iterable[Finding]:
        self.done = False
        return ()

    def batch(self, run: Run, batch: Mapping[str, Any]) -> Iterable[Finding]:
        if self.done or not isinstance(run.module, DiffusionModule):
            return
        self.done = True
        rates = batch.get("rate")
        made = float(self.cascade["rate"])
        if isinstance(rates, Tensor) and not bool((rates / made).log().abs().max() < 1e-3):
            yield Finding(
                "wrong rate",
                f"training clips have {float(rates[0]):g} steps a second, the cascade makes {made:g}",
                "Give the cascade the rate of the training data, or the data that of the cascade",
            )
        trained = plain_part(run.module.model.autoencoder)
        for name, tree in self.cascade["stages"].items():
            decoder = tree["init_args"].get("autoencoder")
            if not isinstance(decoder, Mapping):
                continue  # the model's own
            changed = differences(trained, plain_part(build(decoder)))
            if changed:
                yield Finding(
                    "wrong hop",
                    f"stage {name} decodes with other settings than the model was trained on: {named(changed)}",
                    "Give the decoder of the cascade the settings of the training",
                )


def plain_part(autoencoder: Autoencoder) -> Autoencoder:
    """What of an autoencoder stands before the parts that have weights, or pool."""
    return autoencoder.parts[0] if isinstance(autoencoder, Chain) else autoencoder  # type: ignore[return-value]
