"""Padding that counts in the loss.

B batch, C channels, T time.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..autoencoder_module import AutoencoderModule
from ..module import DiffusionModule
from .check import Check, Finding, Run, clips

ENOUGH = 32  # clips
BATCHES = 3  # whose gradients are looked at
LEAST = 0.1  # of what the clips hold, so much at least should be no padding
NAME = "padding in the loss"


class Padding(Check):
    """Padding whose mask is not read, is not the padding's, or leaves hardly anything else."""

    def begin(self, run: Run) -> Iterable[Finding]:
        self.real: list[float] = []
        self.done = False
        self.handle: RemovableHandle | None = None
        self.mask: Tensor | None = None
        self.padded: dict[str, Any] | None = None  # a run that goes on may begin with a validation
        self.grads = 0
        self.leaks = False
        if isinstance(run.module, DiffusionModule):
            module = run.module
            self.handle = module.model.denoiser.backbone.register_forward_hook(
                lambda backbone, args, out: self._follow(module, out)
            )
        return ()

    def batch(self, run: Run, batch: Mapping[str, Any]) -> Iterable[Finding]:
        mask, data = batch.get("mask"), next(iter(clips(batch).values()), None)
        self.padded = {**batch} if isinstance(mask, Tensor) and not bool(mask.all()) else None
        if self.done or data is None:
            return
        rate, duration_s = batch.get("rate"), batch.get("duration_s")
        if "x" not in batch or not isinstance(rate, Tensor) or not isinstance(duration_s, Tensor):
            return
        steps = data.shape[2]
        real = (rate * duration_s).round().clamp(max=steps)
        self.real += (real / steps).tolist()
        if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == steps:
            over = mask.sum(1) - real
            if bool((over > 1 + 0.01 * steps).any()):
                self.done = True
                yield Finding(
                    NAME,
                    f"the mask counts {int(over.max())} steps of time after the end of a clip that lasts "
                    f"{float(duration_s[over.argmax()]):.3g} s",
                    "Make the mask from the clips' durations: short: mask does",
                )
                return
        if self.padded is not None and isinstance(run.module, AutoencoderModule):
            self.done = True
            yield Finding(
                NAME,
                "the data masks its padding, and the training of an autoencoder reads no mask",
                "Train it on clips without padding: short: leave_out, and fewer steps a clip",
            )

    def _follow(self, module: DiffusionModule, out: Any) -> None:
        """Looks at the gradient of what the backbone says where nothing should count."""
        if self.padded is None or not isinstance(out, Tensor) or not out.requires_grad or not module.training:
            return
        batch = self.padded

        def look(gradient: Tensor) -> None:
            channels = module.model.latents(batch).shape[1] if self.mask is None else gradient.shape[1]
            counts = DiffusionModule.mask(module, batch, gradient[:, :channels])
            self.grads += 1
            if counts is not None:
                self.leaks = self.leaks or bool((gradient[:, :channels] * ~counts).any())

        out.register_hook(look)

    def step(self, run: Run) -> Iterable[Finding]:
        if self.handle is not None and (self.grads >= BATCHES or run.due(50)):
            self.handle.remove()
            self.handle = None
            if self.leaks and not self.done:
                self.done = True
                yield Finding(
                    NAME,
                    "the loss has a gradient where the batch's mask is False",
                    "Read batch['mask'] in the loss: DiffusionModule does, where its mask method is not overridden",
                )
        if not self.done and len(self.real) >= ENOUGH:
            self.done = True
            if (share := sum(self.real) / len(self.real)) < LEAST:
                yield Finding(
                    NAME,
                    f"{1 - share:.0%} of what the loss sees is padding",
                    "Shorten the clips to what most files fill, or use buckets (mmdiff.data.batches.Buckets)",
                )
