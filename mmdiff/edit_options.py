"""Options of the commands that take media: what to start from, what to keep, what to add. A modality reads the files.

B batch, C channels, T time; clips are (B, C, T, ...), masks bool (1, 1, T, ...).
"""

import argparse
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from .cascade import Cascade, Clip, Shape
    from .conditioning import Batch
    from .sampling import Noise

STRENGTH = 0.6  # of --init alone: enough to change what is seen, little enough to know it again
NAMES = ("init", "strength", "mask", "extend", "first_frame")


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
    ) -> "Clip": ...


def add_options(options: argparse.ArgumentParser, mask: str, first_frame: bool = False) -> None:
    """mask: what --mask takes, for its help. first_frame: whether there is an option for one."""
    options.add_argument("--init", type=Path, metavar="FILE", help="start from this clip; resized and cut as needed")
    options.add_argument(
        "--strength", type=float, metavar="S",
        help=f"how much of --init to change: 0 nothing, 1 all, between: share of steps (default: {STRENGTH}; 1 with "
        "--mask)",
    )  # fmt: skip
    options.add_argument("--mask", metavar="WHERE", help=f"with --init, what to generate anew, the rest stays: {mask}")
    options.add_argument("--extend", type=float, metavar="SECONDS", help="with --init, go on for so long after its end")
    if first_frame:
        options.add_argument("--first-frame", type=Path, metavar="IMAGE", help="the clip starts with this picture")


def check(given: argparse.Namespace, media: Media) -> None:
    """Raises ValueError for options that contradict each other and files that cannot be read. Loads no model."""
    options: dict[str, Any] = {name: getattr(given, name, None) for name in NAMES}
    if options["init"] is None:
        for name in ("strength", "mask", "extend"):
            if options[name] is not None:
                raise ValueError(f"--{name} needs --init FILE, the clip to edit")
    elif options["first_frame"] is not None:
        raise ValueError("give --init or --first-frame, not both")
    if options["extend"] is not None:
        for name in ("strength", "mask", "duration", "frames"):
            if getattr(given, name, None) is not None:
                raise ValueError(f"--extend keeps all of --init and adds to it: it goes without --{name}")
        if not (math.isfinite(options["extend"]) and options["extend"] > 0):
            raise ValueError(f"--extend {options['extend']} must be a number of seconds above 0")
    if options["strength"] is not None and not 0 <= options["strength"] <= 1:
        raise ValueError(f"--strength {options['strength']} is outside 0..1; 0 keeps the input, 1 ignores it")
    for name in ("init", "first_frame"):
        if options[name] is not None:
            media.check(options[name])
    if options["mask"] is not None:
        media.check_mask(options["mask"])


def maker(given: argparse.Namespace, media: Media | None, cascade: "Cascade", steps: int, most: int) -> Make:
    """What makes the clips that the options ask for; tells on stderr what it takes of a file.

    steps: length that the options ask for, or the cascade's. most: longest clip that may be made.
    Raises ValueError where the result would be longer, or a mask leaves nothing to do.
    """
    import functools

    import torch

    from .cascade import Clip, Decode
    from .editing import Edit, extend

    options: dict[str, Any] = {name: getattr(given, name, None) for name in NAMES}
    path = options["init"] or options["first_frame"]
    channels, usual, *sizes = cascade.shape
    if media is None or path is None:
        return functools.partial(cascade, shape=(channels, steps, *sizes))
    clip, words = media.read(path, (channels, most, *sizes), cascade.rate)
    still, asked = clip.shape[2] == 1, given.duration is not None or getattr(given, "frames", None) is not None
    if options["extend"] is not None:
        add = max(1, round(options["extend"] * cascade.rate))
        if clip.shape[2] + add > most:
            raise ValueError(
                f"--extend {options['extend']:g} makes {(clip.shape[2] + add) / cascade.rate:g} s of {path}, more than "
                f"the {most / cascade.rate:g} s that this pipeline can make"
            )
    elif options["init"] is not None and not asked and not still:
        steps = min(clip.shape[2], usual)
    # sounds decoded from a spectrogram have phases of their own; pixels and samples are pasted as they are
    fade = round(media.fade_s * cascade.rate) if isinstance([*cascade.stages.values()][-1], Decode) else 0
    used = clip.shape[2] if options["extend"] is not None else 1 if options["first_frame"] else steps
    tell(f"{path}: {words}, used as {media.describe((channels, used, *sizes), cascade.rate)}")
    if options["extend"] is not None:

        def longer(prompt: "Batch", **settings: Any) -> "Clip":
            return extend(cascade, prompt, clip, add, fade=fade, **settings)

        return longer
    # a clip shorter than the pipeline's is made at the length that was trained, then cut
    work = (channels, max(steps, usual), *sizes)
    clip = media.pad(clip[:, :, : work[1]], work[1])
    edit = Edit(clip, options["strength"] if options["strength"] is not None else STRENGTH)
    if options["first_frame"] is not None:
        known = (torch.arange(work[1]) == 0).view(1, 1, -1, *(1,) * len(sizes))
        edit = Edit(clip, known=known, fade=fade)
    elif options["mask"] is not None:
        anew = media.mask(options["mask"], work, cascade.rate)
        if not anew[:, :, :steps].any():
            raise ValueError(f"--mask {options['mask']} leaves nothing of {path} to generate anew")
        strength = 1.0 if options["strength"] is None else options["strength"]
        edit = Edit(clip, strength, known=~anew, fade=fade)

    def edited(prompt: "Batch", **settings: Any) -> "Clip":
        made = cascade(prompt, shape=work, edit=edit, **settings)
        return Clip(made.data[:, :, :steps], made.rate)

    return edited


def record(given: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, for the record beside a result."""
    options = {name: getattr(given, name, None) for name in NAMES}
    return {
        name: str(value) if isinstance(value, Path) else value for name, value in options.items() if value is not None
    }


def tell(words: str) -> None:
    """One line for the user, on stderr: stdout lists files."""
    print(words, file=sys.stderr)
