"""Distances between two sets of clips: the Frechet distance of their features, and features that need no training.

N clips, D features, B batch, C channels, `*axes` T and what follows it.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Frechet distance of the normal distributions with the means and covariances of (N, D) and (M, D).

    |mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), Dowson & Landau 1982, eq. 4, in float64 and in this
    symmetric form: never negative or complex, also for fewer clips than features. It is the distance that FID and FVD
    take of their networks' features. Few clips make it larger: compare sets of equal size alone.
    Raises ValueError unless both are (at least 2, D) and finite.
    """
    for name, features in (("a", a), ("b", b)):
        if features.ndim != 2 or len(features) < 2 or features.shape[1] != a.shape[-1]:
            raise ValueError(f"{name} has shape {tuple(features.shape)}; (N, D) with N >= 2 and equal D is needed")
        if not bool(torch.isfinite(features).all()):
            raise ValueError(f"{name} holds features that are not finite")
    a, b = a.double(), b.double()
    # Roots of covariances, X' / sqrt(N - 1): the trace of (A^1/2 B A^1/2)^1/2 is the sum of singular values of
    # their product, which loses no digits to squaring.
    roots = [(x - x.mean(0)) / math.sqrt(len(x) - 1) for x in (a, b)]
    trace = sum(float(root.square().sum()) for root in roots)
    cross = float(torch.linalg.svdvals(roots[0] @ roots[1].T).sum())
    return max(0.0, float((a.mean(0) - b.mean(0)).square().sum()) + trace - 2 * cross)


class RandomFeatures(nn.Module):
    """Means over space and time of a convolutional network with random weights: (B, C, *axes) -> (B, 7 * width).

    They see edges, colours, texture and motion, and nothing that must be learnt; a yardstick for recipes on the same
    data, no measure of what people see. Three levels, each halves every axis.

    axes: 1 to 3. width: features of the first level, twice and four times as many of the next two.
    """

    def __init__(self, channels: int, axes: int, width: int = 16, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.axes = axes
        sizes = [channels, width, 2 * width, 4 * width]
        for level, (c_in, c_out) in enumerate(itertools.pairwise(sizes)):
            weight = torch.randn(c_out, c_in, *[3] * axes, generator=generator) * math.sqrt(2 / (c_in * 3**axes))
            self.register_buffer(f"weight{level}", weight)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        conv = (F.conv1d, F.conv2d, F.conv3d)[self.axes - 1]
        found = []
        for level in range(3):
            x = F.leaky_relu(conv(x, getattr(self, f"weight{level}"), stride=2, padding=1), 0.2)
            found.append(x.flatten(2).mean(2))
        return torch.cat(found, dim=1)
