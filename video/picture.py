"""Decoded pictures as a player shows them: upright."""

from collections.abc import Callable

import av
import numpy as np
from av.sidedata.sidedata import Type

from mmdiff.data.media import UnsupportedError

# Display matrices of ISO 14496-12 that need no resampling, as their signs (a, b, c, d) -> the same turn by numpy.
# A point (x, y) of the stored picture is shown at (a x + c y, b x + d y).
_TURNS: dict[tuple[int, int, int, int], Callable[[np.ndarray], np.ndarray]] = {
    (1, 0, 0, 1): lambda picture: picture,
    (0, 1, -1, 0): lambda picture: np.rot90(picture, -1),
    (-1, 0, 0, -1): lambda picture: np.rot90(picture, 2),
    (0, -1, 1, 0): lambda picture: np.rot90(picture, 1),
    (-1, 0, 0, 1): lambda picture: picture[:, ::-1],
    (1, 0, 0, -1): lambda picture: picture[::-1],
    (0, 1, 1, 0): lambda picture: picture.transpose(1, 0, 2),
    (0, -1, -1, 0): lambda picture: np.rot90(picture, 2).transpose(1, 0, 2),
}


def turn_of(frame: av.VideoFrame, name: str) -> Callable[[np.ndarray], np.ndarray]:
    """What turns and mirrors a picture (H, W, 3) as the frame's display matrix says (telephones film sideways).

    Raises UnsupportedError, naming the file by `name`, when the matrix is no turn by quarters.
    """
    matrix = _matrix(frame)
    if matrix not in _TURNS:
        raise UnsupportedError(
            f"{name}: is to be shown turned by {frame.rotation} degrees; rewrite it upright, e.g. ffmpeg -i IN OUT.mp4"
        )
    return _TURNS[matrix]


def _matrix(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    try:
        data = frame.side_data.get(Type.DISPLAYMATRIX)  # type: ignore[call-overload]
    except ValueError:  # side data that PyAV does not know
        data = None
    if data is None:
        return (1, 0, 0, 1)
    a, b, _, c, d = np.frombuffer(bytes(data), dtype=np.int32)[:5] / 65536
    return (_sign(a), _sign(b), _sign(c), _sign(d))


def _sign(value: float) -> int:
    return 0 if abs(value) < 0.01 else (1 if abs(value - 1) < 0.01 else -1 if abs(value + 1) < 0.01 else 2)
