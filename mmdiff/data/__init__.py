"""All of a dataset but the decoding. `mmdiff.data.clips` needs Lightning, so it is imported on first use."""

from typing import TYPE_CHECKING, Any

from mmdiff.data.media import MediaError, whole_file
from mmdiff.data.sources import Item, Source, load_source

if TYPE_CHECKING:
    from mmdiff.data.clips import ClipDataModule as ClipDataModule
    from mmdiff.data.clips import ClipDataset as ClipDataset
    from mmdiff.data.clips import Sample as Sample

__all__ = [
    "ClipDataModule",
    "ClipDataset",
    "Item",
    "MediaError",
    "Sample",
    "Source",
    "load_source",
    "whole_file",
]


def __getattr__(name: str) -> Any:
    if name in ("ClipDataModule", "ClipDataset", "Sample"):
        from mmdiff.data import clips

        return getattr(clips, name)
    raise AttributeError(f"module 'mmdiff.data' has no attribute {name!r}")
