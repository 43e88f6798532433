"""Autoencoder of waveforms of any number of channels: strided convolutions, snakes and dilated residual units.

B batch, C channels, T samples, N latent steps, one for each `stride` samples.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audio.streaming import stream
from mmdiff.autoencoder import LearnedAutoencoder, Reconstruction
from mmdiff.bottleneck import KL, Bottleneck
from mmdiff.nn.activation import Snake


def conv(
    c_in: int, c_out: int, kernel: int, stride: int = 1, dilation: int = 1, padding: int | None = None
) -> nn.Conv1d:
    """Convolution over time whose outputs start as large as its inputs; without `padding` odd kernels keep T."""
    padding = kernel // 2 * dilation if padding is None else padding
    layer = nn.Conv1d(c_in, c_out, kernel, stride, padding, dilation)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")  # nothing is normalised, so levels must not fade
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


class ResidualUnit(nn.Module):
    """x plus a dilated convolution of it between snakes (as in SoundStream, Zeghidour et al. 2021). Starts as x."""

    def __init__(self, channels: int, kernel: int, dilation: int) -> None:
        super().__init__()
        last = conv(channels, channels, 1)
        nn.init.zeros_(last.weight)
        self.net = nn.Sequential(
            Snake(channels), conv(channels, channels, kernel, dilation=dilation), Snake(channels), last
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


def downsample(c_in: int, c_out: int, stride: int) -> nn.Conv1d:
    """(B, C, N s) -> (B, C', N): convolution over two cells of s samples, centred on the cell it stands for."""
    return conv(c_in, c_out, 2 * stride, stride, padding=-(-stride // 2))


class Upsample(nn.Module):
    """(B, C, N) -> (B, C', N s): transposed convolution over two cells, as one convolution of N + 1 cells.

    It starts as linear interpolation of a mix of the channels, so the steps within a cell begin alike: a transposed
    convolution that starts at random gives a tone at the cells' rate (Pons et al. 2021, "Upsampling artifacts in neural
    audio synthesis"). The weights of each step of a cell stand in the channels: faster on a CPU than ConvTranspose1d.
    """

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = conv(c_in, c_out * stride, 2, padding=1)  # cell n is between the latent steps n - 1 and n
        # The share of step n in each sample of cell n; the cells of odd strides are cut half a sample early.
        rising = (torch.arange(stride) + 0.5 + stride % 2 / 2) / stride
        ramps = torch.stack([1 - rising, rising], dim=-1)  # (s, 2)
        mix = conv(c_in, c_out, 1).weight  # (C', C, 1)
        with torch.no_grad():
            self.conv.weight.copy_((mix[:, None] * ramps[:, None]).flatten(0, 1))  # (C' s, C, 2)

    def forward(self, x: Tensor) -> Tensor:
        cells = self.conv(x).unflatten(1, (-1, self.stride)).transpose(2, 3).flatten(2)  # (B, C', (N + 1) s)
        start = self.stride // 2
        return cells[..., start : start + x.shape[-1] * self.stride]


class WaveAutoencoder(LearnedAutoencoder):
    """Waveforms (B, C, T) of any length T >= 1 <-> latents (B, latent_channels, ceil(T / stride)).

    Args:
        channels: C, 1 for mono and 2 for stereo. latent_channels: of the latents.
        strides: by what each level divides time; their product is the total stride, the only entry of `factors`.
        width: channels of the first level. multipliers: of `width`, for each level and what follows the last, one more
            than strides; default doubling up to 8.
        dilations: one residual unit for each, at every level. kernel: of those units and of the first and last
            convolution, odd.
        bottleneck: of the latents; default `mmdiff.bottleneck.KL`.
        level: deviation of the data, roughly: the first convolution starts divided by it, the last multiplied.

    Nothing is normalised across time, so a step depends on samples near it alone: `halo` latent steps on either side
    are enough for encoding and for decoding. Raises ValueError for settings that do not fit, and for other channels.

    What does not fill the last latent step is padded with silence. `decode` gives whole steps, so for the exact length
    cut its result, `decode(encode(x))[..., :T]`; `reconstruct` does so itself.
    """

    def __init__(
        self,
        channels: int = 1,
        latent_channels: int = 16,
        strides: Sequence[int] = (2, 4, 8),
        width: int = 32,
        multipliers: Sequence[int] | None = None,
        dilations: Sequence[int] = (1, 3, 9),
        kernel: int = 7,
        bottleneck: Bottleneck | None = None,
        level: float = 0.1,
    ) -> None:
        super().__init__(bottleneck or KL(), latent_channels)
        if channels < 1:
            raise ValueError(f"channels={channels} must be 1 or more: 1 for mono, 2 for stereo")
        if not strides or any(s < 2 for s in strides):
            raise ValueError(f"strides={list(strides)} must be one or more whole numbers from 2 up")
        if width < 1:
            raise ValueError(f"width={width} must be 1 or more: channels of the first level")
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel={kernel} must be odd, to have a centre; 7 suits most")
        if any(d < 1 for d in dilations):
            raise ValueError(f"dilations={list(dilations)} must be 1 or more; [1, 3, 9] suits most")
        if level <= 0:
            raise ValueError(f"level={level} must be above 0: the deviation of the data; 0.1 suits speech and music")
        if multipliers is None:
            multipliers = [2 ** min(i, 3) for i in range(len(strides) + 1)]
        if len(multipliers) != len(strides) + 1:
            raise ValueError(
                f"multipliers={list(multipliers)} has {len(multipliers)} entries, but strides={list(strides)} need "
                f"{len(strides) + 1}: one for each level and one for what follows the last"
            )
        self.channels, self.strides, self.dilations, self.kernel = channels, tuple(strides), tuple(dilations), kernel
        self.factors = (math.prod(strides),)
        widths = [width * m for m in multipliers]

        def units(size: int) -> list[nn.Module]:
            return [ResidualUnit(size, kernel, dilation) for dilation in dilations]

        down: list[nn.Module] = [conv(channels, widths[0], kernel)]
        up: list[nn.Module] = [Snake(widths[0]), conv(widths[0], channels, kernel)]
        with torch.no_grad():
            down[0].weight.div_(level)  # type: ignore[operator, union-attr]
            up[-1].weight.mul_(level)  # type: ignore[operator, union-attr]
        for a, b, stride in zip(widths[:-1], widths[1:], strides, strict=True):
            down += [*units(a), Snake(a), downsample(a, b, stride)]
            up = [Snake(b), Upsample(b, a, stride), *units(a), *up]
        features = self.bottleneck.in_channels(latent_channels)
        self.encoder = nn.Sequential(*down, Snake(widths[-1]), conv(widths[-1], features, 3))
        self.decoder = nn.Sequential(conv(latent_channels, widths[-1], 3), *up)

    @property
    def stride(self) -> int:
        """Samples of a latent step."""
        return self.factors[0]

    @property
    def halo(self) -> int:
        """Latent steps on either side that a latent step, or the samples of one, can depend on."""
        return -(-self.reach // self.stride)

    @property
    def reach(self) -> int:
        """Samples before a latent step's own that it can depend on; no fewer than those after them."""
        reach, jump = self.kernel // 2, 1  # jump: samples of a step of the level
        for stride in self.strides:
            reach += jump * (sum(self.dilations) * (self.kernel // 2) + -(-stride // 2))
            jump *= stride
        return reach + jump

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if len(shape) != 2 or shape[0] != self.channels or shape[1] < 1:
            raise ValueError(f"shape={shape} is not that of a waveform ({self.channels}, T) with T >= 1")
        return (self.latent_channels, -(-shape[1] // self.stride))  # type: ignore[return-value]

    def known(self, mask: Tensor) -> Tensor:
        missing = F.pad((~mask).float(), (self.reach, self.reach + -mask.shape[-1] % self.stride))  # silence is known
        return F.max_pool1d(missing, 2 * self.reach + self.stride, self.stride) == 0

    def features(self, x: Tensor) -> Tensor:
        if x.ndim != 3 or x.shape[1] != self.channels or x.shape[2] < 1:
            raise ValueError(f"x has shape {tuple(x.shape)}; (B, {self.channels}, T) with T >= 1 is needed")
        return self.encoder(F.pad(x, (0, -x.shape[2] % self.stride)))

    def generate(self, z: Tensor) -> Tensor:
        return self.decoder(z)

    def reconstruct(self, x: Tensor, generator: torch.Generator | None = None) -> Reconstruction:
        found = super().reconstruct(x, generator)
        return replace(found, x=found.x[..., : x.shape[2]])

    def last_weight(self) -> Tensor:
        last = self.decoder[-1]
        assert isinstance(last, nn.Conv1d)
        return last.weight

    def encode_stream(self, pieces: Iterable[Tensor], chunk: int = 64) -> Iterator[Tensor]:
        """Latents of the joined `pieces` (B, C, any length), `chunk` steps at a time, in the memory of a chunk."""
        return stream(self.encode, pieces, taken=self.stride, given=1, chunk=chunk, halo=self.halo)

    def decode_stream(self, pieces: Iterable[Tensor], chunk: int = 64) -> Iterator[Tensor]:
        """Samples of the joined `pieces` of latents, `chunk` steps at a time, in the memory of a chunk."""
        return stream(self.decode, pieces, taken=1, given=self.stride, chunk=chunk, halo=self.halo)
