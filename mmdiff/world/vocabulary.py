"""The words of the world and what they mean in numbers. Lengths are fractions of the frame, or of its shorter side."""

from collections.abc import Sequence

SHAPES = ("circle", "square", "triangle", "cross")
SYMMETRY = {"square": 4, "triangle": 3, "cross": 4}  # equal views in a whole turn; a circle's turning cannot be seen
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
SPEEDS = {"slow": (0.18, 0.24), "fast": (0.38, 0.46)}  # way of a body in a whole clip
SIZES = {"small": 0.08, "large": 0.12}  # radius of a circle of that size
ACTIONS = ("slide", "blink", "bounce", "turn")  # what a body does besides moving; `slide` is nothing
SOUNDS = {"blink": "beep", "bounce": "knock", "turn": "sweep"}  # what each action sounds like
PITCHES = {"small": "high", "large": "low"}
FREQUENCIES = {"low": 220.0, "high": 660.0}  # Hz, of the fundamental of a body of exactly the size's radius
SWEEP = 1.5  # ratio of a sweep's last frequency to its first
TIMBRES = {  # a body's colour decides its timbre
    "red": "pure",
    "green": "hollow",
    "blue": "buzzy",
    "yellow": "pure",
    "cyan": "hollow",
    "magenta": "buzzy",
}
PANS = ("left", "centre", "right")
PAN_EDGES = (0.4, 0.6)  # of the mean place of a scene's sounds between left, 0, and right, 1
BURSTS = ("none", "before", "after")  # a noise that nothing seen makes: before or after the other sounds
NUMBERS = {1: "one", 2: "two", 3: "three"}
TIMES = {1: "once", 2: "twice", 3: "three times"}

# From a shape's centre to its furthest left, right, top and bottom, for a circle of radius 1. A circle, a square and a
# cross have equal areas; the triangle, equilateral with a corner up, has three quarters of it: more would be too wide.
SQUARE = 0.886227  # half a side: sqrt(pi) / 2
TRIANGLE = 0.675  # radius of the inscribed circle
CROSS = (0.396333, 1.188998)  # half an arm's width and its length from the centre: sqrt(pi / 20), three times that
EXTENTS = {
    "circle": (1.0, 1.0, 1.0, 1.0),
    "square": (SQUARE, SQUARE, SQUARE, SQUARE),
    "triangle": (TRIANGLE * 1.7320508, TRIANGLE * 1.7320508, 2 * TRIANGLE, TRIANGLE),
    "cross": (CROSS[1], CROSS[1], CROSS[1], CROSS[1]),
}


def mean(values: Sequence[float]) -> float:
    """Their mean, the same on every Python: sum() rounds otherwise from 3.12 on."""
    total = 0.0
    for value in values:
        total += value
    return total / len(values)


def pan_of(place: float) -> str:
    """Word for a place between left, 0, and right, 1."""
    return PANS[sum(place >= edge for edge in PAN_EDGES)]
