"""Evaluations of generated audio: is the prompted digit heard, in the prompted speaker's voice?

B batch, T samples, T' frames, F mel bins; clips are (B, 1, T), what the reader keeps of them (B, 1, T', F).
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import audio
from audio.data import ClipDataModule
from audio.files import write_audio
from audio.mel import FLOOR, Mel
from mmdiff.cascade import Clip
from mmdiff.readers import Reader, Recipe
from mmdiff.tasks import Splits, Task

SAMPLE_RATE = 8000


class SpeechReader(Reader):
    """Convolutions on log-mel spectrograms; level, start, noise and fine texture are randomised."""

    def __init__(self, answers: Mapping[str, Sequence[str]]) -> None:
        super().__init__(answers)
        self.mel = Mel(SAMPLE_RATE, n_fft=512, hop_length=128, mels=64, mean=-3.0, std=1.5)
        self.net = nn.Sequential(
            *_conv(1, 16),  # (B, 16, T' / 2, F / 2)
            *_conv(16, 32),
            *_conv(32, 64),
            *_conv(64, 96),  # (B, 96, T' / 16, F / 16)
            nn.AdaptiveAvgPool2d((2, 4)),
            nn.Flatten(),
        )
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(96 * 8, sum(self.sizes)))

    def reduce(self, x: Tensor) -> Tensor:
        if x.ndim != 3 or x.shape[1] != 1:
            raise ValueError(f"clips have shape {tuple(x.shape)}; (B, 1, T) is needed")
        return self.mel.encode(F.pad(x, (0, -x.shape[2] % self.mel.hop_length)))

    def augment(self, kept: Tensor, generator: torch.Generator) -> Tensor:
        count, _, frames, _ = kept.shape

        def draw() -> Tensor:
            return torch.rand(count, 1, 1, 1, generator=generator)

        def normal() -> Tensor:
            return torch.randn(kept.shape, generator=generator)

        floor = (math.log10(FLOOR) - self.mel.mean) / self.mel.std
        # Up to 0.25 s later or 0.06 s sooner, silence around it.
        padded = F.pad(kept, (0, 0, 16, 4), value=floor)
        starts = torch.randint(21, (count,), generator=generator).tolist()
        x = torch.stack([clip[:, start : start + frames] for clip, start in zip(padded, starts, strict=True)])
        # Phases made from magnitudes roughen and smear what they came from; so do models.
        x = torch.lerp(x, F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), draw()) + 0.15 * draw() * normal()
        magnitude = 10 ** (x * self.mel.std + self.mel.mean + 0.75 * (draw() - 0.5))  # +- 7.5 dB
        power = normal().square() + normal().square()  # of white noise in a bin, two degrees of freedom
        magnitude = (magnitude.square() + 10 ** (-10 + 5 * draw()) * power).sqrt().clamp(min=FLOOR)
        return (magnitude.log10() - self.mel.mean) / self.mel.std

    def features(self, kept: Tensor) -> Tensor:
        return self.net(kept)

    def forward(self, kept: Tensor) -> Tensor:
        return self.head(self.features(kept))


def _conv(inner: int, outer: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inner, outer, 3, 1, 1, bias=False), nn.BatchNorm2d(outer), nn.ReLU(), nn.MaxPool2d(2)


def digits() -> Task:
    """Digit and speaker of generated spoken digits."""
    return Task(
        about="How often a small classifier, trained on real recordings, hears the prompted digit and speaker.",
        data="../shared/data/fsdd",
        pipeline=Path(audio.__file__).parent / "pretrained" / "digits",
        splits=_splits,
        attributes=("digit", "speaker"),
        turns=(("digit",), ("speaker",)),
        reader=SpeechReader,
        recipe=Recipe(epochs=12),
        show=wavs,
    )


def _splits(path: str, shape: tuple[int, ...], rate: float) -> Splits:
    data = ClipDataModule(path, sample_rate=SAMPLE_RATE, samples=shape[1], short="pad")
    data.setup()
    return data.datasets["train"], data.datasets["val"]


def wavs(folder: Path, clip: Clip, titles: Sequence[str]) -> None:
    """Writes each clip as a wav named by its number and title."""
    for number, (data, title) in enumerate(zip(clip.data, titles, strict=True)):
        words = re.sub(r"[^\w]+", "-", title).strip("-")
        write_audio(folder / f"{number:02d}-{words}.wav", data, round(clip.rate), peak=1.0)
