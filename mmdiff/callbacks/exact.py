"""What Lightning's checkpoints lack for a resumed run to be the same run, bit by bit."""

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.loops.evaluation_loop import RestartStage
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.distributed.tensor import DTensor

KEY = "exact_resume"


class ExactResume(pl.Callback):
    """Adds to every checkpoint, whoever saves it, what Lightning does not keep, and puts it back when the run goes on.

    - The state of every process's global random generators (torch, its device, numpy, Python), of which dropout draws.
    - The gradients of every process, where a checkpoint is made before all batches of an optimizer step are there.
    - That a validation was due but not done: Lightning would leave it out, and with it what the validation changes.
    - That an epoch was at its end; Lightning would give it one batch of the next.
    - The metrics that callbacks such as ModelCheckpoint go by.

    With another number of processes than before, their generators start from the seed, which is said, and the mean of
    the gradients goes on.
    """

    def __init__(self) -> None:
        self.state: dict[str, Any] | None = None  # of the checkpoint that is being resumed
        self.validated = -1  # training batches, over all epochs, at the last validation
        self.before_validation: dict[str, Any] | None = None  # generators

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.before_validation = generators(trainer.strategy.root_device)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.validated, self.before_validation = trainer.fit_loop.epoch_loop.total_batch_idx, None

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """All processes save together, so they are asked for their parts here."""
        due = bool(trainer.training or trainer.validating) and self._validation_due(trainer)
        now = generators(trainer.strategy.root_device)
        part = {"generators": (self.before_validation or now) if due else now, "gradients": held(trainer, pl_module)}
        parts = [part]
        if dist.is_initialized() and trainer.world_size > 1:
            parts = [{}] * trainer.world_size
            dist.gather_object(part, parts if trainer.is_global_zero else None)
        metrics = {name: value.detach().cpu() for name, value in trainer.callback_metrics.items()}
        checkpoint[KEY] = {"parts": parts, "validation_due": due, "metrics": metrics}
        _place(checkpoint["loops"]["fit_loop"], due)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.state = checkpoint.get(KEY)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.state is None:
            return
        state, self.state = self.state, None
        trainer.callback_metrics.update(state["metrics"])
        if state["validation_due"]:
            loop = trainer.fit_loop.epoch_loop.val_loop
            loop.batch_progress.reset_on_run()
            loop._restart_stage = RestartStage.RESTARTED_MID_EVALUATION
        parts = state["parts"]
        if len(parts) == trainer.world_size:
            restore_generators(parts[trainer.global_rank]["generators"], trainer.strategy.root_device)
            gradients = parts[trainer.global_rank]["gradients"]
        else:
            rank_zero_warn(
                f"the checkpoint is of {len(parts)} processes, the run has {trainer.world_size}: what draws from "
                "global random generators, such as dropout, starts from the seed"
            )
            gradients = {
                name: torch.stack([part["gradients"][name] for part in parts]).mean(dim=0)
                for name in parts[0]["gradients"]
            }
        for name, parameter in pl_module.named_parameters():
            if name in gradients:
                parameter.grad = _like(gradients[name], parameter)

    def _validation_due(self, trainer: pl.Trainer) -> bool:
        loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
        if fetcher is None or self.validated == loop.total_batch_idx:
            return False
        return loop._should_check_val_fx(fetcher)


def _place(loops: dict[str, Any], validation_due: bool) -> None:
    """Corrects the counts from which Lightning reads at which moment a checkpoint was made.

    Where a validation is due, the batch is done, else the validation would pass for done as well. At the end of an
    epoch, Lightning would go on with that epoch, and give it the first batch of the next: the moment becomes that after
    its last batch, of which nothing but the end of the epoch was left.
    """
    batches, epochs = loops["epoch_loop.batch_progress"], loops["epoch_progress"]
    if validation_due:
        for counts in batches["total"], batches["current"]:
            counts["completed"] = counts["processed"]
    elif epochs["total"]["processed"] == epochs["total"]["started"] == epochs["total"]["completed"] + 1:
        for counts in epochs["total"], epochs["current"]:
            counts["processed"] = counts["completed"]
        for counts in batches["total"], batches["current"]:
            counts["completed"] = counts["processed"] - 1
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1


def held(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, torch.Tensor]:
    """Gradients that wait for the rest of their optimizer step, by the name of their parameter.

    In manual optimisation the module alone knows whether they do, so whatever is there is kept.
    """
    if pl_module.automatic_optimization and not trainer.fit_loop.epoch_loop._should_accumulate():
        return {}
    found = ((name, p.grad) for name, p in pl_module.named_parameters())
    return {name: _local(gradient.detach()).cpu() for name, gradient in found if gradient is not None}


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor that is spread over processes; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _like(part: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The opposite of `_local`, spread as the parameter is."""
    part = part.to(parameter.device)
    if isinstance(parameter, DTensor):
        return DTensor.from_local(part, parameter.device_mesh, parameter.placements)
    return part


def generators(device: torch.device) -> dict[str, Any]:
    """The states of the global random generators, as tensors and plain values."""
    # The legacy generator, as it is the global one.
    name, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), place, has_gauss, gauss),
        "python": random.getstate(),
    }


def restore_generators(state: dict[str, Any], device: torch.device) -> None:
    """The opposite of `generators`."""
    torch.set_rng_state(state["torch"].cpu())
    if state["device"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["device"].cpu(), device)
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))  # noqa: NPY002
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
