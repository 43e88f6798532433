"""Clips that are not what their files hold: backwards, with channels exchanged, at another rate.

What can go wrong on the way from a file to a batch only its modality knows: `Readings` is the seam for that.
C channels, T time.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..data.items import Item
from ..data.media import MediaError
from ..module import DiffusionModule
from .check import Check, Finding, Run, clips, keys_of

MOST = 8  # clips that are compared
ALIKE = 0.8  # correlation of a clip with what its file holds
BETTER = 0.25  # of what the right reading lacks of 1, what a faulty one may lack to be believed
FAR = 4096  # items among which a key is looked for


@dataclass(frozen=True)
class Reading:
    """A way to read a clip. fault: name of the finding if a batch holds this; "" for the right way. data: (C, T, ...).

    found, cure: as in `Finding`; found follows "N of the M clips compared".
    """

    data: Tensor
    fault: str = ""
    found: str = ""
    cure: str = ""


class Readings(ABC):
    """How the files of one modality are read, apart from its data module, rightly and wrongly."""

    @abstractmethod
    def reads(self, item: Item) -> bool:
        """Whether the item's file is of this modality."""

    @abstractmethod
    def __call__(self, item: Item, start_s: float, rate: float, like: Tensor) -> Sequence[Reading]:
        """What the file holds from `start_s` on, at `rate` steps a second, in the shape of `like` (C, T, ...).

        The right reading comes first. Raises MediaError for a file that cannot be read.
        """


class Origin(Check):
    """Compares clips of the first batches with their files, or, where there are none, with the data set's own items.

    Latents are compared with those of each reading.
    """

    def __init__(self, readings: Sequence[Readings] = ()) -> None:
        self.readings = tuple(readings)

    def begin(self, run: Run) -> Iterable[Finding]:
        self.votes: list[Reading] = []
        self.tried = 0
        self.done = run.items() is None or isinstance(run.trainer.train_dataloader, (list, dict))
        return ()

    @torch.no_grad()
    def batch(self, run: Run, batch: Mapping[str, Any]) -> Iterable[Finding]:
        keys, data = keys_of(batch), clips(batch)
        if self.done or keys is None or len(data) != 1 or not run.whole:
            return
        ((name, x),) = data.items()
        items = run.items() or ()
        places = {item.key: place for place, item in enumerate(items[:FAR])}
        for index, key in enumerate(keys):
            if self.tried >= MOST:
                break
            place = places.get(key)
            if place is None:
                continue
            readings = self._readings(run, place, batch, index, x[index].cpu() if name == "x" else None)
            if name == "latents" and isinstance(run.module, DiffusionModule) and readings:
                encode = run.module.model.encode
                with run.as_trained():
                    latents = [encode(reading.data[None].to(x.device))[0] for reading in readings]
                readings = [replace(reading, data=z) for reading, z in zip(readings, latents, strict=True)]
                readings.append(generic(latents[0])[1])  # latents that are flipped are not those of a flipped clip
            self.tried += 1
            if readings:
                self.votes += _nearest(x[index].float(), readings)
        if self.tried < MOST and not run.due(10):
            return
        self.done = True
        wrong = [vote for vote in self.votes if vote.fault]
        if len(wrong) >= 2 and len(wrong) > len(self.votes) / 2:
            most = max(wrong, key=lambda vote: sum(other.fault == vote.fault for other in wrong))
            yield Finding(most.fault, f"{len(wrong)} of {len(self.votes)} clips compared {most.found}", most.cure)

    def _readings(
        self, run: Run, place: int, batch: Mapping[str, Any], index: int, x: Tensor | None
    ) -> Sequence[Reading]:
        """Ways to read an item; none where nothing is known of its file."""
        dataset = run.dataset()
        item = dataset.items[place]
        reader = next((reader for reader in self.readings if reader.reads(item)), None)
        try:
            again = dataset[(run.trainer.current_epoch, place)]
            like = x if x is not None else self._decoded(dataset, item)
            if reader is not None and like is not None:
                return reader(item, float(batch["start_s"][index]), float(batch["rate"][index]), like)
        except MediaError:
            return []
        return generic(again["x"]) if isinstance(again.get("x"), Tensor) else []

    def _decoded(self, dataset: Any, item: Item) -> Tensor | None:
        """A clip of the shape that a cache of latents has encoded."""
        decode = getattr(dataset.decode, "decode", None)
        if decode is None or dataset.shapes is not None:
            return None
        data = decode(item, None).data
        return data if isinstance(data, Tensor) else None


def generic(x: Tensor) -> list[Reading]:
    """Readings of (C, T, ...) that need no knowledge of the modality."""
    cure = "Look at what stands between the data set and the network: a transform, a collate function, a hook"
    found = [Reading(x), Reading(x.flip(1), "time flipped", "run backwards", cure)]
    if x.shape[0] > 1:
        found.append(Reading(x.flip(0), "channels swapped", "have their channels in the reverse order", cure))
    return found


def _nearest(x: Tensor, readings: Sequence[Reading]) -> list[Reading]:
    """The reading that a clip is, if one is near enough, and nearer than the right one where it is wrong."""
    near = [correlation(x, reading.data.to(x)) for reading in readings]
    best = max(range(len(near)), key=near.__getitem__)  # of equals the first, which is the right one
    if near[best] < ALIKE or (best and 1 - near[best] > BETTER * (1 - near[0])):
        return []
    return [readings[best]]


def correlation(a: Tensor, b: Tensor) -> float:
    """Of all values of two tensors of one shape, 0 where they have none."""
    if a.shape != b.shape:
        return 0.0
    a, b = a.flatten() - a.mean(), b.flatten() - b.mean()
    return float((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-12))
