"""What `mmdiff data prepare` drops, and why; how it cuts and converts."""

import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from mmdiff.data.media import TooLargeError
from mmdiff.data.medium import Piece
from mmdiff.data.prepare import Recipe, Task
from mmdiff.data.sources import load_source
from tests.prepare_cases import clip, make_clips, run
from video.curation import VideoMedium
from video.files import EXTENSIONS, VideoReader, write_video


@pytest.fixture(scope="module")
def sixty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clips(tmp_path_factory.mktemp("sixty"), 60)


def test_every_dropped_clip_has_its_reason_and_the_counts_add_up(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    named = {
        "black": torch.full((3, 8, 32, 32), -1.0), "frozen": clip(1, moving=False), "single": clip(2, frames=1),
        "good": clip(3), "short": clip(4, frames=2), "copy": clip(3), "slow": clip(5).clone(),
    }  # fmt: skip
    named["slow"][:, 1:] = named["slow"][:, :1]
    named["slow"][:, 7, :4, :4] += 0.5
    for name, frames in named.items():
        write_video(source / f"{name}.mp4", frames, 8, crf=17 if name == "copy" else 16)
        (source / f"{name}.txt").write_text(name)
    (source / "damaged.mp4").write_bytes((source / "good.mp4").read_bytes()[:900])
    (source / "damaged.txt").write_text("damaged")
    (source / "uncaptioned.mp4").write_bytes((source / "good.mp4").read_bytes())
    recipe = Recipe(VideoMedium(), {"duration": (0.5, 2.0), "motion": (0.05, None)})
    report = run(source, tmp_path / "out", recipe=recipe)
    assert report["clips"]["dropped"] == {"black": 1, "duration": 1, "frozen": 1, "motion": 1, "single frame": 1}
    assert report["clips"]["duplicates"] == 1
    assert report["duplicates_of"] == [["good.mp4", "copy.mp4"]]  # the first in the order of the source stays
    assert report["items"]["all"] == 9
    assert sum(report["items"]["bad"].values()) == 2
    assert any("damaged.mp4" in line for line in report["bad"])
    assert any("uncaptioned.mp4" in line for line in report["bad"])
    (kept,) = load_source(tmp_path / "out", EXTENSIONS, val_share=0).splits["train"]
    assert kept.key == "copy"
    allowing = run(source, tmp_path / "all", recipe=Recipe(VideoMedium(), allow=("black", "frozen", "single frame")))
    assert (allowing["clips"]["dropped"], allowing["clips"]["kept"]) == ({}, 6)


@dataclass(frozen=True)
class Broken(VideoMedium):
    """A medium with a fault of its own in one file."""

    def look(self, source: Any, name: str, piece: Piece, caption: str = "") -> Any:
        if name.endswith("c00001.mp4"):
            raise ZeroDivisionError("a fault of the program")
        return super().look(source, name, piece, caption)


def test_a_fault_of_the_program_in_one_file_is_counted_and_named(sixty: Path, tmp_path: Path) -> None:
    report = run(sixty, tmp_path / "out", recipe=Recipe(Broken()))
    assert report["items"]["bad"] == {"unexpected error": 1}
    assert report["bad"] == ["c00001.mp4: ZeroDivisionError: a fault of the program"]
    assert report["clips"]["kept"] == 59


def test_a_copy_of_a_clip_to_validate_on_is_dropped_from_training(sixty: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    for split, seeds in (("train", (1, 2)), ("val", (2, 3))):
        (source / split).mkdir(parents=True)
        for seed in seeds:
            (source / split / f"{split}{seed}.mp4").write_bytes((sixty / f"c{seed:05d}.mp4").read_bytes())
            (source / split / f"{split}{seed}.txt").write_text("x")
    report = run(source, tmp_path / "out")
    assert report["clips"]["splits"] == {"train": 1, "val": 2}
    assert report["duplicates_of"] == [["train/train2.mp4", "val/val2.mp4"]]


def test_equal_keys_stay_apart(sixty: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name, seed in (("a.b", 1), ("a b", 2), ("a_b", 3)):
        source.mkdir(exist_ok=True)
        (source / f"{name}.mp4").write_bytes((sixty / f"c{seed:05d}.mp4").read_bytes())
        (source / f"{name}.txt").write_text(name)
    run(source, tmp_path / "out")
    found = load_source(tmp_path / "out", EXTENSIONS, val_share=0).splits["train"]
    assert sorted(item.key for item in found) == ["a_b", "a_b~2", "a_b~3"]
    assert sorted(item.captions[0] for item in found) == ["a b", "a.b", "a_b"]


# -- cutting and converting


def test_scenes_become_clips_of_their_own(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    film = torch.cat([clip(1, 12), clip(2, 20), clip(3, 8)], dim=1)
    write_video(source / "film.mp4", film, 8)
    (source / "film.txt").write_text("a film")
    recipe = Recipe(VideoMedium(scene_threshold=0.15), most_s=2.0)
    report = run(source, tmp_path / "out", recipe=recipe)
    assert report["clips"]["changes"] == {"cut": 4}
    found = load_source(tmp_path / "out", EXTENSIONS, val_share=0).splits["train"]
    assert [item.key for item in found] == [f"film-{n:04d}" for n in range(4)]
    assert [item.meta["num_frames"] for item in found] == [12, 10, 10, 8]
    assert [item.meta["source_start_s"] for item in found] == [0, 1.5, 2.75, 4]
    for item, first in zip(found, (0, 12, 22, 32), strict=True):
        with VideoReader(item.read()) as reader:
            pixels = reader.read(range(len(reader))).float() / 127.5 - 1
        wanted = film[:, first : first + len(pixels[0])]
        assert (pixels - wanted).abs().mean() < 0.1
        assert item.captions == ["a film"]


def test_a_clip_takes_the_rate_and_size_that_are_asked_for(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_video(source / "wide.mp4", clip(1, 16, (32, 64)), 16)
    (source / "wide.txt").write_text("wide")
    found = {}
    for resize in ("cover", "fit"):
        medium = VideoMedium(fps=8, size=(16, 16), resize=resize)  # type: ignore[arg-type]
        report = run(source, tmp_path / resize, recipe=Recipe(medium))
        changed = "cropped" if resize == "cover" else "padded"
        assert report["clips"]["changes"] == {"retimed": 1, "resized": 1, changed: 1}
        (item,) = load_source(tmp_path / resize, EXTENSIONS, val_share=0).splits["train"]
        assert (item.meta["num_frames"], item.meta["fps"], item.meta["height"], item.meta["width"]) == (8, 8, 16, 16)
        with VideoReader(item.read()) as reader:
            found[resize] = reader.read(range(len(reader))).float()
            assert (len(reader), reader.fps) == (8, 8)
    assert found["fit"][:, :, :3].mean() < 20  # black above
    assert found["cover"][:, :, :3].mean() > 40


@pytest.mark.parametrize(
    ("piece", "most_s", "parts"),
    [
        (Piece(), None, [(0, None)]),
        (Piece(), 5.0, [(0, None)]),
        (Piece(), 2.0, [(0, 5 / 3), (5 / 3, 10 / 3), (10 / 3, None)]),
        (Piece(1.0, 3.0), 1.0, [(1, 2), (2, 3)]),
        (Piece(1.0, None), 4.0, [(1, None)]),
    ],
)
def test_long_pieces_are_cut_into_equal_parts(
    piece: Piece, most_s: float | None, parts: list[tuple[float, float | None]]
) -> None:
    found = [(part.start_s, part.end_s) for part in piece.split(5.0, most_s)]
    assert [pytest.approx(a) for a, _ in parts] == [a for a, _ in found]
    assert [None if b is None else pytest.approx(b) for _, b in parts] == [b for _, b in found]


def test_a_field_that_is_no_text_is_kept_as_an_escape(tmp_path: Path) -> None:
    source = make_clips(tmp_path / "source", 1)
    (source / "c00000.json").write_text('{"caption": "a clip", "title": "half \\ud800"}')
    run(source, tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as archive:
        told = archive.extractfile("c00000.json")
        assert told is not None
        assert json.loads(told.read())["title"] == "half \ud800"
    assert json.loads((tmp_path / "out" / "train.jsonl").read_text("utf-8"))["title"] == "half \ud800"


def test_a_full_disk_is_no_fault_of_an_item(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Task, name: str, record: Any, media: Any) -> str:
        if media:
            raise OSError(28, "No space left on device")
        return name

    monkeypatch.setattr(Task, "_write", full)
    with pytest.raises(OSError, match="No space"):
        run(make_clips(tmp_path / "source", 1), tmp_path / "out")


def test_a_piece_that_memory_cannot_hold_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_clips(tmp_path / "source", 1, frames=20)
    medium = VideoMedium(size=(16, 16), resize="cover")
    monkeypatch.setattr("video.curation.MAX_BYTES", 16 * 16 * 3 * 19)
    with pytest.raises(TooLargeError, match="20 frames of 16x16 are over .*--longest"):
        medium.encode(source / "c00000.mp4", "c", ".mp4", Piece())
    assert medium.encode(source / "c00000.mp4", "c", ".mp4", Piece(0, 1)).facts["num_frames"] == 8
