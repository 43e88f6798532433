"""`mmdiff txt2audio`: text to audio."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from mmdiff.generate import parser, run

if TYPE_CHECKING:
    from mmdiff.cascade import Cascade, Clip

SHIPPED = Path(__file__).parent / "pretrained" / "digits"


def txt2audio(args: list[str]) -> int:
    """Generates sounds from prompts and prints where they are: wav or flac, and a spectrogram with --preview."""
    options = parser("txt2audio", txt2audio.__doc__ or "", SHIPPED)
    options.add_argument("--format", choices=("wav", "flac"), default="wav", help="of the files (default: wav)")
    given = options.parse_args(args)

    def length(cascade: "Cascade") -> int:
        return cascade.shape[1] if given.duration is None else round(given.duration * cascade.rate)

    return run(given, functools.partial(write, suffix=given.format), length)


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
