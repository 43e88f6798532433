"""Evaluation: intervals against closed values, reports against a hand count, the command from options to report."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from audio.files import write_audio
from audio.metrics import digits, wavs
from mmdiff.__main__ import main as mmdiff_main
from mmdiff.accuracy import score, wilson
from mmdiff.cascade import Cascade, Clip
from mmdiff.data.clips import ClipDataset
from mmdiff.data.sources import Item
from mmdiff.distance import Extractor
from mmdiff.eval_report import table
from mmdiff.evaluate import evaluate, main
from mmdiff.tasks import Task, balanced_prompts, in_turns
from tests.toy_task import (
    HUES,
    PLACES,
    Entry,
    cascade_of,
    install,
    obedient,
    toy_clip,
    toy_decode,
    toy_item,
    toy_report,
    toy_splits,
    toy_task,
)
from video.metrics import scenes, sprites
from video.render import render
from video.sheets import contact_sheets

# -- intervals, prompts, scores


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [  # z^2 / (n + z^2) for none right; the others from Newcombe 1998, table I, and by hand
        (0, 10, 0.0, 3.841459 / 13.841459),
        (10, 10, 10 / 13.841459, 1.0),
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (50, 100, 0.4038, 0.5962),
    ],
)
def test_wilson_interval_has_the_published_values(right: int, count: int, low: float, high: float) -> None:
    assert wilson(right, count) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(("right", "count"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_refuses_what_is_no_share(right: int, count: int) -> None:
    with pytest.raises(ValueError, match=f"right={right} of count={count}"):
        wilson(right, count)


def test_prompts_take_turns_in_the_first_part_and_then_in_the_next() -> None:
    keys = [(digit, speaker) for speaker in "abcdef" for digit in range(10) for _ in range(2)]
    chosen = [keys[i] for i in in_turns(keys, 60)]
    assert [digit for digit, _ in chosen[:10]] == list(range(10))
    assert Counter(digit for digit, _ in chosen) == dict.fromkeys(range(10), 6)
    assert Counter(speaker for _, speaker in chosen) == dict.fromkeys("abcdef", 10)
    assert len(set(chosen)) == 60
    speakers = Counter(speaker for _, speaker in chosen[:30])
    assert max(speakers.values()) - min(speakers.values()) <= 2  # a short list is about balanced too


def test_prompts_run_through_all_clips_before_one_comes_again() -> None:
    keys = [("a",)] * 4 + [("b",)] * 4
    assert sorted(in_turns(keys, 8)) == list(range(8))
    assert in_turns(keys, 10)[8:] == in_turns(keys, 2)
    uneven = [("a",)] * 5 + [("b",)]
    assert Counter(uneven[i][0] for i in in_turns(uneven, 10)) == {"a": 5, "b": 5}


def test_prompts_are_default_captions_with_seeds_of_their_own() -> None:
    _, val = toy_splits()
    first, second = balanced_prompts(toy_task(), val, 8, 0), balanced_prompts(toy_task(), val, 8, 1)
    assert [p.caption for p in first] == [p.caption for p in second]
    assert not {p.seed for p in first} & {p.seed for p in second}
    assert all(p.caption.startswith(f"{p.labels['hue']} {p.labels['place']}") for p in first)
    assert Counter(tuple(p.labels.values()) for p in first) == dict.fromkeys([(h, p) for h in HUES for p in PLACES], 2)


def test_score_counts_by_hand() -> None:
    wanted = [{"a": "x", "b": "1"}, {"a": "x", "b": "2"}, {"a": "y", "b": "1"}, {"a": "x", "b": "1"}]
    found = [{"a": "x", "b": "1"}, {"a": "x", "b": "1"}, {"a": "x", "b": "1"}, {"a": "y", "b": "2"}]
    rows = score(wanted, found)
    assert {name: (row["right"], row["count"], row["chance"]) for name, row in rows.items()} == {
        "a": (2, 4, 0.75),
        "b": (2, 4, 0.75),
        "both": (1, 4, 0.5),
    }
    assert rows["both"]["interval"] == wilson(1, 4)
    assert list(score([{"a": "x"}], [{"a": "x"}])) == ["a"]


# -- the report


def test_report_of_an_obedient_cascade_equals_its_ceiling() -> None:
    report = toy_report(obedient)
    for rows in (report["generated"], report["real"]):
        assert {name: (row["right"], row["count"]) for name, row in rows.items()} == dict.fromkeys(
            ("hue", "place", "both"), (24, 24)
        )


def test_report_of_noise_is_about_chance_and_equals_a_hand_count() -> None:
    report = toy_report(lambda caption, eps: eps, count=60)
    both = report["generated"]["both"]
    by_hand = sum(clip["prompted"] == clip["read"] for clip in report["clips"])
    assert both["right"] == by_hand
    assert both["chance"] == 0.25
    assert both["interval"][0] < 0.3
    assert report["real"]["both"]["accuracy"] == 1


def test_report_of_a_cascade_that_obeys_half_of_the_prompt() -> None:
    report = toy_report(lambda caption, eps: obedient(f"{caption.split()[0]} front,", eps))
    generated = report["generated"]
    assert (generated["hue"]["right"], generated["place"]["right"], generated["both"]["right"]) == (24, 12, 12)


def test_report_depends_on_the_seed_and_not_on_the_batch_size(tmp_path: Path) -> None:
    noise = lambda caption, eps: eps
    first = toy_report(noise, out=tmp_path)
    assert toy_report(noise, batch_size=24)["clips"] == first["clips"]
    assert toy_report(noise, seed=1)["clips"] != first["clips"]
    assert json.loads((tmp_path / "report.json").read_text())["clips"] == first["clips"]
    shown, titles = json.loads((tmp_path / "titles.json").read_text())
    assert shown == len(titles) == 12
    wanted, found = ([*first["clips"][3][key].values()] for key in ("prompted", "read"))
    assert titles[3] == "\n".join(a if a == b else f"{a}, read {b}" for a, b in zip(wanted, found, strict=True))
    assert any(", read " in title for title in titles)


def test_table_shows_every_number() -> None:
    report = toy_report(obedient, protocol={"eval": "toy", "steps": 3})
    text = table(report)
    for words in ("both", "100.0 % [86.2, 100.0] 24/24", "25.0 %", "eval toy", "steps 3", "seed 0"):
        assert words in text
    assert report["protocol"]["reader"] in text


def memory(caption: str, eps: Tensor) -> Tensor:
    """What a cascade makes that has learnt its training clips by heart: the first that fits."""
    hue, place = caption.split(",")[0].split()
    return toy_clip(hue, place, next(i for i in range(64) if (HUES[i % 2], PLACES[i // 2 % 2]) == (hue, place)))


class Corners(Extractor):
    """Two numbers of a clip that are not the reader's."""

    @property
    def protocol(self) -> str:
        return "corners"

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x[:, 0, 0, 0, 0], x[:, 1, -1, -1, -1]], dim=1)


def wide_splits() -> tuple[ClipDataset, ClipDataset]:
    """With validation clips enough for distances, told apart by the parity of their pairs."""
    train, _ = toy_splits()
    items = [replace(item, meta={**item.meta, "half": "ab"[item.meta["number"] // 4 % 2]}) for item in
             (toy_item(i, "val") for i in range(100, 148))]  # fmt: skip
    return train, ClipDataset(items, toy_decode)


def test_distances_are_named_by_their_features_and_small_for_obedient_clips() -> None:
    def found(clip_of: Callable[[str, Tensor], Tensor], extractor: Extractor | None = None) -> list[dict[str, Any]]:
        report = evaluate(toy_task(), cascade_of(clip_of), wide_splits(), count=40, seed=0, batch_size=8,
                          extractor=extractor)  # fmt: skip
        assert all(line in table(report) for line in report["lines"])
        return report["distances"]

    frechet, kernel = found(obedient)
    assert (frechet["name"], kernel["name"]) == ("frechet", "kernel")
    assert tuple(frechet["counts"]) == (40, 48)
    assert frechet["low"] < frechet["value"] < frechet["high"]
    for words in ("features of ToyReader", "2 of them", "4x8x8 at 8 steps/s", "seed 0"):
        assert words in frechet["protocol"]
    assert found(lambda caption, eps: obedient("dark front,", eps))[0]["value"] > 5 * frechet["high"]
    assert found(obedient, Corners())[0]["protocol"].startswith("corners, 2 of them")
    assert toy_report(obedient)["distances"] == []  # of 24 clips there is no interval


def test_clips_known_by_heart_are_told_and_shown_beside_their_originals(tmp_path: Path) -> None:
    report = toy_report(memory, out=tmp_path)
    near = report["memorised"]
    assert (near["near"], near["count"]) == (24, 24)
    assert {toy_splits()[0].items[k].meta["number"] for k in near["nearest"]} == {0, 1, 2, 3}
    assert "memorised: 24/24 generated clips" in table(report)
    shown, titles = json.loads((tmp_path / "nearest" / "titles.json").read_text())
    assert shown == len(titles) == 12
    assert (titles[0].split()[0], titles[1].split("\n")[0]) == ("generated", "nearest training clip")
    assert toy_report(obedient)["memorised"]["near"] < 8


def test_scores_are_told_apart_and_measured_readings_take_the_reader_s_place() -> None:
    def all_bright(clips: Tensor, rate: float) -> list[dict[str, str]]:
        assert rate == 8.0
        return [{"hue": "bright"} for _ in clips]

    task = replace(toy_task(), apart="half", turns=(("half",), ("hue",)), measured=all_bright,
                   measures={"level": lambda x: x.mean((1, 2, 3, 4))})  # fmt: skip
    report = evaluate(task, cascade_of(obedient), wide_splits(), count=12, seed=0, batch_size=5)
    assert list(report["parts"]) == ["a", "b"]
    for part in ("a", "b"):
        rows = report["parts"][part]
        assert (rows["generated"]["hue"]["right"], rows["generated"]["hue"]["count"]) == (3, 6)
        assert (rows["real"]["hue"]["count"], rows["real"]["place"]["right"]) == (24, 0)
    assert report["generated"]["both"]["right"] == 0
    level = report["measures"]["generated"]["level"]
    assert level["count"] == 12
    assert level["mean"] == pytest.approx(0.15, abs=0.02)  # of bright and dark by turns, and half a clip 0.3 brighter
    text = table(report)
    for words in ("generated, a", "generated, b", "level: generated 0.1", " of 12, real "):
        assert words in text


@pytest.mark.parametrize(
    ("cascade", "message"),
    [
        (cascade_of(obedient, rate=4.0), "makes 4.0 steps per second, the real clips have 8.0"),
        (cascade_of(lambda caption, eps: eps / 0), "is not finite"),
    ],
)
def test_clips_that_cannot_be_judged_are_refused(cascade: Cascade, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(toy_task(), cascade, toy_splits(), count=2, seed=0, batch_size=2)


def test_clips_without_labels_are_refused() -> None:
    items = [Item("a", "a", ["a caption"], {"hue": "dark"}, Path())]
    with pytest.raises(ValueError, match="no 'place', only hue"):
        balanced_prompts(toy_task(), ClipDataset(items, toy_decode), 1, 0)


# -- what a modality writes


def test_contact_sheet_has_a_row_for_each_clip(tmp_path: Path) -> None:
    from PIL import Image

    clips = torch.stack([render(one, 8, (32, 32), 4) for _, one in scenes(range(3), "seen", (3, 8), 4.0)])
    contact_sheets(tmp_path, Clip(clips, 4.0), ["prompted a\nread b"] * 3)
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.size == (190 + 8 * 98, 3 * 98)
        assert len(picture.getcolors(maxcolors=1 << 20)) > 5


def test_wavs_are_named_by_what_was_prompted_and_read(tmp_path: Path) -> None:
    wavs(tmp_path, Clip(torch.rand(2, 1, 800), 8000.0), ["prompted 3 theo\nread 5 theo"] * 2)
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"0{i}-prompted-3-theo-read-5-theo.wav" for i in (0, 1)]


# -- the command


def test_the_command_from_options_to_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = pytest.importorskip("mmdiff.pipeline")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes(b"weights")
    install(monkeypatch, Entry("toy", "toy:task", lambda: toy_task(tmp_path)))
    monkeypatch.setattr(pipeline, "load_pipeline", lambda folder, trusted: cascade_of(obedient))
    out = tmp_path / "out"
    assert main(["toy", "--count", "6", "--steps", "9", "--guidance", "1.5", "--seed", "2", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    assert table(report) in printed
    protocol = report["protocol"]
    assert (protocol["steps"], protocol["guidance"], protocol["seed"], len(protocol["pipeline"])) == (9, 1.5, 2, 12)
    assert [clip["seed"] for clip in report["clips"]] == [2_000_000 + i for i in range(6)]


def test_the_command_lists_evaluations(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    install(monkeypatch, Entry("toy", "toy:task", toy_task))
    assert main(["--help"]) == 0
    assert "toy:task" in capsys.readouterr().out
    with pytest.raises(ValueError, match="'nonsense' is not an evaluation; there are toy"):
        main(["nonsense"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data", "no/such/folder"], "--data no/such/folder does not exist"),
        (["--count", "0"], "--count 0 is below 1"),
        (["--steps", "0"], "--steps 0 is below 1"),
        (["--seed", "-1"], "--seed -1 is below 0"),
        (["--batch-size", "0"], "--batch-size 0 is below 1"),
        (["--guidance", "nan"], "--guidance nan is outside 0..100"),
    ],
)
@pytest.mark.parametrize("task", [sprites, digits])
def test_wrong_values_give_one_line(
    args: list[str], message: str, task: Callable[[], Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    install(monkeypatch, Entry("real", "real:task", task))
    command = EntryPoint("eval", "mmdiff.evaluate:main", "mmdiff.commands")
    monkeypatch.setattr("mmdiff.__main__.entry_points", lambda group, name: [command] if name == "eval" else [])
    data = args if "--data" in args else ["--data", str(tmp_path), *args]
    assert mmdiff_main(["eval", "real", *data]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert len(printed.err.strip().splitlines()) == 1
    assert not printed.out


def test_real_tasks_prompt_in_turns_from_a_folder_of_media(tmp_path: Path) -> None:
    for split, takes in (("train", 2), ("val", 1)):
        (tmp_path / split).mkdir()
        for digit, speaker, take in ((d, s, t) for d in range(3) for s in ("ann", "bob") for t in range(takes)):
            stem = tmp_path / split / f"{digit}_{speaker}_{take}"
            write_audio(stem.with_suffix(".wav"), 0.1 * torch.rand(1, 4000), 8000)
            record = {"caption": f"the digit {digit} spoken by {speaker}", "digit": digit, "speaker": speaker}
            stem.with_suffix(".json").write_text(json.dumps(record))
    task = digits()
    train, val = task.splits(str(tmp_path), (1, 8192), 8000.0)
    assert (len(train), len(val)) == (12, 6)
    assert tuple(val[0]["x"].shape) == (1, 8192)
    prompts = balanced_prompts(task, val, 6, 0)
    assert [prompt.labels["digit"] for prompt in prompts] == ["0", "1", "2", "0", "1", "2"]
    assert len({prompt.caption for prompt in prompts}) == 6
