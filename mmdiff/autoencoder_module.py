"""Training of an autoencoder: losses of reconstruction, bottleneck and discriminators, with an optimizer for each side.

B batch, C channels, `*axes` T and what follows it.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_

from . import processes
from .adversarial import Adversarial
from .autoencoder import Autoencoder, Chain, Reconstruction, TrainableAutoencoder
from .exits import NonFiniteError
from .gradients import gradient_norm
from .io import load
from .latent_statistics import LatentStatistics
from .parameters import ParameterGroups
from .sharding import kept_whole, shard


class AutoencoderModule(pl.LightningModule):
    """Trains `model` to give back what it is given: weighted `losses`, the bottleneck's own, and `adversarial`.

    Args:
        model: what is trained and exported.
        front: frozen, with which data is encoded first; a `audio.mel.Mel` makes this the training on spectrograms.
        losses: by name, modules of forward(x_hat, x) -> (); default l1, `torch.nn.L1Loss`.
        weights: of losses, by their names; 1 where a name is missing.
        adversarial: discriminators and their weights; default none.
        optimizer: of the model, and of the discriminators where `discriminator_optimizer` is not given.
        scheduler: of each optimizer, stepped after each of its steps; None is constant.
        clip: largest norm of the gradient, of the model and, for themselves, of the discriminators; None is no limit.
        accumulate: batches to a step, of whose gradients it takes the mean; the last step of an epoch may have fewer.
        seed: of what is random in the bottleneck, a function of (seed, epoch, batch, rank) alone.
        start_from: model folder or hub id of an autoencoder, whose weights `model` starts from.
        groups: which parameters are frozen, train at another rate, or do not decay; default biases, gains, norms and
            embeddings do not decay, and all train.

    A batch needs "x": (B, C, *axes) in [-1, 1]; masks are not read, so clips are cropped and not padded.

    The optimisation is manual: the trainer's gradient_clip_val and accumulate_grad_batches are refused, its precision
    works. `global_step` and max_steps count the model's steps alone. Training in several processes with `adversarial`
    needs the strategy ddp_find_unused_parameters_true. A loss or gradient that is not finite ends the training before
    it reaches a weight.

    The latents' mean and deviation, which `model.encode` normalises by, are those of all validation data at the last
    validation, with the weights that it used (an EMA's, where there is one); before the first, running estimates.

    Logs train/loss, train/l1, train/psnr (of a range of 2, in dB), each loss by its name, what the bottleneck and the
    discriminators log, train/grad_norm and train/discriminator_grad_norm before clipping, train/clipped and
    train/discriminator_clipped (whether `clip` made it smaller, 0 or 1), and val/ of what reconstruction has.
    """

    def __init__(
        self,
        model: TrainableAutoencoder,
        front: Autoencoder | None = None,
        losses: dict[str, nn.Module] | None = None,
        weights: dict[str, float] | None = None,
        adversarial: Adversarial | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        scheduler: LRSchedulerCallable | None = None,
        discriminator_optimizer: OptimizerCallable | None = None,
        clip: float | None = 1.0,
        accumulate: int = 1,
        seed: int = 0,
        start_from: str | None = None,
        groups: ParameterGroups | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        losses = {"l1": nn.L1Loss()} if losses is None else losses
        if not losses:
            raise ValueError("losses={} leave nothing to reconstruct by; leave the argument out for L1")
        if taken := {"loss", "psnr"} & set(losses):
            raise ValueError(f"losses cannot be called {min(taken)}, which is logged of all of them")
        if unknown := set(weights or {}) - set(losses):
            raise ValueError(f"weights of {sorted(unknown)}, but losses are {sorted(losses)}")
        self.weights = dict.fromkeys(losses, 1.0) | (weights or {})
        for name, value in self.weights.items():
            if not value >= 0:
                raise ValueError(f"weights[{name!r}]={value} must be 0 or more")
        if clip is not None and not clip > 0:
            raise ValueError(f"clip={clip} must be positive; null is no limit")
        if accumulate < 1:
            raise ValueError(f"accumulate={accumulate} must be 1 or more")
        if discriminator_optimizer is not None and adversarial is None:
            raise ValueError("discriminator_optimizer is given, but adversarial is not: there is no discriminator")
        if start_from is not None:
            start(model, start_from)
        self.model = model
        self.front = None if front is None else front.requires_grad_(False).eval()
        self.losses = nn.ModuleDict(losses).requires_grad_(False)
        self.adversarial = adversarial
        self.optimizer, self.scheduler = optimizer, scheduler
        self.discriminator_optimizer = discriminator_optimizer or optimizer
        self.clip, self.accumulate, self.seed = clip, accumulate, seed
        self.groups = groups or ParameterGroups()
        self.groups.freeze(self)
        self.held = 0  # batches whose gradients wait for a step
        self.measured = False  # whether a validation has set the latents' statistics
        self.statistics: LatentStatistics | None = None
        self.places = processes.Places()

    def configure_model(self) -> None:
        """Spreads the model's weights over the processes where the strategy is ModelParallelStrategy.

        Discriminators, which the model's turn switches off, stay whole on each.
        """
        if self.device_mesh is not None:
            shard(self.model, self.device_mesh, methods=["reconstruct", "encode", "decode"])

    def train(self, mode: bool = True) -> "AutoencoderModule":
        super().train(mode)
        if self.front is not None:
            self.front.eval()
        return self

    @torch.no_grad()
    def data(self, batch: dict[str, Any]) -> Tensor:
        """What the model is to reconstruct."""
        return batch["x"] if self.front is None else self.front.encode(batch["x"])

    def on_train_epoch_start(self) -> None:
        processes.check_as_many([self.trainer.num_training_batches], "training")

    def on_validation_start(self) -> None:
        if self.device_mesh is not None:  # else held-out batches need nothing of the other processes
            trainer = self.trainer
            held_out = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
            processes.check_as_many(held_out, "held-out")

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        x, step = self.data(batch), self.global_step
        key = hash((self.seed, self.current_epoch, batch_idx, self.global_rank)) % 2**63
        with kept_whole(self.model):  # the adaptive adversarial weight looks at the last layer's
            out = self.model.reconstruct(x, torch.Generator().manual_seed(key))
        # Strategies average gradients over processes, whose batches may have different numbers of items.
        share = len(x) * processes.number() / self.places(len(x))[1] / self.accumulate
        self.held += 1
        ready = self.held == self.accumulate or self.trainer.is_last_batch
        adversarial = None if self.adversarial is None or step < self.adversarial.start else self.adversarial
        optimizers: Any = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]

        with self.turn(optimizers[0], ready):
            loss, logs = self.model_loss(out, x, adversarial)
            self.manual_backward(loss * share)
        if not self.measured:
            flat = out.latents.movedim(1, 0).flatten(1).float()
            self.model.normalise(flat.mean(dim=1), flat.std(dim=1, correction=0), rate=max(0.02, 1 / (1 + step)))
        if ready:
            optimizers[0].step()
            optimizers[0].zero_grad()
            self.advance_schedule(0)

        if adversarial is not None:
            with self.turn(optimizers[1], ready):
                told_apart, judged = adversarial.discriminator_loss(x, out.x.detach(), step)
                self.check_finite(judged)
                self.manual_backward(told_apart * share)
            if ready:
                # Not LightningOptimizer.step, which would count this in global_step.
                self.trainer.strategy.optimizer_step(optimizers[1].optimizer, lambda: None)
                optimizers[1].zero_grad()
                self.advance_schedule(1)
            logs = logs | judged
        if ready:
            self.held = 0
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(x))
        self.log_dict({f"train/{name}": value.detach() for name, value in logs.items()}, batch_size=len(x))

    def model_loss(
        self, out: Reconstruction, x: Tensor, adversarial: Adversarial | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the model minimises (), checked to be finite, and what to log."""
        losses, reconstruction = self.reconstruction(out.x, x)
        loss = reconstruction + out.loss
        if adversarial is not None:
            added, judged = adversarial.generator_loss(x, out.x, reconstruction, self.model.last_weight())
            loss, losses = loss + added, losses | judged
        self.check_finite(losses | {"bottleneck": out.loss, "loss": loss})
        return loss, metrics(out.x, x) | losses | out.logs

    def reconstruction(self, x_hat: Tensor, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Each loss (), without its weight, and their weighted sum ()."""
        losses = {name: loss(x_hat, x) for name, loss in self.losses.items()}
        return losses, torch.stack([self.weights[name] * value for name, value in losses.items()]).sum()

    @contextmanager
    def turn(self, optimizer: LightningOptimizer, ready: bool) -> Iterator[None]:
        """Gradients for this optimizer's parameters alone, summed over processes only where a step is to follow."""
        strategy = self.trainer.strategy
        apart = isinstance(strategy, ParallelStrategy) and not ready
        with self.toggled_optimizer(optimizer), strategy.block_backward_sync() if apart else nullcontext():  # type: ignore[attr-defined]
            yield

    def check_finite(self, losses: dict[str, Tensor]) -> None:
        """Raises NonFiniteError, in all processes, where a loss of any is not finite; names this one's first."""
        finite = torch.stack([value.detach().float() for value in losses.values()]).isfinite().tolist()
        if self.trainer.strategy.reduce_boolean_decision(all(finite)):
            return
        named = "of another process"
        if not all(finite):
            name = list(losses)[finite.index(False)]
            named = f"{name}={float(losses[name].detach())}"
        raise NonFiniteError(
            f"the loss {named} is not finite at step {self.global_step}; the weights are as they were before it. "
            "Lower the learning rate, or look for such values in the data"
        )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clips, after gradients have lost the scale of half precision; refuses what is not finite."""
        prefix = "" if optimizer is self.trainer.optimizers[0] else "discriminator_"
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        gradients = [p.grad for p in parameters]
        if prefix and self.device_mesh is not None:  # the strategy averages those of sharded weights alone
            for gradient in gradients:
                gradient.copy_(processes.summed(gradient) / processes.number())
        if self.held != self.accumulate:  # the last window of an epoch; elsewhere the factor is 1
            for gradient in gradients:
                gradient.mul_(self.accumulate / self.held)
        norm = gradient_norm(parameters)
        if not norm.isfinite():
            if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
                return  # the scaler leaves this step out, and lowers its scale
            raise NonFiniteError(
                f"the gradient ({prefix}grad_norm={float(norm)}) is not finite at step {self.global_step}; the weights "
                "are as they were before it. Lower the learning rate, or train in higher precision"
            )
        if self.clip is not None:
            clip_grads_with_norm_(parameters, self.clip, norm)
            self.log(f"train/{prefix}clipped", (norm > self.clip).float())
        self.log(f"train/{prefix}grad_norm", norm)

    def advance_schedule(self, index: int) -> None:
        """Steps the scheduler of the optimizer `index`, where there is one."""
        schedulers: Any = self.lr_schedulers()
        if schedulers is not None:
            (schedulers if isinstance(schedulers, list) else [schedulers])[index].step()

    def on_validation_epoch_start(self) -> None:
        self.statistics = None

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        out = self.evaluate(batch, "val")
        if self.statistics is None:
            self.statistics = LatentStatistics(out.latents.shape[1])
        self.statistics.add(out.latents)

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.evaluate(batch, "test")

    def evaluate(self, batch: dict[str, Any], stage: str) -> Reconstruction:
        """Logs how well a batch is reconstructed, with nothing left to chance."""
        x = self.data(batch)
        out = self.model.reconstruct(x)
        losses, loss = self.reconstruction(out.x, x)
        logs = metrics(out.x, x) | losses | out.logs | {"loss": loss + out.loss}
        self.log_dict(
            {f"{stage}/{name}": value for name, value in logs.items()},
            batch_size=len(x),
            sync_dist=True,
            add_dataloader_idx=False,
        )
        return out

    def on_validation_epoch_end(self) -> None:
        if self.trainer.sanity_checking or self.statistics is None:
            return
        statistics = self.statistics
        if self.trainer.world_size > 1:
            packed = torch.cat([statistics.count[None], statistics.mean, statistics.squares]).to(self.device)
            statistics = LatentStatistics(len(statistics.mean))
            gathered: Any = self.all_gather(packed)
            for part in gathered.cpu():
                statistics.join(part[0], *part[1:].chunk(2))
        self.model.normalise(statistics.mean, statistics.deviation)
        self.measured = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["latents_measured"], checkpoint["held_batches"] = self.measured, self.held

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.measured, self.held = checkpoint.get("latents_measured", False), checkpoint.get("held_batches", 0)

    def configure_callbacks(self) -> list[pl.Callback]:
        """None; but the first place to say what the trainer's own refusal does not: where the setting belongs."""
        if self.trainer.gradient_clip_val:
            raise ValueError(
                f"trainer.gradient_clip_val={self.trainer.gradient_clip_val} does not work in the training of an "
                "autoencoder, which steps its optimizers itself: set model.clip"
            )
        if self.trainer.accumulate_grad_batches != 1:
            raise ValueError(
                f"trainer.accumulate_grad_batches={self.trainer.accumulate_grad_batches} does not work in the training "
                "of an autoencoder, which steps its optimizers itself: set model.accumulate"
            )
        return []

    def configure_optimizers(self) -> Any:
        optimizers = [self.groups.optimizer(self.optimizer, self, within="model.")]
        if self.adversarial is not None:
            optimizers.append(self.groups.optimizer(self.discriminator_optimizer, self, within="adversarial."))
        if self.scheduler is None:
            return optimizers
        schedulers = [self.scheduler(optimizer) for optimizer in optimizers]
        if isinstance(schedulers[0], torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise ValueError("scheduler=ReduceLROnPlateau waits for a metric; give one that goes by steps alone")
        for scheduler in schedulers:
            self.groups.check_scheduler(scheduler)
        return optimizers, schedulers


def start(model: TrainableAutoencoder, start_from: str) -> None:
    """Gives `model` the weights of an exported autoencoder. Raises ValueError where they are not of such a model."""
    trained = load(start_from)
    if isinstance(trained, Chain):  # of the front that it was trained behind
        trained = trained.parts[-1]
    try:
        model.load_state_dict(trained.state_dict())
    except RuntimeError as error:
        raise ValueError(f"start_from={start_from} has no weights of this {type(model).__name__}: {error}") from error


def metrics(x_hat: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Mean absolute error l1 and mean psnr of the items, in dB for values of a range of 2."""
    error = (x_hat.detach().float() - x.float()).flatten(1)
    mse = error.square().mean(dim=1).clamp(min=1e-10)
    return {"l1": error.abs().mean(), "psnr": (10 * torch.log10(4 / mse)).mean()}
