"""The world as sound: samples (C, T) of a scene at any rate, in mono or stereo, and a data module of them."""

import functools
import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmdiff.world import Event, Scene, World, sound_caption
from mmdiff.world.dataset import WorldClips
from mmdiff.world.vocabulary import SWEEP

RAMP_S = 0.005  # rise and fall of a sound: short enough to date it, long enough not to click
DECAY_S = 0.03  # in which a knock falls to 1 / e
HARMONICS = {  # number of a harmonic -> amplitude; all sums stay within [-1, 1]
    "pure": {1: 1.0},
    "hollow": {k: 1 / k for k in (1, 3, 5, 7)},
    "buzzy": {k: 1 / k / 1.852 for k in range(1, 11)},  # the sums of sin(kx)/k stay below Gibbs's Si(pi) = 1.85194
}
PARTIALS = 40  # of a noise burst
BAND_HZ = (300.0, 3700.0)  # of a noise burst
GOLDEN = 0.6180339887498949  # its multiples modulo 1 fill [0, 1] evenly


def render(scene: Scene, samples: int, sample_rate: int, channels: int = 1) -> Tensor:
    """Samples (C, T) float32 in [-1, 1]: sample n sounds at time n / sample_rate, silence is exactly 0.

    channels: 1, or 2 for left and right, where a sound at place p has the gains cos and sin of p pi / 2, so that the
    power of both together is that of the one channel. Partials end below half of `sample_rate` (Hz), so that nothing
    aliases. Raises ValueError if `samples` is not positive, `channels` is not 1 or 2, or `sample_rate` cannot carry the
    highest fundamental.
    """
    check_sound(samples, sample_rate, channels)
    sound = np.zeros((channels, samples), np.float32)
    for event in scene.events:
        if not event.heard:
            continue
        highest = event.frequency * (SWEEP if event.type == "turn" else 1)
        if 2 * highest >= sample_rate:
            raise ValueError(f"sample_rate={sample_rate} Hz cannot carry {highest:.0f} Hz; use over twice as much")
        first, last = (max(0, math.ceil(time_s * sample_rate)) for time_s in (event.time_s, event.end_s))
        since = np.arange(first, min(last, samples)) / sample_rate - event.time_s  # (N,) seconds, float64
        wave = _noise(event, since, sample_rate) if event.type == "burst" else _tone(event, since, sample_rate, highest)
        wave *= event.loudness * _envelope(event, since)
        place = event.place * math.pi / 2
        gains = [1.0] if channels == 1 else [math.cos(place), math.sin(place)]
        sound[:, first : first + len(since)] += np.array(gains, np.float32)[:, None] * wave
    return torch.from_numpy(np.clip(sound, -1, 1))


def _envelope(event: Event, since: NDArray) -> NDArray[np.float32]:
    ramp = min(RAMP_S, event.duration_s / 2)
    envelope = np.clip(np.minimum(since, event.duration_s - since) / ramp, 0, 1)
    if event.type == "bounce":
        envelope *= np.exp(-since / DECAY_S)
    return envelope.astype(np.float32)


def _tone(event: Event, since: NDArray, sample_rate: int, highest: float) -> NDArray[np.float32]:
    """A tone with the timbre's harmonics, from phase 0 on; a sweep rises steadily in pitch, to `highest` Hz."""
    seconds = swept(since, event.duration_s) if event.type == "turn" else since
    parts = {k: a for k, a in HARMONICS[event.timbre].items() if 2 * k * highest < sample_rate}
    return _sines(event.frequency * seconds, np.array([*parts]), np.zeros(len(parts)), np.array([*parts.values()]))


def _noise(event: Event, since: NDArray, sample_rate: int) -> NDArray[np.float32]:
    """Partials spread over the band, with phases that the grain decides; mostly within [-1, 1]."""
    number = np.arange(1, PARTIALS + 1)
    frequency = BAND_HZ[0] + (BAND_HZ[1] - BAND_HZ[0]) * ((number * GOLDEN + event.grain) % 1)
    amplitude = np.where(2 * frequency < sample_rate, 1 / (3.5 * math.sqrt(PARTIALS / 2)), 0)
    return _sines(since, frequency, (number * number * event.grain) % 1, amplitude)


def _sines(turns: NDArray, factor: NDArray, phase: NDArray, amplitude: NDArray) -> NDArray[np.float32]:
    """Sum (N,) of amplitude * sin(2 pi (factor * turns + phase)); turns (N,), the others one for each sine."""
    cycles = np.outer(factor, turns) + phase[:, None]  # float64: the phase stays exact however late
    cycles -= np.floor(cycles)
    return amplitude.astype(np.float32) @ np.sin(cycles.astype(np.float32) * np.float32(2 * math.pi))


def swept(since: NDArray, duration_s: float) -> NDArray:
    """Seconds of a steady tone that take a sweep's phase as far, for seconds since its start.

    It is the integral of SWEEP ** (since / duration_s), the ratio of the frequency to the first one.
    """
    return duration_s / math.log(SWEEP) * np.expm1(since / duration_s * math.log(SWEEP))


def check_sound(samples: int, sample_rate: int, channels: int) -> None:
    """Raises ValueError if `samples` or `sample_rate` is not positive or `channels` is not 1 or 2."""
    if samples < 1:
        raise ValueError(f"samples={samples} is not a positive number of samples")
    if sample_rate < 1:
        raise ValueError(f"sample_rate={sample_rate} is not a positive number of samples per second")
    if channels not in (1, 2):
        raise ValueError(f"channels={channels} is neither 1 nor 2")


class WorldDataModule(WorldClips):
    """Sounds of `count` procedural scenes for training and `val_count` others for validation, without any files.

    sample_rate: in Hz. channels: 1, or 2 for stereo, whose captions name places. seed: which of the scenes that
    `world` has, by default the easy one. A batch is that of every data module, x (B, C, T).
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
        channels: int = 1,
        world: World | None = None,
    ) -> None:
        check_sound(samples, sample_rate, channels)
        super().__init__(
            functools.partial(render, samples=samples, sample_rate=sample_rate, channels=channels),
            functools.partial(sound_caption, stereo=channels == 2),
            float(sample_rate),
            samples / sample_rate,
            count=count,
            val_count=val_count,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            world=world,
        )
