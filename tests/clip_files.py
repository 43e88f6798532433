"""Clips that cost nothing: files that hold a number each, for the tests of what is around the decoding."""

import random
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mmdiff.data.batches import Buckets, Shape
from mmdiff.data.clips import ClipDataModule, Decode, Sample
from mmdiff.data.items import Item
from mmdiff.data.media import DamagedError


@dataclass(frozen=True)
class Numbers:
    """A file `N`, or `N steps`, or `bad`, or `sleep`, as a clip of that number and one that the generator draws."""

    steps: int = 2

    def __call__(self, item: Item, rng: random.Random | None) -> Sample:
        text = item.path.read_text()
        if text == "bad":
            raise DamagedError(f"{item.where}: is bad")
        if text == "sleep":
            time.sleep(600)
        drawn = rng.random() if rng else 0.0
        data = torch.tensor([float(text.split()[0]), drawn]).view(1, 2, 1, 1).expand(1, 2, self.steps, 1).contiguous()
        return Sample(data[0], 8.0, self.steps / 8)

    def own(self, item: Item) -> Shape:
        text = item.path.read_text()
        if text == "bad":
            raise DamagedError(f"{item.where}: is bad")
        return Shape(int(text.split()[1]), 8.0, (1,))

    @property
    def asked(self) -> Shape:
        return Shape(self.steps, 8.0, (1,))

    def to(self, shape: Shape) -> "Numbers":
        return replace(self, steps=shape.steps)


class NumberModule(ClipDataModule):
    """Data module of such files."""

    extensions = (".n",)

    def __init__(
        self, path: str, batch_size: int = 2, num_workers: int = 0, max_bad_share: float = 1.0, seed: int = 0,
        val_share: float = 0.0, buckets: Buckets | None = None, timeout_s: float = 60.0,
    ) -> None:  # fmt: skip
        super().__init__(
            path, batch_size=batch_size, num_workers=num_workers, caption="none", val_share=val_share,
            max_bad_share=max_bad_share, seed=seed, limit=None, buckets=buckets, timeout_s=timeout_s,
        )  # fmt: skip

    def decoder(self) -> Decode:
        return Numbers()


def write_numbers(folder: Path, texts: list[str]) -> Path:
    """A folder whose files 000.n, 001.n, ... hold these texts."""
    folder.mkdir(parents=True, exist_ok=True)
    for place, text in enumerate(texts):
        (folder / f"{place:03d}.n").write_text(text)
    return folder
