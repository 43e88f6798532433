"""Which curves of a run belong into one chart, and the charts of one run or of several."""

import math
from collections.abc import Mapping, Sequence

from .charts import COLOURS, Line, chart, smoothed
from .history import Curve
from .levels import range_middle

_FIRST = ("loss", "train loss by noise level", "val loss by noise level", "grad_norm")
_LOG = ("loss", "grad_norm", "lr-", "l1", "mse")  # names of which ratios matter
_SMOOTH = 40  # points from which on a curve gets a smooth one before it


def charts(runs: Mapping[str, Mapping[str, Curve]]) -> list[str]:
    """Charts of the curves of runs by name, each run's by metric: train and val together where there is one run, and
    one line for each run where there are several."""
    if len(runs) == 1:
        (curves,) = runs.values()
        return [_chart(title, group) for title, group in _ordered(_groups(curves))]
    titles = dict.fromkeys(name for curves in runs.values() for name in curves if name != "epoch")
    by_metric = {
        title: {run: curves[title] for run, curves in runs.items() if title in curves}
        for title in titles
        if not title.startswith(("train_at/", "val_at/"))
    }
    return [*[_chart(title, lines, list(runs)) for title, lines in _ordered(by_metric)], *by_level(runs)]


def by_level(runs: Mapping[str, Mapping[str, Curve]]) -> list[str]:
    """The last loss of each range of sigma, of training and validation, over sigma."""
    found = []
    for stage in ("train", "val"):
        lines = []
        for place, (run, curves) in enumerate(runs.items()):
            ranges = {name: curve for name, curve in curves.items() if name.startswith(f"{stage}_at/")}
            points = sorted((range_middle(name.partition("/")[2]), curve[-1][1]) for name, curve in ranges.items())
            if points:
                lines.append(Line(run, points, COLOURS[place % len(COLOURS)], marked=True))
        if lines:
            found.append(chart(f"{stage} loss over sigma, last", lines, "sigma", log_x=True, log_y=True))
    return found


def _groups(curves: Mapping[str, Curve]) -> dict[str, dict[str, Curve]]:
    groups: dict[str, dict[str, Curve]] = {}
    for name, curve in curves.items():
        stage, _, rest = name.partition("/")
        if name == "epoch":
            continue
        if stage in ("train_at", "val_at"):
            groups.setdefault(f"{stage.removesuffix('_at')} loss by noise level", {})[rest] = curve
        elif stage in ("train", "val") and rest:
            groups.setdefault(rest, {})[stage] = curve
        elif name.startswith("lr-"):
            groups.setdefault("learning rate", {})[name] = curve
        elif name.startswith("ema/distance"):
            groups.setdefault("distance of the average from the weights", {})[name] = curve
        else:
            groups.setdefault(name, {})[name] = curve
    return {
        title: dict(sorted(group.items(), key=lambda item: range_middle(item[0]))) if "by noise" in title else group
        for title, group in groups.items()
    }


def _ordered(groups: Mapping[str, dict[str, Curve]]) -> list[tuple[str, dict[str, Curve]]]:
    """Losses first; the rest by name."""

    def place(title: str) -> tuple[int, str]:
        short = title.rpartition("/")[2]
        return (_FIRST.index(short) if short in _FIRST else len(_FIRST), title)

    return sorted(groups.items(), key=lambda item: place(item[0]))


def _chart(title: str, group: Mapping[str, Curve], order: Sequence[str] | None = None) -> str:
    lines = []
    for place, (name, curve) in enumerate(group.items()):
        colour = COLOURS[(order.index(name) if order is not None else place) % len(COLOURS)]
        if len(curve) < _SMOOTH:
            lines.append(Line(name, curve, colour, marked=len(curve) < 12))
        else:
            lines += [Line(name, curve, colour, faint=True), Line(name, smoothed(curve), colour)]
    values = [value for curve in group.values() for _, value in curve if math.isfinite(value)]
    spread = bool(values) and min(values) > 0 and max(values) / min(values) > 5
    return chart(title, lines, log_y=spread and any(word in title or word in "".join(group) for word in _LOG))
