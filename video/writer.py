"""Writes clips: H.264, H.265 or AV1 in mp4 that browsers play, with sound beside; GIF; contact sheets.

T frames, H W space. A clip is (3, T, H, W) float in [-1, 1]. All files appear whole or not at all.
"""

import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal, cast

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from PIL import Image
from torch import Tensor

from mmdiff.data.media import whole_file

CodecName = Literal["h264", "h265", "av1"]
PixelFormat = Literal["yuv420p", "yuv444p"]


@dataclass(frozen=True)
class _Codec:
    """encoder: FFmpeg's name. crf: default and greatest. least: pixels of a side. options: one thread and no log."""

    encoder: str
    crf: tuple[int, int]
    preset: str
    least: int
    options: dict[str, str]


# One thread: encoders choose otherwise by the machine's cores, and files would differ. No B-frames in H.264: the first
# frame is then shown at 0 even to players that ignore edit lists. x265 writes beyond its buffers for pictures that are
# no larger than one of its 64-pixel blocks, so it gets none that small.
_X265 = "pools=none:frame-threads=1:no-wpp=1:bframes=0:log-level=none"
_CODECS = {
    "h264": _Codec("libx264", (16, 51), "medium", 1, {"bf": "0"}),
    "h265": _Codec("libx265", (18, 51), "medium", 128, {"x265-params": _X265}),
    "av1": _Codec("libsvtav1", (20, 63), "8", 16, {"svtav1-params": "lp=1:pred-struct=1"}),
}
_LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}
_AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)  # Hz, ISO 14496-3
_AAC_BITS = 128_000  # a second and channel


def write_video(
    path: str | os.PathLike[str],
    frames: Tensor,
    fps: float | Fraction,
    *,
    codec: CodecName = "h264",
    crf: int | None = None,
    preset: str | None = None,
    pix_fmt: PixelFormat = "yuv420p",
    sound: tuple[Tensor, int] | None = None,
) -> None:
    """mp4 (BT.601, index in front) with exactly T frames at k / fps; the same input gives the same bytes.

    frames: (3, T, H, W) float, clamped to [-1, 1]; for yuv420p an odd H or W is padded by repeating the last row or
    column. fps: a Fraction is kept as it is, a float is taken as the nearest fraction over at most 10,000.
    crf: 0 (best) to 51 (63 for av1), by default visually lossless. preset: of the encoder.
    sound: (waveform (C, samples) float in [-1, 1], sample rate in Hz) from time 0, as AAC; it may end before or after
    the picture. Its level is what the samples say: nothing is normalised, and values beyond [-1, 1] are refused.
    Raises ValueError for wrong shapes, rates, levels or non-finite values, for a size that the encoder does not take
    (h265 needs 128 pixels on each side, av1 16), or an encoder that PyAV's build does not have; then no file is made.
    """
    pixels = _pixels(frames)  # (T, H, W, 3)
    rate = _rate(fps)
    encoder = _encoder(codec, crf, preset)
    if pix_fmt not in ("yuv420p", "yuv444p"):
        raise ValueError(f"pix_fmt={pix_fmt!r} is not yuv420p, which every player shows, or yuv444p")
    if min(pixels.shape[1:3]) < encoder.least:
        size = f"{pixels.shape[2]}x{pixels.shape[1]}"
        raise ValueError(f"codec={codec!r} needs {encoder.least} pixels on each side, not {size}; use h264")
    wave = None if sound is None else _wave(*sound)
    if pix_fmt == "yuv420p":
        pixels = np.pad(pixels, ((0, 0), (0, pixels.shape[1] % 2), (0, pixels.shape[2] % 2), (0, 0)), mode="edge")
    with whole_file(path) as temporary:
        with av.open(str(temporary), mode="w", format="mp4", options={"movflags": "+faststart"}) as container:
            stream = cast(av.VideoStream, container.add_stream(encoder.encoder, rate=rate, options=encoder.options))
            stream.height, stream.width = pixels.shape[1:3]
            stream.pix_fmt = pix_fmt
            stream.thread_count = 1
            stream.codec_context.time_base = 1 / rate
            stream.codec_context.colorspace = Colorspace.ITU601
            stream.codec_context.color_range = ColorRange.MPEG
            sounds: deque[tuple[Fraction, av.Packet]] = deque()
            if wave is not None and sound is not None:
                heard_by = container.add_stream("aac", rate=sound[1], layout=_LAYOUTS[len(wave)])
                heard_by.bit_rate = min(_AAC_BITS, 4 * sound[1]) * len(wave)
                sounds.extend(_sound_packets(heard_by, wave, sound[1]))
            for index, frame in enumerate(_frames(pixels, rate, pix_fmt)):
                while sounds and sounds[0][0] <= index / rate:
                    container.mux(sounds.popleft()[1])
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
            for _, packet in sounds:
                container.mux(packet)


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


def write_gif(path: str | os.PathLike[str], frames: Tensor, fps: float | Fraction) -> None:
    """Looping GIF of (3, T, H, W) float frames.

    A GIF counts in 10 ms: frame k ends at the nearest to (k + 1) / fps, so that the whole lasts as long as it should;
    neighbours that are equal become one. Raises ValueError for a wrong shape, rate or non-finite pixels.
    """
    if not 0 < fps <= 100:
        raise ValueError(f"fps={fps} is outside (0, 100]; a GIF shows a frame for at least 10 ms")
    pictures = [Image.fromarray(picture) for picture in _pixels(frames)]
    ends = [round(100 * (index + 1) / fps) for index in range(len(pictures))]  # 10 ms
    shown_ms = [10 * (end - begin) for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
    with whole_file(path) as temporary:
        pictures[0].save(temporary, format="GIF", save_all=True, append_images=pictures[1:], duration=shown_ms, loop=0)


def _rate(fps: float | Fraction) -> Fraction:
    if not 0 < fps <= 1000:
        raise ValueError(f"fps={fps} is outside (0, 1000]; give frames per second")
    return fps if isinstance(fps, Fraction) else Fraction(fps).limit_denominator(10000)


def _encoder(name: str, crf: int | None, preset: str | None) -> _Codec:
    if name not in _CODECS:
        raise ValueError(f"codec={name!r} is not one of {', '.join(_CODECS)}")
    codec = _CODECS[name]
    if name == "av1":
        os.environ.setdefault("SVT_LOG", "1")  # it knows no other way to leave standard error alone
    default, most = codec.crf
    if crf is not None and not 0 <= crf <= most:
        raise ValueError(f"crf={crf} is outside [0, {most}]; {default} is visually lossless")
    try:
        av.Codec(codec.encoder, "w")
    except av.codec.codec.UnknownCodecError as error:
        raise ValueError(f"codec={name!r} needs {codec.encoder}, which this build of PyAV has not; use h264") from error
    quality = {"crf": str(default if crf is None else crf), "preset": preset or codec.preset}
    return replace(codec, options={**codec.options, **quality})


def _frames(pixels: np.ndarray, rate: Fraction, pix_fmt: str) -> Iterator[av.VideoFrame]:
    reformatter = VideoReformatter()
    for index, picture in enumerate(pixels):
        frame = reformatter.reformat(
            av.VideoFrame.from_ndarray(picture, format="rgb24"),
            format=pix_fmt,
            dst_colorspace=Colorspace.ITU601,
            dst_color_range=ColorRange.MPEG,
            threads=1,
        )
        frame.pts = index
        frame.time_base = 1 / rate
        yield frame


def _wave(waveform: Tensor, sample_rate: int) -> np.ndarray:
    """(C, samples) float32, checked."""
    if waveform.ndim != 2 or waveform.shape[0] not in _LAYOUTS or waveform.shape[1] == 0:
        raise ValueError(f"sound has shape {tuple(waveform.shape)}; (C, samples) with 1, 2, 6 or 8 channels is needed")
    if not waveform.is_floating_point():
        raise ValueError(f"sound has dtype {waveform.dtype}; floats in [-1, 1] are needed")
    if sample_rate not in _AAC_RATES:
        rates = ", ".join(map(str, _AAC_RATES))
        raise ValueError(f"sample_rate={sample_rate} is none of AAC's; resample to one of {rates} Hz")
    waveform = waveform.detach().float().cpu()
    if not torch.isfinite(waveform).all():
        raise ValueError("sound holds non-finite samples; the model or its input is broken, nothing is written")
    level = float(waveform.abs().max())
    if level > 1:
        raise ValueError(f"sound reaches {level:.4g}, beyond [-1, 1]; scale it")
    return waveform.contiguous().numpy()


def _sound_packets(stream: av.AudioStream, wave: np.ndarray, sample_rate: int) -> Iterator[tuple[Fraction, av.Packet]]:
    """(time in s, packet) of AAC."""
    step = 1024
    for begin in range(0, wave.shape[1], step):
        block = np.ascontiguousarray(wave[:, begin : begin + step])
        frame = av.AudioFrame.from_ndarray(block, format="fltp", layout=_LAYOUTS[wave.shape[0]])
        frame.sample_rate = sample_rate
        frame.time_base = Fraction(1, sample_rate)
        frame.pts = begin
        yield from _timed(stream.encode(frame))
    yield from _timed(stream.encode(None))


def _timed(packets: list[av.Packet]) -> Iterator[tuple[Fraction, av.Packet]]:
    return ((Fraction(packet.dts or 0) * packet.time_base, packet) for packet in packets)


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
