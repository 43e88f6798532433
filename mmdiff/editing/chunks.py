"""Clips longer than a model was trained on, one chunk after another: each goes on from the end of the last.

B batch, C channels, T time; clips are (B, C, T, ...).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .edit import Edit

Make = Callable[[Edit, int, int], Tensor]  # (a chunk's edit, its number, how many there are) -> (B, C, L, ...)


@dataclass(frozen=True)
class Chunks:
    """Continuation: chunks of `length` time steps, of which all but the first know `context` steps made before.

    length: what the model was trained on; a shorter clip is one chunk. The last chunk knows more where the length asks
    for it. The chunks stay in the space of the stage: nothing is decoded and encoded again between them, which would
    shift colours a little each time. What a call sees does not grow with the clip. `Window` has no order in time,
    but its model need not be able to go on from known steps.
    Raises ValueError unless 1 <= context < length.
    """

    length: int
    context: int

    def __post_init__(self) -> None:
        if not 1 <= self.context < self.length:
            raise ValueError(
                f"context={self.context} must lie in 1..length-1={self.length - 1}: steps that a chunk knows"
            )

    def starts(self, given: Tensor) -> list[int]:
        """The first time step of each chunk, where given (T,) bool are known before. No chunk is known whole."""
        done, size = given.clone(), min(self.length, len(given))
        starts: list[int] = []
        while not done.all():
            first = int((~done).nonzero()[0])
            starts.append(max(0, min(first - self.context, len(done) - size)))
            done[starts[-1] : starts[-1] + size] = True
        return starts

    def __call__(self, make: Make, edit: Edit) -> Tensor:
        """The clip (B, C, T, ...) of which `edit` is the edit: its clip to start from, what is known, its strength."""
        clip, known = edit.clip, edit.mask
        known = torch.zeros_like(clip[:1, :1], dtype=torch.bool) if known is None else known
        starts = self.starts(known.movedim(2, 0).flatten(1).all(dim=1))
        for number, first in enumerate(starts):
            end = min(first + self.length, clip.shape[2])
            mask = known[:, :, first:end]
            now = Edit(clip[:, :, first:end], edit.strength, mask if mask.any() else None)
            made = make(now, number, len(starts))
            clip = torch.cat([_rows(clip[:, :, :first], made), made, _rows(clip[:, :, end:], made)], dim=2)
            known = known.clone()
            known[:, :, first:end] = True
        return clip


def _rows(clip: Tensor, like: Tensor) -> Tensor:
    """A clip of one row or B as one of B rows, of the type of `like` (B, ...)."""
    return clip.expand(len(like), *clip.shape[1:]).to(like)
