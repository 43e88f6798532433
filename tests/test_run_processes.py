"""The folder of a run of two processes: one file of each kind, and curves of all items."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mmdiff.run.history import Curve, read_history
from mmdiff.run.record import read_record
from mmdiff.run.samples import read_shots

ROOT = Path(__file__).resolve().parent.parent


PARTS = '{"class_path": "lightning.pytorch.strategies.ModelParallelStrategy", "init_args": {"tensor_parallel_size": 1, '
STRATEGIES = {"DDPStrategy": "ddp", "ModelParallelStrategy": PARTS + '"data_parallel_size": 2}}'}


def fit(folder: Path, processes: int, batch: int, *more: str, strategy: str = "auto") -> Path:
    config = str(ROOT / "configs" / "tiny" / "video.yaml")
    settings = ["--trainer.max_steps=6", "--trainer.val_check_interval=3", "--trainer.log_every_n_steps=2"]
    settings += ["--trainer.accelerator=cpu", f"--trainer.devices={processes}", "--trainer.enable_progress_bar=false"]
    settings += ["--data.init_args.count=48", "--data.init_args.val_count=8", f"--data.init_args.batch_size={batch}"]
    command = [sys.executable, "-m", "mmdiff", "fit", "-c", config, *settings, f"--trainer.default_root_dir={folder}"]
    command += [f"--trainer.strategy={strategy}", *more]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return max((folder / "lightning_logs").iterdir())


def assert_close(curve: Curve, other: Curve) -> None:
    assert [step for step, _ in curve] == [step for step, _ in other]
    assert [value for _, value in curve] == pytest.approx([value for _, value in other], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_log_what_one_with_their_items_does(strategy: str, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    single, double = fit(one, 1, 8), fit(two, 2, 4, strategy=STRATEGIES[strategy])
    alone, together = read_history(single), read_history(double)
    starts = ("train_at/", "val_at/", "train/loss", "val/loss", "ema/distance")
    names = [name for name in alone if name.startswith(starts)]
    assert len(names) > 6
    for name in names:
        assert_close(together[name], alone[name])
    assert [step for step, _ in together["speed/items_per_s"]] == [2, 4, 6]
    (launch,) = read_record(double)["launches"]
    assert (launch["processes"], launch["strategy"], launch["status"]) == (2, strategy, "finished")
    assert [shot.step for shot in read_shots(double)] == [3, 6]
    assert set(read_shots(double)[0].files) == {"raw", "ema"}
    assert (double / "report.html").is_file()


@pytest.mark.slow
def test_what_two_processes_gathered_goes_on_after_a_resume(tmp_path: Path) -> None:
    """From step 3, between two steps that log."""
    saver = {"dirpath": str(tmp_path), "filename": "{step}", "every_n_train_steps": 3, "save_top_k": -1}
    part = json.dumps({"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": saver})
    settings = ["--trainer.val_check_interval=6", f"--trainer.callbacks+={part}"]
    whole = read_history(fit(tmp_path, 2, 4, *settings, strategy="ddp"))
    saved = f"--ckpt_path={tmp_path / 'step=3.ckpt'}"
    resumed = read_history(fit(tmp_path, 2, 4, *settings, saved, strategy="ddp"))
    names = [name for name in resumed if name.startswith(("train_at/", "train/loss"))]
    assert len(names) > 3
    for name in names:
        assert resumed[name] == [point for point in whole[name] if point[0] > 3]
