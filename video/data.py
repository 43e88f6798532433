"""Captioned video clips: which frames of a file, at which size.

T frames, H W space; a clip is (3, T, H, W) float32 in [-1, 1].
"""

import bisect
import math
import random
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from mmdiff.data.clips import CaptionChoice, Decode, Sample
from mmdiff.data.clips import ClipDataModule as _ClipDataModule
from mmdiff.data.sources import Item
from video.files import EXTENSIONS, VideoReader


class ClipDataModule(_ClipDataModule):
    """Captioned video clips as batches with x (B, 3, frames, height, width).

    frames: length of a clip; in training at a random place, otherwise in the middle of the file. A shorter file is
    padded with its last frame; `duration_s` tells the real length. size: (height, width); pictures are resized to
    cover it and cropped in the middle. fps: take the frames nearest in presentation time at this rate; without it
    every frame of the file counts and `rate` is the file's own.
    The other arguments, the errors and the batch are those of `mmdiff.data.clips.ClipDataModule`.
    """

    extensions = EXTENSIONS

    def __init__(
        self,
        path: str,
        frames: int = 16,
        size: tuple[int, int] = (64, 64),
        fps: float | None = None,
        batch_size: int = 16,
        num_workers: int = 0,
        caption: CaptionChoice = "first",
        val_share: float = 0.05,
        max_bad_share: float = 0.01,
        seed: int = 0,
        limit: int | None = None,
    ) -> None:
        super().__init__(
            path,
            batch_size=batch_size,
            num_workers=num_workers,
            caption=caption,
            val_share=val_share,
            max_bad_share=max_bad_share,
            seed=seed,
            limit=limit,
        )
        if frames < 1:
            raise ValueError(f"frames={frames} is below 1; a clip needs at least one frame")
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"size={size} is not (height, width) with both at least 1")
        if fps is not None and not fps > 0:
            raise ValueError(f"fps={fps} is not above 0; leave it out to take every frame")
        self.decode = VideoDecode(frames, (size[0], size[1]), fps)

    def decoder(self) -> Decode:
        return self.decode


@dataclass(frozen=True)
class VideoDecode:
    """Item -> Sample with data (3, frames, *size); with a generator the place in time is random, else the middle."""

    frames: int
    size: tuple[int, int]
    fps: float | None = None

    def __call__(self, item: Item, rng: random.Random | None) -> Sample:
        with VideoReader(item.source(), name=item.where) as reader:
            file_fps = float(reader.fps)
            if self.fps is None:
                indices, rate = self._consecutive(len(reader), rng), file_fps
            else:
                indices, rate = self._nearest(reader.times_s, 1 / file_fps, self.fps, rng), self.fps
            needed = sorted(set(indices))
            place = {index: position for position, index in enumerate(needed)}
            pixels = reader.read(needed)
        real = len(indices)
        indices = indices + indices[-1:] * (self.frames - real)
        clip = resize_cover(pixels.float().div_(127.5).sub_(1), self.size)
        if len(needed) != len(indices):
            clip = clip[:, [place[index] for index in indices]]
        return Sample(clip.contiguous(), rate, real / rate)

    def _consecutive(self, count: int, rng: random.Random | None) -> list[int]:
        spare = max(0, count - self.frames)
        start = rng.randint(0, spare) if rng else spare // 2
        return list(range(start, min(count, start + self.frames)))

    def _nearest(self, times_s: list[float], last_s: float, fps: float, rng: random.Random | None) -> list[int]:
        """Indices of the frames nearest to start + k / fps; last_s: how long the last frame is shown."""
        total_s = times_s[-1] + last_s
        real = min(self.frames, max(1, math.floor(total_s * fps + 1e-6)))
        spare_s = max(0.0, total_s - real / fps)
        start_s = spare_s * (rng.random() if rng else 0.5)
        return [_nearest_index(times_s, start_s + step / fps) for step in range(real)]


def frames_at(reader: VideoReader, fps: float, most: int) -> list[int]:
    """Indices of the frames shown at times k / fps from the start on, at most `most`."""
    total_s = reader.times_s[-1] + 1 / float(reader.fps)
    count = min(most, max(1, math.floor(total_s * fps + 1e-6)))
    return [_nearest_index(reader.times_s, step / fps) for step in range(count)]


def _nearest_index(times_s: list[float], time_s: float) -> int:
    after = bisect.bisect_left(times_s, time_s)
    if after == 0:
        return 0
    if after == len(times_s):
        return after - 1
    return after if times_s[after] - time_s < time_s - times_s[after - 1] else after - 1


def resize_cover(clip: Tensor, size: tuple[int, int]) -> Tensor:
    """(C, T, H, W) float -> (C, T, *size): resized to cover `size` (bilinear, antialiased), cropped in the middle."""
    height, width = clip.shape[-2:]
    if (height, width) == size:
        return clip
    scale = max(size[0] / height, size[1] / width)
    cover = (max(size[0], round(height * scale)), max(size[1], round(width * scale)))
    if cover != (height, width):
        clip = F.interpolate(clip.transpose(0, 1), cover, mode="bilinear", antialias=True).transpose(0, 1)
    top, left = (cover[0] - size[0]) // 2, (cover[1] - size[1]) // 2
    return clip[..., top : top + size[0], left : left + size[1]]
