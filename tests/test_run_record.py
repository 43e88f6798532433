"""The record of a run: where it came from, how it ended, and what it can be compared by."""

import json
import subprocess
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

import mmdiff
from mmdiff.callbacks import History, Monitor, RunRecord
from mmdiff.data.items import Item
from mmdiff.run.record import DIFF, captions, data_record, fingerprint_items, git_states, read_record, versions
from video.render import WorldDataModule


class Mean(pl.LightningModule):
    """Learns the mean of its clips; `fails_at` a step."""

    def __init__(self, fails_at: int = -1) -> None:
        super().__init__()
        self.weight, self.fails_at = nn.Parameter(torch.zeros(1)), fails_at
        self.frozen = nn.Parameter(torch.zeros(4), requires_grad=False)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        if self.global_step == self.fails_at:
            raise RuntimeError("the disk\n is on fire")
        return (batch["x"].mean() - self.weight).square().sum()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.weight], lr=0.1)


def fit(folder: Path, module: pl.LightningModule, ckpt: Path | None = None, **settings: Any) -> dict[str, Any]:
    """Trains, and returns the record."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    callbacks = [Monitor(), RunRecord(), History(), *settings.pop("callbacks", [])]
    run = pl.Trainer(default_root_dir=folder, callbacks=callbacks, **{**quiet, "max_epochs": 2, **settings})
    clips = WorldDataModule(count=8, frames=2, size=(8, 8), fps=4.0, batch_size=2, val_count=2)
    try:
        run.fit(module, clips, ckpt_path=ckpt)
    finally:
        record = read_record(folder)
    return record


def test_a_record_says_what_the_run_was(tmp_path: Path) -> None:
    record = fit(tmp_path, Mean(), callbacks=[ModelCheckpoint(tmp_path, "last")])
    (launch,) = record["launches"]
    assert (launch["first_step"], launch["last_step"], launch["status"]) == (0, 8, "finished")
    assert launch["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert launch["versions"]["lightning"] == pl.__version__
    assert launch["processes"] == 1
    assert launch["machine"]["cores"] >= 1
    assert launch["checkpoints"] == [str(tmp_path / "last.ckpt")]
    assert set(launch["seconds"]) == {"waiting for data", "training steps", "validation and samples"}
    assert all(spent_s >= 0 for spent_s in launch["seconds"].values())
    assert record["model"] == {"class": f"{__name__}.Mean", "parameters": 5, "trained": 1}
    assert (record["data"]["train"]["items"], record["data"]["train"]["batches"]) == (8, 4)
    assert record["data"]["train"]["fingerprint"] != record["data"]["val"]["fingerprint"]
    assert (tmp_path / "report.html").is_file()


def test_a_run_that_fails_says_why_and_has_its_report(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="on fire"):
        fit(tmp_path, Mean(fails_at=5))
    (launch,) = read_record(tmp_path)["launches"]
    assert launch["status"] == "ended by RuntimeError: the disk is on fire"
    assert launch["last_step"] == 5
    assert "the disk is on fire" in (tmp_path / "report.html").read_text()


def test_a_resumed_run_adds_a_launch(tmp_path: Path) -> None:
    """After one that was killed: its record says that it runs, and nobody could tell it otherwise."""
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_epochs=1, save_top_k=-1)
    record = fit(tmp_path, Mean(), callbacks=[saver], max_epochs=1)
    record["launches"][0]["status"] = "running"
    (tmp_path / "run.json").write_text(json.dumps(record))
    record = fit(tmp_path, Mean(), tmp_path / "step=4.ckpt")
    assert [launch["status"] for launch in record["launches"]] == ["killed", "finished"]
    assert [launch["first_step"] for launch in record["launches"]] == [0, 4]
    record = fit(tmp_path, Mean())
    assert len(record["launches"]) == 1, "a new run in the same folder"


def test_a_report_that_cannot_be_written_does_not_end_a_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mmdiff.callbacks.run_record.write_report", full)
    with pytest.warns(UserWarning, match="No space left on device; `mmdiff report .*` makes it later"):
        record = fit(tmp_path, Mean())
    assert record["launches"][0]["status"] == "finished"


def test_records_that_are_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no run.json: give the folder of a run"):
        read_record(tmp_path)
    (tmp_path / "run.json").write_text('{"launches":')
    with pytest.raises(ValueError, match="is broken"):
        read_record(tmp_path)
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(ValueError, match="no list of launches"):
        read_record(tmp_path)


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
    return subprocess.run(["git", "-C", str(folder), *who, *words], check=True, capture_output=True, text=True).stdout


def test_git_state_holds_the_commit_and_what_changed_since(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, out = tmp_path / "project", tmp_path / "out"
    project.mkdir()
    git(project, "init", "-b", "work")
    (project / "model.py").write_text("width = 8\n")
    git(project, "add", ".")
    git(project, "commit", "-m", "one")
    monkeypatch.chdir(project)
    clean = git_states(out)["project"]
    assert clean["commit"] == git(project, "rev-parse", "HEAD").strip()
    assert (clean["branch"], clean["changed"], clean["untracked"], clean["diff_sha256"]) == ("work", [], [], None)
    (project / "model.py").write_text("width = 16\n")
    (project / "new.py").write_text("")
    state = git_states(out)["project"]
    assert (state["changed"], state["untracked"]) == (["model.py"], ["new.py"])
    assert state["diff_sha256"] is not None
    assert "+width = 16" in (out / DIFF).read_text()
    (tmp_path / "nothing").mkdir()
    monkeypatch.chdir(tmp_path / "nothing")
    assert "project" not in git_states(out)


def test_versions_are_of_every_distribution() -> None:
    found = versions()
    assert {"python", "torch", "lightning", "numpy", "mmdiff", "pyyaml"} <= set(found)
    assert found["mmdiff"] == mmdiff.__version__


def test_the_fingerprint_of_data_is_that_of_its_items(tmp_path: Path) -> None:
    def items(folder: Path, caption: str = "a", size: int = 3) -> list[Item]:
        folder.mkdir(exist_ok=True)
        (folder / "x.wav").write_bytes(bytes(size))
        return [Item("x", "x.wav", [caption], {}, folder / "x.wav"), Item("y", "y", ["b"], {}, folder / "y")]

    first = fingerprint_items(items(tmp_path / "a"))
    assert first == fingerprint_items(items(tmp_path / "b")), "a copy elsewhere is the same data"
    assert first != fingerprint_items(items(tmp_path / "a", caption="other"))
    assert first != fingerprint_items(items(tmp_path / "a", size=4))
    assert first != fingerprint_items(items(tmp_path / "a", size=3)[::-1])
    many = [Item(str(i), str(i), [], {}, tmp_path) for i in range(5000)]
    assert fingerprint_items(many) != fingerprint_items([*many[:-1], Item("z", "z", [], {}, tmp_path)])


def test_captions_of_data_are_counted(tmp_path: Path) -> None:
    items = [Item(str(i), "", [f"A red ball, {i % 2}", "two"], {}, tmp_path) for i in range(3)]
    found = captions(items)
    assert (found["captions"], found["distinct"], found["vocabulary"]) == (6, 3, 6)
    assert found["most used"].startswith("a 3, red 3, ball 3, two 3, 0 2")
    assert captions([Item("x", "", [], {}, tmp_path)]) == {}


def test_data_of_any_loader_is_counted() -> None:
    loader = torch.utils.data.DataLoader(torch.zeros(5, 1), batch_size=2)  # type: ignore[arg-type]
    stream = iter([])
    found = data_record({"train": loader, "val": stream})
    assert (found["train"]["items"], found["train"]["batches"], found["train"]["fingerprint"]) == (5, 3, None)
    assert (found["val"]["items"], found["val"]["batches"]) == (None, None)
