"""Trains the reader whose features are the default of video distances, on renders: `python scripts/world_reader.py`.

Writes video/pretrained/world_reader, 1 MB in half precision, and prints what it reads right on other scenes.
About 10 minutes of one core.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from mmdiff.accuracy import score
from mmdiff.readers import gather, new_reader, read, save_reader, train_reader
from video.metrics import WORLD_READER, rendered, scenes, world, world_splits

SHAPE, FPS, SCENES = (3, 16, 32, 32), 8.0, 6000


def main() -> None:
    task = world()
    _, val = world_splits("", SHAPE, FPS)
    # Of all combinations: where some never occur, a colour tells what the shape is not.
    train = rendered(scenes(range(SCENES), "all", SHAPE, FPS), SHAPE, FPS)
    reader = new_reader(task.reader, [{name: item.meta[name] for name in task.attributes} for item in train.items], 0)
    known = gather(reader, train, "training scenes")
    train_reader(reader, known.kept, known.labels, task.recipe, 0)
    other = gather(reader, val, "validation scenes")
    for name, row in score(other.labels, read(reader, other.kept)).items():
        print(f"{name:<12}{100 * row['accuracy']:5.1f} %")
    save_reader(reader, WORLD_READER, torch.float16)
    print(WORLD_READER)


if __name__ == "__main__":
    main()
