"""Training of a diffusion model: a LightningModule around `mmdiff.model.DiffusionModel`."""

import math
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import grad_norm
from torch import Tensor

from .density import SigmaDensity
from .io import load
from .model import DiffusionModel


class DiffusionModule(pl.LightningModule):
    """Trains `model` on noise levels drawn from `density`.

    Args:
        model: what is trained. density: distribution of sigma.
        optimizer: of the model's trainable parameters. scheduler: stepped after every optimizer step; None is constant.
        seed: of noise, noise levels, condition dropout. They are a function of (seed, epoch, batch, rank) alone.
        autoencoder_weights: model folder of the trained autoencoder, exported from an `AutoencoderModule`, whose
            weights `model.autoencoder` takes. ValueError where it has weights and this is not given.

    A batch needs "x": (B, C, T, ...) in [-1, 1], and what the conditioner reads. Logs train/loss, train/grad_norm and
    val/loss, whose noise and levels are the same at every validation.
    """

    def __init__(
        self,
        model: DiffusionModel,
        density: SigmaDensity,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
        autoencoder_weights: str | None = None,
    ) -> None:
        super().__init__()
        if autoencoder_weights is not None:
            try:
                model.autoencoder.load_state_dict(load(autoencoder_weights).state_dict())
            except RuntimeError as error:
                name = type(model.autoencoder).__name__
                raise ValueError(
                    f"autoencoder_weights={autoencoder_weights} are not of this {name}: {error}"
                ) from error
        elif any(True for _ in model.autoencoder.parameters()):
            raise ValueError(
                f"the autoencoder {type(model.autoencoder).__name__} has weights, but autoencoder_weights is not "
                "given: train it with mmdiff.autoencoder_module.AutoencoderModule, export it, and name the folder"
            )
        self.model, self.density = model, density
        self.optimizer, self.scheduler = optimizer, scheduler
        self.seed = seed

    def loss(self, batch: dict[str, Any], key: tuple[int, ...]) -> Tensor:
        """Mean loss () of a batch, with every random choice drawn from `key`."""
        generator = torch.Generator().manual_seed(hash((self.seed, *key)) % 2**63)
        latents = self.model.encode(batch["x"])
        sigma = self.density.sample(len(latents), device=latents.device, generator=generator)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        conditioner = self.model.conditioner
        cond = None if conditioner is None else conditioner({**batch, "latents": latents}, generator)
        return self.model.denoiser.loss(latents, sigma, cond, noise).mean()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = self.loss(batch, (self.current_epoch, batch_idx, self.global_rank))
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["x"]))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        loss = self.loss(batch, (-1, batch_idx, self.global_rank))
        self.log("val/loss", loss, prog_bar=True, batch_size=len(batch["x"]), sync_dist=True)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        loss = self.loss(batch, (-1, batch_idx, self.global_rank))
        self.log("test/loss", loss, batch_size=len(batch["x"]), sync_dist=True)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        norm = grad_norm(self.model, 2)["grad_2.0_norm_total"]
        if not math.isfinite(norm):
            raise ValueError(
                f"the gradient is not finite at step {self.global_step}; the weights are as they were before it. "
                "Lower the learning rate or clip the gradient (trainer.gradient_clip_val)"
            )
        self.log("train/grad_norm", norm)

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer([p for p in self.model.parameters() if p.requires_grad])
        if self.scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler(optimizer), "interval": "step"}}
