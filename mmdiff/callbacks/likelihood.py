"""The likelihood of validation data while training."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from ..likelihood import Likelihood
from ..sampling import seeded_noise


class BitsPerDim(pl.Callback):
    """Logs val/bits_per_dim: of the first validation batch, under its own conditions, with the same noise every time.

    likelihood: `mmdiff.likelihood.VariationalBound` or `FlowLikelihood`. Latents are continuous, and so is data that is
    not of 8 bits: both need bins=None, and the bits of latents are not those of the data.
    count: items at most. every: validations between measurements.
    """

    def __init__(self, likelihood: Likelihood, count: int = 4, every: int = 1) -> None:
        if count < 1 or every < 1:
            raise ValueError(f"count={count}, every={every} must both be at least 1")
        self.likelihood, self.count, self.every = likelihood, count, every
        self.seen = 0

    @torch.no_grad()
    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx > 0 or trainer.sanity_checking:
            return
        self.seen += 1
        if (self.seen - 1) % self.every:
            return
        model: Any = pl_module.model
        with torch.inference_mode(False):  # tensors of that mode, as validation's are, cannot be differentiated
            part = {k: v[: self.count].clone() if isinstance(v, Tensor) else v[: self.count] for k, v in batch.items()}
            latents = model.latents(part)
            denoise = model.bind(model.condition({**part, "latents": latents}))
            bits = self.likelihood.bits(denoise, latents, seeded_noise(range(len(latents)))).mean()
        pl_module.log("val/bits_per_dim", bits, batch_size=len(latents), sync_dist=True)
