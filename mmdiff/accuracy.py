"""How often what is read of clips is what was asked for, with intervals."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any


def wilson(right: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Score interval of a share, 95 % unless `z` says otherwise (Wilson 1927; Brown et al. 2001, eq. 4).

    Raises ValueError unless 0 <= right <= count and count >= 1.
    """
    if not 0 <= right <= count or count < 1:
        raise ValueError(f"right={right} of count={count} is not a share; 0 <= right <= count and count >= 1")
    share, spread = right / count, z * z / count
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def score(wanted: Sequence[Mapping[str, str]], found: Sequence[Mapping[str, str]]) -> dict[str, dict[str, Any]]:
    """For each attribute and for all together: right, count, accuracy, 95 % interval, chance.

    What was not found counts as wrong. chance: the accuracy of answering always what is wanted most often, the best
    that one can do blindly. Raises ValueError if there is nothing to score, or not as many of one as of the other.
    """
    if not wanted or len(wanted) != len(found):
        raise ValueError(f"{len(wanted)} prompts and {len(found)} readings are not pairs to score")
    names = list(wanted[0])
    questions: dict[str, tuple[str, ...]] = {name: (name,) for name in names}
    if len(names) > 1:
        questions["both" if len(names) == 2 else "all"] = tuple(names)
    rows = {}
    for title, asked in questions.items():
        truth = [tuple(label[name] for name in asked) for label in wanted]
        answers = [tuple(label.get(name) for name in asked) for label in found]
        right, count = sum(t == a for t, a in zip(truth, answers, strict=True)), len(truth)
        chance = max(Counter(truth).values()) / count
        rows[title] = {
            "right": right,
            "count": count,
            "accuracy": right / count,
            "interval": wilson(right, count),
            "chance": chance,
        }
    return rows
