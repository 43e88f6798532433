"""Where captioned clips lie: WebDataset tar shards or a plain folder, as one list of items for each split.

Nothing is unpickled or run: members and files outside the given media extensions, `.json`, `.txt` and
`metadata.jsonl` / `metadata.csv` are never opened.
"""

import csv
import hashlib
import json
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from mmdiff.data.media import MediaError

SPLITS = ("train", "val", "test")
_SPLIT_NAMES = {"train": "train", "val": "val", "validation": "val", "test": "test"}
_MAX_TEXT_BYTES = 1 << 20
_METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
_NO_CAPTIONS = ("readme", "licen", "notice", "copying", "dataset", "metadata", "info", "index")  # how other texts start


@dataclass(frozen=True)
class Item:
    """One captioned media file: a file of its own (`offset` None) or `size` bytes at `offset` of a tar shard.

    Holds no open file, so it can be pickled and read in any process.
    """

    key: str
    where: str  # for people: `train-000000.tar:val_0001.mp4` or a path below the source
    captions: list[str]
    meta: dict[str, Any]
    path: Path
    offset: int | None = None
    size: int = 0

    def read(self) -> bytes:
        """The bytes of the media file. Raises MediaError when they are gone or cut off."""
        try:
            with open(self.path, "rb") as file:
                if self.offset is None:
                    return file.read()
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as error:
            raise MediaError(f"{self.where}: cannot be read ({error})") from error
        if len(data) != self.size:
            raise MediaError(f"{self.where}: {len(data)} of {self.size} bytes are there; the shard was cut off")
        return data

    def source(self) -> bytes | Path:
        """What a reader opens: the path of a plain file, the bytes of a shard's member."""
        return self.path if self.offset is None else self.read()


@dataclass(frozen=True)
class Source:
    """The items of each split, and one line for each thing that had to be left out of it."""

    splits: dict[str, list[Item]]
    problems: dict[str, list[str]] = field(default_factory=dict)


def load_source(
    path: Path, extensions: Sequence[str], *, val_share: float = 0.05, need_captions: bool = True
) -> Source:
    """Index of the media below `path`: a folder of tar shards, one tar shard, or a plain folder (recursive).

    extensions: media suffixes with their dot, lower case; of several media of one key the first listed wins.
    Shards have WebDataset naming (`KEY.mp4` + `KEY.json` and/or `KEY.txt`) and are not compressed.
    Captions: `caption` / `captions` / `text` in the `.json`, else the lines of the `.txt`, else a row of a
    `metadata.jsonl` / `metadata.csv` (columns `file_name` and caption, captions or text) in any folder.
    Splits: shards `train-*.tar`, `val-*.tar`, `test-*.tar`, or sub-folders train, val (validation), test. Without a
    val split about `val_share` of train becomes val, by a hash of the key: membership does not depend on other items.
    need_captions: without it an item may have no caption, and then `captions` is `[""]`.
    Raises ValueError when the path or all media are missing, or a shard is broken.
    """
    if not path.exists():
        raise ValueError(
            f"path={str(path)!r} does not exist (looked in {Path.cwd()}); give a folder of media or of tar"
        )
    suffixes = tuple(extensions)
    shards = _shards(path)
    found = _from_shards(shards, suffixes) if shards else _from_folder(path, suffixes)
    splits: dict[str, list[Item]] = {}
    problems: dict[str, list[str]] = {}
    for split, entries in found.items():
        splits[split] = [
            entry for entry in entries if isinstance(entry, Item) and (entry.captions or not need_captions)
        ]
        problems[split] = [entry for entry in entries if isinstance(entry, str)]
        if need_captions:
            problems[split] += [f"{e.where}: no caption" for e in entries if isinstance(e, Item) and not e.captions]
        else:
            splits[split] = [e if e.captions else Item(e.key, e.where, [""], e.meta, e.path, e.offset, e.size)
                             for e in splits[split]]  # fmt: skip
    if not any(splits.values()):
        kind = f"{len(shards)} tar shards" if shards else "a folder"
        lost = [line for lines in problems.values() for line in lines]
        why = f"; left out: {'; '.join(lost[:3])}{' ...' if len(lost) > 3 else ''} ({len(lost)})" if lost else ""
        cure = "put a caption in a .txt or .json beside each file, or in metadata.jsonl" if lost else "check the path"
        raise ValueError(
            f"no captioned media in {path} (read as {kind}; looked for {', '.join(suffixes)}){why}; {cure}"
        )
    if splits.get("train") and not splits.get("val"):
        splits["train"], splits["val"] = _split_by_hash(splits["train"], val_share)
    return Source({name: splits.get(name, []) for name in SPLITS}, {name: problems.get(name, []) for name in SPLITS})


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


def _shards(path: Path) -> list[tuple[str, Path]]:
    """(split, shard) for every tar of the source; shards whose name gives no split are all of train."""
    if path.is_file():
        if path.suffix != ".tar":
            raise ValueError(f"path={str(path)!r} is a file but not a .tar shard; give a folder or a .tar")
        return [(_SPLIT_NAMES.get(path.name.split("-")[0], "train"), path)]
    files = sorted(path.glob("*.tar"))
    named = [(_SPLIT_NAMES.get(file.name.split("-")[0]), file) for file in files]
    named += [(split, file) for name, split in _SPLIT_NAMES.items() for file in sorted((path / name).glob("*.tar"))]
    unnamed = [file.name for split, file in named if split is None]
    if unnamed and len(unnamed) < len(named):
        raise ValueError(
            f"{path}: {unnamed[0]} belongs to no split; name every shard train-*, val-* or test-*, or none"
        )
    return [(split or "train", file) for split, file in named]


def _from_shards(shards: Iterable[tuple[str, Path]], suffixes: tuple[str, ...]) -> dict[str, list[Item | str]]:
    found: dict[str, list[Item | str]] = {}
    for split, shard in shards:
        found.setdefault(split, []).extend(_from_shard(shard, suffixes))
    return found


def _from_shard(shard: Path, suffixes: tuple[str, ...]) -> list[Item | str]:
    members: dict[str, dict[str, tarfile.TarInfo]] = {}
    end = shard.stat().st_size
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                suffix = name.suffix.lower()
                if member.isreg() and not member.issparse() and suffix in (*suffixes, ".json", ".txt"):
                    if member.offset_data + member.size > end:
                        raise tarfile.ReadError(f"it ends inside {member.name}")
                    members.setdefault(str(name.with_suffix("")), {})[suffix] = member
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{shard}: not a whole, uncompressed tar ({error}); fetch or make it again") from error
    entries: list[Item | str] = []
    with open(shard, "rb") as file:
        for key, parts in members.items():
            text: dict[str, bytes] = {}
            for suffix in (".json", ".txt"):
                if suffix in parts:
                    file.seek(parts[suffix].offset_data)
                    text[suffix] = file.read(min(parts[suffix].size, _MAX_TEXT_BYTES + 1))
            media = next((parts[suffix] for suffix in suffixes if suffix in parts), None)
            where = f"{shard.name}:{media.name if media else key}"
            if media is None:
                entries.append(f"{where}: has a caption but no media")
                continue
            try:
                captions, meta = _captions(text.get(".json"), text.get(".txt"))
            except ValueError as error:
                entries.append(f"{where}: {error}")
                continue
            entries.append(Item(key, where, captions, meta, shard, media.offset_data, media.size))
    return entries


def _from_folder(root: Path, suffixes: tuple[str, ...]) -> dict[str, list[Item | str]]:
    present = [name for name in _SPLIT_NAMES if (root / name).is_dir()]
    bases = [(_SPLIT_NAMES[name], root / name) for name in present] or [("train", root)]
    rows = _metadata_rows(root)
    found: dict[str, list[Item | str]] = {}
    for split, base in bases:
        entries = found.setdefault(split, [])
        taken: set[Path] = set()
        files = [file for file in sorted(base.rglob("*")) if not _hidden(file, root) and file.is_file()]
        media = [file for file in files if file.suffix.lower() in suffixes]
        media.sort(key=lambda file: (str(file.with_suffix("")), suffixes.index(file.suffix.lower())))
        for file in media:
            stem = file.with_suffix("")
            if stem in taken:
                continue
            taken.add(stem)
            where = str(file.relative_to(root))
            try:
                captions, meta = _captions(_beside(file, ".json"), _beside(file, ".txt"))
                if not captions and file in rows:
                    captions, meta = _captions_of(rows[file])
            except ValueError as error:
                entries.append(f"{where}: {error}")
                continue
            key = stem.relative_to(base).as_posix()
            entries.append(Item(key, where, captions, meta, file, None, file.stat().st_size))
        folders = {file.parent for file in media}
        for text in files:  # captions that lost their media, among the media
            if text.suffix.lower() not in (".txt", ".json") or text.with_suffix("") in taken:
                continue
            if text.parent in folders and not text.name.lower().startswith(_NO_CAPTIONS):
                entries.append(f"{text.relative_to(root)}: has a caption but no media")
        missing = [file for file in rows if file.is_relative_to(base) and not file.is_file()]
        entries += [f"{file.relative_to(root)}: named in a metadata file but not there" for file in missing]
    return found


def _hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _beside(file: Path, suffix: str) -> bytes | None:
    path = file.with_suffix(suffix)
    if not path.is_file():
        return None
    with open(path, "rb") as text:
        return text.read(_MAX_TEXT_BYTES + 1)


def _metadata_rows(root: Path) -> dict[Path, dict[str, Any]]:
    """Media path -> its row in the metadata.jsonl or metadata.csv of any folder (`file_name` is relative to it)."""
    rows: dict[Path, dict[str, Any]] = {}
    for name in _METADATA_NAMES:
        for file in sorted(root.rglob(name)):
            if _hidden(file, root):
                continue
            with open(file, encoding="utf-8-sig", newline="") as text:
                try:
                    lines = list(csv.DictReader(text)) if name.endswith(".csv") else _json_lines(text)
                except (ValueError, csv.Error) as error:
                    raise ValueError(f"{file}: cannot be read ({error})") from error
            for number, row in enumerate(lines, start=1):
                if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
                    raise ValueError(f"{file}: row {number} has no file_name; each row needs file_name and caption")
                rows[file.parent / row.pop("file_name")] = row
    return rows


def _json_lines(lines: Iterable[str]) -> list[Any]:
    return [json.loads(line) for line in lines if line.strip()]


def _captions(json_text: bytes | None, plain_text: bytes | None) -> tuple[list[str], dict[str, Any]]:
    """Captions and metadata from the text beside a media file; the `.json` goes before the `.txt`."""
    for text in (json_text, plain_text):
        if text is not None and len(text) > _MAX_TEXT_BYTES:
            raise ValueError(f"its caption file is larger than {_MAX_TEXT_BYTES} bytes")
    captions: list[str] = []
    meta: dict[str, Any] = {}
    if json_text is not None:
        try:
            record = json.loads(json_text)
        except ValueError as error:
            raise ValueError(f"its .json cannot be read ({error})") from error
        if not isinstance(record, dict):
            raise ValueError("its .json is not an object with a caption")
        captions, meta = _captions_of(record)
    if plain_text is not None and not captions:
        try:
            captions = [line.strip() for line in plain_text.decode("utf-8-sig").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise ValueError(f"its .txt is not UTF-8 ({error})") from error
    return captions, meta


def _captions_of(record: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """`caption` first, then the others of `captions`; `text` where neither is there. The rest is metadata."""
    given = [record.get("caption"), *(record.get("captions") or [])]
    if not any(given):
        given = [record.get("text")]
    captions = [text.strip() for text in given if isinstance(text, str) and text.strip()]
    meta = {name: value for name, value in record.items() if name not in ("caption", "captions", "text")}
    return list(dict.fromkeys(captions)), meta
