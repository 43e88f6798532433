"""Several data modules as one training: each batch is of one of them, by their shares, such as clips and stills.

An image is a clip with T = 1, so that training on clips and stills together is a mix of two data modules. The order of
the parts is a function of (seed, epoch), and where each part stands one of the batches that were given.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor


@dataclass
class Order:
    """Which part each batch of an epoch is of: `counts` batches of each. Lightning calls `set_epoch`."""

    counts: tuple[int, ...]
    seed: int
    epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def parts(self) -> Tensor:
        """(sum of counts,) the part of each batch of this epoch."""
        generator = torch.Generator().manual_seed((self.seed * 100003 + self.epoch) % 2**63)
        each = torch.arange(len(self.counts)).repeat_interleave(torch.tensor(self.counts))
        return each[torch.randperm(len(each), generator=generator)]


class MixedLoader:
    """Batches of `loaders`, `counts` of each in an epoch, in an order of their own; a part that ends begins anew.

    loaders: of `mmdiff.data` (`ClipLoader`), which go on at any epoch and batch. A part goes through all its items
    before any comes again, from epoch to epoch of the mix too. state_dict, load_state_dict: the place in the mix and
    the parts' own, which hold their bad items.
    """

    batch_sampler = None  # Lightning asks for it, to warn of shuffled validation data

    def __init__(self, loaders: Sequence[Any], counts: Sequence[int], seed: int) -> None:
        self.loaders, self.sampler = list(loaders), Order(tuple(counts), seed)
        self.position = 0
        self._resume: tuple[int, int] | None = None  # (epoch, batches given)

    def __len__(self) -> int:
        return sum(self.sampler.counts)

    def __iter__(self) -> Iterator[dict[str, Any] | None]:
        resume, self._resume = self._resume, None
        epoch, counts = self.sampler.epoch, self.sampler.counts
        self.position = resume[1] if resume is not None and resume[0] == epoch else 0
        order = self.sampler.parts().tolist()
        before = [epoch * count + order[: self.position].count(part) for part, count in enumerate(counts)]
        streams = [_onwards(loader, given) for loader, given in zip(self.loaders, before, strict=True)]
        for part in order[self.position :]:
            batch = next(streams[part])
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.sampler.epoch,
            "position": self.position,
            "parts": [loader.state_dict() for loader in self.loaders],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues after the last batch that was given."""
        epoch, position = state["epoch"], state["position"]
        if position >= len(self):
            epoch, position = epoch + 1, 0
        self.sampler.set_epoch(epoch)
        self.position, self._resume = position, (epoch, position)
        for loader, part in zip(self.loaders, state["parts"], strict=True):
            loader.load_state_dict(part)


def _onwards(loader: Any, given: int) -> Iterator[dict[str, Any] | None]:
    """Batches of a loader without end, after the first `given`."""
    while True:
        epoch, position = divmod(given, len(loader))
        loader.load_state_dict({**loader.state_dict(), "epoch": epoch, "position": position})
        for batch in loader:
            given += 1
            yield batch


class Mixed(LightningDataModule):
    """Batches of several data modules, each of one part alone, which may differ in length, size and batch size.

    parts: data modules of `mmdiff.data`: clips of files, scenes of the world, cached latents. shares: of the training
    steps, one for each part, adding up to 1. seed: of the order of the parts.
    An epoch goes once through the first part; of the others come as many batches as their shares say, and what an epoch
    leaves over comes first in the next. A run that is resumed goes on with the batch that was due. Validation and test
    are those of the first part.
    Raises ValueError for shares that are not positive, one for each part, and 1 in all.
    """

    def __init__(self, parts: Sequence[LightningDataModule], shares: Sequence[float], seed: int = 0) -> None:
        super().__init__()
        if len(parts) != len(shares) or not parts:
            raise ValueError(
                f"shares={list(shares)} for {len(parts)} parts; give one share for each part, at least one"
            )
        if min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(
                f"shares={list(shares)} must be positive and add up to 1, they add up to {sum(shares):g}; leave out a "
                "part of which nothing is to come"
            )
        self.parts, self.shares, self.seed = list(parts), list(shares), seed

    def prepare_data(self) -> None:
        for part in self._ours():
            part.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        for part in self._ours():
            part.setup(stage)  # type: ignore[arg-type]

    def train_dataloader(self) -> MixedLoader:
        loaders = [part.train_dataloader() for part in self._ours()]
        counts = [max(1, round(len(loaders[0]) * share / self.shares[0])) for share in self.shares]
        return MixedLoader(loaders, counts, self.seed)

    def val_dataloader(self) -> Any:
        return self._ours()[0].val_dataloader()

    def test_dataloader(self) -> Any:
        return self._ours()[0].test_dataloader()

    def teardown(self, stage: str | None = None) -> None:
        for part in self._ours():
            part.teardown(stage)  # type: ignore[arg-type]

    def on_exception(self, exception: BaseException) -> None:
        for part in self._ours():
            part.on_exception(exception)

    def _ours(self) -> list[LightningDataModule]:
        """The parts, which ask their trainer for their part of the batches."""
        for part in self.parts:
            part.trainer = self.trainer
        return self.parts
