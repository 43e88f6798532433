"""Reads clips of the procedural world: what is to be seen, from the pixels alone, by measuring. Nothing is trained.

T frames, H W space. It is exact on renders; it needs 16 frames or more of 32x32 pixels or more to tell all there is.
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mmdiff.world import BACKGROUNDS, COLOURS, MOTIONS, SHAPES
from mmdiff.world.vocabulary import NUMBERS, SIZES, SPEEDS, SQUARE, SYMMETRY, TIMES, TRIANGLE
from video.render import coverage

Array = NDArray[np.float64]
CONTRAST = 0.25  # from the background's colour, that a body has at least; the world's have 0.5
NOISE = 2.2
LARGE = math.sqrt(SIZES["small"] * SIZES["large"])  # radius from which on a body is large
FAST = math.sqrt(SPEEDS["slow"][1] * SPEEDS["fast"][0])  # way in a clip from which on a body is fast
STILL = SPEEDS["slow"][0] / 2  # way in a clip up to which it counts as still
AREAS = {"circle": math.pi, "square": 4 * SQUARE**2, "triangle": 3 * math.sqrt(3) * TRIANGLE**2, "cross": math.pi}
ANGLES = np.arange(16) / 8  # of a turn's steps, up to where a shape looks as before
TURN_S, TURN_SHARE = 0.25, 0.4  # how long a turn takes, at most this share of the clip over the number of turns


@dataclass(frozen=True)
class SeenBody:
    """What is seen of one body. Lengths are fractions as in `mmdiff.world.Body`.

    places: (T, 2) x and y of its centre. way: by which it moves in a clip of this length. bounce_s: when it turns back.
    blinks: (T,) share of each frame in which it is white. turns: (T,) by how many turns it has turned.
    """

    shape: str
    colour: str
    radius: float
    places: Array
    way: float
    motion: str
    bounce_s: float | None
    blinks: Array
    turns: Array

    @property
    def size(self) -> str:
        return "large" if self.radius > LARGE else "small"

    @property
    def speed(self) -> str:
        return "fast" if self.way > FAST else "slow"

    @property
    def moves(self) -> bool:
        return self.way > STILL


@dataclass(frozen=True)
class Seen:
    """What is seen in a clip: its bodies, and when something happens to them (seconds, in order)."""

    background: str
    bodies: tuple[SeenBody, ...]
    action: str
    times_s: tuple[float, ...]

    @property
    def attributes(self) -> dict[str, str]:
        """Attribute -> value, of the bodies that move; of those in `mmdiff.world.attributes` all that can be seen."""
        found = {"background": self.background}
        movers = [body for body in self.bodies if body.moves]
        if not movers:
            return found
        found["count"] = NUMBERS.get(len(movers), str(len(movers)))
        for name in ("size", "colour", "shape", "motion", "speed"):
            found[name] = Counter(getattr(body, name) for body in movers).most_common(1)[0][0]
        found["action"] = self.action
        if self.action in ("blink", "turn"):
            found["times"] = TIMES.get(len(self.times_s), str(len(self.times_s)))
        return found


def read(clip: Tensor, fps: float) -> Seen:
    """What a clip (3, T, H, W) in [-1, 1] of `fps` frames a second shows. Raises ValueError on another shape."""
    if clip.ndim != 4 or clip.shape[0] != 3 or clip.shape[1] < 2:
        raise ValueError(f"clip of shape {tuple(clip.shape)} is not (3, T, H, W) with two frames or more")
    pixels = (clip.detach().cpu().double().numpy() + 1) / 2
    edge = np.concatenate([pixels[..., 0, :], pixels[..., -1, :], pixels[..., 0], pixels[..., -1]], -1)
    ground = np.median(edge.reshape(3, -1), 1)
    background = _nearest(BACKGROUNDS, ground)
    away = np.sqrt(np.square(pixels - ground[:, None, None, None]).sum(0))  # (T, H, W)
    labels = _labels(_solid(away))
    present = [label for label in np.unique(labels) if label and _lasts(labels == label)]
    bodies = tuple(_body(pixels, ground, labels == label, fps) for label in present)
    return Seen(background, bodies, *_events([body for body in bodies if body.moves], fps))


def _nearest(palette: dict[str, tuple[float, float, float]], colour: Array) -> str:
    return min(palette, key=lambda name: float(np.square(np.array(palette[name]) - colour).sum()))


def _solid(away: Array) -> NDArray[np.bool_]:
    """Where a body covers half of a pixel or more: half as far from the background as the furthest near it.

    Most pixels are background, so that the median is their noise, which hardly ever exceeds `NOISE` times that.
    """
    furthest = _spread(_spread(away))
    return (away > np.maximum(furthest / 2, NOISE * np.median(away))) & (furthest > CONTRAST)


def _spread(image: NDArray[Any]) -> NDArray[Any]:
    """The greatest of each pixel and its eight neighbours (T, H, W)."""
    height, width = image.shape[1:]
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1)))
    rows = np.maximum(np.maximum(padded[:, :height], padded[:, 1:-1]), padded[:, 2:])
    return np.maximum(np.maximum(rows[..., :width], rows[..., 1:-1]), rows[..., 2:])


def _labels(solid: NDArray[np.bool_]) -> NDArray[np.int64]:
    """A number for each body's track: what hangs together in space and time has one, elsewhere 0."""
    most = solid.size + 1
    labels = np.where(solid, np.arange(1, most).reshape(solid.shape), 0)
    runs = [np.cumsum(~solid, axis) * most for axis in range(3)]  # each stretch along an axis above those before it
    while True:
        before = labels
        for axis, run in enumerate(runs):
            for keys in (run, run.max() - run):  # there, and back
                flip = slice(None, None, 1 if keys is run else -1)
                along = tuple(flip if a == axis else slice(None) for a in range(3))
                labels = (np.maximum.accumulate((keys + labels)[along], axis)[along] - keys) * solid
        if np.array_equal(before, labels):
            return labels


def _lasts(track: NDArray[np.bool_]) -> bool:
    """Whether it is a body's track, not specks: of four pixels or more in at least half of the frames."""
    return bool((track.sum((1, 2)) >= 4).mean() >= 0.5)


def _body(pixels: Array, ground: Array, track: NDArray[np.bool_], fps: float) -> SeenBody:
    kept = np.flatnonzero(track.any((1, 2)))  # frames in which it is seen
    pixels, track = pixels[:, kept], track[kept]
    height, width = track.shape[1:]
    colour, blinks = _colour(_middle(pixels, track))
    shown = np.array(COLOURS[colour]) * (1 - blinks[:, None]) + blinks[:, None] - ground  # (T, 3)
    cover = (
        np.einsum("cthw,tc->thw", pixels - ground[:, None, None, None], shown) / np.square(shown).sum(1)[:, None, None]
    )
    cover = np.clip(cover, 0, 1) * _spread(track)
    centres = _centres(cover)
    shape, radius, turns = _shape(cover, centres)
    places = centres / (width, height)
    return SeenBody(shape, colour, radius / min(height, width), places, *_path(places, kept / fps, fps), blinks, turns)


def _middle(pixels: Array, track: NDArray[np.bool_]) -> Array:
    """Colours (T, 3) of the pixels that a body covers whole: those within its rim and, in every shape, its middle."""
    inner = ~_spread(~track)
    x, y = np.floor(_centres(track.astype(float))).astype(int).T
    inner[np.arange(len(track)), y, x] = True
    return np.einsum("cthw,thw->tc", pixels, inner) / inner.sum((1, 2))[:, None]


def _centres(weight: Array) -> Array:
    """(T, 2) x and y in pixels of the centres of weights (T, H, W)."""
    total = weight.sum((1, 2))
    x = (weight.sum(1) * (np.arange(weight.shape[2]) + 0.5)).sum(1) / total
    y = (weight.sum(2) * (np.arange(weight.shape[1]) + 0.5)).sum(1) / total
    return np.stack((x, y), 1)


def _colour(middle: Array) -> tuple[str, Array]:
    """The colour that, partly whitened in each frame, is nearest to (T, 3), and how much it is whitened (T,)."""
    best = {}
    for name, value in COLOURS.items():
        colour = np.array(value)
        white = 1 - colour
        share = np.clip((middle - colour) @ white / (white @ white), 0, 1)
        best[name] = (float(np.square(middle - colour - share[:, None] * white).sum()), share)
    name = min(best, key=lambda name: best[name][0])
    return name, best[name][1]


def _shape(cover: Array, centres: Array) -> tuple[str, float, Array]:
    """Shape, radius in pixels, and by how much it has turned (T,), nearest in squares to what it covers (T, H, W)."""
    area = float(np.median(cover.sum((1, 2))))
    reach = math.ceil(1.4 * math.sqrt(area / 2)) + 2
    corner = np.floor(centres).astype(int) - reach
    padded = np.pad(cover, ((0, 0), (2 * reach, 2 * reach), (2 * reach, 2 * reach)))
    size = (2 * reach + 1, 2 * reach + 1)
    patches = np.stack([
        frame[y : y + size[0], x : x + size[1]]
        for frame, (x, y) in zip(padded, np.clip(corner + 2 * reach, 0, None), strict=True)
    ])  # fmt: skip
    best: dict[str, tuple[float, float, Array]] = {}
    for shape in SHAPES:
        radius = math.sqrt(area / AREAS[shape])
        angles = ANGLES * math.pi / SYMMETRY[shape] if shape in SYMMETRY else np.zeros(1)
        every = np.tile(centres - corner, (len(angles), 1))  # (angles * T, 2)
        fits = coverage(shape, every, np.repeat(angles, len(cover)), radius, size)
        misses = np.square(fits.reshape(len(angles), *patches.shape) - patches).sum((2, 3))  # (angles, T)
        best[shape] = (float(misses.min(0).sum()), radius, _turns(misses))
    shape = min(best, key=lambda shape: best[shape][0])
    return shape, best[shape][1], best[shape][2]


def _turns(misses: Array) -> Array:
    """By how much it has turned in each frame, from how badly each of `ANGLES` fits (angles, T): never back."""
    steps = ANGLES[misses.argmin(0)]
    turned = np.zeros(len(steps))
    for i, angle in enumerate(steps):
        before = turned[i - 1] if i else 0.0
        turned[i] = before + (angle - before + 0.5) % 2 - 0.5
    return turned


def _path(places: Array, times_s: Array, fps: float) -> tuple[float, str, float | None]:
    """Way in a clip of this length, direction at its start, and when it turns back."""
    steps = np.diff(places, axis=0) / (np.diff(times_s)[:, None] * fps)  # (T - 1, 2) a frame
    axis = int(np.median(np.abs(steps), 0).argmax())
    speed, quarter = float(np.median(np.abs(steps[:, axis]))), max(1, len(steps) // 4)
    sign, last = (np.sign(np.median(part)) for part in (steps[:quarter, axis], steps[-quarter:, axis]))
    motion = next(name for name, way in MOTIONS.items() if way[axis] == (sign or 1))
    way = speed * round(times_s[-1] * fps + 1)
    if sign * last >= 0 or way <= STILL:
        return way, motion, None
    turn = int(np.argmax(steps[:, axis] * sign < speed / 2))  # the first step that is not a whole one onwards
    onwards, back = (places[:, axis] - sign * speed * fps * times_s)[: turn + 1], places[turn + 1 :, axis]
    back = back + sign * speed * fps * times_s[turn + 1 :]
    return way, motion, float((np.median(back) - np.median(onwards)) / (2 * sign * speed * fps))


def _events(movers: list[SeenBody], fps: float) -> tuple[str, tuple[float, ...]]:
    """What the bodies do, and when."""
    bounces = sorted(body.bounce_s for body in movers if body.bounce_s is not None)
    if 2 * len(bounces) > len(movers):
        return "bounce", tuple(bounces)
    frames = min((len(body.blinks) for body in movers), default=0)
    if not frames:
        return "slide", ()
    blinks = _blink_times(np.mean([body.blinks[:frames] for body in movers], 0), fps)
    turns = _turn_times(np.median([body.turns[:frames] for body in movers], 0), fps)
    return ("blink", blinks) if blinks else ("turn", turns) if turns else ("slide", ())


def _blink_times(share: Array, fps: float) -> tuple[float, ...]:
    """Starts of the blinks, of a frame or more each, that fill these shares (T,) of the frames."""
    times_s = []
    share = np.concatenate(([0.0], share, [0.0]))
    for k in range(1, len(share) - 1):
        before, now, after = share[k - 1 : k + 2]
        if now > 0.4 and now > before and now >= after:
            late = 0.0 if before > after else 1 - now  # the frame in which it begins, if not the one before
            times_s.append((k - 1 + late - before) / fps)
    return tuple(times_s)


def _turn_times(turned: Array, fps: float) -> tuple[float, ...]:
    """Starts of the turns that have brought bodies as far (T,)."""
    count = round(float(np.median(turned[-2:])))
    lasts = min(TURN_S, TURN_SHARE * len(turned) / fps / max(1, count)) * fps  # in frames
    times_s = []
    for turn in range(count):
        amid = np.flatnonzero((turned > turn + 0.05) & (turned < turn + 0.95))
        if len(amid):
            start = float(np.mean(amid - (turned[amid] - turn) * lasts))
        else:
            start = float(np.argmax(turned >= turn + 0.5)) - 0.5 - lasts / 2
        times_s.append(start / fps)
    return tuple(times_s)
