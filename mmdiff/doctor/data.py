"""Faults of the data itself, as the batches show them: not finite, blank, frozen, repeated, in order.

B batch, C channels, T time.
"""

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import SequentialSampler

from .check import Check, Finding, Run, clips, keys_of, named

ENOUGH = 32  # items to judge the data by
EVERY = 50  # batches between looks, once the first hundred are seen
BLANK = 2e-3  # deviation of a clip in [-1, 1] that shows or sounds nothing: -54 dB
FROZEN = 2 / 255  # largest change between neighbouring steps of a picture that stands still
SHARE = 0.25  # of the items, from which on blank or frozen ones are no accident


class NotFinite(Check):
    """NaN or infinity in a batch."""

    def begin(self, run: Run) -> Iterable[Finding]:
        self.seen = 0
        return ()

    def batch(self, run: Run, batch: Mapping[str, Any]) -> Iterable[Finding]:
        self.seen += 1
        if self.seen > 100 and self.seen % EVERY:
            return
        for name, x in clips(batch).items():
            if x.is_floating_point() and not bool(x.sum().isfinite()):
                per_item = (~x.isfinite()).flatten(1).sum(1).tolist()
                keys = keys_of(batch) or [f"item {place}" for place in range(len(x))]
                bad = [key for key, count in zip(keys, per_item, strict=True) if count]
                if bad:
                    yield Finding(
                        "NaN batch",
                        f"{name} of {named(bad)} holds {sum(per_item)} values that are NaN or infinite",
                        "Leave these items out or decode them anew, and look for a division by zero in a transform",
                    )


class Still(Check):
    """Clips that are silent, black or of one colour, and clips in which nothing moves."""

    def begin(self, run: Run) -> Iterable[Finding]:
        self.items = self.blank = self.frozen = 0
        self.names: list[str] = []
        self.done = False
        return ()

    def batch(self, run: Run, batch: Mapping[str, Any]) -> Iterable[Finding]:
        if self.done:
            return ()
        for name, x in clips(batch).items():
            if not name.startswith("x"):
                continue  # of latents a still clip is neither flat nor constant
            x = x.float()
            blank = x.flatten(1).std(1) < BLANK
            frozen = ~blank & _unmoved(x)
            keys = keys_of(batch) or [f"item {place}" for place in range(len(x))]
            self.names += [key for key, still in zip(keys, (blank | frozen).tolist(), strict=True) if still]
            self.items += len(x)
            self.blank += int(blank.sum())
            self.frozen += int(frozen.sum())
        return ()

    def step(self, run: Run) -> Iterable[Finding]:
        if self.done or self.items == 0 or not (self.items >= ENOUGH or run.due(20)):
            return
        self.done = True
        for count, name, what in (
            (self.blank, "blank clips", "the same value throughout: silent, black or of one colour"),
            (self.frozen, "frozen clips", "the same picture from beginning to end"),
        ):
            if count >= SHARE * self.items:
                yield Finding(
                    name,
                    f"{count} of the first {self.items} clips are {what}, such as {named(self.names)}",
                    "Look at them with mmdiff data report, filter them (mmdiff data prepare), and check that the "
                    "decoder reads the right stream and place",
                )


class Repeated(Check):
    """Items that should differ and hold the same clip, or a sampler that gives the same items again and again."""

    def begin(self, run: Run) -> Iterable[Finding]:
        self.signatures: dict[Hashable, set[str]] = defaultdict(set)
        self.keys: list[str] = []
        self.alike: list[float] = []  # largest share of one clip in each batch, of data without keys
        self.epoch, self.done = run.trainer.current_epoch, False
        return ()

    def batch(self, run: Run, batch: Mapping[str, Any]) -> Iterable[Finding]:
        if self.done or run.trainer.current_epoch != self.epoch:
            return ()
        keys = keys_of(batch)
        for place, x in enumerate(clips(batch).values()):
            signs = [*map(_signature, x)]
            if keys is None:
                shown = Counter(sign for sign in signs if sign is not None)
                if len(signs) >= 4 and shown:
                    self.alike.append(max(shown.values()) / len(signs))
                continue
            for key, sign in zip(keys, signs, strict=True):
                if sign is not None:
                    self.signatures[place, sign].add(key)
        self.keys += keys or []
        return ()

    def step(self, run: Run) -> Iterable[Finding]:
        if self.done or not (len(self.keys) >= ENOUGH or run.due(20)):
            return
        self.done = True
        distinct = set(self.keys)
        alike: list[set[str]] = [keys for keys in self.signatures.values() if len(keys) > 1]
        cure = "Look at how an index becomes a file, and at the sampler; mmdiff data report counts near copies"
        if sum(len(keys) for keys in alike) >= max(4, len(distinct) / 2):
            largest = max(alike, key=len)
            most = named(sorted(largest))
            yield Finding("same clip repeated", f"{most}, of different names, hold the very same clip", cure)
            return
        items = run.items()
        if items is not None and len(self.keys) >= 8:
            there = len({item.key for item in items[: 4 * len(self.keys)]})
            if len(distinct) < min(there, len(self.keys)) / 2:
                found = f"{len(self.keys)} clips of this epoch are {len(distinct)} of the data's items"
                yield Finding("same clip repeated", found, cure)
        elif self.alike and min(self.alike) >= 0.5:
            found = f"{min(self.alike):.0%} or more of the clips of every batch are the very same"
            yield Finding("same clip repeated", found, cure)


class Unshuffled(Check):
    """Training items in the order of the data, or in the same order in every epoch."""

    def begin(self, run: Run) -> Iterable[Finding]:
        self.orders: list[list[str]] = [[]]
        self.epoch = run.trainer.current_epoch
        self.batches, self.done = 0, False
        loader: Any = run.trainer.train_dataloader
        if type(getattr(loader, "sampler", None)) is SequentialSampler and getattr(loader, "batch_size", None):
            if len(loader) > 1:
                self.done = True
                yield self._finding("the loader of the training data goes through it in order")

    def batch(self, run: Run, batch: Mapping[str, Any]) -> Iterable[Finding]:
        keys = keys_of(batch)
        if self.done or keys is None:
            return
        if run.trainer.current_epoch != self.epoch:
            self.epoch = run.trainer.current_epoch
            self.orders.append([])
        self.orders[-1] += keys
        self.batches += 1
        whole = self.orders[:-1]  # epochs that are over
        if len(whole) >= 3 and len(whole[0]) >= 8 and whole[0] == whole[1] == whole[2]:
            self.done = True
            yield self._finding(f"{len(whole)} epochs had their {len(whole[0])} items in the same order")

    def step(self, run: Run) -> Iterable[Finding]:
        first, items = self.orders[0], run.items()
        if self.done or items is None or self.epoch != 0 or self.batches < 4 or len(first) < 16:
            self.done = self.done or run.steps > 100
            return
        if len(self.orders) == 1 and self.batches == 4:
            places = {item.key: place for place, item in enumerate(items[:4096])}
            order = [places.get(key, -1) for key in first]
            if min(order) >= 0 and order == sorted(order) and len(set(order)) > 1:
                self.done = True
                yield self._finding(f"the first {len(order)} clips are items {order[0]} to {order[-1]} of it, in order")

    def _finding(self, found: str) -> Finding:
        return Finding(
            "data not shuffled", found, "Shuffle the training data (a loader with shuffle=True, and set_epoch for each)"
        )


def _unmoved(x: Tensor) -> Tensor:
    """(B,) bool: whether clips (B, C, T, ...) with axes beside time do not change in it."""
    if x.ndim < 4 or x.shape[2] < 2:
        return torch.zeros(len(x), dtype=torch.bool, device=x.device)
    return x.diff(dim=2).abs().flatten(1).amax(1) < FROZEN


def _signature(x: Tensor) -> Hashable | None:
    """Of a clip (C, T, ...): sums over 257 parts of it, which other clips do not share; None of a blank one."""
    flat = x.detach().flatten().double()
    if flat.numel() < 2 or not bool(flat.std() >= BLANK):
        return None
    part = torch.arange(flat.numel(), device=flat.device) % 257  # strided: what differs anywhere shows in some part
    sums = torch.zeros(257, dtype=flat.dtype, device=flat.device).index_add_(0, part, flat)
    return tuple((sums * 1e4).round().tolist())
