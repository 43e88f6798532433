"""Odd, broken and foreign video files are read right or refused by name."""

import io
import os
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from mmdiff.data.media import (
    DamagedError,
    MediaError,
    NoStreamError,
    NotMediaError,
    TooLargeError,
    UnreachableError,
    UnsupportedError,
)
from tests.grey_ramp import ramp
from tests.media_corpus import by_name, make
from video.files import VideoReader, read_video, write_video

TORTURE = Path(__file__).resolve().parents[2] / "shared" / "data" / "torture" / "files"

needs_torture = pytest.mark.skipif(not TORTURE.is_dir(), reason="../shared/data/torture is not there")


def test_bt709_file_is_read_with_its_own_matrix(tmp_path):
    picture = np.zeros((32, 32, 3), dtype=np.uint8)
    picture[:] = (200, 40, 90)
    with av.open(str(tmp_path / "hd.mp4"), mode="w") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "1"})
        stream.height = stream.width = 32
        stream.pix_fmt = "yuv420p"
        stream.codec_context.colorspace = av.video.reformatter.Colorspace.ITU709
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace=av.video.reformatter.Colorspace.ITU709)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    found = read_video(tmp_path / "hd.mp4").frames.float().mean((1, 2, 3))
    assert (found - torch.tensor([200.0, 40.0, 90.0])).abs().max() < 4


@pytest.mark.parametrize("start", ["path", "bytes", "file"])
def test_any_source(tmp_path, start):
    path = tmp_path / "clip.mp4"
    write_video(path, ramp(5), fps=8)
    source = {"path": path, "bytes": path.read_bytes(), "file": io.BytesIO(path.read_bytes())}[start]
    assert read_video(source).frames.shape[1] == 5


def test_random_access_gives_the_same_frames(tmp_path):
    path = tmp_path / "long.mp4"
    with av.open(str(path), mode="w") as container:  # several groups of pictures with B-frames
        stream = container.add_stream("libx264", rate=25, options={"g": "12", "bf": "3", "crf": "10"})
        stream.height = stream.width = 32
        stream.pix_fmt = "yuv420p"
        for index in range(60):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), index * 4, dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    whole = read_video(path).frames
    assert whole.shape[1] == 60
    assert (whole.float().mean((0, 2, 3)) - torch.arange(60) * 4).abs().max() < 3
    with VideoReader(path) as reader:
        for indices in ([0], [59], [13, 14, 15], [40, 3, 40], list(range(24, 36))):
            assert torch.equal(reader.read(indices), whole[:, indices])
    part = read_video(path, start_s=1.0, duration_s=0.4)
    assert torch.equal(part.frames, whole[:, 25:35])


def test_broken_video_is_a_media_error_naming_the_file(tmp_path):
    write_video(tmp_path / "good.mp4", ramp(16), fps=8)
    data = (tmp_path / "good.mp4").read_bytes()
    for name, content in (("empty.mp4", b""), ("text.mp4", b"not a video" * 50), ("half.mp4", data[: len(data) // 2])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(MediaError, match=name):
            read_video(tmp_path / name)
    with pytest.raises(MediaError, match="missing.mp4"):
        read_video(tmp_path / "missing.mp4")
    with pytest.raises(MediaError, match="shard:key"):
        read_video(b"nothing", name="shard:key")
    with pytest.raises(MediaError, match="64x48 is over the limit"):
        read_video(tmp_path / "good.mp4", max_pixels=64 * 48 - 1)
    with pytest.raises(MediaError, match="no frame from"):
        read_video(tmp_path / "good.mp4", start_s=5)


def encoded(path: Path, pictures: list[np.ndarray], codec: str, pix_fmt: str, **settings: object) -> None:
    """Frames in their own planar format at 8 fps; `settings`: size (H, W), options, attributes of the encoder."""
    options = settings.pop("options", {})
    with av.open(str(path), mode="w") as container:
        stream = container.add_stream(codec, rate=8, options=options)
        stream.height, stream.width = settings.pop("size")
        stream.pix_fmt = pix_fmt
        for name, value in settings.items():
            setattr(stream.codec_context, name, value)
        for index, planes in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(planes, format=pix_fmt)
            frame.pts, frame.time_base = index, Fraction(1, 8)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def test_ten_bits_keep_their_levels(tmp_path):
    planes = np.full((96, 64), 512, dtype=np.uint16)
    planes[:64] = 64 + 876 * 3 // 4  # three quarters of the way from black to white
    encoded(tmp_path / "a.mp4", [planes] * 3, "libx264", "yuv420p10le", size=(64, 64), options={"crf": "4"})
    found = read_video(tmp_path / "a.mp4").frames.float()
    assert (found - 0.75 * 255).abs().max() <= 1


def test_hdr_is_refused_with_its_cure(tmp_path):
    planes = np.full((96, 64), 512, dtype=np.uint16)
    for name, transfer in (("PQ", 16), ("HLG", 18)):
        path = tmp_path / f"{name}.mp4"
        encoded(path, [planes], "libx264", "yuv420p10le", size=(64, 64), color_trc=transfer)
        with pytest.raises(UnsupportedError, match=f"{name}.mp4: HDR in {name}.*tonemap"):
            VideoReader(path)


def test_interlaced_is_refused_with_its_cure(tmp_path):
    planes = np.full((96, 64), 128, dtype=np.uint8)
    options = {"flags": "+ildct+ilme", "x264-params": "tff=1"}
    encoded(tmp_path / "a.mp4", [planes] * 3, "libx264", "yuv420p", size=(64, 64), options=options)
    with pytest.raises(UnsupportedError, match="a.mp4: interlaced; make full frames of it first, e.g. ffmpeg.*bwdif"):
        read_video(tmp_path / "a.mp4")


TURNS = {  # (a, b, c, d) of the display matrix -> where the bright stored corner (top left) is shown: (bottom?, right?)
    (1, 0, 0, 1): (0, 0, False),
    (0, 1, -1, 0): (0, 1, True),
    (-1, 0, 0, -1): (1, 1, False),
    (0, -1, 1, 0): (1, 0, True),
    (-1, 0, 0, 1): (0, 1, False),
    (1, 0, 0, -1): (1, 0, False),
    (0, 1, 1, 0): (0, 0, True),
    (0, -1, -1, 0): (1, 1, True),
}


@pytest.mark.parametrize("turn", TURNS)
def test_pictures_are_turned_and_mirrored_as_players_show_them(tmp_path, turn):
    """Checked against the rule of ISO 14496-12: the point (x, y) is shown at (a x + c y, b x + d y)."""
    planes = np.full((48, 64), 128, dtype=np.uint8)
    planes[:32] = 16
    planes[:8, :16] = 235
    data = matrix_bytes(turn)
    write_with_matrix(tmp_path / "a.mp4", planes, data)
    with VideoReader(tmp_path / "a.mp4") as reader:
        bottom, right, sideways = TURNS[turn]
        assert reader.size == ((64, 32) if sideways else (32, 64))
        picture = reader.read([0])[:, 0].float().mean(0)
    halves = picture.reshape(2, picture.shape[0] // 2, 2, picture.shape[1] // 2).mean((1, 3))
    assert divmod(int(halves.argmax()), 2) == (bottom, right)


def matrix_bytes(turn: tuple[int, int, int, int]) -> bytes:
    a, b, c, d = turn
    return np.array([a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30], dtype=">i4").tobytes()


def write_with_matrix(path: Path, planes: np.ndarray, matrix: bytes) -> None:
    """An mp4 whose track header's matrix is replaced in the file."""
    encoded(path, [planes], "libx264", "yuv420p", size=(32, 64), options={"crf": "4"})
    data = bytearray(path.read_bytes())
    header = data.index(b"tkhd")
    data[header + 44 : header + 80] = matrix
    path.write_bytes(data)


def test_a_crooked_turn_is_refused(tmp_path):
    matrix = np.array([46341, 46341, 0, -46341, 46341, 0, 0, 0, 1 << 30], dtype=">i4").tobytes()  # 45 degrees
    write_with_matrix(tmp_path / "a.mp4", np.full((48, 64), 128, dtype=np.uint8), matrix)
    with pytest.raises(UnsupportedError, match="a.mp4: is to be shown turned by -?45 degrees; rewrite it upright"):
        read_video(tmp_path / "a.mp4")


def test_a_size_that_changes_within_the_file_is_refused(tmp_path):
    for size in (32, 64):
        planes = np.full((size * 3 // 2, size), 128, dtype=np.uint8)
        encoded(tmp_path / f"{size}.h264", [planes] * 5, "libx264", "yuv420p", size=(size, size))
    (tmp_path / "a.h264").write_bytes((tmp_path / "32.h264").read_bytes() + (tmp_path / "64.h264").read_bytes())
    with pytest.raises(UnsupportedError, match="a.h264: the frame size changes within the file"):
        read_video(tmp_path / "a.h264")
    with pytest.raises(TooLargeError, match="a.h264: a frame of 64x64 is over"):
        read_video(tmp_path / "a.h264", max_pixels=32 * 32)


def test_unstretched_pixels_are_told(tmp_path):
    planes = np.full((48, 64), 128, dtype=np.uint8)
    encoded(tmp_path / "a.mkv", [planes], "libx264", "yuv420p", size=(32, 64), sample_aspect_ratio=Fraction(4, 3))
    with VideoReader(tmp_path / "a.mkv") as reader:
        assert (reader.size, reader.pixel_aspect) == ((32, 64), Fraction(4, 3))


def test_each_fault_has_its_kind_and_names_file_and_cure(tmp_path):
    write_video(tmp_path / "good.mp4", torch.rand(3, 40, 48, 64) * 2 - 1, fps=8)
    data = (tmp_path / "good.mp4").read_bytes()
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_bytes(b"not a video\n" * 50)
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    (tmp_path / "index cut, ä.mp4").write_bytes(data[:700])
    (tmp_path / "folder.mp4").mkdir()
    make(by_name("wav_PCM_16"), tmp_path)
    make(by_name("m4a_aac"), tmp_path)
    for name, kind, cure in (
        ("empty.mp4", NotMediaError, "download or export it again"),
        ("text.mp4", NotMediaError, "download or export it again"),
        ("cut.mp4", DamagedError, "cut off: .* bytes are there; fetch it again"),
        ("index cut, ä.mp4", DamagedError, "download or export it again"),
        ("folder.mp4", UnreachableError, "give the path of a media file"),
        ("missing.mp4", UnreachableError, "check the path"),
        ("a\0b.mp4", UnreachableError, "check the path"),
        ("a\udcff.mp4", UnreachableError, "check the path"),
        ("wav_PCM_16.wav", NotMediaError, "of no format that is read as video"),
        ("m4a_aac.m4a", NoStreamError, "give a file that has one"),
    ):
        with pytest.raises(MediaError, match=cure) as error:
            read_video(tmp_path / name)
        assert type(error.value) is kind, name
        assert str(error.value).startswith(str(tmp_path / name)), name


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "a.mp4")
    with pytest.raises(UnreachableError, match="it is no file"):
        VideoReader(tmp_path / "a.mp4")


def test_a_name_is_never_another_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video("concat:a.mp4", ramp(2), 8)
    assert read_video("concat:a.mp4").frames.shape[1] == 2
    for name in ("http://127.0.0.1:9/a.mp4", "pipe:0", "concat:b.mp4|c.mp4"):
        with pytest.raises(UnreachableError, match="check the path"):
            read_video(name)


def test_ten_hours_that_a_header_claims_are_not_believed(tmp_path):
    write_video(tmp_path / "a.mp4", torch.rand(3, 40, 48, 64) * 2 - 1, fps=8)
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    place = data.index(b"mdhd") + 20  # the media header's duration, after its ticks per second
    assert int.from_bytes(data[place - 4 : place], "big") * 5 == int.from_bytes(data[place : place + 4], "big")
    data[place : place + 4] = (int.from_bytes(data[place : place + 4], "big") * 7200).to_bytes(4, "big")
    with VideoReader(bytes(data)) as reader:
        assert reader.end_s == 5  # the sample table knows better
    with av.open(str(tmp_path / "a.mp4")) as source, av.open(str(tmp_path / "a.mkv"), mode="w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    data = bytearray((tmp_path / "a.mkv").read_bytes())
    place = data.index(b"\x44\x89\x88") + 3  # Duration, 8 bytes
    data[place : place + 8] = struct.pack(">d", 36_000_000.0)  # ms
    (tmp_path / "a.mkv").write_bytes(data)
    with VideoReader(tmp_path / "a.mkv") as reader:
        with pytest.raises(DamagedError, match="a.mkv: claims 36000 s but its frames end after 5 s; download"):
            _ = reader.end_s
        assert reader.read_at(reader.times_between(1, 2)).shape[1] == 8  # what is there can be read
    with pytest.raises(DamagedError, match="claims 36000 s"):
        read_video(tmp_path / "a.mkv")


def test_a_damaged_part_is_refused_and_the_rest_is_read(tmp_path):
    write_video(tmp_path / "a.mp4", torch.rand(3, 60, 48, 64) * 2 - 1, fps=8)
    good = read_video(tmp_path / "a.mp4").frames
    with av.open(str(tmp_path / "a.mp4")) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    position, size = places[30]
    data[position : position + size] = bytes(size)
    (tmp_path / "a.mp4").write_bytes(data)
    with VideoReader(tmp_path / "a.mp4") as reader:
        assert torch.equal(reader.read(range(20)), good[:, :20])
        with pytest.raises(DamagedError, match="a.mp4: .* of 8 frames cannot be decoded"):
            reader.read(range(28, 36))


@needs_torture
def test_odd_videos_are_read_or_named():
    read, messages = {}, {}
    for file in sorted(TORTURE.iterdir()):
        if file.stat().st_size > 150_000:
            continue
        try:
            read[file.name] = read_video(file)
        except MediaError as error:
            messages[file.name] = str(error)
    assert all(name in message and ";" in message for name, message in messages.items())
    assert len(read) >= 25
    for name, shape in {
        "odd_17x31.mp4": (3, 10, 31, 17),
        "fps120.mp4": (3, 60, 96, 96),
        "decord__video_270.mov": (3, 3, 568, 320),
        "media__sample_rotate_and_reflect.mp4": (3, 30, 1080, 720),
        "datasets__test_video_66x50.mov": (3, 82, 50, 66),  # 87 frames, of which an edit list hides 5
        "media__iibbibb_editlist_videoonly.mp4": (3, 12, 576, 704),
    }.items():
        assert read[name].frames.shape == shape, name
