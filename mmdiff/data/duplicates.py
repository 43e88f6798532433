"""Near duplicates by perceptual fingerprints: candidates share a band of bits and are confirmed by all their values."""

from collections import defaultdict

import numpy as np

from mmdiff.data.medium import Fingerprint

ORDER = ("test", "val", "train")  # of splits: a copy of a test clip is dropped from training, not the reverse
BANDS = 16  # of 16 bits each
MOST_BITS = BANDS - 1  # so many flipped bits leave one band whole, so that no pair within it is missed
MOST_STRETCH = 0.02  # of the length: two takes of a word may sound alike but last differently
MOST_VALUE = 24  # of 255: how far any coarse value of a copy may lie from the original's


def fingerprint_bits(levels: np.ndarray) -> bytes:
    """32 bytes of (4, 64) numbers, four moments of a clip: which of a moment's are above their median."""
    if levels.shape != (4, 64):
        raise ValueError(f"levels have shape {levels.shape}; (4, 64) is needed")
    return np.packbits(levels > np.median(levels, axis=1, keepdims=True)).tobytes()


class Duplicates:
    """Finds for each new fingerprint the first earlier one that it nearly equals.

    Two are near when at most `MOST_BITS` of their 256 bits, no value by more than `most_value` and their lengths by at
    most 2 % differ. The answer depends on the order of the calls alone; what is found to be a copy is no original for
    later ones.
    """

    def __init__(self, most_value: int = MOST_VALUE) -> None:
        self.most_value = most_value
        self._places: list[int] = []
        self._bits: list[np.ndarray] = []  # (16,) uint16, one number a band
        self._values: list[np.ndarray] = []  # (V,) int16
        self._lengths: list[float] = []  # s
        self._bands: defaultdict[tuple[int, int], list[int]] = defaultdict(list)

    def first(self, place: int, found: Fingerprint) -> int | None:
        """The place of the original that this one is a copy of; None, and it is remembered, where it is new."""
        bits = np.frombuffer(found.bits, dtype=">u2")
        values = np.frombuffer(found.values, dtype=np.uint8).astype(np.int16)
        rows = sorted({row for band, number in enumerate(bits.tolist()) for row in self._bands.get((band, number), ())})
        if rows:
            differ = np.bitwise_count(np.stack([self._bits[row] for row in rows]) ^ bits).sum(1)
            for row in (rows[i] for i in np.flatnonzero(differ <= MOST_BITS)):
                if abs(self._lengths[row] - found.length_s) > MOST_STRETCH * max(self._lengths[row], found.length_s):
                    continue
                other = self._values[row]
                if other.shape == values.shape and np.abs(other - values).max(initial=0) <= self.most_value:
                    return self._places[row]
        row = len(self._places)
        self._places.append(place)
        self._bits.append(bits)
        self._values.append(values)
        self._lengths.append(found.length_s)
        for band, number in enumerate(bits.tolist()):
            self._bands[band, number].append(row)
        return None
