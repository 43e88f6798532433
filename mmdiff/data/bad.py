"""Account of the items that a run could not use."""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mmdiff.data.items import Item, Problem


class BadItems:
    """The distinct bad items of one split, each with its reason, against a budget.

    max_share: of all items; one bad item of 10 is over 0.01, and one of 3000 is not.
    skipped: good items that waited for nothing because another process's batch was empty (see `ClipLoader`).
    """

    def __init__(self, split: str, items: Sequence[Item], max_share: float) -> None:
        self.split, self.items, self.max_share = split, items, max_share
        self.found: dict[int, Problem] = {}
        self.skipped = 0

    def add(self, found: Mapping[int, Problem]) -> dict[int, Problem]:
        """Counts the problems of items by their place, and warns of those that are new. Returns the new ones."""
        new = {place: problem for place, problem in found.items() if place not in self.found}
        self.found.update(new)
        for problem in new.values():
            warnings.warn(f"bad item left out: {problem}", stacklevel=3)
        return new

    def check(self) -> None:
        """Raises ValueError that lists the bad items when they are over the budget."""
        if len(self.found) > self.max_share * len(self.items):
            lines = [str(self.found[place]) for place in sorted(self.found)]
            more = f"; and {len(lines) - 20} more" if len(lines) > 20 else ""
            raise ValueError(
                f"{len(lines)} of {len(self.items)} {self.split} items are bad, more than max_bad_share="
                f"{self.max_share}; repair or remove them, or raise max_bad_share: {'; '.join(lines[:20])}{more}"
            )

    def by_kind(self) -> dict[str, int]:
        """How many there are of each kind, most first."""
        return dict(Counter(problem.kind for problem in self.found.values()).most_common())

    def report(self) -> dict[str, Any]:
        """For JSON: counts, and the key, place, kind and reason of each."""
        rows = [
            {"key": self.items[place].key, "where": self.items[place].where, "kind": problem.kind, "reason": problem}
            for place, problem in sorted(self.found.items())
        ]
        return {
            "items": len(self.items), "bad": len(rows), "by_kind": self.by_kind(), "skipped": self.skipped,
            "bad_items": rows,
        }  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        return {
            "found": [[place, problem.where, problem.kind, str(problem)] for place, problem in self.found.items()],
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.found = {place: Problem(*rest) for place, *rest in state["found"] if place < len(self.items)}
        self.skipped = state["skipped"]
