"""Evaluation: intervals against closed values, readers on separable toys, reports against a hand count."""

import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmdiff.evaluate
from audio.files import write_audio
from audio.metrics import SpeechReader, digits, wavs
from mmdiff.__main__ import main as mmdiff_main
from mmdiff.cascade import Cascade, Clip, Stage
from mmdiff.data.clips import ClipDataset, Sample
from mmdiff.data.sources import Item
from mmdiff.evaluate import Task, balanced_prompts, evaluate, in_turns, main, score, table, wilson
from mmdiff.io import fingerprint
from mmdiff.readers import Reader, Recipe, gather, load_reader, new_reader, read, save_reader, train_reader
from mmdiff.world import MOTIONS, scene
from video.metrics import ClipReader, contact_sheets, sprites
from video.render import render

HUES, PLACES = ("bright", "dark"), ("back", "front")


def toy_clip(hue: str, place: str, key: int) -> Tensor:
    """(3, 4, 8, 8): the level tells the hue, the brighter half in time the place."""
    x = torch.full((3, 4, 8, 8), 0.4 if hue == "bright" else -0.4)
    x[:, slice(0, 2) if place == "front" else slice(2, 4)] += 0.3
    return x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(key))


def toy_item(number: int, split: str) -> Item:
    meta = {"hue": HUES[number % 2], "place": PLACES[number // 2 % 2], "number": number}
    key, caption = f"{split}{number}", f"{meta['hue']} {meta['place']}, {split} {number}"
    return Item(key, key, [caption], meta, Path())


def toy_decode(item: Item, rng: random.Random | None) -> Sample:
    return Sample(toy_clip(item.meta["hue"], item.meta["place"], item.meta["number"]), 8.0, 0.5)


def toy_splits(path: str = "") -> tuple[ClipDataset, ClipDataset]:
    return (
        ClipDataset([toy_item(i, "train") for i in range(64)], toy_decode, train=True),
        ClipDataset([toy_item(i, "val") for i in range(100, 124)], toy_decode),
    )


class ToyReader(Reader):
    """Reads the mean level of each half of the clip."""

    def __init__(self, answers: dict[str, list[str]]) -> None:
        super().__init__(answers)
        self.net = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, sum(self.sizes)))

    def reduce(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (2, -1)).mean(dim=(1, 3, 4, 5))

    def augment(self, kept: Tensor, generator: torch.Generator) -> Tensor:
        return kept + 0.02 * torch.randn(kept.shape, generator=generator)

    def forward(self, kept: Tensor) -> Tensor:
        return self.net(kept)


def no_show(folder: Path, clip: Clip, titles: list[str]) -> None:
    (folder / "titles.json").write_text(json.dumps([clip.data.shape[0], titles]))


def toy_task(path: Path = Path()) -> Task:
    return Task(
        about="a toy", data=str(path), pipeline=path, splits=toy_splits, attributes=("hue", "place"),
        turns=(("hue",), ("place",)), reader=ToyReader, recipe=Recipe(epochs=40, batch_size=16, lr=0.03), show=no_show,
    )  # fmt: skip


@dataclass(frozen=True)
class Draw(Stage):
    """Makes what `clip_of` makes of each caption and of noise of the clip's shape."""

    clip_of: Callable[[str, Tensor], Tensor]
    steps: int = 3
    guidance: float = 1.0

    def needs(self, shape: tuple[int, ...], rate: float) -> None:
        return None

    def __call__(self, prompt: Any, start: Any = None, *, shape: Any, rate: float, noise: Any, negative: Any = None,
                 progress: Any = None) -> Clip:  # fmt: skip
        eps = noise(torch.empty(len(prompt["caption"]), *shape))
        progress(self.steps, self.steps)
        return Clip(torch.stack([self.clip_of(c, e) for c, e in zip(prompt["caption"], eps, strict=True)]), rate)


def cascade_of(clip_of: Callable[[str, Tensor], Tensor], rate: float = 8.0) -> Cascade:
    return Cascade({"base": Draw(clip_of)}, (3, 4, 8, 8), rate)


def obedient(caption: str, eps: Tensor) -> Tensor:
    hue, place = caption.split(",")[0].split()
    return toy_clip(hue, place, int(eps[0, 0, 0, 0].abs() * 1e6))


def toy_report(clip_of: Callable[[str, Tensor], Tensor], **settings: Any) -> dict[str, Any]:
    given = {"count": 24, "seed": 0, "batch_size": 7, **settings}
    return evaluate(toy_task(), cascade_of(clip_of), toy_splits(), **given)


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
    clip = first["clips"][3]
    assert titles[3] == f"prompted {' '.join(clip['prompted'].values())}\nread {' '.join(clip['read'].values())}"


def test_table_shows_every_number() -> None:
    report = toy_report(obedient, protocol={"eval": "toy", "steps": 3})
    text = table(report)
    for words in ("both", "100.0 % [86.2, 100.0] 24/24", "25.0 %", "eval toy", "steps 3", "seed 0"):
        assert words in text
    assert report["protocol"]["reader"] in text


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


# -- readers


def test_training_is_a_function_of_the_seed() -> None:
    labels = [{"hue": item.meta["hue"], "place": item.meta["place"]} for item in toy_splits()[0].items]

    def trained(seed: int) -> str:
        torch.randn(3)  # what else was drawn must not matter
        reader = new_reader(ToyReader, labels, seed)
        kept, found, _ = gather(reader, toy_splits()[0], "clips")
        assert found == labels
        return fingerprint(train_reader(reader, kept, labels, Recipe(2, 16), seed))

    assert trained(0) == trained(0) != trained(1)


def test_a_reader_needs_a_choice() -> None:
    with pytest.raises(ValueError, match="'hue' has the values \\['dark'\\]"):
        ToyReader({"hue": ["dark"]})


def world_clips(count: int, seed: int) -> tuple[Tensor, list[dict[str, str]]]:
    scenes = [scene(i, seed) for i in range(count)]
    clips = torch.stack([render(one, frames=8, size=(32, 32), fps=4) for one in scenes])
    return clips, [{"motion": one.motion, "shape": one.shape} for one in scenes]


def test_video_reader_learns_motion_from_few_scenes() -> None:
    clips, labels = world_clips(160, 0)
    labels = [{"motion": label["motion"], "upright": str(MOTIONS[label["motion"]][0] == 0)} for label in labels]
    reader = new_reader(ClipReader, labels[:128], 0)
    train_reader(reader, reader.reduce(clips[:128]), labels[:128], Recipe(8, 16), 0)
    assert score(labels[128:], read(reader, reader.reduce(clips[128:])))["both"]["accuracy"] > 0.8


def tones(count: int) -> tuple[Tensor, list[dict[str, str]]]:
    """Tones of 300 or 1200 Hz, once or twice, after a random silence."""
    rng, clips, labels = random.Random(0), [], []
    time_s = torch.arange(8192) / 8000
    for i in range(count):
        pitch, beeps, start = (300, 1200)[i % 2], i // 2 % 2 + 1, rng.random() * 0.1
        sounding = sum((time_s >= start + 0.4 * k) & (time_s < start + 0.4 * k + 0.2) for k in range(beeps))
        clips.append(0.5 * torch.sin(6.2832 * pitch * rng.uniform(0.9, 1.1) * time_s) * sounding)
        labels.append({"pitch": str(pitch), "beeps": str(beeps)})
    return torch.stack(clips)[:, None], labels


def test_audio_reader_learns_pitch_and_count_from_few_tones() -> None:
    clips, labels = tones(96)
    reader = new_reader(SpeechReader, labels[:64], 0)
    train_reader(reader, reader.reduce(clips[:64]), labels[:64], Recipe(6, 8), 0)
    assert score(labels[64:], read(reader, reader.reduce(clips[64:])))["both"]["accuracy"] > 0.8


@pytest.mark.parametrize(
    ("kind", "shape"), [(ClipReader, (2, 3, 16, 64, 64)), (ClipReader, (1, 3, 7, 20, 36)), (SpeechReader, (2, 1, 8192)),
                        (SpeechReader, (1, 1, 8001))]
)  # fmt: skip
def test_readers_take_clips_of_any_length_and_keep_shapes(kind: type[Reader], shape: tuple[int, ...]) -> None:
    reader = kind({"a": ["0", "1"], "b": ["0", "1", "2"]}).eval()
    kept = reader.reduce(torch.rand(shape) - 0.5)
    varied = reader.augment(kept, torch.Generator().manual_seed(0))
    assert varied.shape == kept.shape
    assert not torch.equal(varied, kept)
    assert torch.equal(varied, reader.augment(kept, torch.Generator().manual_seed(0)))
    assert reader(kept).shape == (shape[0], 5)
    with pytest.raises(ValueError, match="clips have shape"):
        reader.reduce(torch.zeros(2, 2))


@pytest.mark.parametrize("kind", [ClipReader, SpeechReader])
def test_saved_readers_read_the_same(kind: type[Reader], tmp_path: Path) -> None:
    answers = {"digit": ["0", "1"], "way": ["left", "off"]}  # words that YAML might take for numbers and truths
    reader = new_reader(kind, [{"digit": "0", "way": "left"}, {"digit": "1", "way": "off"}], 3)
    save_reader(reader, tmp_path / "reader")
    loaded = load_reader(kind, tmp_path / "reader", answers)
    assert fingerprint(loaded) == fingerprint(reader)
    assert sorted(file.suffix for file in (tmp_path / "reader").iterdir()) == [".json", ".safetensors", ".yaml"]
    with pytest.raises(ValueError, match="give another folder"):
        load_reader(kind, tmp_path / "reader", {"digit": ["0", "1"]})
    with pytest.raises(ValueError, match="give another folder"):
        load_reader(SpeechReader if kind is ClipReader else ClipReader, tmp_path / "reader", answers)


def test_a_cached_reader_is_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = toy_report(obedient, reader_folder=tmp_path / "reader")
    monkeypatch.setattr(mmdiff.evaluate, "train_reader", None)
    second = toy_report(obedient, reader_folder=tmp_path / "reader")
    assert second["protocol"] == first["protocol"]
    assert (first["seconds"]["reader"] is None, second["seconds"]["reader"]) == (False, None)


# -- what a modality writes


def test_contact_sheet_has_a_row_for_each_clip(tmp_path: Path) -> None:
    from PIL import Image

    clips, _ = world_clips(3, 0)
    contact_sheets(tmp_path, Clip(clips, 4.0), ["prompted a\nread b"] * 3)
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.size == (190 + 8 * 98, 3 * 98)
        assert len(picture.getcolors(maxcolors=1 << 20)) > 5


def test_wavs_are_named_by_what_was_prompted_and_read(tmp_path: Path) -> None:
    wavs(tmp_path, Clip(torch.rand(2, 1, 800), 8000.0), ["prompted 3 theo\nread 5 theo"] * 2)
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"0{i}-prompted-3-theo-read-5-theo.wav" for i in (0, 1)]


# -- the command


@dataclass(frozen=True)
class Entry:
    """Stands for an installed entry point."""

    name: str
    value: str
    task: Callable[[], Task]

    def load(self) -> Callable[[], Task]:
        return self.task


def install(monkeypatch: pytest.MonkeyPatch, *entries: Entry) -> None:
    monkeypatch.setattr(mmdiff.evaluate, "entry_points", lambda group: entries if group == "mmdiff.evals" else ())


def test_the_command_from_options_to_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = pytest.importorskip("mmdiff.pipeline")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes(b"weights")
    install(monkeypatch, Entry("toy", "toy:task", lambda: toy_task(tmp_path)))
    monkeypatch.setattr(pipeline, "load_pipeline", lambda folder: cascade_of(obedient))
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
    train, val = task.splits(str(tmp_path))
    assert (len(train), len(val)) == (12, 6)
    assert tuple(val[0]["x"].shape) == (1, 8192)
    prompts = balanced_prompts(task, val, 6, 0)
    assert [prompt.labels["digit"] for prompt in prompts] == ["0", "1", "2", "0", "1", "2"]
    assert len({prompt.caption for prompt in prompts}) == 6
