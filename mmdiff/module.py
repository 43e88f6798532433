"""Training of a diffusion model: a LightningModule around `mmdiff.model.DiffusionModel`."""

import math
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import grad_norm
from torch import Tensor

from .cascade import batch_size
from .denoiser import checked_mask
from .density import SigmaDensity
from .io import fingerprint, load
from .levels import Levels, PerItem
from .likelihood import LearnedVariance
from .model import DiffusionModel
from .weighting import MSE, Distance, Natural, Weighting


class DiffusionModule(pl.LightningModule):
    """Trains `model` on noise levels drawn from `density`.

    Args:
        model: what is trained. density: distribution of sigma.
        optimizer: of the trainable parameters. scheduler: stepped after every optimizer step; None is constant.
        seed: of noise, noise levels, condition dropout. They are a function of (seed, epoch, batch, rank) alone.
        autoencoder_weights: model folder of the trained autoencoder, exported from an `AutoencoderModule`, whose
            weights `model.autoencoder` takes. ValueError where it has weights and this is not given.
        weighting: of the loss at each level; default none. distance: from the network's own target; default MSE.
        levels: whether an item has one noise level or one for each time step, and what is known; default one.
        variance: trains the variance of a backbone with 2 C channels too (iDDPM); default the backbone has none.
        start_from: model folder or hub id whose backbone and conditioner to start from, or that a ControlNet steers.

    A batch needs "x": (B, C, T, ...) in [-1, 1], or its "latents" with the fingerprint of their "autoencoder" (see
    `mmdiff.data.cache`), and what the conditioner reads. "mask", where it has one, is bool,
    (B, T) or broadcastable to x: what is False is padding and counts in no loss, nor does a latent that depends on it.
    Each item's loss is a mean over what counts of it, and the batch's over the items of which something does.
    Logs train/loss, train/grad_norm and val/loss, whose noise and levels are the same at every validation.
    """

    def __init__(
        self,
        model: DiffusionModel,
        density: SigmaDensity,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
        autoencoder_weights: str | None = None,
        weighting: Weighting | None = None,
        distance: Distance | None = None,
        levels: Levels | None = None,
        variance: LearnedVariance | None = None,
        start_from: str | None = None,
    ) -> None:
        super().__init__()
        if start_from is not None:
            trained = load(start_from)
            if not isinstance(trained, DiffusionModel):
                raise ValueError(f"start_from={start_from} is a {type(trained).__name__}, not a DiffusionModel")
            model.start_from(trained)
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
        self.encoded_by = fingerprint(model.autoencoder)
        self.optimizer, self.scheduler = optimizer, scheduler
        self.seed = seed
        self.weighting, self.distance = weighting or Natural(), distance or MSE()
        self.levels, self.variance = levels or PerItem(), variance

    def losses(self, batch: dict[str, Any], key: tuple[int, ...]) -> dict[str, Tensor]:
        """Losses of a batch, with every random choice drawn from `key`.

        "loss" (): the batch's mean. "items" (B,): of each item, 0 where nothing of it counts, detached.
        "sigma" (B,) or (B, T): the noise levels that were drawn.
        """
        generator = torch.Generator().manual_seed(hash((self.seed, *key)) % 2**63)
        latents = self.latents(batch)
        latents = latents.to(torch.promote_types(latents.dtype, torch.float32))
        density = self.density.sized(latents.shape[2:])
        sigma = self.levels(density, latents, generator)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        conditioner = self.model.conditioner
        cond = None if conditioner is None else conditioner({**batch, "latents": latents}, generator)
        errors = self.model.denoiser.errors(
            latents, sigma, cond, noise=noise, distance=self.distance, mask=self.mask(batch, latents)
        )
        level = torch.where(sigma > 0, sigma, 1)  # what is known has no weight, but must not have weight 0 * inf
        error = self.weighting.weigh(errors.error, level, self.model.denoiser.precond)
        if self.variance is not None:
            error = error + self.variance(errors, latents, sigma)
        elif errors.extra.shape[1]:
            raise ValueError(
                f"the backbone gives {errors.extra.shape[1]} channels beyond the data's {latents.shape[1]}, "
                "which nothing trains: give variance (mmdiff.likelihood.LearnedVariance), or leave out_channels out"
            )
        counted = errors.total(torch.ones_like(error)).sum()  # less those of which nothing counts
        items = errors.total(density.weight(level) * error)
        return {"loss": items.sum() / counted, "items": items.detach(), "sigma": sigma}

    def latents(self, batch: dict[str, Any]) -> Tensor:
        """Those of the batch. Raises ValueError where it holds latents of another autoencoder than the model's."""
        for encoded_by in set(batch.get("autoencoder", ())):
            if encoded_by != self.encoded_by:
                raise ValueError(
                    f"the batch holds latents of the autoencoder {encoded_by}, the model's is {self.encoded_by}: "
                    "give the LatentCache and the model (autoencoder_weights) the same folder"
                )
        return self.model.latents(batch)

    def mask(self, batch: dict[str, Any], latents: Tensor) -> Tensor | None:
        """The batch's mask, in the latents' space. Raises ValueError where it fits neither."""
        if "mask" not in batch:
            return None
        data = batch.get("x", latents)
        mask = checked_mask(batch["mask"], data)
        if mask.shape[1] == 1 and data.shape[2:] != latents.shape[2:]:
            return self.model.autoencoder.known(mask.expand(len(data), 1, *data.shape[2:]))
        return checked_mask(mask, latents)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        losses = self.losses(batch, (self.current_epoch, batch_idx, self.global_rank))
        self.log("train/loss", losses["loss"], prog_bar=True, batch_size=batch_size(batch))
        return losses

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        losses = self.losses(batch, (-1, batch_idx, self.global_rank))
        self.log("val/loss", losses["loss"], prog_bar=True, batch_size=batch_size(batch), sync_dist=True)
        return losses

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        losses = self.losses(batch, (-1, batch_idx, self.global_rank))
        self.log("test/loss", losses["loss"], batch_size=batch_size(batch), sync_dist=True)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        norm = grad_norm(self.model, 2)["grad_2.0_norm_total"]
        if not math.isfinite(norm):
            raise ValueError(
                f"the gradient is not finite at step {self.global_step}; the weights are as they were before it. "
                "Lower the learning rate or clip the gradient (trainer.gradient_clip_val)"
            )
        self.log("train/grad_norm", norm)

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad])
        if self.scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler(optimizer), "interval": "step"}}
