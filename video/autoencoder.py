"""Causal autoencoder of video of any length and size: a latent knows the frames up to its own, the first frame alone.

B batch, C channels, T time, H W space. T = 1 + k * stride frames have 1 + k latents; an image is T=1.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from mmdiff.autoencoder import LearnedAutoencoder, channelwise
from mmdiff.bottleneck import KL, Bottleneck
from video.causal import Level, decoder, encoder, factors, reach
from video.passes import Pair, Passes, Tiles, check_frames


class CausalVideo(LearnedAutoencoder):
    """Convolutional video autoencoder that never looks ahead (as MAGVIT-v2's tokenizer, Yu et al. 2023, sec. 3.2).

    Args:
        channels: C of the data. latent_channels: C of the latents.
        steps: for each level, from the finest on, by what it divides T, H and W; [[1, 2, 2], [2, 2, 2]] is 2x in time
            and 4x in space. The first folds the pixels, so nothing runs at full size.
        widths: channels of each level. depth: residual blocks of each level, in encoder and decoder alike.
        frames: for each level, how many frames the second convolution of a block sees; default 1 (each frame by
            itself), and 3 at the last level, where the frames are fewest.
        bottleneck: of the latents; default `mmdiff.bottleneck.KL`.
        chunk: frames that are worked on at a time, rounded down to whole latents, at least one; None is all of them.
        tile: (H, W) of the part of a frame that is worked on at a time, in pixels; None is the whole frame.

    `chunk` and `tile` save memory and change nothing else: the result is that of the whole up to rounding, because
    convolutions remember their last frames from chunk to chunk, and tiles are read with all that they depend on
    (`halo`), for which the same pixels are computed more than once. `encode_stream` and `decode_stream` need the memory
    of one chunk for clips of any length. Norms take the channels of one position, so they see no other frame or tile.

    Raises ValueError for settings that do not fit together, and for sizes of which the factors make no whole cells.
    """

    def __init__(
        self,
        channels: int = 3,
        latent_channels: int = 8,
        steps: Sequence[Sequence[int]] = ((1, 2, 2), (2, 2, 2)),
        widths: Sequence[int] = (64, 128),
        depth: int = 1,
        frames: Sequence[int] | None = None,
        bottleneck: Bottleneck | None = None,
        chunk: int | None = None,
        tile: Sequence[int] | None = None,
    ) -> None:
        super().__init__(bottleneck or KL(), latent_channels)
        if not steps or any(len(step) != 3 or any(n < 1 for n in step) for step in steps):
            raise ValueError(
                f"steps={[list(s) for s in steps]} must be one triple (T, H, W) of whole numbers from 1 up per level"
            )
        frames = [1] * (len(steps) - 1) + [3] if frames is None else frames
        for name, values in (("widths", widths), ("frames", frames)):
            if len(values) != len(steps) or any(n < 1 for n in values):
                raise ValueError(
                    f"{name}={list(values)} must be {len(steps)} numbers from 1 up, one for each level of steps"
                )
        if channels < 1 or depth < 0:
            raise ValueError(f"channels={channels} must be 1 or more, and depth={depth} not negative")
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk={chunk} must be 1 or more frames, or None for all at once")
        self.channels, self.chunk = channels, chunk
        levels = [
            Level((step[0], step[1], step[2]), width, seen, depth)
            for step, width, seen in zip(steps, widths, frames, strict=True)
        ]
        self.factors = factors(levels)
        if tile is not None and (len(tile) != 2 or any(n < 1 or n % f for n, f in zip(tile, self.cell, strict=True))):
            raise ValueError(f"tile={list(tile)} must be (H, W), multiples of {list(self.cell)}, or None for the whole")
        self.tile = None if tile is None else (tile[0], tile[1])
        self.encoder = encoder(channels, self.bottleneck.in_channels(latent_channels), latent_channels, levels)
        self.decoder = decoder(latent_channels, channels, levels)

    @property
    def stride(self) -> int:
        """Frames of a latent, but for the first, which is one frame."""
        return self.factors[0]

    @property
    def cell(self) -> Pair:
        """H and W of what a latent stands for, in pixels."""
        return self.factors[1], self.factors[2]

    @property
    def halo(self) -> tuple[Pair, Pair]:
        """Latents (H, W) around a tile that encoding it needs, and those that decoding it needs; no fewer will do.

        The convolutions' reach in pixels, as latents, rounded up.
        """
        inward = list(self.encoder.layers), list(self.decoder.layers)[::-1]
        (a, b), (c, d) = ([-(-reach(net, axis) // self.factors[axis]) for axis in (1, 2)] for net in inward)
        return (a, b), (c, d)

    @property
    def history(self) -> tuple[int, int]:
        """How far back a latent sees, in frames before its own, and how far a frame, in latents before its own."""
        return reach(self.encoder.layers, 0), -(-reach(list(self.decoder.layers)[::-1], 0) // self.stride)

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if len(shape) != 4 or shape[0] != self.channels:
            raise ValueError(f"shape={tuple(shape)} is not ({self.channels}, T, H, W)")
        check_frames(shape[1], self.stride)
        return super().latent_shape((shape[0], shape[1] + self.stride - 1, *shape[2:]))

    def known(self, mask: Tensor) -> Tensor:
        """mask (B, 1, T, H, W) bool -> (B, 1, latents): whose own cell is known whole; the first cell is one frame.

        What it sees beyond its own cell (`halo`, `history`) does not count: its effect is small.
        """
        first = mask[:, :, :1].expand(-1, -1, self.stride - 1, -1, -1)
        return super().known(torch.cat([first, mask], dim=2))

    def features(self, x: Tensor) -> Tensor:
        self.latent_shape(tuple(x.shape[1:]))
        return self._encoding().whole(x)

    def generate(self, z: Tensor) -> Tensor:
        return self._decoding().whole(z)

    def decode(self, z: Tensor) -> Tensor:
        self._check_latents(z)
        return super().decode(z)

    def last_weight(self) -> Tensor:
        return self.decoder.layers[-1].conv.conv.weight  # type: ignore[return-value, union-attr]

    @torch.no_grad()
    def encode_stream(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """What `encode` makes of the joined `pieces` (B, C, any number of frames, H, W), given out as it gets ready.

        Works on `chunk` frames at a time; None takes what has come. Keeps that and the last frames that each
        convolution has seen, no more. Not differentiable. Raises ValueError where the clip ends within a latent.
        """

        def checked() -> Iterator[Tensor]:
            for x in pieces:
                self.latent_shape((*x.shape[1:2], 1, *x.shape[3:]))
                yield x

        for h in self._encoding().stream(checked()):
            z = self.bottleneck.encode(h)
            yield (z - channelwise(self.shift, z)) / channelwise(self.scale, z)

    @torch.no_grad()
    def decode_stream(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """What `decode` makes of the joined `pieces` of latents (B, latent_channels, any number, H', W'), likewise."""

        def raw() -> Iterator[Tensor]:
            for z in pieces:
                self._check_latents(z)
                yield self.bottleneck.decode(z * channelwise(self.scale, z) + channelwise(self.shift, z))

        yield from self._decoding().stream(raw())

    def _check_latents(self, z: Tensor) -> None:
        if z.ndim != 5 or z.shape[1] != self.latent_channels:
            raise ValueError(f"latents have shape {tuple(z.shape)}; (B, {self.latent_channels}, T, H, W) is needed")

    def _encoding(self) -> Passes:
        tiles = Tiles(self._tile_cells, self.halo[0], taken=self.cell, given=(1, 1))
        return Passes(self.encoder, tiles, self.stride, self._chunk_cells)

    def _decoding(self) -> Passes:
        tiles = Tiles(self._tile_cells, self.halo[1], taken=(1, 1), given=self.cell)
        return Passes(self.decoder, tiles, 1, self._chunk_cells)

    @property
    def _tile_cells(self) -> Pair | None:
        return None if self.tile is None else (self.tile[0] // self.cell[0], self.tile[1] // self.cell[1])

    @property
    def _chunk_cells(self) -> int | None:
        return None if self.chunk is None else max(1, self.chunk // self.stride)
