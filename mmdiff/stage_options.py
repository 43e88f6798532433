"""Options about the stages of a pipeline: settings of each one, where to stop, and whose clips to keep."""

import argparse
import re
from functools import partial
from typing import TYPE_CHECKING

from .named import GUIDANCES, SAMPLERS, part, pick_guidance, pick_sampler

if TYPE_CHECKING:
    from .cascade import Cascade

FIRST = ""  # in the place of a stage's name: the first stage
MOST_STEPS = 10_000
NAMES = ("until", "fps", "size")

Settings = dict[str, dict[str, object]]  # stage -> its settings


def add_settings(options: argparse.ArgumentParser) -> None:
    """--steps, --sampler and --guidance, once or once for each stage."""
    options.add_argument(
        "--steps", action="append", metavar="[STAGE=]N", help="sampling steps of the first stage, or of one by its name"
    )
    options.add_argument(
        "--sampler",
        action="append",
        metavar="[STAGE=]NAME|YAML",
        help=f"{', '.join(SAMPLERS)}, or a class_path as YAML",
    )
    options.add_argument(
        "--guidance", action="append", metavar="[STAGE=]SCALE|NAME|YAML",
        help=f"a scale, 1 is none; {', '.join(GUIDANCES)}; or a class_path as YAML",
    )  # fmt: skip


def add_stops(options: argparse.ArgumentParser) -> None:
    """--until and --save-stages."""
    options.add_argument("--until", metavar="STAGE", help="stop after this stage; latents become a .safetensors file")
    options.add_argument(
        "--save-stages", action="store_true", help="also write the clip of every stage before the last"
    )


def settings(given: argparse.Namespace) -> Settings:
    """What the options say of each stage, built. Raises ValueError, in one line, for what cannot be."""
    found: Settings = {}
    for stage, value in parted(given.steps):
        found.setdefault(stage, {})["steps"] = number_of_steps(value)
    for stage, value in parted(given.guidance):
        found.setdefault(stage, {})["guidance"] = pick_guidance(value, given.trust)
    for stage, value in parted(given.sampler):
        from .sampling import Sampler

        names = {name: partial(pick_sampler, name) for name in SAMPLERS}
        sampler = part("sampler", value, names, Sampler, given.trust)  # type: ignore[type-abstract]
        found.setdefault(stage, {})["sampler"] = sampler
    return found


def parted(values: list[str] | None) -> list[tuple[str, str]]:
    """STAGE=VALUE as (stage, value), and VALUE as that of the first stage."""
    matches = [(re.fullmatch(r"(?:([A-Za-z_][\w-]*)=)?(.*)", value, re.DOTALL), value) for value in values or []]
    return [(match[1] or FIRST, match[2]) for match, value in matches if match is not None]


def number_of_steps(value: str) -> int:
    try:
        steps = int(value)
    except ValueError:
        raise ValueError(f"--steps {value}: invalid int value; give N, or STAGE=N") from None
    if not 1 <= steps <= MOST_STEPS:
        raise ValueError(f"--steps {steps} is outside 1..{MOST_STEPS}")
    return steps


def with_settings(cascade: "Cascade", chosen: Settings) -> "Cascade":
    """The cascade with other settings of its stages. Raises ValueError for stages that it has not."""
    for name, values in chosen.items():
        cascade = cascade.with_stage(name or next(iter(cascade.stages)), **values)
    return cascade


def latents(cascade: "Cascade") -> set[str]:
    """The stages whose clips are still to be decoded, and can only be written as numbers."""
    from .cascade import Decode

    names = list(cascade.stages)
    decodes = [place for place, stage in enumerate(cascade.stages.values()) if isinstance(stage, Decode)]
    return set(names[: decodes[-1]]) if decodes else set()


def record(cascade: "Cascade") -> dict[str, object]:
    """The settings of the first stage, and those of the others by name, for the record beside a result."""
    first, *others = cascade.stages
    used: dict[str, dict[str, str]] = {
        name: {key: str(value) for key, value in vars(stage).items() if key not in ("model", "autoencoder")}
        for name, stage in cascade.stages.items()
    }
    return {**used[first], "stages": {name: used[name] for name in others}}
