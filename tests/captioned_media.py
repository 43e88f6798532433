"""Ten short captioned videos and sounds, as a plain folder in each convention of captions and as tar shards."""

import csv
import io
import json
import shutil
import tarfile
from pathlib import Path

import torch

import video
from audio.files import write_audio
from video.files import write_video

KEYS = [f"clip_{index:02d}" for index in range(10)]


def captions(index: int) -> list[str]:
    return [f"caption {index}", f"another {index}", f"third {index}"]


def write_media(root: Path) -> Path:
    """In `root`: ten videos of 12 to 21 frames, whose grey level counts them, and ten sounds that count samples."""
    for index, key in enumerate(KEYS):
        count = 12 + index
        level = torch.arange(count).view(1, count, 1, 1) / 16 - 0.9
        write_video(root / f"{key}.mp4", level.expand(3, count, 32, 40), fps=8)
        write_audio(root / f"{key}.wav", (torch.arange(1000 + index * 100) / 32768)[None], 8000)
    return root


def folder_of(root: Path, media: Path, suffix: str, how: str, keys: list[str] = KEYS) -> Path:
    """A plain folder whose captions are written in the convention `how`."""
    root.mkdir(parents=True)
    rows = []
    for key in keys:
        index = KEYS.index(key)
        shutil.copy(media / f"{key}{suffix}", root)
        record = {"caption": captions(index)[0], "captions": captions(index), "number": index}
        if how == "json":
            (root / f"{key}.json").write_text(json.dumps(record))
        elif how == "txt":
            (root / f"{key}.txt").write_text("\n".join(captions(index)) + "\n")
        rows.append({"file_name": f"{key}{suffix}", **record})
    if how == "metadata.jsonl":
        (root / how).write_text("\n".join(json.dumps(row) for row in rows))
    if how in ("metadata.csv", "metadata.csv text"):
        with open(root / "metadata.csv", "w", newline="") as file:
            column = "text" if how.endswith("text") else "caption"
            writer = csv.DictWriter(file, ["file_name", column])
            writer.writeheader()
            writer.writerows({"file_name": row["file_name"], column: row["caption"]} for row in rows)
    return root


def shard_of(
    path: Path, media: Path, suffix: str, keys: list[str] = KEYS, more: dict[str, bytes] | None = None
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for key in keys:
            index = KEYS.index(key)
            record = {"caption": captions(index)[0], "captions": captions(index), "number": index}
            for name, data in (
                (key + suffix, (media / (key + suffix)).read_bytes()),
                (f"{key}.json", json.dumps(record).encode()),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        for name, data in (more or {}).items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def videos(path: Path, **options: object) -> video.ClipDataModule:
    defaults = {"frames": 8, "size": (16, 20), "resize": "cover", "batch_size": 4}
    return video.ClipDataModule(str(path), **{**defaults, **options})
