"""`mmdiff txt2vid`: text to video."""

import contextlib
import dataclasses
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

from mmdiff.edit_options import Media, add_options
from mmdiff.generate import LONGEST, Asked, parser, run
from mmdiff.stage_options import add_stops

if TYPE_CHECKING:
    from torch import Tensor

    from mmdiff.cascade import Cascade, Clip, Shape

SHIPPED = Path(__file__).parent / "pretrained" / "sprites"
STILLS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def txt2vid(args: list[str]) -> int:
    """Generates videos from prompts and prints where they are: H.264 mp4, and a contact sheet with --preview."""
    options = parser("txt2vid", txt2vid.__doc__ or "", SHIPPED)
    options.add_argument("--frames", type=int, help="length in frames, instead of --duration")
    options.add_argument("--fps", type=float, metavar="RATE", help="frames per second (default: the pipeline's)")
    options.add_argument("--size", metavar="HEIGHTxWIDTH", help="in pixels (default: the pipeline's)")
    add_options(options, "a picture or a video, white where it is new", frames=True)
    add_stops(options)
    given = options.parse_args(args)
    if given.frames is not None and given.duration is not None:
        raise ValueError("give --frames or --duration, not both")
    if given.frames is not None and given.frames < 1:
        raise ValueError(f"--frames {given.frames} must be at least 1")
    if given.fps is not None and not (math.isfinite(given.fps) and given.fps > 0):
        raise ValueError(f"--fps {given.fps} must be a number of frames per second above 0")
    size = None if given.size is None else height_and_width(given.size)

    def ask(cascade: "Cascade") -> Asked:
        cascade = cascade if size is None else sized(cascade, *size)
        cascade, every = (cascade, 1) if given.fps is None else cascade.at(given.fps)
        frames = given.frames
        if frames is None and given.duration is not None:
            frames = round(given.duration * cascade.rate / every)
        if frames is None:
            frames = -(-cascade.shape[1] // every)
        return Asked(cascade, (frames - 1) * every + 1, every)

    return run(given, write, ask, VideoFiles())


def height_and_width(size: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", size.strip())
    if match is None or "0" in match.groups():
        raise ValueError(f"--size {size} must be HEIGHTxWIDTH in pixels, such as 64x96")
    return int(match[1]), int(match[2])


def sized(cascade: "Cascade", height: int, width: int) -> "Cascade":
    """The cascade for clips of another size. Raises ValueError, with the legal ones, where no network takes it."""
    from mmdiff.cascade import Generate
    from mmdiff.nn.conv import legal_sizes

    channels, frames, *usual = cascade.shape
    asked = f"--size {height}x{width}"
    for name, stage in cascade.stages.items():
        if isinstance(stage, Generate) and stage.multiples is None and [height, width] != usual:
            raise ValueError(f"{asked}: only {usual[0]}x{usual[1]}, as the network of stage {name!r} takes no other")

    def legal(place: int) -> int:
        """What the sizes of an axis must be multiples of."""
        for size in range(1, usual[place]):
            shape = [channels, cascade.whole(frames), *usual]
            shape[2 + place] = size
            with contextlib.suppress(ValueError):
                cascade.legal(tuple(shape), cascade.rate)
                return math.lcm(size, 2)  # H.264 of 4:2:0 has even sizes
        return usual[place]

    faults = [
        f"the {side} must be a multiple of {legal(place)}, such as {legal_sizes(size, legal(place))}"
        for place, (side, size) in enumerate((("height", height), ("width", width)))
        if size % legal(place)
    ]
    if faults:
        raise ValueError(f"{asked}: {', and '.join(faults)}")
    if height * width > LONGEST * usual[0] * usual[1]:
        raise ValueError(
            f"{asked} has more than {LONGEST} times the pixels of {usual[0]}x{usual[1]}, the pipeline's own"
        )
    return dataclasses.replace(cascade, shape=(channels, frames, height, width))


def write(stem: Path, clip: "Clip", preview: bool) -> list[Path]:
    """Writes a clip (1, 3, T, H, W) as STEM.mp4, and its frames as STEM.png. Returns the files."""
    from .files import contact_sheet, write_video

    files = [stem.with_name(f"{stem.name}.mp4")]
    write_video(files[0], clip.data[0], clip.rate)
    if preview:
        files.append(stem.with_name(f"{stem.name}.png"))
        contact_sheet(files[1], clip.data[0])
    return files


class VideoFiles(Media):
    """Videos and pictures as clips (1, 3, T, H, W): resized to cover the size, cropped in the middle."""

    def check(self, path: Path) -> None:
        from .files import VideoReader

        if path.suffix.lower() in STILLS:
            still(path)
            return
        with VideoReader(path) as reader:
            reader.read([0])

    def read(self, path: Path, shape: "Shape", rate: float) -> "tuple[Tensor, str]":
        from .data import frames_at, resize_cover
        from .files import VideoReader

        if path.suffix.lower() in STILLS:
            pixels = still(path)
            words = f"a picture of {pixels.shape[3]}x{pixels.shape[2]}"
        else:
            with VideoReader(path) as reader:
                pixels = reader.read(frames_at(reader, rate, shape[1]))
                size = f"{pixels.shape[3]}x{pixels.shape[2]}"
                words = f"{len(reader)} frames of {size} at {float(reader.fps):g} fps"
        return resize_cover(pixels.float().div(127.5).sub(1), (shape[2], shape[3]))[None], words

    def pad(self, clip: "Tensor", length: int) -> "Tensor":
        import torch

        return clip.index_select(2, torch.arange(length).clamp(max=clip.shape[2] - 1))

    def check_mask(self, mask: str) -> None:
        self.check(Path(mask))

    def mask(self, mask: str, shape: "Shape", rate: float) -> "Tensor":
        white, _ = self.read(Path(mask), shape, rate)
        return self.pad(white, shape[1]).mean(dim=1, keepdim=True) > 0

    def describe(self, shape: "Shape", rate: float) -> str:
        plural = "s" if shape[1] != 1 else ""
        return f"{shape[1]} frame{plural} of {shape[3]}x{shape[2]} at {rate:g} fps"


def still(path: Path) -> "Tensor":
    """A picture as a clip (3, 1, H, W) uint8, upright. Raises ValueError naming a file that cannot be read."""
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    from .files import MAX_PIXELS

    try:
        with Image.open(path) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"{path}: {picture.width}x{picture.height} is over the limit of {MAX_PIXELS} pixels")
            pixels = np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read as a picture ({error})") from error
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[:, None]
