"""Averages of the weights on two processes, whole or sharded: those of one process, on every rank, also resumed."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmdiff.post_hoc import Profile, file_name, read
from tests.conftest import ROOT

SCRIPT = ROOT / "tests" / "ema_ranks.py"


def run(folder: Path, kind: str) -> list[dict[str, dict[str, Any]]]:
    """What each process has of each training, by its name."""
    launch = [] if kind == "one" else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [sys.executable, *launch, str(SCRIPT), kind, str(folder)], capture_output=True, text=True, timeout=280,
        check=False, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [
        {name: torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for name in ("rest", "whole")}
        for rank in range(1 if kind == "one" else 2)
    ]


def expect_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def expect_exact(trained: dict[str, dict[str, Any]]) -> None:
    """The average is the sum over all steps; the resumed run has it bit for bit, and validation saw it."""
    whole, rest = trained["whole"], trained["rest"]
    assert len(whole["steps"]) == 12
    shares = Profile(0.1, 12).shares(1, 12)
    for name, value in whole["averages"][0].items():
        brute = sum(share * weights[name].double() for share, weights in zip(shares, whole["steps"], strict=True))
        torch.testing.assert_close(value.double(), brute, rtol=0, atol=1e-6)
    for place in (0, 1):
        expect_equal(rest["averages"][place], whole["averages"][place])
    expect_equal(rest["steps"][-1], whole["steps"][-1])
    expect_equal(whole["seen"][-2], whole["averages"][0])  # at the last validation batch
    expect_equal(whole["seen"][-1], whole["steps"][-1])  # and the raw weights after it
    assert "model.denoiser.backbone.stem.bias" not in whole["averages"][0]  # frozen


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return run(tmp_path_factory.mktemp("one"), "one")[0]


@pytest.mark.parametrize("kind", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_averages_are_exact_on_both_ranks(kind: str, tmp_path: Path, one: dict[str, dict[str, Any]]) -> None:
    """Both strategies: python -m pytest --slow tests/test_ema_ranks.py"""
    expect_exact(one)
    ranks = run(tmp_path, kind)
    averages = ranks[0]["whole"]["averages"]
    for rank in ranks:
        expect_exact(rank)
        for place in (0, 1):
            expect_equal(rank["whole"]["averages"][place], averages[place])
            torch.testing.assert_close(averages[place], one["whole"]["averages"][place], rtol=0, atol=1e-6)
    # Files and checkpoints are of whole tensors, whatever the strategy.
    kept = read(tmp_path / "whole" / "averages" / file_name(0.1, 12), averages[0])
    expect_equal({name: kept(name) for name in averages[0]}, averages[0])
    state = torch.load(tmp_path / "whole" / "12.ckpt", weights_only=True)["callbacks"]
    expect_equal(state["EMA[width=0.1]"]["average"], averages[0])
    expect_equal(state["EMA[decay=0.9]"]["average"], averages[1])
    assert state["EMA[width=0.1]"]["kept"] == [2, 4, 6, 8, 10, 12]
