"""Samples of a run in its folder: samples/step_N with the files and samples.json, which says what they are."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmdiff.data.media import whole_file

FOLDER, INDEX = "samples", "samples.json"


@dataclass(frozen=True)
class Shot:
    """The samples of one step. files: by the weights they were made with, for each caption those of one clip."""

    step: int
    folder: Path
    captions: Sequence[str]
    files: Mapping[str, Sequence[Sequence[str]]]


def shot_folder(run: Path, step: int) -> Path:
    """Where the samples of a step lie."""
    return run / FOLDER / f"step_{step:08d}"


def write_index(shot: Shot) -> None:
    """Written last: a folder without it was cut short, and counts as none."""
    with whole_file(shot.folder / INDEX) as temporary:
        temporary.write_text(json.dumps({"step": shot.step, "captions": shot.captions, "files": shot.files}), "utf-8")


def read_shots(run: Path) -> list[Shot]:
    """Those of a run's folder in the order of their steps, without what cannot be read."""
    found = []
    for index in sorted((run / FOLDER).glob(f"step_*/{INDEX}")):
        try:
            record = json.loads(index.read_text("utf-8"))
            found.append(Shot(int(record["step"]), index.parent, record["captions"], record["files"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return sorted(found, key=lambda shot: shot.step)


def drop_after(run: Path, step: int) -> None:
    """Removes samples of later steps: of a run that is resumed from this one, or of an earlier run in this folder."""
    for shot in read_shots(run):
        if shot.step > step:
            shutil.rmtree(shot.folder, ignore_errors=True)


def spread(shots: Sequence[Shot], count: int) -> list[Shot]:
    """At most `count` of them, evenly over the run, with the first and the last."""
    if len(shots) <= count:
        return list(shots)
    return [shots[round(i * (len(shots) - 1) / (count - 1))] for i in range(count)]
