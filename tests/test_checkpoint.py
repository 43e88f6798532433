"""Checkpoints survive a kill, load no objects, and stay local."""

import os
import pickle
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mmdiff.checkpoint import AtomicCheckpointIO

FORKER = """
import os, signal, sys, time, torch
from mmdiff.checkpoint import AtomicCheckpointIO
torch.set_num_threads(1)
n = 0
AtomicCheckpointIO().save_checkpoint({"n": 0, "w": torch.zeros(500_000)}, sys.argv[1])
for line in sys.stdin:
    n += 1000
    child = os.fork()
    if child == 0:
        io = AtomicCheckpointIO()
        while True:
            n += 1
            io.save_checkpoint({"n": n, "w": torch.full((500_000,), float(n))}, sys.argv[1])
    time.sleep(float(line))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print("killed", flush=True)
"""


def test_saves_and_loads_what_a_trainer_keeps(tmp_path: Path) -> None:
    io, path = AtomicCheckpointIO(), tmp_path / "deep" / "er" / "a.ckpt"
    io.save_checkpoint({"w": torch.arange(3), "loops": {"step": 3, "name": "x"}}, path)
    loaded = io.load_checkpoint(path, weights_only=None)
    assert torch.equal(loaded["w"], torch.arange(3))
    assert loaded["loops"] == {"step": 3, "name": "x"}
    assert [entry.name for entry in path.parent.iterdir()] == ["a.ckpt"]
    io.remove_checkpoint(path)
    assert not path.exists()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    path, rng = tmp_path / "last.ckpt", random.Random(0)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    io = AtomicCheckpointIO()
    # Forked rather than started anew, for importing torch takes seconds.
    parent = subprocess.Popen(
        [sys.executable, "-c", FORKER, str(path)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdin
    assert parent.stdout
    try:
        for _ in range(15):
            parent.stdin.write(f"{0.01 + 0.06 * rng.random()}\n")
            parent.stdin.flush()
            assert parent.stdout.readline().strip() == "killed"
            checkpoint = io.load_checkpoint(path)
            assert bool((checkpoint["w"] == checkpoint["n"]).all())
    finally:
        parent.stdin.close()
        parent.wait(timeout=10)


def test_leftovers_of_killed_runs_are_swept(tmp_path: Path) -> None:
    old, new = tmp_path / ".inprogress-old", tmp_path / ".inprogress-new"
    old.write_bytes(b"x")
    os.utime(old, (time.time() - 60, time.time() - 60))
    io = AtomicCheckpointIO()
    new.write_bytes(b"x")
    os.utime(new, (time.time() + 1, time.time() + 1))
    io.save_checkpoint({}, tmp_path / "a.ckpt")
    assert not old.exists()
    assert new.exists()


def test_a_failed_save_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    io, path = AtomicCheckpointIO(), tmp_path / "a.ckpt"
    io.save_checkpoint({"n": 1}, path)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        io.save_checkpoint({"f": lambda: None}, path)
    assert io.load_checkpoint(path) == {"n": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.ckpt"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX modes")
def test_the_users_umask_decides_who_reads_it(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    AtomicCheckpointIO().save_checkpoint({}, tmp_path / "a.ckpt")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "a.ckpt")]
    assert modes[0] == modes[1]


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.marker),)


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    io, marker = AtomicCheckpointIO(), tmp_path / "marker"
    torch.save({"state_dict": {}, "hyper_parameters": Evil(marker)}, tmp_path / "a.ckpt")
    (tmp_path / "b.ckpt").write_bytes(pickle.dumps(Evil(marker)))
    for name in ("a.ckpt", "b.ckpt"):
        with pytest.raises(ValueError, match=f"{name} is broken, or holds more than tensors"):
            io.load_checkpoint(tmp_path / name)
        with pytest.raises(
            ValueError, match="weights_only must be True: without it a checkpoint could run its own code"
        ):
            io.load_checkpoint(tmp_path / name, weights_only=False)
    assert not marker.exists()


def test_broken_absent_and_remote_files_are_refused(tmp_path: Path) -> None:
    io, path = AtomicCheckpointIO(), tmp_path / "a.ckpt"
    io.save_checkpoint({"w": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(ValueError, match="a.ckpt is broken"):
        io.load_checkpoint(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="a.ckpt is broken"):
        io.load_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="no such checkpoint: .*b.ckpt"):
        io.load_checkpoint(tmp_path / "b.ckpt")
    for call in (io.load_checkpoint, io.remove_checkpoint, lambda url: io.save_checkpoint({}, url)):
        with pytest.raises(ValueError, match="'https://example.org/a.ckpt' is a URL"):
            call("https://example.org/a.ckpt")
    with pytest.raises(ValueError, match="take no options"):
        io.save_checkpoint({}, path, storage_options={})


def test_a_trainer_uses_it_and_resumes(tmp_path: Path) -> None:
    import lightning.pytorch as pl
    from lightning.pytorch.demos.boring_classes import BoringModel

    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options |= {
        "default_root_dir": tmp_path,
        "limit_train_batches": 2,
        "limit_val_batches": 0,
        "plugins": AtomicCheckpointIO(),
    }
    trainer = pl.Trainer(max_epochs=1, **options)
    trainer.fit(BoringModel())
    [path] = tmp_path.rglob("*.ckpt")
    trainer = pl.Trainer(max_epochs=2, **(options | {"plugins": AtomicCheckpointIO()}))
    trainer.fit(BoringModel(), ckpt_path=str(path))
    assert trainer.global_step == 4
