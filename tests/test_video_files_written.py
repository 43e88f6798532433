"""What is written as video is read back to the frame, with its colours, its rate, its sound and the same bytes."""

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from tests.grey_ramp import ramp
from video.files import VideoReader, contact_sheet, read_video, write_gif, write_video


@pytest.mark.parametrize("frames", [1, 2, 7, 16, 25])
@pytest.mark.parametrize("size", [(48, 64), (33, 47)])
def test_written_frames_are_read_back(tmp_path, frames, size):
    clip = ramp(frames, *size)
    write_video(tmp_path / "clip.mp4", clip, fps=8)
    video = read_video(tmp_path / "clip.mp4")
    height, width = size[0] + size[0] % 2, size[1] + size[1] % 2
    assert video.frames.shape == (3, frames, height, width)
    assert video.frames.dtype == torch.uint8
    assert video.fps == 8
    expected = ((clip + 1) * 127.5).mean((0, 2, 3))
    found = video.frames[:, :, : size[0], : size[1]].float().mean((0, 2, 3))
    assert (found - expected).abs().max() < 2
    with av.open(str(tmp_path / "clip.mp4")) as container:  # the reference
        stream = container.streams.video[0]
        assert stream.frames == sum(1 for _ in container.decode(stream)) == frames
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.start_time == 0
        assert float(stream.duration * stream.time_base) == pytest.approx(frames / 8)


def test_padding_repeats_the_edge_and_keeps_the_picture_in_place(tmp_path):
    clip = ramp(2, 33, 47)
    write_video(tmp_path / "clip.mp4", clip, fps=8, crf=1)
    frames = read_video(tmp_path / "clip.mp4").frames.int()
    assert (frames[:, :, 33] - frames[:, :, 32]).abs().max() <= 3
    assert (frames[..., 47] - frames[..., 46]).abs().max() <= 3


def test_colours_survive(tmp_path):
    colours = torch.tensor([[1, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, 1], [-1, -1, -1], [0.2, -0.4, 0.6]])
    clip = colours.T.reshape(3, 6, 1, 1).expand(3, 6, 32, 32)
    write_video(tmp_path / "clip.mp4", clip, fps=8)
    found = read_video(tmp_path / "clip.mp4").frames.float().mean((2, 3)) / 127.5 - 1
    assert (found.T - colours).abs().max() < 0.04


def test_same_frames_same_bytes(tmp_path):
    clip = torch.rand(3, 6, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, clip, fps=Fraction(30000, 1001))
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert b"moov" in (tmp_path / "a.mp4").read_bytes()[:200], "the index stands in front"
    assert read_video(tmp_path / "a.mp4").fps == Fraction(30000, 1001)


def test_same_bytes_from_another_process(tmp_path):
    code = (
        "import sys, torch; from video.files import write_video; torch.set_num_threads(2); "
        "write_video(sys.argv[1], torch.linspace(-1, 1, 3 * 4 * 32 * 32).reshape(3, 4, 32, 32), 8)"
    )
    root = Path(__file__).resolve().parents[1]
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "b.mp4")], check=True, cwd=root)
    write_video(tmp_path / "a.mp4", torch.linspace(-1, 1, 3 * 4 * 32 * 32).reshape(3, 4, 32, 32), 8)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_contact_sheet_enlarges_without_smoothing(tmp_path):
    clip = ramp(5, 16, 16)
    contact_sheet(tmp_path / "sheet.png", clip, columns=3, min_side=64, gap=2)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (2 * 66 - 2, 3 * 66 - 2, 3)
    levels = ((clip + 1) * 127.5).round().to(torch.uint8)
    assert sheet[0, 0].tolist() == levels[:, 0, 0, 0].tolist()
    assert sheet[66 + 40, 66 + 60].tolist() == levels[:, 4, 10, 15].tolist(), "frame 4 is second in the second row"
    assert len(np.unique(sheet[:64, :64].reshape(-1, 3), axis=0)) == 2


def test_gif_has_the_frames(tmp_path):
    write_gif(tmp_path / "a.gif", ramp(6), fps=10)
    with Image.open(tmp_path / "a.gif") as picture:
        assert (picture.n_frames, picture.info["duration"]) == (6, 100)


def counted(path: Path) -> tuple[int, Fraction]:
    """(frames that plain PyAV decodes, the container's rate)."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return sum(1 for _ in container.decode(stream)), Fraction(stream.average_rate)


def check_length(folder: Path, frames: int, rate: Fraction, sound_s: float | None) -> None:
    clip = torch.linspace(-1, 1, frames).view(1, frames, 1, 1).expand(3, frames, 16, 16)
    sound = (
        None if sound_s is None else (0.5 * torch.sin(torch.arange(max(1, int(sound_s * 16000))) * 0.3)[None], 16000)
    )
    path = folder / "a.mp4"
    write_video(path, clip, rate, preset="ultrafast", sound=sound)
    with VideoReader(path) as reader:
        assert len(reader) == frames
        assert reader.times_s == pytest.approx([float(k / rate) for k in range(frames)], abs=1e-4)
        assert reader.fps == rate
        assert reader.end_s == pytest.approx(float(frames / rate), abs=1e-4)
        level = reader.read(range(frames)).float().mean((0, 2, 3)) / 127.5 - 1
    assert (level - clip[0, :, 0, 0]).abs().max() < 0.02
    assert counted(path) == (frames, rate)
    with av.open(str(path)) as container:
        assert len(container.streams.audio) == (sound is not None)
        if sound is not None:
            track = container.streams.audio[0]
            assert track.duration * track.time_base == Fraction(sound[0].shape[1], 16000)
            assert track.start_time == 0


LENGTHS = [(8, None), (Fraction(30000, 1001), 1.0), (25, 7.0), (Fraction(24000, 1001), 0.01)]


@pytest.mark.parametrize(("rate", "sound_s"), LENGTHS)
def test_every_length_is_read_back_exactly_also_with_sound_beside(tmp_path, rate, sound_s):
    for frames in (1, 2, 3, 4, 5, 7, 16, 17, 31, 64, 99, 250, 251, 399, 400):
        check_length(tmp_path, frames, Fraction(rate), sound_s)


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "sound_s"), LENGTHS)
def test_every_length_from_1_to_400_is_read_back_exactly(tmp_path, rate, sound_s):
    for frames in range(1, 401):
        check_length(tmp_path, frames, Fraction(rate), sound_s)


@pytest.mark.parametrize("codec", ["h264", "h265", "av1"])
def test_each_codec_keeps_count_colours_and_bytes(tmp_path, codec):
    clip = ramp(9, 129, 131)
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, clip, Fraction(30000, 1001), codec=codec)
    video = read_video(tmp_path / "a.mp4")
    assert (video.frames.shape, video.fps) == ((3, 9, 130, 132), Fraction(30000, 1001))
    found = video.frames[:, :, :129, :131].float() / 127.5 - 1
    assert (found.mean((2, 3)) - clip.mean((2, 3))).abs().max() < 0.03
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].codec_context.codec.canonical_name == codec.replace("h265", "hevc")
        assert container.streams.video[0].codec_context.pix_fmt == "yuv420p"
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_full_colour_needs_no_padding(tmp_path):
    write_video(tmp_path / "a.mp4", ramp(3, 33, 47), 8, pix_fmt="yuv444p")
    assert read_video(tmp_path / "a.mp4").frames.shape == (3, 3, 33, 47)


def test_sound_beside_has_the_level_of_its_samples(tmp_path):
    wave = torch.stack([0.25 * torch.sin(torch.arange(48000) * 0.06), 0.5 * torch.sin(torch.arange(48000) * 0.06)])
    write_video(tmp_path / "a.mp4", ramp(8), 8, sound=(wave, 48000))
    with av.open(str(tmp_path / "a.mp4")) as container:
        blocks = [frame.to_ndarray() for frame in container.decode(container.streams.audio[0])]
    heard = np.concatenate(blocks, axis=1)[:, 2000:46000]
    assert np.abs(np.sqrt((heard**2).mean(1)) * 2**0.5 - [0.25, 0.5]).max() < 0.01


def test_what_cannot_be_written_is_named_and_leaves_nothing(tmp_path):
    path, clip, wave = tmp_path / "a.mp4", ramp(2), torch.zeros(1, 100)
    for keywords, match in (
        ({"codec": "vp8"}, "codec='vp8' is not one of h264, h265, av1"),
        ({"codec": "h265"}, "needs 128 pixels on each side, not 64x48; use h264"),
        ({"crf": 60}, "crf=60 is outside"),
        ({"pix_fmt": "rgb24"}, "pix_fmt='rgb24'"),
        ({"sound": (wave[0], 16000)}, r"sound has shape \(100,\)"),
        ({"sound": (wave.int(), 16000)}, "sound has dtype"),
        ({"sound": (wave, 16001)}, "sample_rate=16001 is none of AAC's; resample to one of"),
        ({"sound": (wave + 1.5, 16000)}, "sound reaches 1.5, beyond"),
        ({"sound": (wave / 0, 16000)}, "non-finite samples"),
    ):
        with pytest.raises(ValueError, match=match):
            write_video(path, clip, 8, **keywords)
    assert list(tmp_path.iterdir()) == []


def test_a_gif_lasts_as_long_as_its_frames(tmp_path):
    write_gif(tmp_path / "a.gif", ramp(30), fps=30)
    video = read_video(tmp_path / "a.gif")
    assert video.frames.shape[1] == 30
    assert np.abs(np.array(video.times_s) - np.arange(30) / 30).max() <= 0.0051, "no drift"
