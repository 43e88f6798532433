"""txt2vid over a whole cascade: stages, rates, sizes, frames at both ends, wrong values, and the memory it takes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

import video.commands
from mmdiff.__main__ import guarded
from mmdiff.cascade import Generate
from mmdiff.pipeline import load_pipeline, write_cascade
from mmdiff.resident import STEADY
from mmdiff.sampling import seeded_noise
from tests.test_generate import TEXT, generate, model_tree, save_trained
from video.commands import txt2vid
from video.files import read_video, write_video

GIVEN = {"class_path": "mmdiff.given.Given", "init_args": {"parts": []}}
REFERENCE = {
    "class_path": "mmdiff.reference.Reference",
    "init_args": {"channels": 3, "width": 16, "patch": [4, 4]},
}
CAUSAL = {
    "class_path": "video.autoencoder.CausalVideo",
    "init_args": {"latent_channels": 4, "steps": [[1, 2, 2], [2, 2, 2]], "widths": [8, 8]},
}


def join(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"class_path": "mmdiff.conditioning.Join", "init_args": {"parts": list(parts)}}


def low(class_path: str, **init_args: Any) -> dict[str, Any]:
    degrade = {"class_path": f"mmdiff.autoencoder.{class_path}", "init_args": init_args}
    return {"class_path": "mmdiff.conditioning.LowRes", "init_args": {"degrade": degrade}}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 frames of 8x8 at 4 fps, 16 frames at 8 fps, 16x16."""
    folder = tmp_path_factory.mktemp("pipelines") / "video"
    widths = {"tokens_width": 16, "vector_width": 16}
    save_trained(model_tree(3, 3, join(TEXT, REFERENCE, GIVEN), concat_channels=4, **widths), folder / "base")
    save_trained(model_tree(3, 3, low("Subsample", factor=2), concat_channels=4), folder / "between")
    save_trained(model_tree(3, 3, low("Pool", factors=[1, 2, 2]), concat_channels=4), folder / "up")
    stages = {"base": generate("base", guidance=2.0), "between": generate("between"), "up": generate("up")}
    write_cascade(folder, {"shape": [3, 16, 16, 16], "rate": 8, "multiple": 2, "stages": stages})
    return folder


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """9 frames of 16x16 by 5 latents of 4x4."""
    folder = tmp_path_factory.mktemp("pipelines") / "latent"
    tree = model_tree(3, 4, join(TEXT, GIVEN), tokens_width=16, vector_width=16, concat_channels=5)
    tree["init_args"]["autoencoder"] = CAUSAL
    save_trained(tree, folder / "base")
    decode = {"class_path": "mmdiff.cascade.Decode", "init_args": {"autoencoder": "base"}}
    stages = {"base": generate("base"), "decode": decode}
    write_cascade(folder, {"shape": [3, 9, 16, 16], "rate": 8, "multiple": 2, "offset": 1, "stages": stages})
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for name, (r, g, b), size in (
        ("red", (220, 30, 20), (16, 16)),
        ("blue", (20, 60, 200), (16, 16)),
        ("wide", (90, 200, 90), (96, 48)),
    ):
        Image.new("RGB", size, (r, g, b)).save(folder / f"{name}.png")
    write_video(folder / "clip.mp4", torch.linspace(-0.5, 0.5, 20).view(1, 20, 1, 1).expand(3, 20, 16, 16), 8)
    return folder


class Run:
    """Runs the command and keeps the clips as they were before the codec, by the names of their files."""

    def __init__(self, out: Path, patch: pytest.MonkeyPatch, capfd: Any) -> None:
        self.out, self.patch, self.capfd = out, patch, capfd

    def __call__(self, folder: Path, *options: str, prompt: str = "a red circle") -> dict[str, Any]:
        write, clips = video.commands.write, {}

        def listening(stem: Path, clip: Any, preview: bool) -> list[Path]:
            clips[stem.name] = clip
            return write(stem, clip, preview)

        with self.patch.context() as patch:
            patch.setattr(video.commands, "write", listening)
            assert txt2vid([prompt, "--pipeline", str(folder), "--out", str(self.out), *options]) == 0
        captured = self.capfd.readouterr()
        self.files = [Path(line) for line in captured.out.splitlines()]
        self.said = [line for line in captured.err.splitlines() if "used as" in line]
        return clips

    def one(self, folder: Path, *options: str) -> Any:
        (clip,) = self(folder, *options).values()
        return clip


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Run:
    return Run(tmp_path / "out", monkeypatch, capfd)


def colour(path: Path) -> Tensor:
    """(1, 3, 1, 1, 1) of a picture of one colour."""
    pixel = Image.open(path).getpixel((0, 0))
    return (torch.tensor(pixel).float() / 127.5 - 1).view(1, 3, 1, 1, 1)


def expect_frame(clip: Any, place: int, picture: Path) -> None:
    frame = clip.data[:, :, place : place + 1 or None]
    torch.testing.assert_close(frame, colour(picture).expand_as(frame), rtol=0, atol=1e-6)


# Stages


def test_loading_stages_in_turn_changes_no_clip(pipeline: Path, run: Run) -> None:
    whole = load_pipeline(pipeline)({"caption": ["a red circle"]}, noise=seeded_noise([0]))
    assert torch.equal(run.one(pipeline).data, whole.data)


def test_every_stages_clip_is_saved_and_each_may_be_the_last(pipeline: Path, run: Run) -> None:
    clips = run(pipeline, "--save-stages")
    stem = "0000-a-red-circle-seed0"
    assert [file.name for file in run.files] == [f"{stem}-base.mp4", f"{stem}-between.mp4", f"{stem}.mp4"]
    due = {"-base": ((1, 3, 8, 8, 8), 4.0), "-between": ((1, 3, 16, 8, 8), 8.0), "": ((1, 3, 16, 16, 16), 8.0)}
    assert {name.removeprefix(stem): (tuple(clip.data.shape), clip.rate) for name, clip in clips.items()} == due
    assert torch.equal(clips[f"{stem}-between"].data[:, :, ::2], clips[f"{stem}-base"].data)  # kept to the bit
    for name, suffix in (("base", "-base"), ("between", "-between"), ("up", "")):
        assert torch.equal(run.one(pipeline, "--until", name).data, clips[f"{stem}{suffix}"].data)
    record = json.loads(sorted(run.out.glob("*.json"))[0].read_text())
    assert set(record["stages"]) == {"between", "up"}


def test_latents_are_written_as_numbers(latent: Path, run: Run) -> None:
    clips = run(latent, "--save-stages", "--batch-size", "1")
    assert [file.suffix for file in run.files] == [".safetensors", ".mp4"]
    whole = load_pipeline(latent)
    with safe_open(run.files[0], framework="pt") as file:
        stored, rate = file.get_tensor("latents"), float(file.metadata()["rate"])
    assert (tuple(stored.shape), rate) == ((4, 5, 4, 4), 4.0)
    decoded = whole.stages["decode"].autoencoder.decode(stored[None])  # type: ignore[attr-defined]
    (clip,) = clips.values()
    torch.testing.assert_close(decoded, clip.data, rtol=0, atol=1e-5)
    run(latent, "--until", "base")
    assert [file.suffix for file in run.files] == [".safetensors"]


def test_each_stage_has_its_own_settings(pipeline: Path, run: Run) -> None:
    options = ["--steps", "base=2", "--steps", "up=5", "--sampler", "between=ddpm", "--guidance", "3"]
    clip = run.one(pipeline, *options)
    record = json.loads(next(run.out.glob("*.json")).read_text())
    assert (record["steps"], record["guidance"], record["stages"]["up"]["steps"]) == ("2", "3.0", "5")
    assert record["stages"]["between"]["sampler"] == "Ancestral(eta=1.0)"
    for place in range(0, len(options), 2):
        left = options[:place] + options[place + 2 :]
        assert not torch.equal(run.one(pipeline, *left).data, clip.data), options[place : place + 2]


def test_prompts_in_batches_are_those_of_one_at_a_time(pipeline: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    together = run(pipeline, "--count", "1", "--save-stages")
    clips: dict[str, Any] = {}
    with run.patch.context() as patch:
        patch.setattr(video.commands, "write", lambda stem, clip, preview: clips.setdefault(stem.name, clip) and [])
        args = ["--prompts", str(tmp_path / "prompts.txt"), "--save-stages", "--pipeline", str(pipeline)]
        assert txt2vid([*args, "--out", str(tmp_path / "many")]) == 0
    assert len(clips) == 6
    for name in ("-base", "-between", ""):
        one = together[f"0000-a-red-circle-seed0{name}"].data
        torch.testing.assert_close(clips[f"0000-a-red-circle-seed0{name}"].data, one, rtol=1e-3, atol=1e-3)


# Rate and size


@pytest.mark.parametrize(
    ("options", "frames", "rate"),
    [
        (["--fps", "4"], 8, 4),
        (["--fps", "2"], 4, 2),
        (["--fps", "4", "--frames", "5"], 5, 4),
        (["--fps", "4", "--duration", "1.5"], 6, 4),
        (["--fps", "4", "--until", "between"], 8, 4),
        (["--fps", "8"], 16, 8),
    ],
)
def test_a_lower_rate_is_made_of_the_same_frames(
    options: list[str], frames: int, rate: int, pipeline: Path, run: Run
) -> None:
    clip = run.one(pipeline, *options)
    assert (clip.data.shape[2], clip.rate) == (frames, rate)
    (file,) = run.files
    written = read_video(file)
    assert (written.frames.shape[1], float(written.fps)) == (frames, rate)


def test_another_size(pipeline: Path, latent: Path, run: Run) -> None:
    assert run.one(pipeline, "--size", "24x32").data.shape == (1, 3, 16, 24, 32)
    assert run.one(latent, "--size", "8x24").data.shape == (1, 3, 9, 8, 24)
    assert run.one(pipeline, "--size", "12x8", "--until", "base").data.shape == (1, 3, 8, 12, 8)


# Frames that are given


@pytest.mark.parametrize(
    ("kind", "start", "end"),
    [("pipeline", "red", None), ("pipeline", None, "blue"), ("pipeline", "red", "blue"), ("latent", "red", "blue")],
)
def test_first_and_last_frame(
    kind: str, start: str | None, end: str | None, pictures: Path, run: Run, request: pytest.FixtureRequest
) -> None:
    folder, options = request.getfixturevalue(kind), ["--steps", "1"]
    plain = run.one(folder, *options).data
    for option, name in (("--first-frame", start), ("--last-frame", end)):
        options += [] if name is None else [option, str(pictures / f"{name}.png")]
    clip = run.one(folder, *options)
    assert len(run.said) == 2 - (start, end).count(None)
    assert clip.data.shape == plain.shape
    for place, name in ((0, start), (-1, end)):
        if name is not None:
            expect_frame(clip, place, pictures / f"{name}.png")
            assert (clip.data[:, :, 4] - colour(pictures / f"{name}.png")[:, :, 0]).abs().mean() > 1e-2
    assert (clip.data[:, :, 4] - plain[:, :, 4]).abs().mean() > 1e-4, "the rest goes by what is given"


@pytest.mark.parametrize("frames", [16, 15, 3])
def test_the_first_stage_knows_the_last_frame_at_any_length(
    frames: int, pipeline: Path, pictures: Path, run: Run
) -> None:
    """The base makes every other frame: a picture that must be its last is held for two where need be."""
    base = run(pipeline, "--save-stages", "--frames", str(frames), "--last-frame", str(pictures / "blue.png"))
    low, clip = base["0000-a-red-circle-seed0-base"], base["0000-a-red-circle-seed0"]
    assert clip.data.shape[2] == frames
    expect_frame(clip, -1, pictures / "blue.png")
    expect_frame(low, -1, pictures / "blue.png")


def test_a_picture_of_another_size_is_said_to_be_used_as_one_of_the_pipelines(
    pipeline: Path, pictures: Path, run: Run
) -> None:
    clip = run.one(pipeline, "--first-frame", str(pictures / "wide.png"))
    assert run.said == [f"{pictures / 'wide.png'}: a picture of 96x48, used as 1 frame of 16x16 at 8 fps"]
    expect_frame(clip, 0, pictures / "wide.png")


def test_a_reference_is_a_picture_or_a_clip(pipeline: Path, pictures: Path, run: Run) -> None:
    plain, picture, clip = (
        run.one(pipeline, "--until", "base", *options).data
        for options in ([], *(["--reference", str(pictures / name)] for name in ("red.png", "clip.mp4")))
    )
    assert all((a - b).abs().mean() > 1e-5 for a, b in ((plain, picture), (plain, clip), (picture, clip)))
    framed = run.one(pipeline, "--reference", str(pictures / "red.png"), "--last-frame", str(pictures / "blue.png"))
    expect_frame(framed, -1, pictures / "blue.png")


# What is refused


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--until", "middle"], "there is no stage 'middle'; the cascade has base, between, up"),
        (["--steps", "middle=3"], "there is no stage 'middle'"),
        (["--steps", "up=0"], "--steps 0 is outside 1..10000"),
        (["--steps", "up=many"], "--steps many: invalid int value"),
        (["--guidance", "up=3"], "guidance=3.0 would change nothing"),
        (["--guidance", "up=nan"], "--guidance nan is outside"),
        (["--sampler", "up=magic"], "--sampler magic: neither one of"),
        (["--fps", "7"], "7 steps per second cannot be made: the cascade makes 8, or that over a whole number"),
        (["--fps", "16"], "16 steps per second cannot be made"),
        (["--fps", "0"], "--fps 0.0 must be a number of frames per second above 0"),
        (["--size", "17x16"], "--size 17x16: the height must be a multiple of 2, such as 16 or 18"),
        (["--size", "15x13"], "such as 14 or 16, and the width must be a multiple of 2, such as 12 or 14"),
        (["--size", "1000x1000"], "more than 16 times the pixels of 16x16"),
        (["--size", "16"], "--size 16 must be HEIGHTxWIDTH in pixels"),
        (["--size", "0x16"], "--size 0x16 must be HEIGHTxWIDTH"),
        (["--frames", "257"], "257 steps of time (32.125 s) are outside 1..256 (0.125..32 s)"),
        (["--mask", "red.png"], "--mask needs --init FILE, the clip to edit"),
        (["--init", "clip.mp4", "--last-frame", "red.png"], "give --init or --last-frame, not both"),
        (["--last-frame", "nowhere.png"], "nowhere.png: cannot be read as a picture"),
        (["--reference", "nowhere.png"], "nowhere.png: cannot be read as a picture"),
        (["--init", "clip.mp4", "--extend", "1", "--fps", "4"], "it goes without --fps"),
    ],
)  # fmt: skip
def test_wrong_values_end_in_one_line(
    options: list[str], says: str, pipeline: Path, pictures: Path, tmp_path: Path, capfd: Any
) -> None:
    given = [str(pictures / option) if option.endswith((".png", ".mp4")) else option for option in options]
    assert guarded("txt2vid", txt2vid, ["x", "--pipeline", str(pipeline), "--out", str(tmp_path / "out"), *given]) == 2
    said = capfd.readouterr().err
    assert says in said
    assert said.count("\n") == 1
    assert "Traceback" not in said
    assert not list((tmp_path / "out").glob("*.mp4"))


def test_more_of_what_a_pipeline_cannot_do(
    latent: Path, pipeline: Path, pictures: Path, tmp_path: Path, capfd: Any
) -> None:
    def said(folder: Path, *options: str) -> str:
        assert guarded("txt2vid", txt2vid, ["x", "--pipeline", str(folder), "--out", str(tmp_path), *options]) == 2
        captured: str = capfd.readouterr().err
        assert captured.count("\n") == 1
        return captured

    red = str(pictures / "red.png")
    assert "--until base makes latents, no media: it goes without --first-frame" in said(
        latent, "--until", "base", "--first-frame", red
    )
    both = ["--first-frame", red, "--last-frame", red]
    assert "2 steps of time leave nothing to make between the given frames" in said(pipeline, "--frames", "2", *both)
    assert "no model of the cascade reads a reference" in said(latent, "--reference", red)
    assert "the height must be a multiple of 4, such as 8 or 12" in said(latent, "--size", "10x16")
    shutil.copytree(pipeline, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "between")
    assert "stage 'between' names the model 'between', which is no folder beside it" in said(tmp_path / "copy")


# Memory


@pytest.mark.parametrize("kind", ["pipeline", "latent"])
def test_the_weights_of_a_stage_are_there_only_while_it_works(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    cascade = load_pipeline(folder, in_turn=True)
    models = {name: stage.model for name, stage in cascade.stages.items() if isinstance(stage, Generate)}

    def held() -> list[str]:
        return [name for name, model in models.items() if any(p.numel() for p in model.parameters())]

    assert held() == []
    seen: list[tuple[str, list[str]]] = []
    made = cascade({"caption": ["x"]}, noise=seeded_noise([0]), progress=lambda name, *_: seen.append((name, held())))
    assert held() == []
    for name, awake in seen:
        assert awake == [name if name in models else "base"], "one stage at a time"  # a decoder is the base's own
    again = cascade({"caption": ["x"]}, noise=seeded_noise([0]))
    assert torch.equal(again.data, made.data)
    assert torch.equal(load_pipeline(folder)({"caption": ["x"]}, noise=seeded_noise([0])).data, made.data)


PEAK = """
import sys
from mmdiff.pipeline import load_pipeline
from mmdiff.resident import resident
from mmdiff.sampling import seeded_noise
import torch, mmdiff.backbones
torch.set_num_threads(1)
before = resident()
cascade = load_pipeline(sys.argv[1], in_turn=sys.argv[2] == "turn")
cascade({"caption": ["x"]}, noise=seeded_noise([0]))
print(resident(peak=True) - before)
"""


@pytest.mark.slow
def test_two_models_take_less_memory_than_the_sum_of_both(tmp_path: Path) -> None:
    folder = tmp_path / "large"
    wide = {"channels": 512, "multipliers": [1, 1], "factors": [[1, 2, 2]], "kernels": [[1, 3, 3]]}
    trees = {
        "base": model_tree(3, 3, TEXT, tokens_width=16, vector_width=16),
        "up": model_tree(3, 3, low("Pool", factors=[1, 2, 2]), concat_channels=4),
    }
    for name, tree in trees.items():
        tree["init_args"]["backbone"]["init_args"] |= wide
        save_trained(tree, folder / name, torch.float16)
    stages = {"base": generate("base", steps=1), "up": generate("up", steps=1)}
    write_cascade(folder, {"shape": [3, 1, 8, 8], "rate": 8, "stages": stages})
    both_mib = sum(
        4 * sum(p.numel() for p in stage.model.parameters()) / 2**20  # type: ignore[attr-defined]
        for stage in load_pipeline(folder).stages.values()
    )
    assert both_mib > 150

    def peak_mib(way: str) -> float:
        command = [sys.executable, "-c", PEAK, str(folder), way]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **STEADY})
        return int(done.stdout) / 2**20

    in_turn, at_once = peak_mib("turn"), peak_mib("once")
    assert in_turn < 0.95 * both_mib, (in_turn, at_once, both_mib)
    assert in_turn < at_once - 0.2 * both_mib, (in_turn, at_once, both_mib)
