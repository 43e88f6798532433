"""A pipeline is a folder: cascade.yaml, and a model folder for each stage that has weights.

cascade.yaml holds `shape` (C, T, ...) and `rate` of the clip it makes unless asked otherwise, `multiple` and `offset`
of its lengths, and `stages`: names to `class_path` trees, in order. A stage's `model` or `autoencoder`, where it is a
plain name and no tree, is the model folder of that name beside the file; the `autoencoder` of a diffusion model is its
own, so that a base stage and its decoding share one folder.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from .cascade import Cascade, Stage
from .config import dump_config
from .io import WEIGHTS, build, fetch, load, read_config, verify_manifest, write_manifest
from .model import DiffusionModel
from .parked import Parked

CASCADE = "cascade.yaml"


def read_cascade(folder: Path) -> dict[str, Any]:
    """The tree in a pipeline folder's cascade.yaml. Raises ValueError where it, or a model it names, is missing."""
    if not (folder / CASCADE).is_file():
        raise ValueError(f"{folder} is no pipeline: it has no {CASCADE}")
    tree = read_config(folder / CASCADE)
    for key in ("shape", "rate", "stages"):
        if key not in tree:
            raise ValueError(f"{folder / CASCADE} has no {key!r}; it needs shape, rate and stages")
    for name, (_, model) in models(tree).items():
        if Path(model).name != model or not (folder / model).is_dir():
            raise ValueError(
                f"{folder / CASCADE}: stage {name!r} names the model {model!r}, which is no folder beside it"
            )
        if not (folder / model / "model.safetensors").is_file():
            raise ValueError(f"{folder / model} has no model.safetensors: the pipeline is without its weights")
    return tree


def models(tree: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Stage name -> (argument, folder name), of the stages that take a saved model."""
    found = {}
    for name, stage in tree["stages"].items():
        for argument in ("model", "autoencoder"):
            value = stage.get("init_args", {}).get(argument)
            if isinstance(value, str):
                found[name] = argument, value
    return found


def load_pipeline(name: str | Path, trusted: Sequence[str] = (), verify: bool = True, in_turn: bool = False) -> Cascade:
    """The cascade in a folder or of a hub id, on the CPU.

    trusted: further packages that its configs may name. verify: check every file against the manifest. in_turn: the
    weights of a stage are in memory only while it works, so that all take no more than the largest; what is generated
    is the same, but the weights of the models cannot be looked at.
    Raises ValueError naming the file at fault.
    """
    folder = fetch(name)
    tree = read_cascade(folder)
    if verify:
        verify_manifest(folder)
    stages: dict[str, Stage] = {}
    loaded: dict[str, nn.Module] = {}
    parked: dict[str, Parked] = {}
    for stage_name, stage in tree["stages"].items():
        argument, model = models(tree).get(stage_name, ("", ""))
        if model:
            if model not in loaded:
                loaded[model] = load(folder / model, trusted, verify=verify)
            part, prefix = loaded[model], ""
            if argument == "autoencoder" and isinstance(part, DiffusionModel):
                part, prefix = part.autoencoder, "autoencoder."
            if in_turn:
                parked[stage_name] = Parked(part, folder / model / WEIGHTS, prefix)
            stage = {**stage, "init_args": {**stage["init_args"], argument: part}}
        built = build(stage, trusted)
        if not isinstance(built, Stage):
            raise ValueError(f"{folder / CASCADE}: stage {stage_name!r} is a {type(built).__name__}, not a Stage")
        stages[stage_name] = built
    multiple, offset = int(tree.get("multiple", 1)), int(tree.get("offset", 0))
    return Cascade(stages, tuple(tree["shape"]), float(tree["rate"]), multiple, offset, parked)


def write_cascade(folder: str | Path, tree: Mapping[str, Any]) -> None:
    """Makes a pipeline of a folder that holds the stages' model folders: writes cascade.yaml and the manifest."""
    folder = Path(folder)
    (folder / CASCADE).write_text(dump_config(tree), "utf-8")
    read_cascade(folder)
    write_manifest(folder)
