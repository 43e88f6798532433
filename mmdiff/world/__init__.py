"""The procedural world: endless captioned scenes with exact ground truth, drawn by `video`, sounded by `audio`.

A scene is a pure function of (world, seed, index): bodies that move in a box, and a log of events in exact seconds, so
that picture and sound agree at any size and rate. Names are imported on first use: the log needs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .dataset import WorldDataset as WorldDataset
    from .dataset import train_and_val as train_and_val
    from .draw import EASY as EASY
    from .draw import World as World
    from .draw import scene as scene
    from .labels import agreement as agreement
    from .labels import attributes as attributes
    from .labels import is_held_out as is_held_out
    from .log import Body as Body
    from .log import Event as Event
    from .log import Scene as Scene
    from .parsing import parse as parse
    from .text import caption as caption
    from .text import joint_caption as joint_caption
    from .text import sound_caption as sound_caption
    from .vocabulary import BACKGROUNDS as BACKGROUNDS
    from .vocabulary import COLOURS as COLOURS
    from .vocabulary import MOTIONS as MOTIONS
    from .vocabulary import SHAPES as SHAPES

_HOMES = {
    "dataset": ("WorldDataset", "train_and_val"),
    "draw": ("EASY", "World", "scene"),
    "labels": ("agreement", "attributes", "is_held_out"),
    "log": ("Body", "Event", "Scene"),
    "parsing": ("parse",),
    "text": ("caption", "joint_caption", "sound_caption"),
    "vocabulary": ("BACKGROUNDS", "COLOURS", "MOTIONS", "SHAPES"),
}
__all__ = [*_HOMES["dataset"], *_HOMES["draw"], *_HOMES["labels"], *_HOMES["log"], *_HOMES["parsing"],
           *_HOMES["text"], *_HOMES["vocabulary"]]  # fmt: skip


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
