"""Video files by PyAV: read frames in presentation order, write H.264 mp4 that browsers play, contact sheets.

T frames, H W space. A clip is (3, T, H, W); pixels are uint8 when read and float in [-1, 1] when written.
"""

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from types import TracebackType
from typing import BinaryIO, Self

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from PIL import Image
from torch import Tensor

from mmdiff.data.media import MediaError, whole_file

MediaSource = str | os.PathLike[str] | bytes | BinaryIO

EXTENSIONS = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".ts", ".gif")
MAX_PIXELS = 4096 * 4096  # of one frame
MAX_BYTES = 2 << 30  # of all decoded frames of one call, as RGB
# playlists and image sequences, which open other files, are no media to us
_FORMATS = "mov,mp4,m4a,3gp,matroska,webm,avi,mpeg,mpegts,mpegvideo,asf,flv,ogg,gif,apng,h264,hevc,m4v,ivf,dv"


@dataclass(frozen=True)
class Video:
    """frames: (3, T, H, W) uint8 in presentation order; fps: the file's average rate."""

    frames: Tensor
    fps: Fraction


class VideoReader:
    """Open video file with random access to frames: a demuxed index of presentation times, then seek and decode.

    Use it as a context manager; it holds an open file and must not be shared between processes.
    times_s: presentation time of each frame in seconds after the first. fps: average rate, Fraction.
    Raises MediaError, naming `name` (default: the path), when the file is no readable video or a frame has more than
    `max_pixels`; that is checked before anything is decoded.
    """

    def __init__(self, source: MediaSource, *, name: str | None = None, max_pixels: int = MAX_PIXELS) -> None:
        self.name = name or (os.fspath(source) if isinstance(source, str | os.PathLike) else "video data")
        self._source = source
        with _named(self.name):
            self._open()
            try:
                size = self._stream.codec_context
                if size.width * size.height > max_pixels:
                    raise MediaError(
                        f"{self.name}: {size.width}x{size.height} is over the limit of {max_pixels} pixels"
                    )
                packets = self._container.demux(self._stream)
                shown = {packet.pts for packet in packets if packet.pts is not None and not packet.is_discard}
                self._pts: list[int] = sorted(shown)
                if not self._pts:
                    raise MediaError(f"{self.name}: no video frames")
                base = self._stream.time_base or Fraction(1)
                self.times_s = [float((pts - self._pts[0]) * base) for pts in self._pts]
                self.fps = self._rate()
            except BaseException:
                self._container.close()
                raise

    def __len__(self) -> int:
        return len(self._pts)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._container.close()

    def read(self, indices: Sequence[int]) -> Tensor:
        """Frames of these indices, (3, T, H, W) uint8. Raises MediaError when one cannot be decoded."""
        pixels = self._stream.codec_context.width * self._stream.codec_context.height
        if len(indices) * pixels * 3 > MAX_BYTES:
            raise MediaError(
                f"{self.name}: {len(indices)} frames of {pixels} pixels are over {MAX_BYTES} bytes; read less"
            )
        wanted = {self._pts[index] for index in indices}
        with _named(self.name):
            try:
                self._container.seek(min(wanted), stream=self._stream, backward=True)
                found = self._decode(wanted)
            except av.FFmpegError:  # some containers cannot seek
                found = {}
            if len(found) < len(wanted):
                self._container.close()
                self._open()
                found = self._decode(wanted)
        if len(found) < len(wanted):
            raise MediaError(f"{self.name}: {len(wanted) - len(found)} of {len(wanted)} frames cannot be decoded")
        shapes = {frame.shape for frame in found.values()}
        if len(shapes) > 1:
            raise MediaError(f"{self.name}: the frame size changes within the file")
        frames = np.stack([found[self._pts[index]] for index in indices])  # (T, H, W, 3)
        return torch.from_numpy(frames).permute(3, 0, 1, 2).contiguous()

    def _open(self) -> None:
        source = io.BytesIO(self._source) if isinstance(self._source, bytes) else self._source
        if isinstance(source, str | os.PathLike):
            source = os.fspath(source)
        else:
            source.seek(0)
        container = av.open(source, mode="r", options={"format_whitelist": _FORMATS}, metadata_errors="ignore")
        if not container.streams.video:
            container.close()
            raise MediaError(f"{self.name}: no video stream")
        self._container = container
        self._stream = container.streams.video[0]
        self._stream.codec_context.thread_count = 1  # clips are small; workers, not threads, give the speed

    def _decode(self, wanted: set[int]) -> dict[int, np.ndarray]:
        found: dict[int, np.ndarray] = {}
        last = max(wanted)
        reformatter = VideoReformatter()
        for frame in self._container.decode(self._stream):
            if frame.pts in wanted:
                # one thread: with the default, swscale starts a pool for each clip, five times slower on small ones
                found[frame.pts] = _upright(reformatter.reformat(frame, format="rgb24", threads=1), frame.rotation)
            if frame.pts is not None and frame.pts >= last:
                break
        return found

    def _rate(self) -> Fraction:
        rate = self._stream.average_rate or self._stream.guessed_rate
        if rate and 0 < rate <= 1000:
            return Fraction(rate)
        if self.times_s[-1] > 0:
            return Fraction((len(self._pts) - 1) / self.times_s[-1]).limit_denominator(1001)
        raise MediaError(f"{self.name}: no frame rate")


def read_video(
    source: MediaSource,
    *,
    start_s: float = 0.0,
    duration_s: float | None = None,
    name: str | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Video:
    """Every frame shown from `start_s` (seconds after the first frame) on, for `duration_s` or to the end.

    source: path, bytes or seekable binary file. Raises MediaError naming the file, see `VideoReader`; also when no
    frame lies in the range.
    """
    with VideoReader(source, name=name, max_pixels=max_pixels) as reader:
        end_s = float("inf") if duration_s is None else start_s + duration_s
        indices = [index for index, time_s in enumerate(reader.times_s) if start_s - 1e-6 <= time_s < end_s - 1e-6]
        if not indices:
            raise MediaError(
                f"{reader.name}: no frame from {start_s} s to {end_s} s; it ends at {reader.times_s[-1]} s"
            )
        return Video(reader.read(indices), reader.fps)


def write_video(
    path: str | os.PathLike[str], frames: Tensor, fps: float | Fraction, *, crf: int = 16, preset: str = "medium"
) -> None:
    """H.264 mp4 (yuv420p, BT.601, index in front) with exactly T frames; the same input gives the same bytes.

    frames: (3, T, H, W) float, clamped to [-1, 1]; an odd H or W is padded by repeating the last row or column.
    crf: 0 (best) to 51. Raises ValueError for a wrong shape, rate or non-finite pixels; then no file is made.
    """
    pixels = _pixels(frames)  # (T, H, W, 3)
    if not 0 < fps <= 1000:
        raise ValueError(f"fps={fps} is outside (0, 1000]; give frames per second")
    if not 0 <= crf <= 51:
        raise ValueError(f"crf={crf} is outside [0, 51]; 16 is visually lossless")
    rate = Fraction(fps).limit_denominator(10000)
    height, width = pixels.shape[1:3]
    pixels = np.pad(pixels, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with whole_file(path) as temporary:
        with av.open(str(temporary), mode="w", format="mp4", options={"movflags": "+faststart"}) as container:
            # one thread: x264 chooses otherwise by the machine's cores; no B-frames: the first frame is shown at 0
            stream = container.add_stream("libx264", rate=rate, options={"crf": str(crf), "preset": preset, "bf": "0"})
            stream.height, stream.width = pixels.shape[1:3]
            stream.pix_fmt = "yuv420p"
            stream.thread_count = 1
            stream.codec_context.time_base = 1 / rate
            stream.codec_context.colorspace = Colorspace.ITU601
            stream.codec_context.color_range = ColorRange.MPEG
            reformatter = VideoReformatter()
            for index, picture in enumerate(pixels):
                frame = reformatter.reformat(
                    av.VideoFrame.from_ndarray(picture, format="rgb24"),
                    format="yuv420p",
                    dst_colorspace=Colorspace.ITU601,
                    dst_color_range=ColorRange.MPEG,
                    threads=1,
                )
                frame.pts = index
                frame.time_base = 1 / rate
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))


def contact_sheet(
    path: str | os.PathLike[str], frames: Tensor, columns: int | None = None, *, min_side: int = 128, gap: int = 2
) -> None:
    """PNG with the frames in reading order, `columns` in a row (default: all up to 8).

    frames: (3, T, H, W) float, clamped to [-1, 1]. Frames whose shorter side is under `min_side` are enlarged by a
    whole factor without smoothing. Raises ValueError for a wrong shape, columns < 1 or non-finite pixels.
    """
    if columns is not None and columns < 1:
        raise ValueError(f"columns={columns} is below 1; a row needs at least one frame")
    pictures = _pixels(frames)
    factor = max(1, -(-min_side // min(pictures.shape[1:3])))
    pictures = pictures.repeat(factor, axis=1).repeat(factor, axis=2)
    count, height, width, _ = pictures.shape
    columns = min(columns or 8, count)
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for index, picture in enumerate(pictures):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        sheet[top : top + height, left : left + width] = picture
    with whole_file(path) as temporary:
        Image.fromarray(sheet).save(temporary, format="PNG")


def write_gif(path: str | os.PathLike[str], frames: Tensor, fps: float) -> None:
    """Looping GIF of (3, T, H, W) float frames; a GIF counts time in 10 ms and merges equal neighbours.

    Raises ValueError for a wrong shape, rate or non-finite pixels.
    """
    if not 0 < fps <= 100:
        raise ValueError(f"fps={fps} is outside (0, 100]; a GIF shows a frame for at least 10 ms")
    pictures = [Image.fromarray(picture) for picture in _pixels(frames)]
    with whole_file(path) as temporary:
        pictures[0].save(
            temporary, format="GIF", save_all=True, append_images=pictures[1:], duration=round(1000 / fps), loop=0
        )


def _pixels(frames: Tensor) -> np.ndarray:
    """(3, T, H, W) float in [-1, 1] -> (T, H, W, 3) uint8."""
    if frames.ndim != 4 or frames.shape[0] != 3 or 0 in frames.shape:
        raise ValueError(f"frames have shape {tuple(frames.shape)}; (3, T, H, W) with at least one frame is needed")
    if not frames.is_floating_point():
        raise ValueError(f"frames have dtype {frames.dtype}; floats in [-1, 1] are needed")
    frames = frames.detach().float().cpu()
    if not torch.isfinite(frames).all():
        raise ValueError("frames hold non-finite pixels; the model or its input is broken, nothing is written")
    pixels = ((frames.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(1, 2, 3, 0).contiguous().numpy()


def _upright(frame: av.VideoFrame, rotation: int) -> np.ndarray:
    """(H, W, 3) as a player shows it: telephones film sideways and note the turn (degrees, counter-clockwise)."""
    return np.rot90(frame.to_ndarray(), rotation // 90) if rotation % 90 == 0 else frame.to_ndarray()


@contextmanager
def _named(name: str) -> Iterator[None]:
    """What FFmpeg or the file system reports, as a MediaError that names the file."""
    try:
        yield
    except (av.FFmpegError, OSError, UnicodeDecodeError) as error:
        raise MediaError(f"{name}: cannot be read as video ({error})") from error
