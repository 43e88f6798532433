"""quickstart.sh and test.sh with a pretended Python: what they find, refuse, reuse and say. Nothing is installed."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BASH = shutil.which("bash")
pytestmark = pytest.mark.skipif(BASH is None or os.name == "nt", reason="needs bash")

# Acts like the Python whose version it is given. What pip and modules are asked for goes to calls.txt.
FAKE_PYTHON = """#!/bin/sh
case "$1 $2" in
"-c import sys; print"*) echo VERSION ;;
"-c import venv"*) exit VENV_STATUS ;;
"-c import torch"*) exit 0 ;;
"-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
"-m pip")
    [ "$3" = "--version" ] && exit 0
    echo "$@" >>"CALLS"
    printf '%s\\n' "PIP_OUTPUT"
    exit PIP_STATUS
    ;;
"-m "*) echo "$@" >>"CALLS" ;;
"- "*)
    script="$(cat)"
    case "$script" in *find_spec*) exit 0 ;; esac
    shift
    printf '%s\\n' "$script" | "REAL" - "$@"
    ;;
esac
"""


class Checkout:
    """A copy of the set-up scripts in a folder with spaces, and a PATH that holds only pretended Pythons."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a folder" / "mm diff"
        self.bin = folder / "bin"
        self.calls_file = folder / "calls.txt"
        self.venv = self.root / ".venv"
        (self.root / "scripts").mkdir(parents=True)
        self.bin.mkdir()
        for name in ("setup_env.sh", "quickstart.sh", "test.sh"):
            shutil.copy(ROOT / "scripts" / name, self.root / "scripts")
        for name in ("pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.root)
        tools = "awk basename cat cp cut df dirname grep head mkdir mv paste rm sed sh sleep sort tail touch tr uname"
        for tool in tools.split():
            found = shutil.which(tool)
            assert found, tool
            (self.bin / tool).symlink_to(found)

    def python(self, name: str, version: str = "3.12", *, venv: int = 0, pip: int = 0, output: str = "") -> Path:
        text = FAKE_PYTHON
        for key, value in {
            "VERSION": version,
            "VENV_STATUS": str(venv),
            "CALLS": str(self.calls_file),
            "PIP_OUTPUT": output,
            "PIP_STATUS": str(pip),
            "REAL": sys.executable,
        }.items():
            text = text.replace(key, value)
        path = self.bin / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    def run(self, script: str = "quickstart.sh", *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        assert BASH
        variables = {"PATH": str(self.bin), "HOME": str(self.bin), "MMDIFF_NEEDED_MB": "1", "CI": "true", **env}
        command = [BASH, str(self.root / "scripts" / script), *args]
        return subprocess.run(
            command, env=variables, cwd=self.bin, capture_output=True, text=True, timeout=240, check=False
        )

    def calls(self) -> list[str]:
        """What Python was asked for since the last look."""
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        self.calls_file.unlink(missing_ok=True)
        return lines


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def assert_refused(run: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Ended with one line on stderr that holds `parts`."""
    assert run.returncode != 0
    assert len(run.stderr.splitlines()) == 1, run.stderr
    for part in parts:
        assert part in run.stderr


def test_old_python_is_named(checkout: Checkout) -> None:
    checkout.python("python3", "3.9")
    assert_refused(checkout.run(), "needs Python 3.11, 3.12 or 3.13", "python3 is 3.9")
    assert not checkout.venv.exists()


def test_too_new_python_is_named(checkout: Checkout) -> None:
    assert_refused(checkout.run(PYTHON=str(checkout.python("new", "3.14"))), "new is 3.14")


def test_no_python(checkout: Checkout) -> None:
    assert_refused(checkout.run("test.sh"), "test.sh: needs Python", "no Python that runs")


def test_named_python_must_run(checkout: Checkout) -> None:
    checkout.python("python3.12")
    assert_refused(checkout.run(PYTHON="/nowhere/python"), "PYTHON=/nowhere/python does not run")


def test_named_python_is_not_replaced_by_another(checkout: Checkout) -> None:
    checkout.python("python3.12")
    old = checkout.python("old", "3.10")
    assert_refused(checkout.run(PYTHON=str(old)), "old is 3.10")


def test_shim_that_does_not_run_is_passed_over(checkout: Checkout) -> None:
    shim = checkout.python("python3.13")
    shim.write_text("#!/bin/sh\necho 'command not found' >&2\nexit 127\n")
    checkout.python("python3.12")
    run = checkout.run()
    assert run.returncode == 0, run.stderr
    assert "with Python 3.12" in run.stdout


def test_python_without_venv_is_named(checkout: Checkout) -> None:
    checkout.python("python3", "3.11", venv=1)
    assert_refused(checkout.run(), "python3 is 3.11 but has no venv module")


def test_too_little_disk(checkout: Checkout) -> None:
    checkout.python("python3.12")
    assert_refused(checkout.run(MMDIFF_NEEDED_MB="999999999"), "needs 999999999 MB of free disk", str(checkout.root))
    assert not checkout.venv.exists()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("WARNING: Retrying ... NewConnectionError: Failed to establish a new connection", "network"),
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk is full"),
        ("ERROR: No matching distribution found for torch==2.11.*", "failed: ERROR: No matching distribution"),
    ],
)
def test_failed_installation_is_one_line_and_done_anew(checkout: Checkout, output: str, message: str) -> None:
    checkout.python("python3.12", pip=1, output=output)
    assert_refused(checkout.run(), message, "install.log")
    assert output in (checkout.venv / "install.log").read_text()
    (checkout.venv / "half-installed").touch()

    checkout.python("python3.12")
    run = checkout.run()
    assert run.returncode == 0, run.stderr
    assert "not complete; making it anew" in run.stdout
    assert not (checkout.venv / "half-installed").exists()


def test_mirror_without_the_named_pip_serves(checkout: Checkout) -> None:
    python = checkout.python("python3.12")
    python.write_text(python.read_text().replace("    exit 0\n    ;;", '    [ "$6" != "pip" ]; exit $?\n    ;;'))
    run = checkout.run()
    assert run.returncode == 0, run.stderr
    assert len(checkout.calls()) == 4


def test_quickstart_installs_once_and_runs_both_commands(checkout: Checkout) -> None:
    checkout.python("python3.12")
    first = checkout.run()
    assert first.returncode == 0, first.stderr
    pip, install, video, audio = checkout.calls()
    assert pip == f"-m pip install -c {checkout.root}/constraints.txt pip"
    assert install == f"-m pip install -c {checkout.root}/constraints.txt -e {checkout.root}"
    assert video.startswith("-m mmdiff txt2vid ")
    assert video.endswith(f"--out {checkout.root}/outputs --preview")
    assert audio.startswith("-m mmdiff txt2audio ")
    assert audio.endswith(f"--out {checkout.root}/outputs --preview")

    second = checkout.run()
    assert second.returncode == 0, second.stderr
    assert "Using the environment" in second.stdout
    assert checkout.calls() == [video, audio]


def test_test_sh_adds_its_extras_and_ends_with_pytest(checkout: Checkout) -> None:
    checkout.python("python3.12")
    checkout.run()
    checkout.calls()

    run = checkout.run("test.sh", "--slow", "-k", "a b")
    assert run.returncode == 0, run.stderr
    calls = checkout.calls()
    assert calls[1].endswith(f"-e {checkout.root}[decord,ray,tables,test,text]")
    assert [call.split()[1] for call in calls] == ["pip", "pip", "ruff", "ruff", "mypy", "pytest"]
    assert calls[-1] == "-m pytest -q -n auto --maxprocesses 4 --dist worksteal --slow -k a b"

    checkout.run()
    assert [call.split()[1] for call in checkout.calls()] == ["mmdiff", "mmdiff"], "the larger environment serves both"


@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt"])
def test_changed_requirements_are_installed_with_all_extras(checkout: Checkout, changed: str) -> None:
    checkout.python("python3.12")
    checkout.run("test.sh")
    checkout.calls()
    with (checkout.root / changed).open("a") as file:
        file.write("# changed\n")
    checkout.run()
    assert checkout.calls()[1].endswith("[decord,ray,tables,test,text]")


def test_moved_repository_is_installed_again(checkout: Checkout) -> None:
    checkout.python("python3.12")
    checkout.run()
    checkout.calls()
    checkout.root = checkout.root.rename(checkout.root.with_name("moved"))
    checkout.venv = checkout.root / ".venv"
    checkout.run()
    assert checkout.calls()[1].endswith(f"-e {checkout.root}")


def test_environment_whose_python_is_gone_is_made_anew(checkout: Checkout) -> None:
    checkout.python("python3.12")
    checkout.run()
    (checkout.venv / "bin" / "python").unlink()
    run = checkout.run()
    assert run.returncode == 0, run.stderr
    assert "making it anew" in run.stdout


@pytest.mark.parametrize("pip", [0, 1])
def test_test_sh_adds_k_diffusion_alone_and_does_without_it(checkout: Checkout, pip: int) -> None:
    python = checkout.python("python3.12")
    checkout.run("test.sh")
    checkout.calls()
    lacks = f'"-c import sys; from"*) exit 1 ;;\n"-m pip") echo "$@" >>"{checkout.calls_file}"; exit {pip} ;;\n'
    venv_python = checkout.venv / "bin" / "python"
    venv_python.write_text(python.read_text().replace('"-m venv")', lacks + '"-m venv")'))
    run = checkout.run("test.sh")
    assert run.returncode == 0, run.stderr
    assert checkout.calls()[0] == f"-m pip install -q --no-deps -c {checkout.root}/constraints.txt k-diffusion"
    assert ("could not be installed" in run.stderr) == bool(pip)


def test_environment_of_the_user_is_added_to(checkout: Checkout) -> None:
    python = checkout.python("python3.12")
    (checkout.venv / "bin").mkdir(parents=True)
    shutil.copy(python, checkout.venv / "bin" / "python")
    (checkout.venv / "mine").touch()
    run = checkout.run()
    assert run.returncode == 0, run.stderr
    assert (checkout.venv / "mine").exists()


def test_environment_with_an_old_python_is_left_alone(checkout: Checkout) -> None:
    old = checkout.python("old", "3.9")
    (checkout.venv / "bin").mkdir(parents=True)
    shutil.copy(old, checkout.venv / "bin" / "python")
    assert_refused(checkout.run(), "holds Python 3.9", "delete that folder")


def test_failing_command_ends_quickstart(checkout: Checkout) -> None:
    python = checkout.python("python3.12")
    python.write_text(python.read_text().replace('"-m "*)', '"-m mmdiff") exit 3 ;;\n"-m "*)'))
    assert checkout.run().returncode == 3


@pytest.mark.parametrize("tool", ["ruff", "mypy"])
def test_failing_check_ends_test_sh_before_pytest(checkout: Checkout, tool: str) -> None:
    python = checkout.python("python3.12")
    python.write_text(python.read_text().replace('"-m "*)', f'"-m {tool}") exit 1 ;;\n"-m "*)'))
    run = checkout.run("test.sh")
    assert_refused(run, tool)
    assert not any(call.startswith("-m pytest") for call in checkout.calls())


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
def test_help_installs_nothing(checkout: Checkout, script: str) -> None:
    run = checkout.run(script, "--help")
    assert run.returncode == 0
    assert run.stdout.startswith(f"usage: bash scripts/{script}")
    assert not checkout.venv.exists()


def test_quickstart_refuses_arguments_it_does_not_know(checkout: Checkout) -> None:
    assert_refused(checkout.run("quickstart.sh", "--fast"), "unknown argument --fast")


def test_ci_runs_test_sh() -> None:
    ci = ROOT / ".ci" / "run"
    assert "scripts/test.sh" in ci.read_text()
    assert os.access(ci, os.X_OK)
