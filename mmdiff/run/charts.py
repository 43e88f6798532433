"""Curves as SVG pictures: for pages without scripts."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#97266d", "#6b46c1", "#b7791f", "#2c7a7b", "#c53030", "#4a5568", "#d53f8c")
WIDTH, HEIGHT = 420, 220
_LEFT, _RIGHT, _TOP, _BOTTOM, _NAMES = 56, 10, 26, 34, 120
_POINTS = 600  # of a line; more would not be seen, and pages would grow with the length of the run


@dataclass(frozen=True)
class Line:
    """One curve. points: (x, y) in order of x; a y that is not finite is a gap. faint: drawn thin, behind others."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: str = COLOURS[0]
    faint: bool = False
    marked: bool = False  # a dot at each point


def chart(title: str, lines: Sequence[Line], x_name: str = "step", log_x: bool = False, log_y: bool = False) -> str:
    """An SVG of the lines over common axes, with their names beside where there are several.

    log_x, log_y: logarithmic; what is not positive is then left out.
    """
    lines = [Line(one.name, _thin(one.points), one.colour, one.faint, one.marked) for one in lines]
    seen = [
        (x, y)
        for one in lines
        for x, y in one.points
        if math.isfinite(x) and math.isfinite(y) and (x > 0 or not log_x) and (y > 0 or not log_y)
    ]
    name, legend = html.escape(title, quote=True), _legend(lines)
    width = WIDTH + _NAMES if legend else WIDTH
    start = f'<svg class="chart" width="{width}" height="{HEIGHT}" viewBox="0 0 {width} {HEIGHT}" role="img"'
    start += f' aria-label="{name}"><text class="title" x="{_LEFT}" y="14">{name}</text>'
    if not seen:
        return f'{start}<text x="{_LEFT}" y="{HEIGHT / 2}">nothing to draw</text></svg>'
    across = _Axis([x for x, _ in seen], log_x, _LEFT, WIDTH - _RIGHT)
    up = _Axis([y for _, y in seen], log_y, HEIGHT - _BOTTOM, _TOP)
    parts = [start, *_frame(across, up, x_name)]
    for one in sorted(lines, key=lambda line: not line.faint):
        parts.append(_drawn(one, across, up))
    return "".join([*parts, legend, "</svg>"])


def smoothed(points: Sequence[tuple[float, float]], share: float = 0.02) -> list[tuple[float, float]]:
    """Exponential average over about `share` of the points, without the lag of the first ones; gaps stay."""
    keep = 1 - 1 / max(1.0, share * len(points))
    total = weight = 0.0
    found = []
    for x, y in points:
        if math.isfinite(y):
            total, weight = keep * total + y, keep * weight + 1
            found.append((x, total / weight))
        else:
            found.append((x, y))
    return found


class _Axis:
    """Places of values between two ends in pixels, and where its ticks are."""

    def __init__(self, values: Sequence[float], log: bool, first: float, last: float) -> None:
        self.log, self.first, self.last = log, first, last
        low, high = min(values), max(values)
        if log:
            low, high = math.log10(low), math.log10(high)
        constant = high - low <= 1e-6 * max(abs(high), abs(low))  # or but for rounding
        room = max(0.1 * abs(high), 1e-9) if constant else 0.04 * (high - low)
        self.low, self.high = low - room, high + room

    def __call__(self, value: float) -> float | None:
        if not math.isfinite(value) or (self.log and value <= 0):
            return None
        at = math.log10(value) if self.log else value
        return self.first + (at - self.low) / (self.high - self.low) * (self.last - self.first)

    def ticks(self) -> list[float]:
        if not self.log:
            return _round_numbers(self.low, self.high)
        decades = range(max(-300, math.floor(self.low)), min(300, math.ceil(self.high)) + 1)  # what a float can be
        few = self.high - self.low < 2
        found = [m * 10.0**d for d in decades for m in ((1, 2, 5) if few else (1,))]
        found = [value for value in found if self.low <= math.log10(value) <= self.high]
        return found if len(found) > 1 else _round_numbers(10**self.low, 10**self.high)


def _round_numbers(low: float, high: float, count: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten between the ends."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _frame(across: _Axis, up: _Axis, x_name: str) -> list[str]:
    base = HEIGHT - _BOTTOM
    parts = []
    for value in up.ticks():
        y = up(value)
        parts.append(
            f'<path class="grid" d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"/>'
            f'<text x="{_LEFT - 5}" y="{(y or 0) + 4:.1f}" text-anchor="end">{_number(value)}</text>'
        )
    for value in across.ticks():
        parts.append(f'<text x="{across(value):.1f}" y="{base + 14}" text-anchor="middle">{_number(value)}</text>')
    parts.append(f'<path class="axis" d="M{_LEFT} {_TOP}V{base}H{WIDTH - _RIGHT}"/>')
    parts.append(f'<text x="{WIDTH - _RIGHT}" y="{HEIGHT - 5}" text-anchor="end">{html.escape(x_name)}</text>')
    return parts


def _drawn(line: Line, across: _Axis, up: _Axis) -> str:
    pieces: list[list[str]] = [[]]
    dots = []
    for x, y in line.points:
        at_x, at_y = across(x), up(y)
        if at_x is None or at_y is None:
            pieces.append([])
            continue
        pieces[-1].append(f"{at_x:.1f} {at_y:.1f}")
        if line.marked or len(line.points) == 1:
            dots.append(
                f'<circle cx="{at_x:.1f}" cy="{at_y:.1f}" r="2.5" fill="{line.colour}">'
                f"<title>{_number(x)}: {_number(y)}</title></circle>"
            )
    path = "".join(f"M{'L'.join(piece)}" for piece in pieces if piece)
    last = next((y for _, y in reversed(line.points) if math.isfinite(y)), math.nan)
    kind = "faint" if line.faint else "line"
    told = f"<title>{html.escape(line.name, quote=True)}, last {_number(last)}</title>"
    return f'<path class="{kind}" d="{path}" stroke="{line.colour}">{told}</path>{"".join(dots)}'


def _legend(lines: Sequence[Line]) -> str:
    named = {line.name: line for line in lines if not line.faint}
    if len(named) < 2:
        return ""
    parts = [
        f'<text x="{WIDTH}" y="{_TOP + 10 + 13 * place}" style="fill:{line.colour}">'
        f"{html.escape(name, quote=True)}</text>"
        for place, (name, line) in enumerate(named.items())
    ]
    return f'<g class="legend">{"".join(parts)}</g>'


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most some hundred of them, evenly spread, the last one kept."""
    every = max(1, -(-len(points) // _POINTS))
    kept = list(points[::every])
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]


def _number(value: float) -> str:
    """Short, with thousands as k and M."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit and abs(value) < 1e12:
            return f"{value / unit:.4g}{name}"
    return f"{value:.4g}"
