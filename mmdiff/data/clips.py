"""Clips for training: a map-style dataset, and the data module that holds all but the decoding.

B batch, C channels, T time. Every random choice is a function of (seed, epoch, index): worker count, prefetch and
what ran before do not change a batch.
"""

import json
import random
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, cast

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import Dataset

from mmdiff.data.bad import BadItems
from mmdiff.data.batches import Buckets, Plan, Shape, bucketed
from mmdiff.data.items import SPLITS, Item, Problem, Source
from mmdiff.data.loader import ClipLoader
from mmdiff.data.media import MediaError, whole_file
from mmdiff.data.sources import check_path, load_source

CaptionChoice = Literal["first", "random", "none"]
Short = Literal["leave_out", "pad", "mask"]
_PROBES = 8  # threads that read headers; decoding libraries let others run meanwhile


class TooShortError(MediaError):
    """Whole, but shorter than the clips that the config asks for, and the config does not say how to fill it up."""

    kind = "too short"


class OtherSizeError(MediaError):
    """Whole, but of another size than the clips that the config asks for, and the config does not say to resize it."""

    kind = "other size"


@dataclass(frozen=True)
class Sample:
    """A decoded clip.

    data: (C, T, ...) float32 in [-1, 1], or one of each modality by its name. rate: steps of T per second, likewise.
    duration_s: before padding. start_s: where in the item the clip begins. total_s: length of the item; None where it
    is not known, and then what the clip shows of it. mask: (T,) bool, False where it is padding that must not count.
    encoded_by: fingerprint of the autoencoder whose latents `data` holds.
    """

    data: Tensor | dict[str, Tensor]
    rate: float | dict[str, float]
    duration_s: float
    start_s: float = 0.0
    total_s: float | None = None
    mask: Tensor | dict[str, Tensor] | None = None
    encoded_by: str | None = None


class Draw(random.Random):
    """What a decoder draws from in training."""

    epoch: int = 0


Decode = Callable[[Item, random.Random | None], Sample]  # without a generator: the same clip every time


class Shaped(Protocol):
    """A decoder that can be used with buckets."""

    def __call__(self, item: Item, rng: random.Random | None) -> Sample: ...

    def own(self, item: Item) -> Shape:
        """The shape of the file, from its header. Raises MediaError."""

    @property
    def asked(self) -> Shape:
        """The shape of the clips, as far as the arguments say."""

    def to(self, shape: Shape) -> Decode:
        """The same decoder for clips of this shape."""


class ClipDataset(Dataset[dict[str, Any]]):
    """Decoded, captioned clips. An index is `i` or `(epoch, i)`; the epoch only feeds the random choices.

    train: random crops and captions; without it every epoch is the same and the first caption is taken.
    shapes: of items in buckets, by their place; `decode` is then a `Shaped`.
    An item that cannot be used raises MediaError, which names it; `result` gives that as a Problem.
    """

    def __init__(
        self,
        items: Sequence[Item],
        decode: Decode,
        *,
        train: bool = False,
        caption: CaptionChoice = "first",
        seed: int = 0,
        shapes: Mapping[int, Shape] | None = None,
    ) -> None:
        self.items = list(items)
        self.decode = decode
        self.train = train
        self.caption = caption
        self.seed = seed
        self.shapes = shapes

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        epoch, place = index if isinstance(index, tuple) else (0, index)
        if not -len(self.items) <= place < len(self.items):
            raise IndexError(f"index {place} of {len(self.items)} items")
        place %= len(self.items)
        item = self.items[place]
        decode = self.decode
        if self.shapes is not None:
            decode = cast(Shaped, decode).to(self.shapes[place])
        rng = None
        if self.train:
            rng = Draw(f"{self.seed}/{epoch}/{place}")
            rng.epoch = epoch
        sample = decode(item, rng)
        record = {
            ("x" if sample.encoded_by is None else "latents"): sample.data,
            "caption": self._caption_of(item, rng),
            "rate": sample.rate,
            "duration_s": sample.duration_s,
            "start_s": sample.start_s,
            "total_s": sample.start_s + sample.duration_s if sample.total_s is None else sample.total_s,
            "key": item.key,
            "meta": item.meta,
        }
        if sample.encoded_by is not None:
            record["autoencoder"] = sample.encoded_by
        return record if sample.mask is None else {**record, "mask": sample.mask}

    def result(self, index: int | tuple[int, int]) -> dict[str, Any] | Problem:
        """The item, or why it cannot be used. Errors of the program pass through."""
        try:
            return self[index]
        except MediaError as error:
            return problem_of(self.items[index[1] if isinstance(index, tuple) else index], error)

    def _caption_of(self, item: Item, rng: random.Random | None) -> str:
        if self.caption == "none":
            return ""
        if self.caption == "random" and rng is not None:
            return rng.choice(item.captions)
        return item.captions[0]


def problem_of(item: Item, error: MediaError) -> Problem:
    """A line that names the item."""
    return Problem(item.where, error.kind, " ".join(str(error).split()))


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch: x (B, C, T, ...) and mask (B, T), or one of each modality by its name; rate, duration_s, start_s and
    total_s (B,) float32; caption, key and meta lists of length B.

    Raises ValueError when the clips differ in shape.
    """
    batch: dict[str, Any] = {name: [sample[name] for sample in samples] for name in samples[0]}
    for name in ("x", "latents", "mask"):
        if name in batch:
            batch[name] = _by_modality(batch[name], _stacked)
    for name in ("rate", "duration_s", "start_s", "total_s"):
        if name in batch:
            batch[name] = _by_modality(batch[name], lambda values: torch.tensor(values, dtype=torch.float32))
    return batch


def _by_modality(values: list[Any], together: Callable[[list[Any]], Tensor]) -> Tensor | dict[str, Tensor]:
    if isinstance(values[0], dict):
        return {name: together([value[name] for value in values]) for name in values[0]}
    return together(values)


def _stacked(tensors: list[Tensor]) -> Tensor:
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) > 1:
        raise ValueError(f"clips of the shapes {sorted(shapes)} are in one batch; give them one shape, or use buckets")
    return torch.stack(tensors)


class ClipDataModule(LightningDataModule, ABC):
    """Captioned clips of one source as train, val and test loaders; a subclass says how to decode.

    path: any form that `mmdiff.data.sources.load_source` reads, such as a folder of media or of tar shards; `~` is
    expanded, a relative path is relative to the working directory. caption: the first, a random one in training, or
    none (""; captions may then be missing). limit: only that many first items of each split.
    buckets: several shapes of clips, see `mmdiff.data.batches.Buckets`; batch_size is that of the dearest.
    timeout_s: how long a batch may take before a worker, or another process, counts as hung.
    A batch is described at `collate`, what becomes of bad items at `mmdiff.data.loader.ClipLoader`. Their account is
    logged at the end of every epoch that has any and written to `bad_items.json` in the run's folder.
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
        buckets: Buckets | None = None,
        timeout_s: float = 600.0,
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
        if not timeout_s > 0:
            raise ValueError(f"timeout_s={timeout_s} is not above 0; give the seconds that a batch may take")
        self.path: Path | str = path if "://" in path or path == "-" else Path(path).expanduser()
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.caption: CaptionChoice = caption
        self.val_share = val_share
        self.max_bad_share = max_bad_share
        self.seed = seed
        self.limit = limit
        self.buckets = buckets
        self.timeout_s = timeout_s
        self.datasets: dict[str, ClipDataset] = {}
        self.plans: dict[str, Plan] = {}
        self.bad: dict[str, BadItems] = {}
        self.source: Source | None = None
        self.folder: str | None = None  # of the run

    @abstractmethod
    def decoder(self) -> Decode:
        """Function from an item to a sample; must be picklable, workers get a copy. With buckets, a `Shaped`."""

    def prepare_data(self) -> None:
        check_path(self.path)

    def setup(self, stage: str | None = None) -> None:
        if self.datasets:
            return
        if self.path == "-" and self.trainer and self.trainer.world_size > 1:
            raise ValueError("path='-': standard input is for one process; save the tar as a file and give its path")
        self.prepare_data()
        self.source = load_source(
            self.path, self.extensions, val_share=self.val_share, need_captions=self.caption != "none"
        )
        for split in SPLITS:
            self._check_problems(split, self.source.splits[split], self.source.problems[split])
            items = self.source.splits[split][: self.limit]
            bad = self.bad[split] = BadItems(split, items, self.max_bad_share)
            shapes = None if self.buckets is None else self._shapes(items, bad, self.buckets)
            train = split == "train"
            if self.buckets is None or not shapes:
                self.plans[split] = Plan((tuple(range(len(items))),), (self.batch_size,), train, self.seed)
            else:
                self.plans[split], found = bucketed(
                    shapes, self.buckets, self.batch_size, shuffle=train, seed=self.seed
                )
                plan = self.plans[split]
                table = ", ".join(
                    f"{shape}: {len(group)} in batches of {size}"
                    for shape, group, size in zip(found, plan.groups, plan.sizes, strict=True)
                )
                rank_zero_info(f"{split} buckets: {table}")
            self.datasets[split] = ClipDataset(
                items, self.decoder(), train=train, caption=self.caption, seed=self.seed, shapes=shapes
            )
        counts = ", ".join(f"{len(self.datasets[split])} {split}" for split in SPLITS)
        left_out = sum(len(lines) for lines in self.source.problems.values())
        rank_zero_info(f"{self.path}: {counts} clips; {left_out} left out")

    def train_dataloader(self) -> Any:
        if not self.datasets["train"]:
            raise ValueError(f"{self.path} has no train split; add train-*.tar or a folder train")
        return self._loader("train")

    def val_dataloader(self) -> Any:
        return self._loader("val") if self.datasets["val"] else []

    def test_dataloader(self) -> Any:
        if not self.datasets["test"]:
            raise ValueError(f"{self.path} has no test split; add test-*.tar or a folder test")
        return self._loader("test")

    def teardown(self, stage: str | None = None) -> None:
        self.report()

    def on_exception(self, exception: BaseException) -> None:
        self.report()

    def account(self) -> dict[str, Any]:
        """For each split: what its source had to leave out, and what could not be used so far."""
        if self.source is None:
            return {}
        left_out = {
            split: [{"where": line.where, "kind": line.kind, "reason": str(line)} for line in lines]
            for split, lines in self.source.problems.items()
        }
        return {split: {**bad.report(), "left_out": left_out[split]} for split, bad in self.bad.items()}

    def report(self, split: str | None = None) -> None:
        """Logs the bad items of a split, and writes the account of all beside the run's logs, in the first process."""
        if self.trainer and self.trainer.global_rank:
            return
        bad = None if split is None else self.bad[split]
        if bad is not None and bad.found:
            kinds = ", ".join(f"{count} {kind}" for kind, count in bad.by_kind().items())
            rank_zero_info(f"{split}: {len(bad.found)} of {len(bad.items)} items are bad and left out: {kinds}")
        account = self.account()
        if self.folder is not None and any(part["bad_items"] or part["left_out"] for part in account.values()):
            with whole_file(Path(self.folder) / "bad_items.json") as temporary:
                temporary.write_text(json.dumps(account, indent=1))

    def _loader(self, split: str) -> Any:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        self.folder = self.trainer.log_dir if self.trainer else None  # asks the other processes, so here and not later
        return ClipLoader(
            self.datasets[split],
            self.plans[split],
            collate,
            self.bad[split],
            train=split == "train",
            num_workers=self.num_workers,
            rank=rank,
            world_size=world_size,
            timeout_s=self.timeout_s,
            report=lambda: self.report(split),
            skip=self._count_skipped,
        )

    def _count_skipped(self) -> None:
        """Lightning counts a None as fetched but not as started, and would then resume one batch before its place."""
        if self.trainer:
            self.trainer.fit_loop.epoch_loop.batch_progress.increment_started()

    def _check_problems(self, split: str, items: Sequence[Item], problems: Sequence[Problem]) -> None:
        for line in problems[:10]:
            warnings.warn(f"left out of {split}: {line}", stacklevel=3)
        if len(problems) > self.max_bad_share * (len(items) + len(problems)):
            raise ValueError(
                f"{self.path}: {len(problems)} of {len(items) + len(problems)} {split} entries lack media or "
                f"caption, more than max_bad_share={self.max_bad_share}; repair them, raise max_bad_share, or set "
                "caption to none if it is captions that lack: "
                f"{'; '.join(problems[:10])}{' ...' if problems[10:] else ''}"
            )

    def _shapes(self, items: Sequence[Item], bad: BadItems, buckets: Buckets) -> dict[int, Shape]:
        """The bucket of every item that has one; the others are bad."""
        decode = cast(Shaped, self.decoder())

        def probe(item: Item) -> Shape | Problem:
            try:
                return buckets.choose(decode.own(item), decode.asked)
            except MediaError as error:
                return problem_of(item, error)

        with ThreadPoolExecutor(_PROBES) as pool:
            found = list(pool.map(probe, items))
        bad.add({place: shape for place, shape in enumerate(found) if isinstance(shape, Problem)})
        bad.check()
        return {place: shape for place, shape in enumerate(found) if isinstance(shape, Shape)}
