"""Picture and sound of one file, on its own clock: what flashes and beeps together does so in a batch."""

import random
from fractions import Fraction
from pathlib import Path

import pytest
import torch

import audiovideo
from audio.files import write_audio
from audiovideo.data import JointDecode
from mmdiff.data.batches import Buckets
from mmdiff.data.clips import OtherSizeError, TooShortError
from mmdiff.data.items import Item
from mmdiff.data.media import MediaError, NoStreamError
from tests.media_corpus import BEEP_S, SIZE, Made, by_name, make
from video.data import VideoDecode
from video.files import write_video

RATE = 48000


def item_of(path: Path) -> Item:
    return Item(path.stem, path.name, ["c"], {}, path)


def decoder(fps: Fraction | float, frames: int, **options: object) -> JointDecode:
    return JointDecode(VideoDecode(frames, SIZE, float(fps), **options), RATE)  # type: ignore[arg-type]


def begins(loud: torch.Tensor, apart: int) -> list[int]:
    """Places where a row of bools turns True after `apart` that were not."""
    places = loud.nonzero().flatten().tolist()
    return [place for i, place in enumerate(places) if place and (i == 0 or place - places[i - 1] > apart)]


def heard_and_seen(made: Made, sample) -> tuple[list[float], list[float]]:  # type: ignore[no-untyped-def]
    """When flashes and beeps begin in a clip, s on the file's clock."""
    start_s = made.frame_times_s[0] + sample.start_s
    fps, rate = sample.rate["video"], sample.rate["audio"]
    flashes = begins(sample.data["video"].mean((0, 2, 3)) > 0, 2)
    beeps = begins(sample.data["audio"].abs().amax(0) > 0.2, round(BEEP_S * rate / 2))
    return [start_s + place / fps for place in flashes], [start_s + place / rate for place in beeps]


@pytest.mark.parametrize(
    "name",
    [
        "rate_25fps_mp4", "rate_23.976fps_mkv", "rate_60fps_mov", "rate_12.5fps_mov", "offset_-1.30_mkv",
        "offset_+0.04_mov", "offset_+1.00_mkv", "offset_+4.40_mp4", "offset_-0.33_mp4", "sound_shorter_mov",
        "surround_mp4", "ffv1_mkv",
    ],
)  # fmt: skip
def test_a_flash_and_its_beep_come_together(name: str, tmp_path: Path) -> None:
    made = make(by_name(name), tmp_path)
    fps = made.case.fps
    assert fps is not None
    bound_s = 0.005 if made.lossy else 0.001
    together = 0
    for seed in range(4):
        decode = decoder(fps, 24)
        sample = decode(item_of(made.path), random.Random(seed))
        start_s = made.frame_times_s[0] + sample.start_s
        end_s = start_s + 24 / float(fps)
        assert sample.data["audio"].shape == (1, round(24 / float(fps) * RATE))
        seen, heard = heard_and_seen(made, sample)
        for found, truth in ((seen, made.flashes_s), (heard, made.beeps_s)):
            inside = [time for time in truth if start_s + 0.002 < time < end_s - 0.1]
            found = [time for time in found if start_s + 0.002 < time < end_s - 0.1]
            assert len(found) == len(inside), (seed, found, inside)
            assert all(abs(a - b) <= bound_s for a, b in zip(found, inside, strict=True)), (seed, found, inside)
        together += len({round(time, 2) for time in seen} & {round(time, 2) for time in heard})
    assert together or name.startswith("offset_+4.40"), "no window held an event of both"


def test_the_window_is_silent_where_there_is_no_sound(tmp_path: Path) -> None:
    made = make(by_name("offset_+1.00_mkv"), tmp_path)  # the picture from 0 on, the sound from 1 s on
    sample = decoder(25, 50)(item_of(made.path), None)
    assert (sample.start_s, sample.duration_s) == (0.0, 2.0)
    assert sample.total_s == pytest.approx(2.0)
    assert sample.data["audio"][:, :RATE].abs().max() == 0
    assert sample.data["audio"].abs().max() > 0.5


def test_a_file_of_the_asked_rate_gives_each_of_its_frames_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    level = torch.arange(21).view(1, 21, 1, 1) / 16 - 0.9
    write_video(tmp_path / "count.mp4", level.expand(3, 21, *SIZE), fps=8)
    decode = JointDecode(VideoDecode(8, SIZE, 8.0), RATE, silent="silence")
    starts = set()
    for seed in range(30):
        sample = decode(item_of(tmp_path / "count.mp4"), random.Random(seed))
        numbers = ((sample.data["video"].mean((0, 2, 3)) + 0.9) * 16).round().int().tolist()
        assert numbers == list(range(numbers[0], numbers[0] + 8))
        assert sample.start_s == pytest.approx(numbers[0] / 8)
        starts.add(numbers[0])
    assert len(starts) > 6


def test_what_does_not_fit_is_left_out_with_its_reason(tmp_path: Path) -> None:
    made = make(by_name("rate_25fps_mov"), tmp_path)
    mute = make(by_name("sound_missing_mov"), tmp_path)
    with pytest.raises(TooShortError, match=r"has 50 frames at 25 fps, 60 are asked for"):
        decoder(25, 60)(item_of(made.path), None)
    with pytest.raises(OtherSizeError, match="is 48 high and 64 wide, not 32 and 32"):
        JointDecode(VideoDecode(8, (32, 32), 25.0), RATE)(item_of(made.path), None)
    with pytest.raises(NoStreamError, match=r"sound_missing_mov\.mov"):
        decoder(29.97, 8)(item_of(mute.path), None)
    silent = JointDecode(VideoDecode(8, SIZE, 29.97), RATE, silent="silence")(item_of(mute.path), None)
    assert silent.data["audio"].abs().max() == 0
    write_audio(tmp_path / "sound.wav", torch.zeros(1, 800), 8000)
    with pytest.raises(MediaError, match=r"sound\.wav"):
        decoder(25, 8)(item_of(tmp_path / "sound.wav"), None)
    masked = decoder(25, 60, short="mask")(item_of(made.path), None)
    assert isinstance(masked.mask, dict)
    assert (int(masked.mask["video"].sum()), int(masked.mask["audio"].sum())) == (50, 2 * RATE)
    assert masked.data["audio"].shape[1] == len(masked.mask["audio"]) == round(60 / 25 * RATE)
    assert torch.equal(masked.data["video"][:, 50], masked.data["video"][:, 49])


def test_wrong_arguments_are_named() -> None:
    for options, match in (
        ({"fps": 0}, "fps=0"), ({"sample_rate": 10}, "sample_rate=10"), ({"channels": 0}, "channels=0"),
        ({"silent": "loud"}, "silent='loud'"), ({"resize": "big"}, "resize='big'"), ({"short": "no"}, "short='no'"),
        ({"frames": 0}, "frames=0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            audiovideo.ClipDataModule("x", **{"fps": 8.0, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_real_speech(shared_data: Path, workers: int) -> None:
    data = audiovideo.ClipDataModule(
        str(shared_data / "grid_av"), fps=25.0, frames=25, size=(96, 96), limit=6, batch_size=3, num_workers=workers
    )
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert {name: tuple(x.shape) for name, x in batch["x"].items()} == {
        "video": (3, 3, 25, 96, 96), "audio": (3, 1, 16000),
    }  # fmt: skip
    assert {name: rate.tolist() for name, rate in batch["rate"].items()} == {
        "video": [25.0] * 3,
        "audio": [16000.0] * 3,
    }
    assert batch["duration_s"].tolist() == [1.0] * 3
    assert batch["total_s"].tolist() == pytest.approx([3.0] * 3, abs=0.05)
    assert len(set(batch["start_s"].tolist())) > 1
    assert all(caption.startswith("a man says") for caption in batch["caption"])


def test_real_digits_light_up_when_they_are_spoken(shared_data: Path) -> None:
    data = audiovideo.ClipDataModule(str(shared_data / "av_digits"), fps=10.0, frames=16, limit=24, batch_size=24)
    data.setup()
    batch = next(iter(data.val_dataloader()))
    light = batch["x"]["video"].amax(1).flatten(2).mean(2)  # (B, T)
    loud = batch["x"]["audio"].unflatten(2, (16, -1)).square().mean(-1).sqrt()[:, 0]
    together = [float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in zip(light, loud, strict=True)]
    assert sum(together) / len(together) > 0.7
    late = [float(torch.corrcoef(torch.stack((a, b.roll(4))))[0, 1]) for a, b in zip(light, loud, strict=True)]
    assert sum(late) / len(late) < 0.3


def test_real_stamps_in_buckets(shared_data: Path) -> None:
    data = audiovideo.ClipDataModule(
        str(shared_data / "av_stamps"), fps=8.0, frames=8, limit=6, batch_size=2, buckets=Buckets(steps=[8, 12])
    )
    data.setup()
    batches = list(data.train_dataloader())
    assert sum(len(batch["key"]) for batch in batches) == 6
    for batch in batches:
        assert batch["x"]["video"].shape[1:] == (3, 12, 64, 64)
        assert batch["x"]["audio"].shape[1:] == (1, 24000)
