"""Drawing a scene: a world's settings, and what follows of them from a seed and an index.

Only +, -, *, / and random.Random.random() are used: all are the same, to the last bit, on every machine and Python.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .labels import HELD_OUT_CHOICES, is_held_out
from .log import Body, Event, Scene, check_duration, check_word
from .vocabulary import (
    ACTIONS,
    BACKGROUNDS,
    COLOURS,
    EXTENTS,
    FREQUENCIES,
    MOTIONS,
    PAN_EDGES,
    PITCHES,
    SHAPES,
    SIZES,
    SPEEDS,
    SYMMETRY,
    TIMBRES,
    TIMES,
    mean,
)

Split = Literal["all", "seen", "held-out"]
LANES = ((0.5,), (0.29, 0.71), (0.17, 0.5, 0.83))  # places across the motion for 1, 2 and 3 bodies, which never meet
STRAY = (0.3, 0.04, 0.0)  # how far from its lane's place a body may be
MARGIN = 0.17  # of a path from the frame's edge: what the largest body needs
WORDINGS = 3


@dataclass(frozen=True)
class World:
    """Settings of a world, by default all there is; a world, a seed and an index make a scene.

    bodies:      the most there are in a scene, 1 to 3.
    actions:     what bodies do besides moving, each as often: slide, blink, bounce, turn.
    sizes, speeds: of bodies, each as often.
    times:       how often at most they blink or turn, 1 to 3. A body bounces once.
    silent:      share of scenes whose bodies make no sound.
    offscreen:   share of scenes with a noise burst, left or right, that nothing seen makes.
    distractors: share of scenes with room for one that have a still body of another shape and colour, never captioned.
    wordings:    in how many ways captions say the same, 1 to 3.
    roam:        how far from the middle paths lie, along the motion, as a share of what the frame has room for.
    held_out:    two attributes, such as [colour, shape], some of whose combinations are held out (`is_held_out`).
    split:       of the scenes `all`, those of `seen` or those of `held-out` combinations.
    Raises ValueError on a setting that is not one of these.
    """

    bodies: int = 3
    actions: tuple[str, ...] = ACTIONS
    sizes: tuple[str, ...] = tuple(SIZES)
    speeds: tuple[str, ...] = tuple(SPEEDS)
    times: int = 3
    silent: float = 0.1
    offscreen: float = 0.3
    distractors: float = 0.3
    wordings: int = WORDINGS
    roam: float = 1.0
    held_out: tuple[str, str] | None = None
    split: Split = "all"

    def __post_init__(self) -> None:
        for name, most in (("bodies", len(LANES)), ("times", len(TIMES)), ("wordings", WORDINGS)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name}={getattr(self, name)} is outside 1 to {most}")
        for name, words in (("actions", ACTIONS), ("sizes", SIZES), ("speeds", SPEEDS)):
            if not getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)} is empty; name some of {', '.join(words)}")
            for word in getattr(self, name):
                check_word(name, word, words)
        for name in ("silent", "offscreen", "distractors", "roam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is outside [0, 1]; it is a share")
        check_word("split", self.split, ("all", "seen", "held-out"))
        if self.held_out is not None:
            if len(self.held_out) != 2 or self.held_out[0] == self.held_out[1]:
                raise ValueError(f"held_out={self.held_out} does not name two attributes, such as colour and shape")
            for name in self.held_out:
                check_word("held_out", name, HELD_OUT_CHOICES)
        elif self.split != "all":
            raise ValueError(f"split={self.split!r} needs held_out, the two attributes whose combinations are held out")

    def scene(self, index: int, seed: int = 0, duration_s: float = 2.0) -> Scene:
        """The scene number `index` (any integer); of all that is in it only times depend on `duration_s`.

        Raises ValueError if `duration_s` is not positive, or if no scene of 10,000 draws fits the split.
        """
        check_duration(duration_s)
        # Of Python's generators only random() is promised to stay the same over versions; choice() is not.
        draw = random.Random(f"{seed}/{index}").random
        for _ in range(10_000):
            drawn = _Drawing(self, draw, duration_s).scene()
            if self._fits(drawn):
                return drawn
        raise ValueError(f"no scene of {self} fits; this world has no {self.held_out} to hold out, or nothing else")

    def _fits(self, drawn: Scene) -> bool:
        heard = [event.place for event in drawn.acts if event.heard]
        if heard and any(abs(mean(heard) - edge) < 0.02 for edge in PAN_EDGES):
            return False  # neither left nor centre
        if self.held_out is None or self.split == "all":
            return True
        return is_held_out(drawn, self.held_out) == (self.split == "held-out")


# One large, fast body near the middle that blinks, in one wording: what tiny models learn in seconds.
EASY = World(1, ("blink",), ("large",), ("fast",), silent=0, offscreen=0, distractors=0, wordings=1, roam=0.3)


def scene(index: int, seed: int = 0, duration_s: float = 2.0, world: World = EASY) -> Scene:
    """The scene number `index`, by default of the easy world: see `World.scene`."""
    return world.scene(index, seed, duration_s)


class _Drawing:
    """One attempt at a scene; `draw` gives numbers in [0, 1)."""

    def __init__(self, world: World, draw: Any, duration_s: float) -> None:
        self.world, self.draw, self.duration_s = world, draw, duration_s

    def pick(self, options: Sequence[Any]) -> Any:
        return options[int(self.draw() * len(options))]

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.draw()

    def scene(self) -> Scene:
        pick, world = self.pick, self.world
        motion, speed, background = pick(tuple(MOTIONS)), pick(world.speeds), pick(tuple(BACKGROUNDS))
        action, colour, size = pick(world.actions), pick(tuple(COLOURS)), pick(world.sizes)
        shape = pick(tuple(SYMMETRY) if action == "turn" else SHAPES)
        count, times = 1 + int(self.draw() * world.bodies), 1 + int(self.draw() * world.times)
        still = self.draw() < world.distractors and count < world.bodies
        silent, burst = self.draw() < world.silent, self.draw() < world.offscreen
        wording = int(self.draw() * world.wordings)

        radius = SIZES[size] * self.between(0.97, 1.03)
        way = self.between(*SPEEDS[speed])
        bounces = self._bounce_times(count) if action == "bounce" else [math.inf] * count
        lanes = [lane + self.between(-1, 1) * STRAY[count + still - 1] for lane in LANES[count + still - 1]]
        others = [lanes.pop(int(self.draw() * len(lanes)))] if still else []
        if self.draw() < 0.5:
            lanes.reverse()  # so that the first to bounce is as often the last in line
        bodies = [
            self._mover(shape, colour, size, radius, motion, way, lane, back)
            for lane, back in zip(lanes, bounces, strict=True)
        ]
        events = self._acts(bodies, action, times, burst, silent)
        bodies += [self._distractor(shape, colour, motion, lane) for lane in others]
        return Scene(tuple(bodies), background, motion, speed, action, tuple(events), self.duration_s, wording)

    def _bounce_times(self, count: int) -> list[float]:
        """In the clip's middle half, each body in a slot of its own."""
        return [self.duration_s * (0.25 + 0.5 * (i + self.between(0.1, 0.6)) / count) for i in range(count)]

    def _mover(
        self, shape: str, colour: str, size: str, radius: float, motion: str, way: float, lane: float, bounce_s: float
    ) -> Body:
        dx, dy = MOTIONS[motion]
        sign, speed = dx + dy, way / self.duration_s
        room = self.world.roam * (0.5 - MARGIN - way / 2)
        if bounce_s < math.inf:  # it touches the wall then
            extent = EXTENTS[shape][tuple(MOTIONS).index(motion)] * radius
            along = (1 - extent if sign > 0 else extent) - sign * speed * bounce_s
        else:
            along = 0.5 - sign * way / 2 + self.between(-1, 1) * room
        start = (along, lane) if dx else (lane, along)
        return Body(shape, colour, size, radius, start, (dx * speed, dy * speed), bounce_s)

    def _distractor(self, shape: str, colour: str, motion: str, lane: float) -> Body:
        shape = self.pick([other for other in SHAPES if other != shape])
        colour = self.pick([other for other in COLOURS if other != colour])
        along = self.between(0.25, 0.75)
        return Body(shape, colour, "small", SIZES["small"], (along, lane) if MOTIONS[motion][0] else (lane, along))

    def _acts(self, bodies: list[Body], action: str, times: int, burst: bool, silent: bool) -> list[Event]:
        first = bodies[0]
        ratio = SIZES[first.size] / first.radius  # a smaller body sounds higher
        sound: dict[str, Any] = {
            "heard": not silent,
            "frequency": FREQUENCIES[PITCHES[first.size]] * ratio,
            "timbre": TIMBRES[first.colour],
            "loudness": self.between(0.5, 0.9),
        }
        late = self.draw() < 0.5  # whether the burst comes after the others
        events: list[Event] = []
        if action == "bounce":
            lasts = min(0.15, 0.08 * self.duration_s)
            for i, body in enumerate(bodies):
                place = body.position(body.bounce_s)[0]
                events.append(Event(body.bounce_s, "bounce", lasts, i, place=place, **sound))
            window = (0.85, 0.88) if late else (0.05, 0.1)
            begins, lasts = self.duration_s * self.between(*window), min(0.2, 0.1 * self.duration_s)
        else:
            times = 0 if action == "slide" else times
            slot = self.duration_s / max(1, times + burst)  # each event has a slot of its own: events never meet
            for i in range(times):
                time_s = slot * (i + (burst and not late) + self.between(0.15, 0.35))
                place = mean([body.position(time_s)[0] for body in bodies])
                lasts = min(0.15, 0.3 * slot) if action == "blink" else min(0.25, 0.4 * slot)
                events.append(Event(time_s, action, lasts, place=place, **sound))
            begins = slot * (times * late + self.between(0.15, 0.35))
            lasts = min(0.2, 0.4 * slot)
        if burst:
            place = self.between(0.05, 0.15) if self.draw() < 0.5 else self.between(0.85, 0.95)
            loudness, grain = self.between(0.4, 0.7), self.draw()
            events.append(Event(begins, "burst", lasts, place=place, loudness=loudness, grain=grain))
        return sorted(events, key=lambda event: event.time_s)
