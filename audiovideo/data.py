"""Captioned clips of picture and sound of the same files, on the file's own clock.

T frames, H W space, S samples, C channels. A clip is {"video": (3, T, H, W), "audio": (C, S)} float32 in [-1, 1].
"""

import random
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from audio.data import read_at_rate
from audio.files import AudioReader
from mmdiff.data.batches import Buckets, Shape
from mmdiff.data.clips import CaptionChoice, Decode, Sample, Short
from mmdiff.data.clips import ClipDataModule as _ClipDataModule
from mmdiff.data.items import Item
from mmdiff.data.media import NoStreamError
from video.data import Resize, VideoDecode, check_geometry, enough, padded, resized, window
from video.files import EXTENSIONS, VideoReader

Silent = Literal["leave_out", "silence"]


class ClipDataModule(_ClipDataModule):
    """Captioned clips with sound: batches with x {"video": (B, 3, frames, height, width), "audio": (B, channels, S)}.

    Both show the same time [a, a + frames / fps) of the file's clock, so S = frames / fps * sample_rate, and where the
    sound begins later or ends earlier than the picture there is silence. rate is {"video": fps, "audio": sample_rate},
    (B,) each; duration_s, start_s and total_s count on the picture. With short: mask, "mask" has one of each.
    frames, size, fps, resize, short: as in `video.ClipDataModule`, but fps is needed: one number says how much sound a
    clip has. sample_rate in Hz, channels: as in `audio.ClipDataModule`. silent: what becomes of a file without a sound
    track: leave_out (default), or silence.
    The other arguments, the errors and the batch are those of `mmdiff.data.clips.ClipDataModule`.
    """

    extensions = EXTENSIONS

    def __init__(
        self,
        path: str,
        fps: float,
        frames: int = 16,
        size: tuple[int, int] = (64, 64),
        sample_rate: int = 16000,
        channels: int = 1,
        resize: Resize = "none",
        short: Short = "leave_out",
        silent: Silent = "leave_out",
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
        if sample_rate < 1000:
            raise ValueError(f"sample_rate={sample_rate} is below 1000 Hz")
        if channels < 1:
            raise ValueError(f"channels={channels} is below 1")
        if silent not in get_args(Silent):
            raise ValueError(f"silent={silent!r} is unknown; choose one of {', '.join(get_args(Silent))}")
        pictures = VideoDecode(frames, (size[0], size[1]), fps, resize, short)
        self.decode = JointDecode(pictures, sample_rate, channels, silent)

    def decoder(self) -> Decode:
        return self.decode


@dataclass(frozen=True)
class JointDecode:
    """Item -> Sample of both; with a generator the place in time is random, else the middle of the picture.

    A clip begins with a frame of the file and its sound at the same instant, to a sample of the file. pictures: whose
    `fps` is not None. Raises the kinds of MediaError, also NoStreamError where one of the two is missing.
    """

    pictures: VideoDecode
    sample_rate: int
    channels: int = 1
    silent: Silent = "leave_out"

    def __call__(self, item: Item, rng: random.Random | None) -> Sample:
        of, source = self.pictures, item.source()
        fps = of.asked.rate
        with VideoReader(source, name=item.where) as reader:
            times = window(reader, of.frames, fps, rng)
            real = enough(item, len(times), of.frames, fps, of.short)
            pixels = reader.read_at(times)
            start_s, total_s = times[0] - reader.start_s, reader.duration_s
        clip = resized(item, pixels.float().div_(127.5).sub_(1), of.size, of.resize)
        samples = round(of.frames / fps * self.sample_rate)
        real_samples = min(samples, round(real / fps * self.sample_rate))
        try:
            with AudioReader(source, name=item.where) as sound:
                heard = heard_from(sound, times[0], real_samples, self.sample_rate, self.channels)
        except NoStreamError:
            if self.silent == "leave_out":
                raise
            heard = torch.zeros(self.channels, real_samples)
        masks = {"video": torch.arange(of.frames) < real, "audio": torch.arange(samples) < real_samples}
        return Sample(
            {"video": padded(clip, of.frames).contiguous(), "audio": F.pad(heard, (0, samples - real_samples))},
            {"video": fps, "audio": float(self.sample_rate)},
            real / fps,
            start_s,
            total_s,
            masks if of.short == "mask" else None,
        )

    def own(self, item: Item) -> Shape:
        """Frames, rate and (H, W) of the file's picture. Raises the kinds of MediaError."""
        return self.pictures.own(item)

    @property
    def asked(self) -> Shape:
        return self.pictures.asked

    def to(self, shape: Shape) -> "JointDecode":
        return replace(self, pictures=self.pictures.to(shape))


def heard_from(reader: AudioReader, time_s: float, samples: int, sample_rate: int, channels: int) -> Tensor:
    """(channels, samples) at `sample_rate` Hz of what is heard from `time_s` of the file's clock on, else silence."""
    rate = reader.sample_rate
    first = round((time_s - reader.start_s) * rate)  # may lie before the sound begins
    needed = -(-samples * rate // sample_rate)
    start, end = min(max(first, 0), reader.samples), max(0, min(first + needed, reader.samples))
    if end <= start:
        return torch.zeros(channels, samples)
    waveform = read_at_rate(reader, start, end - start, sample_rate, channels)
    before = round((start - first) * sample_rate / rate)
    return F.pad(waveform, (before, max(0, samples - before - waveform.shape[1])))[:, :samples]
