"""Readers on separable toys, scenes and tones: what they learn, from the seed alone, and what is saved of them."""

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mmdiff.evaluate
from audio.metrics import SpeechReader
from mmdiff.accuracy import score
from mmdiff.io import fingerprint
from mmdiff.readers import Reader, Recipe, gather, load_reader, new_reader, read, save_reader, train_reader
from mmdiff.world import MOTIONS, scene
from tests.toy_task import ToyReader, obedient, toy_report, toy_splits
from video.clip_reader import ClipReader
from video.render import render


def test_training_is_a_function_of_the_seed() -> None:
    labels = [{"hue": item.meta["hue"], "place": item.meta["place"]} for item in toy_splits()[0].items]

    def trained(seed: int) -> str:
        torch.randn(3)  # what else was drawn must not matter
        reader = new_reader(ToyReader, labels, seed)
        found = gather(reader, toy_splits()[0], "clips")
        assert (found.labels, found.rate, found.places) == (labels, 8.0, list(range(64)))
        return fingerprint(train_reader(reader, found.kept, labels, Recipe(2, 16), seed))

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
