"""WebDataset shards: tar files whose members `KEY.mp4`, `KEY.json`, `KEY.txt` belong together.

A shard is indexed once, by its headers; items are then read at their place in it, in any order. Members are told by
their suffix, and only the asked media, `.json` and `.txt` are ever opened: nothing is unpickled or run.
"""

import itertools
import re
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from mmdiff.data.captions import MAX_TEXT_BYTES, CaptionError, of_files
from mmdiff.data.items import SPLIT_NAMES, Found, Item, Problem
from mmdiff.data.remote import RemoteItem, listed, opened

Place = Path | str  # a local file, or a URL
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


@dataclass(frozen=True)
class _Member:
    name: str
    offset: int
    size: int


def from_shards(shards: Iterable[tuple[str, Place]], suffixes: tuple[str, ...]) -> Found:
    """The items of (split, shard) pairs, in their order. Raises ValueError when a shard is broken or compressed."""
    found: Found = {}
    for split, shard in shards:
        found.setdefault(split, []).extend(_from_shard(shard, suffixes))
    return found


def shards_of_folder(folder: Path) -> list[tuple[str, Place]]:
    """(split, shard) of every tar in the folder and in its sub-folders train, val, validation, test."""
    named = _by_name(sorted(folder.glob("*.tar")), str(folder))
    below = [(split, file) for name, split in SPLIT_NAMES.items() for file in sorted((folder / name).glob("*.tar"))]
    if below and any(split is None for split, _ in named):
        first = next(file for split, file in named if split is None)
        raise ValueError(
            f"{folder}: {Path(first).name} belongs to no split; name every shard train-*, val-* or test-*, or none"
        )
    return [(split or "train", file) for split, file in [*named, *below]]


def shards_of_pattern(pattern: str) -> list[tuple[str, Place]]:
    """(split, shard) of every tar that a pattern names: `{000..012}`, `{a,b}`, `*`, `?`, `[...]`, in a path or a URL.

    Braces are expanded without a look at the files, so that one that is missing is an error and not left out; stars
    list what is there. Raises ValueError when nothing matches, or something other than a tar.
    """
    shards: list[Place] = []
    whole = "://" not in pattern and Path(pattern).is_file()  # a name may hold brackets
    for name in [] if whole else _expanded(pattern):
        if "://" in name:
            shards += listed(name) if set("*?[") & set(name) else [name]
        elif set("*?[") & set(name):
            path = Path(name).expanduser()
            shards += sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
        else:
            shards.append(Path(name).expanduser())
    shards += [Path(pattern)] if whole else []
    if not shards:
        raise ValueError(f"path={pattern!r} matches no file; check the pattern, and the folder ({Path.cwd()})")
    other = [shard for shard in shards if not str(shard).endswith(".tar")]
    if other:
        raise ValueError(f"path={pattern!r} matches {other[0]}, which is no .tar; end the pattern in .tar")
    return [(split or "train", shard) for split, shard in _by_name(shards, pattern)]


def spooled(stream: BinaryIO) -> tuple[Path, tempfile.TemporaryDirectory[str]]:
    """(a tar with all that comes from `stream`, the temporary folder it lies in, removed when it is forgotten).

    So a stream is shuffled, resumed and read by several workers as a file is; it takes its size on the disk.
    """
    folder = tempfile.TemporaryDirectory(prefix="mmdiff-stdin-")
    path = Path(folder.name) / "stdin.tar"
    with open(path, "wb") as file:
        shutil.copyfileobj(stream, file, 1 << 20)
    return path, folder


def _expanded(pattern: str) -> list[str]:
    """Every string that the braces of a pattern stand for: `{08..10}` is 08, 09, 10, and `{a,b}` is a, b."""
    parts = _BRACES.split(pattern)  # text, braces, text, braces, ..., text
    choices: list[list[str]] = []
    for index, part in enumerate(parts):
        numbers = _RANGE.fullmatch(part)
        if index % 2 == 0:
            choices.append([part])
        elif numbers:
            first, last = numbers.groups()
            if int(first) > int(last):
                raise ValueError(f"path={pattern!r}: {{{part}}} falls; write the lower number first")
            choices.append([str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)])
        else:
            choices.append(part.split(","))
    return ["".join(choice) for choice in itertools.product(*choices)]


def _by_name(shards: Iterable[Place], what: str) -> list[tuple[str | None, Place]]:
    """Shards with the split that their names begin with; either all have one or none has."""
    named = [(SPLIT_NAMES.get(PurePosixPath(shard).name.removesuffix(".tar").split("-")[0]), shard) for shard in shards]
    unnamed = [PurePosixPath(shard).name for split, shard in named if split is None]
    if unnamed and len(unnamed) < len(named):
        raise ValueError(
            f"{what}: {unnamed[0]} belongs to no split; name every shard train-*, val-* or test-*, or none"
        )
    return named


def _from_shard(shard: Place, suffixes: tuple[str, ...]) -> Iterator[Item | Problem]:
    name = PurePosixPath(shard).name
    with opened(shard) as (file, end):
        groups = _groups(file, end, str(shard), suffixes)
    for key, (members, texts) in groups.items():
        media = next((members[suffix] for suffix in suffixes if suffix in members), None)
        where = f"{name}:{media.name if media else key}"
        if media is None:
            yield Problem(where, "no media", "has a caption but no media")
            continue
        try:
            captions, meta = of_files(texts.get(".json"), texts.get(".txt"))
        except CaptionError as error:
            yield Problem(where, error.kind, str(error))
            continue
        made: Callable[..., Item] = Item if isinstance(shard, Path) else RemoteItem
        more: dict[str, Any] = {} if isinstance(shard, Path) else {"url": shard}
        yield made(key, where, captions, meta, Path(shard), media.offset, media.size, **more)


def _groups(
    file: BinaryIO, end: int, name: str, suffixes: tuple[str, ...]
) -> dict[str, tuple[dict[str, _Member], dict[str, bytes]]]:
    """key -> (media members by suffix, texts by suffix), in one pass over the headers of an open tar of `end` bytes."""
    groups: dict[str, tuple[dict[str, _Member], dict[str, bytes]]] = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if member.size < 0:  # it would lead back to where it was, for ever
                    raise tarfile.ReadError(f"{member.name} has a size below 0")
                path = PurePosixPath(member.name)
                suffix = path.suffix.lower()
                if not member.isreg() or member.issparse() or suffix not in (*suffixes, ".json", ".txt"):
                    continue
                if member.offset_data + member.size > end:
                    raise tarfile.ReadError(f"it ends inside {member.name}")
                members, texts = groups.setdefault(str(path.with_suffix("")), ({}, {}))
                if suffix in (".json", ".txt"):
                    file.seek(member.offset_data)
                    texts[suffix] = file.read(min(member.size, MAX_TEXT_BYTES + 1))
                else:
                    members[suffix] = _Member(member.name, member.offset_data, member.size)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"{name}: not a whole, uncompressed tar ({error}); fetch or make it again") from error
    return groups
