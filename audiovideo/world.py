"""The world as picture and sound of the same scenes, and a data module of them."""

from dataclasses import dataclass

from torch import Tensor

import audio.render
import video.render
from mmdiff.world import Scene, World, joint_caption
from mmdiff.world.dataset import WorldClips


@dataclass(frozen=True)
class Render:
    """From a scene to {"video": (3, T, H, W), "audio": (C, S)} float32 in [-1, 1] of the same time."""

    frames: int
    size: tuple[int, int]
    fps: float
    sample_rate: int
    channels: int

    @property
    def samples(self) -> int:
        return round(self.frames / self.fps * self.sample_rate)

    def __call__(self, scene: Scene) -> dict[str, Tensor]:
        return {
            "video": video.render.render(scene, self.frames, self.size, self.fps),
            "audio": audio.render.render(scene, self.samples, self.sample_rate, self.channels),
        }


@dataclass(frozen=True)
class Caption:
    """From a scene to its caption of both; places of sounds are named in stereo alone."""

    channels: int

    def __call__(self, scene: Scene) -> str:
        return joint_caption(scene, self.channels == 2)


class WorldDataModule(WorldClips):
    """Clips with sound of `count` procedural scenes for training and `val_count` others for validation.

    size: (H, W) in pixels. sample_rate: in Hz; a clip has frames / fps * sample_rate samples. channels: 1, or 2 for
    stereo. seed: which of the scenes that `world` has, by default the easy one.
    A batch is that of `audiovideo.ClipDataModule`: x and rate have one of each, "video" and "audio".
    Raises ValueError for a wrong argument.
    """

    def __init__(
        self,
        count: int = 512,
        frames: int = 16,
        size: tuple[int, int] = (32, 32),
        fps: float = 8.0,
        sample_rate: int = 8000,
        channels: int = 1,
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
        val_count: int = 64,
        world: World | None = None,
    ) -> None:
        video.render.check_clip(frames, size, fps)
        render = Render(frames, (size[0], size[1]), fps, sample_rate, channels)
        audio.render.check_sound(render.samples, sample_rate, channels)
        super().__init__(
            render,
            Caption(channels),
            {"video": float(fps), "audio": float(sample_rate)},
            frames / fps,
            count=count,
            val_count=val_count,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            world=world,
        )
