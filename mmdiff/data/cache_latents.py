"""A decoder of latents: those of an entry, or else of the clip that is decoded and encoded now.

B clips, C channels, T time. An entry is the latents of one clip of one file, with the times that go with them.
"""

import hashlib
import json
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from mmdiff.autoencoder import Autoencoder
from mmdiff.data.batches import Shape
from mmdiff.data.cache_entries import DamagedEntryError, Entries
from mmdiff.data.clips import Decode, Sample
from mmdiff.data.items import Item
from mmdiff.data.media import MediaError, UnreachableError, whole_file
from mmdiff.io import fingerprint, load, read_config

DTYPES = {"float32": torch.float32, "float16": torch.float16}
CHUNK = 1 << 20  # bytes of a file that are read at once
TIMES = ("rate", "duration_s", "start_s", "total_s")
Missing = Literal["ahead", "later", "refuse"]


@dataclass(frozen=True)
class Latents:
    """A `Decode` whose samples hold latents (C, T, ...), and a mask of latents where `decode` gives one.

    decode: of the data. model: folder of the autoencoder. crops: clips of a file that training chooses from. renew:
    epochs after which a file's clips give way to others, at an epoch of each file's own; 0 keeps them. missing:
    "refuse" makes an entry that is not there an error. contents: SHA-256 of the items' bytes by `identity`, or by
    `Item.where` for what has none; that of another item is computed at every call.
    """

    decode: Decode
    entries: Entries
    model: str
    crops: int = 1
    renew: int = 0
    missing: Missing = "ahead"
    contents: dict[str, str] = field(default_factory=dict, repr=False)

    def __call__(self, item: Item, rng: random.Random | None) -> Sample:
        """Raises MediaError for a file that cannot be decoded; ValueError for what is missing, where that is refused,
        and when the autoencoder's folder is no longer the one that the cache was opened with."""
        content = self.content(item)
        age = 0 if rng is None else self.age(content, getattr(rng, "epoch", 0))
        crop = None if rng is None else rng.randrange(self.crops) + self.crops * age
        found = self.read(content, crop)
        if found is None:
            sample = self.clip(item, content, crop)
            if self.missing == "refuse":
                raise ValueError(missing_line([item.where], self.entries.folder))
            model = _loaded(self.model, self.encoded_by)
            found = self.write(content, crop, encoded(model, [sample], torch.device("cpu"))[0])
            for old in range(self.crops * max(0, age - 1), self.crops * age):
                self.path(content, old).unlink(missing_ok=True)
        return found

    @property
    def encoded_by(self) -> str:
        """Fingerprint of the autoencoder's weights."""
        return self.entries.settings["autoencoder"]

    def to(self, shape: Shape) -> "Latents":
        """The same for clips of a bucket's shape."""
        shaped: Any = self.decode
        return replace(self, decode=shaped.to(shape))

    def content(self, item: Item) -> str:
        """SHA-256 of the item's bytes as they are now. Raises MediaError when they are gone."""
        return self.contents.get(identity(item) or item.where) or sha256(item)

    def age(self, content: str, epoch: int) -> int:
        """How often the clips of a file have been renewed."""
        return (epoch + int(content[:8], 16) % self.renew) // self.renew if self.renew else 0

    def clip(self, item: Item, content: str, crop: int | None) -> Sample:
        """The decoded clip: which part of the file a crop is follows from its number and what the file holds."""
        sample = self.decode(item, None if crop is None else random.Random(f"{content}/{crop}"))
        if not isinstance(sample.data, Tensor):
            raise ValueError(f"{item.where}: clips of {' and '.join(sample.data)} together; one of them can be cached")
        return sample

    def path(self, content: str, crop: int | None) -> Path:
        """Of an entry: it changes with the file's bytes, the crop, the decoder, and what all entries depend on."""
        return self.entries.path(content, crop, repr(self.decode))

    def read(self, content: str, crop: int | None) -> Sample | None:
        """The sample of an entry, None where there is none, or, with a warning, a damaged one that is made again.

        Raises DamagedEntryError where nothing may be made.
        """
        try:
            found = self.entries.read(self.path(content, crop))
        except DamagedEntryError as error:
            if self.missing == "refuse":
                raise
            warnings.warn(str(error), stacklevel=3)
            return None
        if found is None:
            return None
        tensors, times = found
        return Sample(tensors["latents"].float(), **times, mask=tensors.get("mask"), encoded_by=self.encoded_by)

    def write(self, content: str, crop: int | None, sample: Sample) -> Sample:
        """Makes the entry of a sample that `encoded` gave. Returns it as it will be read, rounded to the dtype."""
        stored = {"latents": sample.data.to(DTYPES[self.entries.settings["dtype"]])}  # type: ignore[union-attr]
        if sample.mask is not None:
            stored["mask"] = sample.mask  # type: ignore[assignment]
        self.entries.write(self.path(content, crop), stored, {name: getattr(sample, name) for name in TIMES})
        return replace(sample, data=stored["latents"].float(), encoded_by=self.encoded_by)


def missing_line(wheres: Sequence[str], folder: Path) -> str:
    """What to say of items without latents, the first few by name."""
    names = ", ".join(wheres[:3]) + (f" and {len(wheres) - 3} more" if len(wheres) > 3 else "")
    return f"no latents in {folder} of {names}: new or changed files; run mmdiff encode on the config, or set missing"


@torch.inference_mode()
def encoded(model: Autoencoder, samples: Sequence[Sample], device: torch.device) -> list[Sample]:
    """Samples of one shape with their latents in the place of data, and their masks where latents are known by them."""
    x = torch.stack([sample.data for sample in samples]).to(device)  # type: ignore[misc]
    latents = model.encode(x).cpu()
    masks: list[Any] = [None] * len(samples)
    if samples[0].mask is not None:
        there = torch.stack([sample.mask for sample in samples])  # type: ignore[misc]
        whole = there.reshape(len(x), 1, -1, *(1,) * (x.ndim - 3)).expand(len(x), 1, *x.shape[2:])  # (B, 1, T, ...)
        masks = list(model.known(whole).clone())
    return [replace(s, data=z, mask=mask) for s, z, mask in zip(samples, latents, masks, strict=True)]


def autoencoder_of(folder: str) -> tuple[Autoencoder, dict[str, str]]:
    """(the autoencoder of a folder, its weights and the rest of it in words). Raises ValueError for another model."""
    model = load(folder)
    if not isinstance(model, Autoencoder):
        raise ValueError(f"autoencoder={folder} holds a {type(model).__name__}, not an autoencoder")
    tree = json.dumps(read_config(folder), sort_keys=True)
    words = {"autoencoder": fingerprint(model), "its config": hashlib.sha256(tree.encode()).hexdigest()[:12]}
    return model.eval().requires_grad_(False), words


@lru_cache(maxsize=1)
def _loaded(folder: str, encoded_by: str) -> Autoencoder:
    """The autoencoder of a process, loaded when the first entry is missing."""
    model, words = autoencoder_of(folder)
    if words["autoencoder"] != encoded_by:
        raise ValueError(f"{folder} has changed while its latents were in use: it was {encoded_by}; start again")
    return model


def identity(item: Item) -> str | None:
    """What changes when the bytes of a local file do, short of reading them; None for what is no local file."""
    try:
        stat = item.path.stat()
    except OSError:
        return None
    return f"{item.path.resolve()}:{item.offset}:{item.size}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"


def sha256(item: Item) -> str:
    """Of the item's bytes, in hexadecimal. Raises MediaError when they are gone."""
    if item.offset is not None or type(item) is not Item:
        return hashlib.sha256(item.read()).hexdigest()
    found = hashlib.sha256()
    try:
        with open(item.path, "rb") as file:
            while chunk := file.read(CHUNK):  # a long film need not fit into memory
                found.update(chunk)
    except OSError as error:
        raise UnreachableError(f"{item.where}: cannot be read ({error}); check that it is there") from error
    return found.hexdigest()


def contents_of(items: Sequence[Item], folder: Path) -> dict[str, str]:
    """SHA-256 of the items' bytes, as `Latents` takes them, noted in `folder` so that an unchanged file is read once.

    What is no local file is read once a run. An item that cannot be read is left out.
    """
    path = folder / "contents.json"
    try:
        known: dict[str, str] = dict(json.loads(path.read_text("utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        known = {}
    found, local = dict[str, str](), dict[str, str]()
    for item in tqdm(items, desc="fingerprints of files", unit="file", leave=False, disable=None):
        name = identity(item)
        try:
            content = (known.get(name) if name else None) or sha256(item)
        except MediaError:
            continue
        found[name or item.where] = content
        if name:
            local[name] = content
    if not local.keys() <= known.keys():
        with whole_file(path) as temporary:
            temporary.write_text(json.dumps(known | local) + "\n", "utf-8")
    return found
