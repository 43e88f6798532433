"""Captioned audio clips: which samples of a file, at which rate and with how many channels.

C channels, T samples; a clip is (C, T) float32 in [-1, 1].
"""

import math
import random
from dataclasses import dataclass, replace
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from audio.files import EXTENSIONS, AudioReader, resample
from mmdiff.data.batches import Buckets, Shape
from mmdiff.data.clips import CaptionChoice, Decode, Sample, Short, TooShortError
from mmdiff.data.clips import ClipDataModule as _ClipDataModule
from mmdiff.data.items import Item
from mmdiff.data.media import UnsupportedError

_FILTER = 16  # samples of the lower rate on either side that a resampled one depends on, and some to spare


class ClipDataModule(_ClipDataModule):
    """Captioned audio clips as batches with x (B, channels, samples).

    sample_rate: Hz; a file of another rate is resampled. samples: length of a clip; in training at a random place,
    otherwise from the start. short: what becomes of a shorter file: leave_out (default), pad with zeros on the right,
    or mask: pad, and "mask" (B, T) is False there; `duration_s` tells the real length.
    channels: see `mix_to`. Values beyond [-1, 1] (float files, resampling) are clamped.
    The other arguments, the errors and the batch are those of `mmdiff.data.clips.ClipDataModule`.
    """

    extensions = EXTENSIONS

    def __init__(
        self,
        path: str,
        sample_rate: int = 16000,
        samples: int = 16000,
        channels: int = 1,
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
        for name, value, least in (
            ("sample_rate", sample_rate, 1000),
            ("samples", samples, 1),
            ("channels", channels, 1),
        ):
            if value < least:
                raise ValueError(f"{name}={value} is below {least}")
        if short not in get_args(Short):
            raise ValueError(f"short={short!r} is unknown; choose one of {', '.join(get_args(Short))}")
        self.decode = AudioDecode(sample_rate, samples, channels, short)

    def decoder(self) -> Decode:
        return self.decode


@dataclass(frozen=True)
class AudioDecode:
    """Item -> Sample with data (channels, samples); with a generator the place in time is random, else the start.

    Reads no more of a long file than the clip. Raises the kinds of MediaError, also TooShortError.
    """

    sample_rate: int
    samples: int
    channels: int = 1
    short: Short = "leave_out"

    def __call__(self, item: Item, rng: random.Random | None) -> Sample:
        with AudioReader(item.source(), name=item.where) as reader:
            rate, total = reader.sample_rate, reader.samples
            needed = math.ceil(self.samples * rate / self.sample_rate)
            spare = max(0, total - needed)
            start = rng.randint(0, spare) if rng else 0
            count = min(needed, total - start)
            waveform = read_at_rate(reader, start, count, self.sample_rate, self.channels)[:, : self.samples]
        real = waveform.shape[1]
        if real < self.samples and self.short == "leave_out":
            raise TooShortError(
                f"{item.where}: has {real} samples at {self.sample_rate} Hz, {self.samples} are asked for; give short: "
                "pad or mask, fewer samples, or buckets"
            )
        waveform = F.pad(waveform, (0, self.samples - real))
        mask = torch.arange(self.samples) < real if self.short == "mask" else None
        return Sample(waveform, float(self.sample_rate), real / self.sample_rate, start / rate, total / rate, mask)

    def own(self, item: Item) -> Shape:
        """Samples and rate of the file, and the channels that it is mixed to. Raises the kinds of MediaError."""
        with AudioReader(item.source(), name=item.where) as reader:
            return Shape(reader.samples, reader.sample_rate, (self.channels,))

    @property
    def asked(self) -> Shape:
        return Shape(self.samples, self.sample_rate, (self.channels,))

    def to(self, shape: Shape) -> "AudioDecode":
        return replace(self, samples=shape.steps, sample_rate=round(shape.rate))


def read_at_rate(reader: AudioReader, start: int, count: int, sample_rate: int, channels: int) -> Tensor:
    """Samples [start, start + count) of a file as (channels, ceil(count * sample_rate / its rate)) in [-1, 1].

    The samples around them are read too, so that a window sounds as it does in the whole file resampled.
    Raises the kinds of MediaError, UnsupportedError for rates with so little in common that the filter is too large.
    """
    rate = reader.sample_rate
    if rate == sample_rate:
        return mix_to(reader.read(start, count), channels).clamp(-1, 1)
    block = rate // math.gcd(rate, sample_rate)  # after so many samples both rates meet again
    around = -(-_FILTER * max(1, math.ceil(rate / sample_rate)) // block) * block
    before = min(start // block * block, around)
    after = min(around, reader.samples - start - count)
    waveform = mix_to(reader.read(start - before, before + count + after), channels)
    try:
        waveform = resample(waveform, rate, sample_rate)
    except ValueError as error:
        raise UnsupportedError(f"{reader.name}: {error}") from error
    first = before // block * (block * sample_rate // rate)
    return waveform[:, first : first + math.ceil(count * sample_rate / rate)].clamp(-1, 1)


def mix_to(waveform: Tensor, channels: int) -> Tensor:
    """(C, T) -> (channels, T): unchanged if equal, else the mean of all channels, repeated."""
    if waveform.shape[0] == channels:
        return waveform
    return waveform.mean(0, keepdim=True).expand(channels, -1).contiguous()
