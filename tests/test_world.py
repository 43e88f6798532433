"""The world is the same everywhere, its renders show and sound what its captions say, at the times of its events."""

import dataclasses
import hashlib
import itertools
import json
import math
from typing import Any

import pytest
import torch

import audio.render
import video.render
from mmdiff import world
from mmdiff.world import Scene, caption, scene, sound_caption

SCENES = [scene(i) for i in range(40)]
SIZE = (24, 32)


def frames(drawn: Scene, fps: float = 8.0, size: tuple[int, int] = SIZE) -> torch.Tensor:
    return video.render.render(drawn, round(drawn.duration_s * fps), size, fps)


def sound(drawn: Scene, sample_rate: int = 8000) -> torch.Tensor:
    return audio.render.render(drawn, round(drawn.duration_s * sample_rate), sample_rate)


def digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def test_the_world_is_pinned() -> None:
    """A change here changes every number ever reported on the world: make a new seed instead."""
    assert digest([dataclasses.asdict(scene(i, seed)) for seed in (0, 7) for i in range(-50, 50)]) == "cbf5e52c631f0eb2"
    levels = torch.stack([frames(drawn) for drawn in SCENES]).mul(8).round().to(torch.int8)
    assert digest(levels.flatten().tolist()) == "fac208bd71622984"
    levels = torch.stack([sound(drawn, 2000) for drawn in SCENES]).mul(8).round().to(torch.int8)
    assert digest(levels.flatten().tolist()) == "51adb0d6315771be"


def test_scenes_vary_with_index_and_seed_and_cover_the_world() -> None:
    assert scene(3) == scene(3)
    assert scene(3) != scene(4)
    assert scene(3) != scene(3, seed=1)
    many = [scene(i) for i in range(2000)]
    for name, count in {
        "shape": 3,
        "colour": 6,
        "motion": 4,
        "background": 3,
        "pitch": 3,
        "beeps": 3,
        "timbre": 2,
    }.items():
        values = [getattr(drawn, name) for drawn in many]
        shares = [values.count(value) / len(values) for value in set(values)]
        assert len(shares) == count
        assert max(abs(share - 1 / count) for share in shares) < 0.05, name


def test_duration_changes_times_only() -> None:
    short, long = scene(5, duration_s=1), scene(5, duration_s=4)
    assert caption(short) == caption(long)
    assert [4 * event.time_s for event in short.events] == pytest.approx([event.time_s for event in long.events])
    for drawn in (scene(i, duration_s=s) for i in range(50) for s in (0.2, 2, 30)):
        ends = [0.0] + [t for event in drawn.events for t in (event.time_s, event.time_s + event.duration_s)]
        assert ends == sorted(ends)
        assert ends[-1] < drawn.duration_s


def test_captions_name_every_attribute() -> None:
    for drawn in SCENES:
        for attribute in (drawn.shape, drawn.colour, drawn.motion, drawn.background, world.TIMES[drawn.beeps]):
            assert attribute in caption(drawn).split(".")[0]
        for attribute in (drawn.pitch, drawn.timbre, world.COUNTS[drawn.beeps].capitalize()):
            assert attribute in sound_caption(drawn)
    texts = {"A cyan square moves down on a grey background and flashes three times."}
    assert texts == {caption(SCENES[0])}
    assert sound_caption(SCENES[0]) == "Three buzzy beeps of middle pitch."


def test_ranges_shapes_and_types() -> None:
    for drawn in SCENES:
        x, y = frames(drawn), sound(drawn)
        assert x.shape == (3, 16, *SIZE)
        assert y.shape == (1, 16000)
        for data in (x, y):
            assert data.dtype is torch.float32
            assert data.abs().max() <= 1
        assert 0.3 < y.abs().max()
        edge = torch.cat([x[..., 0, :], x[..., -1, :], x[..., 0], x[..., -1]], -1)
        assert (edge - x[:, :1, 0, :1]).abs().max() < 1e-6  # the body stays in the frame


@pytest.mark.parametrize("fps", [5.0, 8.0, 29.97])
def test_flash_and_beep_start_with_the_event(fps: float) -> None:
    for drawn in SCENES[:12]:
        quiet = dataclasses.replace(drawn, events=(world.Event(1e6, "beep", 1.0),) * drawn.beeps)
        flashing = (frames(drawn, fps) - frames(quiet, fps)).abs().amax((0, 2, 3)) > 1e-6
        wanted = torch.zeros_like(flashing)
        for event in drawn.events:
            wanted[math.floor(event.time_s * fps) : math.ceil((event.time_s + event.duration_s) * fps)] = True
        assert torch.equal(flashing, wanted)
        rate = round(100 * fps) * 10
        heard = sound(drawn, rate)[0] != 0
        onsets = [i for i in range(1, len(heard)) if heard[i] and not heard[max(0, i - rate // 50) : i].any()]
        assert len(onsets) == drawn.beeps
        for onset, event in zip(onsets, drawn.events, strict=True):
            assert 0 <= onset / rate - event.time_s <= 1.001 / rate


def test_a_flash_keeps_its_energy_at_any_rate() -> None:
    for drawn in SCENES[:8]:
        lasts = sum(event.duration_s for event in drawn.events)
        for fps in (3.0, 8.0, 24.0):
            time_s = torch.arange(math.ceil(drawn.duration_s * fps)).double() / fps
            assert float(drawn.activity(time_s, 1 / fps).sum()) / fps == pytest.approx(lasts, rel=1e-9)


def test_renders_agree_over_sizes_and_rates() -> None:
    for drawn in SCENES[:8]:
        small, large = frames(drawn), frames(drawn, size=(4 * SIZE[0], 4 * SIZE[1]))
        pooled = torch.nn.functional.avg_pool3d(large, (1, 4, 4))
        assert (small - pooled).abs().mean() < 0.005  # anti-aliased: no jagged edge, no half-pixel shift
        assert torch.equal(sound(drawn, 16000)[:, ::2] == 0, sound(drawn, 8000) == 0)
    pure = next(drawn for drawn in SCENES if drawn.timbre == "pure")
    torch.testing.assert_close(sound(pure, 16000)[:, ::2], sound(pure, 8000))


@pytest.mark.parametrize("shape", world.SHAPES)
def test_the_body_is_where_and_as_large_as_the_scene_says(shape: str) -> None:
    drawn = dataclasses.replace(SCENES[0], shape=shape, background="black", colour="red")
    x = frames(drawn, size=(96, 128))
    weight = (x[0] + 1) / (x[0] + 1).amax((1, 2), keepdim=True)
    area = weight.sum((1, 2))
    torch.testing.assert_close(area, torch.full_like(area, math.pi * (drawn.radius * 96) ** 2), rtol=0.03, atol=0)
    columns, rows = torch.arange(128) + 0.5, torch.arange(96) + 0.5
    px, py = drawn.position(torch.arange(16).double() / 8)
    torch.testing.assert_close((weight * columns).sum((1, 2)) / area, px.float() * 128, atol=0.3, rtol=0)
    torch.testing.assert_close((weight * rows[:, None]).sum((1, 2)) / area, py.float() * 96, atol=0.3, rtol=0)


@pytest.mark.parametrize("motion", list(world.MOTIONS))
def test_motion_goes_where_the_caption_says(motion: str) -> None:
    drawn = next(drawn for drawn in SCENES if drawn.motion == motion)
    x, y = drawn.position(torch.tensor([0.0, drawn.duration_s]))
    moved = {"left": x[0] - x[1], "right": x[1] - x[0], "up": y[0] - y[1], "down": y[1] - y[0]}
    assert max(moved, key=lambda name: float(moved[name])) == motion


@pytest.mark.parametrize("timbre", world.TIMBRES)
def test_the_pitch_is_the_scenes(timbre: str) -> None:
    for pitch in world.PITCHES:
        drawn = dataclasses.replace(SCENES[0], pitch=pitch, timbre=timbre)
        first = drawn.events[0]
        heard = sound(drawn)[0, round(first.time_s * 8000) : round((first.time_s + first.duration_s) * 8000)]
        spectrum = torch.fft.rfft(heard, n=80000).abs()
        assert int(spectrum.argmax()) / 10 == pytest.approx(drawn.frequency, abs=2)
        partial = spectrum[round(2 * drawn.frequency * 10)] / spectrum.max()
        assert float(partial) == pytest.approx(0.5 if timbre == "buzzy" else 0, abs=0.05)


def test_every_attribute_changes_what_is_seen_or_heard() -> None:
    base = dataclasses.replace(SCENES[3], duration_s=2.0)
    values = {"shape": world.SHAPES, "colour": world.COLOURS, "motion": world.MOTIONS, "background": world.BACKGROUNDS}
    for name, options in values.items():
        seen = [frames(dataclasses.replace(base, **{name: option})) for option in options]
        assert all((a - b).abs().max() > 0.1 for a, b in itertools.combinations(seen, 2)), name
    for name, options in {"pitch": world.PITCHES, "timbre": world.TIMBRES}.items():
        heard = [sound(dataclasses.replace(base, **{name: option})) for option in options]
        assert all((a - b).abs().max() > 0.1 for a, b in itertools.combinations(heard, 2)), name
    for name in ("start", "travel", "radius"):
        other = (0.4, 0.4) if name == "start" else 1.2 * getattr(base, name)
        assert (frames(dataclasses.replace(base, **{name: other})) - frames(base)).abs().max() > 0.1, name
    for name in ("detune", "loudness"):
        assert (
            sound(dataclasses.replace(base, **{name: 0.8 * getattr(base, name)})) - sound(base)
        ).abs().max() > 0.1, name


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dataclasses.replace(SCENES[0], shape="star"), "shape='star' is not one of circle, square, triangle"),
        (lambda: dataclasses.replace(SCENES[0], beeps=1), "3 events do not make beeps=1"),
        (lambda: scene(0, duration_s=0), "duration_s=0 is not a positive"),
        (lambda: video.render.render(SCENES[0], 0, SIZE, 8), "frames=0 is not"),
        (lambda: video.render.render(SCENES[0], 1, (0, 8), 8), r"size=\(0, 8\) is not"),
        (lambda: video.render.render(SCENES[0], 1, SIZE, math.nan), "fps=nan is not"),
        (lambda: audio.render.render(SCENES[0], 0, 8000), "samples=0 is not"),
        (lambda: audio.render.render(SCENES[0], 10, 500), "sample_rate=500 Hz cannot carry"),
        (lambda: video.render.WorldDataModule(count=0), "count=0 is not a positive"),
    ],
)
def test_messages(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("module", "shape", "rate", "text"),
    [
        (
            video.render.WorldDataModule(count=6, val_count=3, frames=4, size=(8, 12), batch_size=4),
            (3, 4, 8, 12),
            8,
            caption,
        ),
        (
            audio.render.WorldDataModule(count=6, val_count=3, samples=4000, batch_size=4),
            (1, 4000),
            8000,
            sound_caption,
        ),
    ],
)
def test_a_data_module_yields_batches(module: Any, shape: tuple[int, ...], rate: float, text: Any) -> None:
    batches = list(module.train_dataloader())
    assert [len(batch["key"]) for batch in batches] == [4, 2]
    assert sorted(batches[0]) == ["caption", "duration_s", "key", "meta", "rate", "x"]
    batch = batches[0]
    assert batch["x"].shape == (4, *shape)
    for name, value in {"rate": rate, "duration_s": shape[1] / rate}.items():
        assert batch[name].dtype is torch.float32
        assert batch[name].tolist() == [value] * 4
    for key, sentence, meta in zip(batch["key"], batch["caption"], batch["meta"], strict=True):
        drawn = scene(int(key.split("-", 2)[2]), duration_s=shape[1] / rate)
        assert sentence == text(drawn)
        assert meta["shape"] == drawn.shape
    train = {key for batch in batches for key in batch["key"]}
    val = {key for batch in module.val_dataloader() for key in batch["key"]}
    assert (len(train), len(val), train & val) == (6, 3, set())
    assert [b["key"] for b in module.train_dataloader()] == [b["key"] for b in batches]  # the order is the seed's


def test_workers_give_the_same_batches() -> None:
    lists = []
    for workers in (0, 2):
        module = video.render.WorldDataModule(count=6, frames=2, size=(8, 8), batch_size=2, num_workers=workers)
        lists.append([(batch["key"], batch["x"]) for batch in module.train_dataloader()])
    for (keys, x), (other_keys, other) in zip(*lists, strict=True):
        assert keys == other_keys
        assert torch.equal(x, other)
