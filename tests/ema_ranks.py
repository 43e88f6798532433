"""A short training on one, ddp or fsdp, the first argument, and what each process is left with, in a folder.

Run as: python -m torch.distributed.run --standalone --nproc_per_node=2 tests/ema_ranks.py ddp FOLDER
"""

import os
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.utils.data import DataLoader

from mmdiff.backbones import DiT1D
from mmdiff.callbacks import EMA, PowerFunction
from mmdiff.callbacks.ema import trainable, whole
from mmdiff.checkpoint import AtomicCheckpointIO
from mmdiff.density import LogNormal
from mmdiff.model import DiffusionModel
from mmdiff.module import DiffusionModule
from mmdiff.parameters import ParameterGroups
from mmdiff.precond import EDM
from mmdiff.schedules import Cosine


class Steps(pl.Callback):
    """The raw weights after every step, whole, and those that validation sees, before and after; a checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.steps: list[dict[str, torch.Tensor]] = []
        self.seen: list[dict[str, torch.Tensor]] = []

    def weights(self, module: pl.LightningModule) -> dict[str, torch.Tensor]:
        return {name: whole(p.detach()).clone() for name, p in trainable(module).items()}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.steps.append(self.weights(pl_module))

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.seen.append(self.weights(pl_module))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seen.append(self.weights(pl_module))
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def module() -> DiffusionModule:
    torch.manual_seed(0)
    net = DiT1D(1, width=16, depth=2, head_channels=8)
    torch.nn.init.normal_(net.modulation.weight, std=0.1)  # not zero, so that every weight has a gradient
    return DiffusionModule(
        DiffusionModel(net, EDM()),
        LogNormal(),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        scheduler=lambda o: Cosine(o, 12, warmup=2),
        groups=ParameterGroups(frozen=["*.stem.bias"], rates={"*.head.*": 0.5}),
    )


def batches(world: int, rank: int) -> DataLoader[Any]:
    """Six steps of four clips, of which each process has its own part."""
    x = torch.randn(24, 1, 8, generator=torch.Generator().manual_seed(1))
    size = 4 // world
    mine = [{"x": x[4 * step + rank * size + i]} for step in range(6) for i in range(size)]
    return DataLoader(mine, batch_size=size)  # type: ignore[arg-type]


def train(strategy: Any, world: int, rank: int, folder: Path, ckpt: Path | None) -> dict[str, Any]:
    record, emas = Steps(folder), [EMA(PowerFunction(0.1), keep_every=2), EMA(0.9)]
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", devices=world, strategy=strategy, logger=False, default_root_dir=folder,
        use_distributed_sampler=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[*emas, record], plugins=[AtomicCheckpointIO()],
    )  # fmt: skip
    trainer.fit(module(), batches(world, rank), batches(world, rank), ckpt_path=ckpt, weights_only=True)
    return {
        "steps": record.steps,
        "seen": record.seen,
        "averages": [{n: whole(value).clone() for n, value in ema.average.items()} for ema in emas],
    }


def main(kind: str, folder: Path) -> None:
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    for name, ckpt in (("whole", None), ("rest", folder / "whole" / "6.ckpt")):
        strategy: Any = "auto"
        if kind == "ddp":
            strategy = DDPStrategy(process_group_backend="gloo")
        elif kind == "fsdp":
            strategy = ModelParallelStrategy(world, 1, save_distributed_checkpoint=False, process_group_backend="gloo")
        torch.save(train(strategy, world, rank, folder / name, ckpt), folder / f"{name}-{rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
