"""Parts that an option of a command names: by a short name, by YAML on the line, or by a YAML file."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import yaml

if TYPE_CHECKING:
    from .guidance import Guidance
    from .sampling import Sampler

GUIDANCES = ("apg", "cfg", "cfg++", "cfg-zero", "interval", "over-time", "rescale", "threshold")
# name -> class of mmdiff.sampling and its arguments; euler is ddim by its other name, lms as in k-diffusion
SAMPLERS: dict[str, tuple[str, dict[str, object]]] = {
    "ddim": ("Ancestral", {"eta": 0.0}),
    "ddpm": ("Ancestral", {"eta": 1.0}),
    "euler": ("Ancestral", {"eta": 0.0}),
    "euler-churn": ("Euler", {"s_churn": 40.0}),
    "heun": ("Heun", {}),
    "heun-flow": ("Heun", {"clock": "flow"}),
    "heun-churn": ("Heun", {"s_churn": 40.0}),
    "dpmpp2s": ("DPMpp2S", {}),
    "dpmpp2m": ("DPMpp2M", {}),
    "dpmpp3m": ("DPMpp3M", {}),
    "dpmpp2m-sde": ("DPMpp2MSDE", {}),
    "dpmpp3m-sde": ("DPMpp3MSDE", {}),
    "unipc2": ("UniPC", {"order": 2}),
    "unipc": ("UniPC", {"order": 3}),
    "deis": ("AdamsBashforth", {}),
    "lms": ("AdamsBashforth", {"clock": "sigma"}),
    "rk4": ("RK4", {}),
    "langevin": ("Langevin", {}),
    "pc": ("PredictorCorrector", {}),
    "ode": ("AdaptiveODE", {}),
    "consistency": ("Consistency", {}),
}
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


def pick_sampler(name: str) -> "Sampler":
    """The sampler of a name in SAMPLERS."""
    from . import sampling

    kind, settings = SAMPLERS[name]
    made: Sampler = getattr(sampling, kind)(**settings)
    return made
