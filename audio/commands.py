"""`mmdiff txt2audio`: text to audio."""

import functools
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

from mmdiff.edit_options import Media, add_options
from mmdiff.generate import Asked, parser, run
from mmdiff.stage_options import add_stops

if TYPE_CHECKING:
    from torch import Tensor

    from mmdiff.cascade import Cascade, Clip, Shape

SHIPPED = Path(__file__).parent / "pretrained" / "digits"


def txt2audio(args: list[str]) -> int:
    """Generates sounds from prompts and prints where they are: wav or flac, and a spectrogram with --preview."""
    options = parser("txt2audio", txt2audio.__doc__ or "", SHIPPED)
    options.add_argument("--format", choices=("wav", "flac"), default="wav", help="of the files (default: wav)")
    add_options(options, "START:END in seconds, several with commas, or a sound that is loud where it is new")
    add_stops(options)
    given = options.parse_args(args)

    def ask(cascade: "Cascade") -> Asked:
        return Asked(cascade, cascade.shape[1] if given.duration is None else round(given.duration * cascade.rate))

    return run(given, functools.partial(write, suffix=given.format), ask, AudioFiles())


def write(stem: Path, clip: "Clip", preview: bool, suffix: str = "wav") -> list[Path]:
    """Writes a clip (1, C, T) as STEM.wav or STEM.flac, and its spectrogram as STEM.png. Returns the files.

    Peaks beyond full scale are clipped; levels are not changed otherwise.
    """
    from .files import spectrogram_picture, write_audio

    waveform, rate = clip.data[0].clamp(-1, 1), round(clip.rate)
    files = [stem.with_name(f"{stem.name}.{suffix}")]
    write_audio(files[0], waveform, rate)
    if preview:
        files.append(stem.with_name(f"{stem.name}.png"))
        spectrogram_picture(files[1], waveform, rate)
    return files


class AudioFiles(Media):
    """Sounds as clips (1, C, T): resampled, and mixed where the number of channels differs."""

    fade_s = 0.005

    def check(self, path: Path) -> None:
        from .files import read_audio

        read_audio(path)

    def read(self, path: Path, shape: "Shape", rate: float) -> "tuple[Tensor, str]":
        from .data import mix_to
        from .files import read_audio, resample

        waveform, file_rate = read_audio(path)
        plural = "s" if len(waveform) != 1 else ""
        words = f"{waveform.shape[1] / file_rate:.3f} s at {file_rate} Hz, {len(waveform)} channel{plural}"
        waveform = waveform[:, : math.ceil(shape[1] * file_rate / rate)]  # cut first: a long file costs no more
        waveform = resample(mix_to(waveform, shape[0]), file_rate, round(rate))[:, : shape[1]]
        return waveform.clamp(-1, 1)[None], words

    def pad(self, clip: "Tensor", length: int) -> "Tensor":
        import torch

        return torch.nn.functional.pad(clip, (0, length - clip.shape[2]))

    def check_mask(self, mask: str) -> None:
        if not ranges(mask):
            self.check(Path(mask))

    def mask(self, mask: str, shape: "Shape", rate: float) -> "Tensor":
        import torch

        if not ranges(mask):
            loud, _ = self.read(Path(mask), (1, *shape[1:]), rate)
            return self.pad(loud, shape[1]).abs() >= 0.5
        anew = torch.zeros(1, 1, shape[1], dtype=torch.bool)
        for start_s, end_s in ranges(mask):
            anew[:, :, round(start_s * rate) : shape[1] if end_s is None else round(end_s * rate)] = True
        return anew

    def describe(self, shape: "Shape", rate: float) -> str:
        plural = "s" if shape[0] != 1 else ""
        return f"{shape[1] / rate:.3f} s at {rate:g} Hz, {shape[0]} channel{plural}"


def ranges(mask: str) -> list[tuple[float, float | None]]:
    """START:END,... in seconds, either end left out for the clip's own; empty where it is no such list.

    Raises ValueError where a range ends before it starts.
    """
    found: list[tuple[float, float | None]] = []
    for part in mask.split(","):
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)?:(\d+(?:\.\d*)?|\.\d+)?\s*", part)
        if match is None:
            return []
        start_s, end_s = float(match[1] or 0), None if match[2] is None else float(match[2])
        if end_s is not None and end_s <= start_s:
            raise ValueError(f"--mask {mask}: {part.strip()} ends before it starts; give START:END in seconds")
        found.append((start_s, end_s))
    return found
