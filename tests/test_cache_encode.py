"""`mmdiff encode`: what it makes, says and refuses, and a training from it, end to end."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from audio.files import read_audio
from mmdiff.encode import main
from mmdiff.export import main as export
from mmdiff.io import load, read_config, save
from mmdiff.model import DiffusionModel
from scripts.world_clips import main as world_clips
from video.files import read_video

from .test_text import tower

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "configs" / "tiny"
LAYERS = [TINY / f"{name}.yaml" for name in ("video", "video_latent", "video_latent_cached")]
CONFIG = "+".join(map(str, LAYERS))


def fit(*layers: Path, cwd: Path, steps: int) -> str:
    words = [word for layer in layers for word in ("-c", str(layer))]
    short = ["--trainer.max_steps", str(steps), "--trainer.val_check_interval", str(steps)]
    command = [sys.executable, "-m", "mmdiff", "fit", *words, *short]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


def test_a_tiny_autoencoder_is_trained_encodes_a_cache_and_a_diffusion_model_is_trained_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "runs" / "tiny"
    assert world_clips([str(runs / "clips"), "--count", "40", "--size", "16", "--fps", "4"]) == 0
    fit(TINY / "video_autoencoder.yaml", cwd=tmp_path, steps=10)
    export([str(runs / "autoencoder"), "--checkpoint", str(runs / "autoencoder.ckpt")])
    capsys.readouterr()
    assert main([CONFIG, "--device", "cpu"]) == 0
    said = capsys.readouterr().out.splitlines()
    made = re.fullmatch(r"runs/tiny/latents: 0 there, 40 made, 0 bad, ([\d.]+) MiB in 40 entries", said[0])
    assert made is not None, said
    entries = list((runs / "latents").glob("??/*.safetensors"))
    assert len(entries) == 40
    assert float(made[1]) == pytest.approx(sum(path.stat().st_size for path in entries) / 2**20, abs=0.06)
    assert re.fullmatch(r"made in [\d.]+ s, [\d.]+ clips/s", said[1])
    saves = re.fullmatch(
        r"an epoch of (\d+) clips reads latents in ([\d.]+) s where decoding and encoding take ([\d.]+) s: "
        r"([\d.]+) s saved",
        said[2],
    )
    assert saves is not None, said
    assert int(saves[1]) in range(30, 40)
    assert float(saves[4]) == pytest.approx(float(saves[3]) - float(saves[2]), abs=0.02)
    times = {path: path.stat().st_mtime_ns for path in entries}
    logs = fit(*LAYERS, cwd=tmp_path, steps=8)
    assert "encoding:" not in logs, "what was encoded is encoded again"
    assert {path: path.stat().st_mtime_ns for path in entries} == times
    export([str(tmp_path / "model"), "--checkpoint", str(runs / "latent.ckpt")])
    trained = load(tmp_path / "model")
    assert isinstance(trained, DiffusionModel)
    for p, q in zip(trained.autoencoder.parameters(), load(runs / "autoencoder").parameters(), strict=True):
        assert torch.equal(p, q)
    entries[0].write_bytes(entries[0].read_bytes()[:-1])
    entries[1].unlink()
    capsys.readouterr()
    assert main([CONFIG]) == 0
    assert "38 there, 2 made, 0 bad" in capsys.readouterr().out
    clip = sorted((runs / "clips").glob("*.mp4"))[3]
    clip.write_bytes(clip.read_bytes()[:300])
    with pytest.warns(UserWarning, match=f"bad item left out: {clip.name}"):
        assert main([CONFIG]) == 0
    assert re.search(r"39 there, 0 made, 1 bad \(1 [a-z ]+\)", capsys.readouterr().out)
    # another autoencoder: one line, status 2, and nothing is lost
    other = load(runs / "autoencoder")
    next(other.parameters()).data.mul_(1.5)
    save(other, read_config(runs / "autoencoder"), runs / "autoencoder")
    command = [sys.executable, str(ROOT / "scripts" / "encode.py"), CONFIG]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert re.match(r"mmdiff encode: error: runs/tiny/latents is stale: it was made with autoencoder \w+, now ", last)
    assert "Traceback" not in done.stderr


def test_captions_are_encoded_too_with_the_empty_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    world_clips(["clips", "--count", "6", "--size", "16", "--fps", "4", "--seconds", "1"])
    for index, path in enumerate(sorted(Path("clips").glob("*.txt"))):
        path.write_text(f"a red ball\n{'two dogs bark' if index % 2 else 'seven'}\n")
    (tmp_path / "t5").mkdir()
    tower(tmp_path / "t5", "t5")
    config: Any = yaml.safe_load((TINY / "video.yaml").read_text())
    encoder = {"class_path": "mmdiff.text.PretrainedText", "init_args": {"path": "t5", "max_tokens": 8}}
    model = config["model"]["init_args"]["model"]["init_args"]
    model["backbone"]["init_args"] |= {"tokens_width": 16, "vector_width": 16}
    model["conditioner"]["init_args"]["encoder"] = {
        "class_path": "mmdiff.data.cache_text.CachedText", "init_args": {"encoder": encoder, "folder": "embeddings"}
    }  # fmt: skip
    clips = {"path": "clips", "frames": 4, "size": [16, 16], "caption": "random"}
    config["data"] = {"class_path": "video.data.ClipDataModule", "init_args": clips}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    capsys.readouterr()
    assert main(["config.yaml", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.strip() == "embeddings: 1 prompts there, 3 made, the empty one among them"
    assert main(["config.yaml", "--device", "cpu"]) == 0
    assert "4 prompts there, 0 made" in capsys.readouterr().out
    assert len(list(Path("embeddings").glob("??/*.safetensors"))) == 4


@pytest.mark.parametrize(("config", "args", "message"), [
    (str(TINY / "video.yaml"), [], "caches nothing: its data is a WorldDataModule, its text encoder no CachedText"),
    (str(LAYERS[2]), [], "has no model"),
    ("nothing.yaml", [], "no such file: nothing.yaml"),
    (CONFIG, ["--device", "abacus"], "--device abacus cannot be used here"),
    (CONFIG, ["--quick"], "unrecognized arguments: --quick; --help lists the options"),
])  # fmt: skip
def test_what_cannot_be_encoded_is_one_line(
    config: str, args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        main([config, *args])
    assert "\n" not in str(caught.value)


def test_clips_of_the_world_are_files_with_captions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        world_clips([name, "--count", "3", "--seconds", "1.5", "--fps", "4", "--size", "24", "--seed", "2"])
        world_clips([f"{name}_sound", "--count", "2", "--seconds", "0.5", "--sound", "8000"])
    for path in (*Path("a").iterdir(), *Path("a_sound").iterdir()):
        other = Path(path.parent.name.replace("a", "b", 1)) / path.name
        assert path.read_bytes() == other.read_bytes()
    assert sorted(path.name for path in Path("a").iterdir())[:2] == ["clip_00000.mp4", "clip_00000.txt"]
    assert read_video("a/clip_00001.mp4").frames.shape == (3, 6, 24, 24)
    waveform, rate = read_audio("a_sound/clip_00001.wav")
    assert (waveform.shape, rate) == ((1, 4000), 8000)
    assert len(Path("a/clip_00002.txt").read_text().split()) > 3
    with pytest.raises(ValueError, match="a holds files, which clips would be mixed with"):
        world_clips(["a"])
