"""Curation: media of any source are cut, measured, filtered, made unique, converted and written as WebDataset shards.

Three steps. Each item becomes one result file, named by the hash of its bytes, caption and settings, so that work is
found again by whoever starts anew. The results, in the order of the source, are compared for duplicates. The shards
are then written of them. The steps see no clock, worker or machine: the same input gives the same bytes.
"""

import base64
import dataclasses
import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path, PurePosixPath
from typing import Any

from mmdiff.data.media import MediaError, whole_file
from mmdiff.data.medium import FAULTS, Fingerprint, Medium, Piece
from mmdiff.data.sources import Item

FORMAT = 1  # of the result files; a change of it makes older ones stale
_TRIES = 2  # of an item, before it is done in a process of its own
Range = tuple[float | None, float | None]


@dataclass(frozen=True)
class Recipe:
    """What becomes of an item.

    keep: name of a measure, or a number among the facts (duration), to (least, most), both inclusive, None for open.
    most_s: longer pieces are cut into equal parts. allow: faults (black, frozen, silent, single frame) that are kept.
    Raises ValueError for a measure that the medium does not give, or an empty range.
    """

    medium: Medium
    keep: Mapping[str, Range] = field(default_factory=dict)
    most_s: float | None = None
    allow: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        known = ("duration", *self.medium.measures())
        for name, (least, most) in self.keep.items():
            if name not in known:
                raise ValueError(f"keep={name!r} is no measure of these settings; there are {', '.join(known)}")
            if least is not None and most is not None and least > most:
                raise ValueError(f"keep {name}={least:g}:{most:g} keeps nothing; the least is above the most")
        if unknown := [fault for fault in self.allow if fault not in FAULTS]:
            raise ValueError(f"allow={unknown[0]!r} is no fault; there are {', '.join(FAULTS)}")
        if self.most_s is not None and not self.most_s > 0:
            raise ValueError(f"longest_s={self.most_s} is not above 0; leave it out to keep pieces whole")

    def tree(self) -> dict[str, Any]:
        """The recipe as plain values, for the report and for its key."""
        cls = type(self.medium)
        settings = {f.name: getattr(self.medium, f.name) for f in dataclasses.fields(self.medium)}  # type: ignore[arg-type]
        keep = {name: list(values) for name, values in sorted(self.keep.items())}
        media = {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": settings}
        return {"media": media, "keep": keep, "most_s": self.most_s, "allow": sorted(self.allow)}

    def key(self) -> str:
        """Hash of all that decides a result besides the item."""
        return digest(json.dumps([FORMAT, self.tree(), self.medium.key()], sort_keys=True, default=str).encode())

    def refusal(self, facts: Mapping[str, Any], measures: Mapping[str, float], faults: Sequence[str]) -> str | None:
        """Why a piece is dropped, beginning with the word that reports count by."""
        if left := [fault for fault in faults if fault not in self.allow]:
            return left[0]
        numbers = {"duration": facts["duration"], **measures}
        for name, (least, most) in self.keep.items():
            value = float(numbers[name])
            if least is not None and not value >= least:
                return f"{name}: {value:.4g} is under {least:g}"
            if most is not None and not value <= most:
                return f"{name}: {value:.4g} is over {most:g}"
        return None


def digest(*parts: bytes) -> str:
    """SHA-256 in hexadecimal, of the parts and their lengths."""
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8))
        found.update(part)
    return found.hexdigest()


def utf8(text: str) -> bytes:
    r"""UTF-8 of JSON or HTML; half of a surrogate pair, of a name or a field that was not UTF-8, becomes \udcff."""
    return text.encode("utf-8", "backslashreplace")


@dataclass(frozen=True)
class Task:
    """One item's work: item -> result file in `folder`. alone: in a process that does nothing else."""

    item: Item
    recipe: Recipe
    recipe_key: str
    folder: Path
    alone: bool = False

    def __call__(self) -> str:
        """Name of the result file, which is there when this returns. The file holds record.json and the kept media.

        An item that was begun twice and never done, since its worker died, is done in a process of its own, so that
        only one that kills its reader counts as bad.
        """
        item = self.item
        told = json.dumps([item.where, item.key, item.captions, item.meta], sort_keys=True, default=str).encode()
        try:
            data = item.read()
        except MediaError as error:
            name = result_name(digest(self.recipe_key.encode(), told, str(error).encode()))
            return self._write(name, bad(error.kind, str(error)), [])
        name = result_name(digest(self.recipe_key.encode(), told, data))
        if (self.folder / name).exists():
            return name
        begun = self.folder / "begun" / name.replace("/", "-")
        if not self.alone:
            begun.parent.mkdir(parents=True, exist_ok=True)
            with begun.open("ab") as file:
                file.write(b".")
            if begun.stat().st_size > _TRIES:
                return self._isolated(name)
        try:
            pieces, total_s = self.recipe.medium.pieces(data, item.where)
            clips, media = self._clips(data, pieces, total_s)
            record: dict[str, Any] = {"clips": clips}
        except MediaError as error:
            record, media = bad(error.kind, str(error)), []
        except Exception as error:  # of one item, which must not end the work on millions; it is counted by its kind
            record, media = bad("unexpected error", f"{item.where}: {type(error).__name__}: {error}"), []
        self._write(name, record, media)  # a full disk is no fault of the item
        begun.unlink(missing_ok=True)
        return name

    def _isolated(self, name: str) -> str:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            try:
                return pool.submit(dataclasses.replace(self, alone=True)).result()
            except BrokenProcessPool:
                reason = f"{self.item.where}: its reader died (killed, or out of memory); repair it or leave it out"
                return self._write(name, bad("kills its reader", reason), [])

    def _write(self, name: str, record: Mapping[str, Any], media: Sequence[tuple[str, bytes]]) -> str:
        with whole_file(self.folder / name) as temporary:
            write_tar(temporary, [("record.json", json.dumps(record, sort_keys=True).encode()), *media])
        return name

    def _clips(
        self, data: bytes, pieces: Iterable[Piece], total_s: float
    ) -> tuple[list[dict[str, Any]], list[tuple[str, bytes]]]:
        item, medium = self.item, self.recipe.medium
        clips: list[dict[str, Any]] = []
        media: list[tuple[str, bytes]] = []
        for piece in (part for stretch in pieces for part in stretch.split(total_s, self.recipe.most_s)):
            seen = medium.look(data, item.where, piece, (item.captions or [""])[0])
            dropped = self.recipe.refusal(seen.facts, seen.measures, seen.faults)
            clip: dict[str, Any] = {
                "start_s": round(piece.start_s, 6),
                "whole": piece.whole,
                "facts": dict(seen.facts),
                "measures": {name: round(float(value), 6) for name, value in seen.measures.items()},
                "dropped": dropped,
            }
            if dropped is None:
                made = medium.encode(data, item.where, PurePosixPath(item.where).suffix, piece)
                clip |= {"facts": dict(made.facts), "suffix": made.suffix, "changes": list(made.changes)}
                clip |= {"bits": seen.fingerprint.bits.hex(), "sha256": hashlib.sha256(made.data).hexdigest()}
                clip["length_s"] = seen.fingerprint.length_s
                clip["values"] = base64.b64encode(seen.fingerprint.values).decode()
                clip["member"] = f"{len(clips):06d}{made.suffix}"
                media.append((clip["member"], made.data))
            clips.append(clip)
        return clips, media


def bad(kind: str, reason: str) -> dict[str, Any]:
    """The record of an item that cannot be used."""
    return {"bad": {"kind": kind, "reason": " ".join(reason.split())}, "clips": []}


def result_name(key: str) -> str:
    """Below the folder of results, spread over 256 folders."""
    return f"{key[:2]}/{key}.tar"


def fingerprint_of(clip: Mapping[str, Any]) -> Fingerprint:
    return Fingerprint(bytes.fromhex(clip["bits"]), base64.b64decode(clip["values"]), clip["length_s"])


def read_record(path: Path) -> dict[str, Any]:
    """The record of a result file. Raises ValueError where it is damaged (a full disk, a failing one)."""
    return _member(path, "record.json", json.loads)  # type: ignore[no-any-return]


def read_media(path: Path, member: str) -> bytes:
    return _member(path, member, bytes)  # type: ignore[no-any-return]


def _member(path: Path, member: str, read: Any) -> Any:
    try:
        with tarfile.open(path, "r:") as archive:
            held = archive.extractfile(member)
            return read(held.read() if held else b"")
    except (tarfile.TarError, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: damaged ({error}); delete it and start again, the rest is kept") from error


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """An uncompressed tar of these (name, data), without times, owners or anything else that could differ."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o644
            archive.addfile(info, io.BytesIO(data))


@dataclass(frozen=True)
class Member:
    """A clip in a shard: its key, its JSON text, and the result file that holds its media."""

    key: str
    text: str
    suffix: str
    result: str
    member: str


@dataclass(frozen=True)
class Shard:
    """One shard to write: `out / name` of the results in `folder`."""

    name: str
    members: tuple[Member, ...]
    folder: Path
    out: Path

    def key(self) -> str:
        return digest(*(json.dumps(dataclasses.astuple(member)).encode() for member in self.members))

    def __call__(self) -> dict[str, Any]:
        """Name, count, bytes and SHA-256 of the shard; written unless the same one is there."""
        note = self.folder / "shards" / f"{self.name}.json"
        path = self.out / self.name
        if note.is_file() and path.is_file():
            found: dict[str, Any] = json.loads(note.read_text("utf-8"))
            if found["key"] == self.key() and found["bytes"] == path.stat().st_size:
                return found
        with whole_file(path) as temporary:
            write_tar(temporary, (entry for member in self.members for entry in self._entries(member)))
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        made = {"name": self.name, "clips": len(self.members), "bytes": path.stat().st_size, "sha256": sha256}
        with whole_file(note) as temporary:
            temporary.write_text(json.dumps({**made, "key": self.key()}), "utf-8")
        return {**made, "key": self.key()}

    def _entries(self, member: Member) -> list[tuple[str, bytes]]:
        media = read_media(self.folder / member.result, member.member)
        return [(f"{member.key}{member.suffix}", media), (f"{member.key}.json", utf8(member.text))]
