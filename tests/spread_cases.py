"""Trainings to spread over processes, and what is kept of them. Run by torchrun, each process writes its own.

A case is a module and the batches of a few steps, of which each process has a share.
"""

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from mmdiff.adversarial import Adversarial
from mmdiff.autoencoder import ConvKL, Pool, Subsample
from mmdiff.autoencoder_module import AutoencoderModule
from mmdiff.backbones import DiT1D, SpatioTemporalDiT, UNet
from mmdiff.bottleneck import Tanh
from mmdiff.checkpoint import AtomicCheckpointIO
from mmdiff.conditioning import Join, Label, LowRes, Number, Text
from mmdiff.density import LogNormal, Stratified
from mmdiff.discriminator import Patch
from mmdiff.levels import Known, PerStep
from mmdiff.model import DiffusionModel
from mmdiff.module import DiffusionModule
from mmdiff.precond import EDM, Flow, V
from mmdiff.text import ByteTransformer
from mmdiff.weighting import LearnedUncertainty

Batch = dict[str, Any]
CAPTIONS = ["a red ball", "two", "a long green snake that crawls", "", "no", "blue", "seven small stars"]


def off_zero(module: pl.LightningModule) -> pl.LightningModule:
    """Moves what trains off its start, where a network gives zero and half of the gradients vanish."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return module


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def diffusion(
    backbone: nn.Module, conditioner: Any, density: Any, precond: Any = None, **settings: Any
) -> DiffusionModule:
    model = DiffusionModel(backbone, precond or EDM(), conditioner, settings.pop("autoencoder", None))
    return off_zero(DiffusionModule(model, density, optimizer=sgd, seed=7, **settings))  # type: ignore[return-value]


def waves() -> DiffusionModule:
    """U-Net over sound of 7 steps with padding; classes that are dropped; learned weights of the levels."""
    net = UNet(1, 2, channels=8, multipliers=(1, 2), factors=[[1]], attend=[[], [[0]]], vector_width=4, head_channels=4)
    return diffusion(
        net, Label("class", 3, 4, 0.4), Stratified(LogNormal()), levels=PerStep(), weighting=LearnedUncertainty()
    )


def images() -> DiffusionModule:
    """U-Net over spectrograms, an upsampler: noise on its low clips; blocks run again for their gradients."""
    net = UNet(2, 1, channels=8, multipliers=(1, 2), vector_width=8, concat_channels=2, checkpoint=True)
    return diffusion(net, Join([LowRes(Pool([2, 2])), Number("rate", 8, 0, 10, 0.3)]), LogNormal(), V())


def films() -> DiffusionModule:
    """U-Net over 5 frames, of which some are known; captions of all lengths."""
    net = UNet(
        3, 3, channels=8, multipliers=(1, 2), factors=[[1, 2, 2]], attend=[[], [[0], [1, 2]]], tokens_width=8,
        vector_width=8, head_channels=4,
    )  # fmt: skip
    return diffusion(net, Text(ByteTransformer(8, 1, 2), 0.3), LogNormal(), levels=Known(1, 1, 0.5))


def film_tokens() -> DiffusionModule:
    """DiT over 5 frames, in latents: of its 10 frames every second."""
    net = SpatioTemporalDiT(3, width=16, depth=2, head_channels=8, tokens_width=8, vector_width=8)
    chosen = Text(ByteTransformer(8, 1, 2), 0.3)
    return diffusion(net, chosen, Stratified(LogNormal()), Flow(), autoencoder=Subsample(2))


def wave_tokens() -> DiffusionModule:
    """DiT over sound of 9 steps with padding."""
    net = DiT1D(2, width=16, depth=2, head_channels=8, vector_width=4)
    return diffusion(net, Label("class", 3, 4, 0.4), LogNormal(), Flow())


def tied(adaptive: bool = False) -> AutoencoderModule:
    """Autoencoder of films, whose latents have nothing random, and its discriminator."""
    model = ConvKL(3, 4, [[1, 2, 2]], width=8, bottleneck=Tanh())
    judge = Adversarial([Patch(3, [[1, 2, 2]], width=8)], adaptive=adaptive, features=0.5)
    return off_zero(AutoencoderModule(model, adversarial=judge, optimizer=sgd, clip=0.2))  # type: ignore[return-value]


def sound(n: int, steps: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, steps + 1, (n, 1), generator=generator)
    return {
        "x": torch.randn(n, 2, steps, generator=generator),
        "class": torch.arange(n) % 3,
        "mask": torch.arange(steps) < lengths,
    }


def spectra(n: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(n, 1, 6, 8, generator=generator), "rate": torch.arange(n) + 0.5}


def film(n: int, frames: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(n, 3, frames, 8, 8, generator=generator), "caption": [CAPTIONS[i % 7] for i in range(n)]}


CASES: dict[str, tuple[Any, list[Batch]]] = {
    "unet1d": (waves, [sound(n, 7, n) for n in (4, 5, 2)]),
    "unet2d": (images, [spectra(n, n) for n in (4, 3)]),
    "unet3d": (films, [film(n, 5, n) for n in (4, 5)]),
    "dit3d": (film_tokens, [film(n, 10, n) for n in (4, 3)]),
    "autoencoder": (tied, [film(4, 2, 1), film(4, 2, 2)]),
    "adaptive autoencoder": (partial(tied, True), [film(4, 2, 1), film(4, 2, 2)]),  # each process has its own weight
    "dit1d": (wave_tokens, [sound(n, 9, n) for n in (4, 5)]),
}


def cut(batch: Batch, rank: int, world: int) -> Batch:
    """The share of a process: the first has one item more where they do not go evenly."""
    size = len(batch["x"])
    edges = [-(-size * i // world) for i in range(world + 1)]
    return {name: values[edges[rank] : edges[rank + 1]] for name, values in batch.items()}


def whole(value: Tensor) -> Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


class Keep(pl.Callback):
    """Losses and whole gradients of every step, held-out losses, and the weights at the end."""

    def __init__(self) -> None:
        self.found: dict[str, list[Any]] = {"loss": [], "gradients": [], "weights": [], "val": [], "sharded": []}

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Any) -> None:
        gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        self.found["gradients"].append({name: whole(value) for name, value in gradients.items()})
        self.found["sharded"].append(sum(isinstance(value, DTensor) for value in gradients.values()))

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        self.found["loss"].append(float(trainer.callback_metrics["train/loss"]))

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.found["weights"].append({name: whole(p) for name, p in module.named_parameters()})

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.found["val"].append(float(trainer.callback_metrics["val/loss"]))


def trainer(strategy: Strategy | str, world: int, callbacks: list[pl.Callback], **settings: Any) -> pl.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return pl.Trainer(
        accelerator="cpu", devices=world, strategy=strategy, callbacks=callbacks, num_sanity_val_steps=0,
        use_distributed_sampler=False, plugins=[AtomicCheckpointIO()], **quiet, **settings,
    )  # fmt: skip


def train(
    name: str, ckpt: Path, strategy: Callable[[], Strategy | str] = lambda: "auto", rank: int = 0, world: int = 1
) -> dict[str, list[Any]]:
    """Trains a case on this process's share, saves it, and goes on in another trainer. Returns what was kept."""
    make, batches = CASES[name]
    torch.manual_seed(1)
    keep = Keep()
    module, fit = make(), trainer(strategy(), world, [keep], max_epochs=1)
    loaders = [loader([cut(batch, rank, world) for batch in given]) for given in (batches, batches[:1])]
    fit.fit(module, *loaders)
    fit.save_checkpoint(ckpt)
    trainer(strategy(), world, [keep], max_epochs=2).fit(make(), *loaders, ckpt_path=ckpt, weights_only=True)
    return keep.found


def loader(batches: Sequence[Batch]) -> DataLoader[Any]:
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def strategy(kind: str, name: str) -> Strategy:
    if kind == "ddp":
        return DDPStrategy(process_group_backend="gloo", find_unused_parameters="autoencoder" in name)
    return ModelParallelStrategy(2, 1, save_distributed_checkpoint=False, process_group_backend="gloo")


def fuzz(kind: str, rank: int, steps: int) -> dict[str, list[Any]]:
    """Batches of any size, length, padding and captions, which the processes draw apart.

    Their numbers are the same; with DDP those of held-out batches are not.
    """
    generator = torch.Generator().manual_seed(rank)
    batches = []
    for step in range(steps):
        n, frames = torch.randint(1, 5, (2,), generator=generator).tolist()
        batch = film(n, 2 + frames, 1000 * rank + step)
        batch["caption"] = [CAPTIONS[i] for i in torch.randint(0, 7, (n,), generator=generator).tolist()]
        lengths = torch.randint(1, 3 + frames, (n, 1), generator=generator)
        batches.append(batch | {"mask": torch.arange(2 + frames) < lengths} if step % 3 else batch)
    torch.manual_seed(1)
    net = SpatioTemporalDiT(3, width=8, depth=2, head_channels=8, tokens_width=8, vector_width=8)
    module = diffusion(net, Text(ByteTransformer(8, 1, 2), 0.5), LogNormal(), levels=PerStep())
    keep = Keep()
    fit = trainer(strategy(kind, ""), 2, [keep], max_epochs=1, val_check_interval=max(1, steps // 3))
    fit.fit(module, loader(batches), loader(batches[: 2 + rank if kind == "ddp" else 2]))
    return keep.found


def lopsided(kind: str, rank: int) -> dict[str, list[Any]]:
    """What is said where the second process has a batch less to train on, and then a held-out one."""
    said: list[Any] = []
    for train, held_out in ((2 - rank, 1), (2, 2 - rank)):
        batches = [film(2, 5, step) for step in range(2)]
        try:
            fit = trainer(strategy(kind, ""), 2, [], max_epochs=1)
            fit.fit(films(), loader(batches[:train]), loader(batches[:held_out]))
            said.append("")
        except ValueError as error:
            said.append(str(error))
    return {"said": said}


def main(folder: Path, runs: list[str]) -> None:
    """Runs: ddp-CASE or fsdp2-CASE, or a number of steps in the place of the case, which is a fuzz."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for run in runs:
        kind, _, name = run.partition("-")
        if name == "lopsided":
            found = lopsided(kind, rank)
        elif name.isdigit():
            found = fuzz(kind, rank, int(name))
        else:
            found = train(name, folder / f"{run}.ckpt", partial(strategy, kind, name), rank, world)
        torch.save(found, folder / f"{run}-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
