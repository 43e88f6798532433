"""Media files: exact counts in and out, the same bytes each time, and errors that name the file."""

import io
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from audio.files import read_audio, spectrogram_picture, write_audio
from mmdiff.data.media import MediaError, whole_file
from video.files import VideoReader, contact_sheet, read_video, write_gif, write_video

TORTURE = Path(__file__).resolve().parents[2] / "shared" / "data" / "torture" / "files"
needs_torture = pytest.mark.skipif(not TORTURE.is_dir(), reason="../shared/data/torture is not there")


def ramp(frames: int, height: int = 48, width: int = 64) -> torch.Tensor:
    """(3, T, H, W): frame t is a flat grey of its own level, with a bright left half of the first channel."""
    level = torch.linspace(-0.8, 0.8, frames).view(1, frames, 1, 1)
    clip = level.expand(3, frames, height, width).clone()
    clip[0, :, :, : width // 2] += 0.2
    return clip


def tone(samples: int, channels: int = 1, rate: int = 16000) -> torch.Tensor:
    time = torch.arange(samples, dtype=torch.float64) / rate
    return torch.stack([0.5 * torch.sin(2 * torch.pi * 440 * (c + 1) * time) for c in range(channels)]).float()


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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_is_refused_and_leaves_nothing(tmp_path, value):
    clip = ramp(3)
    clip[0, 1, 2, 3] = value
    wave = tone(100)
    wave[0, 7] = value
    for write in (
        lambda: write_video(tmp_path / "a.mp4", clip, 8),
        lambda: contact_sheet(tmp_path / "a.png", clip),
        lambda: write_gif(tmp_path / "a.gif", clip, 8),
        lambda: write_audio(tmp_path / "a.wav", wave, 16000),
        lambda: spectrogram_picture(tmp_path / "b.png", wave, 16000),
    ):
        with pytest.raises(ValueError, match="non-finite"):
            write()
    assert list(tmp_path.iterdir()) == []


def test_wrong_arguments_are_named(tmp_path):
    for call, match in (
        (lambda: write_video(tmp_path / "a.mp4", torch.zeros(16, 3, 8, 8), 8), r"\(3, T, H, W\)"),
        (lambda: write_video(tmp_path / "a.mp4", torch.zeros(3, 0, 8, 8), 8), "at least one frame"),
        (lambda: write_video(tmp_path / "a.mp4", torch.zeros(3, 2, 8, 8, dtype=torch.uint8), 8), "dtype"),
        (lambda: write_video(tmp_path / "a.mp4", ramp(2), 0), "fps=0"),
        (lambda: write_video(tmp_path / "a.mp4", ramp(2), float("nan")), "fps=nan"),
        (lambda: write_video(tmp_path / "a.mp4", ramp(2), 8, crf=60), "crf=60"),
        (lambda: contact_sheet(tmp_path / "a.png", ramp(2), columns=0), "columns=0"),
        (lambda: write_gif(tmp_path / "a.gif", ramp(2), 0), "fps=0"),
        (lambda: write_audio(tmp_path / "a.mp3", tone(10), 16000), ".wav or .flac"),
        (lambda: write_audio(tmp_path / "a.wav", tone(10)[0], 16000), r"\(C, T\)"),
        (lambda: write_audio(tmp_path / "a.wav", tone(10), 10), "sample_rate=10"),
        (lambda: write_audio(tmp_path / "a.wav", tone(10), 16000, peak=2), "peak=2"),
        (lambda: write_audio(tmp_path / "a.wav", tone(10) * 4, 16000), "give peak"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    assert list(tmp_path.iterdir()) == []


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), whole_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


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


def test_playlist_opens_no_other_file(tmp_path):
    write_video(tmp_path / "secret.mp4", ramp(2), fps=8)
    (tmp_path / "list.mp4").write_text(f"ffconcat version 1.0\nfile '{tmp_path / 'secret.mp4'}'\n")
    (tmp_path / "hls.mp4").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nsecret.mp4\n#EXT-X-ENDLIST\n")
    for name in ("list.mp4", "hls.mp4"):
        with pytest.raises(MediaError):
            read_video(tmp_path / name)
        with pytest.raises(MediaError):
            read_audio(tmp_path / name)


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


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
@pytest.mark.parametrize(("samples", "channels"), [(1, 1), (2, 2), (7999, 1), (16000, 2), (12345, 3)])
def test_written_samples_are_read_back(tmp_path, suffix, samples, channels):
    path = tmp_path / f"a{suffix}"
    wave = tone(samples, channels)
    write_audio(path, wave, 16000)
    found, rate = read_audio(path)
    assert (found.shape, found.dtype, rate) == ((channels, samples), torch.float32, 16000)
    assert (found - wave).abs().max() <= 0.5 / 32768 + 1e-7
    info = soundfile.info(path)
    assert (info.frames, info.channels, info.samplerate, info.subtype) == (samples, channels, 16000, "PCM_16")
    write_audio(tmp_path / f"b{suffix}", wave, 16000)
    assert path.read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_level_policy(tmp_path):
    write_audio(tmp_path / "full.wav", torch.tensor([[1.0, -1.0, 0.5]]), 16000)
    assert read_audio(tmp_path / "full.wav")[0][0].tolist() == pytest.approx([1.0, -1.0, 0.5], abs=4e-5)
    write_audio(tmp_path / "loud.wav", torch.tensor([[3.0, -1.5]]), 16000, peak=0.9)
    assert read_audio(tmp_path / "loud.wav")[0][0].tolist() == pytest.approx([0.9, -0.45], abs=4e-5)
    write_audio(tmp_path / "soft.wav", torch.tensor([[0.3, -0.15]]), 16000, peak=0.9)
    assert read_audio(tmp_path / "soft.wav")[0][0].tolist() == pytest.approx([0.3, -0.15], abs=4e-5)


def test_resampling_keeps_tone_and_length(tmp_path):
    write_audio(tmp_path / "a.wav", tone(8000, rate=8000), 8000)
    wave, rate = read_audio(tmp_path / "a.wav", 16000)
    assert (wave.shape, rate) == ((1, 16000), 16000)
    assert (wave - tone(16000, rate=16000))[:, 200:-200].abs().max() < 0.01
    write_audio(tmp_path / "odd.wav", tone(50000, rate=44101), 44101)
    with pytest.raises(MediaError, match=r"odd\.wav.*rounder rate"):
        read_audio(tmp_path / "odd.wav", 96001)


def test_sound_of_an_mp4_is_read_by_pyav(tmp_path):
    path = tmp_path / "a.mp4"
    wave = tone(24000, 2)
    with av.open(str(path), mode="w") as container:
        stream = container.add_stream("aac", rate=16000, layout="stereo")
        frame = av.AudioFrame.from_ndarray(wave.numpy(), format="fltp", layout="stereo")
        frame.sample_rate = 16000
        frame.pts, frame.time_base = 0, Fraction(1, 16000)  # without it the encoder's lead-in stays in the file
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    for source in (path, path.read_bytes()):
        found, rate = read_audio(source)
        assert (found.shape, rate) == ((2, 24000), 16000), "AAC counts in blocks of 1024; the rest is cut off"
        assert (found[:, 2000:20000] - wave[:, 2000:20000]).abs().mean() < 0.005


def test_broken_audio_is_a_media_error_naming_the_file(tmp_path):
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan], dtype=np.float32), 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "none.wav", np.zeros((0, 1), dtype=np.float32), 16000)
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.flac").write_bytes(b"not a sound" * 50)
    for name, match in (("nan.wav", "non-finite"), ("none.wav", "no audio samples"), ("empty.wav", "cannot be read"),
                        ("text.flac", "text.flac"), ("missing.wav", "missing.wav")):  # fmt: skip
        with pytest.raises(MediaError, match=match) as error:
            read_audio(tmp_path / name)
        assert name in str(error.value)
    write_audio(tmp_path / "a.wav", tone(100), 16000)
    with pytest.raises(MediaError, match="over 99 values"):
        read_audio(tmp_path / "a.wav", max_values=99)


def test_spectrogram_picture(tmp_path):
    for name, wave in (
        ("a.png", tone(8000, 2)),
        ("b.png", tone(8000, 2)),
        ("short.png", tone(3)),
        ("zero.png", tone(9) * 0),
    ):
        spectrogram_picture(tmp_path / name, wave, 16000)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    picture = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    assert picture.shape == (500, 800, 3)
    assert picture[:200].std() > 0
    assert picture[200:].std() > 0


def test_imports_are_cheap():
    code = (
        "import sys, video, audio, mmdiff.data; "
        "heavy = {'torch', 'lightning', 'av', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    root = Path(__file__).resolve().parents[1]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@needs_torture
def test_odd_files_are_read_or_named():
    counts = {"read": 0, "refused": 0}
    messages: dict[str, str] = {}
    for file in sorted(TORTURE.iterdir()):
        if file.stat().st_size > 60_000:
            continue
        for read in (read_video, read_audio):
            try:
                read(file)
                counts["read"] += 1
            except MediaError as error:
                messages[file.name] = str(error)
                counts["refused"] += 1
    assert all(name in message for name, message in messages.items())
    assert counts["read"] >= 60
    frames = {
        "odd_17x31.mp4": (3, 10, 31, 17),
        "fps120.mp4": (3, 60, 96, 96),
        "name with spaces (1).mp4": (3, 75, 96, 96),
    }
    for name, shape in frames.items():
        assert read_video(TORTURE / name).frames.shape == shape
