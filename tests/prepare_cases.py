"""Small clips and preparations of them, for the tests of `mmdiff data prepare`."""

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from mmdiff.data.prepare import Recipe
from mmdiff.data.prepare_engines import Engine, Local
from mmdiff.data.prepare_run import prepare
from mmdiff.data.sources import load_source
from video.curation import VideoMedium
from video.files import EXTENSIONS, write_video


def clip(seed: int, frames: int = 8, size: tuple[int, int] = (32, 32), moving: bool = True) -> torch.Tensor:
    """(3, T, H, W): coloured blocks of their own for every seed, drifting."""
    blocks = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    picture = F.interpolate(blocks, size)[0]
    return torch.stack([torch.roll(picture, 2 * t if moving else 0, -1) for t in range(frames)], dim=1)


def make_clips(folder: Path, count: int, frames: int = 8) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(count):
        write_video(folder / f"c{seed:05d}.mp4", clip(seed, frames), 8, preset="ultrafast")
        (folder / f"c{seed:05d}.txt").write_text(f"clip number {seed}\nno. {seed}")
    return folder


def shards(out: Path) -> dict[str, str]:
    """Name -> SHA-256 of all that is published, the account included."""
    files = [*out.glob("*.tar"), *out.glob("*.jsonl"), out / "prepared.json"]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def run(
    source: Path, out: Path, engine: Engine | None = None, recipe: Recipe | None = None, **settings: Any
) -> dict[str, Any]:
    recipe = recipe or Recipe(VideoMedium())
    return prepare(load_source(source, EXTENSIONS, val_share=0), recipe, out, engine or Local(1), **settings)
