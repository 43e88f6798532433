"""A long signal through a network in chunks, with the memory of one chunk.

B batch, C channels, T samples or latent steps; a unit is what the network maps to one step: `taken` steps of its input
become `given` steps of its output.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor


def stream(
    run: Callable[[Tensor], Tensor], pieces: Iterable[Tensor], *, taken: int, given: int, chunk: int, halo: int
) -> Iterator[Tensor]:
    """`run` of the joined `pieces` (B, C, any length), given out in chunks of (B, C', chunk * given).

    Each chunk is computed from its own units and `halo` units on either side of them. The result equals
    `run(torch.cat(pieces, dim=-1))`, up to rounding, if no output depends on units further away than `halo`. A last
    unit may be incomplete: `run` gets it as it is. Nothing of it is differentiable.
    Raises ValueError if `chunk` is not positive or the pieces hold nothing.
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be 1 or more: latent steps computed at a time")
    held: Tensor | None = None  # what is still needed, from unit `first` on
    first = done = 0
    for piece in pieces:
        held = piece if held is None else torch.cat([held, piece], dim=-1)
        while held.shape[-1] > (done - first + chunk + halo) * taken:
            yield _run(run, held[..., : (done - first + chunk + halo) * taken], done - first, given, chunk)
            done += chunk
            start = max(0, done - halo)
            held, first = held[..., (start - first) * taken :], start
    if held is None or not held.shape[-1]:
        raise ValueError("there is nothing to encode or decode: the pieces hold no step of time")
    while (done - first) * taken < held.shape[-1]:
        yield _run(run, held[..., : (done - first + chunk + halo) * taken], done - first, given, chunk)
        done += chunk


def _run(run: Callable[[Tensor], Tensor], x: Tensor, skip: int, given: int, chunk: int) -> Tensor:
    with torch.no_grad():
        return run(x)[..., skip * given : (skip + chunk) * given]
