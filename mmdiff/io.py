"""Save and load: a model is a folder of config.yaml, model.safetensors and manifest.json.

config.yaml is the tree that LightningCLI read at training time (`mmdiff.config.build`); the manifest holds the size and
SHA-256 of every file that loading reads, for a flipped byte in a safetensors file loads silently. Nothing is unpickled.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .config import CONFIG, build, dump_config, read_config, trust_policy

__all__ = ["build", "fetch", "load", "read_config", "save", "trust_policy", "verify_manifest", "write_manifest"]

WEIGHTS, MANIFEST, SCHEMA = "model.safetensors", "manifest.json", 1
LISTED = (".yaml", ".json", ".safetensors")  # all that loading reads; a model card may be edited
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


def save(module: nn.Module, config: Mapping[str, Any], folder: str | Path, dtype: torch.dtype | None = None) -> Path:
    """Write the model folder of `module`, whole or not at all, and return it. Other files in it (a README) stay.

    config: the `class_path` tree that builds the module.
    dtype:  of the stored parameters (float16 halves the file); buffers, such as noise tables, keep their own.
    Raises ValueError if a weight is not finite, or not in `dtype`, if the tree names another class, or if the folder
    holds folders (a model has a folder of its own).
    """
    folder = Path(folder).resolve()
    text, state = dump_config(config), _stored_state(module, dtype)
    if str(config.get("class_path")).rpartition(".")[2] != type(module).__name__:
        raise ValueError(f"class_path={config.get('class_path')!r} does not name the module's class {_name(module)}")
    if folder.exists() and (not folder.is_dir() or any(entry.is_dir() for entry in folder.iterdir())):
        raise ValueError(f"{folder} is a file or holds other folders; save a model into a folder of its own")
    folder.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{folder.name}.new-", dir=folder.parent))
    try:
        staged.chmod(folder.parent.stat().st_mode & 0o777)  # mkdtemp's 0700 would hide the model from other users
        for entry in folder.iterdir() if folder.exists() else ():
            if entry.name not in (CONFIG, WEIGHTS, MANIFEST):
                shutil.copy2(entry, staged / entry.name)
        (staged / CONFIG).write_text(text, "utf-8")
        save_file(state, staged / WEIGHTS, metadata={"format": "pt"})
        shutil.copymode(staged / CONFIG, staged / WEIGHTS)  # save_file's 0600 would hide the weights from other users
        write_manifest(staged)
        _publish(staged, folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return folder


def load(folder: str | Path, trusted: Sequence[str] = (), verify: bool = True, strict: bool = True) -> nn.Module:
    """The saved module, in eval mode, with float32 parameters on the CPU.

    trusted: packages that the config may name besides our own and torch.nn (see `build`).
    verify:  check size and SHA-256 of every file against the manifest first.
    strict:  the file must hold exactly the module's tensors; shapes must agree in any case.
    Raises ValueError naming the file, the class or the tensors at fault.
    """
    folder = Path(folder)
    _check_weights(folder)
    if verify:
        verify_manifest(folder)
    with torch.random.fork_rng(devices=[]):  # the initial weights are overwritten and must not cost the caller's seed
        module = build(folder, trusted)
    if not isinstance(module, nn.Module):
        raise ValueError(f"{folder / CONFIG} builds a {_name(module)}, not an nn.Module")
    try:
        stored = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is not a readable safetensors file: {error}") from error
    own = _tensors(module)
    for name, first in _aliases(own).items():
        if name not in stored and first in stored:
            stored[name] = stored[first]
    _check_agreement(own, stored, folder / WEIGHTS, strict)
    module.load_state_dict(stored, strict=strict)
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    return module.eval()


def fetch(name: str | Path, revision: str | None = None) -> Path:
    """The local folder `name`, or a local copy of the Hugging Face hub's model `user/name` (only files that we read).

    revision: commit, tag or branch of the hub's model. Raises ValueError if there is neither.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", str(name)):
        raise ValueError(f"no such folder: {name} (nor is it a hub id such as user/model)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        patterns = ["*.yaml", "*.json", "*.safetensors", "README.md"]
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=patterns))
    except (OSError, HFValidationError) as error:  # the hub's and the network's errors are OSErrors
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{name} is neither a folder nor a model that the hub gives: {reason}") from error


def fingerprint(module: nn.Module) -> str:
    """First 12 digits of the SHA-256 of a module's named weights."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def write_manifest(folder: str | Path) -> Path:
    """Write `manifest.json` over the folder's YAML, JSON and safetensors files, those of sub-folders too."""
    folder = Path(folder)
    files = {name: _digest(folder / name) for name in _listed(folder)}
    if not files:
        raise ValueError(f"{folder} holds nothing to list; looked for {', '.join('*' + kind for kind in LISTED)}")
    text = json.dumps({"schema_version": SCHEMA, "files": files}, indent=2) + "\n"
    staged = folder / f".{MANIFEST}.new-{os.getpid()}"
    staged.write_text(text, "utf-8")
    _sync(staged)
    os.replace(staged, folder / MANIFEST)
    return folder / MANIFEST


def verify_manifest(folder: str | Path) -> None:
    """Raise ValueError, naming the file, if one is missing, changed or not listed in the folder's manifest."""
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} holds no {MANIFEST} to verify; pass verify=False if you know where it came from")
    try:
        manifest = json.loads(path.read_text("utf-8"))
        version, files = manifest["schema_version"], manifest["files"]
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a manifest: {type(error).__name__} {error}") from error
    if version != SCHEMA:
        raise ValueError(f"{path}: schema_version={version!r} is not {SCHEMA}; update mmdiff")
    found = _listed(folder)
    if missing := sorted(set(expected) - set(found)):
        raise ValueError(f"{folder / missing[0]} is missing; {path} lists it")
    if extra := sorted(set(found) - set(expected)):
        raise ValueError(f"{folder / extra[0]} is not listed in {path}; delete it or write the manifest again")
    for name, (size, sha256) in expected.items():
        if (actual := (folder / name).stat().st_size) != size:
            raise ValueError(f"{folder / name} has changed: {actual} bytes where {path} lists {size}")
        if _digest(folder / name)["sha256"] != sha256:
            raise ValueError(f"{folder / name} has changed: its SHA-256 is not the one in {path}")


def _listed(folder: Path) -> list[str]:
    """Names, relative and sorted, of the files a manifest covers: not itself, nothing hidden (a hub's cache)."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix in LISTED and path.is_file())
    visible = (name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts))
    return sorted(name for name in visible if name != MANIFEST)


def _digest(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _name(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def _check_weights(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"no such model folder: {folder}")
    if (folder / WEIGHTS).is_file():
        return
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    held = f" (it holds {pickles[0]}, a pickle, which could run code and is never read)" if pickles else ""
    raise ValueError(f"no weights in {folder}: looked for {WEIGHTS}{held}")


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    state = module.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"state {name!r} is a {type(value).__name__}, not a tensor; safetensors holds tensors only"
            )
    return dict(state)


def _aliases(state: Mapping[str, Tensor]) -> dict[str, str]:
    """From the name of a tensor to the earlier name of the same tensor (tied weights)."""
    first: dict[tuple[object, ...], str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in state.items():
        if tensor.numel() == 0:
            continue
        key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if (known := first.setdefault(key, name)) != name:
            aliases[name] = known
    return aliases


def _stored_state(module: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Contiguous CPU copies of the tensors, each once, the parameters cast. Raises ValueError if one is not finite."""
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype} is not floating point; use torch.float16 or torch.bfloat16")
    state = _tensors(module)
    aliases = _aliases(state)
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    stored: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in aliases:
            continue
        # A buffer may be infinite by design (a mask); a parameter may not.
        if name in parameters and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"weights {name!r} hold nan or inf; nothing is saved")
        cast = tensor.detach().to("cpu", dtype if name in parameters and tensor.is_floating_point() else tensor.dtype)
        if name in parameters and not bool(torch.isfinite(cast).all()):
            raise ValueError(
                f"weights {name!r} reach {float(tensor.abs().max()):.3g}, beyond {dtype}; use torch.bfloat16"
            )
        stored[name] = cast.clone(memory_format=torch.contiguous_format)
    return stored


def _check_agreement(own: Mapping[str, Tensor], stored: Mapping[str, Tensor], path: Path, strict: bool) -> None:
    faults = []
    if strict:
        faults += [f"missing {_some(own.keys() - stored.keys())}"] if own.keys() - stored.keys() else []
        faults += [f"unexpected {_some(stored.keys() - own.keys())}"] if stored.keys() - own.keys() else []
    faults += [
        f"{name} is {tuple(stored[name].shape)} in the file and {tuple(own[name].shape)} in the module"
        for name in own
        if name in stored and stored[name].shape != own[name].shape
    ][:3]
    if faults:
        raise ValueError(f"{path} does not fit its {CONFIG}: {'; '.join(faults)}")


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _publish(staged: Path, folder: Path) -> None:
    """Put a staged folder in the place of `folder`. Killed between the two renames, both lie whole beside it."""
    for path in (*staged.iterdir(), staged):
        _sync(path)
    old = Path(f"{staged}.old") if folder.exists() else None
    if old:
        os.rename(folder, old)
    try:
        os.rename(staged, folder)
    except OSError:
        if old:
            os.rename(old, folder)
        raise
    _sync(folder.parent)
    if old:
        shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
