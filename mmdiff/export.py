"""`mmdiff export`: from training checkpoints to model folders and pipelines, in safetensors."""

import argparse
from pathlib import Path
from typing import Any


def export_model(checkpoint: Path, folder: Path, half: bool = True, raw: bool = False) -> Path:
    """Writes the model in a training checkpoint to a folder, with its averaged weights where training had an EMA.

    half: store in float16 (loading gives float32). raw: the raw weights instead of the average.
    Raises ValueError for a file that is no checkpoint of `mmdiff fit`.
    """
    import torch

    from .checkpoint import AtomicCheckpointIO
    from .io import build, save

    if not checkpoint.is_file():
        raise ValueError(f"no such checkpoint: {checkpoint}")
    state = AtomicCheckpointIO().load_checkpoint(checkpoint, map_location="cpu")
    if "config" not in state:
        raise ValueError(f"{checkpoint} holds no config; only checkpoints of `mmdiff fit` can be exported")
    arguments = state["config"]["model"]["init_args"]
    tree, places = arguments["model"], {"model.": ""}
    if arguments.get("front") is not None:  # an AutoencoderModule's: the model encodes what the front has encoded
        tree = {"class_path": "mmdiff.autoencoder.Chain", "init_args": {"parts": [arguments["front"], tree]}}
        places = {"front.": "parts.0.", "model.": "parts.1."}
    weights: dict[str, Any] = dict(state["state_dict"])
    averages = [c["average"] for name, c in state.get("callbacks", {}).items() if name.startswith("EMA")]
    if averages and not raw:
        weights.update(averages[0])
    model = build(tree)
    own = {  # not a learned weighting's, nor a discriminator's
        new + name.removeprefix(old): value
        for name, value in weights.items()
        for old, new in places.items()
        if name.startswith(old)
    }
    model.load_state_dict(own)
    return save(model, tree, folder, dtype=torch.float16 if half else None)


def main(args: list[str]) -> int:
    """Makes a model folder of a training checkpoint, or a pipeline of several."""
    parser = argparse.ArgumentParser("mmdiff export", description=main.__doc__)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--checkpoint", type=Path, help="checkpoint of the one model")
    parser.add_argument("--cascade", type=Path, help="cascade.yaml of a pipeline")
    parser.add_argument(
        "--stage", action="append", default=[], metavar="NAME=CKPT", help="checkpoint of a pipeline's stage"
    )
    parser.add_argument("--float32", action="store_true", help="store float32; default is float16")
    parser.add_argument("--raw", action="store_true", help="raw weights instead of their average")
    given = parser.parse_args(args)
    if (given.checkpoint is None) == (given.cascade is None):
        raise ValueError("give either --checkpoint, for a model, or --cascade with --stage, for a pipeline")
    if given.checkpoint is not None:
        print(export_model(given.checkpoint, given.out, not given.float32, given.raw))
        return 0
    from .io import read_config
    from .pipeline import models, write_cascade

    tree = read_config(given.cascade)
    checkpoints = dict(entry.partition("=")[::2] for entry in given.stage)
    needed = set(models(tree))
    if unknown := set(checkpoints) - needed:
        raise ValueError(f"{given.cascade} has no stage with a model called {', '.join(sorted(unknown))}")
    for name, (_, model) in models(tree).items():
        if name in checkpoints:
            print(export_model(Path(checkpoints[name]), given.out / model, not given.float32, given.raw))
        elif not (given.out / model).is_dir():
            raise ValueError(f"stage {name!r} needs a checkpoint: --stage {name}=PATH")
    write_cascade(given.out, tree)
    print(given.out)
    return 0
