"""Where `mmdiff fit --resume` goes on: the newest whole checkpoint of a config, and the folder of its run."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from .checkpoint import peek, verify

SAME = ("model", "data", "seed_everything")  # of a config: what makes a run the same run


@dataclass(frozen=True)
class Found:
    """A checkpoint to go on from.

    run: the folder of its run. step: optimizer steps that it has seen. logged: the last step that loggers have.
    """

    checkpoint: Path
    run: Path
    step: int
    logged: int


def find(folders: Iterable[Path], config: Mapping[str, Any] | None) -> Found | None:
    """The newest whole checkpoint, by the time of its file, in these folders or of the runs within them.

    config: resolved, as checkpoints hold it; only those whose model, data (but for num_workers) and seed are the same
    count. None takes any. A broken file is named in a warning, and the next one is looked at; so is one that holds
    weights alone, without a word.
    """
    wanted = None if config is None else identity(config)
    paths = {path.resolve() for folder in folders for path in _checkpoints(folder)}
    for path in sorted(paths, key=lambda one: one.stat().st_mtime_ns, reverse=True):
        try:
            checkpoint = peek(path)
            if "optimizer_states" not in checkpoint or "loops" not in checkpoint:
                continue
            if wanted is not None and identity(checkpoint.get("config") or {}) != wanted:
                continue
            verify(path)
        except ValueError as error:
            warnings.warn(f"{error}; looking at the next newest", stacklevel=2)
            continue
        logged = checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"]
        return Found(path, _run_of(path, checkpoint), checkpoint["global_step"], logged)
    return None


@rank_zero_only
def keep_csv(found: Found) -> None:
    """Renames the curves of a CSVLogger, which Lightning deletes when a run goes on in its folder."""
    metrics = found.run / "metrics.csv"
    if metrics.is_file():
        metrics.rename(found.run / f"metrics-until-{found.step}.csv")


def identity(config: Mapping[str, Any]) -> Any:
    """What two configs must share for a checkpoint of one to go on under the other."""
    return _without_workers({name: config.get(name) for name in SAME})


def _without_workers(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_workers(part) for name, part in value.items() if name != "num_workers"}
    return [_without_workers(part) for part in value] if isinstance(value, (list, tuple)) else value


def _checkpoints(folder: Path) -> Iterable[Path]:
    """Those of a folder, of the run in it, and of runs one and two levels below; no deeper, as data may lie there."""
    for pattern in ("*.ckpt", "checkpoints/*.ckpt", "*/checkpoints/*.ckpt", "*/*/checkpoints/*.ckpt"):
        yield from (path for path in folder.glob(pattern) if path.is_file())


def _run_of(path: Path, checkpoint: Mapping[str, Any]) -> Path:
    """The folder of the run: around `checkpoints`, wherever that has been moved to, or else as the checkpoint says."""
    if path.parent.name == "checkpoints":
        return path.parent.parent
    return Path(checkpoint.get("run_folder", path.parent))
