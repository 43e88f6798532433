"""A causal network over clips of any length and size: chunks of frames, and tiles that know what lies around them.

T time, H W space. A cell is what one latent stands for: `stride` frames, and a piece of the picture.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from video.causal import Memory, Network

Pair = tuple[int, int]  # of H and W


class Span(NamedTuple):
    """Cells first..last - 1 along an axis, to be computed from cells start..end - 1."""

    first: int
    last: int
    start: int
    end: int


def spans(cells: int, tile: int | None, halo: int) -> list[Span]:
    """The tiles along an axis of `cells`: `tile` cells each, the last what is left; None is one tile."""
    if tile is None or tile >= cells:
        return [Span(0, cells, 0, cells)]
    starts = range(0, cells, tile)
    return [Span(a, min(a + tile, cells), max(a - halo, 0), min(a + tile + halo, cells)) for a in starts]


class Tiles(NamedTuple):
    """Tiles of `tile` (H, W) cells with a halo of cells around them; None is one tile.

    A cell is `taken` (H, W) steps of the network's input and `given` steps of its output. Where the halo is as wide as
    the network reaches, the tiles together are what the network makes of the whole, up to rounding.
    """

    tile: Pair | None
    halo: Pair
    taken: Pair
    given: Pair

    def __call__(self, run: Callable[[Tensor, Pair], Tensor], x: Tensor) -> Tensor:
        """x (B, C, T, H, W) through run(part of x, (row, column) of the tile), put together."""
        tile = (None, None) if self.tile is None else self.tile
        down = spans(x.shape[3] // self.taken[0], tile[0], self.halo[0])
        across = spans(x.shape[4] // self.taken[1], tile[1], self.halo[1])
        rows = []
        for i, h in enumerate(down):
            parts = []
            for j, w in enumerate(across):
                part = run(_cells(x, self.taken, (h.start, h.end), (w.start, w.end)), (i, j))
                kept = (h.first - h.start, h.last - h.start), (w.first - w.start, w.last - w.start)
                parts.append(_cells(part, self.given, *kept))
            rows.append(torch.cat(parts, dim=4))
        return torch.cat(rows, dim=3)


def _cells(x: Tensor, cell: Pair, h: Pair, w: Pair) -> Tensor:
    return x[..., h[0] * cell[0] : h[1] * cell[0], w[0] * cell[1] : w[1] * cell[1]]


def whole_cells(pieces: Iterable[Tensor], stride: int, most: int | None) -> Iterator[Tensor]:
    """The joined `pieces` (B, C, T, H, W) of a clip, cut anew: the first frame, then `stride` frames for each cell.

    most: cells to give at a time after the first; None gives all that has come.
    Raises ValueError for pieces of different sizes, for a clip without frames, and for one that ends within a cell.
    """
    held: Tensor | None = None
    given = 0  # frames
    for piece in pieces:
        if held is not None and piece.shape[:2] + piece.shape[3:] != held.shape[:2] + held.shape[3:]:
            raise ValueError(f"a piece of shape {tuple(piece.shape)} does not continue {tuple(held.shape)}")
        held = piece if held is None else torch.cat([held, piece], dim=2)
        lead = 0 if given else 1  # the first cell is one frame
        while (cells := lead + (held.shape[2] - lead) // stride) > 0:
            frames = 1 if lead else stride * (cells if most is None else min(cells, most))
            yield held[:, :, :frames]
            held, given, lead = held[:, :, frames:], given + frames, 0
    if held is None or held.shape[2] or not given:
        check_frames(0 if held is None else given + held.shape[2], stride)


def check_frames(frames: int, stride: int) -> None:
    """Raises ValueError, naming the nearest legal numbers, unless `frames` is 1 + a multiple of `stride`."""
    low = 1 + (frames - 1) // stride * stride
    if low != frames or frames < 1:
        near = " or ".join(str(n) for n in (low, low + stride) if n > 0)
        raise ValueError(f"T={frames} is not 1 + a multiple of {stride}; nearest: {near}")


class Passes(NamedTuple):
    """What `network` makes of a clip, in passes over `cells` cells of time (None: all) and the tiles of space.

    stride: frames of its input that are a cell of time, but for the first, which is one.
    """

    network: Network
    tiles: Tiles
    stride: int
    cells: int | None

    def whole(self, x: Tensor) -> Tensor:
        """A whole clip (B, C, T, H, W)."""
        return torch.cat([*self.stream([x])], dim=2)

    def stream(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """A clip that comes in pieces of any length. Each tile has a memory of its own."""
        memories: dict[Pair, Memory] = {}

        def run(part: Tensor, place: Pair) -> Tensor:
            return self.network(part, memories.setdefault(place, Memory()))

        for chunk in whole_cells(pieces, self.stride, self.cells):
            yield self.tiles(run, chunk)
