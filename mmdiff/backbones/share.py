"""A network as a folder, or as a model on the Hugging Face hub: config.json and model.safetensors.

Importing this needs torch alone. huggingface_hub's PyTorchModelHubMixin is no base class here: it would have to be
imported with the networks, it falls back to unpickling, and it drops arguments that JSON cannot hold without a word.
"""

import functools
import inspect
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

CONFIG, WEIGHTS, CARD, SCHEMA = "config.json", "model.safetensors", "README.md", 1


class Shareable(nn.Module):
    """Module that remembers its constructor's arguments, so that a folder can hold all that it takes to build it again.

    Arguments may be numbers, strings, booleans, None, other Shareables, nn.Module classes (or a functools.partial that
    binds their keywords), and lists and mappings of all these.
    """

    _given: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        self = super().__new__(cls)
        self.__dict__["_given"] = args, kwargs  # nn.Module's own __setattr__ needs __init__ to have run
        return self

    def spec(self) -> dict[str, Any]:
        """The tree that builds the module: class_path, and init_args with the defaults of its signature written out.

        Raises ValueError naming an argument that JSON cannot hold.
        """
        args, kwargs = self._given
        bound = inspect.signature(type(self)).bind(*args, **kwargs)
        bound.apply_defaults()
        given: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            kind = bound.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_KEYWORD:
                given |= value
            elif kind is not inspect.Parameter.VAR_POSITIONAL:
                given[name] = value
            elif value:
                raise ValueError(f"{type(self).__name__} was given *{name}, which has no names to be stored under")
        return {
            "class_path": public_path(type(self)),
            "init_args": {name: _plain(value, name) for name, value in given.items()},
        }

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write config.json and model.safetensors into `folder`, each whole or not at all, and return it.

        Other files in it stay. Raises ValueError where an argument of the module cannot be stored.
        """
        from safetensors.torch import save_file

        config = {"schema_version": SCHEMA, **self.spec()}
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # copies, for tied tensors share memory, which safetensors refuses
        state = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in self.state_dict().items()}
        staged = {name: folder / f".{name}.new-{os.getpid()}" for name in (WEIGHTS, CONFIG)}
        try:
            save_file(state, staged[WEIGHTS], metadata={"format": "pt"})
            staged[CONFIG].write_text(json.dumps(config, indent=2, allow_nan=False) + "\n", "utf-8")
            shutil.copymode(staged[CONFIG], staged[WEIGHTS])  # save_file's is 0600, whatever the user's umask
            for name, path in staged.items():
                os.replace(path, folder / name)
        finally:
            for path in staged.values():
                path.unlink(missing_ok=True)
        return folder

    @classmethod
    def from_pretrained(cls, name: str | Path, revision: str | None = None) -> Self:
        """The stored module, in eval mode, on the CPU, in the default dtype.

        name: a folder, or a model `user/name` of the hub, whose commit, tag or branch is `revision`.
        The class that the folder names must be `cls` or derive from it, and be imported already: no file decides what
        code runs. Raises ValueError naming the file and all that does not fit: class, arguments, tensors.
        """
        folder = _fetch(name, revision)
        config = _read_config(folder / CONFIG)
        with torch.random.fork_rng(devices=[]):  # weights that are overwritten must not cost the caller's seed
            module = _build(config, cls, folder / CONFIG)
        stored = _read_weights(folder)
        _check_agreement(module.state_dict(), stored, folder / WEIGHTS)
        module.load_state_dict(stored)
        return module.eval()

    def push_to_hub(
        self, repo_id: str, private: bool = False, revision: str | None = None, message: str = "Upload model"
    ) -> str:
        """Upload the module to the hub's model `user/name`, made where there is none, and return the commit's address.

        revision: branch to commit to. A model card is added where the repository has none. Needs a login (`hf auth
        login`) or the variable HF_TOKEN; what the hub refuses it raises itself.
        """
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary:
            folder = self.save_pretrained(temporary)
            if not api.file_exists(repo_id, CARD, revision=revision):
                (folder / CARD).write_text(_card(type(self), repo_id), "utf-8")
            return str(
                api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message)
            )


def public_path(cls: type) -> str:
    """Dotted name of a class: the shortest by which its packages export it, so that its file may move."""
    parts = cls.__module__.split(".")
    for end in range(1, len(parts)):
        module = ".".join(parts[:end])
        if getattr(sys.modules.get(module), cls.__qualname__, None) is cls:
            return f"{module}.{cls.__qualname__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def _plain(value: Any, where: str) -> Any:
    """`value` as JSON holds it. Raises ValueError where it cannot."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, Shareable):
        return value.spec()
    bound = value if isinstance(value, functools.partial) else functools.partial(value) if callable(value) else None
    if bound is not None and inspect.isclass(bound.func) and issubclass(bound.func, nn.Module) and not bound.args:
        keywords = {key: _plain(item, f"{where}.{key}") for key, item in bound.keywords.items()}
        return {"constructor": public_path(bound.func), "keywords": keywords}
    raise ValueError(
        f"argument {where} is a {public_path(type(value))}, which {CONFIG} cannot hold: only numbers, strings, "
        "booleans, None, Shareables, nn.Module classes, lists and mappings of these; save the state dict yourself"
    )


def _fetch(name: str | Path, revision: str | None) -> Path:
    """The local folder `name`, or a local copy of the two files of the hub's model."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", str(name)):
        raise ValueError(f"no such folder: {name} (nor is it a hub id such as user/model)")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError
    except ImportError as error:
        raise ValueError(f"{name} is on the hub, which needs huggingface_hub: pip install huggingface-hub") from error
    try:
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=[CONFIG, WEIGHTS]))
    except (OSError, HFValidationError) as error:  # the hub's and the network's errors are OSErrors
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{name} is neither a folder nor a model that the hub gives: {reason}") from error


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"no such file: {path}; a model folder holds {CONFIG} and {WEIGHTS}")
    try:
        config = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict) or not _is_spec(config):
        raise ValueError(f"{path} is not the config of a Shareable: it needs schema_version, class_path and init_args")
    if config.get("schema_version") != SCHEMA:
        raise ValueError(f"{path}: schema_version={config.get('schema_version')!r} is not {SCHEMA}; update mmdiff")
    return config


def _is_spec(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("class_path"), str)
        and isinstance(value.get("init_args"), dict)
    )


def _build(spec: Mapping[str, Any], base: type[Any], path: Path) -> Any:
    """The module that a spec describes. Raises ValueError unless its class is imported and derives from `base`."""
    name = spec["class_path"]
    cls = _imported(name, base)
    if cls is None or not issubclass(cls, base):
        raise ValueError(
            f"{path} is of class {name}, not of {public_path(base)}; load it with its own class, "
            "after the module that defines it was imported"
        )
    arguments = {key: _rebuilt(value, path) for key, value in spec["init_args"].items()}
    try:
        return cls(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {name} refuses its arguments: {error}") from error


def _rebuilt(value: Any, path: Path) -> Any:
    """An argument as `_plain` stored it, its modules built."""
    if _is_spec(value):
        return _build(value, Shareable, path)
    if isinstance(value, dict) and value.keys() == {"constructor", "keywords"}:
        cls = _imported(value["constructor"], nn.Module)
        if cls is None or not issubclass(cls, nn.Module):
            raise ValueError(f"{path} needs {value['constructor']}, which is no nn.Module class that was imported")
        keywords = _rebuilt(value["keywords"], path)
        return functools.partial(cls, **keywords) if keywords else cls
    if isinstance(value, dict):
        return {key: _rebuilt(item, path) for key, item in value.items()}
    return [_rebuilt(item, path) for item in value] if isinstance(value, list) else value


def _imported(class_path: str, base: type) -> type | None:
    """The class of that name among what is imported; one of a script run as __main__ goes by its name alone."""
    module, _, name = class_path.rpartition(".")
    if name == base.__qualname__ and "__main__" in (module, base.__module__):
        return base
    found = getattr(sys.modules.get(module), name, None)
    return found if inspect.isclass(found) else None


def _read_weights(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS
    if not path.is_file():
        raise ValueError(f"no such file: {path}; weights are read from safetensors alone, never from a pickle")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error


def _check_agreement(own: Mapping[str, Tensor], stored: Mapping[str, Tensor], path: Path) -> None:
    """Raise one ValueError that names what is missing, what is unexpected and what has another shape."""
    faults = [
        f"{what} {_some(names)}"
        for what, names in (("missing", own.keys() - stored.keys()), ("unexpected", stored.keys() - own.keys()))
        if names
    ]
    misshapen = {name for name in own.keys() & stored.keys() if own[name].shape != stored[name].shape}
    faults += [
        f"{name} is {tuple(stored[name].shape)} in the file and {tuple(own[name].shape)} in the module"
        for name in sorted(misshapen)[:5]
    ]
    if faults:
        raise ValueError(f"{path} does not fit its {CONFIG}: {'; '.join(faults)}")


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _card(cls: type, repo_id: str) -> str:
    package, _, name = public_path(cls).rpartition(".")
    return f"""---
library_name: mmdiff
tags:
- diffusion
---
# {repo_id}

A network of mmdiff: forward(x, c_noise, cond).

```python
from {package} import {name}

net = {name}.from_pretrained("{repo_id}")
```
"""
