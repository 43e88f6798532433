"""Checkpoints that are torn, changed, too many, or too large for the disk."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel

from mmdiff import checkpoint as module
from mmdiff.__main__ import guarded
from mmdiff.callbacks import Checkpoints
from mmdiff.checkpoint import AtomicCheckpointIO, verify
from mmdiff.resume import find, identity
from tests.survivors import assert_same


def state(step: int, **config: Any) -> dict[str, Any]:
    """What a trainer keeps, as far as a resume looks at it."""
    return {
        "state_dict": {"w": torch.full((300,), float(step)), "b": torch.arange(7)},
        "optimizer_states": [], "global_step": step, "config": {"model": {"lr": 1}, **config},
        "loops": {"fit_loop": {"epoch_loop.state_dict": {"_batches_that_stepped": step - 1}}},
    }  # fmt: skip


def saved(path: Path, step: int, **config: Any) -> Path:
    AtomicCheckpointIO().save_checkpoint(state(step, **config), path)
    os.utime(path, ns=(step * 10**9, step * 10**9))
    return path


def test_every_changed_byte_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    path, rng = saved(tmp_path / "a.ckpt", 5), random.Random(0)
    whole, io = path.read_bytes(), AtomicCheckpointIO()
    refused = 0
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << rng.randrange(8))]) + whole[place + 1 :])
        try:
            loaded = io.load_checkpoint(path)
        except ValueError as error:
            refused += "a.ckpt is broken" in str(error)
        else:
            assert_same(loaded, state(5), f"byte {place}")
    assert refused > len(whole) / 6, "most of the file is what was saved, and padding"


def test_every_torn_file_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.ckpt", 5)
    whole = path.read_bytes()
    for length in range(0, len(whole), 41):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="a.ckpt is broken"):
            verify(path)


def test_a_changed_record_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.ckpt", 5)
    data = path.read_bytes()
    place = data.index(torch.full((3,), 5.0).numpy().tobytes())
    path.write_bytes(data[:place] + b"\x01" + data[place + 1 :])
    with pytest.raises(
        ValueError, match=r"a\.ckpt is broken, .*the record \w+/data/\d has changed since it was written"
    ):
        AtomicCheckpointIO().load_checkpoint(path)


def test_the_newest_whole_one_of_the_config_is_found(tmp_path: Path) -> None:
    run = tmp_path / "lightning_logs" / "version_3"
    paths = [saved(run / "checkpoints" / f"resume-{step}.ckpt", step) for step in (1, 2, 3)]
    config = {"model": {"lr": 1}, "data": None, "seed_everything": None, "trainer": {"max_steps": 9}}
    found = find([tmp_path], config)
    assert found is not None
    assert (found.checkpoint, found.run, found.step, found.logged) == (paths[2].resolve(), run.resolve(), 3, 2)
    paths[2].write_bytes(paths[2].read_bytes()[:-1000])
    os.utime(paths[2], ns=(3 * 10**9, 3 * 10**9))
    with pytest.warns(UserWarning, match=r"resume-3\.ckpt is broken.*looking at the next newest"):
        found = find([tmp_path], config)
    assert found is not None
    assert found.step == 2
    weights = tmp_path / "weights.ckpt"  # of the weights alone, and newer
    AtomicCheckpointIO().save_checkpoint({"state_dict": {}, "global_step": 9}, weights)
    saved(tmp_path / "checkpoints" / "other.ckpt", 9, data="others")
    paths[2].unlink()
    found = find([tmp_path], config)
    assert found is not None
    assert found.step == 2
    any_config = find([tmp_path], None)
    assert any_config is not None
    assert any_config.step == 9
    assert find([tmp_path], {"model": {"lr": 2}}) is None
    assert find([tmp_path / "nowhere"], None) is None


def test_configs_are_the_same_but_for_the_number_of_workers() -> None:
    def config(workers: int, size: int) -> dict[str, Any]:
        return {"model": 1, "data": {"init_args": {"num_workers": workers, "sizes": [size]}}, "trainer": workers}

    assert identity(config(0, 2)) == identity(config(4, 2))
    assert identity(config(0, 2)) != identity(config(0, 3))


def test_old_ones_are_deleted_and_nobody_elses(tmp_path: Path) -> None:
    saves = Checkpoints(minutes=None, steps=2, keep=2)
    others = ModelCheckpoint(tmp_path / "checkpoints", "{step}", every_n_train_steps=3, save_top_k=-1)
    trainer = pl.Trainer(
        max_steps=9, accelerator="cpu", logger=False, default_root_dir=tmp_path, callbacks=[saves, others],
        enable_progress_bar=False, enable_model_summary=False, plugins=[AtomicCheckpointIO()], limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(BoringModel())
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["resume-8.ckpt", "resume-9.ckpt", "step=3.ckpt", "step=6.ckpt", "step=9.ckpt"]


def test_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    class Tick(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            now[0] += 60.0  # a minute a step

    monkeypatch.setattr("mmdiff.callbacks.checkpoints.time.monotonic", lambda: now[0])
    trainer = pl.Trainer(
        max_steps=8, accelerator="cpu", logger=False, default_root_dir=tmp_path, plugins=[AtomicCheckpointIO()],
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        callbacks=[Tick(), Checkpoints(minutes=3.0, keep=9)],
    )  # fmt: skip
    trainer.fit(BoringModel())
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["resume-3.ckpt", "resume-6.ckpt", "resume-8.ckpt"]


@pytest.mark.parametrize("name", ["minutes", "steps", "keep"])
def test_numbers_that_are_not_above_0_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}=0 must be above 0"):
        Checkpoints(**{name: 0})


class Full:
    """A file on a disk with room for so many bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def __enter__(self) -> "Full":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def write(self, data: Any) -> int:
        self.room -= memoryview(data).nbytes
        if self.room < 0:
            raise OSError(28, "No space left on device")
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()

    def fileno(self) -> int:
        return self.file.fileno()


@pytest.mark.parametrize("room", [0, 700, 2000])
def test_a_full_disk_keeps_the_last_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    path = saved(tmp_path / "a.ckpt", 5)
    monkeypatch.setattr(module, "open", lambda fd, mode: Full(os.fdopen(fd, mode), room), raising=False)
    with pytest.raises(OSError, match=r"no room for .*a\.ckpt: the checkpoints before it are whole; make room"):
        AtomicCheckpointIO().save_checkpoint(state(6), path)
    assert AtomicCheckpointIO().load_checkpoint(path)["global_step"] == 5
    assert [one.name for one in tmp_path.iterdir()] == ["a.ckpt"], "nothing is left behind"


def test_a_run_on_a_full_disk_ends_in_one_line_and_its_own_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a disk of one megabyte, where this user may make one; a checkpoint takes a third of it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if sys.platform != "linux" or mount is None:
        pytest.skip("needs mount")
    made = subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("may not mount a disk")
    try:

        def command(args: list[str]) -> int:
            model = BoringModel()
            model.register_buffer("ballast", torch.zeros(80_000))
            trainer = pl.Trainer(
                max_steps=9, accelerator="cpu", logger=False, default_root_dir=disk, plugins=[AtomicCheckpointIO()],
                enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
                callbacks=[Checkpoints(minutes=None, steps=1, keep=9)],
            )  # fmt: skip
            trainer.fit(model)
            return 0

        capsys.readouterr()
        assert guarded("fit", command, []) == 5
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mmdiff fit: error")]
        assert len(lines) == 1
        names = sorted(path.name for path in (disk / "checkpoints").iterdir())
        assert names == ["resume-1.ckpt", "resume-2.ckpt", "resume-3.ckpt"]
        for name in names:
            verify(disk / "checkpoints" / name)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
