"""`mmdiff txt2vid`: text to video."""

from pathlib import Path
from typing import TYPE_CHECKING

from mmdiff.generate import parser, run

if TYPE_CHECKING:
    from mmdiff.cascade import Cascade, Clip

SHIPPED = Path(__file__).parent / "pretrained" / "sprites"


def txt2vid(args: list[str]) -> int:
    """Generates videos from prompts and prints where they are: H.264 mp4, and a contact sheet with --preview."""
    options = parser("txt2vid", txt2vid.__doc__ or "", SHIPPED)
    options.add_argument("--frames", type=int, help="length in frames, instead of --duration")
    given = options.parse_args(args)
    if given.frames is not None and given.duration is not None:
        raise ValueError("give --frames or --duration, not both")
    if given.frames is not None and given.frames < 1:
        raise ValueError(f"--frames {given.frames} must be at least 1")

    def length(cascade: "Cascade") -> int:
        if given.frames is not None:
            return int(given.frames)
        return cascade.shape[1] if given.duration is None else round(given.duration * cascade.rate)

    return run(given, write, length)


def write(stem: Path, clip: "Clip", preview: bool) -> list[Path]:
    """Writes a clip (1, 3, T, H, W) as STEM.mp4, and its frames as STEM.png. Returns the files."""
    from .files import contact_sheet, write_video

    files = [stem.with_name(f"{stem.name}.mp4")]
    write_video(files[0], clip.data[0], clip.rate)
    if preview:
        files.append(stem.with_name(f"{stem.name}.png"))
        contact_sheet(files[1], clip.data[0])
    return files
