"""A pipeline is a folder: cascade.yaml, and a model folder for each stage that has weights.

cascade.yaml holds `shape` (C, T, ...) and `rate` of the clip it makes unless asked otherwise, `multiple` and `offset`
of its lengths, and `stages`: names to `class_path` trees, in order. A stage's `model` or `autoencoder`, where it is a
plain name and no tree, is the model folder of that name beside the file; the `autoencoder` of a diffusion model is its
own, so that a base stage and its decoding share one folder.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .cascade import Cascade, Stage
from .config import dump_config
from .io import build, fetch, load, read_config, verify_manifest, write_manifest

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


def load_pipeline(name: str | Path, trusted: Sequence[str] = (), verify: bool = True) -> Cascade:
    """The cascade in a folder or of a hub id, on the CPU.

    trusted: further packages that its configs may name. verify: check every file against the manifest.
    Raises ValueError naming the file at fault.
    """
    folder = fetch(name)
    tree = read_cascade(folder)
    if verify:
        verify_manifest(folder)
    stages: dict[str, Stage] = {}
    loaded: dict[str, Any] = {}
    for stage_name, stage in tree["stages"].items():
        argument, model = models(tree).get(stage_name, ("", ""))
        if model:  # built from the model's own config first, so that the stage's arguments are checked as one
            config, own = read_config(folder / model), False
            if argument == "autoencoder" and isinstance(config.get("init_args", {}).get("autoencoder"), Mapping):
                config, own = config["init_args"]["autoencoder"], True
            stage = {**stage, "init_args": {**stage["init_args"], argument: config}}
        built = build(stage, trusted)
        if not isinstance(built, Stage):
            raise ValueError(f"{folder / CASCADE}: stage {stage_name!r} is a {type(built).__name__}, not a Stage")
        if model:
            if model not in loaded:
                loaded[model] = load(folder / model, trusted, verify=verify)
            weights = loaded[model].autoencoder if own else loaded[model]
            built = replace(built, **{argument: weights})  # type: ignore[type-var]
        stages[stage_name] = built
    return Cascade(
        stages, tuple(tree["shape"]), float(tree["rate"]), int(tree.get("multiple", 1)), int(tree.get("offset", 0))
    )


def write_cascade(folder: str | Path, tree: Mapping[str, Any]) -> None:
    """Makes a pipeline of a folder that holds the stages' model folders: writes cascade.yaml and the manifest."""
    folder = Path(folder)
    (folder / CASCADE).write_text(dump_config(tree), "utf-8")
    read_cascade(folder)
    write_manifest(folder)
