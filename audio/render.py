"""The world as sound: samples (1, T) of a scene at any rate, and a data module of them."""

import functools
import math

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from mmdiff.world import Scene, sound_caption, train_and_val

RAMP_S = 0.005  # rise and fall of a beep: short enough to date it, long enough not to click


def render(scene: Scene, samples: int, sample_rate: int) -> Tensor:
    """Samples (1, T) float32 in [-1, 1]: sample n sounds at time n / sample_rate, silence is exactly 0.

    Harmonics end below half of `sample_rate` (Hz), so that a buzzy beep does not alias.
    Raises ValueError if `samples` is not positive or `sample_rate` cannot carry the fundamental.
    """
    _check(samples, sample_rate)
    if 2 * scene.frequency >= sample_rate:
        raise ValueError(f"sample_rate={sample_rate} Hz cannot carry {scene.frequency:.0f} Hz; use over twice as much")
    time_s = torch.arange(samples, dtype=torch.float64) / sample_rate  # (T,)
    sound = torch.zeros_like(time_s)
    for event in scene.events:
        since = time_s - event.time_s
        ramp = min(RAMP_S, event.duration_s / 2)
        envelope = (torch.minimum(since, event.duration_s - since) / ramp).clamp(0, 1)
        sound += envelope * _wave(scene.timbre, scene.frequency, since, sample_rate)
    return (scene.loudness * sound).clamp(-1, 1).float()[None]


def _wave(timbre: str, frequency: float, time_s: Tensor, sample_rate: int) -> Tensor:
    """A sine, or the harmonics of a sawtooth, at most 1 in magnitude, from phase 0 at time 0."""
    if timbre == "pure":
        return torch.sin(2 * math.pi * frequency * time_s)
    count = max(1, math.ceil(sample_rate / 2 / frequency) - 1)
    saw = sum((torch.sin(2 * math.pi * k * frequency * time_s) / k for k in range(1, count + 1)), torch.tensor(0.0))
    return saw / 1.852  # the sums of sin(kx)/k stay below Gibbs's Si(pi) = 1.85194


def _check(samples: int, sample_rate: int) -> None:
    if samples < 1:
        raise ValueError(f"samples={samples} is not a positive number of samples")
    if sample_rate < 1:
        raise ValueError(f"sample_rate={sample_rate} is not a positive number of samples per second")


class WorldDataModule(LightningDataModule):
    """Sounds of `count` procedural scenes for training and `val_count` others for validation, without any files.

    sample_rate: in Hz. seed: which world. A batch is that of every data module, x (B, 1, T).
    """

    def __init__(
        self,
        count: int = 512,
        samples: int = 16000,
        sample_rate: int = 8000,
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
        val_count: int = 64,
    ) -> None:
        super().__init__()
        _check(samples, sample_rate)
        self.batch_size, self.num_workers = batch_size, num_workers
        sound = functools.partial(render, samples=samples, sample_rate=sample_rate)
        self.train, self.val = train_and_val(
            sound, sound_caption, count, val_count, sample_rate, samples / sample_rate, seed
        )

    def train_dataloader(self) -> DataLoader:
        return self.train.loader(self.batch_size, self.num_workers, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self.val.loader(self.batch_size, self.num_workers, shuffle=False)
