"""What is wrong with a training, in one sentence with the cure: docs/troubleshooting.md has a section for each."""

from .check import Check, Finding, Run, added_checks
from .condition import Dropped, Unheard
from .data import NotFinite, Repeated, Still, Unshuffled
from .origin import Origin, Reading, Readings
from .padding import Padding
from .progress import Averages, Clipped
from .sampling import Levels, SampledLike
from .space import LatentScale, Untrained
from .weights import Frozen, Moving, Unused

__all__ = [
    "Averages",
    "Check",
    "Clipped",
    "Dropped",
    "Finding",
    "Frozen",
    "LatentScale",
    "Levels",
    "Moving",
    "NotFinite",
    "Origin",
    "Padding",
    "Reading",
    "Readings",
    "Repeated",
    "Run",
    "SampledLike",
    "Still",
    "Unheard",
    "Unshuffled",
    "Untrained",
    "Unused",
    "all_checks",
]


def all_checks() -> list[Check]:
    """The checks of the core, and those that packages add (see `added_checks`)."""
    added = added_checks()
    given = Origin([reader for check in added if isinstance(check, Origin) for reader in check.readings])
    return [
        NotFinite(),
        Still(),
        Repeated(),
        Unshuffled(),
        given,
        Untrained(),
        LatentScale(),
        Levels(),
        Dropped(),
        Unheard(),
        Padding(),
        Frozen(),
        Unused(),
        Moving(),
        Clipped(),
        Averages(),
        *(check for check in added if not isinstance(check, Origin)),
    ]
