"""Containers with a flash and a beep at known times of the file's clock, made by PyAV and soundfile.

Every case is written from integers: frame k at a time that the case lists, sample n at `sound_start_s` + n / rate.
Frames are black with white ones at the flashes; the sound is silent with 50 ms beeps that begin at full level at the
same times. `make` returns the truth beside the path: a reader is measured without trusting another reader.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import soundfile

SIZE = (48, 64)  # H, W
BEEP_S = 0.05
FLASH_FRAMES = 2
LOSSY = {"aac", "libopus", "libmp3lame", "vorbis", "ac3", "mp2", "MP3", "VORBIS", "OPUS"}
_FORMATS = {"aac": "fltp", "ac3": "fltp", "vorbis": "fltp", "libmp3lame": "fltp", "flac": "s16", "alac": "s16p",
            "libopus": "flt", "pcm_s16le": "s16", "pcm_s24le": "s32", "pcm_f32le": "flt", "mp2": "s16"}  # fmt: skip
_LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}


@dataclass(frozen=True)
class Case:
    """What one container holds. Starts and lengths in s on the file's clock; a codec of None means no such stream.

    fps: constant rate, or None for a variable one. sound_start_s - picture_start_s is the offset between the streams.
    """

    name: str
    suffix: str
    video: str | None = None
    audio: str | None = None
    fps: Fraction | None = None
    picture_start_s: Fraction = Fraction(0)
    sound_start_s: Fraction = Fraction(0)
    picture_s: Fraction = Fraction(2)
    sound_s: Fraction = Fraction(2)
    sample_rate: int = 48000
    channels: int = 1
    subtype: str | None = None  # of soundfile, for sound-only files that it writes
    options: dict[str, str] = field(default_factory=dict)
    size: tuple[int, int] = SIZE


@dataclass(frozen=True)
class Made:
    """A written case with its truth, all times in s on the file's clock.

    frame_times_s: of every frame. flashes_s: when each flash begins. beeps_s: when each beep begins. sound_start_s: of
    sample 0. samples: how many were written. lossy: whether the sound was compressed with loss.
    """

    path: Path
    case: Case
    frame_times_s: list[float]
    flashes_s: list[float]
    beeps_s: list[float]
    sound_start_s: float
    samples: int
    lossy: bool


NTSC_FILM, NTSC = Fraction(24000, 1001), Fraction(30000, 1001)
_H264 = {"preset": "ultrafast"}
_BFRAMES = {"preset": "veryfast", "bf": "3", "g": "24", "x264-params": "b-pyramid=normal:scenecut=0"}
_OFFSETS = (Fraction(-13, 10), Fraction(-1, 3), Fraction(1, 25), Fraction(1), Fraction(44, 10))


def cases() -> list[Case]:
    """All containers: at least 60, each name once."""
    made = [*_rates(), *_offsets(), *_lengths(), *_codecs(), *_sound_only()]
    assert len({case.name for case in made}) == len(made) >= 60
    return made


def _rates() -> Iterator[Case]:
    for suffix, video, audio in (
        (".mp4", "libx264", "aac"),
        (".mkv", "libx264", "flac"),
        (".mov", "libx264", "pcm_s16le"),
    ):
        rates = (Fraction(25, 2), Fraction(15), NTSC_FILM, Fraction(25), NTSC, Fraction(50), Fraction(60), None)
        for index, fps in enumerate(rates):
            options = _BFRAMES if index % 2 else _H264
            label = "vfr" if fps is None else f"{float(fps):.5g}fps"
            yield Case(f"rate_{label}_{suffix[1:]}", suffix, video, audio, fps, options=options)


def _offsets() -> Iterator[Case]:
    kinds = ((".mp4", "aac"), (".mkv", "pcm_s16le"), (".webm", "libopus"), (".mov", "alac"))
    for suffix, audio in kinds:
        video = "libvpx" if suffix == ".webm" else "libx264"
        for offset in _OFFSETS:
            options = _BFRAMES if video == "libx264" else {"deadline": "realtime", "cpu-used": "8"}
            yield Case(
                f"offset_{float(offset):+.2f}_{suffix[1:]}", suffix, video, audio, Fraction(25),
                picture_start_s=max(Fraction(0), -offset), sound_start_s=max(Fraction(0), offset), options=options,
            )  # fmt: skip


def _lengths() -> Iterator[Case]:
    for suffix, video, audio in (
        (".mp4", "libx264", "aac"),
        (".mkv", "libx264", "libopus"),
        (".mov", "mjpeg", "pcm_s24le"),
    ):
        options = _H264 if video == "libx264" else {}
        yield Case(f"sound_shorter_{suffix[1:]}", suffix, video, audio, NTSC, sound_s=Fraction(11, 10), options=options)
        yield Case(f"sound_longer_{suffix[1:]}", suffix, video, audio, NTSC, sound_s=Fraction(31, 10), options=options)
        yield Case(f"sound_missing_{suffix[1:]}", suffix, video, None, NTSC, options=options)


def _codecs() -> Iterator[Case]:
    yield Case(
        "hevc_mp4",
        ".mp4",
        "libx265",
        "aac",
        Fraction(24),
        options={"preset": "ultrafast", "x265-params": "log-level=none:pools=none"},
        size=(128, 144),
    )
    yield Case("av1_mp4", ".mp4", "libsvtav1", "aac", Fraction(24), options={"preset": "12"})
    yield Case("mpeg4_mp4", ".mp4", "mpeg4", "libmp3lame", Fraction(25), sample_rate=44100, channels=2)
    yield Case(
        "vp9_webm",
        ".webm",
        "libvpx-vp9",
        "vorbis",
        Fraction(30),
        channels=2,
        options={"deadline": "realtime", "cpu-used": "8"},
    )
    yield Case(
        "vp9_opus_webm", ".webm", "libvpx-vp9", "libopus", None, options={"deadline": "realtime", "cpu-used": "8"}
    )
    yield Case("ffv1_mkv", ".mkv", "ffv1", "flac", Fraction(25), sample_rate=44100, channels=2)
    yield Case("surround_mp4", ".mp4", "libx264", "aac", Fraction(25), channels=6, options=_H264)
    yield Case("mp3_mkv", ".mkv", "libx264", "libmp3lame", Fraction(25), sample_rate=44100, channels=2, options=_H264)
    yield Case("aac_mkv", ".mkv", "libx264", "aac", Fraction(25), sample_rate=44100, options=_BFRAMES)
    yield Case("ntsc_aac_mov", ".mov", "mpeg4", "aac", NTSC, sample_rate=32000)


def _sound_only() -> Iterator[Case]:
    waves = (
        ("PCM_U8", 8000, 1),
        ("PCM_16", 11025, 2),
        ("PCM_24", 96000, 1),
        ("PCM_32", 192000, 1),
        ("FLOAT", 44100, 6),
    )
    for subtype, rate, channels in (*waves, ("DOUBLE", 22050, 8)):
        yield Case(f"wav_{subtype}", ".wav", None, "wav", sample_rate=rate, channels=channels, subtype=subtype)
    for subtype, rate, channels in (("PCM_16", 16000, 1), ("PCM_24", 48000, 2), ("PCM_S8", 8000, 1)):
        yield Case(f"flac_{subtype}", ".flac", None, "flac", sample_rate=rate, channels=channels, subtype=subtype)
    for rate, channels in ((44100, 2), (16000, 1), (48000, 1)):
        yield Case(f"mp3_{rate}", ".mp3", None, "MP3", sample_rate=rate, channels=channels, subtype="MPEG_LAYER_III")
    yield Case("mp3_lame", ".mp3", None, "libmp3lame", sample_rate=44100)
    yield Case("ogg_vorbis", ".ogg", None, "VORBIS", sample_rate=44100, channels=2, subtype="VORBIS")
    yield Case("ogg_opus", ".ogg", None, "OPUS", sample_rate=48000, channels=1, subtype="OPUS")
    yield Case("ogg_libopus", ".ogg", None, "libopus", sample_rate=48000, channels=2)
    yield Case("m4a_aac", ".m4a", None, "aac", sample_rate=44100, channels=2)
    yield Case("m4a_alac", ".m4a", None, "alac", sample_rate=48000, channels=2)


def by_name(name: str) -> Case:
    return next(case for case in cases() if case.name == name)


def frame_times(case: Case) -> list[Fraction]:
    """Presentation times of the frames as they are meant, s."""
    if case.video is None:
        return []
    if case.fps is not None:
        return [case.picture_start_s + k / case.fps for k in range(max(1, math.floor(case.picture_s * case.fps)))]
    steps = (33, 33, 100, 17, 50, 211, 40)  # ms; variable frame rate
    times, now, k = [], Fraction(0), 0
    while now < case.picture_s:
        times.append(case.picture_start_s + now)
        now += Fraction(steps[k % len(steps)], 1000)
        k += 1
    return times


def events(case: Case) -> list[Fraction]:
    """When the flashes and beeps begin: at frames near fixed parts of the clip, where both streams are there."""
    frames = frame_times(case)
    start = max(case.picture_start_s, case.sound_start_s) if frames and case.audio else case.picture_start_s
    ends = [case.picture_start_s + case.picture_s] if frames else []
    ends += [case.sound_start_s + case.sound_s] if case.audio else []
    if start > min(ends) - Fraction(1, 2):  # one begins after the other has ended: each has its own
        wanted = [case.picture_start_s + Fraction(1, 2), case.sound_start_s + Fraction(1, 2)]
    else:
        wanted = [start + part * (min(ends) - start) for part in (Fraction(1, 4), Fraction(2, 3))]
    return [
        min(frames, key=lambda time: abs(time - want)) if frames and want <= frames[-1] else want for want in wanted
    ]


def sound(case: Case) -> tuple[np.ndarray, list[float]]:
    """((C, T) float32 with the beeps, their begins in s on the file's clock to the sample)."""
    count = round(case.sound_s * case.sample_rate)
    samples = np.zeros((case.channels, count), dtype=np.float32)
    begins = []
    tone_hz = min(1000.0, case.sample_rate / 8)
    beep = 0.8 * np.cos(2 * np.pi * tone_hz * np.arange(round(BEEP_S * case.sample_rate)) / case.sample_rate)
    for event in events(case):
        first = round((event - case.sound_start_s) * case.sample_rate)
        if 0 <= first and first + len(beep) <= count:
            samples[:, first : first + len(beep)] = beep
            begins.append(float(case.sound_start_s + Fraction(first, case.sample_rate)))
    return samples, begins


def make(case: Case, folder: Path) -> Made:
    """Writes `folder`/NAME.SUFFIX and returns it with its truth."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{case.name}{case.suffix}"
    times = frame_times(case)
    samples, beeps = sound(case) if case.audio else (np.zeros((1, 0), dtype=np.float32), [])
    flashes = [event for event in events(case) if event in set(times)]
    if case.subtype:
        soundfile.write(path, samples.T, case.sample_rate, subtype=case.subtype, format=case.suffix[1:].upper())
    else:
        _mux(path, case, times, flashes, samples)
    return Made(
        path, case, [float(time) for time in times], [float(time) for time in flashes], beeps,
        float(case.sound_start_s), samples.shape[1], case.audio in LOSSY,
    )  # fmt: skip


def _mux(path: Path, case: Case, times: list[Fraction], flashes: list[Fraction], samples: np.ndarray) -> None:
    with av.open(str(path), mode="w") as container:
        packets: list[av.Packet] = []
        if case.video:
            packets += _encode_video(container, case, times, flashes)
        if case.audio:
            packets += _encode_audio(container, case, samples)
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            container.mux(packet)


def _encode_video(
    container: av.container.OutputContainer, case: Case, times: list[Fraction], flashes: list[Fraction]
) -> list:
    assert case.video is not None
    stream = container.add_stream(case.video, rate=case.fps or 30, options=case.options)
    stream.height, stream.width = case.size
    stream.pix_fmt = "yuvj420p" if case.video == "mjpeg" else "yuv420p"
    base = Fraction(1, 1000) if case.fps is None else Fraction(1) / (case.fps * 100)
    stream.codec_context.time_base = base if case.fps is None or case.video != "mpeg4" else 1 / case.fps
    stream.codec_context.thread_count = 1
    base = stream.codec_context.time_base
    packets = []
    lit: set[int] = set()
    for flash in flashes:
        first = times.index(flash)
        lit |= set(range(first, first + FLASH_FRAMES))
    for index, time in enumerate(times):
        planes = np.full((case.size[0] * 3 // 2, case.size[1]), 128, dtype=np.uint8)  # Y above, then U and V
        planes[: case.size[0]] = 235 if index in lit else 16
        frame = av.VideoFrame.from_ndarray(planes, format=stream.pix_fmt)
        frame.pts = round(time / base)
        frame.time_base = base
        packets += stream.encode(frame)
    return packets + stream.encode(None)


def _encode_audio(container: av.container.OutputContainer, case: Case, samples: np.ndarray) -> list:
    assert case.audio is not None
    options = {"strict": "-2"} if case.audio == "vorbis" else {}
    layout = _LAYOUTS[case.channels]
    if case.audio == "vorbis":
        layout = "stereo"
    stream = container.add_stream(case.audio, rate=case.sample_rate, layout=layout, options=options)
    if case.audio in LOSSY:
        stream.bit_rate = 128000 * case.channels
    packets = []
    resampler = av.AudioResampler(format=_FORMATS[case.audio], layout=layout, rate=case.sample_rate)
    step = stream.codec_context.frame_size or 1024
    first = round(case.sound_start_s * case.sample_rate)
    for begin in range(0, samples.shape[1], step):
        block = np.ascontiguousarray(samples[:, begin : begin + step])
        frame = av.AudioFrame.from_ndarray(block, format="fltp", layout=_LAYOUTS[case.channels])
        frame.sample_rate = case.sample_rate
        frame.time_base = Fraction(1, case.sample_rate)
        frame.pts = first + begin
        for out in resampler.resample(frame):
            packets += stream.encode(out)
    return packets + stream.encode(None)
