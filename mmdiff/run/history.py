"""Curves of a run: a line of JSON for each time that something was logged, in a file that outlives kills."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmdiff.data.media import whole_file

HISTORY = "history.jsonl"

Curve = list[tuple[int, float]]  # (optimizer steps done, value), in order


class HistoryFile:
    """Appends lines {"step": optimizer steps done, metric: value, ...}; each reaches the system before the next step.

    A value that is not finite is written as null, since JSON has no word for it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.step, self.written = -1, dict[str, float]()

    def cut(self, step: int) -> None:
        """Drops lines of steps after `step`, and a last line that a kill cut short: what follows writes them anew."""
        kept = [line for line in _lines(self.path) if line["step"] <= step]
        with whole_file(self.path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), "utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends a line of what has not been written of this step yet."""
        if step != self.step:
            self.step, self.written = step, {}
        new = {name: float(value) for name, value in values.items() if self.written.get(name) != float(value)}
        if not new:
            return
        self.written |= new
        line = {"step": step} | {name: value if math.isfinite(value) else None for name, value in new.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read_history(folder: Path) -> dict[str, Curve]:
    """The curves of a run's folder by metric, {} where it has none; of a step that was logged twice the later value."""
    found: dict[str, dict[int, float]] = {}
    for line in _lines(folder / HISTORY):
        for name, value in line.items():
            if name != "step":
                found.setdefault(name, {})[line["step"]] = math.nan if value is None else float(value)
    return {name: sorted(values.items()) for name, values in found.items()}


def _lines(path: Path) -> list[dict[str, Any]]:
    """Those that are whole."""
    try:
        text = path.read_text("utf-8", errors="replace")
    except FileNotFoundError:
        return []
    found = []
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            found.append(record)
    return found
