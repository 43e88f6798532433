"""Every config parses and builds; the tiny ones train, are exported, reloaded and sampled from."""

import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from mmdiff.cascade import Decode, Generate
from mmdiff.config import build, read_config
from mmdiff.footprint import parsed
from mmdiff.io import load
from mmdiff.pipeline import load_pipeline
from mmdiff.sampling import seeded_noise
from video.files import read_video

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if "overfit" not in path.parts]
TRAINED = [path for path in CONFIGS if "model" in read_config(path)]  # the others are cascades, or data alone
CASCADES = [path for path in CONFIGS if path.stem.endswith("_cascade")]
VARIANTS = {  # what holds only differences, and from what
    "tiny/video_latent.yaml": "tiny/video.yaml",
    "video/sprites_latent.yaml": "video/sprites.yaml",
    "video/dit.yaml": "video/world.yaml",
    "video/objective/edm.yaml": "video/world.yaml",
    "video/objective/flow.yaml": "video/world.yaml",
    "video/objective/v.yaml": "video/world.yaml",
    "video/world_autoencoder.yaml": "video/autoencoder.yaml",
    "video/world_joint.yaml": "video/world.yaml",
    "video/world_latent.yaml": "video/world.yaml",
    "audio/digits_latent.yaml": "audio/digits.yaml",
    "tiny/video_autoencoder_gan.yaml": "tiny/video_autoencoder.yaml",
}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT / "configs"))


def layers(path: Path) -> list[Path]:
    """The config, after the one it is a variant of."""
    base = VARIANTS.get(name(path))
    return [path] if base is None else [ROOT / "configs" / base, path]


@cache
def training(path: Path) -> dict[str, Any]:
    """The tree of a training config, over the one it is a variant of as `mmdiff fit` reads both."""
    found = layers(path)
    if len(found) == 1:
        return read_config(path)
    _, given, _ = parsed("+".join(map(str, found)))
    tree: dict[str, Any] = given.as_dict()
    return tree


def model_of(path: Path) -> dict[str, Any]:
    """The tree of the model that a config trains."""
    tree: dict[str, Any] = training(path)["model"]["init_args"]["model"]
    return tree


def mmdiff(*args: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mmdiff", *map(str, args)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=280, env=None, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


def test_there_are_configs_of_both_kinds() -> None:
    assert {"video/sprites.yaml", "audio/digits.yaml", "tiny/video.yaml", "tiny/audio.yaml"} <= set(map(name, TRAINED))
    assert CASCADES


@pytest.mark.parametrize("path", TRAINED, ids=name)
def test_a_training_config_builds_its_model_and_says_what_it_is(path: Path) -> None:
    text = path.read_text("utf-8")
    assert text.startswith("# "), "the first line says what the experiment is"
    assert f"-c configs/{name(path)}" in text
    assert len(text.splitlines()) <= 75
    model = build(model_of(path))
    assert isinstance(model, nn.Module)
    assert sum(p.numel() for p in model.parameters()) > 1000


@pytest.mark.parametrize("path", [*TRAINED], ids=name)
def test_mmdiff_reads_a_training_config_whole(path: Path) -> None:
    from lightning.pytorch import LightningDataModule, LightningModule

    from mmdiff.cli import MmdiffCLI

    args = ["fit", *(word for layer in layers(path) for word in ("-c", str(layer))), "--print_config"]
    old, sys.argv = sys.argv, ["mmdiff", *args]
    try:
        with pytest.raises(SystemExit) as stop:
            MmdiffCLI(
                LightningModule, LightningDataModule, subclass_mode_model=True, subclass_mode_data=True,
                auto_configure_optimizers=False, run=True,
            )  # fmt: skip
    finally:
        sys.argv = old
    assert stop.value.code == 0


@pytest.mark.parametrize("path", CASCADES, ids=name)
def test_a_cascade_config_fits_the_models_it_is_for(path: Path) -> None:
    """Builds every stage around the model of its training config and asks for the plan of its clip."""
    from mmdiff.cascade import Cascade

    tree = read_config(path)
    stem = path.stem.removesuffix("_cascade")
    saved = {"base": f"{stem}.yaml"}
    stages = {}
    for stage_name, stage in tree["stages"].items():
        args = dict(stage["init_args"])
        for argument in ("model", "autoencoder"):
            if isinstance(args.get(argument), str):
                trained = path.with_name(saved.get(args[argument], f"{stem}_{args[argument]}.yaml"))
                model = model_of(trained)  # of a diffusion model, a decoding stage takes the autoencoder
                args[argument] = model["init_args"]["autoencoder"] if argument == "autoencoder" else model
        stages[stage_name] = build({**stage, "init_args": args})
    cascade = Cascade(stages, tree["shape"], tree["rate"], tree.get("multiple", 1), tree.get("offset", 0))
    channels, steps, *sizes = tree["shape"]
    made = steps + (tree.get("offset", 0) - steps) % tree.get("multiple", 1)
    plan = cascade.plan((channels, made, *sizes), tree["rate"])
    assert plan[-1] == ((channels, made, *sizes), tree["rate"])
    assert len(plan) == len(stages)


def train_losses(logs: Path) -> list[float]:
    events = EventAccumulator(str(logs), size_guidance={"scalars": 0})
    events.Reload()
    tags: dict[str, Any] = events.Tags()
    assert {"train/loss", "train/grad_norm", "val/loss"} <= set(tags["scalars"])
    assert any(tag.startswith("lr-") for tag in tags["scalars"])
    assert tags["images"] or tags["audio"], "no samples were logged"
    return [event.value for event in events.Scalars("train/loss")]


@pytest.mark.parametrize(("kind", "command", "prompt"), [
    ("video", "txt2vid", "a red circle moves left"), ("audio", "txt2audio", "two beeps of high pitch"),
])  # fmt: skip
def test_a_tiny_config_trains_is_exported_reloaded_and_sampled(
    kind: str, command: str, prompt: str, tmp_path: Path
) -> None:
    config = ROOT / "configs" / "tiny" / f"{kind}.yaml"
    mmdiff("fit", "-c", config, cwd=tmp_path)
    losses = train_losses(tmp_path / "runs" / "tiny" / "lightning_logs" / "version_0")
    assert sum(losses[-3:]) / 3 < 0.5 * sum(losses[:2]) / 2, "the loss did not fall to half of its start"
    checkpoint, pipeline = tmp_path / "runs" / "tiny" / f"{kind}.ckpt", tmp_path / "pipeline"
    cascade = config.with_name(f"{kind}_cascade.yaml")
    mmdiff("export", pipeline, "--cascade", cascade, "--stage", f"base={checkpoint}", cwd=tmp_path)
    loaded = load_pipeline(pipeline)
    assert loaded.rate == read_config(cascade)["rate"]
    mmdiff(command, prompt, "--pipeline", pipeline, "--out", tmp_path / "out", "--preview", cwd=tmp_path)
    assert len(list((tmp_path / "out").glob("*.png"))) == 1
    if kind == "video":
        clip = read_video(next((tmp_path / "out").glob("*.mp4"))).frames
        assert clip.shape == (3, 8, 16, 16)
        assert clip.float().std() > 5, "the clip is constant"
    else:
        waveform, rate = soundfile.read(next((tmp_path / "out").glob("*.wav")))
        assert (len(waveform), rate) == (8192, 8000)
        assert waveform.std() > 1e-3, "the sound is silent"


def test_latent_video_trains_in_an_exported_autoencoder_and_decodes(tmp_path: Path) -> None:
    tiny = ROOT / "configs" / "tiny"
    short = ["--trainer.max_steps", "30", "--trainer.val_check_interval", "15"]
    mmdiff("fit", "-c", tiny / "video_autoencoder.yaml", *short, cwd=tmp_path)
    runs = tmp_path / "runs" / "tiny"
    mmdiff("export", runs / "autoencoder", "--checkpoint", runs / "autoencoder.ckpt", cwd=tmp_path)
    mmdiff("fit", "-c", tiny / "video.yaml", "-c", tiny / "video_latent.yaml", *short, cwd=tmp_path)
    base = f"base={runs / 'latent.ckpt'}"
    mmdiff("export", runs / "latent", "--cascade", tiny / "video_latent_cascade.yaml", "--stage", base, cwd=tmp_path)
    cascade = load_pipeline(runs / "latent")
    clip = cascade({"caption": ["a red circle moves left"]}, noise=seeded_noise([0]))
    assert clip.data.shape == (1, 3, 8, 16, 16)
    trained, decoder = cascade.stages["base"], cascade.stages["decode"]
    assert isinstance(trained, Generate)
    assert isinstance(decoder, Decode)
    assert decoder.autoencoder is trained.model.autoencoder
    exported = load(runs / "autoencoder")
    for p, q in zip(exported.parameters(), decoder.autoencoder.parameters(), strict=True):
        assert torch.equal(p, q), "the diffusion model was not trained in the exported autoencoder"


def test_an_autoencoder_without_its_weights_is_refused() -> None:
    from mmdiff.density import LogNormal
    from mmdiff.module import DiffusionModule

    model = build(model_of(ROOT / "configs" / "tiny" / "video_latent.yaml"))
    with pytest.raises(ValueError, match="autoencoder_weights is not given"):
        DiffusionModule(model, LogNormal())


def test_an_exported_model_holds_the_average_and_raw_the_last_weights(tmp_path: Path) -> None:
    """A checkpoint as Lightning writes it, made by hand: state_dict raw, the average in the EMA's state."""
    from mmdiff.export import export_model

    tree = yaml.safe_load((ROOT / "configs" / "tiny" / "video.yaml").read_text())["model"]
    model = build(tree["init_args"]["model"])
    raw = {f"model.{k}": torch.full_like(v, 2.0) for k, v in model.state_dict().items()}
    average = {k: torch.full_like(v, 3.0) for k, v in raw.items()}
    state = {"config": {"model": tree}, "state_dict": raw, "callbacks": {"EMA": {"average": average}}}
    torch.save(state, tmp_path / "x.ckpt")
    for flag, value in ((False, 3.0), (True, 2.0)):
        loaded = load(export_model(tmp_path / "x.ckpt", tmp_path / "m", raw=flag))
        assert all((p == value).all() for p in loaded.parameters())


def test_export_names_what_is_wrong(tmp_path: Path) -> None:
    from mmdiff.export import export_model, main

    with pytest.raises(ValueError, match="no such checkpoint"):
        export_model(tmp_path / "none.ckpt", tmp_path / "m")
    torch.save({"state_dict": {}}, tmp_path / "bare.ckpt")
    with pytest.raises(ValueError, match="holds no config"):
        export_model(tmp_path / "bare.ckpt", tmp_path / "m")
    cascade = ROOT / "configs" / "tiny" / "video_cascade.yaml"
    with pytest.raises(ValueError, match="no stage with a model called up"):
        main([str(tmp_path / "p"), "--cascade", str(cascade), "--stage", "up=x.ckpt"])
    with pytest.raises(ValueError, match="stage 'base' needs a checkpoint"):
        main([str(tmp_path / "p"), "--cascade", str(cascade)])
