"""Samples while training, from fixed seeds and the captions of the first validation batch."""

from abc import ABC, abstractmethod
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from ..cascade import Clip, Generate
from ..guidance import Guidance
from ..sampling import DPMpp2M, Sampler, seeded_noise
from ..sigmas import Karras, Sigmas


class Show(ABC):
    """Brings clips to a logger, as pictures that move or sounds that play. One for each modality."""

    @abstractmethod
    def __call__(self, experiment: Any, tag: str, data: Tensor, rate: float, captions: list[str], step: int) -> None:
        """data (N, C, T, ...); rate: steps of T per second. experiment: the logger's, a TensorBoard SummaryWriter."""


class Samples(pl.Callback):
    """Generates from the first validation batch's captions (and low-resolution clips) at the end of a validation.

    Args:
        show: how to log. count: clips. every: validations between samples.
        sigmas, sampler, steps, guidance: as in `mmdiff.cascade.Generate`. decode: decode latents before they are shown.

    Touches no random generator of the training. Does nothing where the logger cannot show pictures.
    """

    def __init__(
        self,
        show: Show,
        count: int = 4,
        every: int = 1,
        sigmas: Sigmas | None = None,
        sampler: Sampler | None = None,
        steps: int = 16,
        guidance: float | Guidance = 1.0,
        decode: bool = True,
    ) -> None:
        self.show, self.count, self.every = show, count, every
        self.sigmas, self.sampler = sigmas or Karras(), sampler or DPMpp2M()
        self.steps, self.guidance, self.decode = steps, guidance, decode
        self.seen = 0
        self.batch: dict[str, Any] | None = None

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0:
            self.batch = {k: v[: self.count] for k, v in batch.items()}

    @torch.inference_mode()
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seen += 1
        if trainer.sanity_checking or self.batch is None or not trainer.is_global_zero or self.seen % self.every:
            return
        experiment = getattr(trainer.logger, "experiment", None)
        if not hasattr(experiment, "add_image"):
            return
        model: Any = pl_module.model
        batch = self.batch
        latents = model.latents(batch)
        noise = seeded_noise(range(len(latents)))
        stage = Generate(model, self.sigmas, self.sampler, self.steps, self.guidance)
        rate = float(batch["rate"][0]) / model.autoencoder.factors[0]
        lowres, start = stage.lowres(), None
        if lowres is not None:
            start = Clip(lowres.degrade.encode(latents), rate / lowres.degrade.factors[0])
        clip = stage(batch, start, shape=tuple(latents.shape[1:]), rate=rate, noise=noise)
        data, rate = clip.data, clip.rate
        if self.decode:
            data, rate = model.autoencoder.decode(data), float(batch["rate"][0])
        captions = list(batch.get("caption", [""] * len(data)))
        self.show(experiment, "samples", data, rate, captions, trainer.global_step)
