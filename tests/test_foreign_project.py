"""The networks in somebody else's project: their own LightningModule, another folder, nothing else of ours."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "foreign_lightning"

TRAIN = """
import runpy
import sys

sys.dont_write_bytecode = True
runpy.run_path("train.py", run_name="__main__")
ours = {name for name in sys.modules if name.split(".")[0] in ("mmdiff", "video", "audio")}
print(sorted(name for name in ours - {"mmdiff"} if not name.startswith(("mmdiff.backbones", "mmdiff.nn"))))
"""

IMPORTS = """
import sys
import time

import einops
import torch

before, start = set(sys.modules), time.perf_counter()
from mmdiff.backbones import SpatioTemporalDiT, UNet1D, UNet3D

seconds, new = time.perf_counter() - start, set(sys.modules) - before
foreign = {name.split(".")[0] for name in new} - set(sys.stdlib_module_names) - {"torch", "einops"}
print(sorted(foreign), len(new), f"{seconds:.3f}")
"""


def run(code: str, folder: Path) -> list[str]:
    """The lines that `code` prints, run from `folder` as a user would."""
    file = folder / "run.py"
    file.write_text(code)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if not installed():
        environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, str(file)], cwd=folder, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()


def installed() -> bool:
    try:
        importlib.metadata.distribution("mmdiff")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def test_the_example_trains_each_network_with_nothing_else_of_ours(tmp_path: Path) -> None:
    """The loss ends below two thirds of where it starts; what is saved loads, and is not as it was built."""
    from mmdiff.backbones import Shareable

    shutil.copy(EXAMPLE / "train.py", tmp_path)
    *lines, extra = run(TRAIN, tmp_path)
    assert extra == "[]"
    reports = [re.fullmatch(r"(\w+): loss (\S+) -> (\S+), saved in (\S+)", line) for line in lines]
    found = {report[1]: report for report in reports if report}
    assert set(found) == {"UNet3D", "SpatioTemporalDiT", "UNet1D"}
    for name, report in found.items():
        assert float(report[3]) < 2 / 3 * float(report[2]), name
        net = Shareable.from_pretrained(tmp_path / report[4])
        assert type(net).__name__ == name
        assert net.head.weight.abs().max() > 0


def test_the_example_is_short_and_its_readme_shows_what_it_prints() -> None:
    source, readme = (EXAMPLE / "train.py").read_text(), (EXAMPLE / "README.md").read_text()
    assert len(source.splitlines()) <= 60
    assert set(re.findall(r"^from (mmdiff\S*) import", source, re.MULTILINE)) == {"mmdiff.backbones"}
    for name in ("UNet3D", "SpatioTemporalDiT", "UNet1D"):
        assert re.search(rf"^{name}: loss \d\.\d+ -> 0\.\d+, saved in saved/{name}$", readme, re.MULTILINE)


def test_backbones_load_torch_einops_and_nothing_else(tmp_path: Path) -> None:
    """A few dozen small modules beyond torch: no time is asserted where other work may take the cores."""
    foreign, number, seconds = re.fullmatch(r"(\[.*\]) (\d+) (\S+)", run(IMPORTS, tmp_path)[-1]).groups()
    print(f"{number} modules beyond torch in {seconds} s")
    assert foreign == "['mmdiff']"
    assert int(number) < 60


@pytest.mark.slow
def test_backbones_load_within_two_seconds_beyond_torch(tmp_path: Path) -> None:
    seconds = min(float(run(IMPORTS, tmp_path)[-1].split()[-1]) for _ in range(5))
    assert seconds < 2
