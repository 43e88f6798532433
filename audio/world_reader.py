"""Reads sounds of the procedural world: what is to be heard, from the samples alone, by measuring. Nothing is trained.

C channels, T samples. It is exact on renders of 8 kHz and more; below, harmonics that tell timbres apart are missing.
"""

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from audio.render import DECAY_S, swept
from mmdiff.world.vocabulary import FREQUENCIES, NUMBERS, SWEEP, pan_of

Array = NDArray[np.float64]
HOP_S = 0.002  # of the levels that tell sound from silence
SILENCE = 1e-3  # root mean square up to which it is silent
QUIET = 0.05  # of the loudest level, up to which it is silent too
NOISE = 2.5  # times the level of the quietest third, up to which it is noise
GAP_S = 0.01  # silence up to this belongs to the sound around it
SHORTEST_S = 0.015
TONAL = 0.7  # share of a sound's power in its harmonics, from which on it is a tone
CLEAR = 0.97  # the same, from which on it is not asked what else the sound may be
HIGH = math.sqrt(FREQUENCIES["low"] * FREQUENCIES["high"])  # Hz, from which on a tone is high
FALL = 2.0  # of the first half's level to the second's, from which on a tone dies away
FUNDAMENTALS = (120.0, 1500.0)  # Hz, in which a fundamental is looked for
TIMBRES = {"pure": (0.0, 0.0), "hollow": (0.0, 1 / 3), "buzzy": (1 / 2, 1 / 3)}  # harmonics 2 and 3 to the first


@dataclass(frozen=True)
class HeardSound:
    """One sound. kind: beep, knock, sweep or burst. frequency: Hz, of the fundamental; 0 of a burst.

    place: between left, 0, and right, 1; None in mono. loudness: greatest magnitude of both channels together.
    """

    time_s: float
    duration_s: float
    kind: str
    frequency: float
    timbre: str
    place: float | None
    loudness: float

    @property
    def pitch(self) -> str:
        return "high" if self.frequency > HIGH else "low"


@dataclass(frozen=True)
class Heard:
    """What is heard in a clip, in the order of time."""

    sounds: tuple[HeardSound, ...]

    @property
    def times_s(self) -> tuple[float, ...]:
        return tuple(sound.time_s for sound in self.sounds)

    @property
    def attributes(self) -> dict[str, str]:
        """Attribute -> value; of those in `mmdiff.world.attributes` all that can be heard."""
        tones = [sound for sound in self.sounds if sound.kind != "burst"]
        bursts = [sound for sound in self.sounds if sound.kind == "burst"]
        found = {"sound": "none"}
        if tones:
            found["number"] = NUMBERS.get(len(tones), str(len(tones)))
            for name, attribute in (("kind", "sound"), ("pitch", "pitch"), ("timbre", "timbre")):
                found[attribute] = Counter(getattr(sound, name) for sound in tones).most_common(1)[0][0]
            places = [sound.place for sound in tones if sound.place is not None]
            if places:
                found["pan"] = pan_of(sum(places) / len(places))
        found["burst"] = "none"
        if bursts:
            found["burst"] = "before" if tones and bursts[0].time_s < tones[0].time_s else "after"
            if bursts[0].place is not None:
                found["burst_pan"] = "left" if bursts[0].place < 0.5 else "right"
        return found


def read(sound: Tensor, sample_rate: int) -> Heard:
    """What a sound (C, T) in [-1, 1] holds, C 1 or 2. Raises ValueError on another shape."""
    if sound.ndim != 2 or sound.shape[0] not in (1, 2) or sound.shape[1] < 1:
        raise ValueError(f"sound of shape {tuple(sound.shape)} is not (1, T) or (2, T)")
    samples = sound.detach().cpu().double().numpy()
    return Heard(tuple(_sound(samples, span, sample_rate) for span in _spans(samples, sample_rate)))


def _spans(samples: Array, sample_rate: int) -> list[tuple[int, int]]:
    """First and last sample (exclusive) of each sound."""
    hop = max(1, round(HOP_S * sample_rate))
    power = np.square(samples).sum(0)
    level = np.sqrt(np.pad(power, (0, -len(power) % hop)).reshape(-1, hop).mean(1))
    loud = level > max(SILENCE, QUIET * float(level.max()), NOISE * float(np.quantile(level, 1 / 3)))
    edges = np.flatnonzero(np.diff(np.concatenate(([0], loud.astype(int), [0]))))
    spans: list[tuple[int, int]] = []
    for first, last in edges.reshape(-1, 2) * hop:
        if spans and first - spans[-1][1] <= GAP_S * sample_rate:
            spans[-1] = (spans[-1][0], int(last))
        else:
            spans.append((int(first), int(last)))
    return [
        (max(0, first - hop), min(last + hop, samples.shape[1]))
        for first, last in spans
        if last - first >= SHORTEST_S * sample_rate
    ]


def _sound(samples: Array, span: tuple[int, int], sample_rate: int) -> HeardSound:
    both = samples[:, slice(*span)]  # (C, N)
    power = np.square(both).sum(1)
    place = None if len(both) == 1 else float(np.arctan2(*np.sqrt(power[::-1]))) * 2 / math.pi
    # The gains of the two channels weigh them as well as can be; both are positive.
    mono = (np.sqrt(power) @ both) / math.sqrt(power.sum())
    envelope = np.abs(mono)
    sounding = np.flatnonzero(envelope > 0.03 * envelope.max())
    start, end = int(sounding[0]), int(sounding[-1]) + 1
    mono, lasts = mono[start:end], (end - start) / sample_rate
    kind, frequency, timbre = _kind(mono, lasts, sample_rate)
    time_s = (span[0] + start) / sample_rate
    return HeardSound(time_s, lasts, kind, frequency, timbre, place, float(envelope.max()))


def _kind(mono: Array, lasts: float, sample_rate: int) -> tuple[str, float, str]:
    """Kind, fundamental in Hz, and timbre: those under which most of the power is in the harmonics of one tone."""
    half = len(mono) // 2
    falls = _level(mono[:half]) > FALL * _level(mono[half:])
    steady = mono * np.exp(np.minimum(np.arange(len(mono)) / sample_rate / DECAY_S, 3)) if falls else mono
    kind = "knock" if falls else "beep"
    share, frequency, ratios = _harmonics(steady, sample_rate)
    if share < CLEAR:
        of_sweep = _harmonics(*_unswept(mono, lasts))
        if of_sweep[0] > share:
            kind, (share, frequency, ratios) = "sweep", of_sweep
    if share < TONAL:
        return "burst", 0.0, "pure"
    return kind, frequency, min(TIMBRES, key=lambda name: math.dist(TIMBRES[name], ratios))


def _level(part: Array) -> float:
    return float(np.sqrt(np.square(part).mean())) if len(part) else 0.0


def _unswept(mono: Array, lasts: float) -> tuple[Array, float]:
    """A sweep as the steady tone of its first frequency, and the sample rate of that."""
    count = 4 * len(mono)  # so finely that straight lines between samples do for the harmonics
    fine = np.fft.irfft(np.fft.rfft(mono), count) * 4
    steady_s = float(swept(np.array(lasts), lasts))
    seconds = np.arange(count) / count * steady_s
    places = np.log1p(seconds * math.log(SWEEP) / lasts) / math.log(SWEEP) * count  # the inverse of `swept`
    return np.interp(places, np.arange(count), fine), count / steady_s


def _harmonics(tone: Array, sample_rate: float) -> tuple[float, float, tuple[float, float]]:
    """Share of the power in harmonics of the strongest frequency, that in Hz, and amplitudes of harmonics 2 and 3."""
    length = 4 << len(tone).bit_length()  # a power of two, four to eight times as long
    spectrum = np.abs(np.fft.rfft(tone * np.hanning(len(tone)), length))
    low, high = (min(len(spectrum) - 2, math.ceil(edge * length / sample_rate)) for edge in FUNDAMENTALS)
    top = low + int(spectrum[low : high + 1].argmax())
    left, middle, right = np.log(spectrum[top - 1 : top + 2] + 1e-12)
    first = top + 0.5 * (left - right) / min(left - 2 * middle + right, -1e-9)  # the peak of a parabola through three
    lobe = 2 * length // len(tone)  # half of the window's main lobe
    centres = [round(k * first) for k in range(1, int(len(spectrum) / first) + 1)]
    peaks = [spectrum[max(0, centre - lobe) : centre + lobe + 1] for centre in centres]
    share = sum(float(np.square(peak).sum()) for peak in peaks) / max(float(np.square(spectrum).sum()), 1e-12)
    second, third = ((float(peaks[k].max()) if len(peaks) > k else 0.0) / float(spectrum[top]) for k in (1, 2))
    return share, first * sample_rate / length, (second, third)
