"""decord and torchcodec return PyAV's frames for the same times, or the file is refused; known faults are guarded.

torchcodec needs FFmpeg's shared libraries. To run its tests with PyAV's own: links libavcodec.so.62 and so on to the
files in site-packages/av.libs, in a folder that LD_LIBRARY_PATH names together with av.libs, before Python starts.
"""

import importlib
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from mmdiff.data.media import UnsupportedError
from tests.media_corpus import Made, cases, make
from tests.test_video_files_clock import in_child, numbered, numbers, resident_mb
from video.files import VideoReader, read_video, write_video

NAMES = ["decord", "torchcodec"]


@pytest.fixture(params=NAMES)
def backend(request) -> str:
    try:
        importlib.import_module("decord" if request.param == "decord" else "torchcodec.decoders")
    except (ImportError, OSError, RuntimeError) as error:
        pytest.skip(f"{request.param} is not usable here: {str(error).splitlines()[0]}")
    return request.param


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> list[Made]:
    folder = tmp_path_factory.mktemp("corpus")
    return [make(case, folder) for case in [case for case in cases() if case.video][::2]]


def test_the_same_frames_for_the_same_times_over_the_corpus(backend, corpus):
    refused = []
    for made in corpus:
        reference = read_video(made.path)
        try:
            with VideoReader(made.path, backend=backend) as reader:
                assert reader.times_s == reference.times_s, made.case.name
                places = [len(reader) - 1, 0, len(reader) // 2, len(reader) // 2 + 1]
                found = reader.read_at([reference.times_s[place] for place in places])
        except UnsupportedError as error:
            refused.append((made.case.name, str(error)))
            continue
        apart = (found.int() - reference.frames[:, places].int()).abs()
        assert apart.max() <= 2, made.case.name
    assert len(corpus) >= 25
    assert {name for name, _ in refused} <= {"av1_mp4"}
    assert all(f": {backend} " in message and message.endswith("use backend='pyav'") for _, message in refused)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_variable_rate_and_b_frames_at_random_places(backend, tmp_path, suffix):
    """Where torchcodec's approximate seeking and decord's keyframe seeking return other frames."""
    path = tmp_path / f"a{suffix}"
    numbered(path, 200, {"preset": "veryfast", "g": "48", "bf": "3", "x264-params": "scenecut=0"})
    with VideoReader(path, backend=backend) as reader:
        assert len(reader) == 200
        for start in np.random.default_rng(0).integers(0, 192, 15).tolist():
            assert numbers(reader.read(range(start, start + 8))) == list(range(start, start + 8))
        assert numbers(reader.read([150, 3, 3, 149])) == [150, 3, 3, 149]


def test_frames_that_an_edit_list_hides_are_not_counted(backend, tmp_path):
    numbered(tmp_path / "a.mp4", 60, {"preset": "veryfast", "g": "24", "bf": "2"})
    options = {"avoid_negative_ts": "disabled"}
    with av.open(str(tmp_path / "a.mp4")) as source, av.open(str(tmp_path / "b.mp4"), "w", options=options) as cut:
        stream = cut.add_stream_from_template(source.streams.video[0])
        shift = int(Fraction(11, 25) / source.streams.video[0].time_base)
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                packet.stream = stream
                cut.mux(packet)
    with pytest.raises(UnsupportedError, match=rf"b.mp4: {backend} .*; use backend='pyav'"):
        VideoReader(tmp_path / "b.mp4", backend=backend)
    assert len(read_video(tmp_path / "b.mp4").times_s) == 50


def test_a_reader_of_the_parent_works_or_is_refused_in_a_forked_child(backend, tmp_path):
    """decord hangs there now and then, and is refused at once."""
    numbered(tmp_path / "a.mp4", 60, {"preset": "veryfast"})

    def right() -> bool:
        try:
            return numbers(reader.read([7, 8])) == [7, 8]
        except RuntimeError as error:
            return backend == "decord" and "was used before this process was forked" in str(error)

    with VideoReader(tmp_path / "a.mp4", backend=backend) as reader:
        reader.read([3])
        assert in_child(right)


def test_widths_that_decord_cannot_copy_are_refused(backend, tmp_path):
    numbered(tmp_path / "a.mp4", 30, {"preset": "veryfast"}, width=48)
    try:
        with VideoReader(tmp_path / "a.mp4", backend=backend) as reader:
            found = numbers(reader.read([7, 9]))
    except UnsupportedError as error:
        assert backend == "decord", error  # noqa: PT017
        return
    assert found == [7, 9]


def test_bytes_are_read_too(backend, tmp_path):
    numbered(tmp_path / "a.mp4", 30, {"preset": "veryfast"})
    with VideoReader((tmp_path / "a.mp4").read_bytes(), name="shard:key", backend=backend) as reader:
        assert numbers(reader.read([29, 4])) == [29, 4]


def test_a_clip_that_decord_would_hold_whole_is_refused(tmp_path):
    pytest.importorskip("decord")
    write_video(tmp_path / "a.mp4", torch.zeros(3, 40, 48, 64), fps=8, preset="ultrafast")
    with pytest.raises(UnsupportedError, match="decord decodes ahead, up to all 40 frames of 64x48"):
        VideoReader(tmp_path / "a.mp4", backend="decord", max_bytes=39 * 48 * 64 * 3)


def test_many_clips_leave_memory_as_it_was(backend, tmp_path):
    numbered(tmp_path / "a.mp4", 60, {"preset": "veryfast"})

    def read(count: int) -> None:
        for _ in range(count):
            with VideoReader(tmp_path / "a.mp4", backend=backend) as reader:
                reader.read(range(20, 28))

    read(40)
    before = resident_mb()
    read(100)
    assert resident_mb() - before < 20


@pytest.mark.parametrize("name", NAMES)
def test_an_absent_backend_is_named_with_its_cure(tmp_path, monkeypatch, name):
    write_video(tmp_path / "a.mp4", torch.zeros(3, 4, 48, 64), fps=8, preset="ultrafast")
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, f"{name}.decoders", None)
    with pytest.raises(ValueError, match=f"backend='{name}' cannot be used here .*pip install"):
        VideoReader(tmp_path / "a.mp4", backend=name)


class Wrong:
    """A decoder that returns the frame after the one asked for, as approximate seeking does."""

    def __init__(self, source: Path) -> None:
        self.video = read_video(source)

    def __len__(self) -> int:
        return len(self.video.times_s)

    def frames(self, indices) -> tuple[torch.Tensor, np.ndarray]:
        shifted = [index if index == 0 else min(index + 1, len(self) - 1) for index in indices]
        return self.video.frames[:, shifted], np.array(self.video.times_s)[shifted]


def test_a_decoder_that_returns_another_frame_is_caught(tmp_path, monkeypatch):
    from video import backends

    monkeypatch.setitem(backends._DECODERS, "decord", (Wrong, ""))
    numbered(tmp_path / "a.mp4", 30, {"preset": "veryfast"})
    with VideoReader(tmp_path / "a.mp4", backend="decord") as reader:
        assert reader.read([0]).shape[1] == 1
        with pytest.raises(UnsupportedError, match="a.mp4: decord returns frames that are up to 0.0[48] s away"):
            reader.read([5, 6])
