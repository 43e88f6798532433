"""Small trainings that are killed and go on: their configs, the processes they run in, and what is left of them."""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml

from mmdiff.callbacks.signals import SIGNALS

PRELOAD = ["mmdiff.cli", "tests.survivors", "video.render", "video.data", "audio.data", "mmdiff.data.cache"]


class Losses(pl.Callback):
    """Appends [step, name, value] to a file, as JSON on a line of its own, also after a torn one."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        batches = trainer.fit_loop.epoch_loop.total_batch_idx
        self._write(trainer, batches, {k: v for k, v in trainer.callback_metrics.items() if k.startswith("train/")})

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            batches = trainer.fit_loop.epoch_loop.total_batch_idx
            self._write(trainer, batches, {k: v for k, v in trainer.callback_metrics.items() if k.startswith("val/")})

    def _write(self, trainer: Any, batches: int, values: dict[str, Any]) -> None:
        if trainer.is_global_zero:
            with open(self.path, "a") as file:
                file.write("".join("\n" + json.dumps([batches, k, float(v)]) for k, v in sorted(values.items())))


class Pause(pl.Callback):
    """Waits in the first batch of the first validation, and says so by a file; where that is there, does nothing."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not trainer.sanity_checking and not self.path.exists():
            self.path.touch()
            time.sleep(1.0)


def part(name: str, **settings: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": settings}


ADAM = part("torch.optim.AdamW", lr=0.003)


def diffusion(backbone: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """A DiffusionModule, with a schedule, conditions that are dropped, and dropout."""
    model = part("mmdiff.model.DiffusionModel", backbone=backbone, precond=part("mmdiff.precond.EDM"), **settings)
    scheduler = part("torch.optim.lr_scheduler.CosineAnnealingLR", T_max=40)
    density = part("mmdiff.density.LogNormal", mean=-0.5)
    return part("mmdiff.module.DiffusionModule", model=model, density=density, optimizer=ADAM, scheduler=scheduler)


def autoencoder(**settings: Any) -> dict[str, Any]:
    model = part(
        "mmdiff.autoencoder.ConvKL", channels=3, latent_channels=2, steps=[[1, 2, 2]], width=4, kernel=[1, 3, 3]
    )
    return part("mmdiff.autoencoder_module.AutoencoderModule", model=model, optimizer=ADAM, **settings)


AUTOENCODER = part("mmdiff.autoencoder.ConvKL", channels=3, latent_channels=2, steps=[[1, 2, 2]], width=4)
ADVERSARIAL = part(
    "mmdiff.adversarial.Adversarial",
    discriminators=[part("mmdiff.discriminator.Patch", channels=3, steps=[[1, 2, 2]], width=4)],
    weight=0.2, features=1.0, r1=0.1, start=4,
)  # fmt: skip
FRAMES = part("video.render.WorldDataModule", count=20, frames=4, size=[8, 8], fps=4.0, batch_size=2, val_count=4)
SPACE = {"factors": [[1, 2, 2]], "kernels": [[1, 3, 3], [3, 1, 1]]}
UNET3D = part("mmdiff.backbones.UNet", axes=3, in_channels=3, channels=8, multipliers=[1, 2], dropout=0.1, **SPACE)
UNET1D = part("mmdiff.backbones.UNet", axes=1, in_channels=1, channels=8, multipliers=[1, 2], dropout=0.1)
DIT = part("mmdiff.backbones.DiT", in_channels=3, patch=[1, 4, 4], width=16, depth=2, head_channels=8, dropout=0.1)

UNET_LATENT = part("mmdiff.backbones.UNet", axes=3, in_channels=2, channels=8, multipliers=[1, 2], dropout=0.1, **SPACE)

MODELS = {
    "unet1d": diffusion(UNET1D),
    "unet3d": diffusion(UNET3D),
    "dit": diffusion(DIT),
    "latent": diffusion(UNET_LATENT, autoencoder=AUTOENCODER),
    "gan": autoencoder(adversarial=ADVERSARIAL, accumulate=3),
    "foreign": part("tests.survivors.Foreign"),
    "poisoned": part("tests.survivors.Poisoned"),
}


class Foreign(pl.LightningModule):
    """Somebody's module: draws from the global generators, and has nothing of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        x = batch["x"].flatten(1)[:, :64]
        loss = (self.net(x + torch.randn_like(x)) - 1).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.log("val/loss", self.net(torch.randn(2, 64)).mean(), batch_size=2)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.003, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)}


class Poisoned(Foreign):
    """In the third step the last process's loss is infinite, and its gradient is not."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        last = self.global_rank == self.trainer.world_size - 1
        return loss + (torch.inf if last and batch_idx == 2 else 0.0)


def write_config(folder: Path, model: str, data: dict[str, Any], *, saves: dict[str, Any], **trainer: Any) -> Path:
    """A config in `folder`, whose runs lie in folder/runs and whose losses in folder/losses.jsonl."""
    settings = {
        "accelerator": "cpu", "max_steps": 24, "val_check_interval": 5, "check_val_every_n_epoch": None,
        "log_every_n_steps": 1, "enable_progress_bar": False, "enable_model_summary": False,
        "num_sanity_val_steps": 1, "default_root_dir": str(folder / "runs"),
        "callbacks": [
            part("mmdiff.callbacks.EMA", decay=0.9),
            part("tests.survivors.Losses", path=str(folder / "losses.jsonl")),
            part("mmdiff.callbacks.Checkpoints", **saves),
        ],
    } | trainer  # fmt: skip
    path = folder / "config.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    module = MODELS[model]
    if "autoencoder" in data["init_args"]:
        module = part(module["class_path"], **module["init_args"], autoencoder_weights=data["init_args"]["autoencoder"])
    path.write_text(yaml.safe_dump({"seed_everything": 1, "model": module, "data": data, "trainer": settings}))
    return path


def _run(args: list[str], folder: str, environment: dict[str, str]) -> None:
    multiprocessing.set_start_method("fork", force=True)  # for data workers, as in a process that a shell starts
    os.chdir(folder)
    os.environ.update(environment)
    output = os.open(f"log{environment.get('RANK', '')}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    for signum in SIGNALS:
        signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
    torch.set_num_threads(1)
    from mmdiff.__main__ import main

    sys.exit(main(args))


def start(folder: Path, *args: str, ranks: int = 1) -> list[BaseProcess]:
    """`mmdiff *args` in processes of their own, forked from one that has imported all that is slow to import.

    With several `ranks`, they are started as torchrun does. What they print is in folder/log.txt, log0.txt, log1.txt.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    environments: list[dict[str, str]] = [{}]
    if ranks > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks), "GROUP_RANK": "0"}
        shared |= {"LOCAL_WORLD_SIZE": str(ranks), "TORCHELASTIC_RUN_ID": "0"}
        environments = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    processes = [context.Process(target=_run, args=(list(args), str(folder), extra)) for extra in environments]
    for process in processes:
        process.start()
    return processes


def finish(processes: list[BaseProcess], timeout_s: float = 120.0) -> list[int | None]:
    """The exit statuses."""
    until = time.monotonic() + timeout_s
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
            raise TimeoutError(f"{process.pid} did not end within {timeout_s} s")
    return [process.exitcode for process in processes]


def fit(folder: Path, *args: str, ranks: int = 1) -> list[int | None]:
    """`mmdiff fit` on the folder's config, to its end; the exit statuses."""
    return finish(
        start(folder, "fit", "--trust-config-imports", "tests", "-c", str(folder / "config.yaml"), *args, ranks=ranks)
    )


def log(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted(folder.glob("log*.txt")))


def final(folder: Path) -> dict[str, Any]:
    """The checkpoint of the run's end."""
    found = sorted((folder / "runs").rglob("resume-*.ckpt"), key=lambda path: int(path.stem.split("-")[1]))
    return torch.load(found[-1], weights_only=True)


def losses(folder: Path) -> dict[tuple[int, str], float]:
    """What was logged, by batch and name. Fails where a batch that was trained twice gave two values."""
    found: dict[tuple[int, str], float] = {}
    for line in (folder / "losses.jsonl").read_text().splitlines():
        if not line.endswith("]"):  # nothing, or torn by a kill
            continue
        batch, name, value = json.loads(line)
        assert found.setdefault((batch, name), value) == value, (
            f"{name} of batch {batch}: {found[batch, name]}, {value}"
        )
    return found


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """That two trees of tensors and plain values are equal, bit by bit; paths, and the clock's numbers, aside."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), f"{where}: {(a.float() - b.float()).abs().max()}"
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for name in a:
            assert_same(a[name], b[name], f"{where}/{name}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for place, (one, two) in enumerate(zip(a, b, strict=True)):
            assert_same(one, two, f"{where}[{place}]")
    else:
        assert a == b, f"{where}: {a} {b}"


def assert_same_run(a: Path, b: Path) -> None:
    """That two runs ended alike: weights, averages, optimizers, schedules, generators, counters; and logged alike."""
    one, two = final(a), final(b)
    for name in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch", "exact_resume"):
        assert_same(one[name], two[name], name)
    for name in one["callbacks"]:
        if "EMA" in name:
            assert_same(one["callbacks"][name], two["callbacks"][name], name)
    assert_same(
        one["loops"]["fit_loop"]["epoch_loop.batch_progress"], two["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    )
    assert_same(one["loops"]["fit_loop"]["epoch_loop.state_dict"], two["loops"]["fit_loop"]["epoch_loop.state_dict"])
    assert losses(a) == losses(b)
