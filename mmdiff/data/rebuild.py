"""A published dataset built anew from its original sources: a plan says which clips, in which order."""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mmdiff.__main__ import guarded
from mmdiff.data.media import whole_file
from mmdiff.data.prepare import write_tar

Line = tuple[str, ...]  # split, key and whatever else a clip needs
Made = tuple[bytes, str, Mapping[str, Any]]  # a clip's media, its suffix, its JSON
Make = Callable[[Path, Line], Made]  # of the source and a line of the plan


def read_plan(path: Path) -> list[Line]:
    """A line for each clip: words between spaces, the first two its split and key; # begins a comment."""
    lines = [line.partition("#")[0].split() for line in path.read_text("utf-8").splitlines()]
    return [tuple(line) for line in lines if line]


def rebuild(
    plan: Sequence[Line],
    source: Path,
    out: Path,
    make: Make,
    *,
    shard_clips: int,
    not_indexed: Sequence[str] = (),
    limit: int | None = None,
) -> list[Path]:
    """Writes the plan's clips as SPLIT-000000.tar, ... and SPLIT.jsonl into `out`; a shard appears whole or not at all.

    not_indexed: fields of a clip's JSON, besides `captions`, that the index leaves out. limit: first clips of a split.
    Raises ValueError for a source that is no folder, and what `make` raises.
    """
    if not source.is_dir():
        raise ValueError(f"{source} is not a folder; give the folder that git clone made")
    if limit is not None and limit < 1:
        raise ValueError(f"--limit {limit} is below 1")
    written = []
    for split in dict.fromkeys(line[0] for line in plan):
        lines = [line for line in plan if line[0] == split][:limit]
        index: list[str] = []
        with tqdm(total=len(lines), desc=split, unit="clip", dynamic_ncols=True) as bar:
            for first in range(0, len(lines), shard_clips):
                shard = out / f"{split}-{first // shard_clips:06d}.tar"
                with whole_file(shard) as temporary:
                    clips = _made(lines[first : first + shard_clips], source, make, bar)
                    write_tar(temporary, _members(clips, shard.name, ("captions", *not_indexed), index))
                written.append(shard)
        with whole_file(out / f"{split}.jsonl") as temporary:
            temporary.write_text("\n".join(index) + "\n", "utf-8")
    return written


def _made(lines: Sequence[Line], source: Path, make: Make, bar: Any) -> Iterator[tuple[str, Made]]:
    for line in lines:
        yield line[1], make(source, line)
        bar.update()


def _members(
    clips: Iterable[tuple[str, Made]], shard: str, left_out: Sequence[str], index: list[str]
) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of a shard's members; a line of each clip is added to `index`."""
    for key, (media, suffix, told) in clips:
        yield f"{key}{suffix}", media
        yield f"{key}.json", json.dumps(told, ensure_ascii=False).encode()
        short = {name: value for name, value in told.items() if name not in left_out}
        index.append(json.dumps({"key": key, "shard": shard, **short}, ensure_ascii=False))


def main(script: str, make: Make, *, shard_clips: int, about: str, not_indexed: Sequence[str] = ()) -> int:
    """The command line of a script, whose plan is the .txt beside it. Errors end in one line and status 2."""
    path = Path(script).resolve()

    def run(args: list[str]) -> int:
        parser = argparse.ArgumentParser(path.name, description=about)
        parser.add_argument("source", type=Path, help="folder of the original source, as git clone made it")
        parser.add_argument("out", type=Path, help="folder for the shards")
        parser.add_argument("--limit", type=int, metavar="N", help="only the first N clips of each split")
        given = parser.parse_args(args)
        shards = rebuild(
            read_plan(path.with_suffix(".txt")), given.source, given.out, make, shard_clips=shard_clips,
            not_indexed=not_indexed, limit=given.limit,
        )  # fmt: skip
        print(*shards, sep="\n")
        return 0

    return guarded(f"prepare {path.stem}", run, sys.argv[1:])


def needed(path: Path, what: str) -> Path:
    """`path`. Raises ValueError where it is not there."""
    if not path.exists():
        raise ValueError(f"{path} is not there; {what}")
    return path
