"""The world as video: frames (3, T, H, W) of a scene at any rate and size, and a data module of them.

Legend: T frames, H W space. A pixel shows the share of it that a body covers, a frame the share that a flash lasts.
"""

import functools
import math

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from mmdiff.world import BACKGROUNDS, COLOURS, Scene, caption, train_and_val


def render(scene: Scene, frames: int, size: tuple[int, int], fps: float) -> Tensor:
    """Frames (3, T, H, W) float32 in [-1, 1]: frame k shows the body at time k / fps, and in white, as much of it as an
    event fills of [k / fps, (k + 1) / fps).

    size: (H, W) in pixels. Raises ValueError if `frames`, `size` or `fps` is not positive.
    """
    _check(frames, size, fps)
    height, width = size
    side = min(height, width)
    time_s = torch.arange(frames, dtype=torch.float64) / fps  # (T,)
    x, y = scene.position(time_s)
    dx = torch.arange(width) + 0.5 - (x * width)[:, None]  # (T, W) pixels from the centre
    dy = torch.arange(height) + 0.5 - (y * height)[:, None]  # (T, H)
    distance = _distance(scene.shape, dx[:, None, :], dy[:, :, None], scene.radius * side)  # (T, H, W)
    coverage = (0.5 - distance).clamp(0, 1)

    flash = scene.activity(time_s, 1 / fps)[:, None]  # (T, 1)
    body = torch.lerp(torch.tensor(COLOURS[scene.colour], dtype=torch.float64), torch.ones(3).double(), flash)  # (T, 3)
    ground = torch.tensor(BACKGROUNDS[scene.background], dtype=torch.float64)
    ground = ground[:, None, None, None]  # (3, 1, 1, 1)
    picture = torch.lerp(ground, body.T[:, :, None, None], coverage)  # (3, T, H, W) in [0, 1]
    return (picture * 2 - 1).clamp(-1, 1).float()


def _distance(shape: str, dx: Tensor, dy: Tensor, radius: float) -> Tensor:
    """Distance in pixels to the outline, negative inside, for shapes with the area of a circle of that radius."""
    if shape == "circle":
        return (dx.square() + dy.square()).sqrt() - radius
    if shape == "square":
        return torch.maximum(dx.abs(), dy.abs()) - radius * math.sqrt(math.pi) / 2
    if shape == "triangle":  # equilateral, one corner up: its three sides lie `inner` from the centre
        inner = radius * math.sqrt(math.pi / (3 * math.sqrt(3)))
        return torch.maximum(dx.abs() * math.sqrt(3) / 2 - dy / 2, dy) - inner
    raise AssertionError(shape)


def _check(frames: int, size: tuple[int, int], fps: float) -> None:
    if frames < 1:
        raise ValueError(f"frames={frames} is not a positive number of frames")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size={size} is not (height, width) in positive pixels")
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps={fps} is not a positive number of frames per second")


class WorldDataModule(LightningDataModule):
    """Clips of `count` procedural scenes for training and `val_count` others for validation, without any files.

    size: (H, W) in pixels. seed: which world. A batch is that of every data module, x (B, 3, T, H, W).
    """

    def __init__(
        self,
        count: int = 512,
        frames: int = 16,
        size: tuple[int, int] = (32, 32),
        fps: float = 8.0,
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
        val_count: int = 64,
    ) -> None:
        super().__init__()
        _check(frames, size, fps)
        self.batch_size, self.num_workers = batch_size, num_workers
        draw = functools.partial(render, frames=frames, size=size, fps=fps)
        self.train, self.val = train_and_val(draw, caption, count, val_count, fps, frames / fps, seed)

    def train_dataloader(self) -> DataLoader:
        return self.train.loader(self.batch_size, self.num_workers, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self.val.loader(self.batch_size, self.num_workers, shuffle=False)
