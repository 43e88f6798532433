"""Evaluations of generated video: what is read of it, how far it is from real clips, how well stages restore those.

B batch, T frames, H W space; clips are (B, 3, T, H, W) in [-1, 1].
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

import video
from mmdiff.accuracy import score
from mmdiff.data.clips import ClipDataset, Sample
from mmdiff.data.items import Item
from mmdiff.readers import Labels, ReaderFeatures, Recipe
from mmdiff.tasks import Restoring, Splits, Task
from mmdiff.world import Scene, World, attributes, caption, parse
from mmdiff.world.dataset import TEST_FROM
from mmdiff.world.draw import Split
from video import world_reader
from video.clip_reader import ClipReader
from video.data import ClipDataModule
from video.fidelity import compare, flicker, stretch, warping_error
from video.render import check_clip, render
from video.sheets import contact_sheets

PRETRAINED = Path(video.__file__).parent / "pretrained"
WORLD_READER = PRETRAINED / "world_reader"  # whose features are the default ones
WORDS = ("size", "colour", "shape", "motion", "speed", "background")
WORLD = World(
    1, ("slide",), distractors=0.0, offscreen=0.0, held_out=("colour", "shape")
)  # of configs/video/world.yaml
TRAIN, VAL = 1500, 150  # scenes: training ones, and others of seen and as many of held-out combinations
MEASURES = {"flicker": flicker, "warping error": warping_error}


def features(clips: Tensor) -> Tensor:
    """The default features (B, 96) of clips (B, 3, T, H, W), those of the shipped reader of the procedural world."""
    found: Tensor = ReaderFeatures(WORLD_READER)(clips)
    return found


def world_scores(clips: Tensor, asked: Sequence[str | Scene], fps: float) -> dict[str, dict[str, Any]]:
    """`mmdiff.accuracy.score` of the six attributes in clips of the world (B, 3, T, H, W), read by measuring.

    asked: the caption or the scene of each clip. fps: frames per second of the clips.
    """
    wanted = [parse(one) if isinstance(one, str) else attributes(one) for one in asked]
    return score([{name: labels[name] for name in WORDS} for labels in wanted], read_world(clips, fps))


def read_world(clips: Tensor, fps: float) -> list[Labels]:
    """The six attributes of each clip, so far as they can be seen: without a body that moves there is a background."""
    found = [world_reader.read(clip, fps).attributes for clip in clips]
    return [{name: labels[name] for name in WORDS if name in labels} for labels in found]


def world() -> Task:
    """The six attributes of the procedural world's captions, apart for combinations seen in training and held out."""
    return Task(
        about="How often all that a caption of the procedural world says is measured in the clip, and how far "
        "generated clips are from rendered ones.",
        data=None,
        pipeline=PRETRAINED / "world",
        splits=world_splits,
        attributes=WORDS,
        turns=(("combination",), ("colour", "shape"), ("motion",)),
        reader=ClipReader,
        recipe=Recipe(epochs=6),
        show=contact_sheets,
        trained=WORLD_READER,
        measured=read_world,
        apart="combination",
        measures=MEASURES,
        restoring=Restoring(stretch, compare),
    )


def world_splits(path: str, shape: tuple[int, ...], rate: float) -> Splits:
    """Scenes as clips of a shape (3, T, H, W): training ones, and validation ones of seen and of held-out combinations.

    path: nothing, for the scenes are drawn.
    """
    check_clip(shape[1], (shape[2], shape[3]), rate)
    train = scenes(range(TRAIN), "seen", shape, rate)
    seen, held_out = (range(-first, -first - VAL, -1) for first in (1, TEST_FROM))
    val = [*scenes(seen, "seen", shape, rate), *scenes(held_out, "held-out", shape, rate)]
    return rendered(train, shape, rate), rendered(val, shape, rate)


def scenes(indices: Sequence[int], combination: Split, shape: tuple[int, ...], rate: float) -> list[tuple[Item, Scene]]:
    """The scenes of these numbers that training, validation or test have, and what is to be known of them."""
    part = replace(WORLD, split=combination)
    found = []
    for index in indices:
        drawn = part.scene(index, 0, shape[1] / rate)
        meta = {name: attributes(drawn)[name] for name in WORDS}
        name = f"world-0-{index}"
        found.append((Item(name, name, [caption(drawn)], {**meta, "combination": combination}, Path(name)), drawn))
    return found


def rendered(drawn: Sequence[tuple[Item, Scene]], shape: tuple[int, ...], rate: float) -> ClipDataset:
    """Scenes as clips of a shape (3, T, H, W) and rate."""
    of = {item.key: scene for item, scene in drawn}

    def show(item: Item, rng: Any) -> Sample:
        return Sample(render(of[item.key], shape[1], (shape[2], shape[3]), rate), rate, shape[1] / rate)

    return ClipDataset([item for item, _ in drawn], show)


def sprites() -> Task:
    """Action, direction and each word for the looks of generated LPC sprites."""
    return Task(
        about="How often a small classifier, trained on real clips, reads what the caption says: action, direction, "
        "skin, hair, clothes and background; and how far generated clips are from real ones.",
        data="../shared/data/lpc_sprites",
        pipeline=PRETRAINED / "sprites",
        splits=_splits,
        attributes=("action", "direction", "body", "hair", "top", "bottom", "shoes", "background"),
        turns=(("action", "direction"),),
        reader=ClipReader,
        recipe=Recipe(epochs=8),
        show=contact_sheets,
        measures=MEASURES,
        restoring=Restoring(stretch, compare),
    )


def _splits(path: str, shape: tuple[int, ...], rate: float) -> Splits:
    data = ClipDataModule(path, frames=shape[1], size=(shape[2], shape[3]))
    data.setup()
    return data.datasets["train"], data.datasets["val"]
