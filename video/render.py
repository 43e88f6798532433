"""The world as video: frames (3, T, H, W) of a scene at any rate and size, and a data module of them.

Legend: T frames, H W space. A pixel shows the share of it that a body covers, a frame the share that a blink lasts.
"""

import functools
import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmdiff.world import BACKGROUNDS, COLOURS, Scene, World, caption
from mmdiff.world.dataset import WorldClips
from mmdiff.world.vocabulary import CROSS, SQUARE, SYMMETRY, TRIANGLE

Array = NDArray[np.float32]


def render(scene: Scene, frames: int, size: tuple[int, int], fps: float) -> Tensor:
    """Frames (3, T, H, W) float32 in [-1, 1]: frame k shows the bodies at time k / fps, whitened by the share of
    [k / fps, (k + 1) / fps) that a blink lasts.

    size: (H, W) in pixels. Raises ValueError if `frames`, `size` or `fps` is not positive.
    """
    check_clip(frames, size, fps)
    height, width = size
    times_s = [k / fps for k in range(frames)]
    blink = np.array([scene.blinking(time_s, 1 / fps) for time_s in times_s], np.float32)[:, None]  # (T, 1)
    angle = np.array([scene.turned(time_s) for time_s in times_s])  # (T,) in half symmetries

    picture = np.empty((3, frames, height, width), np.float32)
    picture[:] = np.array(BACKGROUNDS[scene.background], np.float32)[:, None, None, None]
    for body in scene.bodies:
        x, y = np.array([body.position(time_s) for time_s in times_s]).T  # (T,)
        turned = angle * (math.pi / SYMMETRY[body.shape]) if body.moves and body.shape in SYMMETRY else 0 * angle
        centre = np.stack((x * width, y * height), 1)  # (T, 2)
        cover = coverage(body.shape, centre, turned, body.radius * min(size), size)  # (T, H, W)
        colour = np.array(COLOURS[body.colour], np.float32)
        shown = colour + (1 - colour) * blink if body.moves else colour + 0 * blink  # (T, 3)
        picture += (shown.T[:, :, None, None] - picture) * cover
    return torch.from_numpy(np.clip(picture * 2 - 1, -1, 1))


def coverage(shape: str, centre: NDArray, angle: NDArray, radius: float, size: tuple[int, int]) -> Array:
    """Share (T, H, W) float32 in [0, 1] of each pixel that a shape covers, exact for straight edges along the pixels.

    centre: (T, 2) as x, y in pixels. angle: (T,) radians, clockwise as seen. radius: in pixels, that of the circle of
    its size. size: (H, W).
    """
    dx = (np.arange(size[1]) + 0.5 - centre[:, :1]).astype(np.float32)[:, None, :]  # (T, 1, W)
    dy = (np.arange(size[0]) + 0.5 - centre[:, 1:]).astype(np.float32)[:, :, None]  # (T, H, 1)
    if angle.any():
        cos, sin = (f(angle).astype(np.float32)[:, None, None] for f in (np.cos, np.sin))
        dx, dy = dx * cos + dy * sin, dy * cos - dx * sin
    return np.clip(0.5 - _distance(shape, dx, dy, np.float32(radius)), 0, 1)


def _distance(shape: str, dx: Array, dy: Array, radius: np.float32) -> Array:
    """Distance in pixels to the outline, negative inside, at (dx, dy) from the centre."""
    if shape == "circle":
        return np.sqrt(dx * dx + dy * dy) - radius
    if shape == "triangle":  # a corner up
        return np.maximum(np.abs(dx) * np.float32(math.sqrt(3) / 2) - dy / 2, dy) - radius * np.float32(TRIANGLE)
    dx, dy = np.abs(dx), np.abs(dy)
    if shape == "square":
        return np.maximum(dx, dy) - radius * np.float32(SQUARE)
    if shape == "cross":
        wide, long = (radius * np.float32(part) for part in CROSS)
        return np.minimum(np.maximum(dx - wide, dy - long), np.maximum(dx - long, dy - wide))
    raise AssertionError(shape)


def check_clip(frames: int, size: tuple[int, int], fps: float) -> None:
    """Raises ValueError if `frames`, `size` or `fps` is not positive."""
    if frames < 1:
        raise ValueError(f"frames={frames} is not a positive number of frames")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size={size} is not (height, width) in positive pixels")
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps={fps} is not a positive number of frames per second")


class WorldDataModule(WorldClips):
    """Clips of `count` procedural scenes for training and `val_count` others for validation, without any files.

    size: (H, W) in pixels. seed: which of the scenes that `world` has, by default the easy one.
    A batch is that of every data module, x (B, 3, T, H, W).
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
        world: World | None = None,
    ) -> None:
        check_clip(frames, size, fps)
        super().__init__(
            functools.partial(render, frames=frames, size=(size[0], size[1]), fps=fps),
            caption,
            fps,
            frames / fps,
            count=count,
            val_count=val_count,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            world=world,
        )
