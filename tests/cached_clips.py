"""Small films and sounds whose content tells where it is, small autoencoders, and caches of them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from audio.data import ClipDataModule as SoundModule
from audio.files import write_audio
from mmdiff.autoencoder import ConvKL, Pool
from mmdiff.backbones import UNet
from mmdiff.conditioning import Number
from mmdiff.data.cache import LatentCache
from mmdiff.density import LogNormal
from mmdiff.io import save
from mmdiff.model import DiffusionModel
from mmdiff.module import DiffusionModule
from mmdiff.precond import EDM
from video.data import ClipDataModule as VideoModule
from video.files import write_video

LONG, FPS, RATE = 24, 8, 1000  # frames of the longer films; frames a second; Hz of the sounds
POOL = [1, 4, 4]


def make_films(root: Path) -> Path:
    """Five films of 24 frames whose grey level counts the frames, from a level of each film's own."""
    for index in range(5):
        level = (torch.arange(LONG) * 0.06 + index * 0.02).view(1, LONG, 1, 1) - 0.9
        write_video(root / f"film_{index}.mp4", level.expand(3, LONG, 16, 16), fps=FPS)
        (root / f"film_{index}.txt").write_text(f"film {index}\nanother {index}")
    return root


def make_sounds(root: Path) -> Path:
    """Four sounds of 2 s whose level counts the milliseconds."""
    for index in range(4):
        write_audio(root / f"sound_{index}.wav", torch.linspace(-0.9, 0.9 - index * 0.1, 2 * RATE)[None], RATE)
        (root / f"sound_{index}.txt").write_text(f"sound {index}")
    return root


def exported(folder: Path, seed: int = 0, width: int = 4) -> Path:
    """A learned autoencoder of videos, as training would leave it."""
    tree = {
        "class_path": "mmdiff.autoencoder.ConvKL",
        "init_args": {"channels": 3, "latent_channels": 2, "steps": [[1, 2, 2]], "width": width},
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ConvKL(3, 2, [[1, 2, 2]], width=width)
        for p in model.parameters():  # nothing is zero
            p.data.add_(0.05 * torch.randn(p.shape))
    return save(model, tree, folder)


def pooled(folder: Path, factors: list[int]) -> Path:
    """An autoencoder whose latents are means, so that they tell what the clip showed."""
    return save(Pool(factors), {"class_path": "mmdiff.autoencoder.Pool", "init_args": {"factors": factors}}, folder)


def video(films: Path, **settings: Any) -> VideoModule:
    return VideoModule(str(films), **{"frames": 4, "size": (16, 16), "batch_size": 2, "val_share": 0.3, **settings})


def sound(sounds: Path, **settings: Any) -> SoundModule:
    given = {"sample_rate": RATE, "samples": 500, "batch_size": 2, "val_share": 0.3, **settings}
    return SoundModule(str(sounds), **given)


def cache(data: Any, autoencoder: Path, folder: Path, **settings: Any) -> LatentCache:
    return LatentCache(data, str(autoencoder), str(folder), **{"device": "cpu", **settings})


def opened(module: LatentCache) -> LatentCache:
    module.prepare_data()
    module.setup()
    return module


def batches(module: Any, epoch: int = 0, split: str = "train") -> list[dict[str, Any]]:
    loader = getattr(module, f"{split}_dataloader")()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def entries(folder: Path) -> set[Path]:
    return set(folder.glob("??/*.safetensors"))


def same(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> bool:
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(torch.equal(v, y[k]) if isinstance(v, Tensor) else v == y[k] for k, v in x.items())
        for x, y in zip(a, b, strict=True)
    )


def diffusion(autoencoder: Path) -> DiffusionModule:
    torch.manual_seed(3)
    backbone = UNet(
        axes=3, in_channels=2, channels=4, multipliers=[1], factors=[], kernels=[[1, 3, 3]], attend=[[]],
        vector_width=4,
    )  # fmt: skip
    model = DiffusionModel(backbone, EDM(1.0), Number("total_s", 4, 0.0, 10.0), ConvKL(3, 2, [[1, 2, 2]], width=4))
    return DiffusionModule(model, LogNormal(), autoencoder_weights=str(autoencoder))
