"""Signals, lost processes, and the command that goes on: what `mmdiff fit` does when it is told to stop, or has to."""

import os
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmdiff.__main__ import guarded
from mmdiff.callbacks.signals import StopSignals
from mmdiff.data.loader import WorkerError
from mmdiff.exits import NonFiniteError, Stopped
from tests.survivors import (
    FRAMES,
    assert_same_run,
    final,
    finish,
    fit,
    log,
    losses,
    part,
    start,
    write_config,
)

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
SAVES = {"steps": 50, "minutes": None}
TWO = {"strategy": part("lightning.pytorch.strategies.DDPStrategy", timeout="0:00:10"), "devices": 2}


def begun(folder: Path, processes: list[BaseProcess], batch: int) -> None:
    """Waits until this batch has been trained."""
    path, until = folder / "losses.jsonl", time.monotonic() + 100
    while not path.exists() or max((b for b, _ in losses(folder)), default=-1) < batch:
        assert time.monotonic() < until, log(folder)
        assert all(one.is_alive() for one in processes), log(folder)
        time.sleep(0.005)


def started(folder: Path, *args: str, ranks: int = 1) -> list[BaseProcess]:
    command = ["fit", "--trust-config-imports", "tests", "-c", str(folder / "config.yaml"), *args]
    return start(folder, *command, ranks=ranks)


def stopped(folder: Path, signum: signal.Signals, batch: int, ranks: int = 1) -> list[int | None]:
    processes = started(folder, "--resume", ranks=ranks)
    begun(folder, processes, batch)
    pid = processes[0].pid
    assert pid is not None
    os.kill(pid, signum)
    return finish(processes)


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "runs").rglob("resume-*.ckpt"))


def test_signals_save_and_exit_and_the_same_command_goes_on_exactly(tmp_path: Path) -> None:
    data = part(FRAMES["class_path"], **FRAMES["init_args"], num_workers=1)
    settings: dict[str, Any] = {"accumulate_grad_batches": 3, "max_steps": 12, "saves": SAVES}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    write_config(whole, "dit", data, **settings)
    write_config(cut, "dit", data, **settings)
    assert fit(whole) == [0]
    assert stopped(cut, signal.SIGTERM, 4) == [143]
    assert "no whole checkpoint of this config in" in log(cut)
    assert "stopped by SIGTERM; saved" in log(cut)
    assert len(saved(cut)) == 1
    assert stopped(cut, signal.SIGINT, 20) == [130]
    assert len(saved(cut)) == 2
    assert fit(cut, "--resume") == [0]
    assert_same_run(whole, cut)
    assert len(saved(cut)) == 2, "the newest two stay"
    assert fit(cut, "--resume") == [0], "nothing is left to do"
    assert_same_run(whole, cut)
    [run] = {path.parents[1] for path in (cut / "runs").rglob("*.ckpt")}
    assert yaml.safe_load((run / "config.yaml").read_text())["ckpt_path"] is None, "the config stays as it was given"
    events = EventAccumulator(str(run)).Reload()
    steps = [event.step for event in events.Scalars("train/loss")]
    assert steps == list(range(12)), "each step once, over four processes"


def test_a_validation_that_is_stopped_runs_anew(tmp_path: Path) -> None:
    """A GAN with its averages in the place of its weights; the latents' statistics come of the validation."""
    data = part(FRAMES["class_path"], **(FRAMES["init_args"] | {"val_count": 8}))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        config = yaml.safe_load(write_config(folder, "gan", data, saves=SAVES, max_steps=6).read_text())
        pause = part("tests.survivors.Pause", path=str(folder / "validating"))
        config["trainer"]["callbacks"].insert(0, pause)
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (whole / "validating").touch()
    assert fit(whole) == [0]
    processes = started(cut)
    while not (cut / "validating").exists():
        assert processes[0].is_alive(), log(cut)
        time.sleep(0.01)
    assert processes[0].pid is not None
    os.kill(processes[0].pid, signal.SIGTERM)
    assert finish(processes) == [143]
    assert saved(cut) == ["resume-1.ckpt"], "of five batches, three to a step"
    assert fit(cut, "--resume") == [0]
    assert_same_run(whole, cut)


def test_a_signal_to_all_processes_of_the_job_leaves_workers_to_finish_the_step(tmp_path: Path) -> None:
    data = part(FRAMES["class_path"], **FRAMES["init_args"], num_workers=2)
    write_config(tmp_path, "unet3d", data, saves=SAVES, max_steps=500, accumulate_grad_batches=5)
    processes = started(tmp_path)
    begun(tmp_path, processes, 6)
    pid = processes[0].pid
    children = Path(f"/proc/{pid}/task/{pid}/children")
    if not children.exists():
        pytest.skip("needs /proc")
    assert pid is not None
    for child in [pid, *map(int, children.read_text().split())]:
        os.kill(child, signal.SIGTERM)
    assert finish(processes) == [143], log(tmp_path)
    assert final(tmp_path)["global_step"] >= 1


def test_a_second_signal_and_one_before_training_do_not_wait() -> None:
    before = signal.getsignal(signal.SIGINT)  # ignored in the background of a shell
    signals = StopSignals()
    signals.install()
    try:
        with pytest.raises(Stopped, match="stopped by SIGTERM; nothing was to be saved yet"):
            os.kill(os.getpid(), signal.SIGTERM)
        signals.held = True
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        with pytest.raises(Stopped) as stop:
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.value.status == 143
    finally:
        signals.restore()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_to_one_of_two_processes_stops_both_and_both_go_on_exactly(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        write_config(folder, "unet3d", FRAMES, saves=SAVES, max_steps=12, accumulate_grad_batches=2, **TWO)
    assert fit(whole, ranks=2) == [0, 0], log(whole)
    assert stopped(cut, signal.SIGTERM, 3, ranks=2) == [143, 143], log(cut)
    assert len(saved(cut)) == 1
    assert fit(cut, "--resume", ranks=2) == [0, 0], log(cut)
    assert_same_run(whole, cut)


@pytest.mark.parametrize("signum", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_process_that_is_gone_or_hangs_is_named_within_the_timeout(tmp_path: Path, signum: signal.Signals) -> None:
    write_config(tmp_path, "unet3d", FRAMES, saves=SAVES, max_steps=100000, **TWO)
    processes = started(tmp_path, ranks=2)
    begun(tmp_path, processes, 3)
    assert processes[1].pid is not None
    os.kill(processes[1].pid, signum)
    since = time.monotonic()
    assert finish(processes[:1], 60) == [3], log(tmp_path)
    assert time.monotonic() - since < (15 if signum == signal.SIGKILL else 45)
    assert "rank 0: another process ended, or gave nothing within 10 s" in (tmp_path / "log0.txt").read_text()
    processes[1].kill()
    processes[1].join()


def test_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    def ends(error: BaseException) -> int:
        def command(args: list[str]) -> int:
            raise error

        return guarded("fit", command, [])

    assert ends(ValueError("wrong")) == 2
    assert ends(WorkerError("a worker")) == 3
    assert ends(NonFiniteError("nan")) == 4
    assert ends(OSError(28, "no room")) == 5
    assert ends(Stopped(signal.SIGTERM)) == 143
    assert ends(Stopped(signal.SIGINT)) == 130
    assert len(capsys.readouterr().err.splitlines()) == 6, "one line each"


def test_resume_takes_runs_of_the_same_config_alone(tmp_path: Path) -> None:
    """Two configs share a folder of runs; a changed rate is another run, another number of workers is not."""
    write_config(tmp_path, "foreign", FRAMES, saves=SAVES, max_steps=2)
    assert fit(tmp_path) == [0]
    other = part(FRAMES["class_path"], **(FRAMES["init_args"] | {"fps": 8.0}))
    write_config(tmp_path, "foreign", other, saves=SAVES, max_steps=2)
    assert fit(tmp_path, "--resume") == [0]
    runs = tmp_path / "runs" / "lightning_logs"
    assert sorted(path.name for path in runs.iterdir()) == ["version_0", "version_1"]
    workers = part(FRAMES["class_path"], **FRAMES["init_args"], num_workers=1)
    write_config(tmp_path, "foreign", workers, saves=SAVES, max_steps=4)
    assert fit(tmp_path, "--resume") == [0]
    assert sorted(path.name for path in (runs / "version_0" / "checkpoints").iterdir()) == [
        "resume-2.ckpt",
        "resume-4.ckpt",
    ]
    assert fit(tmp_path, "--resume", str(runs / "version_1")) == [0], "a folder is taken as it is"
    assert torch.load(runs / "version_1" / "checkpoints" / "resume-4.ckpt", weights_only=True)["global_step"] == 4
    assert fit(tmp_path, "--resume", "--ckpt_path", "x.ckpt") == [2]
    assert "--resume and ckpt_path=x.ckpt both say where to go on; give one of them" in log(tmp_path)
