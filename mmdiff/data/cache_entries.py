"""A folder of tensors that are computed once; an entry's name holds all that they depend on, so none is stale."""

import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmdiff.data.media import whole_file

FORMAT = "1"  # of the files; a change of it makes older ones stale
SETTINGS = "cache.json"


class DamagedEntryError(ValueError):
    """An entry that is cut off or changed; the message names the file and the cure."""


@dataclass(frozen=True)
class Entries:
    """Tensors with facts, one safetensors file each, below `folder`.

    settings: what all of them depend on, in words. They are in every entry's name, and in the folder's cache.json, so
    that a folder made with others is refused instead of being filled a second time.
    """

    folder: Path
    settings: Mapping[str, str]

    def open(self) -> None:
        """Notes the settings in a new folder. Raises ValueError where the folder was made with others."""
        path, settings = self.folder / SETTINGS, {"format": FORMAT, **self.settings}
        if not path.is_file():
            with whole_file(path) as temporary:
                temporary.write_text(json.dumps(settings, indent=1) + "\n", "utf-8")
            return
        try:
            old = dict(json.loads(path.read_text("utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); delete the folder, and it is made again") from error
        changed = [f"{name} {old.get(name)}, now {value}" for name, value in settings.items() if old.get(name) != value]
        if changed:
            raise ValueError(
                f"{self.folder} is stale: it was made with {'; '.join(changed)}; name another folder, or delete it"
            )

    def path(self, *key: str | int | None) -> Path:
        """Of the entry of a key, there or not."""
        facts = json.dumps([FORMAT, sorted(self.settings.items()), key])
        name = hashlib.sha256(facts.encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def read(self, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """(tensors, facts), or None where there is no entry. Raises DamagedEntryError."""
        try:
            with safe_open(path, "pt") as file:
                noted = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            if noted["crc32"] != _crc32(tensors, noted["facts"]):
                raise ValueError("its checksum is another")
            return tensors, json.loads(noted["facts"])
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise DamagedEntryError(f"{path} is damaged ({error}); delete it, and it is made again") from error

    def write(self, path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Whole or not at all; several processes may write the same entry."""
        stored = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
        text = json.dumps(dict(facts))
        with whole_file(path) as temporary:
            save_file(stored, temporary, {"facts": text, "crc32": _crc32(stored, text)})


def _crc32(tensors: Mapping[str, Tensor], facts: str) -> str:
    """Of everything in an entry: safetensors itself does not notice a changed byte."""
    found = zlib.crc32(facts.encode())
    for name, tensor in sorted(tensors.items()):
        found = zlib.crc32(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode(), found)
        found = zlib.crc32(tensor.flatten().view(torch.uint8).numpy().data, found)
    return f"{found:08x}"
