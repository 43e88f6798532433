"""benchmarks/pipelines.py on toys: a pipeline that obeys and is as varied as real clips, and one that does neither."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import pipelines
from mmdiff.cascade import Clip
from mmdiff.tasks import Task
from tests.toy_task import Entry, toy_clip, toy_task


class Toy:
    """Stands for a cascade."""

    shape, rate = (3, 4, 8, 8), 8.0

    def __init__(self, clip_of: Callable[[str, int], Tensor]) -> None:
        self.clip_of = clip_of

    def __call__(self, prompt: Any, noise: Any) -> Clip:
        keys = noise(torch.empty(len(prompt["caption"]), 1)).abs().mul(1e6).long().flatten().tolist()
        return Clip(torch.stack([self.clip_of(c, k) for c, k in zip(prompt["caption"], keys, strict=True)]), 8.0)


def obedient(caption: str, key: int) -> Tensor:
    hue, place = caption.split(",")[0].split()
    return toy_clip(hue, place, key)


def deaf(caption: str, key: int) -> Tensor:
    return 0.3 * toy_clip("bright", "front", 0)


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: str) -> list[list[str]]:
    task: Task = toy_task()
    monkeypatch.setattr(pipelines.evaluate, "entry_points", lambda group: (Entry("toy", "toy:task", lambda: task),))
    monkeypatch.setattr(pipelines, "load_pipeline", lambda folder: Toy(obedient if folder.name == "good" else deaf))
    assert pipelines.main(["toy", *args]) == 0
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]


def test_the_table_tells_an_obedient_pipeline_from_a_deaf_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "table.md"
    head, _, real, good, bad = run(monkeypatch, capsys, "good", "bad", "--count", "24", "--out", str(out))
    assert head == ["pipeline", "hue %", "place %", "both %", "Frechet distance", "s/clip"]
    assert [row[0] for row in (real, good, bad)] == ["real", "good", "bad"]
    assert [cell.split(" ")[0] for cell in good[1:4]] == ["100", "100", "100"]
    assert [cell.split(" ")[0] for cell in bad[1:4]] == ["50", "50", "25"]
    assert float(bad[4]) > 10 * float(good[4])
    assert float(good[4]) < 3 * float(real[4])
    assert out.read_text("utf-8").splitlines()[0].startswith("| pipeline | hue %")


def test_a_count_beyond_the_real_clips_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="--count 25 is more than the 24 real clips"):
        run(monkeypatch, capsys, "good", "--count", "25")
