"""Video: decoding, files, rendering. Names are imported on first use, so that `import video` stays cheap."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from video.data import ClipDataModule as ClipDataModule

__all__ = ["ClipDataModule"]


def __getattr__(name: str) -> Any:
    if name == "ClipDataModule":
        from video.data import ClipDataModule

        return ClipDataModule
    raise AttributeError(f"module 'video' has no attribute {name!r}")
