"""A table of media: a `.jsonl`, `.csv` or `.parquet` whose rows name files below its own folder."""

from pathlib import Path, PurePosixPath
from typing import Any

from mmdiff.data.captions import CaptionError
from mmdiff.data.folder import of_rows, table
from mmdiff.data.items import SPLIT_NAMES, Found, Item, Problem

SUFFIXES = (".jsonl", ".csv", ".parquet")
_NAME_COLUMNS = ("file_name", "path", "file")


def from_manifest(manifest: Path, suffixes: tuple[str, ...]) -> Found:
    """The files that the rows name, in order.

    Columns: `file_name` (or `path`, `file`), relative to the manifest's folder; `caption`, `captions` or `text`;
    `split` (train, val, validation or test; default train); the rest is metadata. Rows of one file add up.
    A row that points outside of the manifest's folder, also by a link, is a problem of its own and is not opened.
    Raises ValueError when the manifest cannot be read or has no column of names.
    """
    root = manifest.parent.resolve()
    rows = _parquet_rows(manifest) if manifest.suffix == ".parquet" else table(manifest)
    named: dict[tuple[str, str], list[tuple[int, dict[str, Any]]]] = {}
    found: Found = {}
    nameless = 0
    for number, row in rows:
        where = f"{manifest.name}:{number}"
        if isinstance(row, CaptionError):
            found.setdefault("train", []).append(Problem(where, row.kind, str(row)))
            continue
        split = SPLIT_NAMES.get(str(row.pop("split", None) or "train").lower())
        name = next((row[column] for column in _NAME_COLUMNS if isinstance(row.get(column), str)), None)
        if name is None:
            nameless += 1
            found.setdefault("train", []).append(Problem(where, "unreachable", "has no file_name; give one"))
        elif split is None:
            reason = "its split is none of train, val, validation, test; write one of them or none"
            found.setdefault("train", []).append(Problem(where, "unknown split", reason))
        else:
            meta = {column: value for column, value in row.items() if column not in _NAME_COLUMNS}
            named.setdefault((split, name), []).append((number, meta))
    if nameless and not named:
        raise ValueError(f"{manifest}: its rows have no column {', '.join(_NAME_COLUMNS)}; name the files in one")
    for (split, name), given in named.items():
        entry = _entry(root, name, f"{manifest.name}:{given[0][0]}", [meta for _, meta in given], suffixes)
        found.setdefault(split, []).append(entry)
    return found


def _entry(root: Path, name: str, place: str, rows: list[dict[str, Any]], suffixes: tuple[str, ...]) -> Item | Problem:
    where = f"{place}:{name[:200]}"
    if "://" in name or "\0" in name:
        return Problem(where, "unreachable", "is no path of a file; give one relative to the manifest")
    try:
        file = (root / name).resolve()
        if not file.is_relative_to(root):
            reason = f"points outside of {root}; put the files below the manifest's folder"
            return Problem(where, "unreachable", reason)
        size = file.stat().st_size if file.is_file() else None
    except (OSError, RuntimeError) as error:  # RuntimeError: links that go round
        return Problem(where, "unreachable", f"cannot be reached ({error}); check the name and the permissions")
    if size is None:
        return Problem(where, "unreachable", "is not there; put the file back or delete the row")
    if file.suffix.lower() not in suffixes:
        return Problem(where, "not media", f"ends in {file.suffix!r}, not in one of {', '.join(suffixes)}")
    try:
        captions, meta = of_rows(rows)
    except CaptionError as error:
        return Problem(where, error.kind, str(error))
    return Item(str(PurePosixPath(name).with_suffix("")), where, captions, meta, file, None, size)


def _parquet_rows(manifest: Path) -> list[tuple[int, dict[str, Any] | CaptionError]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ImportError(f"{manifest}: Parquet needs pyarrow; pip install 'mmdiff[tables]'") from error
    try:
        with ParquetFile(manifest) as file:
            return list(enumerate((row for batch in file.iter_batches() for row in batch.to_pylist()), start=1))
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{manifest}: cannot be read as Parquet ({error}); write it again") from error
