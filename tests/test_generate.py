"""txt2vid and txt2audio on tiny pipelines that the tests make: what they write, and what they say of wrong values."""

import json
from pathlib import Path
from typing import Any

import av
import pytest
import soundfile
import torch

from audio.commands import txt2audio
from mmdiff import pipeline
from mmdiff.__main__ import guarded
from mmdiff.io import build, save
from mmdiff.pipeline import load_pipeline, write_cascade
from video.commands import txt2vid

TEXT = {
    "class_path": "mmdiff.conditioning.Text",
    "init_args": {
        "encoder": {"class_path": "mmdiff.text.ByteTransformer", "init_args": {"width": 16, "depth": 1, "heads": 2}}
    },
}


def model_tree(axes: int, channels: int, conditioner: dict[str, Any], **backbone: Any) -> dict[str, Any]:
    size = {"axes": axes, "in_channels": channels, "channels": 8, "multipliers": [1], "head_channels": 8}
    return {
        "class_path": "mmdiff.model.DiffusionModel",
        "init_args": {
            "backbone": {"class_path": "mmdiff.backbones.UNet", "init_args": {**size, **backbone}},
            "precond": {"class_path": "mmdiff.precond.EDM"},
            "conditioner": conditioner,
        },
    }


def generate(model: str, **settings: Any) -> dict[str, Any]:
    init = {"model": model, "sigmas": {"class_path": "mmdiff.sigmas.Karras"},
            "sampler": {"class_path": "mmdiff.sampling.DPMpp2M"}, "steps": 3, **settings}  # fmt: skip
    return {"class_path": "mmdiff.cascade.Generate", "init_args": init}


def save_trained(tree: dict[str, Any], folder: Path, dtype: torch.dtype | None = None) -> None:
    """Saves the tree's model with every weight moved off its start, where a network gives zero."""
    torch.manual_seed(0)
    model = build(tree)
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    save(model, tree, folder, dtype)


@pytest.fixture(scope="module")
def video_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of 4 x 8 x 8 and an upsampler to 8 x 16 x 16."""
    folder = tmp_path_factory.mktemp("pipelines") / "video"
    degrade = [{"class_path": "mmdiff.autoencoder.Subsample", "init_args": {"factor": 2}},
               {"class_path": "mmdiff.autoencoder.Pool", "init_args": {"factors": [1, 2, 2]}}]  # fmt: skip
    chain = {"class_path": "mmdiff.autoencoder.Chain", "init_args": {"parts": degrade}}
    low = {"class_path": "mmdiff.conditioning.LowRes", "init_args": {"degrade": chain}}
    save_trained(model_tree(3, 3, TEXT, tokens_width=16, vector_width=16), folder / "base")
    save_trained(model_tree(3, 3, low, concat_channels=4), folder / "up")
    stages = {"base": generate("base", guidance=2.0), "up": generate("up")}
    write_cascade(folder, {"shape": [3, 8, 16, 16], "rate": 8, "multiple": 2, "stages": stages})
    return folder


@pytest.fixture(scope="module")
def audio_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that makes log-mels of 8 x 16, and Griffin-Lim."""
    folder = tmp_path_factory.mktemp("pipelines") / "audio"
    save_trained(model_tree(2, 1, TEXT, tokens_width=16, vector_width=16), folder / "base")
    mel = {
        "class_path": "audio.mel.Mel",
        "init_args": {"sample_rate": 8000, "n_fft": 256, "hop_length": 128, "mels": 16},
    }
    stages = {
        "base": generate("base"),
        "vocoder": {"class_path": "mmdiff.cascade.Decode", "init_args": {"autoencoder": mel}},
    }
    write_cascade(folder, {"shape": [1, 1024], "rate": 8000, "multiple": 128, "stages": stages})
    return folder


def made(folder: Path, suffix: str) -> list[Path]:
    return sorted(folder.glob(f"*.{suffix}"))


def test_a_video_has_the_stated_frames_size_and_rate(video_pipeline: Path, tmp_path: Path) -> None:
    assert txt2vid(["a red circle", "--pipeline", str(video_pipeline), "--out", str(tmp_path), "--preview"]) == 0
    (file,) = made(tmp_path, "mp4")
    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        assert (len(frames), stream.width, stream.height, stream.average_rate) == (8, 16, 16, 8)
    assert len(made(tmp_path, "png")) == 1
    record = json.loads(made(tmp_path, "json")[0].read_text())
    assert (record["prompt"], record["seed"]) == ("a red circle", 0)


@pytest.mark.parametrize(
    ("option", "frames"), [(["--frames", "5"], 5), (["--duration", "0.5"], 4), (["--frames", "12"], 12)]
)
def test_a_video_has_the_asked_length(option: list[str], frames: int, video_pipeline: Path, tmp_path: Path) -> None:
    assert txt2vid(["x", "--pipeline", str(video_pipeline), "--out", str(tmp_path), *option]) == 0
    with av.open(str(made(tmp_path, "mp4")[0])) as container:
        assert len(list(container.decode(video=0))) == frames


@pytest.mark.parametrize(("suffix", "option", "samples"), [("wav", [], 1024), ("flac", ["--duration", "0.1"], 800)])
def test_a_sound_has_the_stated_rate_and_length(
    suffix: str, option: list[str], samples: int, audio_pipeline: Path, tmp_path: Path
) -> None:
    args = ["beep", "--pipeline", str(audio_pipeline), "--out", str(tmp_path), "--format", suffix, "--preview", *option]
    assert txt2audio(args) == 0
    info = soundfile.info(made(tmp_path, suffix)[0])
    assert (info.frames, info.samplerate, info.channels) == (samples, 8000, 1)
    assert len(made(tmp_path, "png")) == 1


def test_same_seed_same_bytes_and_other_settings_other_bytes(video_pipeline: Path, tmp_path: Path) -> None:
    def run(name: str, *options: str) -> bytes:
        out = tmp_path / name
        assert txt2vid(["a red circle", "--pipeline", str(video_pipeline), "--out", str(out), *options]) == 0
        return made(out, "mp4")[0].read_bytes()

    first = run("a")
    assert run("b") == first
    others = (
        ("--seed", "1"),
        ("--steps", "5"),
        ("--guidance", "6"),
        ("--guidance", "apg"),
        ("--guidance", "{class_path: mmdiff.guidance.Rescale, init_args: {guidance: 6}}"),
        ("--negative", "blue"),
        ("--sampler", "ddpm"),
        ("--sampler", "heun"),
    )
    for option, value in others:
        assert run(f"{option}{hash(value)}", option, value) != first, (option, value)


def test_steps_are_the_steps_that_run(video_pipeline: Path, tmp_path: Path) -> None:
    args = ["a red circle", "--pipeline", str(video_pipeline), "--out", str(tmp_path), "--steps", "5", "--count", "2"]
    assert txt2vid(args) == 0
    assert [json.loads(f.read_text("utf-8"))["steps"] for f in made(tmp_path, "json")] == ["5", "5"]


def test_many_prompts_and_counts_number_their_files(video_pipeline: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\nein Füchslein / ../../etc\n", "utf-8")
    out = tmp_path / "out"
    args = ["--prompts", str(prompts), "--count", "2", "--pipeline", str(video_pipeline), "--out", str(out)]
    assert txt2vid([*args, "--batch-size", "3", "--seed", "7"]) == 0
    assert [f.name for f in made(out, "mp4")] == [
        "0000-a-red-circle-seed7.mp4", "0001-a-red-circle-seed8.mp4",
        "0002-ein-f-chslein-etc-seed7.mp4", "0003-ein-f-chslein-etc-seed8.mp4",
    ]  # fmt: skip
    assert txt2vid([*args]) == 0
    assert len(made(out, "mp4")) == 8, "a second run overwrote the first"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([""], "prompt is empty"),
        ([], "give one prompt"),
        (["x", "--steps", "0"], "--steps 0 is outside"),
        (["x", "--steps", "many"], "invalid int value"),
        (["x", "--count", "0"], "--count 0 is outside"),
        (["x", "--sampler", "magic"], "--sampler magic: neither one of"),
        (["x", "--guidance", "magic"], "--guidance magic: neither one of"),
        (["x", "--guidance", "{class_path: os.system}"], "outside the trusted packages"),
        (["x", "--guidance", "{class_path: mmdiff.guidance.APG, init_args: {scale: 0}}"], "must be at least 1"),
        (["a (red", "--weighted"], "character 3: '(' is not closed"),
        (["x", "--guidance", "nan"], "--guidance nan is outside"),
        (["x", "--seed", "-1"], "--seed -1 is outside"),
        (["x", "--duration", "0"], "--duration 0.0 must be"),
        (["x", "--duration", "inf"], "--duration inf must be"),
        (["x", "--frames", "0"], "--frames 0 must be"),
        (["x", "--fps", "nan"], "--fps nan must be"),
        (["x", "--frames", "8", "--duration", "1"], "not both"),
        (["x", "--prompts", "nowhere.txt"], "give one prompt"),
        (["--prompts", "nowhere.txt"], "cannot be read"),
        (["x", "--pipeline", "nowhere"], "no such folder"),
        (["x", "--device", "abacus"], "--device abacus cannot be used"),
        (["x", "--nonsense"], "unrecognized arguments"),
    ],
)
def test_a_wrong_value_ends_in_one_line_before_a_model_is_loaded(
    args: list[str],
    says: str,
    video_pipeline: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded before the options were checked")

    monkeypatch.setattr(pipeline, "load_pipeline", loaded)
    given = args if "--pipeline" in args else [*args, "--pipeline", str(video_pipeline)]
    assert guarded("txt2vid", txt2vid, [*given, "--out", str(tmp_path / "out")]) == 2
    captured = capfd.readouterr()
    assert says in captured.err
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err


def test_an_output_folder_that_is_a_file_ends_in_one_line(
    video_pipeline: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert guarded("txt2vid", txt2vid, ["x", "--pipeline", str(video_pipeline), "--out", str(tmp_path / "file")]) == 2
    assert "cannot be written" in capfd.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("gone", "says"), [("base/model.safetensors", "without its weights"), ("cascade.yaml", "is no pipeline")]
)
def test_a_pipeline_without_weights_is_refused_in_one_line(
    gone: str, says: str, video_pipeline: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(video_pipeline, copy)
    (copy / gone).unlink()
    assert guarded("txt2vid", txt2vid, ["x", "--pipeline", str(copy), "--out", str(tmp_path / "out")]) == 2
    error = capfd.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_a_changed_byte_of_a_pipeline_is_refused(video_pipeline: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(video_pipeline, copy)
    weights = copy / "up" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load_pipeline(copy)


def test_too_long_a_clip_is_refused(video_pipeline: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="choose another --duration"):
        txt2vid(["x", "--pipeline", str(video_pipeline), "--out", str(tmp_path), "--frames", "1000000"])
