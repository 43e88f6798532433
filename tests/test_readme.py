"""What the README shows exists and runs."""

import re
import shlex
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

from video.files import write_video

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
COMMANDS = [
    line.split("   #")[0] for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()
]


def test_every_command_names_files_and_commands_that_exist() -> None:
    known = {"fit", *(entry.name for entry in entry_points(group="mmdiff.commands"))}
    seen = set()
    for line in COMMANDS:
        words = shlex.split(line)
        if words[0] == "mmdiff":
            assert words[1] in known, line
            seen.add(words[1])
        for word in words:
            if re.match(r"(configs|scripts)/", word):
                assert (ROOT / word).is_file(), line
    assert {"fit", "txt2vid", "txt2audio", "export", "eval"} <= seen


def test_every_link_and_picture_exists() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_python_example_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    scope = {"x": torch.randn(1, 4, 4, 8, 8), "c_noise": torch.rand(1)}
    exec(code, scope)  # noqa: S102 (our own README)
    assert scope["out"].shape == (1, 4, 4, 8, 8)


def test_a_line_of_yaml_changes_the_parametrisation() -> None:
    from mmdiff.config import build, read_config
    from mmdiff.precond import Flow

    tree = read_config(ROOT / "configs" / "tiny" / "video.yaml")["model"]["init_args"]["model"]
    tree["init_args"]["precond"] = {"class_path": "mmdiff.precond.Flow"}
    assert build(tree).denoiser.precond == Flow()


def test_training_on_a_folder_of_ones_own(tmp_path: Path) -> None:
    """The one command of the README, on a tiny config and three clips."""
    for i in range(3):
        torch.manual_seed(i)
        write_video(tmp_path / "my_clips" / "train" / f"{i}.mp4", torch.rand(3, 8, 16, 16) * 2 - 1, 4)
        (tmp_path / "my_clips" / "train" / f"{i}.txt").write_text(f"clip {i}")
    config = ROOT / "configs" / "tiny" / "video.yaml"
    command = [sys.executable, "-m", "mmdiff", "fit", "-c", str(config), "--data", "video.ClipDataModule"]
    command += ["--data.path", "my_clips", "--data.frames", "8", "--data.size", "[16,16]", "--data.batch_size", "2"]
    command += ["--trainer.max_steps", "2", "--trainer.val_check_interval", "null"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "runs" / "tiny" / "video.ckpt").is_file()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--data.path", "nowhere"], "nowhere"),
        (["--model.seed", "many"], "many"),
        (["-c", "nowhere.yaml"], "nowhere.yaml"),
        (["--data.pth", "my_clips"], "'pth'"),
    ],
)
def test_a_wrong_setting_of_a_training_is_named_without_a_traceback(
    options: list[str], says: str, tmp_path: Path
) -> None:
    config = ROOT / "configs" / "tiny" / "video.yaml"
    command = [sys.executable, "-m", "mmdiff", "fit", "-c", str(config), "--data", "video.ClipDataModule", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert line == done.stderr.splitlines()[-1]
    assert says in line
    assert len(line) < 400
    assert "usage:" not in done.stderr
    assert "Traceback" not in done.stderr
