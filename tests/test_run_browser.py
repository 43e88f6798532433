"""Runs of `mmdiff fit`, their reports and their comparison in a real browser: curves show, media play."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmdiff.callbacks import RunRecord
from mmdiff.run.compare import main as compare
from mmdiff.run.history import read_history
from mmdiff.run.record import read_record

ROOT = Path(__file__).resolve().parent.parent
VISIBLE = """() => [...document.querySelectorAll('svg.chart')].map(chart => {
    const box = chart.getBoundingClientRect();
    const lines = [...chart.querySelectorAll('path.line, path.faint')].map(line => line.getTotalLength());
    return {name: chart.getAttribute('aria-label'), width: box.width, height: box.height,
            long: Math.max(0, ...lines), dots: chart.querySelectorAll('circle').length};
})"""
PLAY = """async tag => {
    const found = [];
    for (const one of document.querySelectorAll(tag)) {
        one.muted = true;
        one.pause();
        one.currentTime = 0;
        one.playbackRate = 1;
        await one.play();
        const end = performance.now() + 5000;
        while (one.currentTime < 0.05 && performance.now() < end) await new Promise(go => setTimeout(go, 20));
        found.push({at: one.currentTime, length: one.duration, width: one.videoWidth || 0, error: one.error?.message});
        one.pause();
    }
    return found;
}"""


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    """A page of a headless Chromium, playwright's own or the system's; its errors and requests are in `.seen`."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    with playwright.sync_playwright() as engine:
        own = Path(engine.chromium.executable_path)
        found = str(own) if own.exists() else shutil.which("chromium") or shutil.which("google-chrome")
        if found is None:
            pytest.skip("needs a browser: `playwright install chromium`, or the system's package chromium")
        browser = engine.chromium.launch(executable_path=found, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 1400, "height": 1000})
        opened.seen = []
        opened.on("console", lambda message: opened.seen.append(message.text))
        opened.on("pageerror", lambda error: opened.seen.append(str(error)))
        opened.on("request", lambda request: opened.seen.append(request.url))
        yield opened
        browser.close()


def open_page(page: Any, path: Path) -> None:
    page.seen.clear()
    page.goto(path.as_uri())
    outside = [line for line in page.seen if not line.startswith(("data:", path.as_uri()))]
    assert outside == [], "the page complains, or asks for something"


def assert_plays(page: Any, tag: str, count: int, length_s: float) -> None:
    if tag == "video" and not page.evaluate(
        "document.createElement('video').canPlayType('video/mp4; codecs=avc1.42E01E')"
    ):
        pytest.skip("this browser was built without H.264")
    played = page.evaluate(PLAY, tag)
    assert len(played) == count
    for one in played:
        assert one["error"] is None
        assert one["at"] >= 0.05, f"the {tag} does not play"
        assert one["length"] == pytest.approx(length_s, abs=0.05)
        assert one["width"] == (16 if tag == "video" else 0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Short runs of the tiny configs, by kind."""
    folder = tmp_path_factory.mktemp("runs")
    short = ["--trainer.max_steps", "12", "--trainer.val_check_interval", "6", "--trainer.log_every_n_steps", "2"]
    commands = []
    for kind in ("video", "audio"):
        config = ROOT / "configs" / "tiny" / f"{kind}.yaml"
        where = ["--trainer.default_root_dir", str(folder / kind), "--data.init_args.count", "32"]
        commands.append(["fit", "-c", str(config), *short, *where])
    program = f"import sys; from mmdiff.__main__ import main; sys.exit(max(main(args) for args in {commands}))"
    command = [sys.executable, "-c", program]  # one process, since most of its time would go into imports
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {kind: folder / kind / "lightning_logs" / "version_0" for kind in ("video", "audio")}


def test_fit_leaves_a_record_curves_samples_and_a_report(runs: dict[str, Path]) -> None:
    for kind, folder in runs.items():
        record = read_record(folder)
        assert record["config"]["trainer"]["max_steps"] == 12, "the config with what the command line changed"
        assert record["seed"] == 0
        assert record["launches"][0]["status"] == "finished"
        assert f"tiny/{kind}.yaml --trainer.max_steps 12" in record["launches"][0]["command"]
        curves = read_history(folder)
        assert [step for step, _ in curves["train/loss"]] == [2, 4, 6, 8, 10, 12]
        assert [step for step, _ in curves["val/loss"]] == [6, 12]
        names = {"train/grad_norm", "speed/items_per_s", "speed/media_s_per_s", "memory/host_gib", "ema/distance"}
        assert names <= set(curves)
        for start in ("train_at/", "val_at/", "lr-AdamW"):
            assert any(name.startswith(start) for name in curves), start
        media = {"video": [".mp4"], "audio": [".wav", ".png"]}[kind]
        index = json.loads((folder / "samples" / "step_00000012" / "samples.json").read_text())
        for weights in ("raw", "ema"):
            assert [[Path(name).suffix for name in clip] for clip in index["files"][weights]] == [media, media]


def test_scalars_of_all_kinds_are_in_tensorboard(runs: dict[str, Path]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for folder in runs.values():
        events = EventAccumulator(str(folder))
        events.Reload()
        tags = events.Tags()["scalars"]
        for start in ("train/loss", "val/loss", "train/grad_norm", "train_at/", "val_at/", "lr-", "speed/", "memory/"):
            assert any(tag.startswith(start) for tag in tags), start
        assert "ema/distance" in tags


@pytest.mark.parametrize("kind", ["video", "audio"])
def test_a_report_shows_its_curves_and_plays_its_samples(kind: str, runs: dict[str, Path], page: Any) -> None:
    open_page(page, runs[kind] / "report.html")
    charts = {one["name"]: one for one in page.evaluate(VISIBLE)}
    assert {"loss", "grad_norm", "learning rate", "val loss by noise level", "speed/items_per_s"} <= set(charts)
    for name, one in charts.items():
        assert one["width"] > 300, name
        assert one["height"] > 150, name
        assert one["long"] > 20 or one["dots"] > 0, f"nothing is drawn in {name}"
    assert charts["loss"]["long"] > 100
    tag, length_s = {"video": ("video", 2.0), "audio": ("audio", 1.024)}[kind]
    assert_plays(page, tag, count=2 * 2 * 2, length_s=length_s)  # clips, weights, times
    if kind == "audio":
        sizes = page.evaluate("[...document.images].map(one => [one.complete, one.naturalWidth])")
        assert len(sizes) == 8
        assert all(complete and width > 100 for complete, width in sizes), "spectrograms"
    text = page.inner_text("body")
    for part in ("finished", "Findings of the doctor", "Timings", "fingerprint", "mmdiff.module.DiffusionModule"):
        assert part in text, part


def test_a_comparison_shows_both_runs(runs: dict[str, Path], page: Any, tmp_path: Path) -> None:
    assert compare([str(runs["video"]), str(runs["audio"]), "--out", str(tmp_path / "both.html")]) == 0
    open_page(page, tmp_path / "both.html")
    charts = {one["name"]: one for one in page.evaluate(VISIBLE)}
    assert charts["train/loss"]["long"] > 100
    assert_plays(page, "video", count=4, length_s=2.0)
    assert_plays(page, "audio", count=4, length_s=1.024)
    assert "data.class_path" in page.inner_text("body"), "configs differ in it"


def test_record_is_one_of_the_callbacks_that_fit_adds() -> None:
    from mmdiff.cli import DEFAULT_CALLBACKS

    assert RunRecord in DEFAULT_CALLBACKS
