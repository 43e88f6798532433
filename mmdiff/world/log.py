"""A scene: bodies, and the log of what happens when. Python's numbers alone, so that it is the same everywhere.

Places are fractions of the frame's width (x) and height (y), y downwards; times are seconds.
"""

import dataclasses
import math
from collections.abc import Collection

from .vocabulary import ACTIONS, BACKGROUNDS, COLOURS, MOTIONS, SHAPES, SIZES, SOUNDS, SPEEDS, TIMBRES

EVENTS = (*SOUNDS, "burst")


def check_word(name: str, value: object, words: Collection[object]) -> None:
    if value not in words:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(str, words))}")


def check_duration(duration_s: float) -> None:
    if not (math.isfinite(duration_s) and duration_s > 0):
        raise ValueError(f"duration_s={duration_s} is not a positive number of seconds")


@dataclasses.dataclass(frozen=True)
class Body:
    """A coloured shape that is at `start` at time 0 and moves by `velocity` a second, back again after `bounce_s`.

    radius: of the circle of its size, in fractions of the frame's shorter side. A body without velocity is a
    distractor: it does nothing, and no caption names it. Raises ValueError on a word that is not in the world.
    """

    shape: str
    colour: str
    size: str
    radius: float
    start: tuple[float, float]
    velocity: tuple[float, float] = (0.0, 0.0)
    bounce_s: float = math.inf

    def __post_init__(self) -> None:
        for name, words in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES)):
            check_word(name, getattr(self, name), words)

    @property
    def moves(self) -> bool:
        return self.velocity != (0.0, 0.0)

    def position(self, time_s: float) -> tuple[float, float]:
        """Its centre (x, y)."""
        since = time_s if time_s <= self.bounce_s else 2 * self.bounce_s - time_s
        return self.start[0] + self.velocity[0] * since, self.start[1] + self.velocity[1] * since


@dataclasses.dataclass(frozen=True)
class Event:
    """What happens from `time_s` on for `duration_s`.

    type:      blink (in white), turn (by half of a shape's symmetry), bounce, or burst, a noise out of sight.
    body:      number of the body that bounces; None where all bodies that move take part, or none.
    heard:     whether it makes its sound; `frequency` (Hz), `timbre`, `place` from left, 0, to right, 1, and
               `loudness`, an amplitude in (0, 1], describe it. grain: in [0, 1), which of all noises a burst is.
    Raises ValueError on a word that is not in the world.
    """

    time_s: float
    type: str
    duration_s: float
    body: int | None = None
    heard: bool = True
    frequency: float = 0.0
    timbre: str = "pure"
    place: float = 0.5
    loudness: float = 0.5
    grain: float = 0.0

    def __post_init__(self) -> None:
        check_word("type", self.type, EVENTS)
        check_word("timbre", self.timbre, set(TIMBRES.values()))

    @property
    def end_s(self) -> float:
        return self.time_s + self.duration_s


@dataclasses.dataclass(frozen=True)
class Scene:
    """What there is to see and to hear in `duration_s` seconds.

    bodies: those that move are alike and move alike, to `motion` at `speed` (until they bounce); 1 to 3 in all.
    events: in the order of their times; all that are not bursts are of the kind `action`.
    wording: which of the ways to say it the captions use.
    Raises ValueError on a word that is not in the world, an event out of order or of another action, or no body that
    moves.
    """

    bodies: tuple[Body, ...]
    background: str
    motion: str
    speed: str
    action: str
    events: tuple[Event, ...]
    duration_s: float
    wording: int = 0

    def __post_init__(self) -> None:
        words: dict[str, Collection[object]] = {
            "background": BACKGROUNDS,
            "motion": MOTIONS,
            "speed": SPEEDS,
            "action": ACTIONS,
        }
        for name, legal in words.items():
            check_word(name, getattr(self, name), legal)
        check_duration(self.duration_s)
        if not self.movers:
            raise ValueError("no body of the scene moves; give one a velocity")
        if [event.time_s for event in self.events] != sorted(event.time_s for event in self.events):
            raise ValueError("the events are not in the order of their times; sort them by time_s")
        for event in self.acts:
            if event.type != self.action:
                raise ValueError(
                    f"a {event.type} is in a scene with action={self.action!r}; it may hold bursts besides"
                )

    @property
    def movers(self) -> tuple[Body, ...]:
        """The bodies that move: what the captions are about."""
        return tuple(body for body in self.bodies if body.moves)

    @property
    def acts(self) -> tuple[Event, ...]:
        """The events that the bodies are in."""
        return tuple(event for event in self.events if event.type != "burst")

    @property
    def bursts(self) -> tuple[Event, ...]:
        return tuple(event for event in self.events if event.type == "burst")

    @property
    def shape(self) -> str:
        return self.movers[0].shape

    @property
    def colour(self) -> str:
        return self.movers[0].colour

    @property
    def size(self) -> str:
        return self.movers[0].size

    def turned(self, time_s: float) -> float:
        """By how many turns, whole and begun, the bodies that move have turned."""
        turned = 0.0
        for event in self.events:
            if event.type == "turn":
                turned += min(1.0, max(0.0, (time_s - event.time_s) / event.duration_s))
        return turned

    def blinking(self, time_s: float, exposure_s: float) -> float:
        """Share in [0, 1] of the window [time, time + exposure_s) in which the bodies that move blink."""
        share = 0.0
        for event in self.events:
            if event.type == "blink":
                share += max(0.0, min(time_s + exposure_s, event.end_s) - max(time_s, event.time_s)) / exposure_s
        return min(1.0, share)
