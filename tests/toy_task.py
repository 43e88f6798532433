"""A toy of an evaluation: clips whose level tells a hue and whose brighter half in time a place, and a task of them."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmdiff.evaluate
from mmdiff.cascade import Cascade, Clip, Stage
from mmdiff.data.clips import ClipDataset, Sample
from mmdiff.data.sources import Item
from mmdiff.evaluate import evaluate
from mmdiff.readers import Reader, Recipe
from mmdiff.tasks import Task

HUES, PLACES = ("bright", "dark"), ("back", "front")


def toy_clip(hue: str, place: str, key: int) -> Tensor:
    """(3, 4, 8, 8): the level tells the hue, the brighter half in time the place."""
    x = torch.full((3, 4, 8, 8), 0.4 if hue == "bright" else -0.4)
    x[:, slice(0, 2) if place == "front" else slice(2, 4)] += 0.3
    return x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(key))


def toy_item(number: int, split: str) -> Item:
    meta = {"hue": HUES[number % 2], "place": PLACES[number // 2 % 2], "number": number}
    key, caption = f"{split}{number}", f"{meta['hue']} {meta['place']}, {split} {number}"
    return Item(key, key, [caption], meta, Path())


def toy_decode(item: Item, rng: random.Random | None) -> Sample:
    return Sample(toy_clip(item.meta["hue"], item.meta["place"], item.meta["number"]), 8.0, 0.5)


def toy_splits(path: str = "", shape: tuple[int, ...] = (), rate: float = 0.0) -> tuple[ClipDataset, ClipDataset]:
    return (
        ClipDataset([toy_item(i, "train") for i in range(64)], toy_decode, train=True),
        ClipDataset([toy_item(i, "val") for i in range(100, 124)], toy_decode),
    )


class ToyReader(Reader):
    """Reads the mean level of each half of the clip."""

    def __init__(self, answers: dict[str, list[str]]) -> None:
        super().__init__(answers)
        self.net = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, sum(self.sizes)))

    def reduce(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (2, -1)).mean(dim=(1, 3, 4, 5))

    def augment(self, kept: Tensor, generator: torch.Generator) -> Tensor:
        return kept + 0.02 * torch.randn(kept.shape, generator=generator)

    def features(self, kept: Tensor) -> Tensor:
        return kept

    def forward(self, kept: Tensor) -> Tensor:
        return self.net(kept)


def no_show(folder: Path, clip: Clip, titles: list[str]) -> None:
    assert len(clip.data) == len(titles)
    (folder / "titles.json").write_text(json.dumps([clip.data.shape[0], titles]))


def toy_task(path: Path = Path()) -> Task:
    return Task(
        about="a toy", data=str(path), pipeline=path, splits=toy_splits, attributes=("hue", "place"),
        turns=(("hue",), ("place",)), reader=ToyReader, recipe=Recipe(epochs=40, batch_size=16, lr=0.03), show=no_show,
    )  # fmt: skip


@dataclass(frozen=True)
class Draw(Stage):
    """Makes what `clip_of` makes of each caption and of noise of the clip's shape."""

    clip_of: Callable[[str, Tensor], Tensor]
    steps: int = 3
    guidance: float = 1.0

    def needs(self, shape: tuple[int, ...], rate: float) -> None:
        return None

    def __call__(self, prompt: Any, start: Any = None, *, shape: Any, rate: float, noise: Any, negative: Any = None,
                 progress: Any = None) -> Clip:  # fmt: skip
        eps = noise(torch.empty(len(prompt["caption"]), *shape))
        progress(self.steps, self.steps)
        return Clip(torch.stack([self.clip_of(c, e) for c, e in zip(prompt["caption"], eps, strict=True)]), rate)


def cascade_of(clip_of: Callable[[str, Tensor], Tensor], rate: float = 8.0) -> Cascade:
    return Cascade({"base": Draw(clip_of)}, (3, 4, 8, 8), rate)


def obedient(caption: str, eps: Tensor) -> Tensor:
    hue, place = caption.split(",")[0].split()
    return toy_clip(hue, place, int(eps[0, 0, 0, 0].abs() * 1e6))


def toy_report(clip_of: Callable[[str, Tensor], Tensor], **settings: Any) -> dict[str, Any]:
    given = {"count": 24, "seed": 0, "batch_size": 7, **settings}
    return evaluate(toy_task(), cascade_of(clip_of), toy_splits(), **given)


@dataclass(frozen=True)
class Entry:
    """Stands for an installed entry point."""

    name: str
    value: str
    task: Callable[[], Task]

    def load(self) -> Callable[[], Task]:
        return self.task


def install(monkeypatch: pytest.MonkeyPatch, *entries: Entry) -> None:
    monkeypatch.setattr(mmdiff.evaluate, "entry_points", lambda group: entries if group == "mmdiff.evals" else ())
