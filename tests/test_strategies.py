"""Lightning's strategies on two processes: one process's losses, gradients and weights; uneven data; checkpoints.

All: python -m pytest --slow tests/test_strategies.py
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mmdiff.backbones import UNet
from mmdiff.checkpoint import AtomicCheckpointIO
from mmdiff.processes import Places, shared, summed
from mmdiff.sharding import blocks, shard
from tests.spread_cases import CASES, train

ROOT = Path(__file__).resolve().parent.parent
KINDS = ["ddp", "fsdp2"]
Kept = dict[str, Any]


def spread(folder: Path, runs: list[str]) -> dict[str, list[Kept]]:
    """What both processes kept of each run, started by torchrun on two."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, "-m", "tests.spread_cases", str(folder), *runs],
        cwd=ROOT, capture_output=True, text=True, timeout=250, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[:4000]
    return {run: [torch.load(folder / f"{run}-{rank}.pt") for rank in (0, 1)] for run in runs}


def assert_close(found: Kept, expected: Kept, tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance, msg=name)


def assert_as_one_process(folder: Path, run: str, both: list[Kept]) -> None:
    """Losses, held-out losses, gradients, weights and those of the checkpoint within 1e-6 of one process's."""
    kind, _, name = run.partition("-")
    alone = train(name, folder / "alone.ckpt")
    for found in both:
        assert found["val"] == pytest.approx(alone["val"], rel=0, abs=1e-6), run
        for mine, theirs in zip(found["weights"], alone["weights"], strict=True):
            assert_close(mine, theirs)
        if name != "autoencoder":  # which logs losses of its own process, and averages gradients after they are kept
            assert len(found["loss"]) == 2 * len(CASES[name][1])
            assert found["loss"] == pytest.approx(alone["loss"], rel=0, abs=1e-6), run
            for mine, theirs in zip(found["gradients"], alone["gradients"], strict=True):
                assert_close(mine, theirs)
        if kind == "fsdp2":
            assert found["sharded"][0] == len(alone["gradients"][0]), "some weight is whole on every process"
    files = (folder / f"{run}.ckpt", folder / "alone.ckpt")
    assert_close(*[AtomicCheckpointIO().load_checkpoint(file)["state_dict"] for file in files])


def assert_in_step(both: list[Kept], steps: int) -> None:
    """Both processes took all steps, know the same mean losses, and have the same weights."""
    first, second = both
    assert len(first["loss"]) == steps
    assert torch.tensor(first["loss"]).isfinite().all()
    assert first["loss"] == second["loss"]
    assert len(first["val"]) == len(second["val"]) == 3
    assert first["val"] == second["val"]
    assert_close(first["weights"][0], second["weights"][0], 0.0)


def test_two_processes_learn_what_one_does_and_are_never_stuck(tmp_path: Path) -> None:
    """Uneven batches, odd frame counts, padding, conditions dropped; both go on from their checkpoint."""
    found = spread(tmp_path, ["ddp-unet1d", "fsdp2-dit3d", "ddp-12", "ddp-lopsided", "fsdp2-lopsided"])
    assert_in_step(found.pop("ddp-12"), 12)
    for kind in KINDS:
        for process in found.pop(f"{kind}-lopsided"):
            train, held_out = process["said"]
            assert "the processes have [[2], [1]] training batches, and those with more would wait for" in train
            assert held_out == "" if kind == "ddp" else "have [[2], [1]] held-out batches" in held_out
    for run, both in found.items():
        assert_as_one_process(tmp_path, run, both)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_learn_what_one_does_with_every_network(kind: str, tmp_path: Path) -> None:
    found = spread(tmp_path, [f"{kind}-{name}" for name in CASES])
    first, second = found.pop(f"{kind}-adaptive autoencoder")
    assert_close(first["weights"][-1], second["weights"][-1], 0.0)
    assert first["val"][-1] < first["val"][0]
    for run, both in found.items():
        assert_as_one_process(tmp_path, run, both)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_uneven_data_is_never_stuck_in_100_steps(kind: str, tmp_path: Path) -> None:
    """Sizes, lengths, padding and captions of each process its own, all conditions of a batch dropped now and then."""
    assert_in_step(spread(tmp_path, [f"{kind}-100"])[f"{kind}-100"], 100)


def test_layers_are_not_split() -> None:
    """Lightning's default of tensor_parallel_size is all processes of a machine."""
    mesh: Any = {"tensor_parallel": SimpleNamespace(size=lambda: 2)}
    with pytest.raises(ValueError, match="tensor_parallel_size=2, but the networks do not split their layers: set"):
        shard(nn.Linear(2, 2), mesh)


def test_blocks_are_the_outermost_members_of_lists() -> None:
    net = UNet(1, 1, channels=8, multipliers=(1, 2), blocks=2, attend=[[], [[0]]], head_channels=4)
    found = blocks(net)
    every = [part for lists in (net.down, net.up) for level in lists for part in level]  # type: ignore[union-attr]
    assert {id(part) for part in found} == {id(part) for part in [*every, *net.middle, *net.shrink, *net.grow]}
    assert blocks(nn.Sequential(nn.Linear(2, 2))) == []


def test_a_process_alone_has_all_places_and_sums() -> None:
    value = torch.ones(2)
    assert Places()(5) == (0, 5)
    assert summed(value) is value
    assert shared(value) is value
