"""`mmdiff export`: from training checkpoints to model folders and pipelines, in safetensors."""

import argparse
from pathlib import Path
from typing import Any


def export_model(
    checkpoint: Path,
    folder: Path,
    half: bool = True,
    raw: bool = False,
    ema: str | None = None,
    averages: Path | None = None,
) -> Path:
    """Writes the model in a training checkpoint to a folder, with its averaged weights where training had an EMA.

    half: store in float16 (loading gives float32). raw: the raw weights instead of the average.
    ema: which average, see `average_of`; default the first. averages: folder of those that the run kept.
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
    states = {c.get("name", key): c for key, c in state.get("callbacks", {}).items() if key.startswith("EMA")}
    if raw and ema is not None:
        raise ValueError(f"ema={ema} is asked for together with the raw weights; take one of them")
    if ema is not None:
        beside = checkpoint.parent / "averages"
        if averages is None and not beside.is_dir():
            beside = checkpoint.parent.parent / "averages"  # Lightning's place is RUN/checkpoints
        weights.update(average_of(states, ema, averages or beside))
    elif states and not raw:
        weights.update(next(iter(states.values()))["average"])
    model = build(tree)
    own = {  # not a learned weighting's, nor a discriminator's
        new + name.removeprefix(old): value
        for name, value in weights.items()
        for old, new in places.items()
        if name.startswith(old)
    }
    model.load_state_dict(own)
    return save(model, tree, folder, dtype=torch.float16 if half else None)


def average_of(states: dict[str, Any], ema: str, folder: Path) -> dict[str, Any]:
    """The average called `ema`, by the names of the parameters.

    states: of the averages in the checkpoint by their names, such as decay=0.999. Where `ema` is another width=W, it is
    made of those of power functions and of what the run kept of them in `folder` (`mmdiff.post_hoc`).
    Raises ValueError where there is no such average, or what there is cannot give it within 5 % of its profile.
    """
    from .post_hoc import Profile, file_name, read, synthesised

    if ema in states:
        return states[ema]["average"]  # type: ignore[no-any-return]
    powers = {float(name.partition("=")[2]): state for name, state in states.items() if name.startswith("width=")}
    try:
        width = float(ema.removeprefix("width=")) if ema.startswith("width=") and powers else None
    except ValueError:
        width = None
    if width is None:
        raise ValueError(
            f"ema={ema!r} is not in the checkpoint, which has {', '.join(states) or 'no average'}"
            + ("; of those any other width=W can be made" if powers else "")
        )
    names = list(next(iter(powers.values()))["average"])
    kept = {Profile(w, state["updates"]): state["average"].__getitem__ for w, state in powers.items()}
    for w, state in powers.items():
        for updates in state["kept"]:
            if (path := folder / file_name(w, updates)).is_file():
                kept.setdefault(Profile(w, updates), read(path, names))
    average, residual = synthesised(kept, names, Profile(width, max(state["updates"] for state in powers.values())))
    told = f"{ema} from {len(kept)} averages of {', '.join(f'width={w:g}' for w in powers)}, off by {residual:.2%}"
    if residual > 0.05:
        raise ValueError(
            f"{told}, and more than 5 % is too far: the run must keep averages more often (keep_every of "
            f"mmdiff.callbacks.EMA), or name the folder where they are; looked in {folder}"
        )
    print(told)
    return average


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
    parser.add_argument("--ema", metavar="NAME", help="which average: decay=0.999, or width=0.08; default the first")
    parser.add_argument("--averages", type=Path, help="folder of what the run kept; default beside the checkpoint")
    given = parser.parse_args(args)
    if (given.checkpoint is None) == (given.cascade is None):
        raise ValueError("give either --checkpoint, for a model, or --cascade with --stage, for a pipeline")
    how = (not given.float32, given.raw, given.ema, given.averages)
    if given.checkpoint is not None:
        print(export_model(given.checkpoint, given.out, *how))
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
            print(export_model(Path(checkpoints[name]), given.out / model, *how))
        elif not (given.out / model).is_dir():
            raise ValueError(f"stage {name!r} needs a checkpoint: --stage {name}=PATH")
    write_cascade(given.out, tree)
    print(given.out)
    return 0
