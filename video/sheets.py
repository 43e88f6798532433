"""Contact sheets: clips as rows of pictures, for people to judge by themselves."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from mmdiff.cascade import Clip
from mmdiff.data.media import whole_file


def contact_sheets(folder: Path, clip: Clip, titles: Sequence[str], frames: int = 8) -> None:
    """Writes samples.png: a row for each clip, its title and `frames` of its frames."""
    pixels = ((clip.data.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).numpy()  # (B, T, H, W, 3)
    picked = torch.linspace(0, pixels.shape[1] - 1, min(frames, pixels.shape[1])).long().tolist()
    scale = max(1, -(-96 // min(pixels.shape[2:4])))
    height, width = pixels.shape[2] * scale + 2, pixels.shape[3] * scale + 2
    label = max(190, *(12 + 6 * len(line) for title in titles for line in title.splitlines()))
    sheet = Image.new("RGB", (label + width * len(picked), height * len(pixels)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (frames_of, title) in enumerate(zip(pixels, titles, strict=True)):
        draw.multiline_text((4, row * height + 2), title, fill="black", spacing=1)
        for column, index in enumerate(picked):
            picture = Image.fromarray(frames_of[index]).resize((width - 2, height - 2), Image.Resampling.NEAREST)
            sheet.paste(picture, (label + column * width, row * height))
    with whole_file(folder / "samples.png") as temporary:
        sheet.save(temporary, format="PNG")
