"""No false alarm: the shipped configs, as they are and with four clips by heart, have no findings in 96 steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmdiff.preflight import examine

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "configs" / "tiny"
VARIANTS = {  # of configs that hold only differences: what they differ from
    "tiny/video_latent": "tiny/video",
    "tiny/video_autoencoder_gan": "tiny/video_autoencoder",
    "video/sprites_latent": "video/sprites",
    "audio/digits_latent": "audio/digits",
}
NAMES = sorted(
    str(path.relative_to(ROOT / "configs"))[: -len(".yaml")]
    for part in ("video", "audio", "tiny")
    for path in (ROOT / "configs" / part).glob("*.yaml")
    if not path.stem.endswith(("_cascade", "_cached"))  # a cached one needs files: its base is looked at
)
AUTOENCODERS = {  # of latent configs: the config that trains it, and its folder
    "tiny/video_latent": ("tiny/video_autoencoder", "runs/tiny/autoencoder"),
    "video/sprites_latent": ("video/autoencoder", "runs/sprites_autoencoder/model"),
    "audio/digits_latent": ("audio/mel_autoencoder", "runs/mel_autoencoder/model"),
}
SEEDS = (0, 1, 2)


@pytest.mark.parametrize("name", ["video", "audio", "audio_autoencoder"])
def test_a_tiny_config_has_no_findings(name: str) -> None:
    torch.manual_seed(0)
    assert examine(str(TINY / f"{name}.yaml"), steps=20) == []


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Path:
    """A folder from which the configs find their data, as from the repository."""
    folder = tmp_path_factory.mktemp("at") / "work"
    folder.mkdir()
    os.symlink(ROOT / "configs", folder / "configs")
    os.symlink(shared_data.parent, folder.parent / "shared")
    return folder


def run(folder: Path, *args: str) -> str:
    command = [sys.executable, "-m", "mmdiff", *args]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 3), f"{command}\n{done.stderr[-2000:]}"
    return done.stdout


def trained(folder: Path, name: str) -> None:
    """The autoencoder that a config needs, trained by its own."""
    config, model = AUTOENCODERS[name]
    if (folder / model).is_dir():
        return
    callback = "lightning.pytorch.callbacks.ModelCheckpoint"
    run(folder, "fit", "-c", f"configs/{config}.yaml", "--trainer.callbacks", callback,
        "--trainer.callbacks.init_args.dirpath", str(folder / "ckpt"),
        "--trainer.callbacks.init_args.filename", config.replace("/", "_"))  # fmt: skip
    run(folder, "export", model, "--checkpoint", str(folder / "ckpt" / f"{config.replace('/', '_')}.ckpt"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("by_heart", [False, True], ids=["", "overfit"])
@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_config_has_no_findings(name: str, by_heart: bool, seed: int, workplace: Path) -> None:
    """Named command: pytest --slow tests/test_doctor_configs.py; some 2 hours on 2 cores."""
    if name in AUTOENCODERS:
        trained(workplace, name)
    layers = [*([VARIANTS[name]] if name in VARIANTS else []), name, *([f"overfit/{name}"] if by_heart else [])]
    config = "+".join(f"configs/{layer}.yaml" for layer in layers)
    cascade = ROOT / "configs" / f"{name}_cascade.yaml"
    grids = ["--cascade", str(cascade)] if cascade.exists() else []
    found = json.loads(run(workplace, "doctor", config, "--steps", "96", "--seed", str(seed), "--json", *grids))
    assert found == []
