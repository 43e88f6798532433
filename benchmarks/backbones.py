"""Backbones of mmdiff beside those of other projects: time, rate and memory on the same input, parameters matched.

usage: python benchmarks/backbones.py [--quick] [--case NAME ...] [--threads N] [--json FILE]
       python benchmarks/backbones.py --device cuda

Needs the extra `bench`; a peer that is not installed is named and left out. Takes 12 minutes on two cores, with --quick
about 4. A training step is forward, mean square error, backward and the clearing of the gradients, without an
optimizer's step, which is the same for all. GFLOP/s are what mmdiff.flops counts, by the seconds; their share is of the
machine's own rate of square matrix products, measured in the same rounds. Memory is the peak resident size of a fresh
process after training steps less what it was before the network was built: weights, gradients, activations, and what
the libraries set aside. On a GPU our networks alone run, compiled, in bfloat16, and memory is what torch allocated.

Ends with the bars, each met, MISSED or not measured. Exit status: 0 all met, 1 one missed, 3 none missed but one not
measured.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

from benchmarks.bars import Bar, exit_status, least_bar, most_bar, print_bars
from benchmarks.cases import CASES, GPU_CASES, Case
from benchmarks.measure import (
    Interval,
    best_matrix,
    inference_step,
    interval,
    matrix_flops,
    matrix_products,
    measure_rounds,
    training_step,
)
from benchmarks.memory import peak_of
from benchmarks.networks import Network, check_parameters, parameters
from mmdiff.flops import count_flops

PACKAGES = ("torch", "diffusers", "video-diffusion-pytorch", "imagen-pytorch", "audio-diffusion-pytorch")
MEMORY_BAR = 1.10  # of the leanest peer


@dataclass(frozen=True)
class Row:
    """One network of a case. train_ratio, infer_ratio: its seconds by ours, of the same rounds."""

    network: str
    parameters: int
    train_s: float
    infer_s: float
    samples_per_s: float
    train_gflop: float
    train_gflops: float
    share: Interval  # of the machine's rate of matrix products, in training
    train_ratio: Interval
    infer_ratio: Interval
    memory_bytes: int | None


@dataclass(frozen=True)
class Found:
    """What was measured of a case. The first row is ours. absent: peers that are not installed."""

    case: Case
    rows: Sequence[Row]
    absent: Sequence[str]
    rounds: int
    matrix: str
    matrix_gflops: float


def measure_case(case: Case, device: torch.device, budget_s: float, threads: int, memory: bool) -> Found:
    """Every network of the case that is installed, in rounds of at most some `budget_s` seconds."""
    gpu = device.type == "cuda"
    present = [network for network in case.networks if network.present]
    absent = [network.name for network in case.networks if not network.present]
    torch.manual_seed(0)
    built = {network.name: network.build().to(device) for network in present}
    counts = {name: parameters(network) for name, network in built.items()}
    check_parameters(counts, case.ours.name)
    x, c_noise, target = case.input(device)
    measured = present if memory else []
    peaks = {network.name: peak_memory(case, network, built, device, threads) for network in measured}

    works, flops = matrix_products(device, torch.bfloat16 if gpu else torch.float32), {}
    for name, network in built.items():
        flops[name] = count_flops(training_step(network, x, c_noise, target, autocast=gpu))
        fast: nn.Module = torch.compile(network) if gpu else network  # type: ignore[assignment]
        works[f"train {name}"] = training_step(fast, x, c_noise, target, autocast=gpu)
        works[f"infer {name}"] = inference_step(fast, x, c_noise, autocast=gpu)
    ours = case.ours.name
    pairs = [(f"train {name}", f"train {ours}") for name in built if name != ours]
    rounds = measure_rounds(works, device, budget_s, pairs)
    matrix = best_matrix(rounds)
    rows = []
    for name in built:
        train_s, infer_s = rounds.median(f"train {name}"), rounds.median(f"infer {name}")
        scale = flops[name] / matrix_flops(matrix)
        share = interval([scale / r for r in rounds.ratios(f"train {name}", matrix)])
        rows.append(Row(
            name, counts[name], train_s, infer_s, case.shape[0] / train_s, flops[name] / 1e9,
            flops[name] / train_s / 1e9, share, interval(rounds.ratios(f"train {name}", f"train {ours}")),
            interval(rounds.ratios(f"infer {name}", f"infer {ours}")), peaks.get(name),
        ))  # fmt: skip
    rate = matrix_flops(matrix) / rounds.median(matrix) / 1e9
    return Found(case, rows, absent, len(rounds.seconds[matrix]), matrix, rate)


def peak_memory(
    case: Case, network: Network, built: dict[str, nn.Module], device: torch.device, threads: int
) -> int | None:
    """Bytes of training steps: of a fresh process, or of a GPU's allocator."""
    if device.type != "cuda":
        return peak_of(case.name, network.name, threads)
    x, c_noise, target = case.input(device)
    step = training_step(built[network.name], x, c_noise, target, autocast=True)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    weights = sum(p.numel() * p.element_size() for p in built[network.name].parameters())
    return torch.cuda.max_memory_allocated(device) - before + weights


def bars_of(found: Found) -> list[Bar]:
    """The bars that the case sets."""
    case, (ours, *peers) = found.case, found.rows
    bars = []
    if case.faster is not None:
        timed = [row for row in peers if not case.faster_than or row.network in case.faster_than]
        absent = [name for name in found.absent if not case.faster_than or name in case.faster_than]
        ratios = {row.network: row.train_ratio.median for row in timed}
        bars.append(least_bar(f"{case.name}: training throughput by the fastest peer's", case.faster, ratios, absent))
    if case.share is not None:
        bars.append(Bar(f"{case.name}: share of the matrix-product rate", case.share, ours.share.median))
    if len(case.networks) > 1:
        sizes = {row.network: row.memory_bytes for row in peers if row.memory_bytes}
        leanest = {name: ours.memory_bytes / size for name, size in sizes.items()} if ours.memory_bytes else {}
        bars.append(most_bar(f"{case.name}: peak memory by the leanest peer's", MEMORY_BAR, leanest, found.absent))
    return bars


def print_found(found: Found) -> None:
    rate = f"{found.matrix_gflops:.0f} GFLOP/s ({found.matrix}, median)"
    print(f"\n{found.case.title}; {found.rounds} rounds, machine {rate}")
    print(
        f"{'':34}{'M param.':>9}{'train ms':>10}{'by ours':>9}{'(95 %)':>14}{'samples/s':>11}{'GFLOP':>8}{'GFLOP/s':>9}"
        f"{'of machine':>12}{'infer ms':>10}{'by ours':>9}{'MiB':>8}"
    )
    for row in found.rows:
        bounds = f"{row.train_ratio.low:.2f}..{row.train_ratio.high:.2f}"
        memory = "" if row.memory_bytes is None else f"{row.memory_bytes / 2**20:.0f}"
        print(
            f"{row.network:34}{row.parameters / 1e6:9.2f}{1e3 * row.train_s:10.1f}{row.train_ratio.median:9.2f}"
            f"{bounds:>14}{row.samples_per_s:11.1f}{row.train_gflop:8.1f}{row.train_gflops:9.1f}"
            f"{row.share.median:12.1%}{1e3 * row.infer_s:10.1f}{row.infer_ratio.median:9.2f}{memory:>8}"
        )
    for name in found.absent:
        print(f"{name}: not installed, left out (pip install -c constraints.txt -e '.[bench]')")


def machine(device: torch.device, threads: int) -> dict[str, str | int]:
    """What the numbers depend on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {"machine": name, "threads": threads, "python": platform.python_version(), **versions}


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main(args: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(description="backbones of mmdiff beside those of other projects")
    options.add_argument("--quick", action="store_true", help="fewer rounds: about 4 minutes on two cores")
    options.add_argument("--case", nargs="+", metavar="NAME", help=f"of {', '.join(CASES)}; default all")
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: our networks, bf16, compiled")
    options.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch (default: all cores)")
    options.add_argument("--seconds", type=float, help="of rounds for each case (default: 150, with --quick 35)")
    options.add_argument("--no-memory", action="store_true", help="leave out peak memory, a process for each network")
    options.add_argument("--json", type=Path, metavar="FILE", help="write every number")
    given = options.parse_args(args)
    cases = GPU_CASES if given.device == "cuda" else CASES
    unknown = [name for name in given.case or () if name not in cases]
    if unknown or given.threads < 1:
        options.error(
            f"--case {' '.join(unknown)}: cases are {', '.join(cases)}" if unknown else "--threads is under 1"
        )
    if given.device == "cuda" and not torch.cuda.is_available():
        options.error("--device cuda: torch sees no GPU here")
    device = torch.device(given.device)
    torch.set_num_threads(given.threads)
    about = machine(device, given.threads)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    budget_s = given.seconds or (35.0 if given.quick else 150.0)
    found = []
    for name in given.case or cases:
        found.append(measure_case(cases[name], device, budget_s, given.threads, not given.no_memory))
        print_found(found[-1])
    bars = [bar for one in found for bar in bars_of(one)]
    print_bars(bars)
    if given.json:
        tables = {one.case.name: [asdict(row) for row in one.rows] for one in found}
        lines = [{**asdict(bar), "verdict": bar.verdict} for bar in bars]
        given.json.write_text(json.dumps({"about": about, "cases": tables, "bars": lines}, indent=1) + "\n", "utf-8")
    return exit_status(bars)


if __name__ == "__main__":
    sys.exit(main())
