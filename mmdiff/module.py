"""Training of a diffusion model: a LightningModule around `mmdiff.model.DiffusionModel`."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor, nn

from . import processes
from .cascade import batch_size
from .conditioning import draw
from .denoiser import checked_mask
from .density import SigmaDensity
from .exits import NonFiniteError
from .gradients import gradient_norm
from .io import fingerprint, load
from .levels import Levels, PerItem
from .likelihood import LearnedVariance
from .model import DiffusionModel
from .parameters import ParameterGroups
from .sharding import blocks, shard
from .weighting import MSE, Distance, Natural, Weighting


class DiffusionModule(pl.LightningModule):
    """Trains `model` on noise levels drawn from `density`.

    Args:
        model: what is trained. density: distribution of sigma.
        optimizer: of the trainable parameters. scheduler: stepped after every optimizer step; None is constant.
        seed: of noise, noise levels, condition dropout. They are a function of (seed, epoch, batch, place in the step)
            alone: n processes with a batch of B each learn what one learns of a batch of n * B.
        autoencoder_weights: model folder of the trained autoencoder, exported from an `AutoencoderModule`, whose
            weights `model.autoencoder` takes. ValueError where it has weights and this is not given.
        weighting: of the loss at each level; default none. distance: from the network's own target; default MSE.
        levels: whether an item has one noise level or one for each time step, and what is known; default one.
        variance: trains the variance of a backbone with 2 C channels too (iDDPM); default the backbone has none.
        start_from: model folder or hub id whose backbone and conditioner to start from, or that a ControlNet steers.
        groups: which parameters are frozen, train at another rate, or do not decay; default biases, gains, norms and
            embeddings do not decay, and all train.

    A batch needs "x": (B, C, T, ...) in [-1, 1], or its "latents" with the fingerprint of their "autoencoder" (see
    `mmdiff.data.cache`), and what the conditioner reads. "mask", where it has one, is bool,
    (B, T) or broadcastable to x: what is False is padding and counts in no loss, nor does a latent that depends on it.
    Each item's loss is a mean over what counts of it, and the step's over the items, of all processes, of which
    something does.
    Logs train/loss, train/grad_norm before clipping, train/clipped (whether trainer.gradient_clip_val made it smaller,
    0 or 1) and val/loss, whose noise and levels are the same at every validation. A gradient that is not finite ends
    the training before it reaches a weight; with precision 16-mixed the scaler leaves its step out.
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
        groups: ParameterGroups | None = None,
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
        self.groups = groups or ParameterGroups()
        self.groups.freeze(self)
        self.places = processes.Places()

    def configure_model(self) -> None:
        """Spreads the weights over the processes where the strategy is ModelParallelStrategy."""
        if self.device_mesh is None:
            return
        backbone, conditioner = self.model.denoiser.backbone, self.model.conditioner
        shard(backbone, self.device_mesh, blocks(backbone))
        if conditioner is not None:
            shard(conditioner, self.device_mesh, methods=["null"])
        if isinstance(self.weighting, nn.Module):
            shard(self.weighting, self.device_mesh, methods=["weigh"])

    def losses(
        self, batch: dict[str, Any], key: tuple[int, ...], place: tuple[int, int] | None = None
    ) -> dict[str, Tensor]:
        """Losses of a batch, with every random choice drawn from `key` and each item's place in the step.

        place: (of the first item, number of all items of the step); default the batch is all of it.
        "loss" (): the batch's mean. "items" (B,): of each item, 0 where nothing of it counts, detached.
        "sigma" (B,) or (B, T): the noise levels that were drawn. "counted" (): items of which something counts.
        """
        latents = self.latents(batch)
        latents = latents.to(torch.promote_types(latents.dtype, torch.float32))
        first, total = place or (0, len(latents))
        density = self.density.sized(latents.shape[2:])
        everywhere = latents[:1].expand(total, *latents.shape[1:])  # levels are drawn for all processes, by shape alone
        sigma = self.levels(density, everywhere, seeded(self.seed, *key))[first : first + len(latents)]
        generators = [seeded(self.seed, *key, first + i) for i in range(len(latents))]
        noise = draw(torch.randn, latents.shape, generators).to(latents)
        conditioner = self.model.conditioner
        cond = None if conditioner is None else conditioner({**batch, "latents": latents}, generators)
        mask = self.mask(batch, latents)
        if cond is not None and cond.known is not None:
            mask = ~cond.known if mask is None else mask & ~cond.known
        errors = self.model.denoiser.errors(latents, sigma, cond, noise=noise, distance=self.distance, mask=mask)
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
        return {"loss": items.sum() / counted, "items": items.detach(), "sigma": sigma, "counted": counted}

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

    def on_train_epoch_start(self) -> None:
        processes.check_as_many([self.trainer.num_training_batches], "training")

    def on_validation_start(self) -> None:
        if self.device_mesh is not None:  # else held-out batches need nothing of the other processes
            trainer = self.trainer
            held_out = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
            processes.check_as_many(held_out, "held-out")

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        size = batch_size(batch)
        losses = self.losses(batch, (self.current_epoch, batch_idx), self.places(size))
        if (world := processes.number()) > 1:
            # Strategies average gradients over processes, whose batches may count for different numbers of items.
            mean, counted = losses["loss"], losses["counted"]
            total, everywhere = processes.summed(torch.stack([losses["items"].sum(), counted]))
            share = mean * (world * counted / everywhere)
            losses["loss"] = share - share.detach() + total / everywhere  # the same mean of all to every process
        self.log("train/loss", losses["loss"], prog_bar=True, batch_size=size)
        return losses

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        return self.held_out(batch, batch_idx, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.held_out(batch, batch_idx, "test")

    def held_out(self, batch: dict[str, Any], batch_idx: int, stage: str) -> dict[str, Tensor]:
        """Losses with the noise and the levels of every other validation. Waits for no other process."""
        size = batch_size(batch)
        losses = self.losses(batch, (-1, batch_idx), (self.global_rank * size, processes.number() * size))
        number = int(losses["counted"])
        self.log(f"{stage}/loss", losses["loss"], prog_bar=stage == "val", batch_size=number, sync_dist=True)
        return losses

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        norm = gradient_norm(self.parameters())
        if not norm.isfinite():
            if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
                return  # the scaler leaves this step out, and lowers its scale
            raise NonFiniteError(
                f"the gradient is not finite at step {self.global_step}; the weights are as they were before it. "
                "Lower the learning rate or clip the gradient (trainer.gradient_clip_val)"
            )
        self.log("train/grad_norm", norm)
        by_norm = self.trainer.gradient_clip_algorithm != GradClipAlgorithmType.VALUE
        if (clip := self.trainer.gradient_clip_val) and by_norm:
            self.log("train/clipped", (norm > clip).float())

    def configure_optimizers(self) -> Any:
        optimizer = self.groups.optimizer(self.optimizer, self)
        if self.scheduler is None:
            return optimizer
        scheduler = self.scheduler(optimizer)
        self.groups.check_scheduler(scheduler)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def seeded(*key: int) -> torch.Generator:
    """A generator of random numbers that `key` alone decides."""
    return torch.Generator().manual_seed(hash(key) % 2**63)
