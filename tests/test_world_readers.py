"""Readers of the world measure from pixels and samples alone what its scenes hold: exactly, and at chance on others."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch

import audio.render
import audio.world_reader
import video.render
import video.world_reader
from mmdiff.world import Scene, World, agreement, caption, joint_caption, parse
from mmdiff.world.labels import HEARD, SEEN

WORLD = World(offscreen=0.5)
FPS, RATE = 8.0, 8000


@dataclass
class Readings:
    """What captions ask, and what is read of the renders of the same scenes."""

    asked: list[dict[str, str]] = field(default_factory=list)
    read: list[dict[str, str]] = field(default_factory=list)
    late_s: dict[str, list[float]] = field(default_factory=dict)  # errors of the times of events, by kind
    places: list[float] = field(default_factory=list)  # errors, of 1
    pitches: list[float] = field(default_factory=list)  # errors, relative

    def add(self, drawn: Scene, size: int = 32, noise: float = 0.0, sample_rate: int = RATE, channels: int = 2) -> None:
        x = video.render.render(drawn, 16, (size, size), 8 * 2 / drawn.duration_s)
        y = audio.render.render(drawn, round(drawn.duration_s * sample_rate), sample_rate, channels)
        generator = torch.Generator().manual_seed(len(self.asked))
        x, y = (
            data + scale * torch.randn(data.shape, generator=generator) for data, scale in ((x, noise), (y, noise / 10))
        )
        x = ((x.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1  # as a file holds it
        y = (y.clamp(-1, 1) * 32767).round() / 32767
        seen = video.world_reader.read(x, 8 * 2 / drawn.duration_s)
        heard = audio.world_reader.read(y, sample_rate)
        self.asked.append(parse(joint_caption(drawn, channels == 2)))
        self.read.append({**seen.attributes, **heard.attributes})
        if len(seen.times_s) == len(drawn.acts):
            for time_s, event in zip(seen.times_s, drawn.acts, strict=True):
                self.late_s.setdefault(f"seen {event.type}", []).append(time_s - event.time_s)
        events = [event for event in drawn.events if event.heard]
        if len(heard.sounds) == len(events):
            for sound, event in zip(heard.sounds, events, strict=True):
                self.late_s.setdefault(f"heard {event.type}", []).append(sound.time_s - event.time_s)
                if sound.place is not None:
                    self.places.append(sound.place - event.place)
                if event.type != "burst":
                    self.pitches.append(sound.frequency / event.frequency - 1)

    def check(self) -> None:
        """At least 99.5 % of every attribute and every time within half a frame seen, 3 ms heard."""
        wrong = [(i, a, r) for i, (a, r) in enumerate(zip(self.asked, self.read, strict=True)) if a != r][:5]
        shares = agreement(self.asked, self.read)
        assert set(shares) == {*SEEN, *HEARD}
        assert min(shares.values()) >= 0.995, (shares, wrong)
        assert sum(a == r for a, r in zip(self.asked, self.read, strict=True)) >= 0.98 * len(self.asked)
        for kind, errors in self.late_s.items():
            most = 0.0625 if kind.startswith("seen") else 0.003
            assert sum(abs(error) <= most for error in errors) >= 0.995 * len(errors), (kind, max(map(abs, errors)))
        assert sum(abs(error) <= 0.01 for error in self.places) >= 0.995 * len(self.places)
        assert sum(abs(error) <= 0.005 for error in self.pitches) >= 0.995 * len(self.pitches)


def readings(scenes: Sequence[Scene], **how: float) -> Readings:
    found = Readings()
    for drawn in scenes:
        found.add(drawn, **how)  # type: ignore[arg-type]
    return found


@pytest.fixture(scope="module")
def usual() -> Readings:
    return readings([WORLD.scene(i) for i in range(300)])


def test_readers_are_right_on_300_renders(usual: Readings) -> None:
    usual.check()
    assert set(usual.late_s) == {
        f"{how} {kind}" for how in ("seen", "heard") for kind in ("blink", "bounce", "turn")
    } | {"heard burst"}


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_readers_are_right_on_10000_renders() -> None:
    """99.5 % of each attribute: pytest --slow tests/test_world_readers.py -k 10000 (some 3 minutes on a core)."""
    readings([WORLD.scene(i, seed=1) for i in range(10_000)]).check()


def test_readers_are_at_chance_on_shuffled_captions(usual: Readings) -> None:
    """What is read agrees with the captions of other clips as often as two draws of each value do."""
    pairs = [(asked, read) for step in range(1, 30) for asked, read in zip(
        usual.asked, usual.read[step:] + usual.read[:step], strict=True)]  # fmt: skip
    shares = agreement(*zip(*pairs, strict=True))
    for name, share in shares.items():
        asked, read = (Counter(one.get(name) for one in ones) for ones in (usual.asked, usual.read))
        some = len(usual.asked) - asked[None]
        chance = sum(
            count / some * read[value] / len(usual.read) for value, count in asked.items() if value is not None
        )
        assert share == pytest.approx(chance, abs=0.03), name
        assert share < 0.75, name


@pytest.mark.parametrize(
    "how",
    [{"size": 64}, {"size": 32, "noise": 0.1}, {"sample_rate": 16000, "noise": 0.05}, {"sample_rate": 44100}],
    ids=str,
)
def test_readers_are_right_at_other_sizes_and_rates_and_in_noise(how: dict[str, float]) -> None:
    shares = agreement(*(lambda found: (found.asked, found.read))(readings([WORLD.scene(i) for i in range(16)], **how)))
    assert min(shares.values()) >= 0.95, shares


def test_mono_is_read_without_places_and_a_second_as_well_as_two() -> None:
    found = readings([WORLD.scene(i, duration_s=1.0) for i in range(40)], channels=1)
    assert "pan" not in found.read[0]
    assert min(agreement(found.asked, found.read).values()) >= 0.95


def test_wide_clips_are_read() -> None:
    for i in range(20):
        drawn = WORLD.scene(i)
        seen = video.world_reader.read(video.render.render(drawn, 32, (48, 80), 16.0), 16.0)
        assert seen.attributes == parse(caption(drawn))


def test_measures_are_those_of_the_bodies() -> None:
    for drawn in map(WORLD.scene, range(25)):
        seen = video.world_reader.read(video.render.render(drawn, 16, (64, 64), FPS), FPS)
        assert len(seen.bodies) == len(drawn.bodies)
        for body in seen.bodies:
            first = torch.tensor([other.position(0.0) for other in drawn.bodies])
            gaps = (first - torch.tensor(body.places[0])).norm(dim=1)
            own = drawn.bodies[int(gaps.argmin())]
            assert gaps.min() < 0.01
            assert (body.shape, body.colour, body.size, body.moves) == (own.shape, own.colour, own.size, own.moves)
            assert body.radius == pytest.approx(own.radius, rel=0.04)
            way = drawn.duration_s * max(map(abs, own.velocity))
            assert body.way == pytest.approx(way, abs=0.01)


def test_each_change_of_a_scene_is_read() -> None:
    """The reader says what is shown, not what is usual: one thing is changed and that alone is read otherwise."""
    drawn = next(one for one in map(WORLD.scene, range(99)) if one.action == "blink" and len(one.bodies) == 2)

    def seen(scene: Scene) -> dict[str, str]:
        return video.world_reader.read(video.render.render(scene, 16, (32, 32), FPS), FPS).attributes

    def alike(**values: str) -> Scene:
        return dataclasses.replace(drawn, bodies=tuple(dataclasses.replace(body, **values) for body in drawn.bodies))

    before = seen(drawn)
    for name in ("shape", "colour"):
        for value in SEEN[name]:
            assert seen(alike(**{name: value})) == {**before, name: value}
    for value in SEEN["background"]:
        assert seen(dataclasses.replace(drawn, background=value)) == {**before, "background": value}
    fewer = dataclasses.replace(drawn, bodies=drawn.bodies[:1])
    assert seen(fewer) == {**before, "count": "one"}
    still = seen(dataclasses.replace(drawn, events=()))
    assert still == {name: value for name, value in before.items() if name != "times"} | {"action": "slide"}


def test_nothing_is_read_of_nothing() -> None:
    assert video.world_reader.read(torch.full((3, 16, 32, 32), -1.0), FPS).attributes == {"background": "black"}
    assert audio.world_reader.read(torch.zeros(2, 16000), RATE).attributes == {"sound": "none", "burst": "none"}
    noise = video.world_reader.read(torch.randn(3, 16, 32, 32).clamp(-1, 1), FPS)
    assert "count" not in noise.attributes or noise.attributes["count"] not in ("two", "three")
    audio.world_reader.read(torch.randn(1, 16000).clamp(-1, 1), RATE)
    audio.world_reader.read(torch.ones(1, 1), RATE)


def test_messages() -> None:
    with pytest.raises(ValueError, match=r"clip of shape \(3, 32, 32\) is not \(3, T, H, W\)"):
        video.world_reader.read(torch.zeros(3, 32, 32), FPS)
    with pytest.raises(ValueError, match=r"sound of shape \(3, 800\) is not \(1, T\) or \(2, T\)"):
        audio.world_reader.read(torch.zeros(3, 800), RATE)
