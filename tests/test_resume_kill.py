"""A run that is killed at random moments and goes on ends as if nothing had happened, bit by bit.

All of it, 20 kills in each training: python -m pytest tests/test_resume_kill.py --slow
"""

import os
import random
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from audio.files import write_audio
from tests.cached_clips import exported, make_films
from tests.survivors import FRAMES, assert_same_run, final, finish, fit, losses, part, start, write_config

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")


def frames(folder: Path, workers: int) -> dict[str, Any]:
    return part(FRAMES["class_path"], **FRAMES["init_args"], num_workers=workers)


def sounds(folder: Path, workers: int) -> dict[str, Any]:
    """Sounds of two lengths, in buckets of them, and one that cannot be read."""
    for index in range(11):
        length = 256 + 256 * (index % 2)
        write_audio(folder / "sounds" / f"{index}.wav", torch.linspace(-0.9, 0.9 - index * 0.1, length)[None], 1000)
    (folder / "sounds" / "bad.wav").write_bytes(b"RIFF")
    return part(
        "audio.data.ClipDataModule", path=str(folder / "sounds"), sample_rate=1000, samples=256, caption="none",
        buckets={"steps": [256, 512]}, batch_size=2, num_workers=workers, val_share=0.2, max_bad_share=1.0,
    )  # fmt: skip


def cached(folder: Path, workers: int) -> dict[str, Any]:
    """Latents that are encoded once, two crops of each film, which give way to new ones."""
    films, weights = folder / "films", folder / "autoencoder"
    if not films.is_dir():
        films.mkdir(parents=True)
        make_films(films)
        exported(weights)
    clips = part(
        "video.data.ClipDataModule", path=str(films), frames=4, size=[16, 16], batch_size=1, num_workers=workers,
        val_share=0.3,
    )  # fmt: skip
    settings = {"folder": str(folder / "latents"), "crops": 2, "renew": 2, "device": "cpu"}
    return part("mmdiff.data.cache.LatentCache", data=clips, autoencoder=str(weights), **settings)


@dataclass(frozen=True)
class Case:
    """A training: its model, its data, the processes, and settings of the trainer."""

    model: str
    data: Any
    workers: int = 0
    ranks: int = 1
    trainer: dict[str, Any] = field(default_factory=dict)


TWO = {"strategy": "ddp_find_unused_parameters_true", "devices": 2}
CASES = {
    "unet1d": Case("unet1d", sounds),
    "unet1d-workers": Case("unet1d", sounds, 2, trainer={"val_check_interval": 4}),
    "unet3d": Case("unet3d", frames),
    "unet3d-workers-accumulate": Case("unet3d", frames, 2, trainer={"accumulate_grad_batches": 3}),
    "dit": Case("dit", frames, trainer={"check_val_every_n_epoch": 1, "val_check_interval": 1.0}),
    "dit-accumulate": Case("dit", frames, trainer={"accumulate_grad_batches": 3, "gradient_clip_val": 1.0}),
    "gan": Case("gan", frames),
    "gan-workers": Case("gan", frames, 2, trainer={"max_steps": 20}),
    "cache": Case("latent", cached, trainer={"accumulate_grad_batches": 3}),
    "cache-workers": Case("latent", cached, 2),
    "foreign": Case("foreign", frames, trainer={"accumulate_grad_batches": 3}),
    "two-unet3d": Case("unet3d", frames, 0, 2, {"accumulate_grad_batches": 3, **TWO}),
    "two-gan-workers": Case("gan", frames, 2, 2, TWO),
}


def written(case: Case, root: Path, folder: Path) -> Path:
    data = case.data(root, case.workers)
    write_config(folder, case.model, data, saves={"steps": 3, "minutes": None}, **case.trainer)
    return folder


def last_batch(folder: Path) -> int:
    path = folder / "losses.jsonl"
    return max((batch for batch, _ in losses(folder)), default=-1) if path.exists() else -1


def kill_once(folder: Path, case: Case, rng: random.Random) -> bool:
    """Starts or goes on, kills some batches later. Whether it was still running."""
    before = last_batch(folder)
    command = ["fit", "--resume", "--trust-config-imports", "tests", "-c", str(folder / "config.yaml")]
    processes = start(folder, *command, ranks=case.ranks)
    more, wait, until = rng.randint(1, 9), rng.random() * 0.1, time.monotonic() + 120
    while last_batch(folder) < before + more and all(one.is_alive() for one in processes):
        assert time.monotonic() < until, "no batch within two minutes"
        time.sleep(0.005)
    time.sleep(wait)
    alive = [one.is_alive() for one in processes]
    for one in processes:
        if one.pid is not None and one.is_alive():
            os.kill(one.pid, signal.SIGKILL)
    finish(processes)
    return any(alive)


def check_survives(name: str, root: Path, kills: int, seed: int = 0) -> None:
    """Kills until the number is reached, starting over where the run ends before, then compares with a whole run."""
    case, rng = CASES[name], random.Random(f"{name}{seed}")
    whole = written(case, root, root / "whole")
    assert set(fit(whole, ranks=case.ranks)) == {0}, (whole / "log.txt").read_text()
    done, turn = 0, 0
    while done < kills:
        folder = written(case, root, root / f"killed-{turn}")
        turn += 1
        while done < kills and kill_once(folder, case, rng):
            done += 1
        assert set(fit(folder, "--resume", ranks=case.ranks)) == {0}
        assert_same_run(whole, folder)
        with_checkpoints = {path.parents[1].name for path in (folder / "runs").rglob("*.ckpt")}
        assert len(with_checkpoints) == 1, "it goes on in its run folder"
    assert final(whole)["global_step"] >= 20


def test_a_killed_run_goes_on_exactly(tmp_path: Path) -> None:
    check_survives("gan-workers", tmp_path, kills=1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", CASES)
def test_twenty_kills(tmp_path: Path, name: str) -> None:
    check_survives(name, tmp_path, kills=20)
