"""The procedural world: endless captioned scenes with exact ground truth, drawn by `video`, sounded by `audio`.

A scene is a pure function of (seed, index): a body that moves over a background, and a log of events, each a beep to
the ear and a flash of the body to the eye. Times are exact seconds, so both renderers agree at any rate.
"""

import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

SHAPES = ("circle", "square", "triangle")
COLOURS = {  # RGB as displayed, in [0, 1]
    "red": (0.9, 0.1, 0.1),
    "green": (0.1, 0.75, 0.15),
    "blue": (0.15, 0.3, 1.0),
    "yellow": (0.95, 0.85, 0.1),
    "cyan": (0.1, 0.85, 0.9),
    "magenta": (0.9, 0.15, 0.85),
}
BACKGROUNDS = {"black": (0.0, 0.0, 0.0), "grey": (0.4, 0.4, 0.4), "navy": (0.0, 0.0, 0.25)}
MOTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # (x, y), y grows downwards as rows do
PITCHES = {"low": 220.0, "middle": 440.0, "high": 880.0}  # Hz, of the scene's fundamental before detuning
TIMBRES = ("pure", "buzzy")
COUNTS = {1: "one", 2: "two", 3: "three"}
TIMES = {1: "once", 2: "twice", 3: "three times"}


@dataclasses.dataclass(frozen=True)
class Event:
    """Something seen and heard from `time_s` on for `duration_s`, both in seconds."""

    time_s: float
    type: str
    duration_s: float


@dataclasses.dataclass(frozen=True)
class Scene:
    """What there is to see and to hear in `duration_s` seconds. Raises ValueError on an attribute not in the world.

    start:    the body's centre at time 0, in fractions of the frame's width and height.
    travel:   how far it moves in all, in the same fractions.
    radius:   of the circle with the body's area, in fractions of the frame's shorter side.
    detune:   ratio of the sound's fundamental to the pitch's frequency.
    loudness: amplitude of the sound in (0, 1].
    """

    shape: str
    colour: str
    motion: str
    background: str
    pitch: str
    beeps: int
    timbre: str
    events: tuple[Event, ...]
    duration_s: float
    start: tuple[float, float]
    travel: float
    radius: float
    detune: float
    loudness: float

    def __post_init__(self) -> None:
        legal: dict[str, Sequence[Any]] = {
            "shape": SHAPES,
            "colour": tuple(COLOURS),
            "motion": tuple(MOTIONS),
            "background": tuple(BACKGROUNDS),
            "pitch": tuple(PITCHES),
            "beeps": tuple(COUNTS),
            "timbre": TIMBRES,
        }
        for name, values in legal.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(map(str, values))}")
        if not (math.isfinite(self.duration_s) and self.duration_s > 0):
            raise ValueError(f"duration_s={self.duration_s} is not a positive number of seconds")
        if len(self.events) != self.beeps:
            raise ValueError(f"{len(self.events)} events do not make beeps={self.beeps}; give one event a beep")

    @property
    def frequency(self) -> float:
        """Fundamental of the beeps in Hz."""
        return PITCHES[self.pitch] * self.detune

    def position(self, time_s: Tensor) -> tuple[Tensor, Tensor]:
        """Centre (x, y) of the body at each of the times, in fractions of the frame's width and height."""
        way = self.travel * time_s / self.duration_s
        dx, dy = MOTIONS[self.motion]
        return self.start[0] + dx * way, self.start[1] + dy * way

    def activity(self, time_s: Tensor, exposure_s: float) -> Tensor:
        """Share in [0, 1] of each window [time, time + exposure_s) during which an event lasts."""
        share = torch.zeros_like(time_s)
        for event in self.events:
            ends = torch.clamp(time_s + exposure_s, max=event.time_s + event.duration_s)
            share += torch.clamp(ends - torch.clamp(time_s, min=event.time_s), min=0) / exposure_s
        return share.clamp(max=1)


def scene(index: int, seed: int = 0, duration_s: float = 2.0) -> Scene:
    """The scene number `index` (any integer) of the world `seed`; only its times depend on `duration_s`."""
    if not (math.isfinite(duration_s) and duration_s > 0):
        raise ValueError(f"duration_s={duration_s} is not a positive number of seconds")
    # Of Python's generators only random() is promised to stay the same over versions; choice() is not.
    draw = random.Random(f"{seed}/{index}").random

    def pick(options: Sequence[Any]) -> Any:
        return options[int(draw() * len(options))]

    def between(low: float, high: float) -> float:
        return low + (high - low) * draw()

    shape, colour, motion = pick(SHAPES), pick(tuple(COLOURS)), pick(tuple(MOTIONS))
    background, pitch, beeps, timbre = (
        pick(tuple(BACKGROUNDS)),
        pick(tuple(PITCHES)),
        pick(tuple(COUNTS)),
        pick(TIMBRES),
    )
    radius, travel, detune, loudness = between(0.11, 0.15), between(0.36, 0.44), between(0.97, 1.03), between(0.5, 0.9)
    # The path is centred but for a jitter, so that the body stays in the frame and its first place tells the direction
    # of no more than the motion itself does.
    dx, dy = MOTIONS[motion]
    x, y = between(0.46, 0.54), between(0.46, 0.54)
    along, across = 0.5 * travel, between(-0.2, 0.2)
    start = (x - dx * along + abs(dy) * across, y - dy * along + abs(dx) * across)
    slot = duration_s / beeps  # each event has a slot of its own, so that events never meet
    events = tuple(Event(slot * (i + between(0.1, 0.5)), "beep", min(0.15, 0.4 * slot)) for i in range(beeps))
    return Scene(
        shape,
        colour,
        motion,
        background,
        pitch,
        beeps,
        timbre,
        events,
        duration_s,
        start,
        travel,
        radius,
        detune,
        loudness,
    )


def caption(scene: Scene) -> str:
    """One sentence with everything there is to see."""
    return (
        f"A {scene.colour} {scene.shape} moves {scene.motion} on a {scene.background} background "
        f"and flashes {TIMES[scene.beeps]}."
    )


def sound_caption(scene: Scene) -> str:
    """One sentence with everything there is to hear."""
    beeps = "beep" if scene.beeps == 1 else "beeps"
    return f"{COUNTS[scene.beeps].capitalize()} {scene.timbre} {beeps} of {scene.pitch} pitch."


class WorldDataset(Dataset[dict[str, Any]]):
    """Scenes with the indices `start, start + step, ...` as items of a data module's batch.

    render:  from a scene to x (C, T, ...) in [-1, 1], with `rate` steps of T a second over `duration_s` seconds.
    caption: from a scene to its text (`caption` or `sound_caption`).
    Raises ValueError if `count` is not positive.
    """

    def __init__(
        self,
        render: Callable[[Scene], Tensor],
        caption: Callable[[Scene], str],
        count: int,
        rate: float,
        duration_s: float,
        seed: int = 0,
        start: int = 0,
        step: int = 1,
    ) -> None:
        if count < 1:
            raise ValueError(f"count={count} is not a positive number of scenes")
        self.render, self.caption, self.count = render, caption, count
        self.rate, self.duration_s, self.seed, self.start, self.step = rate, duration_s, seed, start, step

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < self.count:
            raise IndexError(f"item {i} of {self.count}")
        index = self.start + self.step * i
        drawn = scene(index, self.seed, self.duration_s)
        return {
            "x": self.render(drawn),
            "caption": self.caption(drawn),
            "rate": self.rate,
            "duration_s": self.duration_s,
            "key": f"world-{self.seed}-{index}",
            "meta": dataclasses.asdict(drawn),
        }

    def loader(self, batch_size: int, num_workers: int, shuffle: bool) -> DataLoader[dict[str, Any]]:
        """Batches of items; the order of a shuffle follows from the seed, not from the global generator."""
        generator = torch.Generator().manual_seed(self.seed) if shuffle else None
        return DataLoader(
            self,
            batch_size,
            shuffle=shuffle,
            generator=generator,
            num_workers=num_workers,
            collate_fn=collate,
            persistent_workers=num_workers > 0,
        )


def train_and_val(
    render: Callable[[Scene], Tensor],
    caption: Callable[[Scene], str],
    count: int,
    val_count: int,
    rate: float,
    duration_s: float,
    seed: int,
) -> tuple[WorldDataset, WorldDataset]:
    """Training scenes 0, 1, ... and validation scenes -1, -2, ...: disjoint, whatever the counts grow to."""
    train = WorldDataset(render, caption, count, rate, duration_s, seed)
    return train, WorldDataset(render, caption, val_count, rate, duration_s, seed, start=-1, step=-1)


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Items to a batch: x (B, C, T, ...) stacked, rate and duration_s (B,) float32, the rest lists."""
    batch: dict[str, Any] = {name: [item[name] for item in items] for name in items[0]}
    batch["x"] = torch.stack(batch["x"])
    for name in ("rate", "duration_s"):
        batch[name] = torch.tensor(batch[name], dtype=torch.float32)
    return batch
