"""Nothing is resized, cropped, padded or retimed but what the config names, and the batch says where a clip is from."""

import random
from pathlib import Path

import pytest
import torch

import audio
import video
from audio.data import AudioDecode
from audio.files import read_audio, resample, write_audio
from mmdiff.data.clips import OtherSizeError, TooShortError, collate
from mmdiff.data.items import Item
from tests.media_corpus import SIZE, by_name, make
from video.data import VideoDecode, resize_cover, resize_fit
from video.files import VideoReader, write_video

FRAMES = 21


def item_of(path: Path) -> Item:
    return Item(path.stem, path.name, ["c"], {}, path)


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Item:
    """21 frames of 32x40 at 8 fps, whose grey level counts them."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    level = torch.arange(FRAMES).view(1, FRAMES, 1, 1) / 16 - 0.9
    write_video(path, level.expand(3, FRAMES, 32, 40), fps=8)
    return item_of(path)


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Item:
    """2 s of noise at 44.1 kHz."""
    path = tmp_path_factory.mktemp("noise") / "noise.wav"
    generator = torch.Generator().manual_seed(0)
    write_audio(path, torch.rand(1, 88200, generator=generator) - 0.5, 44100)
    return item_of(path)


def numbers(clip: torch.Tensor) -> list[int]:
    return ((clip.mean((0, 2, 3)) + 0.9) * 16).round().int().tolist()


def test_pictures_of_another_size(film: Item) -> None:
    with pytest.raises(OtherSizeError, match=r"film\.mp4: is 32 high and 40 wide, not 32 and 32; give resize"):
        VideoDecode(8, (32, 32))(film, None)
    whole = VideoDecode(8, (32, 40))(film, None).data
    with VideoReader(film.path) as reader:
        assert torch.equal(whole, reader.read(range(6, 14)).float().div(127.5).sub(1)), "the file's own pixels"
    assert isinstance(whole, torch.Tensor)
    for resize, same in (("cover", resize_cover), ("fit", resize_fit)):
        for size in ((32, 32), (16, 20), (64, 40), (9, 9)):
            assert torch.equal(VideoDecode(8, size, resize=resize)(film, None).data, same(whole, size))


def test_fit_keeps_all_of_the_picture_on_black() -> None:
    clip = torch.full((3, 2, 20, 40), 0.5)
    wide = resize_fit(clip, (40, 40))
    assert (wide[..., :10, :] == -1).all()
    assert (wide[..., 30:, :] == -1).all()
    torch.testing.assert_close(wide[..., 10:30, :], clip)
    small = resize_fit(clip, (10, 30))
    assert small.shape == (3, 2, 10, 30)
    torch.testing.assert_close(small[..., 5:25], torch.full((3, 2, 10, 20), 0.5))
    assert (small[..., :5] == -1).all()
    assert torch.equal(resize_fit(clip, (20, 40)), clip)
    ramp = torch.linspace(-1, 1, 64).expand(1, 1, 8, 64)
    seen = resize_fit(ramp, (8, 32))[0, 0, 4]
    assert seen[0] < -0.9
    assert seen[-1] > 0.9, "both ends are there"


def test_a_shorter_film_is_padded_only_when_the_config_says_so(film: Item) -> None:
    for decode in (VideoDecode(22, (32, 40)), VideoDecode(43, (32, 40), fps=16.0)):
        with pytest.raises(TooShortError, match=r"film\.mp4: has \d+ frames at (8|16) fps, (22|43) are asked for"):
            decode(film, None)
    padded, masked = (VideoDecode(24, (32, 40), short=short)(film, None) for short in ("pad", "mask"))
    assert isinstance(padded.data, torch.Tensor)
    assert numbers(padded.data) == [*range(21), 20, 20, 20]
    assert padded.mask is None
    assert isinstance(masked.mask, torch.Tensor)
    assert masked.mask.tolist() == [True] * 21 + [False] * 3
    assert torch.equal(masked.data, padded.data)
    assert padded.duration_s == masked.duration_s == 21 / 8
    long = VideoDecode(8, (32, 40), short="mask")(film, None)
    assert long.mask is not None
    assert long.mask.all(), "a batch has a mask for each of its clips"


def test_a_shorter_sound_is_padded_only_when_the_config_says_so(noise: Item) -> None:
    with pytest.raises(TooShortError, match=r"noise\.wav: has 88200 samples at 44100 Hz, 90000 are asked for"):
        AudioDecode(44100, 90000)(noise, None)
    padded, masked = (AudioDecode(44100, 90000, short=short)(noise, None) for short in ("pad", "mask"))
    assert padded.mask is None
    assert isinstance(masked.mask, torch.Tensor)
    assert int(masked.mask.sum()) == 88200
    assert not masked.mask[88200:].any()
    assert torch.equal(masked.data, padded.data)


def test_a_film_s_crop_says_where_it_is_from(film: Item, tmp_path: Path) -> None:
    for fps in (None, 8.0, 4.0):
        for seed in range(12):
            sample = VideoDecode(5, (32, 40), fps=fps)(film, random.Random(seed))
            assert isinstance(sample.data, torch.Tensor)
            found = numbers(sample.data)
            step = 2 if fps == 4.0 else 1
            assert found == list(range(found[0], found[0] + 5 * step, step)), "no frame twice and none left out"
            assert sample.start_s == pytest.approx(found[0] / 8)
            assert sample.total_s == pytest.approx(FRAMES / 8)
            assert (sample.rate, sample.duration_s) == (fps or 8.0, 5 / (fps or 8.0))
    late = make(by_name("offset_-1.30_mkv"), tmp_path)  # its picture begins at 1.3 s of the file's clock
    sample = VideoDecode(50, SIZE, fps=25.0)(item_of(late.path), None)
    assert sample.start_s == 0.0
    assert sample.total_s == pytest.approx(2.0)


def test_a_variable_rate_takes_the_frames_nearest_in_time(tmp_path: Path) -> None:
    made = make(by_name("rate_vfr_mkv"), tmp_path)
    for seed in range(4):
        with VideoReader(made.path) as reader:
            from video.data import window

            times = window(reader, 12, 10.0, random.Random(seed))
            for step, time in enumerate(times):
                wanted = times[0] + step / 10
                assert abs(time - wanted) <= min(abs(other - wanted) for other in made.frame_times_s) + 1e-3


@pytest.mark.parametrize("rate", [44100, 16000, 22050, 48000])
def test_a_window_of_sound_is_the_same_part_of_the_whole(noise: Item, rate: int) -> None:
    whole, own = read_audio(noise.path)
    whole = resample(whole, own, rate)
    places = set()
    for seed in range(5):
        sample = AudioDecode(rate, rate // 4)(noise, random.Random(seed))
        first = sample.start_s * rate
        places.add(first)
        assert isinstance(sample.data, torch.Tensor)
        assert sample.total_s == 2.0
        if abs(first - round(first)) < 1e-6:
            expected = whole[:, round(first) : round(first) + rate // 4]
            torch.testing.assert_close(sample.data, expected, atol=2e-3, rtol=0)
    assert len(places) == 5
    first = AudioDecode(rate, rate // 4)(noise, None)
    assert first.start_s == 0.0
    torch.testing.assert_close(first.data, whole[:, : rate // 4], atol=1e-5, rtol=0)


def test_a_window_is_resampled_with_what_is_around_it(noise: Item) -> None:
    from audio.data import read_at_rate
    from audio.files import AudioReader

    whole, own = read_audio(noise.path)
    whole = resample(whole, own, 16000)
    with AudioReader(noise.path) as reader:
        for block in (0, 3, 50, 199):  # 441 samples of 44.1 kHz are 160 of 16 kHz
            part = read_at_rate(reader, block * 441, 441, 16000, 2)
            assert part.shape == (2, 160)
            torch.testing.assert_close(part[:1], whole[:, block * 160 : block * 160 + 160], atol=1e-5, rtol=0)


def test_batches_carry_where_clips_are_from(film: Item, noise: Item) -> None:
    for module, item, length in (
        (
            video.ClipDataModule(str(film.path.parent), frames=4, size=(32, 40), caption="none", val_share=0),
            film,
            2.625,
        ),
        (audio.ClipDataModule(str(noise.path.parent), samples=800, caption="none", val_share=0), noise, 2.0),
    ):
        module.setup()
        batch = next(iter(module.train_dataloader()))
        for name in ("start_s", "total_s", "duration_s"):
            assert (batch[name].dtype, batch[name].shape) == (torch.float32, (1,))
        assert batch["total_s"].tolist() == pytest.approx([length])
        assert 0 <= batch["start_s"].item() <= length - batch["duration_s"].item() + 1e-6
        assert batch["key"] == [item.key]
        assert "mask" not in batch


def test_clips_of_different_shapes_are_no_batch() -> None:
    samples = [{"x": torch.zeros(3, steps), "key": "k"} for steps in (4, 5)]
    with pytest.raises(ValueError, match=r"clips of the shapes \[\(3, 4\), \(3, 5\)\] are in one batch.*buckets"):
        collate(samples)


def test_the_reason_is_counted_by_its_kind(film: Item) -> None:
    options = {"caption": "none", "val_share": 0, "max_bad_share": 1.0}
    for more, kind in (({"size": (8, 8)}, "other size"), ({"size": (32, 40), "frames": 30}, "too short")):
        module = video.ClipDataModule(str(film.path.parent), **options, **more)  # type: ignore[arg-type]
        module.setup()
        with pytest.warns(UserWarning, match="bad item left out"):
            assert list(module.train_dataloader()) == [None]
        assert module.bad["train"].by_kind() == {kind: 1}
    with pytest.raises(ValueError, match="resize='stretch'"):
        video.ClipDataModule("x", resize="stretch")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="short='cut'"):
        audio.ClipDataModule("x", short="cut")  # type: ignore[arg-type]
