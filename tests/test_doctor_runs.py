"""What the doctor leaves behind: doctor.json, one warning each, an untouched training, and the command's status."""

import json
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from mmdiff.callbacks import EMA, Doctor
from mmdiff.doctor.check import Check, Run
from mmdiff.preflight import main
from tests.doctor_cases import KINDS, data, every_check, expect, fit, module, reconstruction

ROOT = Path(__file__).resolve().parent.parent
TROUBLE = ROOT / "docs" / "troubleshooting.md"
TINY = ROOT / "configs" / "tiny"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def trainer(**settings: Any) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0, "accelerator": "cpu"}
    return pl.Trainer(**{**quiet, "logger": False, "enable_checkpointing": False, "devices": 1, **settings})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [module, reconstruction], ids=["diffusion", "autoencoder"])
def test_the_doctor_changes_nothing_of_a_training(kind: str, training: Any) -> None:
    weights, states = [], []
    for doctor in ([], [Doctor(every_check())]):
        run, trained = trainer(max_steps=12, callbacks=[EMA(0.9), *doctor]), training(kind)
        torch.manual_seed(7)
        run.fit(trained, datamodule=data(kind))
        weights.append({name: value.clone() for name, value in trained.state_dict().items()})
        states.append(torch.get_rng_state())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert torch.equal(*states)


def test_findings_are_warned_of_once_and_kept_in_the_run_folder(tmp_path: Path) -> None:
    run = trainer(max_steps=12, logger=CSVLogger(tmp_path), callbacks=[Doctor(every_check())])
    with pytest.warns(UserWarning, match="doctor: conditions all dropped: .*dropout.*troubleshooting") as seen:
        run.fit(module("video", dropout=1.0), datamodule=data("video"))
    assert sum("doctor:" in str(warning.message) for warning in seen) == 1
    (kept,) = json.loads((Path(run.loggers[0].log_dir or "") / "doctor.json").read_text())
    assert set(kept) == {"name", "found", "cure", "step"}
    assert kept["name"] == "conditions all dropped"


def test_a_run_without_findings_leaves_no_file(tmp_path: Path) -> None:
    trainer(max_steps=2, default_root_dir=tmp_path, callbacks=[Doctor(every_check())]).fit(
        reconstruction("video"), datamodule=data("video")
    )
    assert not (tmp_path / "doctor.json").exists()


def test_a_resumed_run_keeps_what_was_found_and_finds_it_no_second_time(tmp_path: Path) -> None:
    path = tmp_path / "half.ckpt"
    first = trainer(max_steps=12, callbacks=[Doctor(every_check())])
    with pytest.warns(UserWarning, match="all dropped"):
        first.fit(module("video", dropout=1.0), datamodule=data("video"))
    first.save_checkpoint(path)
    again = Doctor(every_check())
    run = trainer(max_steps=24, callbacks=[again], default_root_dir=tmp_path)
    run.fit(module("video", dropout=1.0), datamodule=data("video"), ckpt_path=path)
    (kept,) = json.loads((tmp_path / "doctor.json").read_text())
    assert kept == again.findings[0]
    assert kept["step"] <= 12


def test_what_is_meant_so_can_be_left_out() -> None:
    doctor = Doctor(every_check(), without=["learning rate too low"])
    expect(fit(module("video", lr=1e-5), data("video"), 12, doctor=doctor))


def test_a_check_that_fails_is_left_out_and_the_training_goes_on() -> None:
    class Broken(Check):
        def batch(self, run: Run, batch: Any) -> Any:
            raise RuntimeError("no such\nreader")

    doctor = Doctor([Broken(), *every_check()])
    run = trainer(max_steps=10, callbacks=[doctor])
    with pytest.warns(UserWarning, match=r"doctor: Broken is left out, it failed \(RuntimeError: no such reader\)"):
        run.fit(module("video", dropout=1.0), datamodule=data("video"))
    assert run.global_step == 10
    expect(doctor, "conditions all dropped")


def test_every_finding_has_its_section_and_every_section_its_finding() -> None:
    sources = [*(ROOT / "mmdiff" / "doctor").glob("*.py"), ROOT / "audio" / "doctor.py", ROOT / "video" / "doctor.py"]
    text = "".join(path.read_text("utf-8") for path in sources)
    sections = re.findall(r"^## (.+)$", TROUBLE.read_text("utf-8"), re.M)
    assigned = r"\bname(?:, \w+)* = |NAME = |UNDERFLOW = "
    named = set(re.findall(rf'(?:Finding\(\s*|Reading\([^"]*|{assigned})"([^"]+)"', text))
    named |= set(re.findall(r'\(self\.\w+, "([^"]+)", "', text))  # of the pairs in a loop
    assert named == set(sections)


def test_the_command_says_what_is_wrong_and_its_status_too(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([str(TINY / "video.yaml"), "--cascade", str(TINY / "video_cascade.yaml")]) == 0
    assert "no findings in 10 steps" in capsys.readouterr().out
    slow = tmp_path / "slow.yaml"
    slow.write_text("model: {init_args: {optimizer: {init_args: {lr: 0.00002}}}}\n")
    assert main([f"{TINY / 'video.yaml'}+{slow}", "--json"]) == 3
    (found,) = json.loads(capsys.readouterr().out)
    assert found["name"] == "learning rate too low"


def test_the_command_reads_averages_and_grids_of_the_config(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shifted = tmp_path / "shifted.yaml"
    shifted.write_text(
        "trainer:\n  callbacks:\n    - class_path: mmdiff.callbacks.Samples\n      init_args:\n"
        "        show: {class_path: audio.show.ShowAudio}\n"
        "        sigmas: {class_path: mmdiff.sigmas.Flow, init_args: {shift: 3.0}}\n"
    )
    assert main([f"{TINY / 'audio.yaml'}+{shifted}", "--steps", "2"]) == 3
    assert "sampling levels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "words"), [(["none.yaml"], "no such file"), ([str(TINY / "video.yaml"), "--steps", "0"], "at least 1")]
)
def test_the_command_refuses_what_makes_no_sense(args: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        main(args)
