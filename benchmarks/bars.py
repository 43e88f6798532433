"""Bars: numbers that a benchmark must reach, and whether it did."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MET, MISSED, NOT_MEASURED = "met", "MISSED", "not measured"


@dataclass(frozen=True)
class Bar:
    """value must be at least `limit`, or with `most` at most. value: None where there was nothing to measure.

    absent: peers that should have been measured against and were not. Against those present a bar can be missed, but
    not met: one of the absent might have been better.
    """

    name: str
    limit: float
    value: float | None
    most: bool = False
    absent: Sequence[str] = ()
    against: str = ""

    @property
    def verdict(self) -> str:
        if self.value is None:
            return NOT_MEASURED
        reached = self.value <= self.limit if self.most else self.value >= self.limit  # nan reaches nothing
        if not reached:
            return MISSED
        return NOT_MEASURED if self.absent else MET

    def line(self) -> str:
        value = "" if self.value is None else f"{self.value:.3f}"
        sign = "<=" if self.most else ">="
        without = f" (without {', '.join(self.absent)})" if self.absent else ""
        return (
            f"{self.name:62} {sign} {self.limit:<5.2f} {value:>8}  {self.verdict:12} {self.against}{without}".rstrip()
        )


def least_bar(name: str, limit: float, ratios: Mapping[str, float], absent: Sequence[str] = ()) -> Bar:
    """At least `limit` times as good as every peer: the value is the smallest of the ratios."""
    closest = min(ratios, key=lambda peer: ratios[peer], default=None)
    value = None if closest is None else ratios[closest]
    return Bar(name, limit, value, absent=absent, against=f"beside {closest}" if closest else "")


def most_bar(name: str, limit: float, ratios: Mapping[str, float], absent: Sequence[str] = ()) -> Bar:
    """At most `limit` times as much as every peer: the value is the largest of the ratios."""
    closest = max(ratios, key=lambda peer: ratios[peer], default=None)
    value = None if closest is None else ratios[closest]
    return Bar(name, limit, value, most=True, absent=absent, against=f"beside {closest}" if closest else "")


def print_bars(bars: Sequence[Bar]) -> None:
    print(f"\n{'bar':62} {'limit':8} {'value':>8}  verdict")
    for bar in bars:
        print(bar.line())
    verdicts = [bar.verdict for bar in bars]
    print(", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in (MET, MISSED, NOT_MEASURED)))


def exit_status(bars: Sequence[Bar]) -> int:
    """0 all met, 1 one missed, 3 none missed but one not measured."""
    verdicts = {bar.verdict for bar in bars}
    return 1 if MISSED in verdicts else 3 if NOT_MEASURED in verdicts else 0
