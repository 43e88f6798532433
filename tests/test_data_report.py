"""`mmdiff data report`: every entry has one fate, geometry that changes unasked fails, strangers' captions are text."""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from audio.files import write_audio
from mmdiff.__main__ import main as mmdiff
from mmdiff.data.commands import FAILED
from video.files import write_video

ROOT = Path(__file__).resolve().parent.parent


def clip(seed: int, frames: int = 16, size: tuple[int, int] = (32, 32), moving: bool = True) -> torch.Tensor:
    blocks = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    picture = F.interpolate(blocks, size)[0]
    return torch.stack([torch.roll(picture, 2 * t if moving else 0, -1) for t in range(frames)], dim=1)


def add(folder: Path, name: str, frames: torch.Tensor, caption: str | None = "a clip", fps: float = 8) -> None:
    write_video(folder / f"{name}.mp4", frames, fps, preset="ultrafast")
    if caption is not None:
        (folder / f"{name}.txt").write_text(caption)


def config(tmp_path: Path, module: str, path: Path, **arguments: Any) -> Path:
    tree = {"data": {"class_path": f"{module}.ClipDataModule", "init_args": {"path": str(path), **arguments}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "config.yaml"


def report(config: Path, out: Path, *options: str) -> tuple[int, dict[str, Any], str]:
    status = mmdiff(["data", "report", str(config), "--out", str(out), *options])
    return status, json.loads((out / "report.json").read_text()), (out / "report.html").read_text()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    for split in ("train", "val"):
        (folder / split).mkdir(parents=True)
    for seed in range(4):
        add(folder / "train", f"good{seed}", clip(seed), f"a clip number {seed}")
    return folder


def test_every_entry_is_in_the_account_once(source: Path, tmp_path: Path, capsys: Any) -> None:
    train, val = source / "train", source / "val"
    add(train, "black", torch.full((3, 16, 32, 32), -1.0))
    add(train, "frozen", clip(9, moving=False))
    add(train, "a_small", clip(10, size=(16, 16)))
    add(train, "brief", clip(11, frames=5))
    add(train, "mute", clip(12), caption=None)
    add(val, "copy", clip(2), "a copy of good2")
    add(val, "more", clip(13))
    add(val, "beyond", clip(14))
    (train / "damaged.mp4").write_bytes((train / "good0.mp4").read_bytes()[:700])
    (train / "damaged.txt").write_text("damaged")
    (train / "lost.txt").write_text("whose media is lost")
    (train / "a_page.mp4").write_text("<html>not found</html>" * 40)
    (train / "a_page.txt").write_text("not a film")
    path = config(tmp_path, "video", source, size=[32, 32], max_bad_share=0.9, limit=9)
    status, found, page = report(path, tmp_path / "out")
    assert status == FAILED
    rows = found["items"]
    names = [row["where"] for row in rows]
    assert len(names) == len(set(names)) == found["entries"] == 15
    fates = {Path(row["where"]).stem: (row["status"], row.get("kind", "")) for row in rows}
    media = sorted(p.stem for p in source.rglob("*.mp4"))
    assert set(media) <= set(fates)
    assert found["status"] == {
        name: sum(fate == name for fate, _ in fates.values()) for name in ("kept", "dropped", "not used")
    }
    assert sum(found["status"].values()) == 15
    assert found["accounted_percent"] == 100.0
    assert fates["a_small"] == ("dropped", "other size")
    assert fates["brief"] == ("dropped", "too short")
    assert fates["mute"][0] == fates["lost"][0] == fates["damaged"][0] == fates["a_page"][0] == "dropped"
    assert fates["a_page"][1] == "not media"
    unused = [name for name, fate in fates.items() if fate == ("not used", "limit")]
    assert unused == ["good3"]
    kept = {Path(row["where"]).stem: row for row in rows if row["status"] == "kept"}
    assert kept["black"]["faults"] == ["black", "frozen"]
    assert kept["frozen"]["faults"] == ["frozen"]
    assert sum(found["dropped"].values()) == found["status"]["dropped"]
    assert any("data.init_args" in line or "resize" in line for line in found["failures"])
    assert "100.0 %" in page
    assert "100.0 % of 15 entries accounted for" in capsys.readouterr().out


def test_a_good_config_passes_and_copies_across_splits_are_named(source: Path, tmp_path: Path) -> None:
    add(source / "val", "copy", clip(2), "a copy")
    path = config(tmp_path, "video", source, size=[32, 32])
    status, found, page = report(path, tmp_path / "out")
    assert (status, found["failures"]) == (0, [])
    assert found["duplicates"] == {"copies": 1, "across_splits": 1}
    (row,) = [row for row in found["items"] if "copy_of" in row]
    assert (row["where"], row["copy_of"]) == ("train/good2.mp4", "val val/copy.mp4")
    assert found["facts"]["fps"] == {"least": 8, "median": 8, "mean": 8, "most": 8}
    assert "passes" in page
    assert page.count("<figure>") == 5
    again = report(path, tmp_path / "again", "--workers", "2")
    assert again[1:] == (found, page)


@pytest.mark.parametrize(
    ("arguments", "change", "names"),
    [
        ({}, None, ["resize"]),
        ({"resize": "cover"}, "resized", []),
        ({"resize": "fit"}, "resized", []),
        ({"resize": "cover", "size": [16, 32]}, "cropped or padded", []),
        ({"size": [32, 32], "frames": 20}, None, ["short"]),
        ({"size": [32, 32], "frames": 20, "short": "pad"}, "padded in time", []),
        ({"size": [32, 32], "fps": 4.0, "frames": 8}, "retimed", []),
        ({"size": [32, 32], "frames": 8}, "a window of it", []),
    ],
)
def test_geometry_changes_only_as_told(
    arguments: dict[str, Any], change: str | None, names: list[str], source: Path, tmp_path: Path
) -> None:
    path = config(tmp_path, "video", source, **{"size": [16, 16], **arguments})
    status, found, _ = report(path, tmp_path / "out")
    if change is None:
        assert status == FAILED
        assert all(name in found["failures"][0] for name in names)
        assert found["status"]["kept"] == 0
    else:
        assert (status, found["failures"]) == (0, [])
        assert found["changes"][change] == 4


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    folder = tmp_path / "sounds"
    folder.mkdir()
    for seed in range(3):
        wave = torch.randn(2, 16000, generator=torch.Generator().manual_seed(seed)) * 0.1
        wave *= torch.linspace(1, 0.1, 16000) if seed else 1
        write_audio(folder / f"s{seed}.wav", wave, 16000)
        (folder / f"s{seed}.txt").write_text("noise")
    write_audio(folder / "silent.wav", torch.zeros(2, 16000), 16000)
    (folder / "silent.txt").write_text("nothing")
    return folder


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"samples": 8000, "channels": 2}, []),  # 16 kHz is the default, and the files' own
        ({"samples": 8000}, ["mixed unasked, .* give data.init_args.channels"]),
        ({"sample_rate": 8000, "samples": 8000, "channels": 1}, []),
    ],
)
def test_sound_is_resampled_and_mixed_only_as_told(
    arguments: dict[str, Any], said: list[str], sounds: Path, tmp_path: Path
) -> None:
    status, found, _ = report(config(tmp_path, "audio", sounds, val_share=0, **arguments), tmp_path / "out")
    assert status == (FAILED if said else 0)
    assert len(found["failures"]) == len(said)
    assert all(re.search(pattern, line) for pattern, line in zip(said, found["failures"], strict=True))
    assert found["faults"] == {"silent": 1}
    assert found["measures"]["peak_db"]["least"] == -120
    assert set(found["measures"]) == {"lufs", "peak_db", "rms_db"}


def test_files_of_another_rate_than_the_default_fail_and_name_it(tmp_path: Path) -> None:
    folder = tmp_path / "sounds"
    folder.mkdir()
    for seed in range(2):
        write_audio(folder / f"s{seed}.wav", torch.rand(1, 8000, generator=torch.Generator().manual_seed(seed)), 8000)
        (folder / f"s{seed}.txt").write_text("noise")
    status, found, _ = report(config(tmp_path, "audio", folder, samples=8000), tmp_path / "out")
    assert status == FAILED
    assert "2 items would be resampled unasked" in found["failures"][0]
    assert "data.init_args.sample_rate" in found["failures"][0]


# -- the page

NASTY = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</title><style>*{display:none}</style>",
    "javascript:alert(1) & <a href='https://example.com'>x</a>",
    "{{7*7}} ${7*7} \u202e \x00 naïve 犬",
]


class Seen(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_captions_and_names_are_text_whatever_they_say(tmp_path: Path) -> None:
    folder = tmp_path / "<b>source"
    folder.mkdir()
    for number, caption in enumerate(NASTY):
        add(folder, f"c{number}<img src=x onerror=alert(2)>", clip(number), caption)
    (folder / "<svg onload=alert(3)>.mp4").write_text("not media")
    (folder / "<svg onload=alert(3)>.txt").write_text("x")
    path = config(tmp_path, "video", folder, size=[32, 32], max_bad_share=1.0, val_share=0)
    _, found, page = report(path, tmp_path / "out")
    seen = Seen()
    seen.feed(page)
    allowed = {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "h1",
        "h2",
        "p",
        "table",
        "tr",
        "td",
        "th",
        "div",
        "svg",
    }
    assert set(seen.tags) <= allowed | {"text", "rect", "figure", "figcaption", "img", "ul", "li"}
    assert seen.tags.count("style") == 1
    assert not [name for name, _ in seen.attributes if name.startswith("on") or name in ("href", "srcdoc", "action")]
    assert {value[:11] for name, value in seen.attributes if name == "src"} == {"data:image/"}
    assert [value for name, value in seen.attributes if name == "content"] == [
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    ]
    assert "<script>alert(1)</script>" in seen.text
    assert "onerror=alert(1)" in seen.text
    assert "<svg onload=alert(3)>.mp4" in seen.text
    captions = {text for row in found["items"] for text in row.get("captions", [])}
    assert NASTY[0] in captions


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems hold no such names")
def test_a_name_that_is_not_utf8_is_a_bad_item_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    write_audio(tmp_path / "a.wav", 0.5 * torch.sin(torch.arange(4000) * 0.1)[None], 8000)
    for name in ("a", "b\udcff"):
        (tmp_path / "source" / f"{name}.wav").write_bytes((tmp_path / "a.wav").read_bytes())
    path = config(tmp_path, "audio", tmp_path / "source", sample_rate=8000, samples=4000, caption="none", val_share=0)
    status, found, html = report(path, tmp_path / "out")
    assert (status, found["status"]["kept"], found["dropped"]) == (FAILED, 1, {"unreachable": 1})
    assert "b\udcff.wav" in [row["where"] for row in found["items"]]
    assert r"b\udcff.wav" in html


def test_captions_are_counted(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    for number, caption in enumerate(["a red ball", "a red ball", "zwei Bälle, rot!\nsecond wording"]):
        add(folder, f"c{number}", clip(number), caption)
    _, found, _ = report(config(tmp_path, "video", folder, size=[32, 32], val_share=0), tmp_path / "out")
    captions = found["captions"]
    assert (captions["captions"], captions["distinct"], captions["items_sharing_the_first"]) == (4, 3, 2)
    assert captions["words"] == {"least": 2, "median": 3, "mean": 2.75, "most": 3}
    assert captions["characters"]["most"] == len("zwei Bälle, rot!")
    assert dict(captions["most_used"]) == {
        "a": 2, "red": 2, "ball": 2, "zwei": 1, "bälle": 1, "rot": 1, "second": 1, "wording": 1
    }  # fmt: skip
    assert (captions["vocabulary"], captions["not_ascii"], captions["items_without"]) == (8, 1, 0)


# -- the command


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("model: {class_path: mmdiff.model.DiffusionModel}", [], "has no data with a class_path"),
        ("data: {class_path: os.system, init_args: {command: ls}}", [], "outside the trusted packages"),
        ("data: {class_path: video.ClipDataModule, init_args: {path: /no/such}}", [], "/no/such"),
        ("data: {class_path: video.ClipDataModule, init_args: {path: ., frame: 3}}", [], "frame"),
        (
            "data: {class_path: video.render.WorldDataModule, init_args: {count: 4}}",
            [],
            "a report accounts for the items of a ClipDataModule",
        ),
        (
            "data: {class_path: video.ClipDataModule, init_args: {path: .}}",
            ["--workers", "0"],
            "--workers 0 is below 1",
        ),
        ("data: [", [], "is not YAML"),
    ],
)
def test_wrong_configs_end_in_one_line(
    text: str, options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(text)
    assert mmdiff(["data", "report", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error
    assert not (tmp_path / "out").exists()


def test_the_group_has_help_and_names_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert mmdiff(["data", "--help"]) == 0
    said = capsys.readouterr().out
    assert "report" in said
    assert "prepare" in said
    assert mmdiff(["data"]) == 2
    assert mmdiff(["data", "remove"]) == 2
    assert "'remove' is no command of mmdiff data; there are report, prepare" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["sprites", "digits", "sounds", "faces"])
def test_the_real_sets_pass(name: str, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    status, found, _ = report(ROOT / "configs" / "data" / f"{name}.yaml", tmp_path / "out", "--limit", "6")
    assert (status, found["failures"]) == (0, [])
    assert found["status"]["kept"] == 12
    assert found["accounted_percent"] == 100.0
    assert found["entries"] == {"sprites": 3300, "digits": 2700, "sounds": 320, "faces": 900}[name]
    numbers = [value for row in found["measures"].values() for value in row.values()]
    assert np.isfinite(numbers).all()
