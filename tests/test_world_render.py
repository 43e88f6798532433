"""Renders of the world show and sound what its log says: at its times, at any size and rate, the same everywhere."""

import dataclasses
import hashlib
import itertools
import math
import multiprocessing
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

import audio.render
import audiovideo.world
import video.render
from mmdiff.world import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, Event, Scene, World
from mmdiff.world.vocabulary import ACTIONS, FREQUENCIES, SWEEP, SYMMETRY, TIMBRES

FULL = World()
SCENES = [FULL.scene(i) for i in range(60)]
SIZE = (24, 32)
MARGIN = 2e-5  # by which renders on two machines may differ


def frames(drawn: Scene, fps: float = 8.0, size: tuple[int, int] = SIZE) -> torch.Tensor:
    return video.render.render(drawn, math.ceil(drawn.duration_s * fps), size, fps)


def sound(drawn: Scene, sample_rate: int = 8000, channels: int = 1) -> torch.Tensor:
    return audio.render.render(drawn, round(drawn.duration_s * sample_rate), sample_rate, channels)


def changed(drawn: Scene, **values: Any) -> Scene:
    """The scene with values of its own, its bodies' or its events' replaced."""
    own = {name: value for name, value in values.items() if hasattr(drawn, name) and name not in ("shape", "colour")}
    bodies = {name: values[name] for name in ("shape", "colour", "radius") if name in values}
    events = {name: values[name] for name in ("timbre", "frequency", "loudness", "place", "grain") if name in values}
    return dataclasses.replace(
        drawn,
        bodies=tuple(dataclasses.replace(body, **bodies) for body in drawn.bodies),
        events=tuple(dataclasses.replace(event, **events) for event in drawn.events),
        **{name: value for name, value in own.items() if name not in bodies},
    )


def digest(data: Sequence[torch.Tensor], offset: float) -> str:
    """Of the values in quarters, none of which lies within `MARGIN` of where it would round otherwise."""
    levels = torch.stack([*data]).double() * 4 + offset
    assert (levels - levels.round()).abs().min() > 4 * MARGIN
    return hashlib.sha256(levels.floor().to(torch.int8).numpy().tobytes()).hexdigest()[:16]


def test_renders_are_pinned_within_a_margin() -> None:
    """A change here changes every number ever reported on the world: make a new seed instead."""
    assert digest([frames(drawn) for drawn in SCENES[:12]], 9 / 101) == "53e5c4c89a86f642"
    assert digest([sound(drawn, 4000, 2) for drawn in SCENES[:12]], 78 / 101) == "6cd5a455cb878039"


def test_ranges_shapes_and_types() -> None:
    for drawn in SCENES:
        x, y = frames(drawn), sound(drawn, channels=2)
        assert x.shape == (3, 16, *SIZE)
        assert y.shape == (2, 16000)
        for data in (x, y):
            assert data.dtype is torch.float32
            assert data.abs().max() <= 1
        assert (y.abs().max() > 0.2) == any(event.heard for event in drawn.events)


@pytest.mark.parametrize("fps", [5.0, 8.0, 29.97])
def test_a_blink_and_its_beep_start_with_the_event(fps: float) -> None:
    world = World(actions=("blink",), silent=0, offscreen=0)
    for drawn in map(world.scene, range(12)):
        still = dataclasses.replace(drawn, events=())
        blinking = (frames(drawn, fps) - frames(still, fps)).abs().amax((0, 2, 3)) > 1e-6
        wanted = torch.zeros_like(blinking)
        for event in drawn.events:
            wanted[math.floor(event.time_s * fps) : math.ceil(event.end_s * fps)] = True
        assert torch.equal(blinking, wanted)


@pytest.mark.parametrize("sample_rate", [4000, 8000, 44100])
def test_every_sound_starts_at_its_event_and_ends_with_it(sample_rate: int) -> None:
    for drawn in SCENES[:20]:
        heard = torch.zeros(round(2 * sample_rate), dtype=torch.bool)
        for event in drawn.events:
            if event.heard:
                heard[math.ceil(event.time_s * sample_rate) : math.ceil(event.end_s * sample_rate)] = True
        made = sound(drawn, sample_rate)[0] != 0
        assert not (made & ~heard).any()
        assert (made | ~heard).float().mean() > 0.999  # but where a wave crosses zero


def test_silent_events_are_seen_and_not_heard_and_bursts_the_reverse() -> None:
    world = World(actions=("blink", "turn"), silent=1, offscreen=1)
    for drawn in map(world.scene, range(20)):
        assert (frames(drawn) - frames(dataclasses.replace(drawn, events=drawn.bursts))).abs().max() > 0.1
        assert torch.equal(sound(drawn), sound(dataclasses.replace(drawn, events=drawn.bursts)))
        assert torch.equal(frames(drawn), frames(dataclasses.replace(drawn, events=drawn.acts)))
        assert sound(dataclasses.replace(drawn, events=drawn.acts)).abs().max() == 0


def test_renders_agree_over_sizes_and_rates() -> None:
    for drawn in SCENES[:24]:
        small, large = frames(drawn), frames(drawn, size=(4 * SIZE[0], 4 * SIZE[1]))
        pooled = torch.nn.functional.avg_pool3d(large, (1, 4, 4))
        assert (small - pooled).abs().mean() < 0.005  # anti-aliased: no jagged edge, no half-pixel shift
        if drawn.action != "blink":
            assert torch.equal(frames(drawn, 24.0)[:, ::3], small)
    for drawn in SCENES:
        fine, coarse = sound(drawn, 48000)[:, ::6], sound(drawn, 8000)
        highest = [SWEEP * event.frequency * max(audio.render.HARMONICS[event.timbre]) for event in drawn.acts]
        if max(highest, default=0) < 4000:  # all partials are in both
            torch.testing.assert_close(fine, coarse, atol=2e-5, rtol=0)


def test_nothing_aliases() -> None:
    """A quarter of the rate hears what a low-pass filter leaves of the whole."""
    for drawn in SCENES[:24]:
        if drawn.action == "turn" or not any(event.heard for event in drawn.events):
            continue
        spectrum = torch.fft.rfft(sound(drawn, 32000)[0].double())
        spectrum[8000:] = 0
        filtered = torch.fft.irfft(spectrum)[::4]
        level = sound(drawn, 8000)[0].double()
        assert (filtered - level).square().mean() < 0.003 * level.square().mean()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_body_is_where_and_as_large_as_the_scene_says(shape: str) -> None:
    drawn = changed(World(bodies=1, actions=("slide",)).scene(1), shape=shape, background="black", colour="red")
    x = frames(drawn, size=(96, 128))
    weight = (x[0] + 1) / (x[0] + 1).amax((1, 2), keepdim=True)
    area = weight.sum((1, 2))
    body = drawn.bodies[0]
    wanted = math.pi * (body.radius * 96) ** 2 * (0.7537 if shape == "triangle" else 1)
    torch.testing.assert_close(area, torch.full_like(area, wanted), rtol=0.03, atol=0)
    columns, rows = torch.arange(128) + 0.5, torch.arange(96) + 0.5
    px, py = torch.tensor([body.position(k / 8) for k in range(16)]).T
    torch.testing.assert_close((weight * columns).sum((1, 2)) / area, px * 128, atol=0.3, rtol=0)
    torch.testing.assert_close((weight * rows[:, None]).sum((1, 2)) / area, py * 96, atol=0.3, rtol=0)


@pytest.mark.parametrize("shape", SYMMETRY)
def test_a_whole_symmetry_looks_as_before_and_half_of_it_does_not(shape: str) -> None:
    centre, steps = np.full((3, 2), 16.2), math.pi / SYMMETRY[shape] * np.arange(3)
    cover = video.render.coverage(shape, centre, steps, 7.0, (32, 32))
    assert np.abs(cover[2] - cover[0]).max() < 1e-4
    assert np.abs(cover[1] - cover[0]).max() > 0.5
    clockwise = video.render.coverage("triangle", centre[:1], np.array([0.3]), 8.0, (32, 32))[0]
    top = np.flatnonzero(clockwise.sum(1) > 0.2)[0]
    assert (clockwise[top] * (np.arange(32) + 0.5)).sum() / clockwise[top].sum() > 16.5  # its corner went right


def test_turning_bodies_turn_and_distractors_do_not() -> None:
    drawn = next(one for one in map(World(actions=("turn",), distractors=1).scene, range(99)) if len(one.bodies) == 2)
    mover, other = (drawn.bodies[0], drawn.bodies[1])
    assert not other.moves
    background = torch.tensor(BACKGROUNDS[drawn.background])[:, None, None, None] * 2 - 1
    x = frames(drawn, size=(64, 64)) - background
    px, py = (round(64 * place) for place in other.position(0.0))
    near = x[..., max(0, py - 6) : py + 6, max(0, px - 6) : px + 6]
    assert near.abs().max() > 0.3
    assert (near - near[:, :1]).abs().max() == 0
    unturned = frames(dataclasses.replace(drawn, events=drawn.bursts), size=(64, 64)) - background
    first, last = math.floor(drawn.acts[0].time_s * 8), math.ceil(drawn.acts[0].end_s * 8)
    assert torch.equal(x[:, : first + 1], unturned[:, : first + 1])
    assert (x[:, last] - unturned[:, last]).abs().max() > 0.5
    assert mover.moves


@pytest.mark.parametrize("timbre", sorted(set(TIMBRES.values())))
def test_pitch_and_timbre_are_the_events(timbre: str) -> None:
    partials = {"pure": (0, 0), "hollow": (0, 1 / 3), "buzzy": (1 / 2, 1 / 3)}[timbre]
    for frequency in FREQUENCIES.values():
        event = Event(0.5, "blink", 0.2, frequency=frequency, timbre=timbre)
        drawn = dataclasses.replace(SCENES[0], action="blink", events=(event,))
        heard = sound(drawn)[0, 4040:5560] * torch.hann_window(1520)
        spectrum = torch.fft.rfft(heard, n=80000).abs()
        assert int(spectrum.argmax()) / 10 == pytest.approx(frequency, abs=2)
        for number, wanted in zip((2, 3), partials, strict=True):
            partial = spectrum[round(number * frequency * 10)] / spectrum.max()
            assert float(partial) == pytest.approx(wanted, abs=0.02)


def test_knocks_die_away_and_sweeps_rise() -> None:
    def cycles(kind: str, start: int, stop: int) -> tuple[float, float]:
        event = Event(0.5, kind, 0.25, frequency=300.0)
        part = sound(dataclasses.replace(SCENES[0], action=kind, events=(event,)))[0, 4000 + start : 4000 + stop]
        return float((part[1:] * part[:-1] < 0).sum()) / 2, float(part.square().mean().sqrt())

    for kind, rise, fall in (("blink", 1.0, 1.0), ("bounce", 1.0, math.exp(0.1 / 0.03)), ("turn", 1.5**0.4, 1.0)):
        (early, loud), (late, quiet) = cycles(kind, 400, 800), cycles(kind, 1200, 1600)
        assert late / early == pytest.approx(rise, abs=0.04)
        assert loud / quiet == pytest.approx(fall, rel=0.05)


def test_places_are_heard_in_stereo_and_power_is_kept() -> None:
    for drawn in SCENES:
        both, one = sound(drawn, channels=2), sound(drawn)[0]
        torch.testing.assert_close(both.square().sum(0).sqrt(), one.abs(), atol=1e-6, rtol=0)
        for event in drawn.events:
            if event.heard and drawn.action != "bounce":
                part = both[:, math.ceil(event.time_s * 8000) : math.ceil(event.end_s * 8000)]
                left, right = part.square().sum(1).sqrt()
                assert math.atan2(right, left) * 2 / math.pi == pytest.approx(event.place, abs=1e-4)


def test_every_attribute_changes_what_is_seen_or_heard() -> None:
    base = next(one for one in SCENES if one.action == "blink" and any(e.heard for e in one.acts) and one.bursts)
    for name, options in {"shape": SHAPES, "colour": COLOURS, "background": BACKGROUNDS}.items():
        seen = [frames(changed(base, **{name: option})) for option in options]
        assert all((a - b).abs().max() > 0.1 for a, b in itertools.combinations(seen, 2)), name
    assert (frames(changed(base, radius=0.09)) - frames(changed(base, radius=0.11))).abs().max() > 0.1
    heard = [sound(changed(base, timbre=option)) for option in set(TIMBRES.values())]
    assert all((a - b).abs().max() > 0.1 for a, b in itertools.combinations(heard, 2))
    for name, one, other in (("frequency", 300, 310), ("loudness", 0.5, 0.6), ("grain", 0.2, 0.3)):
        difference = sound(changed(base, **{name: one})) - sound(changed(base, **{name: other}))
        assert difference.abs().max() > 0.05, name
    moved = [frames(dataclasses.replace(base, bodies=tuple(
        dataclasses.replace(body, velocity=(0.2 * way[0], 0.2 * way[1])) for body in base.movers)))
        for way in MOTIONS.values()]  # fmt: skip
    assert all((a - b).abs().max() > 0.1 for a, b in itertools.combinations(moved, 2))
    assert {one.action for one in SCENES} == set(ACTIONS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: video.render.render(SCENES[0], 0, SIZE, 8), "frames=0 is not"),
        (lambda: video.render.render(SCENES[0], 1, (0, 8), 8), r"size=\(0, 8\) is not"),
        (lambda: video.render.render(SCENES[0], 1, SIZE, math.nan), "fps=nan is not"),
        (lambda: audio.render.render(SCENES[0], 0, 8000), "samples=0 is not"),
        (lambda: audio.render.render(SCENES[0], 10, 0), "sample_rate=0 is not"),
        (lambda: audio.render.render(SCENES[0], 10, 8000, 3), "channels=3 is neither 1 nor 2"),
        (lambda: audio.render.render(SCENES[4], 10, 500), "sample_rate=500 Hz cannot carry"),
    ],
)
def test_messages(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def drawn_a_second(start: int) -> float:
    """Clips for each second of processor time, so that what else runs on the machine counts little."""
    module = audiovideo.world.WorldDataModule(count=start + 200, sample_rate=16000, channels=2, world=FULL)
    begin = time.process_time()
    for i in range(start, start + 200):
        module.train[i]
    return 200 / (time.process_time() - begin)


def test_two_processes_draw_200_clips_with_sound_a_second() -> None:
    """16 frames of 32x32 and 2 s of stereo at 16 kHz, captions and meta included, on two cores."""
    with multiprocessing.get_context("fork").Pool(2) as pool:
        rates = pool.map(drawn_a_second, (0, 200), chunksize=1)
    assert sum(rates) >= 200, rates
