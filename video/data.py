"""Captioned video clips: which frames of a file, at which size.

T frames, H W space; a clip is (3, T, H, W) float32 in [-1, 1]. Times are in seconds on the file's clock.
"""

import bisect
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdiff.data.batches import Buckets, Shape
from mmdiff.data.clips import CaptionChoice, Decode, OtherSizeError, Sample, Short, TooShortError
from mmdiff.data.clips import ClipDataModule as _ClipDataModule
from mmdiff.data.items import Item
from video.files import EXTENSIONS, VideoReader

Resize = Literal["none", "cover", "fit"]
_ROUNDING_S = 1e-4  # far below the time of a frame, far above a float's error
_AHEAD_S = 0.5  # of the index that is read at once: more than a tick of any container


class ClipDataModule(_ClipDataModule):
    """Captioned video clips as batches with x (B, 3, frames, height, width).

    Nothing is changed that is not named here; what does not fit is a bad item, with its reason.
    frames: length of a clip; in training at a random place, otherwise in the middle of the file. short: what becomes of
    a shorter file: leave_out (default), pad with its last frame, or mask: pad, and "mask" (B, T) is False there.
    size: (height, width). resize: what becomes of pictures of another size: none (default) leaves them out, cover
    resizes them to cover it and crops the middle, fit resizes them to lie within it on black.
    fps: take the frames nearest in presentation time at this rate; without it every frame of the file counts and
    `rate` is the file's own.
    The other arguments, the errors and the batch are those of `mmdiff.data.clips.ClipDataModule`.
    """

    extensions = EXTENSIONS

    def __init__(
        self,
        path: str,
        frames: int = 16,
        size: tuple[int, int] = (64, 64),
        fps: float | None = None,
        resize: Resize = "none",
        short: Short = "leave_out",
        batch_size: int = 16,
        num_workers: int = 0,
        caption: CaptionChoice = "first",
        val_share: float = 0.05,
        max_bad_share: float = 0.01,
        seed: int = 0,
        limit: int | None = None,
        buckets: Buckets | None = None,
        timeout_s: float = 600.0,
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
            buckets=buckets,
            timeout_s=timeout_s,
        )
        check_geometry(frames, size, fps, resize, short)
        self.decode = VideoDecode(frames, (size[0], size[1]), fps, resize, short)

    def decoder(self) -> Decode:
        return self.decode


def check_geometry(frames: int, size: Sequence[int], fps: float | None, resize: str, short: str) -> None:
    """Raises ValueError that names the argument that is wrong."""
    if frames < 1:
        raise ValueError(f"frames={frames} is below 1; a clip needs at least one frame")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size={size} is not (height, width) with both at least 1")
    if fps is not None and not fps > 0:
        raise ValueError(f"fps={fps} is not above 0; leave it out to take every frame")
    if resize not in get_args(Resize):
        raise ValueError(f"resize={resize!r} is unknown; choose one of {', '.join(get_args(Resize))}")
    if short not in get_args(Short):
        raise ValueError(f"short={short!r} is unknown; choose one of {', '.join(get_args(Short))}")


@dataclass(frozen=True)
class VideoDecode:
    """Item -> Sample with data (3, frames, *size); with a generator the place in time is random, else the middle.

    The arguments are those of `ClipDataModule`. Raises the kinds of MediaError, also TooShortError and OtherSizeError.
    """

    frames: int
    size: tuple[int, int]
    fps: float | None = None
    resize: Resize = "none"
    short: Short = "leave_out"

    def __call__(self, item: Item, rng: random.Random | None) -> Sample:
        with VideoReader(item.source(), name=item.where) as reader:
            if self.fps is None:
                times, rate = self._consecutive(reader.times_s, rng), float(reader.fps)
            else:
                times, rate = window(reader, self.frames, self.fps, rng), self.fps
            real = enough(item, len(times), self.frames, rate, self.short)
            pixels = reader.read_at(times)
            start_s, total_s = times[0] - reader.start_s, reader.duration_s
        clip = resized(item, pixels.float().div_(127.5).sub_(1), self.size, self.resize)
        return Sample(
            padded(clip, self.frames).contiguous(),
            rate,
            real / rate,
            start_s,
            total_s,
            torch.arange(self.frames) < real if self.short == "mask" else None,
        )

    def own(self, item: Item) -> Shape:
        """Frames, rate and (H, W) of the file. Raises the kinds of MediaError."""
        with VideoReader(item.source(), name=item.where) as reader:
            count, fps = len(reader), float(reader.fps)
            shown = count / reader.duration_s  # another rate where the frames are not evenly apart
            return Shape(count, round(fps if abs(shown / fps - 1) < 1e-3 else shown, 6), reader.size)

    @property
    def asked(self) -> Shape:
        return Shape(self.frames, self.fps or 0, self.size)

    def to(self, shape: Shape) -> "VideoDecode":
        size = (shape.size[0], shape.size[1])
        return replace(self, frames=shape.steps, size=size, fps=shape.rate or None)

    def _consecutive(self, times: list[float], rng: random.Random | None) -> list[float]:
        spare = max(0, len(times) - self.frames)
        start = rng.randint(0, spare) if rng else spare // 2
        return times[start : start + self.frames]


def window(reader: VideoReader, frames: int, fps: float, rng: random.Random | None) -> list[float]:
    """When the frames nearest to the times of a clip of `frames` at `fps` are shown; fewer where the file is shorter.

    The clip begins with a frame of the file, at a random place, or without a generator in the middle. So a file of the
    same rate gives each of its frames once.
    """
    real = min(frames, max(1, math.floor(reader.duration_s * fps + 1e-6)))
    spare_s = max(0.0, reader.duration_s - real / fps)
    start_s = reader.start_s + spare_s * (rng.random() if rng else 0.5)
    shown = reader.times_between(start_s, start_s + _AHEAD_S, before=1) or reader.times_s
    first = max((time for time in shown if time <= start_s + _ROUNDING_S), default=shown[0])
    return nearest(reader, [first + step / fps for step in range(real)])


def nearest(reader: VideoReader, times_s: Sequence[float]) -> list[float]:
    """When the frames nearest to these rising times are shown; reads the index around them only."""
    first, last = times_s[0], times_s[-1]
    found = reader.times_between(first, last + _AHEAD_S, before=1) or reader.times_s
    if found[-1] < last:  # a nearer one can only come as soon after it
        found = reader.times_between(first, 2 * last - found[-1] + _AHEAD_S, before=1)
    return [found[nearest_index(found, time_s)] for time_s in times_s]


def frames_at(reader: VideoReader, fps: float, most: int) -> list[int]:
    """Indices of the frames shown at times k / fps from the start on, at most `most`."""
    times_s = reader.times_s
    count = min(most, max(1, math.floor(reader.duration_s * fps + 1e-6)))
    return [nearest_index(times_s, reader.start_s + step / fps) for step in range(count)]


def nearest_index(times_s: list[float], time_s: float) -> int:
    """Place of the sorted time that is nearest; of two as near, the earlier."""
    after = bisect.bisect_left(times_s, time_s)
    if after == 0:
        return 0
    if after == len(times_s):
        return after - 1
    return after if times_s[after] - time_s < time_s - times_s[after - 1] - 1e-9 else after - 1


def enough(item: Item, real: int, frames: int, rate: float, short: Short) -> int:
    """`real`, the frames that are there of `frames`. Raises TooShortError where these are too few and must be all."""
    if real < frames and short == "leave_out":
        raise TooShortError(
            f"{item.where}: has {real} frames at {rate:g} fps, {frames} are asked for; give short: pad or mask, "
            "fewer frames, or buckets"
        )
    return real


def padded(clip: Tensor, frames: int) -> Tensor:
    """(C, T, H, W) -> (C, frames, H, W): the last frame is repeated."""
    missing = frames - clip.shape[1]
    return clip if missing == 0 else torch.cat([clip, clip[:, -1:].expand(-1, missing, -1, -1)], dim=1)


def resized(item: Item, clip: Tensor, size: tuple[int, int], resize: Resize) -> Tensor:
    """(C, T, H, W) -> (C, T, *size) as `resize` says. Raises OtherSizeError where it says none and they differ."""
    height, width = clip.shape[-2:]
    if resize == "cover" or (height, width) == size:
        return resize_cover(clip, size).clamp(-1, 1)  # the resize rounds
    if resize == "fit":
        return resize_fit(clip, size).clamp(-1, 1)
    raise OtherSizeError(
        f"{item.where}: is {height} high and {width} wide, not {size[0]} and {size[1]}; give resize: cover or fit, "
        "that size, or buckets"
    )


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


def resize_fit(clip: Tensor, size: tuple[int, int]) -> Tensor:
    """(C, T, H, W) float -> (C, T, *size): resized to lie within `size` (bilinear, antialiased), on black (-1)."""
    height, width = clip.shape[-2:]
    scale = min(size[0] / height, size[1] / width)
    within = (min(size[0], max(1, round(height * scale))), min(size[1], max(1, round(width * scale))))
    if within != (height, width):
        clip = F.interpolate(clip.transpose(0, 1), within, mode="bilinear", antialias=True).transpose(0, 1)
    top, left = (size[0] - within[0]) // 2, (size[1] - within[1]) // 2
    return F.pad(clip, (left, size[1] - within[1] - left, top, size[0] - within[0] - top), value=-1.0)
