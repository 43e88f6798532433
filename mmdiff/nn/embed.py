"""Embeddings of numbers: the noise level, a duration, a position."""

import math

import torch
from torch import Tensor, nn


def sinusoid(values: Tensor, width: int, shortest: float = 0.1, longest: float = 10_000.0) -> Tensor:
    """Sines and cosines of `values`, in float32: (...,) -> (..., width) (Vaswani et al. 2017, sec. 3.5).

    Periods run geometrically from `shortest` to `longest`, wide enough for every c_noise of `mmdiff.precond`, from
    a flow's t in (0, 1) to the index 0..999 of a DDPM table. Raises ValueError for an odd width.
    """
    if width % 2:
        raise ValueError(f"width={width} is odd; half of the embedding is sines, half cosines")
    periods = torch.logspace(math.log10(shortest), math.log10(longest), width // 2, device=values.device)
    angles = values.float()[..., None] * (2 * math.pi / periods)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class NoiseEmbedding(nn.Module):
    """c_noise (B,) or (B, T), and a condition vector (B, V) where `vector_width` says so -> (B, D) or (B, D, T)."""

    def __init__(self, width: int, vector_width: int = 0) -> None:
        super().__init__()
        self.width = width
        self.noise = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.vector = nn.Linear(vector_width, width) if vector_width else None

    def forward(self, c_noise: Tensor, vector: Tensor | None = None) -> Tensor:
        features = sinusoid(c_noise, self.width).to(next(self.parameters()).dtype)
        embedding = self.noise(features)  # (B, D) or (B, T, D)
        if self.vector is not None and vector is not None:
            added = self.vector(vector)
            embedding = embedding + (added if embedding.ndim == 2 else added[:, None])
        embedding = nn.functional.silu(embedding)
        return embedding if embedding.ndim == 2 else embedding.transpose(1, 2)
