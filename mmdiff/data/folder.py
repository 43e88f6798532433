"""A plain folder of media, with captions beside the files or in a table."""

import os
from pathlib import Path
from typing import Any

from mmdiff.data.captions import MAX_TEXT_BYTES, CaptionError, csv_rows, json_rows, of_files, of_record
from mmdiff.data.items import SPLIT_NAMES, Found, Item, Problem

_METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
_NO_CAPTIONS = ("readme", "licen", "notice", "copying", "dataset", "metadata", "info", "index")  # how other texts start


def from_folder(root: Path, suffixes: tuple[str, ...]) -> Found:
    """Every file below `root` (recursive) whose suffix is one of `suffixes`; hidden files and folders are left alone.

    Captions: `.json` or `.txt` beside a file, else its rows in a `metadata.jsonl` / `metadata.csv` (column `file_name`)
    of any folder above it. Splits: sub-folders train, val (validation), test; without them everything is train.
    """
    present = [name for name in SPLIT_NAMES if (root / name).is_dir()]
    bases = [(SPLIT_NAMES[name], root / name) for name in present] or [("train", root)]
    rows, broken = _metadata_rows(root)
    found: Found = {}
    for split, base in bases:
        entries = found.setdefault(split, [])
        taken: set[Path] = set()
        files = [file for file in sorted(base.rglob("*")) if not _hidden(file, root) and file.is_file()]
        media = [file for file in files if file.suffix.lower() in suffixes]
        media.sort(key=lambda file: (str(file.with_suffix("")), suffixes.index(file.suffix.lower())))
        for file in media:
            stem = file.with_suffix("")
            if stem not in taken:
                taken.add(stem)
                entries.append(_entry(file, stem.relative_to(base).as_posix(), root, rows.get(file, [])))
        folders = {file.parent for file in media}
        for text in files:  # captions that lost their media, among the media
            if text.suffix.lower() not in (".txt", ".json") or text.with_suffix("") in taken:
                continue
            if text.parent in folders and not text.name.lower().startswith(_NO_CAPTIONS):
                entries.append(Problem(str(text.relative_to(root)), "no media", "has a caption but no media"))
        known = {*files}
        missing = [file for file in rows if file.is_relative_to(base) and file not in known]
        entries += [
            Problem(str(file.relative_to(root)), "unreachable", "named in a metadata file but not there")
            for file in missing
        ]
    found[bases[0][0]] += broken
    return found


def _entry(file: Path, key: str, root: Path, rows: list[dict[str, Any]]) -> Item | Problem:
    where = str(file.relative_to(root))
    try:
        captions, meta = of_files(_beside(file, ".json"), _beside(file, ".txt"))
        if not captions and rows:
            captions, meta = of_rows(rows)
    except CaptionError as error:
        return Problem(where, error.kind, str(error))
    except OSError as error:
        return Problem(where, "unreachable", f"its caption cannot be read ({error}); check the permissions")
    return Item(key, where, captions, meta, file, None, file.stat().st_size)


def of_rows(rows: list[dict[str, Any]]) -> tuple[list[str], dict[str, Any]]:
    """The captions of all rows of a file, in order, and the metadata of the first. Raises CaptionError."""
    read = [of_record(row) for row in rows]
    return list(dict.fromkeys(text for captions, _ in read for text in captions)), read[0][1]


def table(file: Path) -> list[tuple[int, dict[str, Any] | CaptionError]]:
    """The numbered rows of a `.jsonl` or `.csv`. Raises ValueError when it cannot be opened or is no such table."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error}); check that it is there and the permissions") from error
    return list((csv_rows if file.suffix == ".csv" else json_rows)(data))


def _hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _beside(file: Path, suffix: str) -> bytes | None:
    path = file.with_suffix(suffix)
    if not path.is_file():
        return None
    with open(path, "rb") as text:
        return text.read(MAX_TEXT_BYTES + 1)


def _metadata_rows(root: Path) -> tuple[dict[Path, list[dict[str, Any]]], list[Item | Problem]]:
    """(media path -> its rows in the metadata files of any folder, the rows that cannot be read).

    `file_name` is relative to the metadata file's folder.
    """
    rows: dict[Path, list[dict[str, Any]]] = {}
    broken: list[Item | Problem] = []
    for name in _METADATA_NAMES:
        for file in sorted(root.rglob(name)):
            if _hidden(file, root):
                continue
            for number, row in table(file):
                where = f"{file.relative_to(root)}:{number}"
                if isinstance(row, CaptionError):
                    broken.append(Problem(where, row.kind, str(row)))
                elif not isinstance(row.get("file_name"), str):
                    raise ValueError(f"{where}: row has no file_name; each row needs file_name and caption")
                else:
                    named = os.path.relpath(file.parent / row.pop("file_name"), root)
                    if named.split(os.sep)[0] == os.pardir:
                        reason = "its file_name points outside of the folder; put the file below it"
                        broken.append(Problem(where, "unreachable", reason))
                    else:
                        rows.setdefault(root / named, []).append(row)
    return rows, broken
