"""The tiny configs of autoencoders: each trains; the adversarial one from any seed at twice its learning rate."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from mmdiff.autoencoder import Chain
from mmdiff.autoencoder_module import AutoencoderModule
from mmdiff.checkpoint import AtomicCheckpointIO
from mmdiff.cli import MmdiffCLI
from mmdiff.export import export_model
from mmdiff.io import load

TINY = Path(__file__).resolve().parent.parent / "configs" / "tiny"
GAN = [TINY / "video_autoencoder.yaml", TINY / "video_autoencoder_gan.yaml"]
RATE, DISCRIMINATOR_RATE = 0.003, 0.001  # the nominal ones of GAN
RATES = ("model.init_args.optimizer.init_args.lr", "model.init_args.discriminator_optimizer.init_args.lr")


def command(configs: list[Path], folder: Path, *settings: str) -> MmdiffCLI:
    """What `mmdiff fit` builds of `configs`."""
    words = [word for config in configs for word in ("-c", str(config))]
    quiet = ["enable_progress_bar=false", "enable_model_summary=false", "logger=false", "callbacks=[]"]
    quiet += ["accelerator=cpu", f"default_root_dir={folder}"]
    words += [*(f"--{setting}" for setting in settings), *(f"--trainer.{setting}" for setting in quiet)]
    old, sys.argv = sys.argv, ["mmdiff", *words]
    try:
        return MmdiffCLI(
            pl.LightningModule, pl.LightningDataModule, subclass_mode_model=True, subclass_mode_data=True,
            auto_configure_optimizers=False, save_config_callback=None, run=False,
        )  # fmt: skip
    finally:
        sys.argv = old


class Losses(pl.Callback):
    """What was logged at every step."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def check_seed_finishes(seed: int, folder: Path) -> None:
    """30 steps at twice the nominal learning rates, 25 of them adversarial: all is finite, and the error falls."""
    settings = [f"{name}={2 * rate}" for name, rate in zip(RATES, (RATE, DISCRIMINATOR_RATE), strict=True)]
    start = "model.init_args.adversarial.init_args.start=5"
    cli = command(GAN, folder, *settings, start, f"seed_everything={seed}", "trainer.max_steps=30")
    losses = Losses()
    cli.trainer.callbacks.append(losses)  # type: ignore[attr-defined]
    cli.trainer.fit(cli.model, cli.datamodule)
    assert cli.trainer.global_step == len(losses.logged) == 30
    assert "train/discriminator" in losses.logged[-1]
    assert all(math.isfinite(value) for step in losses.logged for value in step.values())
    assert all(value.isfinite().all() for value in cli.model.state_dict().values())
    errors = [step["train/l1"] for step in losses.logged]
    assert sum(errors[-5:]) / 5 < 0.9 * errors[0], "it finished, but learned nothing"


def test_the_nominal_learning_rates_are_the_configs(tmp_path: Path) -> None:
    config = command(GAN, tmp_path).config
    assert [config[name] for name in RATES] == [RATE, DISCRIMINATOR_RATE]


@pytest.mark.parametrize("seed", [0, 1])
def test_a_seed_finishes_at_twice_the_nominal_learning_rate(seed: int, tmp_path: Path) -> None:
    check_seed_finishes(seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 20))
def test_eighteen_more_seeds_finish_too(seed: int, tmp_path: Path) -> None:
    check_seed_finishes(seed, tmp_path)


def exported(cli: MmdiffCLI, folder: Path) -> nn.Module:
    """The model as `mmdiff export --float32` writes it and `load` reads it."""
    cli.trainer.save_checkpoint(folder / "x.ckpt")
    state = AtomicCheckpointIO().load_checkpoint(folder / "x.ckpt")
    torch.save({**state, "config": {"model": cli.config.model.as_dict()}}, folder / "x.ckpt")
    return load(export_model(folder / "x.ckpt", folder / "m", half=False))


def test_the_autoencoder_of_spectrograms_trains_behind_its_front_and_is_exported_with_it(tmp_path: Path) -> None:
    settings = ["trainer.max_steps=30", "trainer.val_check_interval=15"]
    cli = command([TINY / "audio_autoencoder.yaml"], tmp_path, *settings)
    losses = Losses()
    cli.trainer.callbacks.append(losses)  # type: ignore[attr-defined]
    cli.trainer.fit(cli.model, cli.datamodule)
    module = cli.model
    assert isinstance(module, AutoencoderModule)
    assert losses.logged[-1]["train/l1"] < 0.75 * losses.logged[0]["train/l1"]
    x = torch.cat([batch["x"] for batch in cli.datamodule.val_dataloader()])
    with torch.no_grad():
        z = module.model.encode(module.data({"x": x}))
    assert z.shape[1:] == (4, 8, 8)
    torch.testing.assert_close(z.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.std(dim=(0, 2, 3), correction=0), torch.ones(4), atol=1e-5, rtol=0)
    whole = exported(cli, tmp_path)
    assert isinstance(whole, Chain)
    with torch.no_grad():
        torch.testing.assert_close(whole.encode(x), z)
        assert whole.decode(z[:1]).shape == x[:1].shape


@pytest.mark.slow
def test_two_processes_train_it_and_measure_latents_over_both_s_data(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "mmdiff", "fit", *(word for path in GAN for word in ("-c", str(path)))]
    words += ["--model.init_args.adversarial.init_args.start", "2", "--model.init_args.accumulate", "2"]
    trainer = {"devices": 2, "accelerator": "cpu", "strategy": "ddp_find_unused_parameters_true", "max_steps": 8}
    trainer |= {"val_check_interval": 16, "logger": "false", "enable_progress_bar": "false"}
    words += [word for name, value in trainer.items() for word in (f"--trainer.{name}", str(value))]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    model = load(export_model(tmp_path / "runs" / "tiny" / "autoencoder_gan.ckpt", tmp_path / "m", half=False))
    batches = command(GAN[:1], tmp_path).datamodule
    batches.setup("fit")
    with torch.no_grad():
        z = model.encode(torch.cat([batch["x"] for batch in batches.val_dataloader()]))  # type: ignore[operator]
    torch.testing.assert_close(z.mean(dim=(0, 2, 3, 4)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.std(dim=(0, 2, 3, 4), correction=0), torch.ones(4), atol=1e-5, rtol=0)


def test_the_adversarial_autoencoder_is_exported_without_its_discriminator(tmp_path: Path) -> None:
    cli = command(GAN, tmp_path, "trainer.max_steps=2", "trainer.limit_val_batches=1", "trainer.val_check_interval=2")
    cli.trainer.fit(cli.model, cli.datamodule)
    whole, model = exported(cli, tmp_path), cli.model.model
    state = AtomicCheckpointIO().load_checkpoint(tmp_path / "x.ckpt")
    assert any(name.startswith("adversarial.") for name in state["state_dict"])
    assert len(state["optimizer_states"]) == 2
    assert whole.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(whole.state_dict()[name], value), name
