"""Parts that an option of a command names: by a short name, by YAML on the line, or by a YAML file."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import yaml

if TYPE_CHECKING:
    from .guidance import Guidance

GUIDANCES = ("apg", "cfg", "cfg++", "cfg-zero", "interval", "over-time", "rescale", "threshold")
T = TypeVar("T")


def part(option: str, text: str, names: Mapping[str, Callable[[], T]], kind: type[T], trusted: Sequence[str]) -> T:
    """What `text` names: a key of `names`, `{class_path: ..., init_args: {...}}`, or a YAML file of such a tree.

    Raises ValueError, in one line that names the option, where it is neither, or the tree builds no `kind`. Trees are
    built under the trust policy of `mmdiff.io.build`, with `trusted` packages besides our own.
    """
    if text in names:
        return names[text]()
    from .io import build, read_config

    try:
        if text.lstrip().startswith("{"):
            tree = yaml.safe_load(text)
        elif Path(text).is_file():
            tree = read_config(text)
        else:
            raise ValueError(f"neither one of {', '.join(sorted(names))}, nor {{class_path: ...}}, nor a YAML file")
        built = build(tree, trusted)
        if not isinstance(built, kind):
            raise ValueError(f"builds a {type(built).__name__}, not a {kind.__name__}")
    except (ValueError, yaml.YAMLError, OSError, RecursionError) as error:
        raise ValueError(f"--{option} {text}: {' '.join(str(error).split())}") from error
    return built


def pick_guidance(text: str, trusted: Sequence[str] = ()) -> "float | Guidance":
    """What --guidance gives: a scale, a rule of a name in GUIDANCES with its defaults, or a rule by YAML."""
    from . import guidance as rules

    try:
        scale = float(text)
    except ValueError:
        names: dict[str, Callable[[], rules.Guidance]] = {
            "apg": rules.APG, "cfg": rules.Cfg, "cfg++": rules.CfgPP, "cfg-zero": rules.CfgZero,
            "interval": rules.Interval, "over-time": rules.OverTime, "rescale": rules.Rescale,
            "threshold": rules.Threshold,
        }  # fmt: skip
        return part("guidance", text, names, rules.Guidance, trusted)  # type: ignore[type-abstract]
    if not (math.isfinite(scale) and 0 <= scale <= 100):
        raise ValueError(f"--guidance {scale} is outside 0..100; 1 is none, 2 to 8 is usual")
    return scale
