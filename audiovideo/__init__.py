"""Picture and sound together, on one clock. Names are imported on first use, so that importing it stays cheap."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from audiovideo.data import ClipDataModule as ClipDataModule

__all__ = ["ClipDataModule"]


def __getattr__(name: str) -> Any:
    if name == "ClipDataModule":
        from audiovideo.data import ClipDataModule

        return ClipDataModule
    raise AttributeError(f"module 'audiovideo' has no attribute {name!r}")
