"""scripts/prepare: from an original source to the same shards."""

import hashlib
import importlib.util
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from audio.files import read_audio
from mmdiff.data.rebuild import read_plan, rebuild
from video.files import VideoReader

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts" / "prepare"
SETS = {"digits": "fsdd", "sounds": "esc10", "sprites": "lpc_sprites", "faces": "grid_av"}


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def members(shard: Path, count: int | None = None) -> dict[str, bytes]:
    with tarfile.open(shard) as archive:
        names = archive.getnames()[: None if count is None else 2 * count]
        return {name: archive.extractfile(name).read() for name in names}  # type: ignore[union-attr]


def real(shared_data: Path, name: str, split: str, count: int) -> dict[str, Any]:
    """Key -> JSON of the first clips of the set in shared/data."""
    found = members(shared_data / SETS[name] / f"{split}-000000.tar", count)
    return {key.removesuffix(".json"): json.loads(data) for key, data in found.items() if key.endswith(".json")}


@pytest.mark.parametrize("name", SETS)
def test_plans_name_the_clips_of_the_sets_in_their_order(name: str, shared_data: Path) -> None:
    plan = read_plan(SCRIPTS / f"{name}.txt")
    for split in ("train", "val"):
        lines = (shared_data / SETS[name] / f"{split}.jsonl").read_text().splitlines()
        assert [line[1] for line in plan if line[0] == split] == [json.loads(line)["key"] for line in lines]


def test_digits_give_the_same_shard_byte_for_byte(shared_data: Path, tmp_path: Path) -> None:
    (tmp_path / "clone" / "recordings").mkdir(parents=True)
    shard = shared_data / "fsdd" / "val-000000.tar"
    for name, data in members(shard).items():
        if name.endswith(".flac"):
            samples, rate = soundfile.read(io.BytesIO(data), dtype="int16")
            path = tmp_path / "clone" / "recordings" / f"{name.removesuffix('.flac')}.wav"
            soundfile.write(path, samples, rate, subtype="PCM_16")
    plan = [line for line in read_plan(SCRIPTS / "digits.txt") if line[0] == "val"]
    (made,) = rebuild(plan, tmp_path / "clone", tmp_path / "out", script("digits").make, shard_clips=3000)
    assert members(made) == members(shard)
    assert hashlib.sha256(made.read_bytes()).digest() == hashlib.sha256(shard.read_bytes()).digest()
    assert (tmp_path / "out" / "val.jsonl").read_text() == (shared_data / "fsdd" / "val.jsonl").read_text()


def test_sounds_are_resampled_padded_and_credited(shared_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("soxr")
    expected = real(shared_data, "sounds", "val", 3)
    time = np.arange(int(4.5 * 44100)) / 44100
    for number, told in enumerate(expected.values()):
        folder = tmp_path / "clone" / f"00{number} - {told['source_file'].split('/')[0]}"
        folder.mkdir(parents=True)
        level = 1.05 if number == 0 else 0.3
        tone = level * np.sin(2 * np.pi * 440 * time) * (time < 2)
        soundfile.write(folder / told["source_file"].split("/")[1], tone, 44100, format="OGG", subtype="VORBIS")
    lines = [
        f"- **[{t['source_file'].split('/')[1]}](https://x/y%20z.ogg)**:   clip derived from [{t['freesound_title']}]"
        f"({t['freesound_url']}) by *{t['freesound_user']}* ([{t['licence']}]({t['licence_url']}))"
        for t in expected.values()
    ]
    (tmp_path / "clone" / "README.md").write_text("# ESC-10\n\n" + "\n".join(lines))
    plan = [("val", key) for key in expected]
    (made,) = rebuild(plan, tmp_path / "clone", tmp_path / "out", script("sounds").make, shard_clips=1000)
    found = members(made)
    for number, (key, told) in enumerate(expected.items()):
        mine = json.loads(found[f"{key}.json"])
        assert list(mine) == list(told)
        measured = ("sounding_until", "gain")
        assert {k: v for k, v in mine.items() if k not in measured} == {
            k: v for k, v in told.items() if k not in measured
        }
        assert mine["sounding_until"] == pytest.approx(2, abs=0.05)
        waveform, rate = read_audio(found[f"{key}.flac"])
        assert (tuple(waveform.shape), rate) == ((1, 80000), 16000)
        assert float(waveform.abs().max()) == pytest.approx(0.999 if number == 0 else 0.3, abs=0.03)
        assert (mine["gain"] < 1) == (number == 0)
        assert waveform[:, 4 * 16000 :].abs().max() < 0.01


def sheets(folder: Path) -> None:
    """Every cell of a body is grey by its row and column; trousers and the rest are see-through but for one block."""
    for name, count in (("body", 7), ("bottomwear", 7), ("topwear", 7), ("hair", 10), ("shoes", 3)):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            sheet = np.zeros((21 * 64, 13 * 64, 4), dtype=np.uint8)
            if name == "body":
                for row in range(21):
                    for column in range(13):
                        cell = sheet[row * 64 : row * 64 + 64, column * 64 : column * 64 + 64]
                        cell[8:56, 8:56] = (row * 10 + 20, column * 16 + 20, 128, 255)
            else:
                place = {"bottomwear": 8, "topwear": 18, "hair": 28, "shoes": 38}[name]
                for row in range(21):
                    sheet[row * 64 + place : row * 64 + place + 8, 8::64] = (255, number * 20, 0, 255)
            Image.fromarray(sheet).save(folder / name / f"{number}.png")


def test_sprites_are_drawn_and_captioned_as_in_the_set(shared_data: Path, tmp_path: Path) -> None:
    sprites = script("sprites")
    sheets(tmp_path)
    expected = real(shared_data, "sprites", "val", 300)
    plan = {line[1]: line for line in read_plan(SCRIPTS / "sprites.txt")}
    for key, told in expected.items():
        labels = dict(zip((*sprites.LAYERS, "action", "direction"), map(int, plan[key][2:9]), strict=True))
        assert labels == told["labels"]
        assert sprites.captions_of(labels, plan[key][9]) == told["captions"]
    actions = {told["action"]: key for key, told in expected.items()}
    assert len(actions) == 6
    for name, key in actions.items():
        media, suffix, told = sprites.make(tmp_path, plan[key])
        assert suffix == ".mp4"
        assert told == expected[key]
        assert list(told) == list(expected[key])
        with VideoReader(media) as reader:
            pixels = reader.read(range(len(reader))).numpy()  # (3, 16, 64, 64)
            assert (pixels.shape, reader.fps) == ((3, 16, 64, 64), 8)
        _, first, columns, _ = next(action for action in sprites.ACTIONS if action[0] == name)
        row = first if name == "hurt" else first + told["labels"]["direction"]
        np.testing.assert_allclose(pixels[0, :, 50, 30], row * 10 + 20, atol=3)
        np.testing.assert_allclose(pixels[1, :, 50, 30], [column * 16 + 20 for column in columns], atol=3)
        np.testing.assert_allclose(pixels[:, 0, 2, 2], sprites.BACKGROUNDS[told["background"]], atol=2)
        assert pixels[0, 0, 10, 8] > 250  # a layer above the body


def test_backgrounds_are_those_of_the_set(shared_data: Path, tmp_path: Path) -> None:
    sprites = script("sprites")
    sheets(tmp_path)
    clips = members(shared_data / "lpc_sprites" / "val-000000.tar", 30)
    plan = {line[1]: line for line in read_plan(SCRIPTS / "sprites.txt")}
    for name in [name.removesuffix(".mp4") for name in clips if name.endswith(".mp4")]:
        corners = []
        for media in (clips[f"{name}.mp4"], sprites.make(tmp_path, plan[name])[0]):
            with VideoReader(media) as reader:
                corners.append(reader.read([0])[:, 0, 0, 0].tolist())
        assert corners[0] == corners[1], plan[name][-1]


def grid_clip(path: Path, frames: int = 75) -> None:
    """360x288 MPEG-1 at 25 fps with MP2 sound, as the corpus has it: a bright block in the window, a tone of 1 s."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="mpeg") as container:
        video = container.add_stream("mpeg1video", rate=25)
        video.width, video.height, video.pix_fmt, video.bit_rate = 360, 288, "yuv420p", 2_000_000
        audio = container.add_stream("mp2", rate=44100, layout="mono")
        for number in range(frames):
            picture = np.full((288, 360, 3), 40, dtype=np.uint8)
            picture[100:200, 100:200] = 80 + number
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode(None))
        tone = (8000 * np.sin(2 * np.pi * 500 * np.arange(44100) / 44100)).astype(np.int16)[None]
        frame = av.AudioFrame.from_ndarray(tone, format="s16", layout="mono")
        frame.sample_rate = 44100
        container.mux(audio.encode(frame))
        container.mux(audio.encode(None))


def test_faces_are_cut_out_with_their_words_and_sound(shared_data: Path, tmp_path: Path) -> None:
    (key, told), *_ = real(shared_data, "faces", "val", 1).items()
    clone = tmp_path / "clone"
    grid_clip(clone / "data" / "s1" / f"{key}.mpg")
    align = clone / "data" / "alignments" / "s1" / f"{key}.align"
    align.parent.mkdir(parents=True)
    rows = [f"{round(a * 25000)} {round(b * 25000)} {word}" for a, b, word in told["words"]]
    align.write_text("\n".join(["0 10000 sil", *rows, "60000 74500 sil"]) + "\n")
    line = next(line for line in read_plan(SCRIPTS / "faces.txt") if line[1] == key)
    (made,) = rebuild([line], clone, tmp_path / "out", script("faces").make, shard_clips=1000)
    found = members(made)
    mine = json.loads(found[f"{key}.json"])
    assert mine == told
    assert list(mine) == list(told)
    with VideoReader(found[f"{key}.mp4"]) as reader:
        pixels = reader.read(range(len(reader)))
        assert (tuple(pixels.shape), reader.fps) == ((3, 75, 96, 96), 25)
    left, top = (int(number) for number in line[2:])
    scale = 96 / 240
    row, column = round((150 - top) * scale), round((150 - left) * scale)
    assert abs(int(pixels[0, 0, row, column]) - 80) < 6
    assert abs(int(pixels[0, 74, row, column]) - 154) < 8
    assert abs(int(pixels[0, 0, row, round((90 - left) * scale)]) - 40) < 8
    sound, rate = read_audio(found[f"{key}.mp4"])
    assert rate == 16000
    assert sound[:, 1600:12000].abs().max() == pytest.approx(8000 / 32768, rel=0.1)
    assert sound[:, 20000:].abs().max() < 0.01


@pytest.mark.parametrize("name", SETS)
def test_a_wrong_source_ends_in_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source in ("empty", "missing"):
        command = [sys.executable, str(SCRIPTS / f"{name}.py"), str(tmp_path / source), str(tmp_path / "out")]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == 2
        error = done.stderr.strip().splitlines()[-1]
        assert error.startswith(f"mmdiff prepare {name}: error: ")
        assert str(tmp_path / source) in error
        assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out/*"))
