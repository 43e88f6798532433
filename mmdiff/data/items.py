"""One captioned media file and where its bytes are, and one line for each thing that cannot be used."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmdiff.data.media import DamagedError, UnreachableError

SPLITS = ("train", "val", "test")
SPLIT_NAMES = {"train": "train", "val": "val", "validation": "val", "test": "test"}


class Problem(str):
    """One line that names a thing that cannot be used, and why; `kind` is a word for reports that count the reasons.

    where: for people, such as `train-000000.tar:val_0001.mp4`.
    """

    where: str
    kind: str

    def __new__(cls, where: str, kind: str, reason: str) -> "Problem":
        self = super().__new__(cls, reason if where in reason else f"{where}: {reason}")
        self.where, self.kind = where, kind
        return self

    def __reduce__(self) -> tuple[type["Problem"], tuple[str, str, str]]:
        return Problem, (self.where, self.kind, str(self))


@dataclass(frozen=True)
class Item:
    """One captioned media file: a file of its own (`offset` None) or `size` bytes at `offset` of a tar shard.

    Holds no open file, so it can be pickled and read in any process.
    """

    key: str
    where: str  # for people: `train-000000.tar:val_0001.mp4` or a path below the source
    captions: list[str]
    meta: dict[str, Any]
    path: Path
    offset: int | None = None
    size: int = 0

    def read(self) -> bytes:
        """The bytes of the media file. Raises UnreachableError when they are gone, DamagedError when cut off."""
        try:
            with open(self.path, "rb") as file:
                if self.offset is None:
                    return file.read()
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as error:
            raise UnreachableError(f"{self.where}: cannot be read ({error}); check that it is there") from error
        return self.whole(data)

    def whole(self, data: bytes) -> bytes:
        """`data`. Raises DamagedError when it has another size than the item."""
        if len(data) != self.size:
            raise DamagedError(f"{self.where}: {len(data)} of {self.size} bytes are there; the shard was cut off")
        return data

    def source(self) -> bytes | Path:
        """What a reader opens: the path of a plain file, the bytes of anything else."""
        return self.path if self.offset is None else self.read()


@dataclass(frozen=True)
class Source:
    """The items of each split, and one line for each thing that had to be left out of it.

    keep: whatever the items' files need to stay, such as the temporary folder of what came through standard input.
    """

    splits: dict[str, list[Item]]
    problems: dict[str, list[Problem]] = field(default_factory=dict)
    keep: Any = None


Found = dict[str, list[Item | Problem]]  # split -> what lies in it, in order
