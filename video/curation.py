"""Video for reports and curation: cuts, motion, black and frozen pictures, fingerprints, re-encoding.

T frames, H W space.
"""

import io
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, Literal

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmdiff.data.duplicates import fingerprint_bits
from mmdiff.data.media import TooLargeError
from mmdiff.data.medium import Encoded, Fingerprint, MediaSource, Medium, Piece, Seen
from mmdiff.data.towers import weights_key
from video.files import EXTENSIONS, VideoReader, write_video
from video.reader import MAX_BYTES
from video.scenes import cuts, jumps
from video.scores import aesthetic_score, clip_score
from video.source import open_container

_SIDE = 64  # pixels of the small pictures that motion, black and frozen are measured on
_PAIRS = 32  # neighbouring frames that are compared, at most
_BLACK, _BLACK_SHARE = 0.1, 0.98  # as FFmpeg's blackdetect: so dark, and so much of the picture
_FROZEN = 3 / 255  # what compression does to a still picture
_CHUNK_BYTES = 1 << 27


@dataclass(frozen=True)
class VideoMedium(Medium):
    """Settings of video curation; all are off by default, so that files are kept as they are, byte for byte.

    fps, size (height, width): of the output; resize: cover (the size, the rest cut off at both sides) or fit (within
    it, on black). crf: quality of H.264, 16 is visually lossless. scene_threshold: cut where two frames differ by more
    (0 to 1; 0.15 finds hard cuts). clip_weights, aesthetic_weights: folders, see `video.scores`; they add the measures
    clip and aesthetic. Measures: motion (mean change of brightness, share of its range per second), brightness (0 to
    1).
    A clip that is re-encoded loses its sound, which `changes` tells.
    Raises ValueError for a size without resize and the reverse, and for numbers out of range.
    """

    fps: float | None = None
    size: tuple[int, int] | None = None
    resize: Literal["cover", "fit"] | None = None
    crf: int = 16
    scene_threshold: float | None = None
    clip_weights: str | None = None
    aesthetic_weights: str | None = None

    extensions: ClassVar[tuple[str, ...]] = EXTENSIONS
    tellers: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "retimed": ("fps", "buckets"),
        "resized": ("resize", "buckets"),
        "cropped or padded": ("resize", "buckets"),
        "padded in time": ("short", "buckets"),
    }

    def __post_init__(self) -> None:
        if self.fps is not None and not self.fps > 0:
            raise ValueError(f"fps={self.fps} is not above 0; leave it out to keep each file's own")
        if (self.size is None) != (self.resize is None):
            raise ValueError(f"size={self.size}, resize={self.resize}: give both or none; resize is cover or fit")
        if self.size is not None and min(self.size) < 1:
            raise ValueError(f"size={self.size} is not (height, width) with both at least 1")
        if self.scene_threshold is not None and not 0 < self.scene_threshold < 1:
            raise ValueError(f"scene_threshold={self.scene_threshold} is outside (0, 1); 0.15 finds hard cuts")
        if self.aesthetic_weights is not None and self.clip_weights is None:
            raise ValueError("aesthetic_weights needs clip_weights: it scores CLIP's image vectors")

    def measures(self) -> Sequence[str]:
        scores = {"clip": self.clip_weights, "aesthetic": self.aesthetic_weights}
        return ["motion", "brightness", *(name for name, folder in scores.items() if folder is not None)]

    def key(self) -> str:
        weights = [weights_key(folder) for folder in (self.clip_weights, self.aesthetic_weights) if folder]
        return " ".join([f"av {av.__version__}", *weights])

    def pieces(self, source: MediaSource, name: str) -> tuple[list[Piece], float]:
        with VideoReader(source, name=name) as reader:
            times_s, total_s = _times(reader)
            if self.scene_threshold is None:
                return [Piece()], total_s
            differences: list[np.ndarray] = []
            last: list[np.ndarray] = []  # (1, h, w, 3), of the part before: a film is too long to be held at once
            for part in _chunks(reader, range(len(reader))):
                small = _small(part)
                differences.append(jumps(np.concatenate([*last, small])))
                last = [small[-1:]]
        starts = [times_s[index] for index in cuts(np.concatenate(differences), self.scene_threshold)]
        edges: list[tuple[float, float | None]] = list(zip([0.0, *starts], [*starts, None], strict=True))
        return [Piece(a, b) for a, b in edges], total_s

    def look(self, source: MediaSource, name: str, piece: Piece, caption: str = "") -> Seen:
        with VideoReader(source, name=name) as reader:
            times_s, _ = _times(reader)
            inside = _inside(times_s, piece)
            shown = [inside[min(len(inside) - 1, len(inside) * part // 8)] for part in (1, 3, 5, 7)]
            firsts = sorted({inside[i] for i in np.linspace(0, len(inside) - 1, _PAIRS).round().astype(int)})
            pairs = [(index, min(index + 1, inside[-1])) for index in firsts]
            needed = sorted({*shown, *(index for pair in pairs for index in pair)})
            pictures = {}
            for indices, part in _numbered(reader, needed):
                small = _small(part)
                pictures.update({index: small[i] for i, index in enumerate(indices)})
                pictures.update({-1 - index: part[i] for i, index in enumerate(indices) if index in shown})
            facts = facts_of(reader, piece)
        grey = {index: pictures[index].mean(-1) / 255 for index in needed}
        moved = [
            np.abs(grey[b] - grey[a]).mean() / (times_s[b] - times_s[a]) for a, b in pairs if times_s[b] > times_s[a]
        ]
        faults = []
        if all((grey[index] < _BLACK).mean() >= _BLACK_SHARE for index in needed):
            faults.append("black")
        if len(inside) == 1:
            faults.append("single frame")
        elif all(np.abs(grey[index] - grey[needed[0]]).max() <= _FROZEN for index in needed):
            faults.append("frozen")
        measures = {
            "motion": float(np.mean(moved)) if moved else 0.0,
            "brightness": float(np.mean([g.mean() for g in grey.values()])),
        }
        shots = [pictures[-1 - index] for index in shown]  # (H, W, 3) each
        if self.clip_weights is not None:
            measures["clip"], vectors = clip_score(self.clip_weights, shots, caption)
            if self.aesthetic_weights is not None:
                measures["aesthetic"] = aesthetic_score(self.aesthetic_weights, vectors)
        return Seen(facts, measures, fingerprint(shots, float(facts["duration"])), tuple(faults), _picture(shots[1]))

    def encode(self, source: MediaSource, name: str, suffix: str, piece: Piece) -> Encoded:
        with VideoReader(source, name=name) as reader:
            changed = self.changed(reader)
            if piece.whole and not changed:
                return Encoded(all_of(source), suffix, facts_of(reader))
            frames, fps, _ = self.frames(reader, piece)
        data = coded(frames, fps, self.crf)
        with VideoReader(data, name=name) as reader:
            facts = facts_of(reader)
        done = [
            *(["cut"] if not piece.whole else []),
            *changed,
            *(["sound dropped"] if _has_sound(source, name) else []),
        ]
        return Encoded(data, ".mp4", facts, tuple(done))

    def frames(self, reader: VideoReader, piece: Piece) -> tuple[Tensor, Fraction | float, float]:
        """(frames (3, T, H, W) in [-1, 1] as asked for, their rate, when the first is shown on the file's clock).

        Raises TooLargeError for more than can be held.
        """
        from video.data import nearest_index  # imports Lightning, which a worker that only looks does without

        times_s, total_s = _times(reader)
        inside = _inside(times_s, piece)
        fps = reader.fps if self.fps is None else self.fps
        begin_s, end_s = times_s[inside[0]], total_s if piece.end_s is None else piece.end_s
        count = max(1, math.floor((end_s - begin_s) * float(fps) + 1e-6))
        height, width = self.size or reader.size
        if count * height * width * 3 > MAX_BYTES:
            raise TooLargeError(
                f"{reader.name}: {count} frames of {width}x{height} are over {MAX_BYTES} bytes; --longest cuts it"
            )
        nearest = [nearest_index(times_s, begin_s + step / float(fps)) for step in range(count)]
        indices = [min(max(index, inside[0]), inside[-1]) for index in nearest]
        frames = torch.cat([self._fitted(torch.from_numpy(part)) for part in _chunks(reader, indices)], dim=1)
        return frames, fps, reader.start_s + begin_s

    def changed(self, reader: VideoReader) -> list[str]:
        """What these settings change in a file: of retimed, resized, cropped and padded."""
        fps, size = float(reader.fps), reader.size
        found = ["retimed"] if self.fps is not None and abs(self.fps - fps) > 1e-6 * fps else []
        if self.size is None or tuple(self.size) == size:
            return found
        found += ["resized"] if self.size[0] != size[0] and self.size[1] != size[1] else []
        if self.size[0] * size[1] != self.size[1] * size[0]:
            found.append("cropped" if self.resize == "cover" else "padded")
        return found

    def changes(self, facts: Mapping[str, Any], sample: Any) -> tuple[str, ...]:
        rate, (height, width) = float(sample.rate), sample.data.shape[-2:]
        found = ["retimed"] if abs(rate / float(facts["fps"]) - 1) > 1e-3 else []
        if (height, width) == (facts["height"], facts["width"]):
            return tuple(found)
        scale = height / float(facts["height"]), width / float(facts["width"])
        # a picture whose sides scale alike, to the pixel, was only resized
        if abs(scale[0] - scale[1]) * max(float(facts["height"]), float(facts["width"])) >= 1:
            found.append("cropped or padded")
        if max(scale) != 1:
            found.append("resized")
        return tuple(found)

    def _fitted(self, part: Tensor) -> Tensor:
        """(T, H, W, 3) uint8 -> (3, T, *size) float in [-1, 1]."""
        clip = part.permute(3, 0, 1, 2).float().div(127.5).sub(1)
        if self.size is None:
            return clip
        from video.data import resize_cover, resize_fit

        return resize_cover(clip, self.size) if self.resize == "cover" else resize_fit(clip, self.size)


def fingerprint(shots: Sequence[np.ndarray], length_s: float) -> Fingerprint:
    """Of four frames (H, W, 3) uint8: a perceptual hash of 64 bits each, as imagehash.phash, and 16x16 mean colours.

    The hash: 8x8 lowest frequencies of the DCT of a 32x32 grey picture, above or below their median.
    """
    pictures = [Image.fromarray(shot) for shot in shots]
    grey = np.stack(
        [np.asarray(p.convert("L").resize((32, 32), Image.Resampling.LANCZOS), np.float64) for p in pictures]
    )
    steps = np.arange(32)
    cosine = np.cos(np.pi * (2 * steps + 1) * np.arange(8)[:, None] / 64)  # (8, 32), DCT-II
    low = (cosine @ grey @ cosine.T).round(3).reshape(4, 64)  # rounded: a flat picture's noise is no pattern
    coarse = [np.asarray(p.resize((16, 16), Image.Resampling.BOX), np.uint8) for p in pictures]
    return Fingerprint(fingerprint_bits(low), np.stack(coarse).tobytes(), length_s)


def _times(reader: VideoReader) -> tuple[list[float], float]:
    """(seconds of each frame after the first, length of the item with its last frame)."""
    times_s = reader.times_s
    return [time - times_s[0] for time in times_s], reader.duration_s


def _inside(times_s: Sequence[float], piece: Piece) -> range:
    """Indices of the frames that begin in the piece; at least one."""
    first = next((i for i, time in enumerate(times_s) if time >= piece.start_s - 1e-6), len(times_s) - 1)
    if piece.end_s is None:
        return range(first, len(times_s))
    last = next((i for i in range(first, len(times_s)) if times_s[i] >= piece.end_s - 1e-6), len(times_s))
    return range(first, max(first + 1, last))


def facts_of(reader: VideoReader, piece: Piece | None = None) -> dict[str, float | int | str]:
    """num_frames, fps, height, width and duration in seconds of a piece, by default of the whole file."""
    times_s, total_s = _times(reader)
    inside = _inside(times_s, piece or Piece())
    end_s = total_s if piece is None or piece.end_s is None else piece.end_s
    fps, (height, width) = float(reader.fps), reader.size
    return {
        "num_frames": len(inside), "fps": int(fps) if fps == int(fps) else round(fps, 6), "height": height,
        "width": width, "duration": round(end_s - times_s[inside[0]], 6),
    }  # fmt: skip


def all_of(source: MediaSource) -> bytes:
    return source if isinstance(source, bytes) else Path(source).read_bytes()


def coded(frames: Tensor, fps: Fraction | float, crf: int, sound: tuple[Tensor, int] | None = None) -> bytes:
    """An mp4 of (3, T, H, W) in [-1, 1], with sound ((C, T), Hz) beside."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_video(path, frames, fps, crf=crf, sound=sound)
        return path.read_bytes()


def _numbered(reader: VideoReader, indices: Sequence[int]) -> Iterator[tuple[Sequence[int], np.ndarray]]:
    """(indices, (T, H, W, 3) uint8), as many at a time as fit into `_CHUNK_BYTES`."""
    first = reader.read([indices[0]])
    most = max(1, _CHUNK_BYTES // first.numel())
    for start in range(0, len(indices), most):
        part = indices[start : start + most]
        distinct = sorted(set(part))
        pixels = reader.read(distinct).permute(1, 2, 3, 0).contiguous().numpy()
        yield part, pixels if len(distinct) == len(part) else pixels[[distinct.index(index) for index in part]]


def _chunks(reader: VideoReader, indices: Sequence[int]) -> Iterator[np.ndarray]:
    return (pixels for _, pixels in _numbered(reader, indices))


def _small(frames: np.ndarray) -> np.ndarray:
    """(T, H, W, 3) uint8 -> (T, h, w, 3) uint8 with sides of at most `_SIDE`, each point the mean of its area."""
    height, width = (min(_SIDE, side) for side in frames.shape[1:3])
    if (height, width) == frames.shape[1:3]:
        return frames
    return np.stack([
        np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BOX)) for frame in frames
    ])  # fmt: skip


def _picture(frame: np.ndarray, most: int = 128) -> bytes:
    picture = Image.fromarray(frame)
    picture.thumbnail((most, most))
    file = io.BytesIO()
    picture.save(file, format="JPEG", quality=80)
    return file.getvalue()


def _has_sound(source: MediaSource, name: str) -> bool:
    container, _ = open_container(source, name)
    with container:
        return bool(container.streams.audio)
