"""Shards of a person speaking (GRID, speaker s1) from the original recordings.

    git clone https://github.com/TVR28/LipNet
    python scripts/prepare/faces.py LipNet my_data/grid_av
    mmdiff data report configs/data/faces.yaml --path my_data/grid_av

A window of 240x240 around the head, placed by the plan, is scaled to 96x96; the sound is mixed to mono, resampled to
16 kHz, scaled down to a peak of 0.98 where it is louder, and padded to the length of the picture. The plan leaves the
test split out. For research use: M. Cooke et al., JASA 120(5), 2006; one identifiable person.
"""

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from audio.files import read_audio, resample
from mmdiff.data.media import DamagedError
from mmdiff.data.rebuild import Line, main, needed
from video.data import resize_cover
from video.files import VideoReader, write_video

SIDE, FPS, RATE, PEAK = 96, 25, 16000, 0.98
WINDOW = 240  # pixels
TICKS = 25000  # of an alignment, a second


def words_of(path: Path) -> list[tuple[float, float, str]]:
    """(start s, end s, word) of an alignment, without its silences."""
    try:
        rows = [
            line.split()
            for line in needed(path, "the source is the clone's own folder").read_text("utf-8").splitlines()
        ]
        found = [(round(int(a) / TICKS, 2), round(int(b) / TICKS, 2), word) for a, b, word in rows]
    except (ValueError, UnicodeDecodeError) as error:
        raise DamagedError(f"{path}: is no alignment of lines START END WORD ({error})") from error
    return [row for row in found if row[2] not in ("sil", "sp")]


def make(source: Path, line: Line) -> tuple[bytes, str, Mapping[str, Any]]:
    split, key, left, top = line
    data = source / "data"
    path = needed(data / "s1" / f"{key}.mpg", "the source is the clone's own folder, with data/s1 in it")
    words = words_of(data / "alignments" / "s1" / f"{key}.align")
    x, y = int(left), int(top)
    with VideoReader(path) as reader:
        if reader.size[0] < y + WINDOW or reader.size[1] < x + WINDOW:
            raise DamagedError(f"{path}: is {reader.size[1]}x{reader.size[0]}; the window at {x}, {y} needs more")
        pixels = reader.read(range(len(reader)))[..., y : y + WINDOW, x : x + WINDOW]
    clip = resize_cover(pixels.float().div(127.5).sub(1), (SIDE, SIDE))
    waveform, rate = read_audio(path)
    sound = resample(waveform.mean(0, keepdim=True), rate, RATE)
    sound = sound * min(1.0, PEAK / max(float(sound.abs().max()), 1e-9))
    count = clip.shape[1] * RATE // FPS
    sound = torch.nn.functional.pad(sound[:, :count], (0, max(0, count - sound.shape[1])))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "clip.mp4"
        write_video(file, clip, FPS, crf=18, sound=(sound, RATE))
        media = file.read_bytes()
    said = " ".join(word for _, _, word in words)
    captions = [
        f"a man says '{said}'",
        f"a dark-haired man in front of a plain background talks to the camera, saying '{said}'",
        "a man talking, close-up",
        said,
    ]
    told = {
        "caption": captions[0], "captions": captions, "split": split, "transcript": said,
        "words": [list(word) for word in words], "speaker": "s1", "num_frames": clip.shape[1], "fps": FPS,
        "width": SIDE, "height": SIDE, "sample_rate": RATE, "duration": clip.shape[1] / FPS,
        "crop": [x, y, WINDOW, WINDOW], "source_file": f"s1/{key}.mpg",
    }  # fmt: skip
    return media, ".mp4", told


if __name__ == "__main__":
    about = "A person speaking, of the GRID corpus, as shards."
    sys.exit(main(__file__, make, shard_clips=1000, about=about, not_indexed=("words", "crop")))
