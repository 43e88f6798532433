"""Imports run one way, scripts -> audiovideo -> video, audio -> mmdiff (DESIGN.md, rule 6); heavy ones are lazy."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = {"mmdiff", "video", "audio", "audiovideo", "scripts", "tests"}

# First part of a path, as a dotted prefix -> what of ours it may import.
ALLOWED = {
    "mmdiff": {"mmdiff"},
    "video": {"mmdiff", "video"},
    "audio": {"mmdiff", "audio"},
    "audiovideo": {"mmdiff", "video", "audio", "audiovideo"},
    "scripts": {"mmdiff", "video", "audio", "audiovideo"},
}
# What can be taken into another project needs no more than this.
NETWORKS = ("mmdiff.nn", "mmdiff.backbones")
NETWORKS_MAY_IMPORT = ("torch", "einops", *NETWORKS)
NETWORKS_MAY_IMPORT_LATE = ("safetensors", "huggingface_hub")  # inside a function: who never saves needs neither


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, module: str, is_package: bool, late: bool = True) -> set[str]:
    """Absolute names of all modules that `source` imports; with `late`, those inside functions too."""
    package = module if is_package else module.rpartition(".")[0]
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)) if late else at_import(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [node.module])])
            # `from mmdiff import nn` imports mmdiff.nn; whether a name is a module cannot be seen, so both count.
            in_package = base in OURS
            names |= {f"{base}.{alias.name}" if in_package else base for alias in node.names}
    return names


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when a module is imported: all but the insides of functions."""
    yield node
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        for child in ast.iter_child_nodes(node):
            yield from at_import(child)


def imports_of(path: Path, late: bool = True) -> set[str]:
    return imports(path.read_text(), module_name(path), path.name == "__init__.py", late)


def within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


@pytest.mark.parametrize("folder", ALLOWED)
def test_packages_import_one_way(folder: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(folder)
        for name in sorted(imports_of(path))
        if name.split(".")[0] in OURS - ALLOWED[folder]
    ]
    assert not wrong, f"{folder} may import of ours only {sorted(ALLOWED[folder])}"


def test_networks_need_torch_and_einops_alone() -> None:
    for late, allowed in ((False, NETWORKS_MAY_IMPORT), (True, NETWORKS_MAY_IMPORT + NETWORKS_MAY_IMPORT_LATE)):
        wrong = [
            f"{module_name(path)} imports {name}"
            for path in [*sources("mmdiff/nn"), *sources("mmdiff/backbones")]
            for name in sorted(imports_of(path, late))
            if name.split(".")[0] not in sys.stdlib_module_names and not within(name, allowed)
        ]
        assert not wrong, (
            f"{NETWORKS} may import only {allowed} and the standard modules{' when imported' * (not late)}"
        )


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import video.files", {"video.files"}),
        ("from mmdiff import nn", {"mmdiff.nn"}),
        ("from . import embed", {"mmdiff.nn"}),
        ("from ..conditioning import Cond", {"mmdiff.conditioning"}),
        ("from .. import io", {"mmdiff.io"}),
        ("def f():\n    import audio.mel", {"audio.mel"}),
    ],
)
def test_the_walk_sees_every_form_of_import(source: str, expected: set[str]) -> None:
    assert imports(source, "mmdiff.nn.conv", is_package=False) == expected
    early = set() if source.startswith("def") else expected
    assert imports(source, "mmdiff.nn.conv", is_package=False, late=False) == early


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that are loaded after `statement` ran in a fresh interpreter."""
    code = f"{statement}\nimport sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(run.stdout.split())


@pytest.mark.parametrize("statement", ["import mmdiff", "import mmdiff.__main__"])
def test_the_package_loads_nothing_heavy(statement: str) -> None:
    heavy = {"torch", "lightning", "transformers", "numpy", "matplotlib", "av"}
    assert not loaded_by(statement) & heavy


def test_networks_load_nothing_of_the_suite_s_own_dependencies() -> None:
    heavy = {"lightning", "transformers", "torchaudio", "av", "soundfile", "jsonargparse", "video", "audio"}
    assert not loaded_by("import mmdiff.backbones, mmdiff.nn") & heavy
