"""Shards of the environmental sounds (ESC-10) from the original recordings.

    git clone https://github.com/karolpiczak/ESC-10 && git -C ESC-10 checkout 553c8f1
    pip install soxr
    python scripts/prepare/sounds.py ESC-10 my_data/esc10
    mmdiff data report configs/data/sounds.yaml --path my_data/esc10

(The newest commit only says that the data moved.) The Ogg files are resampled to 16 kHz, scaled down where they would
exceed full scale, and cut or padded with zeros to 5 s. Fold 5 is left out as test; fold 4 is val. Titles, authors and
licences of the clips are read from the repository's README. CC BY 3.0, Karol J. Piczak.
"""

import functools
import io
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from audio.files import read_audio
from mmdiff.data.rebuild import Line, main, needed

RATE, SECONDS, PEAK, AUDIBLE = 16000, 5, 0.999, 0.0005
# category -> the class's folder, and its captions
CLASSES = {
    "dog": ("Dog bark", ("a dog barking", "a dog barks", "the sound of a barking dog", "dog bark")),
    "rain": ("Rain", ("rain falling", "the sound of rain", "rain pouring down", "rain")),
    "sea_waves": (
        "Sea waves",
        ("sea waves breaking on the shore", "the sound of ocean waves", "waves at the sea", "sea waves"),
    ),
    "crying_baby": ("Baby cry", ("a baby crying", "a baby cries", "the sound of a crying baby", "baby cry")),
    "clock_tick": (
        "Clock tick",
        ("a clock ticking", "the ticking of a clock", "a clock ticks steadily", "clock tick"),
    ),
    "sneezing": (
        "Person sneeze",
        ("a person sneezing", "someone sneezes", "the sound of a sneeze", "person sneeze"),
    ),
    "helicopter": (
        "Helicopter",
        ("a helicopter flying", "the sound of helicopter rotor blades", "a helicopter in flight", "helicopter"),
    ),
    "chainsaw": (
        "Chainsaw",
        ("a chainsaw running", "the sound of a chainsaw", "the noise of a running chainsaw", "chainsaw"),
    ),
    "rooster": ("Rooster", ("a rooster crowing", "a rooster crows", "the crow of a rooster", "rooster")),
    "crackling_fire": (
        "Fire crackling",
        ("a fire crackling", "the sound of a crackling fire", "a fire crackles", "fire crackling"),
    ),
}
# - **[1-100032-A.ogg](...)**: clip derived from [TITLE](URL) by *USER* ([LICENCE](LICENCE URL))
CREDIT = re.compile(
    r"\*\*\[([\w-]+\.ogg)\]\(.*?\)\*\*:\s+clip derived from \[(.*)\]\((http\S+?)\) by \*(.*?)\* \(\[(.*?)\]\((.*?)\)\)"
)


@functools.cache
def credits_of(readme: Path) -> dict[str, tuple[str, str, str, str, str]]:
    """File name -> title, address, user, licence and its address."""
    found = CREDIT.findall(needed(readme, "the source is the clone's own folder").read_text("utf-8"))
    return {name: (title, url, user, licence, licence_url) for name, title, url, user, licence, licence_url in found}


def make(source: Path, line: Line) -> tuple[bytes, str, Mapping[str, Any]]:
    try:
        import soxr
    except ImportError:
        raise ValueError("the resampler is missing: pip install soxr") from None
    split, key = line
    category, _, take = key.partition("-")
    title, captions = CLASSES[category]
    folders = [folder for folder in sorted(source.iterdir()) if folder.name.endswith(title) and folder.is_dir()]
    folder = folders[0] if folders else source / title
    path = needed(folder / f"{take}.ogg", "check out commit 553c8f1, the last one with the recordings")
    waveform, rate = read_audio(path)
    mono = soxr.resample(waveform.double().mean(0).numpy(), rate, RATE, quality="VHQ")
    peak = float(np.abs(mono).max(initial=0.0))
    gain = min(1.0, PEAK / max(peak, 1e-9)) if peak > 1 else 1.0
    samples = np.zeros(RATE * SECONDS)
    samples[: len(mono)] = (mono * gain)[: len(samples)]
    heard = np.flatnonzero(np.abs(samples) > AUDIBLE)
    file = io.BytesIO()
    soundfile.write(file, (samples * 32767).round().astype(np.int16), RATE, subtype="PCM_16", format="FLAC")
    told: dict[str, Any] = {
        "caption": captions[0], "captions": list(captions), "split": split, "category": category,
        "fold": int(take.partition("-")[0]), "sample_rate": RATE, "num_samples": len(samples),
        "duration": float(SECONDS), "sounding_until": round((int(heard[-1]) + 1) / RATE, 3) if len(heard) else 0.0,
        "gain": round(gain, 4), "source_file": f"{title}/{take}.ogg",
    }  # fmt: skip
    if credit := credits_of(source / "README.md").get(f"{take}.ogg"):
        names = ("freesound_title", "freesound_url", "freesound_user", "licence", "licence_url")
        told |= dict(zip(names, credit, strict=True))
    return file.getvalue(), ".flac", told


if __name__ == "__main__":
    sys.exit(main(__file__, make, shard_clips=1000, about="The environmental sounds of ESC-10 as shards."))
