"""Video files: what the rest of the suite reads and writes them by. See `video.reader` and `video.writer`.

T frames, H W space. A clip is (3, T, H, W); pixels are uint8 when read and float in [-1, 1] when written.
"""

from dataclasses import dataclass
from fractions import Fraction

from torch import Tensor

from mmdiff.data.media import NoStreamError
from video.backends import BackendName as BackendName
from video.reader import MAX_BYTES, MAX_PIXELS
from video.reader import VideoReader as VideoReader
from video.source import MediaSource as MediaSource
from video.writer import contact_sheet as contact_sheet
from video.writer import write_gif as write_gif
from video.writer import write_video as write_video

EXTENSIONS = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".ts", ".gif")


@dataclass(frozen=True)
class Video:
    """frames: (3, T, H, W) uint8 in presentation order; fps: the file's average rate; times_s: on the file's clock."""

    frames: Tensor
    fps: Fraction
    times_s: list[float]


def read_video(
    source: MediaSource,
    *,
    start_s: float = 0.0,
    duration_s: float | None = None,
    name: str | None = None,
    backend: BackendName = "pyav",
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
) -> Video:
    """Every frame first shown from `start_s` (seconds after the first frame) on, for `duration_s` or to the end.

    source: path, bytes or seekable binary file. With a duration only the file's part around it is read. Raises
    MediaError naming the file, see `VideoReader`; also when no frame lies in the range.
    """
    with VideoReader(source, name=name, backend=backend, max_pixels=max_pixels, max_bytes=max_bytes) as reader:
        if duration_s is None:
            times = [time for time in reader.times_s if time >= reader.start_s + start_s - 1e-6]
        else:
            begin = reader.start_s + start_s
            times = reader.times_between(begin, begin + duration_s)
        if not times:
            end_s = "the end" if duration_s is None else f"{start_s + duration_s} s"
            raise NoStreamError(
                f"{reader.name}: no frame from {start_s} s to {end_s}; it lasts {reader.duration_s:.6g} s"
            )
        return Video(reader.read_at(times), reader.fps, times)
