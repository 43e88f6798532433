"""Other decoders than PyAV behind `VideoReader`, by name, each checked against PyAV when it opens a file.

What they are known to get wrong, and what is done about it:
- decord 0.6 counts frames that an edit list hides, knows no AV1, moves the first frame to time 0, and its `seek` stops
  at keyframes. So its frames are compared with PyAV's index, and only `get_batch` is used. It decodes ahead, up to the
  whole clip, so long clips are refused; and in a process that was forked after its first use it hangs now and then, so
  there it is refused too.
- torchcodec counts hidden frames too, does not mirror, and its approximate seeking returns wrong frames at variable
  rates. So only exact seeking is used, and the same comparison is made.
Neither has wheels for every platform; torchcodec needs FFmpeg's shared libraries beside it.
"""

import io
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from mmdiff.data.media import UnsupportedError

if TYPE_CHECKING:
    from video.source import MediaSource

BackendName = Literal["pyav", "decord", "torchcodec"]

_TIME_S = 1e-3  # how far apart the times of one frame may be: containers round to this
_LEVELS = 2.0  # mean difference of a picture, of 255


class _Decoder(Protocol):
    def __len__(self) -> int: ...

    def frames(self, indices: Sequence[int]) -> tuple[Tensor, np.ndarray]:
        """((3, T, H, W) uint8, (T,) presentation times in s from any origin) of frames in presentation order."""


class _Decord:
    process: ClassVar[int | None] = None  # the first that used it

    def __init__(self, source: "MediaSource") -> None:
        import decord

        _Decord.process = _Decord.process or os.getpid()
        if _Decord.process != os.getpid():
            raise RuntimeError(
                "backend='decord' was used before this process was forked, where it may hang; "
                "use backend='pyav', or start workers by spawn"
            )
        self._reader = decord.VideoReader(_source(source), num_threads=1)

    def __len__(self) -> int:
        return len(self._reader)

    def frames(self, indices: Sequence[int]) -> tuple[Tensor, np.ndarray]:
        pixels: np.ndarray = self._reader.get_batch(list(indices)).asnumpy()  # (T, H, W, 3)
        times_s = self._reader.get_frame_timestamp(list(indices))[:, 0].astype(np.float64)
        return torch.from_numpy(pixels).permute(3, 0, 1, 2).contiguous(), times_s


class _TorchCodec:
    def __init__(self, source: "MediaSource") -> None:
        from torchcodec.decoders import VideoDecoder

        self._reader = VideoDecoder(_source(source), seek_mode="exact", num_ffmpeg_threads=1, dimension_order="NCHW")

    def __len__(self) -> int:
        return len(self._reader)

    def frames(self, indices: Sequence[int]) -> tuple[Tensor, np.ndarray]:
        batch = self._reader.get_frames_at(list(indices))  # data (T, 3, H, W)
        return batch.data.transpose(0, 1).contiguous(), batch.pts_seconds.double().numpy()


_DECODERS: dict[str, tuple[Callable[["MediaSource"], _Decoder], str]] = {
    "decord": (_Decord, "pip install 'mmdiff[decord]', on Linux with x86-64"),
    "torchcodec": (_TorchCodec, "pip install torchcodec==0.11.*, and FFmpeg 4 to 8 as shared libraries"),
}


_ABANDONED: list[_Decoder] = []


class Backend:
    """A file opened by the decoder `backend`, "decord" or "torchcodec"; all its answers are compared with PyAV's index.

    times_s: of all frames, by PyAV. first: the first frame by PyAV, (3, 1, H, W) uint8.
    Raises UnsupportedError, naming the file by `name` and the difference, where the decoder would get the file wrong;
    ValueError for a decoder that is unknown or not installed.
    """

    def __init__(self, backend: str, source: "MediaSource", name: str, times_s: Sequence[float], first: Tensor) -> None:
        if backend not in _DECODERS:
            raise ValueError(f"backend={backend!r} is not one of pyav, {', '.join(_DECODERS)}")
        make, cure = _DECODERS[backend]
        self._backend = backend
        self._name = name
        self._times_s = np.asarray(times_s)
        try:
            self._decoder = make(source)
            found = len(self._decoder)
        except RuntimeError as error:
            if "Could not load libtorchcodec" in str(error):
                raise ValueError(f"backend={backend!r} finds no FFmpeg; {cure}") from error
            if "was forked" in str(error):
                raise
            raise self._refusal(f"cannot open it ({_line(error)})") from error
        except (ImportError, OSError) as error:
            raise ValueError(f"backend={backend!r} cannot be used here ({_line(error)}); {cure}") from error
        except Exception as error:  # of classes of their own
            raise self._refusal(f"cannot open it ({_line(error)})") from error
        if found != len(times_s):
            raise self._refusal(f"finds {found} frames where {len(times_s)} are shown")
        picture, origin_s = self._decode([0])
        self._origin_s = origin_s[0]
        if picture.shape != first.shape:
            raise self._refusal(
                f"gives pictures of {tuple(picture.shape[2:])} where {tuple(first.shape[2:])} are shown"
            )
        levels = (picture.float() - first.float()).abs().mean().item()
        if levels > _LEVELS:
            raise self._refusal(f"gives other colours or another turn (mean difference {levels:.3g} of 255)")

    def frames(self, indices: Sequence[int]) -> Tensor:
        """(3, T, H, W) uint8 of these indices, in this order. Raises UnsupportedError when their times are wrong."""
        pixels, found_s = self._decode(indices)
        meant_s = self._times_s[list(indices)] - self._times_s[0]
        apart_s = np.abs(found_s - self._origin_s - meant_s).max()
        if apart_s > _TIME_S:
            raise self._refusal(f"returns frames that are up to {apart_s:.3g} s away")
        return pixels

    def abandon(self) -> None:
        """Leaves the parent process's decoder be: to delete it would wait for threads that a fork does not copy."""
        _ABANDONED.append(self._decoder)

    def _decode(self, indices: Sequence[int]) -> tuple[Tensor, np.ndarray]:
        try:
            return self._decoder.frames(indices)
        except Exception as error:
            raise self._refusal(f"cannot decode it ({_line(error)})") from error

    def _refusal(self, what: str) -> UnsupportedError:
        return UnsupportedError(f"{self._name}: {self._backend} {what}; use backend='pyav'")


def _source(source: "MediaSource") -> Any:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    source.seek(0)
    return source


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
