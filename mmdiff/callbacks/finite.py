"""Steps that are not finite end the run before they reach a weight."""

from collections import deque
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from ..exits import NonFiniteError
from ..run.folder import run_folder

FILE, KEPT = "bad_batch.pt", 16  # batches of a step, at most


class FiniteSteps(pl.Callback):
    """Stops all processes, before the optimizer steps, where a loss or gradient of any of them is not finite.

    The weights, their averages and the checkpoints are then as they were before the step. The last 16 batches of the
    step are kept in the run's folder, in bad_batch.pt (bad_batch-rank1.pt of the second process and so on), which
    `torch.load(path, weights_only=True)` reads: "batches", each with its "batch_idx" and whether its loss was finite,
    "step", "epoch", "reason". An activation that is not finite shows in the loss or the gradient, or reaches no weight.
    With the loss scaling of half precision, a gradient that is too large is the scaler's to leave out, until its scale
    is 1; the loss must be finite all the same. What a checkpoint would hold is looked at too: a parameter that is not
    finite, or a buffer with NaN, is not saved. Raises NonFiniteError.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.step = 0
        self.batches: deque[tuple[int, Any, list[Tensor]]] = deque(maxlen=KEPT)  # index, batch, is each loss finite
        self.finite: Tensor | None = None  # whether all losses of the step are

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.folder = run_folder(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self.step:  # those of the last step have done no harm
            self.step, self.finite = trainer.global_step, None
            self.batches.clear()
        self.batches.append((batch_idx, batch, []))

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        finite = loss.detach().isfinite().all()
        self.batches[-1][2].append(finite)
        self.finite = finite if self.finite is None else self.finite & finite  # looked at once a step: no wait here

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = get_total_norm(gradients, torch.inf)  # the largest: never overflows
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        finite = norm.to(trainer.strategy.root_device).isfinite()
        losses = finite if self.finite is None else self.finite.to(finite.device)
        bad = torch.stack([~losses, ~finite]).to(torch.int64)
        if trainer.world_size > 1:
            bad = trainer.strategy.reduce(bad, reduce_op="max")
        loss, gradient = bad.tolist()
        if gradient and not loss and scaler is not None and scaler.get_scale() > 1:
            return
        if loss or gradient:
            raise NonFiniteError(
                f"the {'loss' if loss else 'gradient'} is not finite at step {trainer.global_step}; the weights are as "
                f"they were before it, and its batches are kept in {self.folder}/{FILE}. Look for such values in the "
                "data, lower the learning rate, clip the gradient, or train in higher precision"
            )

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        parameters = {name for name, _ in pl_module.named_parameters()}
        for name, value in checkpoint["state_dict"].items():
            if not isinstance(value, Tensor) or not value.is_floating_point():
                continue
            bad = ~value.isfinite() if name in parameters else value.isnan()
            if bad.any():
                raise NonFiniteError(
                    f"{name} has {int(bad.sum())} values that are not finite at step {trainer.global_step}: no "
                    "checkpoint is made of it; go on from the one before (mmdiff fit --resume)"
                )

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Keeps the step's batches, whoever found that it is not finite."""
        if not isinstance(exception, NonFiniteError) or self.folder is None or not self.batches:
            return
        name = FILE if trainer.is_global_zero else f"{Path(FILE).stem}-rank{trainer.global_rank}.pt"
        batches = [
            {"batch_idx": index, "batch": plain(batch), "finite": all(bool(one) for one in found)}
            for index, batch, found in self.batches
        ]
        kept = {
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "reason": str(exception),
            "batches": batches,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.save(kept, self.folder / name)


def plain(value: Any) -> Any:
    """Tensors, on the CPU, and plain values in lists and dicts; anything else as its repr."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else repr(value)
