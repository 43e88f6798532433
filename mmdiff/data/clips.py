"""Clips for training: a map-style dataset with an error budget, and the data module that holds all but decoding.

B batch, C channels, T time. Every random choice is a function of (seed, epoch, index): worker count, prefetch and
what ran before do not change a batch.
"""

import random
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from mmdiff.data.media import MediaError
from mmdiff.data.sources import SPLITS, Item, load_source

CaptionChoice = Literal["first", "random", "none"]


@dataclass(frozen=True)
class Sample:
    """A decoded clip. data: (C, T, ...) float32 in [-1, 1]; rate: steps of T per second; duration_s: before padding."""

    data: Tensor
    rate: float
    duration_s: float


Decode = Callable[[Item, random.Random | None], Sample]  # without a generator: the same clip every time


class ClipDataset(Dataset[dict[str, Any]]):
    """Decoded, captioned clips. An index is `i` or `(epoch, i)`; the epoch only feeds the random choices.

    An item that raises MediaError is warned of once, with its place and reason, and replaced by the next good one.
    Budget: the distinct bad items may be at most `max_bad_share` of all items of the dataset, so that one bad item
    of 10 fails at 0.01 and one of 3000 does not; over it ValueError lists them. Each worker process counts for itself.
    train: random crops and captions; without it every epoch is the same and the first caption is taken.
    """

    def __init__(
        self,
        items: Sequence[Item],
        decode: Decode,
        *,
        train: bool = False,
        caption: CaptionChoice = "first",
        max_bad_share: float = 0.01,
        seed: int = 0,
    ) -> None:
        self.items = list(items)
        self.decode = decode
        self.train = train
        self.caption = caption
        self.max_bad_share = max_bad_share
        self.seed = seed
        self.bad: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        epoch, first = index if isinstance(index, tuple) else (0, index)
        if not -len(self.items) <= first < len(self.items):
            raise IndexError(f"index {first} of {len(self.items)} items")
        for step in range(len(self.items)):
            place = (first + step) % len(self.items)
            if place in self.bad:
                continue
            rng = random.Random(f"{self.seed}/{epoch}/{first}") if self.train else None
            item = self.items[place]
            try:
                sample = self.decode(item, rng)
            except MediaError as error:
                self._count_bad(place, str(error))
                continue
            return {"x": sample.data, "caption": self._caption_of(item, rng), "rate": sample.rate,
                    "duration_s": sample.duration_s, "key": item.key, "meta": item.meta}  # fmt: skip
        raise ValueError(f"none of the {len(self.items)} items can be decoded: {self._list_of_bad()}")

    def _caption_of(self, item: Item, rng: random.Random | None) -> str:
        if self.caption == "none":
            return ""
        if self.caption == "random" and rng is not None:
            return rng.choice(item.captions)
        return item.captions[0]

    def _count_bad(self, place: int, reason: str) -> None:
        where = self.items[place].where
        self.bad[place] = reason if where in reason else f"{where}: {reason}"
        warnings.warn(f"bad item left out: {self.bad[place]}", stacklevel=3)
        if len(self.bad) > self.max_bad_share * len(self.items):
            raise ValueError(
                f"{len(self.bad)} of {len(self.items)} items are bad, more than max_bad_share={self.max_bad_share}; "
                f"repair or remove them, or raise max_bad_share: {self._list_of_bad()}"
            )

    def _list_of_bad(self) -> str:
        lines = list(self.bad.values())
        return "; ".join(lines[:20]) + (f"; and {len(lines) - 20} more" if len(lines) > 20 else "")


class EpochSampler(DistributedSampler[Any]):
    """Order of the items as a function of (seed, epoch) alone, as pairs (epoch, index), strided over the ranks.

    The epoch travels with the index because persistent workers hold a copy of the dataset from the first epoch.
    Lightning calls `set_epoch` and, as it is a DistributedSampler, does not wrap it in another.
    """

    def __init__(self, dataset: Dataset[Any], *, shuffle: bool, seed: int, rank: int = 0, world_size: int = 1) -> None:
        # torch shuffles by seed + epoch; the factor keeps neighbouring seeds from sharing their epochs
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed * 100003)

    def __iter__(self) -> Iterator[Any]:
        return iter([(self.epoch, index) for index in super().__iter__()])


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch: x (B, C, T, ...), rate and duration_s (B,) float32; caption, key and meta lists of length B."""
    batch: dict[str, Any] = {name: [sample[name] for sample in samples] for name in samples[0]}
    batch["x"] = torch.stack(batch["x"])
    for name in ("rate", "duration_s"):
        batch[name] = torch.tensor(batch[name], dtype=torch.float32)
    return batch


class ClipDataModule(LightningDataModule, ABC):
    """Captioned clips of one folder or shard set as train, val and test loaders; a subclass says how to decode.

    path: folder of tar shards or media (see `mmdiff.data.sources.load_source`); `~` is expanded, a relative path is
    relative to the working directory. caption: the first, a random one in training, or none (""; captions may then be
    missing). limit: only that many first items of each split. A batch is described at `collate`.
    Raises ValueError for a wrong argument, and from `prepare_data` and `setup` for missing or unusable data: also when
    more than `max_bad_share` of a split's entries lack their media or caption.
    """

    extensions: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        path: str,
        *,
        batch_size: int,
        num_workers: int,
        caption: CaptionChoice,
        val_share: float,
        max_bad_share: float,
        seed: int,
        limit: int | None,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is below 1; a batch needs at least one clip")
        if num_workers < 0:
            raise ValueError(f"num_workers={num_workers} is negative; 0 decodes in the main process")
        if caption not in ("first", "random", "none"):
            raise ValueError(f"caption={caption!r} is unknown; choose first, random or none")
        if not 0 <= val_share < 1:
            raise ValueError(f"val_share={val_share} is outside [0, 1); it is the part of train that becomes val")
        if not 0 <= max_bad_share <= 1:
            raise ValueError(f"max_bad_share={max_bad_share} is outside [0, 1]; 0.01 tolerates one bad item of 100")
        if limit is not None and limit < 1:
            raise ValueError(f"limit={limit} is below 1; leave it out to use every item")
        self.path = Path(path).expanduser()
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.caption: CaptionChoice = caption
        self.val_share = val_share
        self.max_bad_share = max_bad_share
        self.seed = seed
        self.limit = limit
        self.datasets: dict[str, ClipDataset] = {}

    @abstractmethod
    def decoder(self) -> Decode:
        """Function from an item to a sample; must be picklable, workers get a copy."""

    def prepare_data(self) -> None:
        if not self.path.exists():
            raise ValueError(
                f"path={str(self.path)!r} does not exist (working directory {Path.cwd()}); "
                "set data.init_args.path to a folder of media files or of tar shards"
            )

    def setup(self, stage: str | None = None) -> None:
        if self.datasets:
            return
        self.prepare_data()
        source = load_source(self.path, self.extensions, val_share=self.val_share, need_captions=self.caption != "none")
        for split in SPLITS:
            items, problems = source.splits[split], source.problems[split]
            for line in problems[:10]:
                warnings.warn(f"left out of {split}: {line}", stacklevel=2)
            if len(problems) > self.max_bad_share * (len(items) + len(problems)):
                raise ValueError(
                    f"{self.path}: {len(problems)} of {len(items) + len(problems)} {split} entries lack media or "
                    f"caption, more than max_bad_share={self.max_bad_share}; repair them, raise max_bad_share, or set "
                    "caption to none if it is captions that lack: "
                    f"{'; '.join(problems[:10])}{' ...' if problems[10:] else ''}"
                )
            self.datasets[split] = ClipDataset(
                items[: self.limit],
                self.decoder(),
                train=split == "train",
                caption=self.caption,
                max_bad_share=self.max_bad_share,
                seed=self.seed,
            )
        counts = ", ".join(f"{len(self.datasets[split])} {split}" for split in SPLITS)
        left_out = sum(len(lines) for lines in source.problems.values())
        rank_zero_info(f"{self.path}: {counts} clips; {left_out} left out")

    def train_dataloader(self) -> DataLoader[Any]:
        if not self.datasets["train"]:
            raise ValueError(f"{self.path} has no train split; add train-*.tar or a folder train")
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        return self._loader("val") if self.datasets["val"] else []

    def test_dataloader(self) -> DataLoader[Any]:
        if not self.datasets["test"]:
            raise ValueError(f"{self.path} has no test split; add test-*.tar or a folder test")
        return self._loader("test")

    def _loader(self, split: str) -> DataLoader[Any]:
        dataset, train = self.datasets[split], split == "train"
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=EpochSampler(dataset, shuffle=train, seed=self.seed, rank=rank, world_size=world_size),
            num_workers=self.num_workers,
            collate_fn=collate,
            drop_last=train and len(dataset) >= self.batch_size * world_size,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )
