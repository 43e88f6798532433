"""A training step on latents that were encoded once, beside one that decodes and encodes its clips.

usage: python benchmarks/cache.py [--data FOLDER] [--device auto|cpu|cuda] [--seconds N] [--json FILE]

Takes about 3 minutes on two cores. The clips are the LPC sprites, 15 frames of 64x64; the autoencoder is that of
configs/video/autoencoder.yaml, the backbones those of configs/video/sprites.yaml and configs/tiny/video.yaml, all with
random weights, which cost as much as trained ones. The larger the backbone, the less of a step is there to be saved.
Batches of 4 are made in the process that trains, so that nothing is hidden in a worker: a worker that decodes needs a
core of its own all the same. The steps alternate; the table has medians.

Ends with the bar: at least 3 times as fast with the small backbone. Exit status: 0 met, 1 missed.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.bars import Bar, exit_status, print_bars
from benchmarks.measure import Work, interval, measure_rounds
from mmdiff.config import build, read_config
from mmdiff.data.cache import LatentCache
from mmdiff.density import LogNormal
from mmdiff.generate import Parser, pick_device
from mmdiff.io import save
from mmdiff.model import DiffusionModel
from mmdiff.module import DiffusionModule
from mmdiff.precond import EDM
from video.data import ClipDataModule

ROOT = Path(__file__).resolve().parent.parent
CLIPS, BATCH, FRAMES = 24, 4, 15
SMALL = "tiny/video.yaml"
BACKBONES = ("video/sprites.yaml", SMALL)
BAR = 3.0


def argument(config: str, *names: str) -> Any:
    """The tree at these names below `model.init_args.model` of a config of ours."""
    tree = read_config(ROOT / "configs" / config)["model"]["init_args"]["model"]
    for name in names:
        tree = tree["init_args"][name]
    return tree


def data(folder: str) -> ClipDataModule:
    size = (64, 64)
    return ClipDataModule(folder, frames=FRAMES, size=size, resize="cover", short="pad", batch_size=BATCH, limit=CLIPS)


def module(config: str, autoencoder: Path) -> DiffusionModule:
    """The backbone and conditioner of a config, in the latent space of the exported autoencoder."""
    backbone = argument(config, "backbone")
    latent = {**backbone, "init_args": {**backbone["init_args"], "in_channels": 16}}
    conditioner = build(argument(config, "conditioner"))
    conditioner.encoder.max_words = 96  # the sprites' captions are long
    model = DiffusionModel(build(latent), EDM(), conditioner, build(argument("video/autoencoder.yaml")))
    return DiffusionModule(model, LogNormal(), autoencoder_weights=str(autoencoder))


def batches(loader: Any) -> Iterator[dict[str, Any]]:
    """Epoch after epoch."""
    epoch = 0
    while True:
        loader.sampler.set_epoch(epoch)
        yield from loader
        epoch += 1


def step(trained: DiffusionModule, found: Iterator[dict[str, Any]], device: torch.device) -> Work:
    """One batch, and what a training step does to it."""
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad])

    def work() -> None:
        batch = next(found)
        moved = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
        trained.losses(moved, (0, 0, 0))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return work


def main(args: list[str]) -> int:
    """Prints the table and the bar."""
    options = Parser("benchmarks/cache.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", default=str(ROOT.parent / "shared" / "data" / "lpc_sprites"), metavar="FOLDER")
    options.add_argument("--device", default="auto")
    options.add_argument("--seconds", type=float, default=120.0, help="for the timing")
    options.add_argument("--json", type=Path)
    given = options.parse_args(args)
    device = torch.device(pick_device(given.device))
    with tempfile.TemporaryDirectory() as folder:
        tree = argument("video/autoencoder.yaml")
        autoencoder = save(build(tree), tree, Path(folder) / "autoencoder")
        plain = data(given.data)
        plain.setup()
        cached = LatentCache(data(given.data), str(autoencoder), f"{folder}/latents", device=str(device))
        found = cached.encode()
        cached.setup()
        works: dict[str, Work] = {}
        for config in BACKBONES:
            trained = module(config, autoencoder).to(device)
            for name, source in (("on the fly", plain), ("cached", cached)):
                works[f"{config}, {name}"] = step(trained, batches(source.train_dataloader()), device)
        rounds = measure_rounds(works, device, given.seconds)
    print(f"{BATCH} clips of {FRAMES} frames of 64x64, {device}, {torch.get_num_threads()} threads")
    for name in works:
        print(f"{name:34}{1000 * rounds.median(name):10.1f} ms a step")
    print(f"encoding {found.made} clips: {found.seconds:.1f} s, {found.bytes / 2**20:.1f} MiB")
    ratios = {config: interval(rounds.ratios(f"{config}, on the fly", f"{config}, cached")) for config in BACKBONES}
    for config, ratio in ratios.items():
        print(f"{config:34}{ratio.median:10.2f} times as fast ({ratio.low:.2f} to {ratio.high:.2f})")
    bars = [Bar(f"step of {SMALL} on cached latents", BAR, ratios[SMALL].median)]
    print_bars(bars)
    if given.json:
        numbers = {"seconds": rounds.seconds, "ratios": {c: r.median for c, r in ratios.items()}}
        given.json.write_text(json.dumps(numbers, indent=1) + "\n", "utf-8")
    return exit_status(bars)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
