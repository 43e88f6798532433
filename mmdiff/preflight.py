"""`mmdiff doctor`: what is wrong with a training, before it is started."""

import json
import logging
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse import ArgumentError, ArgumentParser

from .callbacks.doctor import Doctor
from .callbacks.ema import EMA
from .config import build, plain, read_config, trust_policy
from .data.cache import LatentCache
from .doctor import all_checks
from .doctor.check import Check
from .doctor.sampling import Levels, SampledLike
from .footprint import instantiate, layers
from .generate import Parser
from .sigmas import Sigmas

FOUND = 3  # exit status: the work is done, and it says no
STEPS = 10
KEPT = ("gradient_clip_val", "gradient_clip_algorithm", "accumulate_grad_batches", "precision")  # of the trainer


def examine(
    config: str,
    steps: int = STEPS,
    cascade: Mapping[str, Any] | None = None,
    trusted: Sequence[str] = (),
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Findings of a training config (or several, see `mmdiff.footprint.layers`), from its first steps.

    The steps are those that `mmdiff fit` takes, on the CPU, with the config's data, precision, clipping and averages;
    nothing of them is kept but latents, where the config caches them. cascade: the tree that is to sample from it.
    seed: of the first weights.
    Raises ValueError for a config that does not build.
    """
    pl.seed_everything(seed, verbose=False)
    module, data, settings = instantiate(config)
    if isinstance(data, LatentCache) and data.missing == "ahead":
        data.missing = "later"  # those of a few batches are enough
    doctor = Doctor([*all_checks(), *of_cascade(cascade, trusted)])
    doctor.config = {"model": {"init_args": _arguments(config)}}
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, max_steps=steps, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, num_sanity_val_steps=0,
            default_root_dir=folder, callbacks=[*_callbacks(settings), doctor],
            **{name: settings[name] for name in KEPT if name in settings},
        )  # fmt: skip
        try:
            trainer.fit(module, datamodule=data)
        except (ValueError, RuntimeError, OSError):
            if not doctor.findings:  # else they say why
                raise
    return doctor.findings


def _arguments(config: str) -> dict[str, Any]:
    """Of the model, the uppermost alone."""
    found: dict[str, Any] = {}
    for path in layers(config):
        found |= (read_config(path).get("model") or {}).get("init_args") or {}
    return found


def _callbacks(settings: Mapping[str, Any]) -> list[pl.Callback]:
    """Of the trainer's, the averages and what samples: the others write, log or stop. Raises ValueError."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[pl.Callback], default=[])
    try:
        given = parser.parse_object({"callbacks": settings.get("callbacks") or []})
    except ArgumentError as error:
        raise ValueError(f"trainer.callbacks: {plain(error)}") from error
    callbacks = parser.instantiate(given).callbacks
    return [c for c in callbacks if isinstance(c, EMA) or isinstance(getattr(c, "sigmas", None), Sigmas)]


def of_cascade(tree: Mapping[str, Any] | None, trusted: Sequence[str] = ()) -> list[Check]:
    """Checks that compare training with how a cascade samples."""
    if tree is None:
        return []
    arguments = {name: stage.get("init_args") or {} for name, stage in tree["stages"].items()}
    first = next((f for f in arguments.items() if "sigmas" in f[1]), None)
    grids: dict[str, Sigmas] = {} if first is None else {f"stage {first[0]}": build(first[1]["sigmas"], trusted)}
    return [Levels(grids), SampledLike(tree)]


def main(args: list[str]) -> int:
    """Looks for faults of a training config in its first steps, and names each with its cure; status 3 if any."""
    parser = Parser(
        "mmdiff doctor",
        description=f"{main.__doc__} docs/troubleshooting.md has a section for each. `mmdiff fit` goes on looking.",
    )
    parser.add_argument("config", metavar="CONFIG", help="of mmdiff fit; BASE.yaml+VARIANT.yaml is two -c")
    parser.add_argument(
        "--steps", type=int, default=STEPS, metavar="N", help=f"optimizer steps; default {STEPS}, 100 finds all"
    )
    parser.add_argument("--cascade", type=Path, metavar="YAML", help="how it is to be sampled: compares the two")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the first weights; default 0")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--trust", action="append", default=[], metavar="PACKAGE", help="package that the config may also name"
    )
    given = parser.parse_args(args)
    if given.steps < 1:
        raise ValueError(f"--steps {given.steps} must be at least 1; 100 finds all")
    trust_policy(given.trust)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each finding is printed below
        cascade = None if given.cascade is None else read_config(given.cascade)
        found = examine(given.config, given.steps, cascade, given.trust, given.seed)
    if given.json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        for finding in found:
            print(f"{finding['name']}: {finding['found']}\n  cure: {finding['cure']}")
        print(f"{given.config}: {len(found) or 'no'} finding{'' if len(found) == 1 else 's'} in {given.steps} steps")
    return FOUND if found else 0
