"""Bad input end to end: every file gives a clip of its own or an error that names it, in little time and memory."""

import json
import math
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest
import torch

from audio.data import ClipDataModule as SoundModule
from audio.files import write_audio
from mmdiff.data.clips import ClipDataModule
from mmdiff.data.media import MediaError
from mmdiff.data.sources import load_source
from video.data import ClipDataModule as VideoModule
from video.files import write_video

from .bad_input import ROOT, answers

TORTURE = ROOT.parent / "shared" / "data" / "torture"
WAYS = ("video reader", "audio reader", "video clip", "video crop", "audio clip", "audio crop")
KINDS = {kind.kind for kind in MediaError.__subclasses__()}


def jobs_of(paths: Sequence[Path], ways: Sequence[str] = WAYS) -> list[dict[str, Any]]:
    return [{"path": str(path), "way": way} for path in paths for way in ways]


def fault(answer: dict[str, Any]) -> str | None:
    """What is wrong with an answer, None for a clip and for an error that says which file, why and what to do."""
    name = Path(answer["path"]).name
    if answer["kind"] is None:
        return None
    if answer["kind"] not in KINDS:
        return f"{answer['way']} of {name}: {answer['kind']}: {answer['error']}"
    line = answer["error"]
    if name not in line or "\n" in line or ";" not in line:  # the cure is behind the semicolon
        return f"{answer['way']} of {name}: {line!r} does not name the file and the cure in one line"
    return None


# The torture set


@pytest.fixture(scope="module")
def tortured() -> list[dict[str, Any]]:
    """All answers of all of its files; a process that dies is one answer of its own."""
    if not TORTURE.is_dir():
        pytest.skip("needs the files of ../shared/data/torture, which are not here")
    return list(answers(jobs_of(sorted((TORTURE / "files").iterdir()))))


def test_every_torture_file_gives_clips_or_an_error_that_names_it_and_the_cure(tortured: list[dict[str, Any]]) -> None:
    """Within 10 s of processor time and 1 GiB each: the process ends at either."""
    listed = [json.loads(line) for line in (TORTURE / "manifest.jsonl").read_text("utf-8").splitlines()]
    assert len(listed) == 139
    assert {Path(answer["path"]).name for answer in tortured} == {Path(row["file"]).name for row in listed}
    assert len(tortured) == 139 * len(WAYS)
    assert [line for line in map(fault, tortured) if line] == []
    for way in WAYS:
        read = sum(answer["kind"] is None for answer in tortured if answer["way"] == way)
        assert 25 <= read <= 110, f"{way} reads {read} of the 139 files"


def test_what_a_reader_reads_is_as_long_as_it_says(tortured: list[dict[str, Any]]) -> None:
    for answer in tortured:
        if answer["kind"] is None and answer["way"] == "audio reader":
            assert answer["count"] == answer["samples"] > 0
        if answer["kind"] is None and answer["way"] == "video reader":
            assert answer["shape"][0] == 3
            assert answer["shape"][1] == min(8, answer["count"]) > 0


def test_empty_and_foreign_files_are_refused(tortured: list[dict[str, Any]]) -> None:
    tags = {
        Path(row["file"]).name: set(row.get("tags", ()))
        for row in map(json.loads, (TORTURE / "manifest.jsonl").read_text("utf-8").splitlines())
    }
    for answer in tortured:
        name = Path(answer["path"]).name
        if {"zero_byte", "not_media"} & tags[name]:
            assert answer["kind"] is not None, f"{answer['way']} reads {name}, which is empty or no media"
        if "audio_only" in tags[name] and answer["way"].startswith("video"):
            assert answer["kind"] is not None, f"{answer['way']} finds pictures in {name}"


def test_a_data_module_gives_each_torture_file_as_itself_or_counts_it(tmp_path: Path) -> None:
    """In a process of its own, as one of the files might take its reader with it."""
    if not TORTURE.is_dir():
        pytest.skip("needs the files of ../shared/data/torture, which are not here")
    done = subprocess.run(
        [sys.executable, "-m", "tests.bad_input_modules", str(TORTURE / "files"), str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for line in map(json.loads, done.stdout.splitlines()):
        assert line["given"] > 20
        assert line["given"] + line["bad"] == line["items"] > 50
        assert sum(line["by_kind"].values()) == line["bad"]
        assert set(line["by_kind"]) <= KINDS
        assert line["replaced"] == []
        assert line["written"] == line["by_kind"]


# Generated faults


def bomb(path: Path, claim: int, side: int = 30_000) -> Path:
    """A film of one grey PNG of 30,000x30,000 pixels, a MB of file and 900 MB of pixels, that claims other sides."""
    packer, rows = zlib.compressobj(9, wbits=-15), side // 100
    part = packer.compress(bytes(rows * (side + 1))) + packer.flush(zlib.Z_FULL_FLUSH)  # parts know nothing of others
    check = struct.pack(">I", side * (side + 1) % 65521 << 16 | 1)  # Adler-32 of zeros
    pixels = b"\x78\xda" + part * 100 + b"\x03\x00" + check

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    picture = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    with av.open(str(path), "w") as file:
        stream = file.add_stream("png", rate=8)
        stream.width = stream.height = 16
        stream.pix_fmt = "gray"
        packet = av.Packet(picture)
        packet.stream, packet.pts, packet.dts, packet.time_base = stream, 0, 0, Fraction(1, 8)
        packet.is_keyframe = True
        file.mux(packet)
    data = bytearray(path.read_bytes())
    struct.pack_into(">HH", data, data.index(b"png ") + 28, claim, claim)  # of the sample entry
    path.write_bytes(data)
    return path


def ten_hours(path: Path, out: Path) -> Path:
    """The mp4 with ten hours in every header that says how long it is."""
    data = bytearray(path.read_bytes())
    for name, scale_at, length_at in ((b"mvhd", 16, 20), (b"mdhd", 16, 20)):
        at = data.index(name)
        (scale,) = struct.unpack_from(">I", data, at + scale_at)
        struct.pack_into(">I", data, at + length_at, 36_000 * scale)
    movie_scale = struct.unpack_from(">I", data, data.index(b"mvhd") + 16)[0]
    struct.pack_into(">I", data, data.index(b"tkhd") + 24, 36_000 * movie_scale)
    out.write_bytes(data)
    return out


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A second of moving film and of sound in several forms, at a path with spaces and other scripts."""
    root = tmp_path_factory.mktemp("good") / "clips of mine" / "фильмы 映画 é"
    root.mkdir(parents=True)
    frames = torch.rand(3, 8, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    tone = torch.sin(torch.arange(8000) * 0.3)[None] * 0.5
    write_video(root / "a film.mp4", frames, 8)
    write_video(root / "sounding.mp4", frames, 8, sound=(tone, 8000))
    for suffix in ("wav", "flac", "mp3", "ogg"):
        write_audio(root / f"звук.{suffix}", tone, 8000)
    with av.open(str(root / "a film.mp4")) as source, av.open(str(root / "film.mkv"), "w") as copy:
        stream = copy.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                copy.mux(packet)
    return {path.name: path for path in sorted(root.iterdir())}


def test_paths_with_spaces_and_other_scripts_are_read(good: dict[str, Path]) -> None:
    films = [good[name] for name in ("a film.mp4", "film.mkv", "sounding.mp4")]
    sounds = [path for name, path in good.items() if name.startswith("звук")] + [good["sounding.mp4"]]
    found = list(answers(jobs_of(films, WAYS[::2][:2]) + jobs_of(sounds, ("audio reader", "audio clip"))))
    assert len(sounds) == 5
    assert [(a["path"], a["error"]) for a in found if a["kind"] is not None and a["way"] != "audio reader"] == []
    assert [a["count"] for a in found if a["way"] == "video reader"] == [8, 8, 8]


def test_generated_faults_are_refused_by_name_in_little_time_and_memory(good: dict[str, Path], tmp_path: Path) -> None:
    made: dict[str, tuple[Path, str]] = {}
    for name, path in good.items():
        data, way = path.read_bytes(), "audio" if name.startswith("звук") else "video"
        for share in (0.1, 0.5, 0.9):
            cut = tmp_path / f"{path.stem} {share}{path.suffix}"
            cut.write_bytes(data[: math.floor(len(data) * share)])
            made[cut.name] = (cut, way)
        for what, content in (("zero", b""), ("text", b"This is no film. " * 200), ("zeros", bytes(20_000))):
            other = tmp_path / f"{what} {path.name}"
            other.write_bytes(content)
            made[other.name] = (other, way)
    for claim in (16, 30_000):
        made[f"bomb {claim}.mov"] = (bomb(tmp_path / f"bomb {claim}.mov", claim), "video")
    made["ten hours.mp4"] = (ten_hours(good["a film.mp4"], tmp_path / "ten hours.mp4"), "video")
    wav = bytearray(good["звук.wav"].read_bytes())
    struct.pack_into("<I", wav, wav.index(b"data") + 4, 2 * 8000 * 36_000)
    (tmp_path / "ten hours.wav").write_bytes(wav)
    made["ten hours.wav"] = (tmp_path / "ten hours.wav", "audio")
    flac = bytearray(good["звук.flac"].read_bytes())
    (packed,) = struct.unpack_from(">Q", flac, 18)
    struct.pack_into(">Q", flac, 18, packed >> 36 << 36 | 8000 * 36_000)
    (tmp_path / "ten hours.flac").write_bytes(flac)
    made["ten hours.flac"] = (tmp_path / "ten hours.flac", "audio")
    (tmp_path / "folder.mp4").mkdir()
    os.mkfifo(tmp_path / "pipe.mp4")
    for name in ("folder.mp4", "pipe.mp4", "not there.mp4"):
        made[name] = (tmp_path / name, "video")
    jobs = [job for path, way in made.values() for job in jobs_of([path], (f"{way} reader", f"{way} clip"))]
    found = list(answers(jobs))
    assert len(found) == len(jobs) > 90
    assert [line for line in map(fault, found) if line] == []
    read = {Path(a["path"]).name: a["count"] for a in found if a["kind"] is None and a["way"].endswith("reader")}
    assert read.pop("ten hours.mp4") == 8, "its index is whole, and goes before what the header claims"
    assert read == {}, "faults taken for whole"
    clips = {Path(a["path"]).name for a in found if a["kind"] is None and a["way"].endswith("clip")}
    late = {name for name in clips if " 0.9." in name}  # cut off behind the window that a clip reads
    assert clips - late <= {*read, "ten hours.mp4", "ten hours.flac"}
    kinds = {Path(a["path"]).name: a["kind"] for a in found if a["way"].endswith("reader")}
    for claim in (16, 30_000):
        assert kinds[f"bomb {claim}.mov"] in ("too large", "damaged")
    assert {kinds[name] for name in ("folder.mp4", "pipe.mp4", "not there.mp4")} == {"unreachable"}
    assert {kinds[name] for name in kinds if name.startswith("text")} == {"not media"}


def test_what_may_not_be_read_is_unreachable(good: dict[str, Path], tmp_path: Path) -> None:
    locked = []
    for name in ("a film.mp4", "звук.wav", "звук.mp3"):
        (tmp_path / name).write_bytes(good[name].read_bytes())
        (tmp_path / name).chmod(0)
        locked.append(tmp_path / name)
    root = os.geteuid() == 0  # who may read all, until it becomes nobody
    jobs = [{**job, "as_nobody": root} for job in jobs_of(locked)]
    found = list(answers(jobs))
    assert {answer["kind"] for answer in found} == {"unreachable"}
    assert [line for line in map(fault, found) if line] == []


# Captions and manifests


def modules(folder: Path, **settings: Any) -> dict[str, ClipDataModule]:
    given = {"batch_size": 2, "val_share": 0.0, "max_bad_share": 1.0, **settings}
    return {
        "video": VideoModule(str(folder), frames=4, size=(32, 32), **given),
        "audio": SoundModule(str(folder), sample_rate=8000, samples=4000, **given),
    }


def test_bad_captions_are_counted_by_kind_and_nothing_takes_their_place(good: dict[str, Path], tmp_path: Path) -> None:
    captions: dict[str, bytes | None] = {
        "whole": "a tone 🎵".encode(),
        "missing": None,
        "empty": b" \n\n",
        "latin": "une scène".encode("latin-1"),
        "zeros": b"\xff\xfe" + bytes(50),
        "long": b"word " * 200_000,
        "longer": b"word " * 300_000,
    }
    for name, text in captions.items():
        (tmp_path / f"{name}.wav").write_bytes(good["звук.wav"].read_bytes())
        (tmp_path / f"{name}.mp4").write_bytes(good["sounding.mp4"].read_bytes())
        if text is not None:
            (tmp_path / f"{name}.txt").write_bytes(text)
    for way, data in modules(tmp_path).items():
        with pytest.warns(UserWarning, match="left out of train"):
            data.setup()
        items = data.datasets["train"].items
        assert {item.key for item in items} == {"whole"}, way
        lines = data.account()["train"]["left_out"]
        assert {Path(line["where"]).stem for line in lines} == set(captions) - {"whole"}
        for line in lines:
            stem = Path(line["where"]).stem
            assert stem in line["reason"]
            assert "\n" not in line["reason"]
            assert {"missing": "no caption", "empty": "no caption", "latin": "caption not UTF-8",
                    "zeros": "caption not UTF-8", "long": "caption too large", "longer": "caption too large"
                    }[stem] == line["kind"], line  # fmt: skip
        strict = modules(tmp_path, max_bad_share=0.01)[way]
        with pytest.raises(ValueError, match="entries lack media or caption, more than max_bad_share=0.01"):
            strict.setup()
        silent = modules(tmp_path, caption="none")[way]
        silent.setup()
        assert len(silent.datasets["train"].items) >= 3  # those whose captions are only missing


def test_rows_that_point_outside_of_their_root_are_not_opened(good: dict[str, Path], tmp_path: Path) -> None:
    root, secret = tmp_path / "set", tmp_path / "secret.wav"
    root.mkdir()
    secret.write_bytes(good["звук.wav"].read_bytes())
    (root / "fine.wav").write_bytes(good["звук.wav"].read_bytes())
    (root / "link.wav").symlink_to(secret)
    names = ["fine.wav", "../secret.wav", str(secret), "link.wav", "sub/../../secret.wav", "file:///etc/passwd",
             "pipe:cat secret.wav", "nothing.wav", "a\0b.wav", "~/x.wav", ""]  # fmt: skip
    rows = [json.dumps({"file_name": name, "caption": "a tone"}) for name in names]
    (root / "clips.jsonl").write_text("\n".join([*rows, '{"caption": "no name"}', "{broken", "[1]"]))
    (root / "clips.csv").write_text(
        "file_name,caption\n" + "\n".join(f'"{name}",a tone' for name in names if "\0" not in name)
    )
    for table in ("clips.jsonl", "clips.csv"):
        found = load_source(root / table, (".wav",), val_share=0)
        assert [item.path.name for item in found.splits["train"]] == ["fine.wav"]
        lines = found.problems["train"]
        assert len(lines) >= len(names) - 2
        outside = [line for line in lines if "secret" in line or "link" in line]
        assert len(outside) == 5
        for line in lines:
            assert table in line
            assert "\n" not in line
            assert line.kind
