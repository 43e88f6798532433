"""How video files are read, rightly and wrongly, for the doctor: what a batch may hold in their place."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from mmdiff.data.items import Item
from mmdiff.doctor import Check, Origin, Reading, Readings
from video.data import nearest, padded, resize_cover
from video.files import EXTENSIONS, VideoReader


class Film(Readings):
    """The frames of a file as they are shown, backwards, and with blue in the place of red."""

    def reads(self, item: Item) -> bool:
        return Path(item.where.rpartition(":")[2]).suffix.lower() in EXTENSIONS

    def __call__(self, item: Item, start_s: float, rate: float, like: Tensor) -> Sequence[Reading]:
        _, steps, height, width = like.shape  # (3, T, H, W)
        with VideoReader(item.source(), name=item.where) as reader:
            first, end_s = reader.start_s + start_s, reader.start_s + reader.duration_s
            times_s = [first + step / rate for step in range(steps) if first + step / rate < end_s - 1e-4]
            frames = reader.read_at(nearest(reader, times_s or [first]))
        clip = padded(resize_cover(frames.float().div_(127.5).sub_(1), (height, width)), steps)
        return [
            Reading(clip),
            Reading(clip.flip(1), "time flipped", "run backwards", "Look for a flip of axis 2 after decoding"),
            Reading(
                clip.flip(0),
                "channels swapped",
                "have red and blue exchanged (BGR in the place of RGB)",
                "Convert the frames where they are decoded: OpenCV gives BGR, this suite's readers RGB",
            ),
        ]


def checks() -> list[Check]:
    """For the entry-point group `mmdiff.doctor`."""
    return [Origin([Film()])]
