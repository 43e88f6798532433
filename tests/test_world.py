"""The world is the same everywhere, its log agrees with itself, and its captions say what is in it."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mmdiff.world import (
    EASY,
    Body,
    Event,
    Scene,
    World,
    agreement,
    attributes,
    caption,
    is_held_out,
    joint_caption,
    parse,
    scene,
    sound_caption,
)
from mmdiff.world.labels import HEARD, SEEN
from mmdiff.world.vocabulary import EXTENTS, FREQUENCIES, MOTIONS, PAN_EDGES, PITCHES, SIZES, TIMBRES

ROOT = Path(__file__).resolve().parent.parent
FULL = World()
SCENES = [FULL.scene(i) for i in range(600)]
DIGEST = "4bd6c48351e8db0e"
LOGS = """
import dataclasses, hashlib, json
from mmdiff.world.draw import EASY, World
logs = [dataclasses.asdict(world.scene(i, seed, s)) for world in (EASY, World(), World(held_out=("colour", "shape"),
        split="held-out")) for seed, s in ((0, 2.0), (7, 0.7)) for i in range(-50, 50)]
print(hashlib.sha256(json.dumps(logs).encode()).hexdigest()[:16])
"""


def changed(drawn: Any, **values: Any) -> Any:
    return dataclasses.replace(drawn, **values)


def test_the_log_is_pinned_to_the_last_bit() -> None:
    """A change here changes every number ever reported on the world: make a new seed instead."""
    run = subprocess.run([sys.executable, "-c", LOGS], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == DIGEST


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_the_log_is_the_same_on_other_pythons_with_nothing_installed(version: str) -> None:
    pyenv = sorted(Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob(f"versions/{version}.*/bin/python"))
    pythons = [str(path) for path in pyenv] + [path for path in [shutil.which(f"python{version}")] if path]
    works = [
        path for path in pythons if not subprocess.run([path, "-c", ""], check=False, capture_output=True).returncode
    ]
    if not works:
        pytest.skip(f"no Python {version} here")
    command = [works[0], "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{LOGS}"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == DIGEST


def test_scenes_vary_with_index_seed_and_world() -> None:
    assert FULL.scene(3) == SCENES[3]
    assert SCENES[3] != SCENES[4]
    assert SCENES[3] != FULL.scene(3, seed=1)
    assert scene(3) == EASY.scene(3) != SCENES[3]
    assert scene(3, world=FULL) == SCENES[3]
    assert len({json.dumps(dataclasses.asdict(drawn)) for drawn in SCENES}) == len(SCENES)


def test_every_value_of_every_attribute_is_as_frequent_as_the_settings_say() -> None:
    found = [attributes(FULL.scene(i)) for i in range(3000)]
    for name in ("size", "colour", "motion", "speed", "background", "action", "count"):
        shares = Counter(one[name] for one in found)
        assert set(shares) == set(SEEN[name]), name
        assert max(abs(share / 3000 - 1 / len(shares)) for share in shares.values()) < 0.04, name
    for name, values in {**SEEN, **HEARD}.items():
        assert {one[name] for one in found if name in one} == set(values), name
    drawn = [FULL.scene(i) for i in range(3000)]
    assert sum(bool(one.bursts) for one in drawn) / 3000 == pytest.approx(FULL.offscreen, abs=0.03)
    acting = [one for one in drawn if one.acts]
    silent = [one for one in acting if not any(event.heard for event in one.acts)]
    assert len(silent) / len(acting) == pytest.approx(FULL.silent, abs=0.03)
    room = [one for one in drawn if len(one.movers) < 3]
    assert sum(len(one.bodies) > len(one.movers) for one in room) / len(room) == pytest.approx(0.3, abs=0.04)


def test_settings_restrict_what_is_drawn() -> None:
    plain = [scene(i) for i in range(200)]
    assert all((len(one.bodies), one.action, one.size, one.speed, one.wording) == (1, "blink", "large", "fast", 0)
               for one in plain)  # fmt: skip
    assert {len(one.acts) for one in plain} == {1, 2, 3}
    assert all(len(one.acts) == 1 and not one.bursts for one in (changed(EASY, times=1).scene(i) for i in range(50)))
    two = [World(bodies=2, actions=("turn", "slide"), distractors=1, silent=1, offscreen=1).scene(i) for i in range(99)]
    assert {len(one.bodies) for one in two} == {2}
    assert {one.action for one in two} == {"turn", "slide"}
    assert all(one.bursts and not any(event.heard for event in one.acts) for one in two)
    middles = [abs(sum(one.movers[0].position(t)[MOTIONS[one.motion][0] == 0] for t in (0, 2)) / 2 - 0.5)
               for one in (World(bodies=1, actions=("slide",), roam=0.1).scene(i) for i in range(99))]  # fmt: skip
    assert 0.01 < max(middles) < 0.025


def test_bodies_stay_in_the_box_and_apart() -> None:
    for drawn in SCENES:
        for step in range(21):
            time_s = drawn.duration_s * step / 20
            places = [body.position(time_s) for body in drawn.bodies]
            for body, (x, y) in zip(drawn.bodies, places, strict=True):
                left, right, top, bottom = (body.radius * extent for extent in EXTENTS[body.shape])
                if drawn.action == "turn":
                    left = right = top = bottom = max(left, right, top, bottom)
                assert min(x - left, 1 - x - right, y - top, 1 - y - bottom) > -1e-9, drawn
            for i, (x, y) in enumerate(places):
                for u, v in places[:i]:
                    assert max(abs(x - u), abs(y - v)) > 0.29


def test_a_bounce_is_where_a_body_touches_the_wall() -> None:
    for drawn in SCENES:
        for event in drawn.acts:
            if event.type != "bounce":
                continue
            assert event.body is not None
            body = drawn.bodies[event.body]
            assert event.time_s == body.bounce_s
            x, y = body.position(event.time_s)
            extents = [body.radius * extent for extent in EXTENTS[body.shape]]
            gaps = dict(
                zip(MOTIONS, (x - extents[0], 1 - x - extents[1], y - extents[2], 1 - y - extents[3]), strict=True)
            )
            assert gaps[drawn.motion] == pytest.approx(0, abs=1e-9)
            later = body.position(event.time_s + 0.1)
            assert later == pytest.approx(body.position(event.time_s - 0.1), abs=1e-12)


def test_sounds_follow_from_bodies() -> None:
    for drawn in SCENES:
        for event in drawn.acts:
            movers = drawn.movers if event.body is None else (drawn.bodies[event.body],)
            assert event.place == pytest.approx(sum(body.position(event.time_s)[0] for body in movers) / len(movers))
            exact = FREQUENCIES[PITCHES[drawn.size]] * SIZES[drawn.size] / drawn.movers[0].radius
            assert event.frequency == pytest.approx(exact)
            assert abs(event.frequency / FREQUENCIES[PITCHES[drawn.size]] - 1) < 0.032
            assert event.timbre == TIMBRES[drawn.colour]
        heard = [event.place for event in drawn.acts if event.heard]
        if heard:  # never on the edge between two words
            assert min(abs(sum(heard) / len(heard) - edge) for edge in PAN_EDGES) >= 0.02
        assert all(min(event.place, 1 - event.place) < 0.16 for event in drawn.bursts)


@pytest.mark.parametrize("duration_s", [0.2, 2.0, 30.0])
def test_duration_changes_times_only_and_events_never_meet(duration_s: float) -> None:
    for i, usual in enumerate(SCENES[:200]):
        drawn = FULL.scene(i, duration_s=duration_s)
        assert joint_caption(drawn, True) == joint_caption(usual, True)
        times_s = [event.time_s / duration_s for event in drawn.events]
        assert times_s == pytest.approx([event.time_s / 2 for event in usual.events])
        edges = [t for event in drawn.events for t in (event.time_s, event.end_s)]
        assert edges == sorted(edges)
        assert all(0 < t < duration_s for t in edges)
        assert drawn.bodies[0].position(duration_s) == pytest.approx(usual.bodies[0].position(2.0))


def test_blinks_keep_their_length_at_any_rate_and_turns_add_up() -> None:
    for drawn in SCENES[:60]:
        lasts = sum(event.duration_s for event in drawn.acts if event.type == "blink")
        for fps in (3.0, 8.0, 24.0):
            shares = [drawn.blinking(k / fps, 1 / fps) for k in range(math.ceil(2 * fps))]
            assert sum(shares) / fps == pytest.approx(lasts, rel=1e-9)
        assert drawn.turned(drawn.duration_s) == (len(drawn.acts) if drawn.action == "turn" else 0)
        assert drawn.turned(0) == 0


def test_a_parser_gives_back_what_a_caption_asks_for() -> None:
    assert {drawn.wording for drawn in SCENES} == {0, 1, 2}
    for drawn in SCENES:
        for stereo in (False, True):
            found = attributes(drawn, stereo)
            assert parse(joint_caption(drawn, stereo)) == found
            assert parse(sound_caption(drawn, stereo)) == {k: v for k, v in found.items() if k in HEARD}
        assert parse(caption(drawn)) == {k: v for k, v in found.items() if k in SEEN}
        assert ("pan" in attributes(drawn, False)) == ("burst_pan" in attributes(drawn, False)) is False


def test_captions_read_like_this() -> None:
    drawn = next(one for one in SCENES if one.bursts and len(one.movers) == 2 and attributes(one)["sound"] == "beep")
    said = [joint_caption(changed(drawn, wording=wording), True) for wording in range(3)]
    assert said == [
        "Two large magenta squares move down fast on a black background and blink three times, "
        "with the sound of a noise burst on the right, then three low buzzy beeps on the left.",
        "A noise burst from the right, then three buzzy beeps of low pitch from the left: "
        "on a black background, two large magenta squares move down fast and blink three times.",
        "Video of two large magenta squares that move down fast and blink three times, on a black background; "
        "there is the sound of a noise burst, right, then three low buzzy beeps, left.",
    ]
    assert len({caption(changed(drawn, wording=wording)) for wording in range(3)}) == 3
    assert caption(scene(0)) == "A large yellow cross moves right fast on a navy background and blinks once."
    assert sound_caption(scene(0)) == "One low pure beep."


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("three low beeps, then a noise burst, left",
         {"sound": "beep", "number": "three", "pitch": "low", "burst": "after", "burst_pan": "left"}),
        ("A red circle moving to the left", {"count": "one", "colour": "red", "shape": "circle", "motion": "left",
                                             "action": "slide"}),
        ("  TWO Small  squares, turning twice ", {"count": "two", "size": "small", "shape": "square", "action": "turn",
                                                  "times": "twice"}),
        ("a quick cross on a navy background", {"count": "one", "speed": "fast", "shape": "cross",
                                                "background": "navy"}),
        ("silence", {"sound": "none", "burst": "none"}),
        ("a knock in the center", {"sound": "knock", "number": "one", "pan": "centre", "burst": "none"}),
        ("a dog barks", {}),
    ],
)  # fmt: skip
def test_a_parser_reads_what_people_write(text: str, wanted: dict[str, str]) -> None:
    assert parse(text) == wanted


@pytest.mark.parametrize("pair", [("colour", "shape"), ("motion", "speed"), ("number", "timbre"), ("size", "action")])
def test_combinations_are_held_out_by_the_stated_rule(pair: tuple[str, str]) -> None:
    values = {**SEEN, **HEARD}
    first, second = (values[name] for name in pair)
    most = max(len(first), len(second))
    rule = {(a, b) for i, a in enumerate(first) for j, b in enumerate(second) if (i - j) % most == 0}
    assert len(rule) == min(len(first), len(second))
    parts = {}
    for split in ("seen", "held-out"):
        world = World(held_out=pair, split=split)
        drawn = [world.scene(i) for i in range(400)]
        assert {is_held_out(one, pair) for one in drawn} == {split == "held-out"}
        found = [attributes(one) for one in drawn]
        parts[split] = {tuple(one[name] for name in pair) for one in found if all(name in one for name in pair)}
    possible = {(a, b) for a in first for b in second}
    assert parts["held-out"] == rule
    assert parts["seen"] == possible - rule
    for place in (0, 1):  # every word is learned, only not together
        assert {combination[place] for combination in parts["seen"]} == {c[place] for c in possible}


def test_the_held_out_colours_are_these() -> None:
    world = World(held_out=("colour", "shape"), split="held-out")
    assert {(one.colour, one.shape) for one in map(world.scene, range(99))} == {
        ("red", "circle"), ("green", "square"), ("blue", "triangle"), ("yellow", "cross")
    }  # fmt: skip


def test_agreement_counts_what_was_asked() -> None:
    asked = [{"colour": "red", "shape": "cross"}, {"colour": "blue"}]
    assert agreement(asked, [{"colour": "red", "size": "small"}, {"colour": "red"}]) == {"colour": 0.5, "shape": 0.0}
    with pytest.raises(ValueError, match="2 captions and 1 readings are not pairs"):
        agreement(asked, asked[:1])


BODY = Body("circle", "red", "large", 0.1, (0.5, 0.5), (0.1, 0.0))


def plain(**values: Any) -> Scene:
    return Scene(**{"bodies": (BODY,), "background": "black", "motion": "right", "speed": "slow", "action": "blink",
                    "events": (Event(0.5, "blink", 0.1),), "duration_s": 2.0, **values})  # fmt: skip


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: changed(BODY, shape="star"), "shape='star' is not one of circle, square, triangle, cross"),
        (lambda: changed(BODY, colour="pink"), "colour='pink' is not one of red"),
        (lambda: changed(BODY, size="tiny"), "size='tiny' is not one of small, large"),
        (lambda: Event(0.5, "bang", 0.1), "type='bang' is not one of blink, bounce, turn, burst"),
        (lambda: Event(0.5, "blink", 0.1, timbre="harsh"), "timbre='harsh' is not one of"),
        (lambda: plain(background="pink"), "background='pink' is not one of black"),
        (lambda: plain(duration_s=0), "duration_s=0 is not a positive"),
        (lambda: plain(bodies=(changed(BODY, velocity=(0.0, 0.0)),)), "no body of the scene moves"),
        (lambda: plain(action="turn"), "a blink is in a scene with action='turn'"),
        (lambda: plain(events=(Event(1, "blink", 0.1), Event(0.5, "blink", 0.1))), "not in the order of their times"),
        (lambda: scene(0, duration_s=math.nan), "duration_s=nan is not a positive"),
        (lambda: World(bodies=4), "bodies=4 is outside 1 to 3"),
        (lambda: World(times=0), "times=0 is outside 1 to 3"),
        (lambda: World(wordings=9), "wordings=9 is outside 1 to 3"),
        (lambda: World(actions=()), r"actions=\(\) is empty; name some of slide, blink, bounce, turn"),
        (lambda: World(sizes=("huge",)), "sizes='huge' is not one of small, large"),
        (lambda: World(silent=1.5), r"silent=1.5 is outside \[0, 1\]"),
        (lambda: World(held_out=("colour", "colour")), "does not name two attributes"),
        (lambda: World(held_out=("colour", "mood")), "held_out='mood' is not one of count, size"),
        (lambda: World(split="seen"), "split='seen' needs held_out"),
        (lambda: World(held_out=("colour", "shape"), split="none"), "split='none' is not one of all, seen, held-out"),
        (lambda: World(actions=("slide",), held_out=("number", "timbre"), split="held-out").scene(0), "no scene of"),
    ],
)  # fmt: skip
def test_messages(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
