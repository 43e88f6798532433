"""Options of the commands that take media: what to start from, what to keep, what to add. A modality reads the files.

B batch, C channels, T time; clips are (B, C, T, ...), masks bool (1, 1, T, ...).
"""

import argparse
import functools
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from .cascade import Cascade, Clip, Shape
    from .conditioning import Batch
    from .editing import Edit
    from .sampling import Noise

STRENGTH = 0.6  # of --init alone: enough to change what is seen, little enough to know it again
NAMES = ("init", "strength", "mask", "extend", "first_frame", "last_frame", "reference", "until", "fps", "size")
FILES = ("init", "first_frame", "last_frame", "reference")
HELD = 32  # most time steps that one latent may stand for


class Media(ABC):
    """What a modality knows of files. fade_s: seconds over which decoded samples give way to given ones."""

    fade_s = 0.0

    @abstractmethod
    def check(self, path: Path) -> None:
        """Raises ValueError for a file that cannot be read, before anything is loaded."""

    @abstractmethod
    def read(self, path: Path, shape: "Shape", rate: float) -> "tuple[Tensor, str]":
        """The file as a clip (1, C, T, ...) in [-1, 1] of the rate and the sizes of `shape`, T its own but not longer.

        Sizes are reached as in training. Also returns what the file is, in words. A still is one step.
        """

    @abstractmethod
    def pad(self, clip: "Tensor", length: int) -> "Tensor":
        """The clip, continued to `length` steps as a short file is in training."""

    @abstractmethod
    def check_mask(self, mask: str) -> None:
        """Raises ValueError for a mask that cannot be read, before anything is loaded."""

    @abstractmethod
    def mask(self, mask: str, shape: "Shape", rate: float) -> "Tensor":
        """What --mask names, bool (1, 1, T, ...) of `shape`: True where the clip is generated anew."""

    @abstractmethod
    def describe(self, shape: "Shape", rate: float) -> str:
        """A clip (C, T, ...) in words."""


class Make(Protocol):
    """Makes the clips of one batch of prompts."""

    def __call__(
        self,
        prompt: "Batch",
        *,
        noise: "Noise",
        negative: "Batch | None",
        progress: Callable[[str, int, int], None] | None,
        watch: Callable[[str, "Clip"], None] | None,
    ) -> "Clip": ...


def add_options(options: argparse.ArgumentParser, mask: str, frames: bool = False) -> None:
    """mask: what --mask takes, for its help. frames: whether there are options for the first and the last one."""
    options.add_argument("--init", type=Path, metavar="FILE", help="start from this clip; resized and cut as needed")
    options.add_argument(
        "--strength", type=float, metavar="S",
        help=f"how much of --init to change: 0 nothing, 1 all, between: share of steps (default: {STRENGTH}; 1 with "
        "--mask)",
    )  # fmt: skip
    options.add_argument("--mask", metavar="WHERE", help=f"with --init, what to generate anew, the rest stays: {mask}")
    options.add_argument("--extend", type=float, metavar="SECONDS", help="with --init, go on for so long after its end")
    if frames:
        options.add_argument("--first-frame", type=Path, metavar="IMAGE", help="the clip starts with this picture")
        options.add_argument("--last-frame", type=Path, metavar="IMAGE", help="the clip ends with this picture")
    options.add_argument(
        "--reference", type=Path, metavar="FILE", help="make what this shows or sounds like; for models that read one"
    )


def check(given: argparse.Namespace, media: Media) -> None:
    """Raises ValueError for options that contradict each other and files that cannot be read. Loads no model."""
    options: dict[str, Any] = {name: getattr(given, name, None) for name in NAMES}
    if options["init"] is None:
        for name in ("strength", "mask", "extend"):
            if options[name] is not None:
                raise ValueError(f"--{name} needs --init FILE, the clip to edit")
    else:
        for name in ("first_frame", "last_frame"):
            if options[name] is not None:
                raise ValueError(f"give --init or --{name.replace('_', '-')}, not both")
    if options["extend"] is not None:
        for name in ("strength", "mask", "duration", "frames", "fps"):
            value = getattr(given, name, None)
            if value is not None and value is not False:
                raise ValueError(
                    f"--extend keeps all of --init and adds to it: it goes without --{name.replace('_', '-')}"
                )
        if not (math.isfinite(options["extend"]) and options["extend"] > 0):
            raise ValueError(f"--extend {options['extend']} must be a number of seconds above 0")
    if options["strength"] is not None and not 0 <= options["strength"] <= 1:
        raise ValueError(f"--strength {options['strength']} is outside 0..1; 0 keeps the input, 1 ignores it")
    for name in FILES:
        if options[name] is not None:
            media.check(options[name])
    if options["mask"] is not None:
        media.check_mask(options["mask"])


def files(given: argparse.Namespace) -> list[str]:
    """The options that were given and name a file to go by."""
    return [f"--{name.replace('_', '-')}" for name in FILES if getattr(given, name, None) is not None]


def maker(given: argparse.Namespace, media: Media | None, cascade: "Cascade", steps: int, most: int) -> Make:
    """What makes the clips that the options ask for; tells on stderr what it takes of a file.

    steps: length that the options ask for, or the cascade's. most: longest clip that may be made.
    Raises ValueError where the result would be longer, or a mask leaves nothing to do.
    """
    channels, _, *sizes = cascade.shape
    plain: Make = functools.partial(cascade, shape=(channels, steps, *sizes))
    if media is None or not files(given):
        return plain
    work = Work(given, media, cascade, steps, most)
    made = plain
    if given.extend is not None:
        made = work.continued()
    elif given.init is not None:
        made = work.edited()
    elif files(given) != ["--reference"]:
        made = work.framed()
    return made if given.reference is None else work.referring(made)


@dataclass(frozen=True)
class Work:
    """What `maker` goes by: the options, how files are read, and what of."""

    given: argparse.Namespace
    media: Media
    cascade: "Cascade"
    steps: int
    most: int

    @property
    def fade(self) -> int:
        """Steps of T: decoded sounds have phases of their own; pixels and samples are pasted as they are."""
        from .cascade import Decode

        *_, last = self.cascade.stages.values()
        return round(self.media.fade_s * self.cascade.rate) if isinstance(last, Decode) else 0

    def read(self, path: Path) -> "tuple[Tensor, str]":
        """A file as a clip (1, C, T, ...) of the cascade's sizes, and what it is."""
        channels, _, *sizes = self.cascade.shape
        return self.media.read(path, (channels, self.most, *sizes), self.cascade.rate)

    def tell(self, path: Path, words: str, used: int) -> None:
        channels, _, *sizes = self.cascade.shape
        tell(f"{path}: {words}, used as {self.media.describe((channels, used, *sizes), self.cascade.rate)}")

    def continued(self) -> Make:
        """--init and --extend."""
        from .editing import extend

        path, rate = self.given.init, self.cascade.rate
        clip, words = self.read(path)
        add = max(1, round(self.given.extend * rate))
        if clip.shape[2] + add > self.most:
            raise ValueError(
                f"--extend {self.given.extend:g} makes {(clip.shape[2] + add) / rate:g} s of {path}, more than "
                f"the {self.most / rate:g} s that this pipeline can make"
            )
        self.tell(path, words, clip.shape[2])

        def longer(prompt: "Batch", **settings: Any) -> "Clip":
            return extend(self.cascade, prompt, clip, add, fade=self.fade, **settings)

        return longer

    def edited(self) -> Make:
        """--init, with or without --mask."""
        from .editing import Edit

        path, (channels, usual, *sizes) = self.given.init, self.cascade.shape
        clip, words = self.read(path)
        asked = self.given.duration is not None or getattr(self.given, "frames", None) is not None
        steps = self.steps if asked or clip.shape[2] == 1 else min(clip.shape[2], usual)
        self.tell(path, words, steps)
        # a clip shorter than the pipeline's is made at the length that was trained, then cut
        work = (channels, max(steps, usual), *sizes)
        clip = self.media.pad(clip[:, :, : work[1]], work[1])
        strength = self.given.strength
        if self.given.mask is None:
            return self.cut(Edit(clip, STRENGTH if strength is None else strength), steps)
        anew = self.media.mask(self.given.mask, work, self.cascade.rate)
        if not anew[:, :, :steps].any():
            raise ValueError(f"--mask {self.given.mask} leaves nothing of {path} to generate anew")
        return self.cut(Edit(clip, 1.0 if strength is None else strength, known=~anew, fade=self.fade), steps)

    def framed(self) -> Make:
        """--first-frame, --last-frame, or both. Raises ValueError where they leave nothing to make."""
        import torch

        from .editing import Edit

        paths = self.given.first_frame, self.given.last_frame
        if self.steps <= 2 - paths.count(None):
            raise ValueError(f"{self.steps} steps of time leave nothing to make between the given frames; ask for more")
        first, last = (None if path is None else self.picture(path) for path in paths)
        length = self.steps if last is not None else max(self.steps, self.cascade.shape[1])
        start = 0 if first is None else held(self.cascade, length, end=False)
        end = 0 if last is None else held(self.cascade, length, end=True)
        if start + end >= length:
            start, end = min(start, 1), min(end, 1)
        place = torch.arange(length)
        known = ((place < start) | (place >= length - end)).view(1, 1, -1, *(1,) * (len(self.cascade.shape) - 2))
        # what is not known is the nearer picture: latents see a little of what lies beside their own steps
        middle = length if last is None else 0 if first is None else length // 2
        pictures = [first] * middle + [last] * (length - middle)
        clip = torch.cat([picture for picture in pictures if picture is not None], dim=2)
        return self.cut(Edit(clip, known=known, fade=self.fade), self.steps)

    def picture(self, path: Path) -> "Tensor":
        clip, words = self.read(path)
        self.tell(path, words, 1)
        return clip[:, :, :1]

    def cut(self, edit: "Edit", steps: int) -> Make:
        """What makes a clip by an edit, and gives the first steps of it."""
        from .cascade import Clip

        def made(prompt: "Batch", **settings: Any) -> "Clip":
            clip = self.cascade(prompt, shape=tuple(edit.clip.shape[1:]), edit=edit, **settings)
            return Clip(clip.data[:, :, :steps], clip.rate)

        return made

    def referring(self, make: Make) -> Make:
        """What makes clips of prompts with the reference."""
        self.cascade.check_reference()
        clip, words = self.read(self.given.reference)
        tell(f"{self.given.reference}: {words}, used as the reference")

        def made(prompt: "Batch", **settings: Any) -> "Clip":
            return make({**prompt, "reference": clip}, **settings)

        return made


def held(cascade: "Cascade", length: int, end: bool) -> int:
    """Steps at the start, or the end, that a picture must fill for the first stage to know it; 1 where none would do.

    A latent is known where all steps that it stands for are, and a stage that adds steps between has left some out.
    """
    import torch

    sizes = cascade.shape[2:]
    ways = [stage.way_back() for stage in [*cascade.stages.values()][:0:-1]]
    place = torch.arange(cascade.whole(length))
    for count in range(1, min(length, HELD) + 1):
        steps = (place >= length - count) & (place < length) if end else place < count
        known = steps.view(1, 1, -1, *(1,) * len(sizes)).expand(1, 1, -1, *sizes)
        for way in ways:
            known = known if way is None else way.known(known)
        if known.reshape(1, 1, known.shape[2], -1).all(dim=3).any():
            return count
    return 1


def record(given: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, for the record beside a result."""
    options = {name: getattr(given, name, None) for name in NAMES}
    return {
        name: str(value) if isinstance(value, Path) else value for name, value in options.items() if value is not None
    }


def tell(words: str) -> None:
    """One line for the user, on stderr: stdout lists files."""
    print(words, file=sys.stderr)
