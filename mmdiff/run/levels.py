"""Names of ranges of sigma, as the loss by noise level is logged, and where they lie."""

import math


def range_name(low: float | None, high: float | None) -> str:
    """Of a range of sigma; None is open."""
    if low is None:
        return f"below_{high:g}"
    return f"above_{low:g}" if high is None else f"{low:g}_to_{high:g}"


def range_middle(name: str) -> float:
    """The geometric middle of the range that `range_name` named; of an open one, half a decade beyond its edge."""
    if name.startswith("below_"):
        return float(name.removeprefix("below_")) / math.sqrt(math.sqrt(10))
    if name.startswith("above_"):
        return float(name.removeprefix("above_")) * math.sqrt(math.sqrt(10))
    low, _, high = name.partition("_to_")
    return math.sqrt(float(low) * float(high))
