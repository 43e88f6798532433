"""The examples for clusters: a batch script of SLURM runs, is stopped and goes on; layers of configs; sweeps.

All: python -m pytest --slow tests/test_cluster.py
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmdiff.io import read_config
from tests.test_data_prepare import children

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted([*(ROOT / "examples" / "cluster").glob("*.sbatch"), *(ROOT / "scripts" / "sweep").glob("*.sh")])

# What `srun` and `scontrol` do in the examples, on one machine: tasks with SLURM's variables, the worst exit status.
SRUN = """#!/bin/bash
while [[ "$1" == --* ]]; do shift; done
for rank in $(seq 0 $((SLURM_NTASKS - 1))); do
  SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NODEID=0 "$@" &
  tasks[$rank]=$!
done
worst=0
for task in "${tasks[@]}"; do wait "$task"; status=$?; ((status > worst)) && worst=$status; done
exit $worst
"""
SCONTROL = """#!/bin/bash
echo "$@" >> "$ASKED"
"""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_shell(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_layers_change_the_trainer_alone() -> None:
    layers = {path.stem: read_config(path) for path in (ROOT / "examples" / "cluster").glob("*.yaml")}
    assert {name: set(tree) for name, tree in layers.items()} == {"ddp": {"trainer"}, "fsdp2": {"trainer"}}
    assert layers["fsdp2"]["trainer"]["strategy"]["init_args"]["tensor_parallel_size"] == 1


def slurm(folder: Path, *words: str) -> subprocess.Popen[str]:
    """Starts train.sbatch as SLURM would, on one machine with two tasks."""
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    path = f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    job = {"SLURM_NNODES": "1", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_ID": "4242"}
    job |= {"SLURM_NODELIST": "127.0.0.1", "SLURM_JOB_NAME": "mmdiff", "ASKED": str(folder / "asked")}
    command = ["bash", str(ROOT / "examples" / "cluster" / "train.sbatch"), *words, "--trainer.accelerator", "cpu"]
    return subprocess.Popen(
        command, cwd=folder, env={**os.environ, **job, "PATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def steps(folder: Path) -> int:
    """Optimizer steps that the run's history tells of."""
    lines = [line for path in folder.rglob("history.jsonl") for line in path.read_text().splitlines()]
    return max([json.loads(line)["step"] for line in lines if line.endswith("}")], default=0)


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["ddp", "fsdp2"])
def test_a_job_that_is_preempted_is_queued_again_and_goes_on(layer: str, tmp_path: Path) -> None:
    words = [
        "-c",
        str(ROOT / "configs" / "tiny" / "video.yaml"),
        "-c",
        str(ROOT / "examples/cluster" / f"{layer}.yaml"),
    ]
    words += [
        "--trainer.max_steps",
        "60",
        "--trainer.val_check_interval",
        "16",
        "--trainer.enable_progress_bar",
        "false",
    ]
    if layer == "fsdp2":
        words += ["--trainer.strategy.init_args.data_parallel_size", "2"]
    job = slurm(tmp_path, *words)
    while steps(tmp_path) < 10 and job.poll() is None:
        time.sleep(0.1)
    for child in children(job.pid):
        if b"mmdiff" in (line := (Path("/proc") / str(child) / "cmdline").read_bytes()) and b"python" in line:
            os.kill(child, signal.SIGTERM)
    said = job.communicate(timeout=100)[0]
    assert job.returncode == 143, said[-3000:]
    assert (tmp_path / "asked").read_text() == "requeue 4242\n"
    reached = steps(tmp_path)
    assert 10 <= reached < 60

    job = slurm(tmp_path, *words)
    said = job.communicate(timeout=200)[0]
    assert job.returncode == 0, said[-3000:]
    assert "--resume: goes on in" in said
    assert steps(tmp_path) >= 59
    assert len(list(tmp_path.rglob("history.jsonl"))) == 1, "the run did not go on in its own folder"


@pytest.mark.slow
def test_ray_tune_finds_the_better_setting(tmp_path: Path) -> None:
    pytest.importorskip("ray.tune")
    words = ["-c", str(ROOT / "configs" / "tiny" / "audio.yaml"), "--trials", "2", "--gpus", "0", "--out", "runs"]
    words += ["--choice", "trainer.max_steps=8", "--choice", "trainer.val_check_interval=8"]
    words += ["--log", "model.init_args.optimizer.init_args.lr=0.0001:0.01"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "sweep" / "ray_tune.py"), *words], cwd=tmp_path, capture_output=True,
        text=True, timeout=280, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (last,) = [line for line in done.stdout.splitlines() if line.startswith('{"best"')]
    found = json.loads(last)
    assert found["val/loss"] > 0
    assert 0.0001 <= found["best"]["model.init_args.optimizer.init_args.lr"] <= 0.01
    assert len(list((tmp_path / "runs").glob("max_steps=8*"))) == 2
