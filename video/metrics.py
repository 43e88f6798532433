"""Evaluations of generated video: does a sprite do the prompted action, facing the prompted way?

B batch, T frames, H W space; clips are (B, 3, T, H, W).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

import video
from mmdiff.cascade import Clip
from mmdiff.data.clips import ClipDataset
from mmdiff.data.media import whole_file
from mmdiff.evaluate import Task
from mmdiff.readers import Reader, Recipe
from video.data import ClipDataModule

SIDE = 32  # pixels a side that the reader looks at


class ClipReader(Reader):
    """Convolutions over time and space on clips pooled to 32 x 32; colour, place and sharpness are randomised."""

    def __init__(self, answers: Mapping[str, Sequence[str]]) -> None:
        super().__init__(answers)
        self.net = nn.Sequential(
            *_conv(3, 24, (1, 2, 2)),  # (B, 24, T, 16, 16)
            *_conv(24, 48, (2, 2, 2)),  # (B, 48, T / 2, 8, 8)
            *_conv(48, 96, (2, 2, 2)),  # (B, 96, T / 4, 4, 4)
            *_conv(96, 96, (1, 1, 1)),
            nn.AdaptiveAvgPool3d((1, 4, 4)),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(96 * 16, sum(self.sizes)),
        )

    def reduce(self, x: Tensor) -> Tensor:
        if x.ndim != 5 or x.shape[1] != 3:
            raise ValueError(f"clips have shape {tuple(x.shape)}; (B, 3, T, H, W) is needed")
        return F.adaptive_avg_pool3d(x, (x.shape[2], SIDE, SIDE))

    def augment(self, kept: Tensor, generator: torch.Generator) -> Tensor:
        count, _, frames = kept.shape[:3]

        def draw(*shape: int) -> Tensor:
            return torch.rand(count, *shape, generator=generator).view(count, *shape, *(1,) * (4 - len(shape)))

        swapped = torch.rand(count, 3, generator=generator).argsort(dim=1)
        x = kept[torch.arange(count)[:, None], swapped]
        x = x * (0.6 + 0.8 * draw(3)) + 0.6 * (draw(3) - 0.5)  # contrast and tint
        x = torch.lerp(x, F.avg_pool3d(x, (1, 3, 3), 1, (0, 1, 1), count_include_pad=False), draw())
        held = x[:, :, ::2].repeat_interleave(2, dim=2)[:, :, :frames]
        x = torch.where(draw() < 0.25, held, x)  # motion at half the rate, as from a slower first stage
        x = x + 0.1 * draw() * torch.randn(x.shape, generator=generator)
        padded = F.pad(x, (1, 1, 1, 1, 0, 0), mode="replicate")
        moves = torch.randint(3, (count, 2), generator=generator).tolist()
        return torch.stack([clip[..., a : a + SIDE, b : b + SIDE] for clip, (a, b) in zip(padded, moves, strict=True)])

    def forward(self, kept: Tensor) -> Tensor:
        return self.net(kept)


def _conv(inner: int, outer: int, stride: tuple[int, int, int]) -> tuple[nn.Module, ...]:
    return nn.Conv3d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm3d(outer), nn.ReLU()


def sprites() -> Task:
    """Action and direction of generated LPC sprites."""
    return Task(
        about="How often a small classifier, trained on real clips, reads the prompted action and direction.",
        data="../shared/data/lpc_sprites",
        pipeline=Path(video.__file__).parent / "pretrained" / "sprites",
        splits=_splits,
        attributes=("action", "direction"),
        turns=(("action", "direction"),),
        reader=ClipReader,
        recipe=Recipe(epochs=8),
        show=contact_sheets,
    )


def _splits(path: str) -> tuple[ClipDataset, ClipDataset]:
    data = ClipDataModule(path, frames=16, size=(64, 64))
    data.setup()
    return data.datasets["train"], data.datasets["val"]


def contact_sheets(folder: Path, clip: Clip, titles: Sequence[str], frames: int = 8) -> None:
    """Writes samples.png: a row for each clip, its title and `frames` of its frames."""
    pixels = ((clip.data.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).numpy()  # (B, T, H, W, 3)
    picked = torch.linspace(0, pixels.shape[1] - 1, min(frames, pixels.shape[1])).long().tolist()
    scale = max(1, -(-96 // min(pixels.shape[2:4])))
    height, width, label = pixels.shape[2] * scale + 2, pixels.shape[3] * scale + 2, 190
    sheet = Image.new("RGB", (label + width * len(picked), height * len(pixels)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (frames_of, title) in enumerate(zip(pixels, titles, strict=True)):
        draw.multiline_text((4, row * height + 8), title, fill="black", spacing=6)
        for column, index in enumerate(picked):
            picture = Image.fromarray(frames_of[index]).resize((width - 2, height - 2), Image.Resampling.NEAREST)
            sheet.paste(picture, (label + column * width, row * height))
    with whole_file(folder / "samples.png") as temporary:
        sheet.save(temporary, format="PNG")
