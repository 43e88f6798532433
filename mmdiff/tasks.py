"""What an evaluation asks: the task a modality gives, and prompts in which everything asked for comes up in turn."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from .cascade import Clip
from .data.clips import ClipDataset
from .readers import Labels, Reader, Recipe, labels_of

SEEDS_APART = 1_000_000  # so that the clips of two seeds never share their noise

Splits = tuple[ClipDataset, ClipDataset]
Measure = Callable[[Tensor], Tensor]  # clips (B, C, T, ...) -> a number of each (B,)
Compare = Callable[[Tensor, Tensor], dict[str, Tensor]]  # (made, true) clips -> name -> a number of each (B,)
Stretch = Callable[[Tensor, tuple[int, ...]], Tensor]  # a low clip (B, C, T, ...) -> one of the shape (C, T, ...)


@dataclass(frozen=True)
class Restoring:
    """How upsampling stages are judged on real clips: beside `stretch`, which knows no clips, by `compare`.

    compare: of clips in [-1, 1], larger is better.
    """

    stretch: Stretch
    compare: Compare


@dataclass(frozen=True)
class Task:
    """What one evaluation needs of a modality.

    about:    one line for the help. data, pipeline: the default folders; data is None where clips are drawn.
    splits:   from a data folder and shape (C, T, ...) and rate of the pipeline's clips to train and validation clips,
        whose metadata holds the attributes.
    attributes: what is prompted and read. turns: groups of metadata whose values the prompts take in turn, the first
        group fastest.
    reader, recipe: the judge, whose features also are what distances are of, and its training. trained: its folder,
        where one ships.
    show:     writes clips (n, C, T, ...), with a title for each, into a folder.
    measured: reads clips (B, C, T, ...) of a rate by measuring; without it the reader reads them.
    apart:    name of metadata by whose values the scores are told apart too, such as seen and held-out.
    measures: name -> what is measured of clips by themselves.
    restoring: how the stages after the first are judged. count: clips to generate.
    """

    about: str
    data: str | None
    pipeline: Path
    splits: Callable[[str, tuple[int, ...], float], Splits]
    attributes: tuple[str, ...]
    turns: tuple[tuple[str, ...], ...]
    reader: type[Reader]
    recipe: Recipe
    show: Callable[[Path, Clip, list[str]], None]
    trained: Path | None = None
    measured: Callable[[Tensor, float], list[Labels]] | None = None
    apart: str | None = None
    measures: Mapping[str, Measure] = field(default_factory=dict)
    restoring: Restoring | None = None
    count: int = 100


@dataclass(frozen=True)
class Prompt:
    """A caption, what it asks for, the seed of the clip made from it, and the part of the prompts it belongs to."""

    caption: str
    labels: Labels
    seed: int
    part: str = ""


def in_turns(keys: Sequence[Sequence[Hashable]], count: int) -> list[int]:
    """`count` indices into `keys` with the values of the keys in turn: first the key's first part, then its next.

    A group that has run through its items begins anew. The groups of a later part start shifted from one group of the
    part before to the next, so that a short list is balanced too.
    """

    def order(indices: list[int], depth: int, shift: int) -> list[int]:
        if depth == len(keys[0]):
            return indices
        groups: dict[Hashable, list[int]] = {}
        for index in indices:
            groups.setdefault(keys[index][depth], []).append(index)
        names = sorted(groups, key=str)
        names = names[shift % len(names) :] + names[: shift % len(names)]
        rows = [order(groups[name], depth + 1, place) for place, name in enumerate(names)]
        return [row[turn % len(row)] for turn in range(max(map(len, rows))) for row in rows]

    if not keys:
        raise ValueError("no clips to take prompts from")
    whole = order(list(range(len(keys))), 0, 0)
    return [whole[i % len(whole)] for i in range(count)]


def balanced_prompts(task: Task, clips: ClipDataset, count: int, seed: int) -> list[Prompt]:
    """Default captions of `clips`, balanced over the task's attributes; the same for every seed but for the noise."""
    labels = [labels_of(item.meta, task.attributes) for item in clips.items]
    keys = [[tuple(str(item.meta[name]) for name in group) for group in task.turns] for item in clips.items]
    chosen = in_turns(keys, count)
    return [
        Prompt(clips.items[k].captions[0], labels[k], seed * SEEDS_APART + i, part_of(task, clips, k))
        for i, k in enumerate(chosen)
    ]


def part_of(task: Task, clips: ClipDataset, place: int) -> str:
    """The value of the metadata by which scores are told apart, or nothing."""
    return "" if task.apart is None else str(clips.items[place].meta[task.apart])
