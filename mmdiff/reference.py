"""A reference as a condition: a picture, or a whole other clip, that says what is to be seen or heard, not when.

B batch, C channels, T time, N steps that are looked at, P patches of a step, D width.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .conditioning import Batch, Cond, Conditioner, Generators, check_rate, draw, dropped
from .nn.conv import check_sizes, fold_cells
from .nn.embed import sinusoid


class Reference(Conditioner):
    """Steps of a reference clip in the model's own space, cut into patches, as tokens without an order in time.

    channels: C of the model's data or latents. width: D. patch: sizes that a token stands for, one for each axis after
    time: [4, 4] of a picture, [] of a waveform. steps: N, evenly spread over the reference; it has N P tokens.

    In training the reference is `batch["reference"]` (B, C, any T, ...) where the data has one, else N steps of the
    clip itself drawn at random, which show what it holds but not where. In a cascade it is a clip of the cascade's
    sizes, which `mmdiff.cascade.Cascade` brings to each stage's space. Without one, and where it is dropped, all that
    is attended to is one learned token, so that guidance guides towards the reference too.
    Raises ValueError for sizes that are no multiples of the patch.
    """

    def __init__(self, channels: int, width: int, patch: Sequence[int], steps: int = 1, dropout: float = 0.1) -> None:
        super().__init__()
        check_rate(dropout)
        if steps < 1 or channels < 1 or len(patch) > 2 or any(size < 1 for size in patch):
            raise ValueError(
                f"channels={channels} and steps={steps} must be 1 or more, patch={list(patch)} up to two such numbers"
            )
        self.patch, self.steps, self.dropout, self.width = tuple(patch), steps, dropout, width
        cells = channels * math.prod(patch)
        self.net = nn.Sequential(nn.Linear(cells, width), nn.SiLU(), nn.Linear(width, width))
        self.empty = nn.Parameter(torch.zeros(width))

    def forward(self, batch: Batch, generators: Generators | None = None) -> Cond:
        if "reference" in batch:
            clip = batch["reference"].to(self.empty)
            places = torch.linspace(0, clip.shape[2] - 1, self.steps).round().long().expand(len(clip), -1)
        elif self.training:
            clip = batch["latents"]
            places = (draw(torch.rand, (len(clip), self.steps), generators) * clip.shape[2]).long()
        else:
            return self.null(batch)
        shown = torch.stack([item.index_select(1, at.to(clip.device)) for item, at in zip(clip, places, strict=True)])
        tokens = self.tokens(shown.to(self.empty))
        drop = dropped(len(clip), self.dropout if self.training else 0.0, generators)
        gone = torch.tensor(drop, device=tokens.device)[:, None]
        first = torch.arange(tokens.shape[1], device=tokens.device) == 0
        return Cond(tokens=torch.where(gone[..., None], self.empty, tokens), mask=~gone | first)

    def tokens(self, clip: Tensor) -> Tensor:
        """(B, C, N, ...) -> (B, N P, D)."""
        check_sizes(clip.shape[2:], (1, *self.patch))
        cells = fold_cells(clip, (1, *self.patch)).movedim(1, -1)  # (B, N, ..., C cells)
        tokens: Tensor = self.net(cells)
        for axis, size in enumerate(cells.shape[2:-1], start=2):
            where = sinusoid((torch.arange(size, device=clip.device) + 0.5) / size, self.width, 0.1, 4.0)
            tokens = tokens + where.view(size, *(1,) * (cells.ndim - 2 - axis), self.width).to(tokens)
        return tokens.flatten(1, -2)

    def null(self, batch: Batch) -> Cond:
        count = len(batch["latents"]) if "latents" in batch else len(next(iter(batch.values())))
        tokens = self.empty.expand(count, 1, -1)
        return Cond(tokens=tokens, mask=torch.ones(count, 1, dtype=torch.bool, device=tokens.device))
