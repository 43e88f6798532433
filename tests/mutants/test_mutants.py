"""Faults that real projects shipped, put back one by one: the suite must fail for each.

    pytest -m slow tests/mutants

Each mutant is one edit of a copy of the project; the tests named beside it run on the copy, and one of them must fail.
The same tests pass on a copy that is not edited, or a mutant would count as found for nothing.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
COPIED = ("mmdiff", "video", "audio", "audiovideo", "configs", "tests", "pyproject.toml")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "pretrained", "mutants")
MUTANTS = yaml.safe_load((Path(__file__).parent / "mutants.yaml").read_text("utf-8"))

pytestmark = pytest.mark.slow


def copy_project(folder: Path) -> Path:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=LEFT_OUT)
        else:
            shutil.copy(source, folder / name)
    return folder


def run_tests(folder: Path, tests: list[str]) -> subprocess.CompletedProcess[str]:
    """Pytest on the copy: 0 where all pass, 1 where one fails, anything else where it could not run them."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-n", "0", *tests]
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)


@pytest.mark.parametrize("tests", sorted({tuple(mutant["tests"]) for mutant in MUTANTS.values()}), ids=" ".join)
def test_passes_without_a_fault(tests: tuple[str, ...], tmp_path: Path) -> None:
    run = run_tests(copy_project(tmp_path), list(tests))
    assert run.returncode == 0, run.stdout[-3000:]


@pytest.mark.parametrize("name", MUTANTS)
def test_finds_the_fault(name: str, tmp_path: Path) -> None:
    mutant = MUTANTS[name]
    path = copy_project(tmp_path) / mutant["file"]
    source = path.read_text("utf-8")
    assert source.count(mutant["right"]) == 1, f"{mutant['file']} holds {mutant['right']!r} not exactly once"
    path.write_text(source.replace(mutant["right"], mutant["wrong"]), "utf-8")
    run = run_tests(tmp_path, mutant["tests"])
    assert run.returncode == 1, f"the fault was not found:\n{run.stdout[-3000:]}"
    assert not {"SyntaxError", "NameError"} & set(re.findall(r"\w+Error", run.stdout)), run.stdout[-3000:]
