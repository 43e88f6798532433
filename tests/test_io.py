"""Configs build what LightningCLI builds and run no foreign code; a model folder comes back exactly or is refused."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from mmdiff.config import dump_config, trust_policy
from mmdiff.io import build, fetch, load, read_config, save, verify_manifest, write_manifest
from mmdiff.precond import EDM

PARTS = """
import dataclasses, enum
from abc import ABC
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
import torch
from torch import nn

class Part(ABC): ...

@dataclasses.dataclass(frozen=True)
class Half(Part):
    a: float = 0.5
    b: tuple[int, ...] = (1,)

@dataclasses.dataclass
class Plain:
    a: float = 1.0

class Mode(enum.Enum):
    X = 1
    Y = 2

class Probe(nn.Module):
    def __init__(self, i: int = 1, f: float = 1.0, s: str = "a", b: bool = True, t: tuple[int, int] = (1, 2),
                 l: list[float] = [], seq: Sequence[int] = (), o: "int | None" = None, u: float | int = 1,
                 w: int | tuple[int, int] = 1, d: dict[str, float] = {}, m: Mapping[str, tuple[int, int]] = {},
                 lit: Literal["a", 1] = "a", e: Mode = Mode.X, p: Path = Path("."), part: Part = None,
                 parts: list[Part] = (), named: dict[str, Part] = {}, plain: Plain = Plain(), net: nn.Module = None,
                 nets: Sequence[nn.Module] = (), st: set[int] = set(), nested: list[tuple[int, int]] = [],
                 loose: Any = None, opt: Callable[[Iterable], torch.optim.Optimizer] = None, act: Callable = None):
        super().__init__()
        self.given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}

class Tied(nn.Module):
    def __init__(self, width: int = 4, table: bool = True):
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)
        self.b.weight = self.a.weight
        self.register_buffer("sigmas", torch.linspace(0, 157.1, 5))
        self.register_buffer("mask", torch.full((2,), float("-inf")))
"""
HALF = {"class_path": "zoo.Half", "init_args": {"a": 2, "b": [3, 4]}}
LINEAR = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 2, "out_features": 3}}
TIED = {"class_path": "zoo.Tied", "init_args": {"width": 4}}


@pytest.fixture(autouse=True)
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A user's own package."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "zoo.py").write_text(PARTS)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    yield __import__("zoo")
    del sys.modules["zoo"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(build(TIED, ["zoo"]), TIED, tmp_path / "model")


def lightning_built(tree: dict[str, Any]) -> Any:
    from jsonargparse import ArgumentParser

    trust_policy(["zoo"])  # jsonargparse keeps one policy for the process, which other tests set
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(nn.Module, "model")
    return parser.instantiate(parser.parse_string(yaml.safe_dump({"model": tree}))).model


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("i", 2), ("f", 2), ("f", 1e-3), ("s", "b"), ("b", False), ("t", [1, 2]), ("l", [1, 2]), ("seq", [1, 2])],
        *[("o", None), ("o", 3), ("u", 2), ("w", 1), ("w", [1, 2]), ("d", {"x": 1}), ("m", {"x": [1, 2]}), ("lit", 1)],
        *[("e", "Y"), ("p", "a/b"), ("part", HALF), ("part", "zoo.Half"), ("part", None), ("parts", [HALF, HALF])],
        *[("named", {"k": HALF}), ("plain", {"a": 2}), ("net", LINEAR), ("nets", [LINEAR]), ("st", [1, 2])],
        *[("nested", [[1, 2]]), ("loose", [1]), ("act", {"class_path": "torch.nn.GELU"})],
    ],
)
def test_build_gives_what_lightning_cli_gives(name: str, value: object) -> None:
    tree = {"class_path": "zoo.Probe", "init_args": {name: value}}
    ours, theirs = build(tree, ["zoo"]).given[name], lightning_built(tree).given[name]
    assert repr(ours) == repr(theirs)  # repr, since modules compare by identity
    assert type(ours) is type(theirs)


def test_a_tree_as_lightning_cli_saves_it_builds_the_same_denoiser() -> None:
    from jsonargparse import ArgumentParser

    tree = {
        "class_path": "mmdiff.denoiser.Denoiser",
        "init_args": {
            "backbone": {
                "class_path": "mmdiff.backbones.UNet",
                "init_args": {"axes": 1, "in_channels": 1, "channels": 8, "multipliers": [1, 2], "blocks": 1},
            },
            "precond": {"class_path": "mmdiff.precond.EDM", "init_args": {"sigma_data": 1}},
        },
    }
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(nn.Module, "model")
    parsed = parser.parse_string(yaml.safe_dump({"model": tree}))
    resolved = yaml.safe_load(parser.dump(parsed))["model"]  # with every default written out
    assert len(resolved["init_args"]["backbone"]["init_args"]) > 5
    theirs = parser.instantiate(parsed).model
    for config in (tree, resolved):
        ours = build(config)
        assert str(ours) == str(theirs)
        assert ours.precond == theirs.precond == EDM(1.0)
        assert {k: v.shape for k, v in ours.state_dict().items()} == {
            k: v.shape for k, v in theirs.state_dict().items()
        }


def test_an_optimizer_is_a_constructor_bound_to_its_settings() -> None:
    spec = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3, "betas": [0.5, 0.9]}}
    bound = build({"class_path": "zoo.Probe", "init_args": {"opt": spec}}, ["zoo"]).given["opt"]
    assert isinstance(bound, functools.partial)
    assert bound([nn.Parameter(torch.zeros(1))]).defaults["betas"] == (0.5, 0.9)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"chanels": 3}, "Probe has no argument 'chanels' .at init_args.; its arguments: i, f, s"),
        ({"part": LINEAR}, "init_args.part=.* is not a Part"),
        (
            {"part": {"class_path": "zoo.Half", "init_args": {"c": 1}}},
            "no argument 'c' .at init_args.part.init_args.*a, b",
        ),
        ({"part": {"class_path": "zoo.Half", "extra": 1}}, "unknown key 'extra' .at init_args.part."),
        ({"net": {"class_path": "torch.nn.Linear"}}, "Linear needs the argument 'in_features' .at init_args.net"),
        ({"net": {"class_path": "zoo.Nothing"}}, "'zoo.Nothing' .at init_args.net. cannot be imported"),
        (
            {"net": LINEAR | {"init_args": {"in_features": -1, "out_features": 2}}},
            "Linear .at init_args.net.: RuntimeError",
        ),
        ({"t": [1]}, "init_args.t=.1. is not a list of 2"),
        ({"i": 1.5}, "init_args.i=1.5 is not of type int"),
        ({"f": True}, "init_args.f=True is not a number"),
        ({"lit": "b"}, "init_args.lit='b' is not one of 'a', 1"),
        ({"e": "Z"}, "init_args.e='Z' is not one of X, Y"),
    ],
)
def test_a_wrong_argument_is_one_line_with_its_place(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build({"class_path": "zoo.Probe", "init_args": args}, ["zoo"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "class_path",
    [
        *[
            "torch.hub.load",
            "torch.load",
            "torch.utils.data.DataLoader",
            "torch.nn.functional.relu",
            "torch.nn.Parameter",
        ],
        *["os.system", "subprocess.Popen", "mmdiffx.Evil", "mmdiff..io", "os.system; x", "", 3, None],
        *[
            "mmdiff.io.Path",
            "mmdiff.io.shutil",
            "mmdiff.io.load",
            "mmdiff.config.Any",
            "mmdiff.config._Builder",
            "mmdiff.world.WorldDataset",
        ],
    ],
)
def test_nothing_but_our_parts_can_be_named(class_path: object) -> None:
    with pytest.raises(ValueError, match="class_path"):
        build({"class_path": class_path})
    with pytest.raises(ValueError, match="class_path"):
        build({"class_path": "zoo.Probe", "init_args": {"net": {"class_path": class_path}}}, ["zoo"])


def test_an_untrusted_module_is_refused_before_anything_is_imported(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    (tmp_path / "packages" / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Net: ...\n")
    tree = {"class_path": "torch.nn.Sequential", "init_args": {"a": [{"b": {"class_path": "evil.Net"}}]}}
    with pytest.raises(ValueError, match=r"'evil.Net' .at init_args.a.0..b.*pass trusted=.'evil'"):
        build(tree)
    assert not marker.exists()
    with pytest.raises(ValueError, match="tag:yaml.org"):
        path = tmp_path / "tag.yaml"
        path.write_text(f"class_path: !!python/object/apply:os.system ['touch {marker}']")
        build(path)
    assert not marker.exists()


def test_the_command_line_imports_no_foreign_module(tmp_path: Path) -> None:
    """Without the policy jsonargparse runs the module's body even where it then rejects the class."""
    marker = tmp_path / "marker"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    (tmp_path / "own.py").write_text("from torch import nn\nclass Net(nn.Module): ...\n")
    (tmp_path / "run.py").write_text(
        "import sys\nfrom torch import nn\nfrom jsonargparse import ArgumentParser\n"
        "from mmdiff.io import trust_policy\ntrust_policy(['own'])\n"
        "parser = ArgumentParser(exit_on_error=False)\nparser.add_subclass_arguments(nn.Module, 'model')\n"
        "for name in ['evil.Net', 'os.system', 'torch.hub.load', 'mmdiff.io.shutil', 'mmdiff.io.subprocess.Popen']:\n"
        "    try:\n        parser.parse_object({'model': {'class_path': name}})\n"
        "    except Exception as error:\n        print('refused', name)\n"
        "for name in ['own.Net', 'torch.nn.ReLU']:\n"
        "    print(parser.instantiate(parser.parse_object({'model': {'class_path': name}})).model)\n"
    )
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(tmp_path)])}
    command = [sys.executable, str(tmp_path / "run.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.count("refused") == 5, done.stdout + done.stderr
    assert "Net()" in done.stdout
    assert "ReLU()" in done.stdout
    assert not marker.exists()


def test_yaml_numbers_and_lists(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("class_path: zoo.Half\ninit_args: {a: 1e-3, b: [1, 2]}\n")
    assert read_config(path)["init_args"]["a"] == 1e-3
    assert build(path, ["zoo"]) == build({"class_path": "zoo.Half", "init_args": {"a": "1e-3", "b": (1, 2)}}, ["zoo"])
    tree = {"x": 1e-5, "y": "1e-5", "z": [HALF, HALF], "n": None}
    path.write_text(dump_config(tree))
    assert read_config(path) == tree
    lists = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9 if i else ['0'])}]\n" for i in range(9))
    for text in (lists, "a: &a [*a]"):
        path.write_text(text)
        with pytest.raises(ValueError, match="c.yaml unfolds to more than 100000 values"):
            read_config(path)
    for text in ("- 1", "", "a: ["):
        path.write_text(text)
        with pytest.raises(ValueError, match="c.yaml (holds a|is not YAML)"):
            read_config(path)
    with pytest.raises(ValueError, match="YAML cannot"):
        dump_config({"x": object()})
    with pytest.raises(ValueError, match="no such file: .*nothing"):
        read_config(tmp_path / "nothing")


def test_a_model_comes_back_exactly(folder: Path, zoo: Any) -> None:
    torch.manual_seed(0)
    module = zoo.Tied()
    save(module, TIED, folder)  # over the one that is there
    before = torch.random.get_rng_state()
    again = load(folder, trusted=["zoo"])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not again.training
    assert again.a.weight is again.b.weight
    for name, value in module.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "manifest.json", "model.safetensors"]
    assert sorted(path.name for path in folder.parent.iterdir()) == ["model", "packages"]
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # who may read the config may read the weights


def test_half_precision_rounds_parameters_only(folder: Path, zoo: Any) -> None:
    module = zoo.Tied(width=64)
    tree = {"class_path": "zoo.Tied", "init_args": {"width": 64}}
    full = sum(path.stat().st_size for path in save(module, tree, folder).iterdir())
    half = sum(path.stat().st_size for path in save(module, tree, folder, torch.float16).iterdir())
    assert half < 0.6 * full
    again = load(folder, ["zoo"])
    assert again.a.weight.dtype is torch.float32
    assert torch.equal(again.a.weight, module.a.weight.half().float())
    assert torch.equal(again.sigmas, module.sigmas)  # a noise table in half precision would be another table


def test_bad_weights_leave_the_old_model(folder: Path, zoo: Any) -> None:
    module = zoo.Tied()
    for value, dtype, message in [
        (float("nan"), None, "'a.bias' hold nan"),
        (1e6, torch.float16, "'a.bias' reach 1e.06"),
    ]:
        with torch.no_grad():
            module.a.bias[1] = value
        with pytest.raises(ValueError, match=message):
            save(module, TIED, folder, dtype)
    with pytest.raises(ValueError, match="dtype=torch.int8 is not floating"):
        save(module, TIED, folder, torch.int8)
    with pytest.raises(ValueError, match="does not name the module's class zoo.Tied"):
        save(module, LINEAR, folder)
    verify_manifest(folder)
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []


def test_saving_keeps_a_readme_and_refuses_a_folder_of_folders(folder: Path, zoo: Any) -> None:
    (folder / "README.md").write_text("card")
    save(zoo.Tied(), TIED, folder)
    assert (folder / "README.md").read_text() == "card"
    load(folder, ["zoo"])
    with pytest.raises(ValueError, match="holds other folders"):
        save(zoo.Tied(), TIED, folder.parent)


def test_a_failed_rename_brings_the_old_model_back(folder: Path, zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before, rename = (folder / "model.safetensors").read_bytes(), os.rename

    def failing(source: Path, target: Path) -> None:
        if target == folder and not str(source).endswith(".old"):
            raise OSError("disk full")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="disk full"):
        save(zoo.Tied(), TIED, folder)
    assert (folder / "model.safetensors").read_bytes() == before
    load(folder, ["zoo"])


def test_every_changed_byte_is_refused(folder: Path) -> None:
    for name in ("config.yaml", "model.safetensors", "manifest.json"):
        path = folder / name
        content = path.read_bytes()
        for at in range(0, len(content), max(1, len(content) // 40)):
            path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            if name == "manifest.json" and json.loads(content) == _json(path):
                continue
            with pytest.raises(ValueError, match="model"):
                load(folder, ["zoo"])
        path.write_bytes(content)
    load(folder, ["zoo"])


def _json(path: Path) -> object:
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return None


def test_missing_extra_and_long_files_are_named(folder: Path) -> None:
    def refused(message: str, **options: bool) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            load(folder, ["zoo"], **options)
        assert "\n" not in str(caught.value)

    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights + b"x")
    refused("model.safetensors has changed: .* bytes where")
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "more.json").write_text("{}")
    refused("more.json is not listed in")
    (folder / "more.json").unlink()
    (folder / "manifest.json").rename(folder / "manifest.txt")
    refused("no manifest.json to verify")
    load(folder, ["zoo"], verify=False)
    (folder / "model.safetensors").write_bytes(weights[:100])
    refused("not a readable safetensors file", verify=False)
    (folder / "model.safetensors").unlink()
    refused("no weights in .*model: looked for model.safetensors$")
    (folder / "model.ckpt").write_bytes(b"")
    refused("it holds model.ckpt, a pickle")
    shutil.rmtree(folder)
    refused("no such model folder: .*model")


def test_weights_that_do_not_fit_are_named(folder: Path) -> None:
    (folder / "config.yaml").write_text(yaml.safe_dump({"class_path": "zoo.Tied", "init_args": {"width": 5}}))
    write_manifest(folder)
    with pytest.raises(
        ValueError, match=r"does not fit its config.yaml: a.weight is \(4, 4\) in the file and \(5, 5\)"
    ):
        load(folder, ["zoo"])
    (folder / "config.yaml").write_text(yaml.safe_dump(LINEAR))
    write_manifest(folder)
    with pytest.raises(ValueError, match="missing bias, weight; unexpected a.bias, a.weight, b.bias, mask, sigmas"):
        load(folder)
    load(folder, strict=False)


def test_a_manifest_covers_a_pipeline_of_models(folder: Path, zoo: Any) -> None:
    pipeline = folder.parent / "pipeline"
    save(zoo.Tied(), TIED, pipeline / "base")
    save(zoo.Tied(), TIED, pipeline / "upsampler")
    (pipeline / "cascade.yaml").write_text("stages: [base, upsampler]\n")
    write_manifest(pipeline)
    verify_manifest(pipeline)
    load(pipeline / "base", ["zoo"])
    (pipeline / ".cache").mkdir()
    (pipeline / ".cache" / "hub.json").write_text("{}")
    verify_manifest(pipeline)
    save(zoo.Tied(), TIED, pipeline / "base")  # another model is in order, but not what the pipeline lists
    with pytest.raises(ValueError, match="base.*has changed"):
        verify_manifest(pipeline)


def test_fetch(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fetch(str(folder)) == folder
    for name in ("no/such/folder", "./nothing", "nothing", "https://example.org/model"):
        with pytest.raises(ValueError, match="no such folder: "):
            fetch(name)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(ValueError, match="user/model is neither a folder nor a model that the hub gives: ") as caught:
        fetch("user/model")  # the tests run offline
    assert "\n" not in str(caught.value)
    asked: dict[str, Any] = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: asked.update(options) or folder)
    assert fetch("user/model", revision="abc") == folder
    assert asked["revision"] == "abc"
    assert not any("bin" in pattern or "py" in pattern for pattern in asked["allow_patterns"])
