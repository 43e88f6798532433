"""Where a film cuts: jumps of colour and picture between neighbouring frames that stand out among their neighbours.

After the content and adaptive detectors of PySceneDetect, on small pictures and without OpenCV. T frames, H W space.
"""

from itertools import pairwise

import numpy as np

_NEAR = 4  # frames on each side that a cut must stand out among: fast motion jumps every frame, a cut once
_TIMES = 3.0  # by this factor
_BINS = 16


def jumps(pictures: np.ndarray) -> np.ndarray:
    """(T - 1,) in [0, 1]: how much each frame differs from the one before.

    pictures: (T, H, W, 3) uint8, small (16 to 64 pixels a side). The mean of two differences: of the pictures, point by
    point, and of their colour histograms, which motion leaves alone.
    """
    small = pictures.astype(np.float32) / 255
    by_point = np.abs(np.diff(small, axis=0)).mean((1, 2, 3))
    bins = pictures // (256 // _BINS)  # (T, H, W, 3) uint8
    count = bins.shape[0]
    tables = np.zeros((count, 3 * _BINS), dtype=np.float32)
    for channel in range(3):
        flat = bins[..., channel].reshape(count, -1) + channel * _BINS
        for row in range(count):
            tables[row] += np.bincount(flat[row], minlength=3 * _BINS)
    tables /= tables.sum(1, keepdims=True)
    by_colour = np.abs(np.diff(tables, axis=0)).sum(1) / 2
    return (by_point + by_colour) / 2


def cuts(differences: np.ndarray, threshold: float, shortest: int = 2) -> list[int]:
    """Indices of the frames that begin a new scene, given `jumps`.

    A jump is a cut when it is over `threshold`, and over three times the median of its neighbours. A flash jumps twice:
    of two cuts less than `shortest` frames apart neither is one.
    """
    found = []
    for place, value in enumerate(differences.tolist()):
        around = [*differences[max(0, place - _NEAR) : place], *differences[place + 1 : place + 1 + _NEAR]]
        if value > threshold and value > _TIMES * (float(np.median(around)) if around else 0.0):
            found.append(place + 1)
    close = {index for pair in pairwise(found) if pair[1] - pair[0] < shortest for index in pair}
    return [index for index in found if index not in close]
