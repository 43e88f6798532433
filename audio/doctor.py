"""What the doctor needs to know of sound: how its files are read, rightly and wrongly, and who says a sample rate.

C channels, T samples.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from audio.data import read_at_rate
from audio.files import EXTENSIONS, AudioReader
from audio.mel import Mel
from mmdiff.data.items import Item
from mmdiff.data.media import MediaError
from mmdiff.doctor import Check, Finding, Origin, Reading, Readings, Run

ENOUGH = 16  # clips
LOOK = "Look for a flip of axis 2 after decoding"


class Recording(Readings):
    """The samples of a file as they sound, backwards, with left and right exchanged, and not resampled."""

    def reads(self, item: Item) -> bool:
        return Path(item.where.rpartition(":")[2]).suffix.lower() in EXTENSIONS

    def __call__(self, item: Item, start_s: float, rate: float, like: Tensor) -> Sequence[Reading]:
        if like.ndim != 2:  # a film's pictures
            return []
        channels, steps = like.shape
        with AudioReader(item.source(), name=item.where) as reader:
            own = reader.sample_rate
            start = min(round(start_s * own), reader.samples - 1)

            def read(at: int) -> Tensor:
                count = min(-(-steps * own // at), reader.samples - start)
                found = read_at_rate(reader, start, count, at, channels)[:, :steps]
                return F.pad(found, (0, steps - found.shape[1]))

            wave = read(round(rate))
            found = [Reading(wave), Reading(wave.flip(1), "time flipped", "run backwards", LOOK)]
            if channels == 2:
                found.append(
                    Reading(
                        wave.flip(0), "channels swapped", "have left and right exchanged", "Look for a flip of axis 1"
                    )
                )
            if own != round(rate):
                found.append(
                    Reading(
                        read(own),
                        "wrong sample rate",
                        f"hold the samples of their files at {own} Hz, and the batch says {rate:g} Hz",
                        "Resample where the files are decoded, or say their own rate",
                    )
                )
        return found


class Clock(Check):
    """A sample rate or hop that two parts of a training do not share."""

    def begin(self, run: Run) -> Iterable[Finding]:
        self.done = False
        mels = [(name, part) for name, part in spectrograms(run.module) if "losses" not in name]
        for name, part in mels[1:]:
            first = mels[0][1]
            if part.hop_length != first.hop_length:
                yield Finding(
                    "wrong hop",
                    f"{mels[0][0]} makes a frame of {first.hop_length} samples, {name} of {part.hop_length}",
                    "Give all spectrograms of a model the same hop_length",
                )

    def batch(self, run: Run, batch: Mapping[str, Any]) -> Iterable[Finding]:
        rate = batch.get("rate")
        if self.done or not isinstance(rate, Tensor) or not isinstance(batch.get("x", batch.get("latents")), Tensor):
            return
        self.done = True
        hz, name = float(rate.flatten()[0]), "wrong sample rate"
        for place, part in spectrograms(run.module):
            if abs(part.sample_rate - hz) > 0.5:
                yield Finding(
                    name,
                    f"the clips have {hz:g} samples a second, and {place} is made for {part.sample_rate}",
                    "Give data.sample_rate and every Mel the same rate",
                )
                return
        data = batch.get("x")
        if data is not None and data.ndim == 3:
            own = file_rates(run)
            if own and max(own) < hz * 0.75:
                yield Finding(
                    name,
                    f"the files have at most {max(own)} samples a second and the clips {hz:g}: nothing sounds above "
                    f"{max(own) / 2:g} Hz",
                    "Lower data.sample_rate (and a Mel's) to the files' own rate, or get the files before they were "
                    "reduced",
                )


class Stereo(Check):
    """Clips of two channels that are one."""

    def begin(self, run: Run) -> Iterable[Finding]:
        self.seen = self.same = 0
        return ()

    def batch(self, run: Run, batch: Mapping[str, Any]) -> Iterable[Finding]:
        x = batch.get("x")
        if self.seen >= ENOUGH or not isinstance(x, Tensor) or x.ndim != 3 or x.shape[1] != 2:
            return
        self.seen += len(x)
        self.same += int(((x[:, 0] - x[:, 1]).abs().amax(1) == 0).sum())
        if self.seen >= ENOUGH and self.same == self.seen:
            yield Finding(
                "channels swapped",
                f"left and right are the same in all of the first {self.seen} clips: mono is trained as stereo",
                "Set data.channels to 1, or look at where the second channel is lost",
            )


def spectrograms(module: nn.Module) -> list[tuple[str, Mel]]:
    """The `Mel`s of a training, by their places."""
    return [(name, part) for name, part in module.named_modules() if isinstance(part, Mel)]


def file_rates(run: Run) -> list[int]:
    """Sample rates of the first files of the training data, as their headers say."""
    rates = []
    for item in (run.items() or ())[:8]:
        if Recording().reads(item):
            try:
                with AudioReader(item.source(), name=item.where) as reader:
                    rates.append(reader.sample_rate)
            except MediaError:
                continue
    return rates


def checks() -> list[Check]:
    """For the entry-point group `mmdiff.doctor`."""
    return [Origin([Recording()]), Clock(), Stereo()]
