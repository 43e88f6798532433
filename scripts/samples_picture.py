"""Makes docs/samples.png, the README's picture: `python scripts/samples_picture.py`. The first seeds, none chosen."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from PIL import Image, ImageDraw

from audio.commands import SHIPPED as DIGITS
from audio.mel import Mel
from mmdiff.pipeline import load_pipeline
from mmdiff.sampling import seeded_noise
from video.commands import SHIPPED as SPRITES

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "samples.png"
CLOTHES = "wearing a white shirt, red trousers and brown boots"
VIDEO = [
    f"a character with tan skin and a blue topknot, {CLOTHES}, walking to the left, on a grey background",
    f"a green orc with spiky pink hair, {CLOTHES}, casting a spell, facing the viewer, on a blue background",
    f"a character with brown skin and silver hair, {CLOTHES}, making a slashing motion, facing right, on a sand background",  # noqa: E501
    f"a character with light skin and curly purple hair, {CLOTHES}, miming an archer shooting a bow, facing left, on a green background",  # noqa: E501
]
AUDIO = ["the digit seven spoken by jackson", "the digit three spoken by nicolas", "the digit zero spoken by theo"]
SIDE, TEXT = 96, 34


def main() -> None:
    clips = load_pipeline(SPRITES)({"caption": VIDEO}, noise=seeded_noise(range(len(VIDEO)))).data
    sounds = load_pipeline(DIGITS)({"caption": AUDIO}, noise=seeded_noise(range(len(AUDIO)))).data
    columns = clips.shape[2] // 2
    width = columns * SIDE
    sheet = Image.new("RGB", (width, (len(VIDEO)) * (SIDE + TEXT) + 130 + TEXT), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (clip, prompt) in enumerate(zip(clips, VIDEO, strict=True)):
        cut = prompt.find(", wearing")
        lines = f"{prompt[:cut]} ...\n... {prompt[cut + 2 :]}"
        draw.multiline_text((2, row * (SIDE + TEXT) + 2), lines, fill="black", spacing=2)
        frames = ((clip.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()
        for column in range(columns):
            picture = Image.fromarray(frames[2 * column]).resize((SIDE, SIDE), Image.Resampling.NEAREST)
            sheet.paste(picture, (column * SIDE, row * (SIDE + TEXT) + TEXT))
    top = len(VIDEO) * (SIDE + TEXT)
    mel = Mel(8000, 512, 128, 64, mean=-3.0, std=1.5).encode(sounds.clamp(-1, 1))[:, 0]  # (B, T, F)
    for column, (spectrogram, prompt) in enumerate(zip(mel, AUDIO, strict=True)):
        shade = ((spectrogram.T.flip(0) + 1.4) / 3).clamp(0, 1)
        picture = Image.fromarray((255 - 255 * shade).round().to(torch.uint8).numpy())
        left = column * width // len(AUDIO)
        draw.text((left + 2, top + 10), prompt, fill="black")
        sheet.paste(picture.resize((width // len(AUDIO) - 8, 128)), (left, top + TEXT))
    PICTURE.parent.mkdir(exist_ok=True)
    sheet.save(PICTURE)
    print(PICTURE)


if __name__ == "__main__":
    main()
