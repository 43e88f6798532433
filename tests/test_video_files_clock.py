"""Frames have the times that the file's clock says, whatever the container, and come out the same from any place."""

import os
import pickle
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from mmdiff.data.media import DamagedError
from tests.media_corpus import Made, cases, make
from video.files import VideoReader, read_video, write_video

PICTURES = [case for case in cases() if case.video]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> list[Made]:
    folder = tmp_path_factory.mktemp("corpus")
    return [make(case, folder) for case in PICTURES]


def test_the_corpus_is_as_wide_as_promised():
    everything = cases()
    assert len(everything) >= 60
    suffixes = {case.suffix for case in everything}
    assert suffixes >= {".mp4", ".mkv", ".mov", ".webm", ".wav", ".flac", ".mp3", ".ogg"}
    rates = {case.fps for case in PICTURES}
    assert rates >= {Fraction(25, 2), Fraction(60), Fraction(24000, 1001), Fraction(30000, 1001), None}
    offsets = {case.sound_start_s - case.picture_start_s for case in PICTURES}
    assert min(offsets) == Fraction(-13, 10)
    assert max(offsets) == Fraction(44, 10)
    assert {case.audio is None for case in PICTURES} == {True, False}


def test_every_frame_has_its_time_on_the_file_s_clock_within_1_ms(corpus):
    worst: dict[str, float] = {}
    for made in corpus:
        with VideoReader(made.path) as reader:
            assert len(reader) == len(made.frame_times_s), made.case.name
            worst[made.case.name] = np.abs(np.subtract(reader.times_s, made.frame_times_s)).max()
            assert reader.start_s == reader.times_s[0], made.case.name
            assert reader.ends_s[:-1] == reader.times_s[1:], made.case.name
            assert reader.size == made.case.size, made.case.name
    assert max(worst.values()) <= 1e-3, max(worst, key=lambda name: worst[name])


def test_flashes_are_at_most_1_ms_from_where_they_were_put(corpus):
    for made in corpus:
        video = read_video(made.path)
        white = video.frames.float().mean((0, 2, 3)) > 128
        begins = [
            time_s
            for index, time_s in enumerate(video.times_s)
            if white[index] and (index == 0 or not white[index - 1])
        ]
        assert len(begins) == len(made.flashes_s) >= 1, made.case.name
        assert np.abs(np.subtract(begins, made.flashes_s)).max() <= 1e-3, made.case.name


def test_constant_rates_are_read_as_fractions(corpus):
    for made in corpus:
        if made.case.fps is not None and made.case.suffix in (".mp4", ".mov"):
            with VideoReader(made.path) as reader:
                assert reader.fps == made.case.fps, made.case.name


def test_the_local_clock_is_that_of_the_whole_index(corpus):
    for made in corpus[::3]:
        with VideoReader(made.path) as local, VideoReader(made.path) as whole:
            times = whole.times_s
            assert local.start_s == times[0], made.case.name
            assert local.end_s == pytest.approx(whole.ends_s[-1], abs=2e-3), made.case.name
            for low, high, before in ((0.3, 0.9, 0), (0.5, 0.5003, 1), (-1.0, 0.2, 2), (1.4, 9.0, 3), (0.7, 0.7, 1)):
                start, end = times[0] + low, times[0] + high
                inside = [time_s for time_s in times if start - 1e-6 <= time_s < end - 1e-6]
                earlier = [time_s for time_s in times if time_s < start - 1e-6][-before:] if before else []
                found = local.times_between(start, end, before=before)
                assert found == (earlier + inside if high > low else []), (made.case.name, low, high, before)


def numbered(path: Path, count: int, options: dict[str, str], codec: str = "libx264", width: int = 64) -> None:
    """A clip whose frame k shows k in 9 black or white blocks, at k + k // 7 periods: the rate varies."""
    with av.open(str(path), mode="w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width = 48, width
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, 25)
        stream.thread_count = 1
        for index in range(count):
            planes = np.full((72, width), 128, dtype=np.uint8)
            for bit in range(9):
                row, column = divmod(bit, 3)
                level = 235 if index >> bit & 1 else 16
                planes[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16] = level
            frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            frame.pts, frame.time_base = index + index // 7, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def numbers(frames: torch.Tensor) -> list[int]:
    blocks = frames[:, :, 8::16, 8:48:16].float().mean(0) > 128  # (T, 3, 3)
    return (blocks.flatten(1).long() * 2 ** torch.arange(9)).sum(1).tolist()


GOPS = {
    "every_1": ("libx264", {"g": "1"}),
    "b_pyramid": ("libx264", {"g": "48", "bf": "4", "x264-params": "b-pyramid=normal:scenecut=0"}),
    "open_gop": ("libx264", {"g": "24", "bf": "3", "x264-params": "open-gop=1:scenecut=0:b-adapt=0"}),
    "one_gop": ("libx264", {"g": "250", "bf": "2", "x264-params": "scenecut=0"}),
    "mpeg4": ("mpeg4", {"g": "12", "bf": "2"}),
}


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".ts"])
@pytest.mark.parametrize("gop", GOPS)
def test_random_access_gives_exactly_the_frames_of_their_times(tmp_path, suffix, gop):
    codec, options = GOPS[gop]
    path = tmp_path / f"a{suffix}"
    numbered(path, 200, {"preset": "veryfast", **options} if codec == "libx264" else options, codec)
    with VideoReader(path) as reader:
        assert len(reader) == 200
        generator = np.random.default_rng(0)
        for _ in range(6):
            start = int(generator.integers(0, 190))
            assert numbers(reader.read(range(start, start + 8))) == list(range(start, start + 8))
        assert numbers(reader.read([199, 0, 0, 101])) == [199, 0, 0, 101]
        times = reader.times_s
    with VideoReader(path) as local:  # without the index of the whole file
        for start in (0, 23, 24, 25, 150, 192):
            found = local.times_between(times[start], times[start + 7] + 1e-3)
            assert found == times[start : start + 8]
            assert numbers(local.read_at(found)) == list(range(start, start + 8))


def test_a_file_without_timestamps_counts_its_frames(tmp_path):
    numbered(tmp_path / "a.h264", 60, {"preset": "veryfast", "bf": "2"})
    with VideoReader(tmp_path / "a.h264") as reader:
        assert len(reader) == 60
        assert reader.times_s[:3] == pytest.approx([0, 1 / float(reader.fps), 2 / float(reader.fps)])
        assert numbers(reader.read([0, 31, 59, 5])) == [0, 31, 59, 5]


def test_a_file_that_begins_between_keyframes_begins_at_the_first_frame_that_can_be_decoded(tmp_path):
    numbered(tmp_path / "a.mkv", 60, {"preset": "veryfast", "g": "24", "bf": "0", "x264-params": "scenecut=0"})
    with av.open(str(tmp_path / "a.mkv")) as source, av.open(str(tmp_path / "cut.mkv"), mode="w") as cut:
        stream = cut.add_stream_from_template(source.streams.video[0])
        for packet in list(source.demux(source.streams.video[0]))[5:-1]:
            packet.stream = stream
            cut.mux(packet)
    with VideoReader(tmp_path / "cut.mkv") as reader:
        assert numbers(reader.read([0, 1, len(reader) - 1])) == [24, 25, 59]
        assert len(reader) == 36


def test_an_edit_list_hides_frames_from_picture_and_count(tmp_path):
    """The first frames lie before time 0, so that the writer hides them by an edit list."""
    numbered(tmp_path / "a.mp4", 60, {"preset": "veryfast", "g": "24", "bf": "2"})
    with av.open(str(tmp_path / "a.mp4")) as source:
        options = {"avoid_negative_ts": "disabled"}
        with av.open(str(tmp_path / "cut.mp4"), mode="w", options=options) as cut:
            stream = cut.add_stream_from_template(source.streams.video[0])
            shift = int(Fraction(11, 25) / source.streams.video[0].time_base)  # frame 10 is at 11 / 25 s
            for packet in source.demux(source.streams.video[0]):
                if packet.dts is not None:
                    packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                    packet.stream = stream
                    cut.mux(packet)
    with VideoReader(tmp_path / "cut.mp4") as reader:
        assert reader.start_s == 0
        assert len(reader) == 50
        assert numbers(reader.read(range(50))) == list(range(10, 60))


def test_a_reader_survives_pickle_and_fork(tmp_path):
    numbered(tmp_path / "a.mp4", 60, {"preset": "veryfast"})
    for source in (tmp_path / "a.mp4", (tmp_path / "a.mp4").read_bytes()):
        with VideoReader(source, name="a.mp4") as reader:
            reader.read([3])
            with pickle.loads(pickle.dumps(reader)) as copy:  # noqa: S301
                assert numbers(copy.read([40])) == [40]
    with VideoReader(tmp_path / "a.mp4") as reader:
        reader.read([3])
        assert in_child(lambda: numbers(reader.read([7, 8])) == [7, 8])
        assert numbers(reader.read([4, 5])) == [4, 5]
    with open(tmp_path / "a.mp4", "rb") as file, VideoReader(file) as reader, pytest.raises(TypeError, match="pickled"):
        pickle.dumps(reader)


def in_child(check) -> bool:
    """Whether `check` holds in a forked child; False too when it hangs."""
    child = os.fork()
    if child == 0:
        result = 1
        try:
            result = 0 if check() else 1
        finally:
            os._exit(result)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return False


def long_file(path: Path, seconds: int, rate: int = 25) -> Path:
    """H.264 with B-frames and a keyframe each 10 s (x264's own choice at 25 fps), made by repeating one encoded minute.

    The packets of the minute are muxed again and again with later times, so that an hour takes seconds to write.
    """
    minute = path.with_name("minute.mp4")
    with av.open(str(minute), mode="w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"preset": "veryfast", "x264-params": "scenecut=0"})
        stream.height, stream.width = 120, 160
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        noise = np.random.default_rng(0)
        for index in range(60 * rate):
            planes = np.full((180, 160), 128, dtype=np.uint8)
            planes[:120] = 16 + index // rate * 3
            planes[:20, :20] = noise.integers(16, 235, (20, 20))
            frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            frame.pts, frame.time_base = index, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with av.open(str(minute)) as source, av.open(str(path), mode="w") as container:
        template = source.streams.video[0]
        stream = container.add_stream_from_template(template)
        base = template.time_base
        packets = [(bytes(p), p.pts, p.dts, p.is_keyframe, p.duration) for p in source.demux(template) if p.size]
        for repeat in range(seconds // 60):
            shift = int(repeat * 60 / base)
            for data, pts, dts, key, length in packets:
                packet = av.Packet(data)
                packet.pts, packet.dts, packet.duration, packet.time_base = pts + shift, dts + shift, length, base
                packet.is_keyframe = key
                packet.stream = stream
                container.mux(packet)
    return path


def windows(path: Path, seconds: int, count: int) -> Iterator[tuple[float, float]]:
    """(how long each of `count` windows of 2 s took from open to close in s, how wrong its first frame's time is)."""
    places = np.random.default_rng(1).uniform(0, seconds - 3, count)
    with VideoReader(path) as reader:
        origin_s = reader.start_s
    for start in places:
        taken = []
        for _ in range(3):  # the best: others may use the machine
            began = time.perf_counter()
            video = read_video(path, start_s=float(start), duration_s=2.0)
            taken.append(time.perf_counter() - began)
        assert video.frames.shape[1] in (50, 51)
        level = video.frames[:, :, 60:, 80:].float().mean((0, 2, 3))  # that of second s of a minute is 3 s over black
        meant = torch.tensor([int((t - origin_s) % 60 + 1e-6) * 3 * 255 / 219 for t in video.times_s])
        yield min(taken), (level - meant).abs().max().item()


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def check_windows(path: Path, seconds: int, count: int, limit_s: float) -> None:
    taken, wrong = zip(*windows(path, seconds, count), strict=True)
    assert max(wrong) < 3, "the pictures of other times"
    assert float(np.median(taken)) < limit_s, taken


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_two_seconds_of_ten_minutes_are_read_at_once(tmp_path, suffix):
    check_windows(long_file(tmp_path / f"long{suffix}", 600), 600, 5, limit_s=0.150)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_two_seconds_of_an_hour_take_150_ms_and_200_mb(tmp_path, suffix):
    """`pytest -m slow tests/test_video_files_clock.py -k hour` on an idle core."""
    path = long_file(tmp_path / f"long{suffix}", 3600)
    before = resident_mb()
    check_windows(path, 3600, 20, limit_s=0.150)
    assert resident_mb() - before < 200


def check_no_leak(path: Path, clips: int, limit_mb: float) -> None:
    generator = np.random.default_rng(2)

    def read(count: int) -> None:
        for _ in range(count):
            start = int(generator.integers(0, 52))
            with VideoReader(path) as reader:
                assert reader.read(range(start, start + 8)).shape == (3, 8, 48, 64)

    read(100)
    before = resident_mb()
    files = len(os.listdir("/proc/self/fd"))
    read(clips)
    assert resident_mb() - before < limit_mb
    assert len(os.listdir("/proc/self/fd")) == files


def test_no_memory_is_lost_over_random_clips(tmp_path):
    numbered(tmp_path / "a.mp4", 60, {"preset": "veryfast"})
    check_no_leak(tmp_path / "a.mp4", 300, limit_mb=8)


@pytest.mark.slow
def test_5000_random_clips_grow_less_than_20_mb(tmp_path):
    numbered(tmp_path / "a.mp4", 60, {"preset": "veryfast"})
    check_no_leak(tmp_path / "a.mp4", 5000, limit_mb=20)


def test_more_than_the_limit_at_once_is_refused_before_decoding(tmp_path):
    write_video(tmp_path / "a.mp4", torch.zeros(3, 40, 48, 64), fps=8, preset="ultrafast")
    with VideoReader(tmp_path / "a.mp4", max_bytes=39 * 48 * 64 * 3) as reader:
        with pytest.raises(ValueError, match=r"a.mp4: 40 frames of 64x48 are over .*; read fewer at once"):
            reader.read(range(40))
        assert reader.read(range(39)).shape[1] == 39
        with pytest.raises(IndexError):
            reader.read([40])
        with pytest.raises(DamagedError):
            reader.read_at([0.01])  # no frame begins then
    with pytest.raises(ValueError, match="backend='opencv' is not one of pyav"):
        VideoReader(tmp_path / "a.mp4", backend="opencv")
