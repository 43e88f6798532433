"""Shards of the LPC sprites from the original sprite sheets.

    git clone https://github.com/YingzhenLi/Sprites
    python scripts/prepare/sprites.py Sprites my_data/lpc_sprites
    mmdiff data report configs/data/sprites.yaml --path my_data/lpc_sprites

Layers (body, trousers, top, hair, shoes) are put on a plain background and the row of an action is cut out: 16 frames
of 64x64 at 8 fps, H.264 4:4:4 without loss. The plan names the characters; the test split is left out.
CC BY-SA 3.0 / GPL 3.0, the artists of the Liberated Pixel Cup.
"""

import functools
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mmdiff.data.media import DamagedError
from mmdiff.data.rebuild import Line, main, needed
from video.files import write_video

SIDE, FPS = 64, 8
LAYERS = ("body", "bottomwear", "topwear", "hair", "shoes")
WORDS = {
    "body": ("light skin", "tan skin", "grey skin", "lilac skin", "brown skin", "dark brown skin", "green orc"),
    "bottomwear": (
        "white trousers", "golden leg armour", "red trousers", "steel leg armour", "teal trousers",
        "dark green trousers", "a brown robe skirt",
    ),
    "topwear": (
        "a maroon shirt", "a cyan shirt", "a white shirt", "a steel breastplate", "a brown leather vest",
        "a white shirt with a tie", "a chainmail shirt",
    ),
    "hair": (
        "spiky green hair", "a blue topknot", "spiky orange hair", "silver hair", "a crimson bob", "curly purple hair",
        "half-shaved black and white hair", "a bright red bob", "spiky pink hair", "curly orange hair",
    ),
    "shoes": ("brown boots", "golden boots", "steel boots"),
}  # fmt: skip
DIRECTIONS = ("back", "left", "front", "right")
# name, first row of the sheet (one row for each direction), columns of the 16 frames, what a caption says
ACTIONS = (
    ("walk", 8, [*range(1, 9)] * 2, "walking"),
    ("spellcast", 0, [0, 1, 2, 3, 4, 5, 4, 6] * 2, "casting a spell"),
    ("slash", 12, [0, 1, 2, 3, 4, 5, 4, 0] * 2, "making a slashing motion"),
    ("thrust", 4, [*range(8)] * 2, "making a thrusting motion"),
    ("shoot", 16, [*range(13), 12, 0, 0], "miming an archer shooting a bow"),
    ("hurt", 20, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 5, 5, 5, 5], "getting hurt and falling to the ground"),
)
WALKING = ("away from the viewer", "to the left", "towards the viewer", "to the right")
FACING = ("facing away", "facing left", "facing the viewer", "facing right")
BACKGROUNDS = {
    "black": (0, 0, 0), "grey": (120, 120, 120), "green": (60, 120, 60), "blue": (70, 110, 180),
    "sand": (214, 190, 140), "white": (240, 240, 240),
}  # fmt: skip


@functools.lru_cache(maxsize=64)
def layer(path: Path) -> Image.Image:
    """A sheet of 13 columns and 21 rows of 64x64. Raises DamagedError where it is another picture."""
    try:
        sheet = Image.open(needed(path, "the source is the clone's own folder, with body/ and hair/ in it")).convert(
            "RGBA"
        )
    except OSError as error:
        raise DamagedError(f"{path}: cannot be read ({error}); clone it again") from error
    if sheet.width < 13 * SIDE or sheet.height < 21 * SIDE:
        raise DamagedError(f"{path}: is {sheet.width}x{sheet.height}; a sheet has 832x1344 pixels")
    return sheet


def frames(source: Path, labels: Mapping[str, int], background: str) -> np.ndarray:
    """(16, 64, 64, 3) uint8 of one clip."""
    _, first, columns, _ = ACTIONS[labels["action"]]
    row = first if labels["action"] == 5 else first + labels["direction"]
    drawn = []
    for column in columns:
        picture = Image.new("RGBA", (SIDE, SIDE), (*BACKGROUNDS[background], 255))
        box = (column * SIDE, row * SIDE, (column + 1) * SIDE, (row + 1) * SIDE)
        for name in LAYERS:
            picture = Image.alpha_composite(picture, layer(source / name / f"{labels[name]}.png").crop(box))
        drawn.append(np.asarray(picture.convert("RGB")))
    return np.stack(drawn)


def captions_of(labels: Mapping[str, int], background: str) -> list[str]:
    words = {name: WORDS[name][labels[name]] for name in LAYERS}
    who = "a green orc" if words["body"] == "green orc" else f"a character with {words['body']}"
    who += f" {'with' if words['body'] == 'green orc' else 'and'} {words['hair']}"
    name, _, _, does = ACTIONS[labels["action"]]
    if name == "walk":
        does = f"{does} {WALKING[labels['direction']]}"
    elif name != "hurt":
        does = f"{does}, {FACING[labels['direction']]}"
    clothes = f"wearing {words['topwear']}, {words['bottomwear']} and {words['shoes']}"
    return [f"{who}, {clothes}, {does}, on a {background} background", f"{who} {does}", f"a pixel art character {does}"]


def make(source: Path, line: Line) -> tuple[bytes, str, Mapping[str, Any]]:
    split, _, *numbers, background = line
    labels = dict(zip((*LAYERS, "action", "direction"), map(int, numbers), strict=True))
    pixels = torch.from_numpy(frames(source, labels, background)).permute(3, 0, 1, 2).float().div(127.5).sub(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_video(path, pixels, FPS, crf=0, pix_fmt="yuv444p")
        media = path.read_bytes()
    captions = captions_of(labels, background)
    told = {
        "caption": captions[0], "captions": captions, "split": split, "action": ACTIONS[labels["action"]][0],
        "direction": DIRECTIONS[labels["direction"]], "background": background, "body": WORDS["body"][labels["body"]],
        "hair": WORDS["hair"][labels["hair"]], "top": WORDS["topwear"][labels["topwear"]],
        "bottom": WORDS["bottomwear"][labels["bottomwear"]], "shoes": WORDS["shoes"][labels["shoes"]],
        "labels": labels, "num_frames": len(pixels[0]), "fps": FPS, "width": SIDE, "height": SIDE,
        "duration": len(pixels[0]) / FPS,
    }  # fmt: skip
    return media, ".mp4", told


if __name__ == "__main__":
    about = "The LPC sprites as shards."
    sys.exit(main(__file__, make, shard_clips=1500, about=about, not_indexed=("labels",)))
