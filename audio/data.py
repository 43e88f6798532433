"""Captioned audio clips: which samples of a file, at which rate and with how many channels.

C channels, T samples; a clip is (C, T) float32 in [-1, 1].
"""

import math
import random
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from audio.files import EXTENSIONS, read_audio, resample
from mmdiff.data.clips import CaptionChoice, Decode, Sample
from mmdiff.data.clips import ClipDataModule as _ClipDataModule
from mmdiff.data.media import MediaError
from mmdiff.data.sources import Item


class ClipDataModule(_ClipDataModule):
    """Captioned audio clips as batches with x (B, channels, samples).

    sample_rate: Hz; a file of another rate is resampled. samples: length of a clip; in training at a random place,
    otherwise from the start. A shorter file is padded with zeros on the right; `duration_s` tells the real length.
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
        for name, value, least in (
            ("sample_rate", sample_rate, 1000),
            ("samples", samples, 1),
            ("channels", channels, 1),
        ):
            if value < least:
                raise ValueError(f"{name}={value} is below {least}")
        self.decode = AudioDecode(sample_rate, samples, channels)

    def decoder(self) -> Decode:
        return self.decode


@dataclass(frozen=True)
class AudioDecode:
    """Item -> Sample with data (channels, samples); with a generator the place in time is random, else the start."""

    sample_rate: int
    samples: int
    channels: int = 1

    def __call__(self, item: Item, rng: random.Random | None) -> Sample:
        waveform, rate = read_audio(item.source(), name=item.where)
        needed = math.ceil(self.samples * rate / self.sample_rate)
        spare = waveform.shape[1] - needed
        if spare > 0:  # cut before resampling: a long file costs no more than a short one
            start = rng.randint(0, spare) if rng else 0
            waveform = waveform[:, start : start + needed]
        waveform = mix_to(waveform, self.channels)
        try:
            waveform = resample(waveform, rate, self.sample_rate)[:, : self.samples]
        except ValueError as error:
            raise MediaError(f"{item.where}: {error}") from error
        real = waveform.shape[1]
        waveform = F.pad(waveform.clamp(-1, 1), (0, self.samples - real))
        return Sample(waveform, float(self.sample_rate), real / self.sample_rate)


def mix_to(waveform: Tensor, channels: int) -> Tensor:
    """(C, T) -> (channels, T): unchanged if equal, else the mean of all channels, repeated."""
    if waveform.shape[0] == channels:
        return waveform
    return waveform.mean(0, keepdim=True).expand(channels, -1).contiguous()
