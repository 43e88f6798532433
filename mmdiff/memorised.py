"""Does a model give back its training clips? How near they are, beside how near real clips come that it never saw.

N, M clips; any axes after them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .accuracy import wilson

NEAR = 0.05  # share of held-out clips that count as near to a training clip


@dataclass(frozen=True)
class Memorised:
    """How many generated clips are nearer to a training clip than 95 % of the held-out clips are.

    near, count: of generated clips. expected: the share of a model that copies nothing. interval: 95 %, of the share.
    limit: distance below which a clip is near. distances, nearest: (N,) of each generated clip to its nearest training
    clip, and which it is.
    """

    near: int
    count: int
    interval: tuple[float, float]
    limit: float
    distances: Tensor
    nearest: Tensor
    expected: float = NEAR

    @property
    def share(self) -> float:
        return self.near / self.count

    def __str__(self) -> str:
        low, high = (100 * end for end in self.interval)
        return (
            f"memorised: {self.near}/{self.count} generated clips "
            f"({100 * self.share:.1f} % [{low:.1f}, {high:.1f}]) are nearer to a training clip than "
            f"{100 * (1 - self.expected):.0f} % of held-out clips are; {100 * self.expected:.0f} % without memorisation"
        )


def nearest(clips: Tensor, among: Tensor, chunk: int = 256) -> tuple[Tensor, Tensor]:
    """(distance (N,), place (N,)) of the clip of `among` (M, ...) that is nearest to each of `clips` (N, ...).

    Distance: root mean square difference over what both have of every axis, in float32.
    """
    sizes = [min(a, b) for a, b in zip(clips.shape[1:], among.shape[1:], strict=True)]
    part = (slice(None), *(slice(size) for size in sizes))
    a, b = clips[part].flatten(1), among[part].flatten(1)
    best, place = torch.full((len(a),), torch.inf), torch.zeros(len(a), dtype=torch.long)
    for first in range(0, len(b), chunk):
        found, at = torch.cdist(a.float(), b[first : first + chunk].float()).min(dim=1)
        place = torch.where(found < best, at + first, place)
        best = torch.minimum(found, best)
    return best / a.shape[1] ** 0.5, place


def memorised(generated: Tensor, train: Tensor, held_out: Tensor) -> Memorised:
    """The check, of clips (N, ...), (M, ...) and (K, ...) alike in scale, such as what a reader keeps of them.

    A blurred clip is nearer to every other: give clips that are pooled to where all are equally sharp.
    Raises ValueError for fewer than 20 held-out clips, of which 5 % would be less than one.
    """
    if len(held_out) < 1 / NEAR or not len(generated) or not len(train):
        raise ValueError(
            f"{len(generated)} generated, {len(train)} training and {len(held_out)} held-out clips; the check needs "
            f"some of each, and {round(1 / NEAR)} held-out ones"
        )
    limit = float(nearest(held_out, train)[0].quantile(NEAR))
    distances, places = nearest(generated, train)
    near = int((distances < limit).sum())
    return Memorised(near, len(generated), wilson(near, len(generated)), limit, distances, places)
