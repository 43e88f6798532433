"""Where captioned clips lie, in whichever form, as one list of items for each split.

Nothing is unpickled or run: members and files outside the given media extensions, `.json`, `.txt` and the tables are
never opened.
"""

import dataclasses
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from mmdiff.data import hub, shards
from mmdiff.data.folder import from_folder
from mmdiff.data.items import SPLITS, Found, Item, Problem, Source
from mmdiff.data.manifest import SUFFIXES, from_manifest
from mmdiff.data.remote import check_url

_PATTERN = set("*?[{")


def load_source(
    path: Path | str,
    extensions: Sequence[str],
    *,
    val_share: float = 0.05,
    need_captions: bool = True,
    stdin: BinaryIO | None = None,
) -> Source:
    """Index of the media at `path`, whose form says what it is.

    - a folder: tar shards (`train-*.tar`, `val-*.tar`, `test-*.tar`), else a dataset of `save_to_disk`, else media
      files with captions beside them (`mmdiff.data.folder.from_folder`)
    - `x.tar`, or a pattern such as `shards/train-{000..012}.tar` or `shards/*.tar` (`mmdiff.data.shards`)
    - the same at `https://`, `s3://` or `gs://`, by fsspec; `simplecache::s3://...` keeps copies
    - `x.jsonl`, `x.csv`, `x.parquet`: a table of files below its folder (`mmdiff.data.manifest.from_manifest`)
    - `hf://OWNER/NAME`: the Hugging Face hub
    - `-`: a tar from standard input, of `stdin` (default: the process's)

    extensions: media suffixes with their dot, lower case; of several media of one key the first listed wins.
    Captions: `caption` / `captions` / `text` in the `.json`, else the lines of the `.txt`, else the table's row.
    Without a val split about `val_share` of train becomes val, by a hash of the key: membership does not depend on
    other items. need_captions: without it an item may have no caption, and then `captions` is `[""]`.
    Raises ValueError when the path or all media are missing, or a shard is broken; ImportError where its form needs a
    package that is not installed.
    """
    check_path(path)
    found, kind, keep = _found(str(path), tuple(extensions), stdin)
    splits: dict[str, list[Item]] = {name: [] for name in SPLITS}
    problems: dict[str, list[Problem]] = {name: [] for name in SPLITS}
    for split, entries in found.items():
        for entry in entries:
            if isinstance(entry, Problem):
                problems[split].append(entry)
            elif entry.captions:
                splits[split].append(entry)
            elif need_captions:
                problems[split].append(Problem(entry.where, "no caption", "no caption"))
            else:
                splits[split].append(dataclasses.replace(entry, captions=[""]))
    if not any(splits.values()):
        lost = [line for lines in problems.values() for line in lines]
        why = f"; left out: {'; '.join(lost[:3])}{' ...' if len(lost) > 3 else ''} ({len(lost)})" if lost else ""
        cure = "put a caption in a .txt or .json beside each file, or in metadata.jsonl" if lost else "check the path"
        raise ValueError(
            f"no captioned media in {path} (read as {kind}; looked for {', '.join(extensions)}){why}; {cure}"
        )
    if splits["train"] and not splits["val"]:
        splits["train"], splits["val"] = _split_by_hash(splits["train"], val_share)
    return Source(splits, problems, keep)


def check_path(path: Path | str) -> None:
    """Raises ValueError (ImportError where a package is missing) for what `load_source` could not open at all.

    Cheap, and touches no network.
    """
    text = str(path)
    if text.startswith("pipe:") or ("|" in text and not Path(text).exists()):
        raise ValueError(f"path={text!r} would run a command, which is refused; run it yourself and give - as the path")
    if text.startswith("hf://") or text == "-":
        return
    if "://" in text or "::" in text:
        if not text.endswith(".tar"):
            raise ValueError(f"path={text!r} is not the address of tar shards; end it in .tar")
        check_url(text)
        return
    if Path(text).exists() or _PATTERN & set(text):
        return
    raise ValueError(
        f"path={text!r} does not exist (looked in {Path.cwd()}); give a folder of media or of tar shards, a .tar, a "
        "pattern of them, or a table (.jsonl, .csv, .parquet)"
    )


def _found(path: str, suffixes: tuple[str, ...], stdin: BinaryIO | None) -> tuple[Found, str, Any]:
    """(what is there, the form it was read as, what must be kept for it)."""
    if path == "-":
        spool, folder = shards.spooled(stdin or sys.stdin.buffer)
        return shards.from_shards([("train", spool)], suffixes), "a tar from standard input", folder
    if path.startswith("hf://"):
        return hub.from_hub(path), "a dataset of the hub", None
    place = Path(path)
    if "://" not in path and place.is_dir():
        tars = shards.shards_of_folder(place)
        if tars:
            return shards.from_shards(tars, suffixes), f"{len(tars)} tar shards", None
        if hub.is_saved(place):
            return hub.from_hub(path), "a saved dataset", None
        return from_folder(place, suffixes), "a folder", None
    if "://" not in path and place.is_file() and place.suffix != ".tar":
        if place.suffix not in SUFFIXES:
            raise ValueError(
                f"path={path!r} is a file but not a .tar shard or a table ({', '.join(SUFFIXES)}); give a folder"
            )
        return from_manifest(place, suffixes), f"a {place.suffix} table", None
    tars = shards.shards_of_pattern(path)
    return shards.from_shards(tars, suffixes), f"{len(tars)} tar shards", None


def _split_by_hash(items: list[Item], share: float) -> tuple[list[Item], list[Item]]:
    """(rest, part): the part holds each item with probability `share`, at least one if there are two items."""
    if share == 0 or len(items) < 2:
        return items, []
    place = [int.from_bytes(hashlib.sha256(item.key.encode()).digest()[:8]) / 2**64 for item in items]
    chosen = {index for index, value in enumerate(place) if value < share} or {place.index(min(place))}
    if len(chosen) == len(items):
        chosen.remove(place.index(max(place)))
    rest = [item for index, item in enumerate(items) if index not in chosen]
    return rest, [items[index] for index in sorted(chosen)]
