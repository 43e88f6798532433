"""Reading clips: ours beside plain PyAV, decord and torchcodec; sound beside torchaudio, librosa and others.

usage: python benchmarks/media.py [--seconds N] [--folder FOLDER] [--json FILE]

Takes about 3 minutes on two cores. The files are made on the spot: H.264 with B-frames and a keyframe each 48 frames,
as noise that moves. Every decoder decodes the same random clips to RGB in memory, in interleaved rounds; the table has
the median. PyAV by hand is measured with its defaults, and with one thread for decoding and for the colours, which is
faster on clips. One that is not installed, or cannot be loaded (torchcodec needs FFmpeg's shared libraries), is
named as absent.

Ends with the bars: at least 90 % of plain PyAV's rate, at 640x360 also of the tuned one's. Exit status: 0 all met,
1 one missed, 3 none missed but one not measured.
"""

import argparse
import importlib
import itertools
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from fractions import Fraction
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter

from benchmarks.bars import Bar, exit_status, print_bars
from benchmarks.measure import Rounds, Work, measure_rounds
from video.files import VideoReader

OURS, PLAIN, PLAIN_ONE = "mmdiff", "PyAV", "PyAV, one thread"
PACKAGES = ("av", "decord", "torchcodec", "soundfile", "torchaudio", "librosa")
PYAV_BAR = 0.90  # of the rate of plain PyAV


def make_clip(path: Path, frames: int, height: int, width: int) -> None:
    """H.264 of noise that moves a pixel a frame, so that it compresses as pictures do; 25 frames a second."""
    noise = np.random.default_rng(0).integers(16, 235, (height // 8, width // 8)).repeat(8, 0).repeat(8, 1)
    with av.open(str(path), mode="w") as container:
        options = {"preset": "veryfast", "g": "48", "bf": "2", "crf": "23"}
        stream = container.add_stream("libx264", rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"  # type: ignore[union-attr]
        for index in range(frames):
            planes = np.full((height * 3 // 2, width), 128, dtype=np.uint8)
            planes[:height] = np.roll(noise, index, axis=1)
            frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            frame.pts, frame.time_base = index, Fraction(1, 25)
            container.mux(stream.encode(frame))  # type: ignore[union-attr,arg-type]
        container.mux(stream.encode(None))  # type: ignore[union-attr]


def starts(frames: int, take: int) -> Iterator[int]:
    """The same endless random first frames for every decoder."""
    generator = random.Random(0)
    return itertools.cycle([generator.randint(0, frames - take) for _ in range(64)])


def read_ours(reader: VideoReader, start: int, take: int) -> None:
    first_s = reader.start_s + start / 25
    reader.read_at(reader.times_between(first_s, first_s + take / 25))


def read_plain(container: av.container.InputContainer, start: int, take: int, threads: int | None) -> None:
    """What a user writes by hand: seek, decode, drop, convert, stack. threads: of the conversion, None: the default."""
    stream = container.streams.video[0]
    assert stream.time_base is not None
    first = round(Fraction(start, 25) / stream.time_base)
    container.seek(first, stream=stream)
    found: list[np.ndarray] = []
    reformatter = VideoReformatter()
    for frame in container.decode(stream):
        if frame.pts is not None and frame.pts >= first:
            found.append(reformatter.reformat(frame, format="rgb24", threads=threads).to_ndarray())
            if len(found) == take:
                break
    torch.from_numpy(np.stack(found))


def open_plain(path: Path, threads: int | None) -> av.container.InputContainer:
    container = av.open(str(path))
    if threads is not None:
        container.streams.video[0].codec_context.thread_count = threads
    return container


def decord_reader(path: Path) -> Callable[[int, int], object]:
    import decord

    reader = decord.VideoReader(str(path), num_threads=1)
    return lambda start, take: reader.get_batch(list(range(start, start + take))).asnumpy()


def torchcodec_reader(path: Path) -> Callable[[int, int], object]:
    from torchcodec.decoders import VideoDecoder

    reader = VideoDecoder(str(path), seek_mode="exact", num_ffmpeg_threads=1, dimension_order="NHWC")
    return lambda start, take: reader.get_frames_in_range(start, start + take).data


PEERS = {"decord": ("decord", decord_reader), "torchcodec": ("torchcodec.decoders", torchcodec_reader)}


def video_works(path: Path, frames: int, take: int, reopen: bool) -> tuple[dict[str, Work], list[str]]:
    """({name: a work that decodes the next random clip}, what is absent)."""
    works: dict[str, Work] = {}
    absent: list[str] = []

    def add(name: str, start: Callable[[], Callable[[int, int], object]]) -> None:
        places = starts(frames, take)
        kept = None if reopen else start()

        def work() -> None:
            (kept or start())(next(places), take)

        works[name] = work

    def ours() -> Callable[[int, int], object]:
        reader = VideoReader(path)
        return lambda start, take: _closing(reader, reopen, lambda: read_ours(reader, start, take))

    def plain(threads: int | None) -> Callable[[], Callable[[int, int], object]]:
        def start() -> Callable[[int, int], object]:
            container = open_plain(path, threads)
            return lambda start, take: _closing(container, reopen, lambda: read_plain(container, start, take, threads))

        return start

    add(OURS, ours)
    add(PLAIN, plain(None))
    add(PLAIN_ONE, plain(1))
    for name, (module, make) in PEERS.items():
        try:
            importlib.import_module(module)
        except (ImportError, OSError, RuntimeError) as error:
            absent.append(f"{name} ({(str(error).strip() or type(error).__name__).splitlines()[0]})")
            continue
        add(name, lambda make=make: make(path))  # type: ignore[misc]
    return works, absent


def _closing(opened: VideoReader | av.container.InputContainer, close: bool, read: Callable[[], None]) -> None:
    read()
    if close:
        opened.close()


def print_table(title: str, rounds: Rounds, names: list[str]) -> None:
    print(f"\n{title}")
    print(f"{'decoder':24} {'clips/s':>9} {'of ours':>9}")
    for name in names:
        share = statistics.median(rounds.ratios(OURS, name))
        print(f"{name:24} {1 / rounds.median(name):9.1f} {share:9.2f}")


def bars_of(title: str, rounds: Rounds, name: str) -> list[Bar]:
    """Ours beside plain PyAV; on clips of a usual size also beside PyAV tuned by hand."""
    peers = (PLAIN,) if name == "small" else (PLAIN, PLAIN_ONE)
    return [
        Bar(title, PYAV_BAR, statistics.median(rounds.ratios(peer, OURS)), against=f"beside {peer}") for peer in peers
    ]


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20, help="for each table (default 20)")
    parser.add_argument("--folder", type=Path, help="where the files are made (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="also write the median seconds of a clip here")
    options = parser.parse_args(args)
    for package in PACKAGES:
        try:
            print(f"{package} {version(package)}")
        except PackageNotFoundError:
            print(f"{package}: not installed")
    with tempfile.TemporaryDirectory() as temporary:
        return measure(options.folder or Path(temporary), options.seconds, options.json)


def measure(folder: Path, seconds: float, json_file: Path | None) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    make_clip(folder / "small.mp4", 16, 64, 64)
    make_clip(folder / "large.mp4", 250, 360, 640)
    bars: list[Bar] = []
    found: dict[str, dict[str, float]] = {}
    absent: list[str] = []
    for title, name, frames, take, reopen in (
        ("all 16 frames of 64x64, file opened for each clip", "small", 16, 16, True),
        ("8 of 250 frames of 640x360, file opened for each clip", "large", 250, 8, True),
        ("8 of 250 frames of 640x360, file kept open", "large", 250, 8, False),
    ):
        works, absent = video_works(folder / f"{name}.mp4", frames, take, reopen)
        rounds = measure_rounds(works, torch.device("cpu"), seconds, rounds=(7, 1000))
        print_table(title, rounds, list(works))
        bars += bars_of(title, rounds, name)
        found[title] = {name: rounds.median(name) for name in works}
    try:
        from benchmarks.media_audio import audio_works
    except ImportError:
        print("\nsound: benchmarks/media_audio.py is not there")
    else:
        cases, absent_sound = audio_works(folder)
        absent += absent_sound
        for title, works in cases.items():
            rounds = measure_rounds(works, torch.device("cpu"), seconds, rounds=(7, 1000))
            print_table(title, rounds, list(works))
            found[title] = {name: rounds.median(name) for name in works}
    for missing in absent:
        print(f"absent: {missing}")
    print_bars(bars)
    if json_file:
        json_file.write_text(json.dumps(found, indent=1))
    return exit_status(bars)


if __name__ == "__main__":
    sys.exit(main())
