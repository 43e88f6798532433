"""All of a dataset but the decoding. What needs torch or Lightning is imported on first use."""

import importlib
from typing import TYPE_CHECKING, Any

from mmdiff.data.items import Item, Problem, Source
from mmdiff.data.media import MediaError, whole_file
from mmdiff.data.sources import load_source

if TYPE_CHECKING:
    from mmdiff.data.batches import Buckets as Buckets
    from mmdiff.data.clips import ClipDataModule as ClipDataModule
    from mmdiff.data.clips import ClipDataset as ClipDataset
    from mmdiff.data.clips import Sample as Sample
    from mmdiff.data.loader import ClipLoader as ClipLoader

__all__ = [
    "Buckets",
    "ClipDataModule",
    "ClipDataset",
    "ClipLoader",
    "Item",
    "MediaError",
    "Problem",
    "Sample",
    "Source",
    "load_source",
    "whole_file",
]

_LATE = {
    "Buckets": "batches",
    "ClipDataModule": "clips",
    "ClipDataset": "clips",
    "ClipLoader": "loader",
    "Sample": "clips",
}


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(importlib.import_module(f"mmdiff.data.{_LATE[name]}"), name)
    raise AttributeError(f"module 'mmdiff.data' has no attribute {name!r}")
