"""What a network learns in equal time: ours and a peer's, of equal size, on the same procedural clips.

usage: python benchmarks/quality.py [--task unet3d|dit|unet1d ...] [--seconds N] [--threads N] [--json FILE]

Needs the extra `bench`. Both train for N seconds (default 120) as EDM denoisers (Karras et al. 2022) with the same
batches in the same order, the same noise and levels, AdamW and a learning rate that is a function of the share of the
time that is gone. They take turns, so that what slows the machine slows both; only time in training
steps counts. Held-out loss is the mean square error from the network's own target over clips, noise and levels that
are the same for both at every turn, the levels at the quantiles of the training distribution.

Ends with a bar for each task: ours at or below the peer's at the end. Exit status: 0 all met, 1 one missed, 3 none
missed but one not measured.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from audio.render import WorldDataModule as Sounds
from benchmarks import networks as n
from benchmarks.bars import Bar, exit_status, print_bars
from benchmarks.cases import UNET_V0, VDP, our_dit, our_unet1d, our_unet3d
from benchmarks.networks import OURS, Network, check_parameters, parameters
from mmdiff.denoiser import Denoiser
from mmdiff.density import LogNormal
from mmdiff.precond import EDM
from video.render import WorldDataModule as Clips

TURNS, WARMUP = 12, 0.05  # of each network; share of the time in which the learning rate rises
DENSITY = LogNormal()


@dataclass(frozen=True)
class Task:
    """Clips to learn and the two networks that do. data: (training clips, held-out clips) of a seed."""

    name: str
    data: Callable[[int], tuple[Tensor, Tensor]]
    ours: Network
    peer: Network
    batch_size: int


def clips(size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Videos (N, 3, 8, size, size) at 8 fps."""
    world = Clips(512, frames=8, size=(size, size), fps=8.0, seed=seed, val_count=32)
    return stacked(world.train), stacked(world.val)


def sounds(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Waveforms (N, 1, samples) at 8 kHz."""
    world = Sounds(512, samples=samples, sample_rate=8000, seed=seed, val_count=32)
    return stacked(world.train), stacked(world.val)


def stacked(dataset: Dataset) -> Tensor:
    return torch.stack([dataset[i]["x"] for i in range(len(dataset))])  # type: ignore[arg-type]


FRAMES = (1, 3, 8, 16, 16)
TASKS = {task.name: task for task in (
    Task(
        "unet3d", partial(clips, 32), Network("mmdiff UNet3D", OURS, partial(our_unet3d, 3)),
        Network(VDP, "video_diffusion_pytorch", partial(n.video_diffusion_pytorch, 3, 32)), 4,
    ),
    Task(
        "dit", partial(clips, 16), Network("mmdiff SpatioTemporalDiT", OURS, partial(our_dit, 3)),
        Network("diffusers LatteTransformer3DModel", "diffusers", partial(n.diffusers_latte, FRAMES, 4, 64, 6)), 4,
    ),
    Task(
        "unet1d", partial(sounds, 16384), Network("mmdiff UNet1D", OURS, our_unet1d),
        Network(UNET_V0, "audio_diffusion_pytorch", partial(n.unet_v0, (8, 32, 64, 128, 256, 256), 512)), 4,
    ),
)}  # fmt: skip


@dataclass
class Contestant:
    """A network in training. history: (seconds trained, steps, held-out loss) after each turn."""

    denoiser: Denoiser
    optimizer: torch.optim.Optimizer
    rate: float
    seconds: float = 0.0
    steps: int = 0
    history: list[tuple[float, int, float]] = field(default_factory=list)

    def train_for(self, turn_s: float, total_s: float, data: Tensor, batch_size: int, seed: int) -> None:
        """Steps until `turn_s` seconds are over, or `total_s` in all."""
        end = min(self.seconds + turn_s, total_s)
        while self.seconds < end:
            begin = time.perf_counter()
            generator = torch.Generator().manual_seed(hash((seed, self.steps)) % 2**63)
            x0 = data[torch.randint(len(data), (batch_size,), generator=generator)]
            sigma = DENSITY.sample(batch_size, torch.device("cpu"), generator).float()
            noise = torch.randn(x0.shape, generator=generator)
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate * annealed(self.seconds / total_s)
            self.denoiser.loss(x0, sigma, noise=noise).mean().backward()
            nn.utils.clip_grad_norm_(self.denoiser.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.seconds, self.steps = self.seconds + time.perf_counter() - begin, self.steps + 1

    @torch.no_grad()
    def evaluate(self, held_out: Tensor, batch_size: int) -> float:
        """Mean loss of the held-out clips; the same noise and levels every time."""
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(held_out.shape, generator=generator)
        spread = torch.randperm(len(held_out), generator=generator)  # neighbours have nothing to do with their level
        sigma = DENSITY.quantile((spread.double() + 0.5) / len(held_out)).float()
        self.denoiser.eval()
        parts = [held_out.split(batch_size), sigma.split(batch_size), noise.split(batch_size)]
        losses = [self.denoiser.loss(x0, level, noise=eps) for x0, level, eps in zip(*parts, strict=True)]
        self.denoiser.train()
        return float(torch.cat(losses).mean())


def annealed(share: float) -> float:
    """Factor of the learning rate when `share` of the time is gone: a linear rise, then half a cosine to 0."""
    if share < WARMUP:
        return max(share / WARMUP, 0.01)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (share - WARMUP) / (1 - WARMUP))))


def compete(task: Task, seconds: float, rate: float, seed: int) -> tuple[Contestant, Contestant]:
    """Ours and the peer, trained in turns for so many seconds each; prints the losses of every turn."""
    data, held_out = task.data(seed)
    spread = float(data.std())
    pair = []
    for network in (task.ours, task.peer):
        torch.manual_seed(seed)
        denoiser = Denoiser(network.build(), EDM(spread))
        pair.append(Contestant(denoiser, torch.optim.AdamW(denoiser.parameters(), betas=(0.9, 0.99)), rate))
    counts = {n.name: parameters(c.denoiser) for n, c in zip((task.ours, task.peer), pair, strict=True)}
    check_parameters(counts, task.ours.name)
    print(f"\n{task.name}: clips {tuple(data.shape[1:])}, batches of {task.batch_size}, {counts}")
    print(f"{'seconds':>8}{'ours: steps':>13}{'loss':>9}{'peer: steps':>13}{'loss':>9}{'ours / peer':>13}")
    turn = 0
    while min(contestant.seconds for contestant in pair) < seconds:
        for contestant in pair if turn % 2 == 0 else reversed(pair):
            contestant.train_for(seconds / TURNS, seconds, data, task.batch_size, seed)
            loss = contestant.evaluate(held_out, task.batch_size)
            contestant.history.append((contestant.seconds, contestant.steps, loss))
        (ours_s, ours_steps, ours), (_, peer_steps, peer) = (contestant.history[-1] for contestant in pair)
        print(f"{ours_s:8.0f}{ours_steps:13}{ours:9.4f}{peer_steps:13}{peer:9.4f}{ours / peer:13.3f}", flush=True)
        turn += 1
    return pair[0], pair[1]


def main(args: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(description="held-out loss after equal time, ours beside a peer's")
    options.add_argument("--task", nargs="+", choices=[*TASKS], default=[*TASKS], help="default: all")
    options.add_argument("--seconds", type=float, default=120.0, help="of training for each network (default: 120)")
    options.add_argument("--rate", type=float, default=5e-4, help="peak learning rate of both (default: 5e-4)")
    options.add_argument("--seed", type=int, default=0, help="of clips, weights, batches and noise (default: 0)")
    options.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch (default: all cores)")
    options.add_argument("--json", type=Path, metavar="FILE", help="write every number")
    given = options.parse_args(args)
    if given.seconds <= 0 or given.rate <= 0 or given.threads < 1:
        options.error("--seconds, --rate and --threads must be positive")
    torch.set_num_threads(given.threads)
    bars, curves = [], {}
    for task in (TASKS[name] for name in given.task):
        name = f"{task.name}: held-out loss by the peer's"
        if not task.peer.present:
            print(f"\n{task.name}: {task.peer.name} is not installed, left out (pip install -e '.[bench]')")
            bars.append(Bar(name, 1.0, None, most=True, absent=(task.peer.name,)))
            continue
        ours, peer = compete(task, given.seconds, given.rate, given.seed)
        curves[task.name] = {task.ours.name: ours.history, task.peer.name: peer.history}
        bars.append(Bar(name, 1.0, ours.history[-1][2] / peer.history[-1][2], most=True, against=task.peer.name))
    print_bars(bars)
    if given.json:
        given.json.write_text(json.dumps(curves, indent=1) + "\n", "utf-8")
    return exit_status(bars)


if __name__ == "__main__":
    sys.exit(main())
