"""Writes captioned clips of the procedural world: `python scripts/world_clips.py FOLDER`, a data set to try things on.

A video is NAME.mp4, a sound NAME.wav, its caption NAME.txt beside it. The same options give the same clips.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from audio.files import write_audio
from audio.render import WorldDataModule as Sounds
from mmdiff.__main__ import guarded
from mmdiff.generate import Parser
from video.files import write_video
from video.render import WorldDataModule as Videos


def main(args: list[str]) -> int:
    """Captioned clips of the procedural world, as files."""
    parser = Parser("scripts/world_clips.py", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="new, or empty")
    parser.add_argument("--count", type=int, default=64, metavar="N", help="clips (default 64)")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes (default 0)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a clip (default 2)")
    parser.add_argument("--fps", type=float, default=8.0, help="of a video (default 8)")
    parser.add_argument("--size", type=int, default=32, metavar="PIXELS", help="height and width (default 32)")
    parser.add_argument("--sound", type=int, metavar="HZ", help="sounds of this sample rate in the place of videos")
    given = parser.parse_args(args)
    if given.folder.exists() and any(given.folder.iterdir()):
        raise ValueError(f"{given.folder} holds files, which clips would be mixed with; name another folder")
    common = {"count": given.count, "seed": given.seed, "val_count": 1}
    world: Sounds | Videos
    if given.sound:
        world = Sounds(samples=round(given.seconds * given.sound), sample_rate=given.sound, **common)
    else:
        frames = max(1, round(given.seconds * given.fps))
        world = Videos(frames=frames, size=(given.size, given.size), fps=given.fps, **common)
    for index in range(given.count):
        item = world.train[index]
        name = given.folder / f"clip_{index:05d}"
        if given.sound:
            write_audio(name.with_suffix(".wav"), item["x"], given.sound)
        else:
            write_video(name.with_suffix(".mp4"), item["x"], given.fps)
        name.with_suffix(".txt").write_text(f"{item['caption']}\n", "utf-8")
    print(f"{given.folder}: {given.count} clips")
    return 0


if __name__ == "__main__":
    sys.exit(guarded("world_clips", main, sys.argv[1:]))
