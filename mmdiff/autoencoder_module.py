"""Training of the small convolutional KL autoencoder."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from .autoencoder import ConvKL


class AutoencoderModule(pl.LightningModule):
    """Reconstruction (L1) plus `kl_weight` times the KL divergence to N(0, 1) (Kingma & Welling 2014, eq. 10).

    Logs train/loss, train/l1, train/kl and val/l1 (of the posterior's mean). kl_weight: per element of the latents.
    """

    def __init__(
        self,
        model: ConvKL,
        kl_weight: float = 1e-4,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if kl_weight < 0:
            raise ValueError(f"kl_weight={kl_weight} must not be negative")
        self.model, self.kl_weight = model, kl_weight
        self.optimizer, self.scheduler = optimizer, scheduler
        self.seed = seed

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        mean, log_variance = self.model.posterior(batch["x"])
        self.model.update_statistics(mean.detach())
        generator = torch.Generator().manual_seed(
            hash((self.seed, self.current_epoch, batch_idx, self.global_rank)) % 2**63
        )
        noise = torch.randn(mean.shape, generator=generator).to(mean)
        l1 = (self.model.decoder(mean + (log_variance / 2).exp() * noise) - batch["x"]).abs().mean()
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
        loss = l1 + self.kl_weight * kl
        self.log_dict({"train/loss": loss, "train/l1": l1, "train/kl": kl}, prog_bar=True, batch_size=len(mean))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        l1 = (self.model.decode(self.model.encode(batch["x"])) - batch["x"]).abs().mean()
        self.log("val/l1", l1, prog_bar=True, batch_size=len(batch["x"]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.model.parameters())
        if self.scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler(optimizer), "interval": "step"}}
