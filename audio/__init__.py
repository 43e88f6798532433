"""Audio: decoding, files, spectrograms. Names are imported on first use, so that `import audio` stays cheap."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from audio.data import ClipDataModule as ClipDataModule

__all__ = ["ClipDataModule"]


def __getattr__(name: str) -> Any:
    if name == "ClipDataModule":
        from audio.data import ClipDataModule

        return ClipDataModule
    raise AttributeError(f"module 'audio' has no attribute {name!r}")
