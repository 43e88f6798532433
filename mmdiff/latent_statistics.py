"""Mean and deviation of latents over a whole data set, exactly, in one pass.

B batch, C channels, `*axes` T and what follows it.
"""

import torch
from torch import Tensor


class LatentStatistics:
    """Count, mean and sum of squared deviations of each channel, in float64, of all that `add` has been given.

    Parts are joined by the update of Chan, Golub and LeVeque (1979), which loses no digits where the mean is far from 0
    as the mean of squares does.
    """

    def __init__(self, channels: int) -> None:
        self.count = torch.zeros((), dtype=torch.float64)
        self.mean = torch.zeros(channels, dtype=torch.float64)
        self.squares = torch.zeros(channels, dtype=torch.float64)

    def add(self, z: Tensor) -> None:
        """Latents (B, C, *axes)."""
        flat = z.detach().movedim(1, 0).flatten(1).to("cpu", torch.float64)  # (C, B axes)
        mean = flat.mean(dim=1)
        self.join(torch.tensor(float(flat.shape[1])), mean, (flat - mean[:, None]).square().sum(dim=1))

    def join(self, count: Tensor, mean: Tensor, squares: Tensor) -> None:
        """The statistics of another part, of at least one value."""
        total = self.count + count
        gap = mean - self.mean
        self.mean = self.mean + gap * count / total
        self.squares = self.squares + squares + gap.square() * self.count * count / total
        self.count = total

    @property
    def deviation(self) -> Tensor:
        """(C,): square root of the mean square around the mean."""
        return (self.squares / self.count).sqrt()
