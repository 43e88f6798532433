"""Scenes of the world as a data set, and what the data modules of each modality share."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, overload

from lightning.pytorch import LightningDataModule
from torch import Tensor

from mmdiff.data.bad import BadItems
from mmdiff.data.batches import Plan
from mmdiff.data.clips import ClipDataset, collate
from mmdiff.data.items import Item
from mmdiff.data.loader import ClipLoader

from .draw import EASY, World
from .log import Scene

Render = Callable[[Scene], Tensor | dict[str, Tensor]]
Caption = Callable[[Scene], str]
TEST_FROM = 1_000_000_000  # scenes for tests have the indices from minus this downwards


class WorldDataset(ClipDataset):
    """Scenes with the indices `start, start + step, ...` as items of a data module's batch.

    render:  from a scene to x (C, T, ...) in [-1, 1], with `rate` steps of T a second over `duration_s` seconds; or to
             one of each modality by its name, and rate likewise.
    caption: from a scene to its text.
    Raises ValueError if `count` is not positive.
    """

    def __init__(
        self,
        render: Render,
        caption: Caption,
        count: int,
        rate: float | dict[str, float],
        duration_s: float,
        seed: int = 0,
        start: int = 0,
        step: int = 1,
        world: World | None = None,
    ) -> None:
        if count < 1:
            raise ValueError(f"count={count} is not a positive number of scenes")
        super().__init__([], _no_decoder, seed=seed)
        self.items = _Names(seed, range(start, start + step * count, step))  # type: ignore[assignment]
        self.render, self.describe = render, caption
        self.rate, self.duration_s = rate, duration_s
        self.world = world or EASY

    def scene(self, i: int) -> Scene:
        """The scene of item i."""
        return self.world.scene(self.items.indices[i], self.seed, self.duration_s)  # type: ignore[attr-defined]

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        place = index[1] if isinstance(index, tuple) else index
        if not 0 <= place < len(self):
            raise IndexError(f"item {place} of {len(self)}")
        drawn = self.scene(place)
        return {
            "x": self.render(drawn),
            "caption": self.describe(drawn),
            "rate": self.rate,
            "duration_s": self.duration_s,
            "start_s": 0.0,
            "total_s": self.duration_s,
            "key": self.items[place].key,
            "meta": dataclasses.asdict(drawn),
        }


class _Names(Sequence[Item]):
    """The items of a data set that is too long for a list of them."""

    def __init__(self, seed: int, indices: range) -> None:
        self.seed, self.indices = seed, indices

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, place: int) -> Item: ...
    @overload
    def __getitem__(self, place: slice) -> "_Names": ...
    def __getitem__(self, place: int | slice) -> "Item | _Names":
        if isinstance(place, slice):
            return _Names(self.seed, self.indices[place])
        key = f"world-{self.seed}-{self.indices[place]}"
        return Item(key, key, [], {}, Path(key))


def _no_decoder(item: Item, rng: Any) -> Any:
    raise AssertionError(f"{item.where} is drawn, not decoded")


def train_and_val(
    render: Render,
    caption: Caption,
    count: int,
    val_count: int,
    rate: float | dict[str, float],
    duration_s: float,
    seed: int,
    world: World | None = None,
) -> tuple[WorldDataset, WorldDataset]:
    """Training scenes 0, 1, ... and validation scenes -1, -2, ...: disjoint, whatever the counts grow to.

    If the world holds combinations out, both are of seen ones.
    """
    world = _part(world or EASY, "seen")
    train = WorldDataset(render, caption, count, rate, duration_s, seed, world=world)
    return train, WorldDataset(render, caption, val_count, rate, duration_s, seed, start=-1, step=-1, world=world)


def _part(world: World, split: Any) -> World:
    if world.held_out is None or world.split != "all":
        return world
    return dataclasses.replace(world, split=split)


class WorldClips(LightningDataModule):
    """What the data modules of the world share: its training, validation and test scenes as batches.

    Test scenes are as many as those of validation: of held-out combinations if `world.held_out` names some, of which
    the others then have none, else any. The loaders resume in the middle of an epoch (`mmdiff.data.loader`).
    Raises ValueError for a wrong argument.
    """

    def __init__(
        self,
        render: Render,
        caption: Caption,
        rate: float | dict[str, float],
        duration_s: float,
        *,
        count: int,
        val_count: int,
        batch_size: int,
        num_workers: int,
        seed: int,
        world: World | None,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is below 1; a batch needs at least one clip")
        if num_workers < 0:
            raise ValueError(f"num_workers={num_workers} is negative; 0 draws in the main process")
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.train, self.val = train_and_val(render, caption, count, val_count, rate, duration_s, seed, world)
        self.test = WorldDataset(
            render, caption, val_count, rate, duration_s, seed, -TEST_FROM, -1, _part(world or EASY, "held-out")
        )

    def train_dataloader(self) -> ClipLoader:
        return self._loader(self.train, "train")

    def val_dataloader(self) -> ClipLoader:
        return self._loader(self.val, "val")

    def test_dataloader(self) -> ClipLoader:
        return self._loader(self.test, "test")

    def _loader(self, dataset: WorldDataset, split: str) -> ClipLoader:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        train = split == "train"
        return ClipLoader(
            dataset,
            Plan((tuple(range(len(dataset))),), (self.batch_size,), train, self.seed),
            collate,
            BadItems(split, dataset.items, 0.0),
            train=train,
            num_workers=self.num_workers,
            rank=rank,
            world_size=world_size,
        )
