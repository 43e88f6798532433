"""How well the upsampling stages of a cascade restore real clips, beside a method that has learnt nothing.

B clips, C channels, T time.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cascade import Cascade, Clip, Generate, Stage
from .data.clips import ClipDataset
from .sampling import seeded_noise
from .tasks import Restoring


@dataclass(frozen=True)
class Restored:
    """A stage's clips beside stretched ones, both made of real low clips. All numbers are means over `count` clips.

    made, stretched: name of a measure -> mean. gain: of made over stretched, with its 95 % interval, of clips in pairs.
    """

    stage: str
    count: int
    made: Mapping[str, float]
    stretched: Mapping[str, float]
    gain: Mapping[str, tuple[float, float, float]]

    def __str__(self) -> str:
        parts = []
        for name, (gain, low, high) in self.gain.items():
            numbers = f"{self.made[name]:.4g} against {self.stretched[name]:.4g} stretched"
            parts.append(f"{name} {numbers}, gain {gain:+.4g} [{low:+.4g}, {high:+.4g}]")
        return f"stage {self.stage}: {'; '.join(parts)}; 95 %, {self.count} clips"


def restored(
    cascade: Cascade, clips: ClipDataset, restoring: Restoring, count: int, seed: int, batch_size: int
) -> list[Restored]:
    """Every stage that is conditioned on a low clip, given the low clip of each of the first `count` real ones.

    clips: of the shape and rate that the cascade makes. Each stage gets what the stages before it ought to make, so
    that it answers for its own errors alone. Stages that work on latents are left out: their clips cannot be compared.
    """
    plan = cascade.plan(tuple(cascade.shape), cascade.rate)
    found: dict[str, list[tuple[dict[str, Tensor], dict[str, Tensor]]]] = {}
    for first in range(0, min(count, len(clips)), batch_size):
        items = [clips[k] for k in range(first, min(first + batch_size, count, len(clips)))]
        prompt: dict[str, Any] = {"caption": [item["caption"] for item in items]}
        x = torch.stack([item["x"] for item in items])
        stages = list(zip(cascade.stages.items(), plan, strict=True))
        for (name, stage), (shape, rate) in reversed(stages):
            low = low_clip(stage, x)
            if low is None:
                break
            noise = seeded_noise([seed + first + k for k in range(len(items))])
            start = Clip(low, plan[_place(cascade, name) - 1][1])
            with cascade.awake(name):
                made = stage(prompt, start, shape=shape, rate=rate, noise=noise)
            scores = [
                restoring.compare(y.float().cpu().clamp(-1, 1), x) for y in (made.data, restoring.stretch(low, shape))
            ]
            found.setdefault(name, []).append((scores[0], scores[1]))
            x = low
    return [_summed(name, found[name]) for name in cascade.stages if name in found]


def low_clip(stage: Stage, x: Tensor) -> Tensor | None:
    """The clip that a stage must be given to make `x`; None for a stage that is not conditioned on a low clip."""
    lowres = stage.lowres() if isinstance(stage, Generate) else None
    if lowres is None:
        return None
    with torch.inference_mode():
        return lowres.degrade.encode(x)


def _place(cascade: Cascade, name: str) -> int:
    return list(cascade.stages).index(name)


def _summed(name: str, batches: Sequence[tuple[dict[str, Tensor], dict[str, Tensor]]]) -> Restored:
    made, stretched = ({k: torch.cat([b[side][k] for b in batches]).double() for k in batches[0][0]} for side in (0, 1))
    gains = {}
    for k in made:
        gain = made[k] - stretched[k]
        half = 1.959964 * float(gain.std()) / math.sqrt(len(gain)) if len(gain) > 1 else math.inf
        gains[k] = (float(gain.mean()), float(gain.mean()) - half, float(gain.mean()) + half)
    count = len(next(iter(made.values())))
    means = [{k: float(v.mean()) for k, v in side.items()} for side in (made, stretched)]
    return Restored(name, count, means[0], means[1], gains)
