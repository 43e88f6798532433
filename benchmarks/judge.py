"""What the benchmarks judge clips of the procedural world by: the words that are seen in them, and a distance.

N clips, T frames, H W space.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from mmdiff.accuracy import wilson
from mmdiff.cascade import Clip
from mmdiff.distance import RandomFeatures, frechet_distance, measure
from mmdiff.world import Scene, World, caption
from video.metrics import WORDS, WORLD, world_scores
from video.render import render

Features = Callable[[Tensor], Tensor]  # (N, 3, T, H, W) -> (N, D)


@dataclass(frozen=True)
class Verdict:
    """What was found of `count` clips.

    right: clips in which each of `WORDS`, and "all" of them together, are as the prompt says. distance: Frechet
    distance to as many real clips, with its 95 % interval.
    """

    count: int
    right: dict[str, int]
    distance: float
    distance_low: float
    distance_high: float

    def share(self, word: str) -> float:
        return self.right[word] / self.count

    @property
    def mean(self) -> float:
        """Share of all words of all clips that are right."""
        return sum(self.right[word] for word in WORDS) / len(WORDS) / self.count

    def cells(self) -> list[str]:
        """For a table: the mean of the words and all together in %, the latter and the distance with intervals."""
        low, high = wilson(self.right["all"], self.count)
        return [
            f"{100 * self.mean:.0f}",
            f"{100 * self.share('all'):.0f} ({100 * low:.0f} to {100 * high:.0f})",
            f"{self.distance:.3g} ({max(0.0, self.distance_low):.3g} to {self.distance_high:.3g})",
        ]


HEAD = ("words right, %", "all right, %", "Frechet distance")  # of Verdict.cells


@torch.inference_mode()
def random_features(x: Tensor) -> Tensor:
    """(N, 3, T, H, W) -> (N, 112), of `mmdiff.distance.RandomFeatures`."""
    network = RandomFeatures(3, 3)
    return torch.cat([network(part) for part in x.split(16)])


@dataclass(frozen=True)
class Judge:
    """Prompts of `count` scenes of a world that no training saw, and what is found of clips made for them.

    Real clips, for the distance, are renders of as many other scenes at the size and rate of those judged.
    Raises ValueError for fewer than 40 clips, of which no distance has an interval.
    """

    count: int = 100
    world: World = field(default_factory=lambda: replace(WORLD, split="seen"))
    seed: int = 0
    features: Features = random_features

    def __post_init__(self) -> None:
        if self.count < 40:
            raise ValueError(f"count={self.count} clips are too few: the interval of a distance needs 40 or more")

    def scenes(self, first: int) -> list[Scene]:
        """Scenes with negative indices, which are those of validation."""
        return [self.world.scene(-1 - first - i, self.seed) for i in range(self.count)]

    @cached_property
    def prompts(self) -> list[str]:
        return [caption(scene) for scene in self.scenes(0)]

    def renders(self, first: int, like: Clip) -> Tensor:
        """Real clips (N, 3, T, H, W) of the sizes and the rate of a clip."""
        frames, height, width = like.data.shape[2:]
        duration_s = frames / like.rate
        scenes = [self.world.scene(-1 - first - i, self.seed, duration_s) for i in range(self.count)]
        return torch.stack([render(scene, frames, (height, width), like.rate) for scene in scenes])

    def __call__(self, clip: Clip) -> Verdict:
        """Of clips (N, 3, T, H, W), one for each prompt. Raises ValueError for another number of them."""
        if len(clip.data) != self.count:
            raise ValueError(f"{len(clip.data)} clips for {self.count} prompts; make one for each")
        data = clip.data.float().clamp(-1, 1)
        scores = world_scores(data, self.scenes(0), clip.rate)
        right = {name: row["right"] for name, row in scores.items()}
        real = self.features(self.renders(self.count, clip))
        near = measure(frechet_distance, self.features(data), real, protocol="")
        return Verdict(self.count, right, near.value, near.low, near.high)

    def ceiling(self, like: Clip) -> Verdict:
        """Of real clips of the prompts themselves: as right and as near as clips come."""
        return self(Clip(self.renders(0, like), like.rate))


def table(rows: list[list[str]]) -> str:
    """Rows, the first of which is the head, as Markdown."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
