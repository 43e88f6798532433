"""Datasets of Hugging Face `datasets`: a folder of `save_to_disk`, or `hf://OWNER/NAME` from the hub."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdiff.data.captions import CaptionError, of_record
from mmdiff.data.items import SPLIT_NAMES, Found, Item, Problem
from mmdiff.data.media import UnreachableError

_MEDIA_COLUMNS = ("video", "audio", "mp4", "flac", "wav", "media", "file")


@dataclass(frozen=True)
class RowItem(Item):
    """A row of a dataset, whose `column` holds {"bytes": ..., "path": ...}."""

    rows: Any = None  # a datasets.Dataset with that column undecoded
    column: str = ""
    row: int = 0

    def read(self) -> bytes:
        """The bytes of the media file. Raises UnreachableError when the row has none."""
        try:
            data = self.rows[self.row][self.column]["bytes"]
        except (OSError, LookupError, TypeError) as error:
            raise UnreachableError(f"{self.where}: cannot be read ({error}); fetch the dataset again") from error
        if data is None:  # only a name, which a stranger's dataset could let point anywhere
            raise UnreachableError(
                f"{self.where}: the dataset holds a file's name and not its bytes; give a manifest of the files, or "
                "embed them (datasets.table.embed_table_storage)"
            )
        return bytes(data)

    def source(self) -> bytes:
        return self.read()


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def from_hub(path: str) -> Found:
    """The rows of a saved folder, or of `hf://OWNER/NAME` or `hf://OWNER/NAME/CONFIG`, which may be downloaded.

    The media is the column of type Audio or Video, or the first of video, audio, mp4, flac, wav, media, file that holds
    {"bytes", "path"}; captions are in `caption`, `captions` or `text`; the other columns are metadata.
    Raises ImportError without the package datasets, ValueError where it holds no such column or cannot be read.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"path={path!r} needs datasets; pip install 'mmdiff[tables]'") from error
    try:
        if path.startswith("hf://"):
            owner, name, *config = path.removeprefix("hf://").strip("/").split("/")
            loaded = datasets.load_dataset(f"{owner}/{name}", *config)
        else:
            loaded = datasets.load_from_disk(path)
    except Exception as error:  # `datasets` has no base class of its errors
        raise ValueError(f"path={path!r}: the package datasets cannot load it ({error}); check the name") from error
    parts = loaded if isinstance(loaded, Mapping) else {"train": loaded}
    found: Found = {}
    for name, rows in parts.items():
        split = SPLIT_NAMES.get(name.split("[")[0], "train" if len(parts) == 1 else None)
        if split is not None:
            found.setdefault(split, []).extend(_items(rows, f"{Path(path).name}:{name}"))
    if not found:
        raise ValueError(f"path={path!r} has the splits {', '.join(parts)}; train, val or test is needed")
    return found


def _items(rows: Any, where: str) -> list[Item | Problem]:
    column, rows = _undecoded(rows, where)
    others = [name for name in rows.column_names if name != column]
    entries: list[Item | Problem] = []
    texts = rows.select_columns(others) if others else [{}] * len(rows)
    for number, record in enumerate(texts):
        place = f"{where}:{number}"
        try:
            captions, meta = of_record(record)
        except CaptionError as error:
            entries.append(Problem(place, error.kind, str(error)))
            continue
        key = str(meta.get("key", number))
        entries.append(RowItem(key, place, captions, meta, Path(place), 0, rows=rows, column=column, row=number))
    return entries


def _undecoded(rows: Any, where: str) -> tuple[str, Any]:
    """(name of the media column, the dataset with it as {"bytes", "path"})."""
    for name, feature in rows.features.items():
        if type(feature).__name__ in ("Audio", "Video"):
            return name, rows.cast_column(name, type(feature)(decode=False))
    for name in _MEDIA_COLUMNS:
        if name in rows.features and isinstance(rows.features[name], dict) and "bytes" in rows.features[name]:
            return name, rows
    raise ValueError(
        f"{where}: no column of media among {', '.join(rows.column_names)}; one of type Audio or Video is needed"
    )
