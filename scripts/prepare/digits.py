"""Shards of the spoken digits (fsdd) from the original recordings.

    git clone https://github.com/Jakobovski/free-spoken-digit-dataset
    python scripts/prepare/digits.py free-spoken-digit-dataset my_data/fsdd
    mmdiff data report configs/data/digits.yaml --path my_data/fsdd

The recordings (16-bit WAV) are stored as FLAC without any change. Takes 0 to 4, the official test split, are left out;
5 to 9 are val. CC BY-SA 4.0, Zohar Jackson and the FSDD contributors.
"""

import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mmdiff.data.media import DamagedError
from mmdiff.data.rebuild import Line, main, needed

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# the repository's table of speakers: accent, and how a caption says it
ACCENTS = {
    "jackson": ("USA/neutral", "an American"),
    "nicolas": ("BEL/French", "a Belgian French"),
    "theo": ("USA/neutral", "an American"),
    "yweweler": ("DEU/German", "a German"),
    "george": ("GRC/Greek", "a Greek"),
    "lucas": ("DEU/German", "a German"),
}


def make(source: Path, line: Line) -> tuple[bytes, str, Mapping[str, Any]]:
    split, key = line
    digit, speaker, take = key.split("_")
    path = needed(source / "recordings" / f"{key}.wav", "the source is the clone's own folder, with recordings/ in it")
    try:
        samples, rate = soundfile.read(path, dtype="int16")
    except soundfile.SoundFileError as error:
        raise DamagedError(f"{path}: cannot be read ({error}); clone it again") from error
    file = io.BytesIO()
    soundfile.write(file, samples, rate, subtype="PCM_16", format="FLAC")
    word, (accent, spoken) = WORDS[int(digit)], ACCENTS[speaker]
    captions = [
        f"the digit {word} spoken by {speaker}",
        f"a man says '{word}'",
        f"a male voice with {spoken} accent says '{word}'",
        f"{speaker} says the number {word}",
    ]
    told = {
        "caption": captions[0], "captions": captions, "split": split, "digit": int(digit), "word": word,
        "speaker": speaker, "gender": "male", "accent": accent, "take": int(take), "sample_rate": rate,
        "num_samples": len(samples), "duration": round(len(samples) / rate, 4), "source_file": path.name,
    }  # fmt: skip
    return file.getvalue(), ".flac", told


if __name__ == "__main__":
    sys.exit(main(__file__, make, shard_clips=3000, about="The spoken digits of fsdd as shards."))
