"""The pages of runs: what they show, that nothing of a stranger's text becomes markup, and their commands."""

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from audio.show import ShowAudio
from mmdiff.run.charts import HEIGHT, WIDTH, Line, chart, smoothed
from mmdiff.run.compare import differing, names_of
from mmdiff.run.compare import main as compare_main
from mmdiff.run.history import HISTORY
from mmdiff.run.page import Media, flat
from mmdiff.run.report import main as report_main
from mmdiff.run.report import report
from mmdiff.run.samples import Shot, shot_folder, spread, write_index
from video.show import ShowVideo

EVIL = "</td><script>alert(1)</script><img src=http://example.com/x>&\"'"
SESSION: dict[str, Any] = {
    "command": f"mmdiff fit {EVIL}", "folder": "/x", "started": "2026-01-01T00:00:00+0000", "first_step": 0,
    "processes": 2, "strategy": "DDPStrategy", "precision": "bf16-mixed",
    "machine": {"host": "h", "cpu": "c", "cores": 2, "threads": 1, "devices": []},
    "git": {"project": {"commit": "a" * 40, "changed": ["x.py"]}}, "versions": {"torch": "2.11"},
    "status": "finished", "last_step": 30, "at": "2026-01-01T01:00:00+0000",
    "seconds": {"training steps": 10.0, "waiting for data": 5.0}, "checkpoints": [],
}  # fmt: skip


def run(folder: Path, lr: float = 0.1, shots: tuple[int, ...] = (10, 20), **launch: Any) -> Path:
    """The folder of a run as the callbacks leave it."""
    folder.mkdir(parents=True)
    split = {
        "data set": "D",
        "items": 4,
        "batches": 2,
        "fingerprint": "f00d",
        "captions": {"distinct": 7, "first": [EVIL]},
        "left_out": {},
    }
    record = {
        "config": {"model": {"lr": lr, "name": EVIL}, "trainer": {"callbacks": []}}, "seed": 3,
        "model": {"class": "M", "parameters": 1234567, "trained": 5}, "data": {"train": split, "val": split},
        "launches": [{**SESSION, **launch}],
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(record))
    lines = [{"step": n, "train/loss": lr * 10 / n, "lr-AdamW": lr, EVIL: n} for n in range(1, 31)]
    lines += [{"step": n, "val/loss": lr * 20 / n, "val_at/0.1_to_1": lr, "val_at/above_1": 2 * lr} for n in shots]
    (folder / HISTORY).write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in shots:
        at = shot_folder(folder, step)
        at.mkdir(parents=True)
        video = ShowVideo().files(at / "raw-0", torch.rand(3, 8, 16, 16) * 2 - 1, 4.0)
        sound = ShowAudio().files(at / "ema-0", torch.rand(1, 8000) * 0.1, 8000.0)
        names = [[path.name for path in paths] for paths in (video, sound)]
        write_index(Shot(step, at, [EVIL], {"raw": [names[0]], "ema": [names[1]]}))
    return folder


class Tags(HTMLParser):
    """Tags of a page and what they load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "data", "poster")]


def assert_self_contained(text: str) -> None:
    tags = Tags(text)
    assert "script" not in tags.tags
    assert "link" not in tags.tags
    assert all(value.startswith("data:") for value in tags.loaded), "the page loads something"
    assert "default-src 'none'" in text


def test_a_report_holds_all_of_a_run_and_needs_nothing_else(tmp_path: Path) -> None:
    folder = run(tmp_path / "run")
    (folder / "doctor.json").write_text(
        json.dumps([{"name": "n", "found": f"the moon {EVIL}", "cure": "c", "step": 7}])
    )
    (folder / "bad_items.json").write_text(json.dumps({"train": EVIL}))
    text = report(folder)
    assert_self_contained(text)
    tags = Tags(text).tags
    assert (tags.count("video"), tags.count("audio"), tags.count("img")) == (2, 2, 2)
    for part in ("1,234,567 parameters", "the moon", "torch 2.11", "lr: 0.1", "f00d", "steps/s", "step 20, raw"):
        assert part in text, part
    for title in ("loss", "val loss by noise level", "learning rate", "val loss over sigma, last"):
        assert f'aria-label="{title}"' in text, title
    assert re.search(r"<td>2</td><td>10.0</td><td>5.0</td>", text), "30 steps in 15 s"


def test_a_report_of_a_run_that_has_only_begun_says_so(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", shots=(), status="running", last_step=0, seconds={})
    (folder / HISTORY).unlink()
    text = report(folder)
    assert_self_contained(text)
    for part in ("running: last heard of at step 0", "nothing was logged yet", "none: give the config"):
        assert part in text, part
    (folder / "doctor.json").write_text("{")
    assert "doctor.json cannot be read" in report(folder)


def test_a_page_grows_with_neither_the_samples_nor_the_steps(tmp_path: Path) -> None:
    shots = [Shot(n, tmp_path, [], {}) for n in range(100)]
    assert [shot.step for shot in spread(shots, 8)] == [0, 14, 28, 42, 57, 71, 85, 99]
    assert spread(shots[:3], 8) == shots[:3]
    assert len(chart("x", [Line("a", [(n, n) for n in range(10**5)])])) < 20_000
    (tmp_path / "a.wav").write_bytes(bytes(1000))
    media = Media(mib=1500 / 2**20)
    assert "<audio" in media(tmp_path / "a.wav")
    assert media(tmp_path / "a.wav") == f"<p>{tmp_path / 'a.wav'}</p>", "no room is left"
    assert "No such file" in Media()(tmp_path / "none.wav")


def places(svg: str) -> list[tuple[float, float]]:
    (path,) = re.findall(r'<path class="line" d="([^"]*)"', svg)
    return [(float(x), float(y)) for x, y in re.findall(r"(-?[\d.]+) (-?[\d.]+)", path)]


@pytest.mark.parametrize("log", [False, True])
def test_a_chart_draws_each_point_at_its_place(log: bool) -> None:
    values = [1.0, 10.0, 100.0]
    (x0, y0), (x1, y1), (x2, y2) = places(chart("t", [Line("a", list(enumerate(values)))], log_y=log))
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert 0 < y2 < y1 < y0 < HEIGHT
    assert 0 < x0 < x2 < WIDTH
    assert (y0 - y1) / (y1 - y2) == pytest.approx(1 if log else 0.1, abs=0.01)


def test_charts_of_odd_curves_are_whole() -> None:
    for points in ([], [(0, math.nan)], [(0, 0.0)], [(0, 5.0)], [(0, -1.0), (1, 1e300)], [(0, 1e-300), (1, 1e-300)]):
        for log in (False, True):
            text = chart(EVIL, [Line(EVIL, points), Line("b", points)], log_x=log, log_y=log)
            assert set(Tags(text).tags) <= {"svg", "g", "text", "path", "circle", "title"}, text
            assert "nan" not in text
            assert text.endswith("</svg>")
    gap = chart("t", [Line("a", [(0, 1.0), (1, 2.0), (2, math.nan), (3, 1.0), (4, 2.0)])])
    (path,) = re.findall(r'<path class="line" d="([^"]*)"', gap)
    assert path.count("M") == 2


def test_smoothing_has_no_lag_at_the_start_and_keeps_gaps() -> None:
    flat_line = smoothed([(n, 3.0) for n in range(100)])
    assert all(value == pytest.approx(3.0) for _, value in flat_line)
    noisy = [(n, float(n % 2)) for n in range(1000)]
    assert all(0.4 < value < 0.6 for _, value in smoothed(noisy)[100:])
    assert math.isnan(smoothed([(0, 1.0), (1, math.nan), (2, 1.0)])[1][1])


def test_compare_lays_runs_side_by_side(tmp_path: Path) -> None:
    runs = [run(tmp_path / name, lr, shots) for name, lr, shots in (("a", 0.1, (10, 20)), ("b", 0.2, (10, 30)))]
    out = tmp_path / "new" / "page.html"
    assert compare_main([*map(str, runs), "--out", str(out)]) == 0
    text = out.read_text()
    assert_self_contained(text)
    assert re.search(r"<th>model.lr</th><td>0.1</td><td>0.2</td>", text)
    assert "<th>model.name</th>" not in text, "what is the same is no difference"
    assert text.count("step 10</th>") == 2, "the last step that both have samples of"
    tags = Tags(text).tags
    assert (tags.count("video"), tags.count("audio")) == (2, 2)
    for title in ("train/loss", "val/loss", "val loss over sigma, last"):
        (one,) = re.findall(rf'<svg[^>]*aria-label="{title}".*?</svg>', text)
        assert len(re.findall('class="line"', one)) == 2, "one line for each run"
    shutil.rmtree(runs[1] / "samples")
    assert compare_main([*map(str, runs), "--out", str(out)]) == 0
    assert "none of " in out.read_text()


def test_compare_refuses_what_it_cannot_compare(tmp_path: Path) -> None:
    one = run(tmp_path / "a" / "v")
    with pytest.raises(ValueError, match="1 run given; give two or more"):
        compare_main([str(one)])
    with pytest.raises(ValueError, match="is given twice"):
        compare_main([str(one), str(tmp_path / "a" / ".." / "a" / "v")])
    with pytest.raises(ValueError, match="holds no run.json"):
        compare_main([str(one), str(tmp_path)])
    with pytest.raises(ValueError, match="--help lists"):
        report_main([])
    assert names_of([Path("/x/p/a/v"), Path("/x/q/a/v")]) == ["/x/p/a/v", "/x/q/a/v"], "short names would be the same"


def test_configs_differ_leaf_by_leaf() -> None:
    a, b = (
        {"x": {"y": 1, "z": [1, 2]}, "c": [{"p": 1}], "e": {}},
        {"x": {"y": 2, "z": [1, 2]}, "c": [{"p": 1}, {"q": 2}]},
    )
    rows = dict(differing({"a": flat(a), "b": flat(b)}))
    assert rows == {"x.y": [1, 2], "e": [{}, "(not there)"], "c[1].q": ["(not there)", 2]}


def test_a_report_shows_the_data_report(tmp_path: Path) -> None:
    folder, out = run(tmp_path / "run"), tmp_path / "out"
    out.mkdir()
    found = {"failures": [f"3 items {EVIL}"], "status": {"kept": 41}, "items": [{"where": "a secret"}]}
    (out / "report.json").write_text(json.dumps(found))
    text = report(folder, out)
    assert_self_contained(text)
    assert "fails: 3 items" in text
    assert "<th>status.kept</th><td>41</td>" in text
    assert "a secret" not in text
    assert "Data report" not in report(folder)
    out.rename(folder / "data_report")
    assert report(folder) == text
    with pytest.raises(ValueError, match="none.json is no report.json of `mmdiff data report`"):
        report(folder, tmp_path / "none.json")


def test_report_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(tmp_path / "run")
    assert report_main([str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    assert "<h1>" in (folder / "report.html").read_text()
