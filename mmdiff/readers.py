"""Readers: small classifiers that tell what a clip shows, trained on real clips alone, to judge generated ones.

B clips, N clips of a split, A answers of all attributes together.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .data.clips import ClipDataset
from .data.items import Problem
from .distance import Extractor
from .io import fingerprint, load, save

Labels = dict[str, str]  # attribute -> value


class Reader(nn.Module, ABC):
    """Classifier with one answer for each attribute. A subclass's constructor takes `answers` alone.

    answers: attribute -> the values it can read. Raises ValueError if an attribute has fewer than two.
    """

    def __init__(self, answers: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        self.answers = {name: [*values] for name, values in answers.items()}
        for name, values in self.answers.items():
            if len(set(values)) < 2:
                raise ValueError(
                    f"attribute {name!r} has the values {values}; a reader needs at least two to choose from"
                )

    @property
    def sizes(self) -> list[int]:
        """Number of values of each attribute; they add up to A."""
        return [len(values) for values in self.answers.values()]

    @abstractmethod
    def reduce(self, x: Tensor) -> Tensor:
        """What it keeps of clips (B, C, T, ...) in [-1, 1]: deterministic, done once for each clip."""

    @abstractmethod
    def augment(self, kept: Tensor, generator: torch.Generator) -> Tensor:
        """A random variant of each clip of `reduce`'s output, of the same shape, that shows the same."""

    @abstractmethod
    def features(self, kept: Tensor) -> Tensor:
        """Features (B, D) of `reduce`'s output, from which the answers follow: what distances of clips are of."""

    @abstractmethod
    def forward(self, kept: Tensor) -> Tensor:
        """Logits (B, A) for `reduce`'s output, attribute after attribute."""


@dataclass(frozen=True)
class Recipe:
    """How a reader is trained: AdamW, one-cycle learning rate with the peak `lr`."""

    epochs: int
    batch_size: int = 32
    lr: float = 3e-3


def labels_of(meta: Mapping[str, Any], attributes: Sequence[str]) -> Labels:
    """The attributes of a clip's metadata as text. Raises ValueError if one is missing."""
    for name in attributes:
        if name not in meta:
            raise ValueError(
                f"a clip's metadata has no {name!r}, only {', '.join(sorted(meta))}; give data with labels"
            )
    return {name: str(meta[name]) for name in attributes}


@dataclass(frozen=True)
class Gathered:
    """What a reader keeps of a split, in half precision (N, ...), and the labels, the rate and each clip's place."""

    kept: Tensor
    labels: list[Labels]
    rate: float
    places: list[int]


def gather(
    reader: Reader, clips: ClipDataset, desc: str, visit: Callable[[Tensor, float], None] | None = None
) -> Gathered:
    """What the reader keeps of every clip of a split; `visit` sees each clip (1, C, T, ...) and its rate.

    Warns of a clip that cannot be used and goes on without it. Raises ValueError where the rates differ.
    """
    kept, labels, rates, places = [], [], set(), []
    for index in tqdm(range(len(clips)), desc=desc, unit="clip"):
        item = clips.result(index)
        if isinstance(item, Problem):
            warnings.warn(f"left out: {item}", stacklevel=2)
            continue
        kept.append(reader.reduce(item["x"][None]).half())
        labels.append(labels_of(item["meta"], list(reader.answers)))
        rates.add(float(item["rate"]))
        places.append(index)
        if visit is not None:
            visit(item["x"][None], float(item["rate"]))
    if len(rates) != 1:
        raise ValueError(f"the clips have the rates {sorted(rates)}; a reader needs clips of one rate")
    return Gathered(torch.cat(kept), labels, rates.pop(), places)


def train_reader(reader: Reader, kept: Tensor, labels: Sequence[Labels], recipe: Recipe, seed: int) -> Reader:
    """`reader` trained in place, in eval mode.

    kept: (N, ...), as `gather` gives it. seed: of the order and the augmentation; no global generator is touched.
    """
    places = [{value: i for i, value in enumerate(values)} for values in reader.answers.values()]
    target = torch.tensor(
        [[place[label[name]] for name, place in zip(reader.answers, places, strict=True)] for label in labels]
    )
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=recipe.lr, weight_decay=0.01)
    batches = -(-len(kept) // recipe.batch_size)
    total = recipe.epochs * batches
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=total, cycle_momentum=False)
    reader.train()
    with torch.random.fork_rng(devices=[]), tqdm(total=total, desc="training the reader", unit="step") as bar:
        torch.manual_seed(seed)  # dropout draws from the global generator
        for _ in range(recipe.epochs):
            for chosen in torch.randperm(len(kept), generator=generator).tensor_split(batches):
                logits = reader(reader.augment(kept[chosen].float(), generator))
                parts = zip(logits.split(reader.sizes, dim=1), target[chosen].unbind(1), strict=True)
                loss = torch.stack([F.cross_entropy(part, right, label_smoothing=0.05) for part, right in parts]).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
                if bar.n % 10 == 0:
                    bar.set_postfix(loss=f"{loss.item():.3f}")
    return reader.eval()


@torch.inference_mode()
def read(reader: Reader, kept: Tensor, batch_size: int = 64) -> list[Labels]:
    """The reader's answers for every clip of `kept` (N, ...), as `Reader.reduce` gives it."""
    found: list[Labels] = []
    for part in kept.split(batch_size):
        best = [logits.argmax(dim=1).tolist() for logits in reader(part.float()).split(reader.sizes, dim=1)]
        for row in zip(*best, strict=True):
            named = zip(reader.answers.items(), row, strict=True)
            found.append({name: values[place] for (name, values), place in named})
    return found


@torch.inference_mode()
def features_of(reader: Reader, kept: Tensor, batch_size: int = 64) -> Tensor:
    """The reader's features (N, D) of every clip of `kept` (N, ...)."""
    return torch.cat([reader.features(part.float()) for part in kept.split(batch_size)])


def new_reader(kind: type[Reader], labels: Sequence[Labels], seed: int) -> Reader:
    """An untrained reader of the values that occur in `labels`, with weights that follow from `seed`."""
    answers = {name: sorted({label[name] for label in labels}) for name in labels[0]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(answers)


def save_reader(reader: Reader, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write the reader's model folder (see `mmdiff.io.save`)."""
    kind = type(reader)
    tree = {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": {"answers": reader.answers}}
    save(reader, tree, folder, dtype)


def load_reader(kind: type[Reader], folder: str | Path, answers: Mapping[str, Sequence[str]]) -> Reader:
    """The reader saved in `folder`. Raises ValueError if it is another kind's or reads other values than `answers`."""
    reader = load(folder, trusted=[kind.__module__])
    if type(reader) is not kind:
        raise ValueError(f"{folder} holds a {type(reader).__name__}, not a {kind.__name__}; give another folder")
    if reader.answers != {name: [*values] for name, values in answers.items()}:
        raise ValueError(
            f"the reader in {folder} reads {reader.answers}, the data has {dict(answers)}; give another folder"
        )
    return reader


class ReaderFeatures(Extractor):
    """The features of the reader that is saved in `folder`. Raises ValueError if another kind of model is."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        reader = load(folder)
        if not isinstance(reader, Reader):
            raise ValueError(f"{folder} holds a {type(reader).__name__}, not a reader")
        self.reader = reader

    @property
    def protocol(self) -> str:
        return f"features of {type(self.reader).__name__} {fingerprint(self.reader)}"

    def forward(self, x: Tensor) -> Tensor:
        return features_of(self.reader, self.reader.reduce(x))
