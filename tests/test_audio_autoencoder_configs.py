"""The audio autoencoders' configs train, export and decode: a few steps each, on procedural sounds."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from audio.autoencoder import WaveAutoencoder
from audio.vocoder import Vocoder
from mmdiff.autoencoder import Autoencoder, Chain
from mmdiff.config import build, read_config
from mmdiff.io import load

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "audio"
NAMES = ["mel_autoencoder", "wave_autoencoder", "vocoder"]


def run(cwd: Path, *args: str) -> None:
    command = [sys.executable, "-m", "mmdiff", *args]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_few_steps_train_and_the_export_reconstructs(name: str, tmp_path: Path) -> None:
    sounds = ["--data=audio.render.WorldDataModule", "--data.samples=4096", "--data.sample_rate=8000"]
    few = ["--data.count=16", "--data.val_count=4", "--data.batch_size=2", "--trainer.max_steps=4"]
    often = ["--trainer.val_check_interval=2", "--trainer.log_every_n_steps=1"]
    adversarial = ["--model.adversarial.start=2"] if name == "wave_autoencoder" else []
    run(tmp_path, "fit", f"-c={CONFIGS / name}.yaml", *sounds, *few, *often, *adversarial)
    (checkpoint,) = (tmp_path / "runs").rglob("last.ckpt")
    run(tmp_path, "export", "model", f"--checkpoint={checkpoint}")
    model = load(tmp_path / "model")
    assert isinstance(model, Autoencoder)
    x = 0.1 * torch.randn(1, 1, 4096)
    with torch.inference_mode():
        z = model.encode(x)
        y = model.decode(z)
    assert y.shape == x.shape
    assert z.shape == (1, *model.latent_shape((1, 4096)))
    assert y.isfinite().all()


def test_the_spectrograms_are_those_of_the_digits() -> None:
    digits = read_config(CONFIGS / "digits.yaml")["model"]["init_args"]["model"]["init_args"]["autoencoder"]
    settings = digits["init_args"]["parts"][0]
    assert read_config(CONFIGS / "mel_autoencoder.yaml")["model"]["init_args"]["front"] == settings
    vocoder = read_config(CONFIGS / "vocoder.yaml")["model"]["init_args"]["model"]
    assert vocoder["init_args"]["mel"] == settings


def test_latents_have_the_sizes_that_the_configs_name() -> None:
    trees = {name: read_config(CONFIGS / f"{name}.yaml")["model"]["init_args"] for name in NAMES}
    wave = build(trees["wave_autoencoder"]["model"])
    assert isinstance(wave, WaveAutoencoder)
    assert wave.latent_shape((1, 8000)) == (16, 125)
    chain = Chain([build(trees["mel_autoencoder"]["front"]), build(trees["mel_autoencoder"]["model"])])  # type: ignore[list-item]
    assert chain.latent_shape((1, 8192)) == (4, 16, 16)
    vocoder = build(trees["vocoder"]["model"])
    assert isinstance(vocoder, Vocoder)
    assert vocoder.latent_shape((1, 8192)) == (1, 64, 64)
