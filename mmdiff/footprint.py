"""What a training config is made of: parameters and operations, exact; and how to measure what training it takes.

`mmdiff estimate` runs this file's `main` in a process of its own for each config, and then the rehearsal that it names.
"""

import gc
import json
import logging
import sys
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
from .rehearsal import SECONDS, rehearsal

ENCODED = 16  # clips of a LatentCache that a rehearsal encodes, so that its memory is that of encoding them all


@dataclass(frozen=True)
class Footprint:
    """Of one config.

    parameters: by part; their sum is all. trainable: of the sum. batch: shape of "x", or of its "latents".
    batches: to an optimizer step.
    training_gflop: of an optimizer step, forward and backward, discriminators included.
    sampling_gflop: of one call of the denoiser for one clip, or, for an autoencoder, of decoding one; else None.
    """

    config: str
    parameters: dict[str, int]
    trainable: int
    batch: tuple[int, ...]
    batches: int
    training_gflop: float
    sampling_gflop: float | None

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


def layers(config: str) -> list[Path]:
    """The files of `A.yaml+B.yaml`, B over A as `mmdiff fit -c A.yaml -c B.yaml` reads them."""
    return [Path(config)] if Path(config).exists() else [Path(name) for name in config.split("+")]


def instantiate(
    config: str, batch_size: int | None = None, folder: Path | None = None
) -> tuple[pl.LightningModule, pl.LightningDataModule, dict[str, Any]]:
    """(module, data module, trainer's settings) of a training config, or of several: see `layers`.

    batch_size, folder: see `changes`; without a folder nothing is changed for what is not there.
    Raises ValueError for a config that does not build, naming its place in it.
    """
    parser, given, trainer = parsed(config)
    try:
        if changed := changes(given, batch_size, folder):
            given = parser.parse_object(changed, namespace=given)
        if "num_workers" in (given.data.get("init_args") or {}):
            given.data.init_args.num_workers = 0  # one batch is read
        try:
            built = parser.instantiate(given)
        except ValueError as error:  # of a class that is built, with jsonargparse's words around
            raise ValueError(f"{config}: {plain(error)}") from error
    except ArgumentError as error:
        raise ValueError(f"{config}: {plain(error)}") from error
    return built.model, built.data, trainer


def parsed(config: str) -> tuple[ArgumentParser, Any, dict[str, Any]]:
    """(parser, jsonargparse's Namespace of model and data, trainer's settings) of a config, with nothing built."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(pl.LightningModule, "model")
    parser.add_subclass_arguments(pl.LightningDataModule, "data")
    trainer: dict[str, Any] = {}
    given: Any = None
    try:
        for path in layers(config):
            tree = read_config(path)
            if given is None:
                check_whole(tree, path)
            trainer |= tree.get("trainer") or {}
            given = parser.parse_object({k: tree[k] for k in ("model", "data") if k in tree}, namespace=given)
    except ArgumentError as error:
        raise ValueError(f"{config}: {plain(error)}") from error
    return parser, given, trainer


def changes(given: Any, batch_size: int | None, folder: Path | None) -> dict[str, Any]:
    """What to set of a config's model and data besides what it says, as a config of differences.

    given: of `parsed`. batch_size: in the place of the config's. folder: where random weights are put of an
    autoencoder that the config names by a folder which is not there, on which neither operations nor memory depend,
    and the few latents of a cache. With it, discriminators start at once. ValueError where the data has no batch size.
    """
    outer: Any = given.data.get("init_args") or {}
    cached = "autoencoder" in outer and "data" in outer  # a LatentCache, around the data of the clips
    clips = outer.data if cached else given.data
    arguments = clips.get("init_args") or {}
    own: dict[str, Any] = {}
    if batch_size is not None:
        if "batch_size" not in arguments:
            raise ValueError(f"--batch-size {batch_size}: {clips.class_path} has no argument batch_size")
        own["batch_size"] = batch_size
    if folder is None:
        return {"data": {"init_args": {"data": {"init_args": own}} if cached else own}} if own else {}
    made, found = stand_in(given.model, folder), {"data": {"init_args": own}} if own else {}
    model: dict[str, Any] = {} if made is None else {"autoencoder_weights": made}
    if (given.model.get("init_args") or {}).get("adversarial") is not None:
        model["adversarial"] = {"init_args": {"start": 0}}
    if cached:
        own["limit"] = arguments.get("limit") or max(ENCODED, batch_size or arguments.get("batch_size", 1))
        encoder = outer.autoencoder if made is None or Path(outer.autoencoder).is_dir() else made
        found = {"data": {"init_args": {
            "data": {"init_args": own}, "autoencoder": encoder, "folder": str(folder / "latents")
        }}}  # fmt: skip
    return {**({"model": {"init_args": model}} if model else {}), **found}


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


def stand_in(model: Any, folder: Path) -> str | None:
    """A folder of untrained weights in the place of `autoencoder_weights`, where that names none that is there."""
    arguments = model.get("init_args") or {}
    weights = arguments.get("autoencoder_weights")
    if weights is None or Path(weights).is_dir():
        return None
    made = folder / "autoencoder"
    if not made.is_dir():
        tree = arguments["model"]["init_args"]["autoencoder"].as_dict()
        save(build(tree), tree, made)
    return str(made)


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


def measure(config: str, folder: Path, trusted: Sequence[str] = (), batch_size: int | None = None) -> Footprint:
    """The footprint of a training config, from one step on the first batch of its data. folder: see `changes`."""
    trust_policy(trusted)
    module, data, settings = instantiate(config, batch_size, folder)
    batch = first_batch(data, config)
    counted = count_flops(lambda: fit(module, batch, settings, 1))
    batches = (settings.get("accumulate_grad_batches") or 1) * getattr(module, "accumulate", 1)
    flops = sampling_flops(module, batch)
    return Footprint(
        config=config,
        parameters=parts(module),
        trainable=sum(p.numel() for p in module.parameters() if p.requires_grad),
        batch=tuple(batch["latents" if "latents" in batch else "x"].shape),
        batches=batches,
        training_gflop=counted * batches / 1e9,
        sampling_gflop=None if flops is None else flops / 1e9,
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
    """Prints the footprint of a config and the arguments of its rehearsal as a line of JSON, or a line of error.

    args: CONFIG FOLDER BATCH_SIZE|- [PACKAGE ...].
    """
    config, name, size, *trusted = args
    folder, batch_size = Path(name), None if size == "-" else int(size)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    try:
        found = measure(config, folder, trusted, batch_size)
        _, given, settings = parsed(config)
        words = rehearsal(layers(config), settings, changes(given, batch_size, folder), folder, trusted)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    print(json.dumps({"found": asdict(found), "rehearsal": words, "seconds": str(folder / SECONDS)}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
