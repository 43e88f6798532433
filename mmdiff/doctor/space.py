"""Faults of the space that is denoised: its autoencoder, and the scale of its latents.

B batch, C channels, T time.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..autoencoder import Autoencoder, Chain, LearnedAutoencoder
from ..conditioning import LowRes
from ..io import load
from ..module import DiffusionModule
from .check import Check, Finding, Run, has_weights, named

# Shares of the variance that a trained autoencoder gives back at least: of data, of latents encoded again where the
# data's own falls short (a vocoder's phases are free), and of these alone where there is no data.
BACK, AGAIN, ALONE = 0.1, 0.9, 0.3
BATCHES = 4
FACTOR = 2.0  # by which the latents' deviation may differ from what the preconditioning expects
SETTINGS = (bool, int, float, str)  # what a setting of a module is, or a tuple of them
RETRAIN = "Train the autoencoder (mmdiff.autoencoder_module), export it, and name its folder as autoencoder_weights"


class Untrained(Check):
    """An autoencoder that was not trained, is not of this data, or whose settings are not those of its training."""

    def begin(self, run: Run) -> Iterable[Finding]:
        self.done = not (isinstance(run.module, DiffusionModule) and has_weights(run.module.model.autoencoder))
        if self.done:
            return
        folder = run.arguments("model", "init_args", "autoencoder_weights")
        if isinstance(folder, str):
            changed = differences(load(folder), run.module.model.autoencoder)  # type: ignore[union-attr,arg-type]
            if changed:
                yield self._finding(f"it was trained as {folder} says, where {named(changed)}")

    def batch(self, run: Run, batch: Mapping[str, Any]) -> Iterable[Finding]:
        if self.done or not run.whole:
            return
        self.done = True
        autoencoder: Autoencoder = run.module.model.autoencoder  # type: ignore[union-attr,assignment]
        learned = [m for m in autoencoder.modules() if isinstance(m, LearnedAutoencoder)]
        if any(bool((m.scale == 1).all()) and not bool(m.shift.any()) for m in learned):
            yield self._finding("the statistics of its latents were never measured, so no training has validated it")
            return
        with torch.no_grad(), run.as_trained():
            data, latents = given_back(autoencoder, batch)
        if latents < (ALONE if data is None else AGAIN) and (data is None or data < BACK):
            share = max(0.0, latents if data is None else data)
            yield self._finding(f"of the variance of a clip of this data, {share:.0%} comes back through it")

    def _finding(self, found: str) -> Finding:
        return Finding("autoencoder untrained or mismatched", found, RETRAIN)


class LatentScale(Check):
    """Latents whose deviation is not what the preconditioning is made for."""

    def begin(self, run: Run) -> Iterable[Finding]:
        self.seen: list[Tensor] = []
        self.done = not isinstance(run.module, DiffusionModule)
        return ()

    @torch.no_grad()
    def batch(self, run: Run, batch: Mapping[str, Any]) -> Iterable[Finding]:
        if self.done or not run.whole:
            return
        module: Any = run.module
        with run.as_trained():
            latents = module.model.latents(first(batch, 4)).float()
            for part in () if module.model.conditioner is None else module.model.conditioner.modules():
                if isinstance(part, LowRes) and part.residual:  # what is denoised is the difference alone
                    latents = latents - part.degrade.decode(part.degrade.encode(latents))
        mask = DiffusionModule.mask(module, first(batch, 4), latents)
        self.seen.append(latents.flatten() if mask is None else latents[mask.expand_as(latents)])
        if len(self.seen) < BATCHES:
            return
        self.done = True
        deviation = float(torch.cat(self.seen).std())
        self.seen = []
        expected = 1 / float(module.model.denoiser.precond(torch.zeros(1))[2])  # c_in brings this to 1 without noise
        raw = (
            not has_weights(module.model.autoencoder) and expected == 1
        )  # pixels under eps, v or flow: no one rescales
        if expected * FACTOR < deviation or deviation < expected / (2.5 * FACTOR if raw else FACTOR):
            yield Finding(
                "latent scale",
                f"the latents have a standard deviation of {deviation:.3g}, and the preconditioning is made for "
                f"{expected:.3g}: a factor of {deviation / expected:.2g}",
                "Give precond.sigma_data this deviation, or latents of the one that it expects: an autoencoder's "
                "statistics are measured at its validation, a Mel has mean and std",
            )


def given_back(autoencoder: Autoencoder, batch: Mapping[str, Any], most: int = 2) -> tuple[float | None, float]:
    """Shares of the variance that come back through the parts with weights: of their input, of latents encoded again.

    None where the batch holds latents alone.
    """
    parts: Sequence[Any] = list(autoencoder.parts) if isinstance(autoencoder, Chain) else [autoencoder]
    begin = next(place for place, part in enumerate(parts) if has_weights(part))
    core, data = Chain(parts[begin:]), None
    if isinstance(batch.get("x"), Tensor):
        x = batch["x"][:most]
        for part in parts[:begin]:
            x = part.encode(x)
        z = core.encode(x)
        back = core.decode(z)
        data = explained(x, back)
    else:
        z = batch["latents"][:most]
        back = core.decode(z)
    return data, explained(z, core.encode(back))


def explained(x: Tensor, back: Tensor) -> float:
    """1 - |x - back|^2 / |x - its mean|^2."""
    x, back = x.float(), back.float()
    return float(1 - (x - back).square().sum() / (x - x.mean()).square().sum().clamp(min=1e-12))


def differences(trained: nn.Module, used: nn.Module) -> list[str]:
    """How the plain settings of two modules of one structure differ, such as `parts.0.hop_length is 128, here 256`."""
    own = dict(used.named_modules())
    found = []
    for place, module in trained.named_modules():
        other = own.get(place)
        if other is None or type(other) is not type(module):
            found.append(f"{place or 'it'} is a {type(module).__name__}, here a {type(other).__name__}")
            continue
        for name, value in _settings(module).items():
            now = _settings(other).get(name)
            if now != value:
                found.append(f"{f'{place}.{name}'.lstrip('.')} is {value}, here {now}")
    return found


def _settings(module: nn.Module) -> dict[str, Any]:
    """The plain values among a module's attributes."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training"
        and all(isinstance(part, SETTINGS) for part in (value if isinstance(value, tuple) else (value,)))
    }  # fmt: skip


def first(batch: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The first items of a batch."""
    return {name: value[:count] if hasattr(value, "__getitem__") else value for name, value in batch.items()}
