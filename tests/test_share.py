"""Networks as folders and on the hub: what is stored, what comes back, what is refused."""

import copy
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmdiff.backbones.share import Shareable, public_path


class Net(Shareable):
    """A network with arguments of every kind that can be stored, and a buffer."""

    def __init__(
        self,
        width: int,
        factors: Sequence[Sequence[int]] = ((1, 2), (2, 2)),
        rate: float = 0.5,
        name: str | None = None,
        part: nn.Module | None = None,
        *,
        options: dict[str, Any] | None = None,
        deep: bool = False,
    ) -> None:
        super().__init__()
        self.layer, self.part = nn.Linear(width, 2), part
        self.settings = (width, factors, rate, name, options, deep)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))


class Named(Net):
    """A named constructor: it passes on what it does not name."""

    def __init__(self, rate: float = 0.25, **rest: Any) -> None:
        super().__init__(width=3, rate=rate, **rest)


class Tied(Shareable):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)
        self.b.weight = self.a.weight


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_equal(module: nn.Module, expected: dict[str, Tensor]) -> None:
    got = module.state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], value) for name, value in expected.items())


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    umask = os.umask(0o022)
    yield Net(4, name="né").save_pretrained(tmp_path / "deep" / "net")
    os.umask(umask)


def edit(folder: Path, **changes: Any) -> None:
    tree = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(tree | changes))


def test_a_folder_gives_back_arguments_and_weights_bit_for_bit(tmp_path: Path) -> None:
    net = Net(4, [(1, 2), (4, 4)], 0.1, options={"k": [1, None, "x"]}, deep=True)
    net.count += 7
    net.save_pretrained(tmp_path)
    again = Net.from_pretrained(tmp_path)
    assert again.settings == (4, [[1, 2], [4, 4]], 0.1, None, {"k": [1, None, "x"]}, True)
    assert_equal(again, state(net))
    assert not again.training
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert again.spec() == net.spec()


def test_other_users_may_read_what_the_umask_lets_them(folder: Path) -> None:
    assert {(folder / name).stat().st_mode & 0o777 for name in ("config.json", "model.safetensors")} == {0o644}


def test_defaults_are_written_out_so_that_a_change_of_theirs_changes_no_stored_model(folder: Path) -> None:
    tree = json.loads((folder / "config.json").read_text("utf-8"))
    assert tree["schema_version"] == 1
    assert tree["class_path"] == public_path(Net)
    assert tree["init_args"]["factors"] == [[1, 2], [2, 2]]
    assert tree["init_args"]["rate"] == 0.5


def test_a_subclass_is_stored_by_its_own_arguments_and_loads_by_its_base_too(tmp_path: Path) -> None:
    net = Named(name="n", deep=True)
    net.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["init_args"] == {"rate": 0.25, "name": "n", "deep": True}
    for cls in (Named, Net, Shareable):
        again = cls.from_pretrained(tmp_path)
        assert type(again) is Named
        assert again.settings == net.settings
        assert_equal(again, state(net))


def test_modules_among_the_arguments_are_stored_where_they_are_shareable(tmp_path: Path) -> None:
    net = Net(4, part=Named(part=Tied()), options={"parts": [Tied(2)]})
    net.save_pretrained(tmp_path)
    again = Net.from_pretrained(tmp_path)
    assert type(again.part) is Named
    assert type(again.part.part) is Tied
    assert type(again.settings[4]["parts"][0]) is Tied
    assert_equal(again, state(net))


def test_classes_of_modules_among_the_arguments_are_stored_by_name(tmp_path: Path) -> None:
    net = Net(4, options={"plain": nn.SiLU, "bound": functools.partial(nn.ELU, alpha=2.0)})
    net.save_pretrained(tmp_path)
    options = Net.from_pretrained(tmp_path).settings[4]
    assert options["plain"] is nn.SiLU
    assert options["bound"]().alpha == 2.0
    assert json.loads((tmp_path / "config.json").read_text())["init_args"]["options"]["plain"]["constructor"] == (
        "torch.nn.SiLU"
    )


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ({"part": nn.Linear(2, 2)}, "argument part is a torch.nn.Linear"),
        ({"options": {"f": [torch.relu]}}, r"argument options.f\[0\] is a"),
        ({"options": {"t": torch.zeros(1)}}, "argument options.t is a torch.Tensor"),
        ({"options": {"p": functools.partial(nn.ELU, 2.0)}}, "argument options.p is a functools.partial"),
        ({"options": {"c": Path}}, "argument options.c is a builtins.type"),
        ({"options": {1: 2}}, "argument options is a builtins.dict"),
    ],
    ids=["module", "function", "tensor", "positional", "class", "key"],
)
def test_an_argument_that_json_cannot_hold_is_named_and_nothing_is_written(
    given: dict[str, Any], where: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=where):
        Net(4, **given).save_pretrained(tmp_path / "net")
    assert not (tmp_path / "net").exists()


def test_not_a_number_is_refused_and_leaves_the_stored_model_as_it_was(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match="JSON compliant"):
        Net(4, rate=float("nan")).save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    net = Tied()
    net.save_pretrained(tmp_path)
    again = Tied.from_pretrained(tmp_path)
    assert again.a.weight is again.b.weight
    assert_equal(again, state(net))


def test_copies_and_compiled_modules_know_their_arguments() -> None:
    net = Named(name="n")
    for other in (copy.deepcopy(net), copy.copy(net), torch.compile(net, backend="eager")):
        assert other.spec() == net.spec()


def test_loading_leaves_the_caller_s_random_numbers_alone(folder: Path) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    Net.from_pretrained(folder)
    assert torch.equal(torch.rand(3), expected)


def test_missing_unexpected_and_misshapen_tensors_are_named_in_one_error(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    del stored["count"]
    save_file({**stored, "extra": torch.zeros(1), "layer.weight": torch.zeros(2, 5)}, folder / "model.safetensors")
    message = r"missing count; unexpected extra; layer.weight is \(2, 5\) in the file and \(2, 4\) in the module"
    with pytest.raises(ValueError, match=message):
        Net.from_pretrained(folder)


def test_a_config_of_another_class_is_refused_naming_both(folder: Path) -> None:
    with pytest.raises(ValueError, match=f"of class {public_path(Net)}, not of {public_path(Named)}"):
        Named.from_pretrained(folder)


def test_a_file_can_import_and_call_nothing(folder: Path) -> None:
    for path in ("antigravity.Net", "os.system", "subprocess.Popen", "torch.nn.Linear"):
        edit(folder, class_path=path)
        with pytest.raises(ValueError, match=f"of class {path}, not of"):
            Shareable.from_pretrained(folder)
    for path in ("antigravity.Net", "os.system", "subprocess.Popen", "torch.Generator"):
        edit(
            folder,
            class_path=public_path(Net),
            init_args={"width": 4, "options": {"constructor": path, "keywords": {}}},
        )
        with pytest.raises(ValueError, match=f"needs {path}, which is no nn.Module class"):
            Net.from_pretrained(folder)


def test_the_class_of_a_script_is_found_when_the_script_is_imported(folder: Path) -> None:
    edit(folder, class_path="__main__.Net")
    assert isinstance(Net.from_pretrained(folder), Net)
    with pytest.raises(ValueError, match="of class __main__.Net, not of"):
        Tied.from_pretrained(folder)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda f: (f / "config.json").write_bytes(b"\xff"), "config.json is not JSON"),
        (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json is not JSON"),
        (lambda f: (f / "config.json").write_text("[1]"), "needs schema_version, class_path and init_args"),
        (lambda f: edit(f, init_args=[1]), "needs schema_version, class_path and init_args"),
        (lambda f: edit(f, schema_version=2), "schema_version=2 is not 1; update mmdiff"),
        (lambda f: edit(f, init_args={"width": 4, "wdth": 1}), "refuses its arguments: .*wdth"),
        (lambda f: (f / "config.json").unlink(), "no such file: .*config.json"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), "not a readable safetensors file"),
        (lambda f: (f / "model.safetensors").rename(f / "model.bin"), "never from a pickle"),
        (lambda f: shutil.rmtree(f), "no such folder: .* hub id such as user/model"),
    ],
    ids=["json", "bytes", "deep", "list", "args", "schema", "argument", "no-config", "header", "pickle", "no-folder"],
)
def test_a_broken_folder_is_one_value_error(break_it: Callable[[Path], object], message: str, folder: Path) -> None:
    break_it(folder)
    with pytest.raises(ValueError, match=message):
        Net.from_pretrained(folder)


class Hub:
    """Stands in for the hub: keeps what is uploaded in a folder."""

    def __init__(self, root: Path) -> None:
        self.root, self.calls = root, []

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        self.calls.append(("create", repo_id, private))

    def file_exists(self, repo_id: str, name: str, *, revision: str | None) -> bool:
        return (self.root / name).exists()

    def upload_folder(self, *, repo_id: str, folder_path: Path, revision: str | None, commit_message: str) -> str:
        self.calls.append(("upload", repo_id, revision, commit_message))
        shutil.copytree(folder_path, self.root, dirs_exist_ok=True)
        return f"https://hub/{repo_id}/commit/1"

    def download(self, repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        self.calls.append(("download", repo_id, revision))
        if repo_id != "user/net":
            raise OSError("Repository Not Found\nlong text")
        return str(self.root)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    import huggingface_hub

    made = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.download)
    return made


def test_a_network_goes_to_the_hub_and_back(hub: Hub) -> None:
    net = Net(4)
    address = net.push_to_hub("user/net", private=True, revision="dev", message="First")
    assert address == "https://hub/user/net/commit/1"
    assert_equal(Net.from_pretrained("user/net", revision="dev"), state(net))
    assert hub.calls == [
        ("create", "user/net", True),
        ("upload", "user/net", "dev", "First"),
        ("download", "user/net", "dev"),
    ]
    module, _, name = public_path(Net).rpartition(".")
    assert f"from {module} import {name}\n" in (hub.root / "README.md").read_text()


def test_a_model_card_on_the_hub_is_not_overwritten(hub: Hub) -> None:
    hub.root.mkdir()
    (hub.root / "README.md").write_text("mine")
    Net(4).push_to_hub("user/net")
    assert (hub.root / "README.md").read_text() == "mine"


def test_what_the_hub_refuses_is_one_line(hub: Hub) -> None:
    with pytest.raises(ValueError, match="user/other is neither a folder nor a model that the hub gives: .*Not Found$"):
        Net.from_pretrained("user/other")


def test_a_model_that_is_not_in_the_cache_is_one_line_where_there_is_no_network() -> None:
    with pytest.raises(ValueError, match="^nobody/nothing is neither a folder nor a model that the hub gives: [^\n]*$"):
        Net.from_pretrained("nobody/nothing")  # the tests run with HF_HUB_OFFLINE=1


def test_the_signatures_of_the_hub_s_client_are_those_that_are_called() -> None:
    import inspect

    from huggingface_hub import HfApi, snapshot_download

    for function, names in (
        (HfApi.create_repo, {"repo_id", "private", "exist_ok"}),
        (HfApi.file_exists, {"repo_id", "filename", "revision"}),
        (HfApi.upload_folder, {"repo_id", "folder_path", "revision", "commit_message"}),
        (snapshot_download, {"repo_id", "revision", "allow_patterns"}),
    ):
        assert names <= set(inspect.signature(function).parameters)


def test_the_constructor_s_signature_is_the_class_s_own() -> None:
    import inspect

    from jsonargparse import ArgumentParser

    from mmdiff.config import trust_policy

    trust_policy(["tests"])  # jsonargparse keeps one policy for the process, which other tests set
    assert next(iter(inspect.signature(Net).parameters)) == "width"
    parser = ArgumentParser()
    parser.add_subclass_arguments(nn.Module, "net")
    parsed = parser.instantiate(parser.parse_args([f"--net={Net.__module__}.Net", "--net.width=4", "--net.rate=0.75"]))
    assert parsed.net.spec()["init_args"]["rate"] == 0.75
