"""The reader of clips: what happens in them and what they look like, and the features in which clips are compared.

B batch, T frames, H W space; clips are (B, 3, T, H, W), what the reader keeps of them (B, 3, T, 32, 32), T 16 at most.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdiff.readers import Reader

SIDE = 32  # pixels a side that the reader looks at
FRAMES = 16  # that it looks at, spread evenly over longer clips
WIDTH = 48  # features of each of its two networks
LOOKS = 4  # frames whose colours it looks at


class ClipReader(Reader):
    """Reads clips pooled to 32 x 32 by two networks: one sees motion and no true colours, one frames by themselves.

    Motion is learnt on shuffled colours, so that an action is not read from clothes that happened to go with it.
    Features (B, 96) have mean 0 and variance 1 on the clips that it was trained on.
    """

    def __init__(self, answers: Mapping[str, Sequence[str]]) -> None:
        super().__init__(answers)
        self.motion = nn.Sequential(
            ShuffledColours(),
            *_conv(3, 24, (3, 3, 3), (2, 2, 2)),  # (B, 24, T / 2, 16, 16)
            *_conv(24, 48, (3, 3, 3), (2, 2, 2)),  # (B, 48, T / 4, 8, 8)
            *_conv(48, 96, (3, 3, 3), (1, 2, 2)),  # (B, 96, T / 4, 4, 4)
            *_conv(96, 96, (3, 1, 1), (1, 1, 1)),
            nn.AdaptiveAvgPool3d((1, 4, 4)),
            nn.Flatten(),
            nn.Linear(96 * 16, WIDTH, bias=False),
        )
        self.look = nn.Sequential(
            *_conv(3, 32, (1, 3, 3), (1, 2, 2)),  # (B, 32, 4, 16, 16)
            *_conv(32, 64, (1, 3, 3), (1, 2, 2)),  # (B, 64, 4, 8, 8)
            nn.AdaptiveAvgPool3d((1, 8, 8)),
            nn.Flatten(),
            nn.Linear(64 * 64, WIDTH, bias=False),
        )
        self.norm = nn.BatchNorm1d(2 * WIDTH, affine=False)
        self.head = nn.Sequential(nn.ReLU(), nn.Dropout(0.1), nn.Linear(2 * WIDTH, sum(self.sizes)))

    def reduce(self, x: Tensor) -> Tensor:
        if x.ndim != 5 or x.shape[1] != 3:
            raise ValueError(f"clips have shape {tuple(x.shape)}; (B, 3, T, H, W) is needed")
        frames = min(x.shape[2], FRAMES)
        x = x[:, :, torch.arange(frames, device=x.device) * x.shape[2] // frames]
        return F.adaptive_avg_pool3d(x, (frames, SIDE, SIDE))

    def augment(self, kept: Tensor, generator: torch.Generator) -> Tensor:
        count, _, frames = kept.shape[:3]

        def draw(*shape: int) -> Tensor:
            return torch.rand(count, *shape, generator=generator).view(count, *shape, *(1,) * (4 - len(shape)))

        x = kept * (0.95 + 0.1 * draw()) + 0.06 * (draw(3) - 0.5)  # contrast and tint: skins differ by little more
        x = torch.lerp(x, F.avg_pool3d(x, (1, 3, 3), 1, (0, 1, 1), count_include_pad=False), draw())
        held = x[:, :, ::2].repeat_interleave(2, dim=2)[:, :, :frames]
        x = torch.where(draw() < 0.25, held, x)  # motion at half the rate, as from a slower first stage
        x = x + 0.1 * draw() * torch.randn(x.shape, generator=generator)
        padded = F.pad(x, (1, 1, 1, 1, 0, 0), mode="replicate")
        moves = torch.randint(3, (count, 2), generator=generator).tolist()
        return torch.stack([clip[..., a : a + SIDE, b : b + SIDE] for clip, (a, b) in zip(padded, moves, strict=True)])

    def features(self, kept: Tensor) -> Tensor:
        looks = torch.linspace(0, kept.shape[2] - 1, LOOKS, device=kept.device).long()
        return self.norm(torch.cat([self.motion(kept), self.look(kept[:, :, looks])], dim=1))

    def forward(self, kept: Tensor) -> Tensor:
        return self.head(self.features(kept))


class ShuffledColours(nn.Module):
    """In training swaps the three colours of each clip and changes their contrast and level; else leaves it."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        count = len(x)
        x = x[torch.arange(count)[:, None], torch.rand(count, 3).argsort(dim=1)]
        return x * (0.6 + 0.8 * torch.rand(count, 3, 1, 1, 1)) + 0.6 * (torch.rand(count, 3, 1, 1, 1) - 0.5)


def _conv(inner: int, outer: int, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> tuple[nn.Module, ...]:
    padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
    return nn.Conv3d(inner, outer, kernel, stride, padding, bias=False), nn.BatchNorm3d(outer), nn.ReLU()
