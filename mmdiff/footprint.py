"""What training by a config costs: parameters, operations, memory and time, measured in a few real steps on the CPU.

`mmdiff estimate` runs this file's `main` in a fresh process for each config, so that the peak of one is not another's.
"""

import gc
import json
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from jsonargparse import ArgumentError, ArgumentParser
from torch import nn
from torch.utils.data import DataLoader, Dataset

from .autoencoder_module import AutoencoderModule
from .config import build, plain, read_config, trust_policy
from .flops import count_flops
from .io import save
from .module import DiffusionModule
from .resident import resident

STEPS = 4  # timed ones, after one that allocates and one that is counted


@dataclass(frozen=True)
class Footprint:
    """Of one config on this machine's CPU, in float32.

    parameters: by part; their sum is all. trainable: of the sum. batch: shape of "x", or of its "latents".
    training_gflop: of a training step of the whole batch, forward and backward, discriminators included.
    sampling_gflop: of one call of the denoiser for one clip, or, for an autoencoder, of decoding one; else None.
    peak_bytes: resident memory that training added at its peak: weights, gradients, optimizer, activations, batch.
    step_s: median seconds of a training step, with the optimizer's, without the loading of data.
    """

    config: str
    parameters: dict[str, int]
    trainable: int
    batch: tuple[int, ...]
    training_gflop: float
    sampling_gflop: float | None
    peak_bytes: int
    step_s: float

    @property
    def total(self) -> int:
        return sum(self.parameters.values())


class Repeat(Dataset[dict[str, Any]]):
    """One batch, so many times."""

    def __init__(self, batch: dict[str, Any], times: int) -> None:
        self.batch, self.times = batch, times

    def __len__(self) -> int:
        return self.times

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.batch


class Watch(pl.Callback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.begin = 0.0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.begin = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seconds.append(time.perf_counter() - self.begin)


def layers(config: str) -> list[Path]:
    """The files of `A.yaml+B.yaml`, B over A as `mmdiff fit -c A.yaml -c B.yaml` reads them."""
    return [Path(config)] if Path(config).exists() else [Path(name) for name in config.split("+")]


def instantiate(
    config: str, batch_size: int | None = None, folder: Path | None = None
) -> tuple[pl.LightningModule, pl.LightningDataModule, dict[str, Any]]:
    """(module, data module, trainer's settings) of a training config, or of several: see `layers`.

    batch_size: in the place of the config's. folder: where random weights may be put of an autoencoder that the config
    names by a folder which is not there; neither operations nor memory depend on them.
    Raises ValueError for a config that does not build, naming its place in it.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(pl.LightningModule, "model")
    parser.add_subclass_arguments(pl.LightningDataModule, "data")
    trainer: dict[str, Any] = {}
    given: Any = None  # jsonargparse's Namespace
    try:
        for path in layers(config):
            tree = read_config(path)
            if given is None:
                check_whole(tree, path)
            trainer |= tree.get("trainer") or {}
            given = parser.parse_object({k: tree[k] for k in ("model", "data") if k in tree}, namespace=given)
        arguments = given.data.get("init_args") or {}
        if "num_workers" in arguments:
            arguments["num_workers"] = 0  # one batch is read
        if batch_size is not None:
            if "batch_size" not in arguments:
                raise ValueError(f"--batch-size {batch_size}: {given.data.class_path} has no argument batch_size")
            arguments["batch_size"] = batch_size
        if folder is not None:
            stand_in(given.model, folder)
        try:
            built = parser.instantiate(given)
        except ValueError as error:  # of a class that is built, with jsonargparse's words around
            raise ValueError(f"{config}: {plain(error)}") from error
    except ArgumentError as error:
        raise ValueError(f"{config}: {plain(error)}") from error
    return built.model, built.data, trainer


def check_whole(tree: Mapping[str, Any], path: Path) -> None:
    """Raises ValueError for what no `mmdiff fit` could train alone."""
    for part in ("model", "data"):
        value = tree.get(part)
        if value is None:
            raise ValueError(f"{path} has no {part}; estimate takes the configs of `mmdiff fit`")
        if isinstance(value, Mapping) and "class_path" not in value:
            raise ValueError(
                f"{path} holds only differences in {part}; give it with its base, as BASE.yaml+{path.name}"
            )


def stand_in(model: Any, folder: Path) -> None:
    """Untrained weights for the autoencoder that `autoencoder_weights` names, where that folder is not there."""
    arguments = model.get("init_args") or {}
    weights = arguments.get("autoencoder_weights")
    if weights is None or Path(weights).is_dir():
        return
    tree = arguments["model"]["init_args"]["autoencoder"].as_dict()
    arguments["autoencoder_weights"] = str(save(build(tree), tree, folder / "autoencoder"))


def first_batch(data: pl.LightningDataModule, config: str) -> dict[str, Any]:
    """What the first training step sees. Raises ValueError with one line where the data is not there."""
    try:
        data.prepare_data()
        data.setup("fit")
        return next(batch for batch in data.train_dataloader() if batch is not None)  # None: only bad items
    except (OSError, ValueError, RuntimeError, StopIteration) as error:
        raise ValueError(f"{config}: no batch of its data: {error}") from error


def parts(module: nn.Module) -> dict[str, int]:
    """Parameters by part, in the words of the suite; of a module that is not ours, by child."""
    if isinstance(module, DiffusionModule):
        model = module.model
        named: dict[str, nn.Module | None] = {
            "backbone": model.denoiser.backbone, "conditioner": model.conditioner, "autoencoder": model.autoencoder
        }  # fmt: skip
    elif isinstance(module, AutoencoderModule):
        named = {"autoencoder": module.model, "front": module.front, "discriminators": module.adversarial}
    else:
        named = dict(module.named_children())
    seen: set[int] = set()
    counts = {name: _count(part, seen) for name, part in named.items() if part is not None}
    counts["other"] = _count(module, seen)
    return {name: count for name, count in counts.items() if count}


def _count(module: nn.Module, seen: set[int]) -> int:
    """Parameters that are not in `seen`, which they join: one that two parts share counts once."""
    new = {id(p): p.numel() for p in module.parameters() if id(p) not in seen}
    seen.update(new)
    return sum(new.values())


@torch.no_grad()
def sampling_flops(module: nn.Module, batch: Mapping[str, Any]) -> int | None:
    """Operations of a call of the denoiser for one clip, or of one clip's decoding."""
    one = {name: value[:1] if hasattr(value, "__getitem__") else value for name, value in batch.items()}
    module.eval()
    if isinstance(module, DiffusionModule):
        latents = module.model.latents(one)
        denoise = module.model.bind(module.model.condition({**one, "latents": latents}))
        return count_flops(lambda: denoise(latents, torch.ones(1)))
    if isinstance(module, AutoencoderModule):
        latents = module.model.encode(module.data(one))
        return count_flops(lambda: module.model.decode(latents))
    return None


def measure(config: str, trusted: Sequence[str] = (), batch_size: int | None = None) -> Footprint:
    """The footprint of a training config, from steps on the first batch of its data. Meant for a fresh process."""
    trust_policy(trusted)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        before = resident()
        module, data, settings = instantiate(config, batch_size, Path(folder))
        batch = first_batch(data, config)
        if isinstance(module, AutoencoderModule) and module.adversarial is not None:
            module.adversarial.start = 0  # what it costs when all of it runs
        watch = Watch()
        fit(module, batch, settings, STEPS + 1, [watch])
        peak = resident(peak=True) - before
        counted = count_flops(lambda: fit(module, batch, settings, 1))
    return Footprint(
        config=config,
        parameters=parts(module),
        trainable=sum(p.numel() for p in module.parameters() if p.requires_grad),
        batch=tuple(batch["latents" if "latents" in batch else "x"].shape),
        training_gflop=counted / 1e9,
        sampling_gflop=None if (flops := sampling_flops(module, batch)) is None else flops / 1e9,
        peak_bytes=peak,
        step_s=statistics.median(watch.seconds[1:]),
    )


def fit(
    module: pl.LightningModule,
    batch: dict[str, Any],
    settings: Mapping[str, Any],
    steps: int,
    callbacks: Sequence[pl.Callback] = (),
) -> None:
    """Training steps on one batch, in float32 on the CPU, without logs, validation and checkpoints."""
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, logger=False, enable_checkpointing=False, barebones=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, num_sanity_val_steps=0,
        gradient_clip_val=settings.get("gradient_clip_val"), callbacks=[*callbacks],
    )  # fmt: skip
    trainer.fit(module, train_dataloaders=DataLoader(Repeat(batch, steps), batch_size=None))
    gc.collect()


def main(args: Sequence[str]) -> int:
    """Prints the footprint of a config as a line of JSON, or a line of error: CONFIG BATCH_SIZE|- [PACKAGE ...]."""
    config, batch_size, *trusted = args
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    try:
        found = measure(config, trusted, None if batch_size == "-" else int(batch_size))
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    print(json.dumps(asdict(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
