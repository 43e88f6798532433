"""What is found in clips, generated or real: what is read of them, their features, and what is measured of each.

B clips of a batch, N in all, C channels, T time, D features.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .distance import GROUPS, Extractor, Measured, frechet_distance, kernel_distance, measure
from .io import fingerprint
from .readers import Labels, Reader, features_of, read
from .tasks import Task

MEASURED = 50  # clips of each kind that the task's measures see: motion between all their frames is dear


@dataclass
class Judge:
    """Looks at clips (B, C, T, ...) in [-1, 1], batch after batch, and keeps what the report is made of.

    extractor: whose features distances are of; None for the reader's.
    read: what is read of each clip. kept: (N, ...) by the reader. measured: of the first clips, by the measure's name.
    """

    task: Task
    reader: Reader
    extractor: Extractor | None = None
    read: list[Labels] = field(default_factory=list)
    seen: list[Tensor] = field(default_factory=list, repr=False)
    described: list[Tensor] = field(default_factory=list, repr=False)
    measured: dict[str, list[float]] = field(default_factory=dict, repr=False)

    @torch.inference_mode()
    def __call__(self, clips: Tensor, rate: float) -> None:
        kept = self.reader.reduce(clips).half()
        clear = max(0, MEASURED - len(self.read))
        for name, of in self.task.measures.items() if clear else ():
            self.measured.setdefault(name, []).extend(of(clips[:clear]).tolist())
        self.read += read(self.reader, kept) if self.task.measured is None else self.task.measured(clips, rate)
        self.described.append(features_of(self.reader, kept) if self.extractor is None else self.extractor(clips))
        self.seen.append(kept)

    @property
    def kept(self) -> Tensor:
        return torch.cat(self.seen)

    @property
    def features(self) -> Tensor:
        return torch.cat(self.described).float()

    @property
    def protocol(self) -> str:
        """Which features."""
        if self.extractor is not None:
            return self.extractor.protocol
        return f"features of {type(self.reader).__name__} {fingerprint(self.reader)}"


def distances(made: Judge, real: Judge, protocol: str, seed: int) -> list[Measured]:
    """Frechet and kernel distance of two sets of clips; none where one of them is too small for an interval."""
    if min(len(made.read), len(real.read)) < 2 * GROUPS:
        return []
    a, b = made.features, real.features
    protocol = f"{made.protocol}, {a.shape[1]} of them, {protocol}"
    return [measure(distance, a, b, protocol=protocol, seed=seed) for distance in (frechet_distance, kernel_distance)]


def averages(judge: Judge) -> dict[str, dict[str, Any]]:
    """Measure -> mean over clips, its 95 % interval, and how many clips."""
    found = {}
    for name, values in judge.measured.items():
        x = torch.tensor(values, dtype=torch.float64)
        half = 1.959964 * float(x.std()) / math.sqrt(len(x)) if len(x) > 1 else math.inf
        mean = float(x.mean())
        found[name] = {"mean": mean, "interval": (mean - half, mean + half), "count": len(x)}
    return found
