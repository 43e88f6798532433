"""The profiles in configs/overfit: what their headers promise, and how near a trained model comes to its four clips.

B clips, S samples, C channels, T time.
"""

import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from audio.mel import Mel
from mmdiff.autoencoder import Autoencoder, Chain
from mmdiff.cascade import Clip, Generate
from mmdiff.config import build, read_config
from mmdiff.model import DiffusionModel
from mmdiff.sampling import seeded_noise

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
EXPECTED = re.compile(
    r"Expected: (?P<metric>train/\w+) below (?P<loss>[\d.]+) over the last 50 steps; every sample is nearest to its "
    r"own clip, and (?P<side>above|within) (?P<bar>[\d.]+) dB"
)
SILENCE_DB = -60.0  # levels below count as this: nobody hears how silent silence is
STEP_EVERY = 5  # log_every_n_steps of all profiles


@dataclass(frozen=True)
class Profile:
    """A file in configs/overfit, by its path there without suffix, such as tiny/video."""

    name: str

    @property
    def path(self) -> Path:
        return CONFIGS / "overfit" / f"{self.name}.yaml"

    @cached_property
    def header(self) -> list[str]:
        """The comment on top, without its marks."""
        lines = self.path.read_text("utf-8").splitlines()
        end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
        return [line.removeprefix("#").removeprefix(" ") for line in lines[:end]]

    @property
    def commands(self) -> list[str]:
        """What the header says to run; the last is the training of the profile."""
        return [line.strip() for line in self.header if line.startswith("  ")]

    @property
    def layers(self) -> list[str]:
        """The files that the training is given, the profile last."""
        words = shlex.split(self.commands[-1])
        return [after for word, after in pairwise(words) if word == "-c"]

    @cached_property
    def promise(self) -> dict[str, str]:
        """What is expected: metric, loss, side and bar. Raises ValueError where the header does not say it."""
        found = EXPECTED.search(" ".join(line for line in self.header if not line.startswith("  ")))
        if found is None:
            raise ValueError(f"{self.path} does not say what is expected, as {EXPECTED.pattern}")
        return found.groupdict()

    @property
    def checkpoint(self) -> str:
        """Where its training leaves its weights."""
        (given,) = read_config(self.path)["trainer"]["callbacks"]
        return f"{given['init_args']['dirpath']}/{given['init_args']['filename']}.ckpt"


class Workshop:
    """A folder in which the commands of headers run, each once, and the seconds that they took."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "work"
        self.folder.mkdir()
        for name in ("configs", "scripts"):
            (self.folder / name).symlink_to(ROOT / name)
        if (ROOT.parent / "shared").is_dir():
            (folder / "shared").symlink_to(ROOT.parent / "shared")
        self.seconds: dict[str, float] = {}

    def make(self, profile: Profile) -> float:
        """Runs what the header says and was not run before. Returns the seconds of the last command."""
        for command in profile.commands:
            if command not in self.seconds:
                self.seconds[command] = self.run(command)
        return self.seconds[profile.commands[-1]]

    def run(self, command: str) -> float:
        """Seconds that a command took. Fails where it does."""
        first, *rest = shlex.split(command)
        words = [sys.executable, *(["-m", "mmdiff"] if first == "mmdiff" else []), *rest]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        begin = time.perf_counter()
        done = subprocess.run(
            words, cwd=self.folder, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path}
        )
        seconds = time.perf_counter() - begin
        assert done.returncode == 0, f"{command}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
        return seconds

    def last_losses(self, profile: Profile) -> float:
        """Mean of what its training logged of its metric in the last 50 steps."""
        for folder in sorted((self.folder / "runs" / "overfit" / "lightning_logs").glob("version_*")):
            config = read_config(folder / "config.yaml")
            callbacks = [c["init_args"] for c in config["trainer"]["callbacks"] if "filename" in c.get("init_args", {})]
            if any(f"{c['dirpath']}/{c['filename']}.ckpt" == profile.checkpoint for c in callbacks):
                events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
                events.Reload()
                values = [event.value for event in events.Scalars(profile.promise["metric"])][-50 // STEP_EVERY :]
                return sum(values) / len(values)
        raise AssertionError(f"no log of {profile.name} in {self.folder}")


def parts(autoencoder: Autoencoder) -> tuple[list[Autoencoder], list[Autoencoder]]:
    """Those without weights, which decide what is learned, and those with, which decide how well it is kept."""
    chain = list(autoencoder.parts) if isinstance(autoencoder, Chain) else [autoencoder]
    first = next((i for i, part in enumerate(chain) if any(True for _ in part.parameters())), len(chain))
    return chain[:first], chain[first:]  # type: ignore[return-value]


def encoded(chain: list[Autoencoder], x: Tensor) -> Tensor:
    for part in chain:
        x = part.encode(x)
    return x


def decoded(chain: list[Autoencoder], z: Tensor) -> Tensor:
    for part in reversed(chain):
        z = part.decode(z)
    return z


def levels(x: Tensor, chain: list[Autoencoder]) -> Tensor:
    """Mel levels in dB of full scale: of waveforms (B, 1, T), or of the spectrograms that the `Mel` in `chain` made."""
    mel = next((part for part in chain if isinstance(part, Mel)), None)
    if x.ndim == 3:
        mel = Mel(sample_rate=8000, n_fft=512, hop_length=128, mels=64)
        x = mel.encode(x)
    assert mel is not None
    return (20 * (x * mel.std + mel.mean)).clamp(min=SILENCE_DB)


def apart(made: Tensor, clips: Tensor) -> Tensor:
    """Root mean square (S, B) of what tells each sample from each clip."""
    return (made[:, None] - clips[None]).flatten(2).square().mean(dim=-1).sqrt()


def psnr(distance: Tensor) -> Tensor:
    """Root mean squares of a range of 2 in dB."""
    return -20 * torch.log10(distance.clamp(min=1e-5) / 2)


@torch.inference_mode()
def distances(name: str, model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """How far (S, B) a sample for each clip's prompt, or an autoencoder's copy of it, is from each clip of the batch.

    Of pixels in [-1, 1] the root mean square, of sounds that of their levels in dB. Of a batch of latents, the clips
    are what their autoencoder makes of them.
    """
    diffusion = isinstance(model, DiffusionModel)
    front, trained = parts(model.autoencoder if diffusion else model)
    clips = decoded(trained, batch["latents"]) if "latents" in batch else encoded(front, batch["x"])
    made = decoded(trained, sampled(name, model, batch) if diffusion else encoded(trained, clips))
    return apart(levels(made, front), levels(clips, front)) if clips.ndim < 5 else apart(made, clips)


def sampled(name: str, model: DiffusionModel, batch: dict[str, Any]) -> Tensor:
    """Latents of unguided samples for the batch's prompts from fixed noise, made as the model's cascade config says."""
    stem, kind = re.fullmatch(r"(.*?)(?:_(up|interpolate|cached))?", name).groups()  # type: ignore[union-attr]
    stages = read_config(CONFIGS / f"{stem}_cascade.yaml")["stages"]
    settings = stages[kind if kind in stages else "base"]["init_args"]
    steps = settings.get("steps", 32)
    stage = Generate(model.eval(), build(settings["sigmas"]), build(settings["sampler"]), steps)
    latents, rate = model.latents(batch), float(batch["rate"][0]) / model.autoencoder.factors[0]
    lowres, start = stage.lowres(), None
    if lowres is not None:
        start = Clip(lowres.degrade.encode(latents), rate / lowres.degrade.factors[0])
    noise = seeded_noise(range(len(latents)))
    return stage(batch, start, shape=tuple(latents.shape[1:]), rate=rate, noise=noise).data
