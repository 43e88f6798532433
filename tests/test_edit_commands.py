"""--init, --strength, --mask, --extend, --first-frame of txt2vid and txt2audio, on the pipelines that ship, two steps.

What is kept is compared with what was asked to be kept: before the codec exactly, in the file within its error.
"""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from PIL import Image
from torch import Tensor

import audio.commands
import video.commands
from audio.files import read_audio, write_audio
from mmdiff import pipeline
from mmdiff.__main__ import guarded
from video.data import resize_cover
from video.files import read_video, write_video

CODEC = 0.06  # mean error of a smooth 64x64 picture in H.264 at crf 16, 4:2:0, on [-1, 1]; measured 0.01 to 0.02
SAMPLE = 1 / 32768  # one step of 16 bits


def smooth(frames: int, height: int = 64, width: int = 64) -> Tensor:
    """(3, T, H, W): ramps in space, one that grows in time."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    t = torch.linspace(-0.8, 0.8, frames)[:, None, None]
    return torch.stack([x.expand(frames, -1, -1), y.expand(frames, -1, -1), t.expand(-1, height, width)])


def tone(seconds: float, rate: int, channels: int = 1) -> Tensor:
    time_s = torch.arange(round(seconds * rate)) / rate
    return (0.4 * torch.sin(2 * torch.pi * 440 * time_s)).expand(channels, -1).contiguous()


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    write_video(folder / "two.mp4", smooth(16), 8)  # what the pipeline makes: 16 frames of 64x64 at 8 fps
    write_video(folder / "short.mp4", smooth(6), 8)
    write_video(folder / "wide.mp4", smooth(30, 48, 96), 15)
    picture = ((smooth(1)[:, 0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(picture).save(folder / "picture.png")
    right = torch.zeros(64, 64, dtype=torch.uint8)
    right[:, 32:] = 255
    Image.fromarray(right.numpy()).save(folder / "right.png")
    Image.fromarray(torch.zeros(8, 8, dtype=torch.uint8).numpy()).save(folder / "black.png")
    late = torch.full((3, 16, 64, 64), -1.0)
    late[:, 8:] = 1.0
    write_video(folder / "late.mp4", late, 8)
    write_audio(folder / "one.wav", tone(1.024, 8000), 8000)  # what the pipeline makes: 8192 samples
    write_audio(folder / "short.wav", tone(0.5, 8000), 8000)
    write_audio(folder / "stereo.flac", tone(0.8, 44100, 2), 44100)
    loud = torch.zeros(1, 8192)
    loud[:, 4000:6000] = 0.9
    write_audio(folder / "loud.wav", loud, 8000)
    (folder / "text.mp4").write_text("no video")
    (folder / "text.png").write_text("no picture")
    (folder / "text.wav").write_text("no sound")
    return folder


class Run:
    """A command's result: the clip before the codec, the file, what it said."""

    def __init__(self, kind: str, media: Path, out: Path, capfd: Any, monkeypatch: Any) -> None:
        self.kind, self.media, self.out, self.capfd, self.patch = kind, media, out, capfd, monkeypatch

    def __call__(self, *options: str, steps: str = "2") -> "Run":
        module: Any = video.commands if self.kind == "video" else audio.commands
        command = module.txt2vid if self.kind == "video" else module.txt2audio
        prompt = "a character with tan skin, walking" if self.kind == "video" else "the digit four spoken by george"
        write, folder = module.write, self.out / str(len(list(self.out.iterdir())))

        def listening(stem: Path, clip: Any, *rest: Any, **more: Any) -> list[Path]:
            self.clip = clip.data.clone()
            return write(stem, clip, *rest, **more)

        given = [str(self.media / o) if (self.media / o).is_file() else o for o in options]
        with self.patch.context() as patch:
            patch.setattr(module, "write", listening)
            assert command([prompt, "--steps", steps, "--out", str(folder), *given]) == 0
        captured = self.capfd.readouterr()
        self.file = Path(captured.out.split()[0])
        self.said = [line for line in captured.err.splitlines() if "used as" in line]
        self.record = json.loads(self.file.with_suffix(".json").read_text())
        return copy.copy(self)  # so that the next run leaves this one's results alone

    def frames(self) -> Tensor:
        return read_video(self.file).frames.float() / 127.5 - 1


@pytest.fixture
def vid(media: Path, tmp_path: Path, capfd: Any, monkeypatch: Any) -> Run:
    return Run("video", media, tmp_path, capfd, monkeypatch)


@pytest.fixture
def sound(media: Path, tmp_path: Path, capfd: Any, monkeypatch: Any) -> Run:
    return Run("audio", media, tmp_path, capfd, monkeypatch)


def decoded(path: Path) -> Tensor:
    """(1, 3, T, H, W) in [-1, 1]."""
    return read_video(path).frames.float()[None] / 127.5 - 1


def error(got: Tensor, expected: Tensor) -> float:
    return (got - expected).abs().mean().item()


# Video


def test_strength_0_gives_the_video_back_and_1_ignores_it(vid: Run, media: Path) -> None:
    kept = vid("--init", "two.mp4", "--strength", "0")
    assert torch.equal(kept.clip, decoded(media / "two.mp4"))
    assert kept.frames().shape == (3, 16, 64, 64)
    assert error(kept.frames(), decoded(media / "two.mp4")[0]) < CODEC
    assert kept.said == [
        f"{media / 'two.mp4'}: 16 frames of 64x64 at 8 fps, used as 16 frames of 64x64 at 8 fps"
    ]  # said once, in one line
    assert (kept.record["init"], kept.record["strength"]) == (str(media / "two.mp4"), 0.0)
    plain = vid(steps="4").clip
    assert torch.equal(vid("--init", "two.mp4", "--strength", "1", steps="4").clip, plain)
    some = [vid("--init", "two.mp4", *s, steps="4").clip for s in ((), ("--strength", "0.25"), ("--strength", "0.75"))]
    others = [plain, decoded(media / "two.mp4"), *some[1:]]
    assert all(error(a, b) > 1e-4 for i, a in enumerate(others) for b in others[:i])
    assert torch.equal(some[0], some[2])  # the default, 0.6, is 3 of 4 steps too


@pytest.mark.parametrize(
    ("options", "frames"),
    [
        (["--init", "wide.mp4"], 16),
        (["--init", "wide.mp4", "--frames", "9"], 9),
        (["--init", "short.mp4"], 6),
        (["--init", "short.mp4", "--duration", "1.5"], 12),
        (["--init", "picture.png"], 16),
        (["--init", "picture.png", "--frames", "5"], 5),
        (["--first-frame", "picture.png", "--frames", "20"], 20),
    ],
)
def test_a_video_made_from_media_has_the_stated_length(options: list[str], frames: int, vid: Run) -> None:
    done = vid(*options)
    assert done.frames().shape == (3, frames, 64, 64)
    assert len(done.said) == 1


def test_input_is_resized_and_its_rate_converted_as_in_training(vid: Run, media: Path) -> None:
    done = vid("--init", "wide.mp4", "--strength", "0")
    frames = decoded(media / "wide.mp4")[0][:, [math.ceil(k * 15 / 8 - 0.5) for k in range(16)]]
    torch.testing.assert_close(done.clip[0], resize_cover(frames, (64, 64)))
    assert "30 frames of 96x48 at 15 fps, used as 16 frames of 64x64 at 8 fps" in done.said[0]
    shown = vid("--init", "short.mp4", "--strength", "0", "--frames", "8").clip
    assert torch.equal(shown[:, :, 6:], decoded(media / "short.mp4")[:, :, 5:].expand(1, 3, 2, 64, 64))


def test_a_mask_keeps_what_is_black(vid: Run, media: Path) -> None:
    given = decoded(media / "two.mp4")
    space = vid("--init", "two.mp4", "--mask", "right.png")
    assert torch.equal(space.clip[..., :32], given[..., :32])
    assert error(space.clip[..., 32:], given[..., 32:]) > 0.1
    assert error(space.frames()[..., :30], given[0, ..., :30]) < CODEC
    time = vid("--init", "two.mp4", "--mask", "late.mp4")
    assert torch.equal(time.clip[:, :, :8], given[:, :, :8])
    assert error(time.clip[:, :, 8:], given[:, :, 8:]) > 0.1
    weaker = vid("--init", "two.mp4", "--mask", "right.png", "--strength", "0.5").clip
    assert torch.equal(weaker[..., :32], given[..., :32])
    assert error(weaker[..., 32:], space.clip[..., 32:]) > 1e-3


@pytest.mark.parametrize(("init", "frames"), [("two.mp4", 16), ("short.mp4", 6), ("picture.png", 1)])
def test_a_video_goes_on_for_the_seconds_asked(init: str, frames: int, vid: Run, media: Path) -> None:
    done = vid("--init", init, "--extend", "1.5")
    assert done.frames().shape == (3, frames + 12, 64, 64)
    first = read_video(media / init) if init.endswith("mp4") else None
    given = smooth(1)[None] if first is None else decoded(media / init)
    assert error(done.clip[:, :, :frames], given) < (1 / 255 if first is None else 1e-9)
    assert error(done.frames()[:, :frames], given[0]) < CODEC
    assert done.clip[:, :, frames:].std() > 0.01


def test_the_first_frame_is_the_picture_and_the_rest_is_not(vid: Run) -> None:
    done = vid("--first-frame", "picture.png")
    assert error(done.clip[:, :, :1], smooth(1)[None]) < 1 / 255
    assert error(done.frames()[:, :1], smooth(1)) < CODEC
    assert error(done.clip[:, :, 1:2], done.clip[:, :, :1]) > 1e-3
    plain = vid().clip
    assert error(plain[:, :, 1:], done.clip[:, :, 1:]) > 1e-3


# Sound


def test_strength_0_gives_the_sound_back_and_1_ignores_it(sound: Run, media: Path) -> None:
    kept = sound("--init", "one.wav", "--strength", "0")
    given, _ = read_audio(media / "one.wav")
    assert torch.equal(kept.clip[0], given)
    assert (read_audio(kept.file)[0] - given).abs().max() <= SAMPLE
    assert kept.said == [f"{media / 'one.wav'}: 1.024 s at 8000 Hz, 1 channel, used as 1.024 s at 8000 Hz, 1 channel"]
    plain = sound(steps="4").clip
    assert torch.equal(sound("--init", "one.wav", "--strength", "1", steps="4").clip, plain)
    some = [sound("--init", "one.wav", "--strength", s, steps="4").clip for s in ("0.25", "0.75")]
    assert all(error(a, b) > 1e-5 for a, b in ((some[0], plain), (some[1], plain), (some[0], some[1])))


@pytest.mark.parametrize(
    ("options", "samples"),
    [
        (["--init", "short.wav"], 4000),
        (["--init", "short.wav", "--duration", "0.9"], 7200),
        (["--init", "stereo.flac"], 6400),
        (["--init", "short.wav", "--extend", "1"], 12000),
        (["--init", "stereo.flac", "--extend", "0.25"], 8400),
    ],
)
def test_a_sound_made_from_media_has_the_stated_length(options: list[str], samples: int, sound: Run) -> None:
    info = soundfile.info(sound(*options).file)
    assert (info.frames, info.samplerate, info.channels) == (samples, 8000, 1)


@pytest.mark.parametrize(
    ("mask", "first", "last"),
    [("0.5:0.75", 4000, 6000), ("loud.wav", 4000, 6000), (":0.25", 0, 2000), ("0.9:", 7200, 8192)],
)
def test_a_mask_in_seconds_or_a_loud_sound_says_what_is_made_anew(
    mask: str, first: int, last: int, sound: Run, media: Path
) -> None:
    """Samples stay but for 5 ms, 40 samples, at the joins: Griffin-Lim has its own phases."""
    given = read_audio(media / "one.wav")[0]
    done = sound("--init", "one.wav", "--mask", mask).clip[0]
    kept = torch.ones(8192, dtype=torch.bool)
    kept[max(0, first - 40) : last + 40] = False
    assert torch.equal(done[:, kept], given[:, kept])
    assert error(done[:, first:last], given[:, first:last]) > 1e-3


def test_several_ranges_are_made_anew(sound: Run, media: Path) -> None:
    given = read_audio(media / "one.wav")[0]
    changed = (sound("--init", "one.wav", "--mask", "0.1:0.2,0.6:0.7").clip[0] - given).abs()
    assert changed[:, :760].max() == changed[:, 1640:4760].max() == changed[:, 5640:].max() == 0
    assert changed[:, 800:1600].mean() > 1e-3
    assert changed[:, 4800:5600].mean() > 1e-3


def test_a_sound_goes_on_without_a_click(sound: Run, media: Path) -> None:
    given = read_audio(media / "one.wav")[0]
    done = sound("--init", "one.wav", "--extend", "0.5")
    assert done.clip.shape == (1, 1, 12192)
    assert torch.equal(done.clip[0, :, : 8192 - 40], given[:, :-40])
    assert (read_audio(done.file)[0][:, : 8192 - 40] - given[:, :-40]).abs().max() <= SAMPLE
    jumps = done.clip[0, 0].diff().abs()
    assert jumps[8100:8300].max() < 2 * jumps.max().clamp(max=0.15), "a click at the join"


# What is refused


def refused(command: Any, args: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> str:
    assert guarded("x", command, ["a prompt", "--steps", "2", "--out", str(tmp_path / "out"), *args]) == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--strength", "0.5"], "--strength needs --init FILE"),
        (["--mask", "right.png"], "--mask needs --init FILE"),
        (["--extend", "1"], "--extend needs --init FILE"),
        (["--first-frame", "picture.png", "--strength", "0.5"], "--strength needs --init FILE"),
        (["--init", "two.mp4", "--first-frame", "picture.png"], "give --init or --first-frame, not both"),
        (["--init", "two.mp4", "--strength", "1.5"], "--strength 1.5 is outside 0..1"),
        (["--init", "two.mp4", "--strength", "nan"], "--strength nan is outside 0..1"),
        (["--init", "two.mp4", "--strength", "much"], "invalid float value"),
        (["--init", "two.mp4", "--extend", "0"], "--extend 0.0 must be a number of seconds above 0"),
        (["--init", "two.mp4", "--extend", "inf"], "--extend inf must be"),
        (["--init", "two.mp4", "--extend", "1", "--mask", "right.png"], "it goes without --mask"),
        (["--init", "two.mp4", "--extend", "1", "--strength", "1"], "it goes without --strength"),
        (["--init", "two.mp4", "--extend", "1", "--frames", "9"], "it goes without --frames"),
        (["--init", "two.mp4", "--extend", "1", "--duration", "9"], "it goes without --duration"),
        (["--init", "nowhere.mp4"], "nowhere.mp4"),
        (["--init", "text.mp4"], "text.mp4: cannot be read as video"),
        (["--init", "text.png"], "text.png: cannot be read as a picture"),
        (["--init", "nowhere.png"], "nowhere.png: cannot be read as a picture"),
        (["--init", "two.mp4", "--mask", "text.png"], "text.png: cannot be read as a picture"),
        (["--first-frame", "text.png"], "text.png: cannot be read as a picture"),
        (["--init", "."], "cannot be read as video"),
    ],
)
def test_wrong_video_options_end_in_one_line_before_a_model_is_loaded(
    args: list[str], says: str, media: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "load_pipeline", lambda *_, **__: pytest.fail("a model was loaded"))
    said = refused(video.commands.txt2vid, [str(media / a) if "." in a and a[0].isalpha() else a for a in args],
                   tmp_path, capfd)  # fmt: skip
    assert says in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--mask", "0:1"], "--mask needs --init FILE"),
        (["--init", "one.wav", "--mask", "0.5:0.2"], "--mask 0.5:0.2: 0.5:0.2 ends before it starts"),
        (["--init", "one.wav", "--mask", "half"], "half: cannot be read"),
        (["--init", "text.wav"], "text.wav: cannot be read as audio"),
        (["--init", "nowhere.wav"], "nowhere.wav: cannot be read"),
        (["--first-frame", "picture.png"], "unrecognized arguments: --first-frame"),
        (["--init", "one.wav", "--extend", "-1"], "--extend -1.0 must be a number of seconds above 0"),
    ],
)
def test_wrong_audio_options_end_in_one_line_before_a_model_is_loaded(
    args: list[str], says: str, media: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "load_pipeline", lambda *_, **__: pytest.fail("a model was loaded"))
    given = [str(media / a) if a.endswith((".wav", ".png")) else a for a in args]
    said = refused(audio.commands.txt2audio, given, tmp_path, capfd)
    assert says in said
    assert said.count("\n") == 1


def test_a_mask_that_leaves_nothing_to_do_is_refused(media: Path, tmp_path: Path, capfd: Any) -> None:
    both = ["--init", str(media / "two.mp4"), "--mask", str(media / "black.png")]
    assert "black.png leaves nothing of" in refused(video.commands.txt2vid, both, tmp_path, capfd)
    both = ["--init", str(media / "short.wav"), "--mask", "0.6:0.9"]
    assert "--mask 0.6:0.9 leaves nothing of" in refused(audio.commands.txt2audio, both, tmp_path, capfd)


def test_a_continuation_longer_than_a_pipeline_can_make_is_refused(media: Path, tmp_path: Path, capfd: Any) -> None:
    args = ["--init", str(media / "two.mp4"), "--extend", "1000"]
    said = refused(video.commands.txt2vid, args, tmp_path, capfd)
    assert "--extend 1000 makes 1002 s of" in said
    assert "more than the 32 s" in said
