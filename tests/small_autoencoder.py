"""A network of one axis, its data and a quiet trainer, for the tests of how autoencoders are trained."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmdiff.adversarial import Adversarial
from mmdiff.autoencoder import ConvKL
from mmdiff.bottleneck import Tanh
from mmdiff.discriminator import Patch


def network(bottleneck: Any = None) -> ConvKL:
    return ConvKL(1, 2, [[2], [2]], width=4, bottleneck=bottleneck or Tanh())


def adversarial(**settings: Any) -> Adversarial:
    return Adversarial([Patch(1, [[2], [2]], width=4)], **settings)


def loader(count: int = 8, batch_size: int = 2, data: Tensor | None = None) -> DataLoader[dict[str, Tensor]]:
    items = torch.randn(count, 1, 16, generator=torch.Generator().manual_seed(5)) if data is None else data
    return DataLoader([{"x": x} for x in items], batch_size=batch_size)  # type: ignore[arg-type]


def trainer(**settings: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return pl.Trainer(**{**quiet, "enable_model_summary": False, "max_epochs": 1, **settings})


def fit(module: pl.LightningModule, data: Any = None, val: Any = None, ckpt: Any = None, **settings: Any) -> pl.Trainer:
    """Trains for one epoch of `data`, unless `settings` of the trainer say otherwise."""
    run = trainer(**settings)
    run.fit(module, loader() if data is None else data, loader(4) if val is None else val, ckpt_path=ckpt)
    return run


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in module.parameters()])


def moved(module: nn.Module, before: Tensor) -> float:
    return float((weights(module) - before).norm())
