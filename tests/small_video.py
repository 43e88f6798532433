"""Small causal video autoencoders for the tests, one for each way in which levels can divide time and space."""

from typing import Any

import torch
from torch import Tensor

from video.autoencoder import CausalVideo

TOLERANCE = 1e-5

# temporal and spatial factor: how the levels divide them
STEPS: dict[str, list[list[int]]] = {
    "1x4": [[1, 2, 2], [1, 2, 2]],
    "2x4": [[1, 2, 2], [2, 2, 2]],
    "4x8": [[1, 2, 2], [2, 2, 2], [2, 2, 2]],
    "4x4 at once": [[4, 4, 4]],
    "4x4 time first": [[2, 2, 1], [2, 2, 4]],
}


def make(name: str = "2x4", **settings: Any) -> CausalVideo:
    """A small autoencoder whose weights and latent statistics are not those it starts with."""
    steps = STEPS[name]
    model = CausalVideo(
        **{"channels": 2, "latent_channels": 3, "steps": steps, "widths": [8, 12, 10][: len(steps)], **settings}
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():  # so that nothing is zero, or one
            value.add_(0.05 * torch.randn(value.shape, generator=generator))
        model.normalise(torch.tensor([0.1, -0.2, 0.3]), torch.tensor([1.5, 0.8, 1.2]))
    return model.eval()


def clip(model: CausalVideo, cells: int, height: int = 3, width: int = 2, batch: int = 1) -> Tensor:
    """A clip of so many latents."""
    t, h, w = model.factors
    return torch.randn(batch, model.channels, 1 + (cells - 1) * t, height * h, width * w)


def expect_same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)
