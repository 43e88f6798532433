"""Averages of the weights of any width, made after the training of a few that were kept (arXiv 2312.02696).

A power-function average after step t is the mean of the weights of steps 1, 2, ..., t, of which that of step n counts
n^p - (n - 1)^p with p = gamma + 1: the profile n^gamma, of relative width sigma_rel = its deviation / t. As averages
are linear in the weights, any other profile is, as nearly as it is a sum of the kept ones' profiles, the same sum of
the kept averages. Re-derived from Karras et al. 2024, with two changes: the profiles are those of the steps that were
taken, not of continuous time, and the shares add up to 1, so that weights that never moved come out as they were.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .data.media import whole_file

WIDEST = 1 / math.sqrt(12)  # of a plain mean, gamma = 0
CHUNK = 65_536  # steps whose profiles are in memory at once


def gamma(width: float) -> float:
    """Exponent of the profile of relative width `width`, sigma_rel, above 0 and at most 0.2886, that of a plain mean.

    The deviation of the density (gamma + 1) x^gamma on [0, 1] is sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2): a cubic
    equation of gamma with one root from 0 on.
    """
    if not 0 < width <= WIDEST:
        raise ValueError(f"width={width} must be above 0 and at most {WIDEST:.4f}, that of a mean of all steps")
    low, high = 0.0, 1 / width  # the deviation falls with gamma, and is below 1 / (gamma + 2)
    for _ in range(100):
        middle = (low + high) / 2
        wider = math.sqrt((middle + 1) / (middle + 3)) / (middle + 2) > width
        low, high = (middle, high) if wider else (low, middle)
    return low


@dataclass(frozen=True)
class Profile:
    """How much the weights of each step count in the average of relative width `width` after `steps` steps."""

    width: float
    steps: int

    def shares(self, first: int, last: int) -> Tensor:
        """Those of the steps from `first`, at least 1, to `last`: (last - first + 1,) float64. All together are 1."""
        n, p = torch.arange(first, last + 1, dtype=torch.float64), gamma(self.width) + 1
        share = -torch.expm1(p * torch.log1p(-1 / n)) * torch.exp(p * torch.log(n / self.steps))
        return torch.where(n <= self.steps, share, 0.0)


def combination(kept: Sequence[Profile], wanted: Profile) -> tuple[Tensor, float]:
    """(shares (K,) float64 of the kept averages, which add up to 1 and come nearest to the wanted profile, residual).

    The residual is the norm of what the sum of profiles differs by, relative to that of the wanted one.
    """
    # Least squares, step by step: the triangle of a QR decomposition holds all that the steps so far say.
    triangle, norm = torch.zeros(0, len(kept), dtype=torch.float64), 0.0
    end = max(profile.steps for profile in [*kept, wanted])
    for first in range(1, end + 1, CHUNK):
        last = min(end, first + CHUNK - 1)
        base, *others = [profile.shares(first, last) for profile in kept]
        goal = wanted.shares(first, last)
        norm += float(goal.square().sum())
        rows = torch.stack([*(other - base for other in others), goal - base], dim=1)
        triangle = torch.linalg.qr(torch.cat([triangle, rows]), mode="r").R
    columns, goal = triangle[:, :-1], triangle[:, -1:]
    rest = torch.linalg.lstsq(columns, goal, rcond=1e-12, driver="gelsd").solution if len(kept) > 1 else goal[:0]
    residual = float((columns @ rest - goal).norm()) / math.sqrt(norm)
    return torch.cat([1 - rest.sum()[None], rest.flatten()]), residual


def file_name(width: float, steps: int) -> str:
    """Of the average of this width after these steps."""
    return f"width={width:g}-{steps:09d}.safetensors"


def keep(folder: Path, width: float, steps: int, average: dict[str, Tensor]) -> None:
    """Writes an average to its file in `folder`, whole or not at all."""
    with whole_file(folder / file_name(width, steps)) as temporary:
        save_file({name: value.contiguous() for name, value in average.items()}, temporary)


def read(path: Path, names: Iterable[str]) -> Callable[[str], Tensor]:
    """Reads single tensors of a kept average. Raises ValueError where it is broken or has not just these names."""
    try:
        file = safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole average: {error}; delete it, and the others will do") from error
    if set(file.keys()) != set(names):
        raise ValueError(f"{path} holds averages of other parameters than the checkpoint's; it is of another run")
    return file.get_tensor  # type: ignore[no-any-return]


def synthesised(
    kept: Mapping[Profile, Callable[[str], Tensor]], names: Iterable[str], wanted: Profile
) -> tuple[dict[str, Tensor], float]:
    """(the average of the wanted profile, by name, residual of `combination`). One tensor at a time is read."""
    shares, residual = combination(list(kept), wanted)
    average = {}
    for name in names:
        parts = [share * get(name).double() for share, get in zip(shares.tolist(), kept.values(), strict=True)]
        average[name] = torch.stack(parts).sum(dim=0).float()
    return average, residual
