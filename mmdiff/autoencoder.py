"""What stands between data and the space a model denoises: learned, or as plain as a mean over cells.

B batch, C channels, T time, `*axes` T and what follows it.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import register_dataclass

from .bottleneck import KL, Bottleneck
from .nn.conv import Resample, check_sizes, convolution
from .nn.norm import group_norm


class Autoencoder(nn.Module, ABC):
    """encode: data (B, C, *axes) -> latents (B, latent_channels, *axes / factors) of about unit variance; decode: back.

    latent_channels: C of the latents, or None for "as the data's". factors: by what each axis is divided, time first.
    every: the latents are every so many-th time step of the data, from the first on, as it was; None if they are not.
    """

    latent_channels: int | None = None
    factors: tuple[int, ...] = (1,)
    every: int | None = None

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """(C, *axes) of the latents of data (C, *axes). Raises ValueError for sizes that the factors do not divide."""
        if len(self.factors) > len(shape) - 1:
            raise ValueError(
                f"shape={shape} is (C, *axes) of {len(shape) - 1} axes, too few for factors={list(self.factors)}"
            )
        factors = (*self.factors, *(1,) * (len(shape) - 1 - len(self.factors)))
        check_sizes(shape[1:], factors)
        return (self.latent_channels or shape[0], *(n // f for n, f in zip(shape[1:], factors, strict=True)))

    def known(self, mask: Tensor) -> Tensor:
        """Which latents depend on known data alone: mask (B, 1, *axes) bool -> (B, 1, *axes / factors), whole cells."""
        for axis, factor in enumerate(self.factors, start=2):
            mask = mask.unflatten(axis, (-1, factor)).all(dim=axis + 1)
        return mask

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor: ...

    def decode_stream(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """What `decode` makes of the joined `pieces` (B, latent_channels, any number of steps, ...), in order.

        Autoencoders that need not see all of a clip at once give it out as it gets ready; others, like this, at once.
        """
        yield self.decode(torch.cat([*pieces], dim=2))


class Identity(Autoencoder):
    """Latents are the data."""

    every = 1

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, z: Tensor) -> Tensor:
        return z


class Pool(Autoencoder):
    """Latents are means over cells of `factors` steps; decoding interpolates linearly."""

    def __init__(self, factors: Sequence[int]) -> None:
        super().__init__()
        if not 1 <= len(factors) <= 3 or any(f < 1 for f in factors):
            raise ValueError(f"factors={list(factors)} must be one to three whole numbers from 1 up")
        self.factors = tuple(factors)
        self.mean = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[len(factors)]

    def encode(self, x: Tensor) -> Tensor:
        check_sizes(x.shape[2:], self.factors)
        return self.mean(x, self.factors)

    def decode(self, z: Tensor) -> Tensor:
        sizes = [n * f for n, f in zip(z.shape[2:], self.factors, strict=True)]
        mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(self.factors)]
        return F.interpolate(z, sizes, mode=mode, align_corners=False)


class Subsample(Autoencoder):
    """Latents are every `factor`-th time step from the first on; decoding interpolates linearly and holds the last."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        if factor < 1:
            raise ValueError(f"factor={factor} must be 1 or more")
        self.factors, self.every = (factor,), factor

    def encode(self, x: Tensor) -> Tensor:
        check_sizes(x.shape[2:3], self.factors)
        return x[:, :, :: self.factors[0]]

    def known(self, mask: Tensor) -> Tensor:
        return mask[:, :, :: self.factors[0]]

    def decode(self, z: Tensor) -> Tensor:
        (factor,) = self.factors
        after = torch.cat([z[:, :, 1:], z[:, :, -1:]], dim=2)
        steps = [torch.lerp(z, after, i / factor) for i in range(factor)]
        return torch.stack(steps, dim=3).flatten(2, 3)


class Chain(Autoencoder):
    """Autoencoders one after another: encode runs through `parts` forwards, decode backwards."""

    def __init__(self, parts: Sequence[Autoencoder]) -> None:
        super().__init__()
        if not parts:
            raise ValueError("a Chain needs at least one part")
        self.parts = nn.ModuleList(parts)
        self.latent_channels = next((p.latent_channels for p in reversed(parts) if p.latent_channels is not None), None)
        axes = max(len(part.factors) for part in parts)
        padded = [part.factors + (1,) * (axes - len(part.factors)) for part in parts]
        self.factors = tuple(math.prod(f) for f in zip(*padded, strict=True))
        steps = [part.every for part in parts if part.every is not None]
        self.every = math.prod(steps) if len(steps) == len(parts) else None

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        for part in self.parts:
            shape = part.latent_shape(shape)  # type: ignore[operator]
        return shape

    def encode(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part.encode(x)  # type: ignore[operator]
        return x

    def known(self, mask: Tensor) -> Tensor:
        for part in self.parts:
            mask = part.known(mask)  # type: ignore[operator]
        return mask

    def decode(self, z: Tensor) -> Tensor:
        for part in reversed(self.parts):
            z = part.decode(z)  # type: ignore[operator]
        return z

    def decode_stream(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        for part in reversed(self.parts):
            pieces = part.decode_stream(pieces)  # type: ignore[operator]
        return iter(pieces)


@dataclass(frozen=True)
class Reconstruction:
    """What training needs to know of one pass through an autoencoder.

    x: like the input. loss: () of the bottleneck, weighted, 0 where it has none. logs: what to log, each ().
    latents: (B, latent_channels, ...) of `encode`, without chance, but not normalised; no gradient.
    """

    x: Tensor
    loss: Tensor
    logs: dict[str, Tensor]
    latents: Tensor


register_dataclass(Reconstruction)  # as `mmdiff.conditioning.Cond`


class TrainableAutoencoder(Autoencoder, ABC):
    """An autoencoder that `mmdiff.autoencoder_module.AutoencoderModule` trains."""

    @abstractmethod
    def reconstruct(self, x: Tensor, generator: torch.Generator | None = None) -> Reconstruction:
        """x (B, C, *axes) there and back. generator: of what is random in training; None leaves nothing to chance."""

    @abstractmethod
    def last_weight(self) -> Tensor:
        """Weight of the decoder's last layer, at which the adaptive adversarial weight compares gradients."""

    def normalise(self, mean: Tensor, deviation: Tensor, rate: float = 1.0) -> None:
        """Moves what is kept of the latents' mean and deviation (latent_channels,) towards these; here nothing is kept.

        Autoencoders that keep them override it. rate: 1 takes the new values as they are.
        """


class LearnedAutoencoder(TrainableAutoencoder, ABC):
    """An encoder network, a bottleneck, a decoder network, and the statistics that bring latents to unit variance.

    `encode` gives (z - shift) / scale of the bottleneck's z, `decode` undoes it. `shift` and `scale` (latent_channels,)
    are the mean and deviation of z over the validation data, measured while training (`normalise`).
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, bottleneck: Bottleneck, latent_channels: int) -> None:
        super().__init__()
        if latent_channels < 1:
            raise ValueError(f"latent_channels={latent_channels} must be 1 or more")
        self.bottleneck, self.latent_channels = bottleneck, latent_channels
        self.register_buffer("shift", torch.zeros(latent_channels))
        self.register_buffer("scale", torch.ones(latent_channels))

    @abstractmethod
    def features(self, x: Tensor) -> Tensor:
        """The encoder network: x (B, C, *axes) -> (B, bottleneck.in_channels(latent_channels), *latent axes).

        Raises ValueError for sizes that do not fit.
        """

    @abstractmethod
    def generate(self, z: Tensor) -> Tensor:
        """The decoder network: latents, not normalised -> x."""

    def encode(self, x: Tensor) -> Tensor:
        z = self.bottleneck.encode(self.features(x))
        return (z - channelwise(self.shift, z)) / channelwise(self.scale, z)

    def decode(self, z: Tensor) -> Tensor:
        if z.shape[1] != self.latent_channels:
            raise ValueError(f"latents have shape {tuple(z.shape)}; latent_channels={self.latent_channels} are needed")
        z = self.bottleneck.decode(z * channelwise(self.scale, z) + channelwise(self.shift, z))
        return self.generate(z.to(self.last_weight().dtype))

    def reconstruct(self, x: Tensor, generator: torch.Generator | None = None) -> Reconstruction:
        h = self.features(x)
        z, loss, logs = self.bottleneck(h, generator)
        latents = z.detach() if generator is None else self.bottleneck.encode(h.detach())
        return Reconstruction(self.generate(z.to(self.last_weight().dtype)), loss, logs, latents)

    @torch.no_grad()
    def normalise(self, mean: Tensor, deviation: Tensor, rate: float = 1.0) -> None:
        """With rate 1 `encode` gives mean 0 and variance 1 in every channel; a constant one is divided by 1e-4."""
        self.shift.lerp_(mean.to(self.shift), rate)
        self.scale.lerp_(deviation.clamp(min=1e-4).to(self.scale), rate)


def channelwise(values: Tensor, like: Tensor) -> Tensor:
    """(C,) -> (C, 1, ...), to go with `like` (B, C, ...)."""
    return values.view(-1, *(1,) * (like.ndim - 2))


class ConvBlock(nn.Module):
    """Residual block without a condition."""

    def __init__(self, channels: int, kernel: Sequence[int]) -> None:
        super().__init__()
        self.net = nn.Sequential(
            group_norm(channels),
            nn.SiLU(),
            convolution(channels, channels, kernel),
            group_norm(channels),
            nn.SiLU(),
            convolution(channels, channels, kernel, zero=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


class ConvKL(LearnedAutoencoder):
    """Small convolutional autoencoder over 1, 2 or 3 axes (Rombach et al. 2022, sec. 3.1).

    Args:
        channels: C of the data. latent_channels: C of the latents. width: channels of the first level.
        steps: one tuple for each level, by what it divides the axes; [[1, 2, 2], [1, 2, 2]] is a spatial factor of 4.
        kernel: of every convolution, one length per axis; default 3 on every axis.
        bottleneck: of the latents; default `mmdiff.bottleneck.KL`.
    """

    def __init__(
        self,
        channels: int,
        latent_channels: int,
        steps: Sequence[Sequence[int]],
        width: int = 32,
        kernel: Sequence[int] | None = None,
        bottleneck: Bottleneck | None = None,
    ) -> None:
        super().__init__(bottleneck or KL(), latent_channels)
        if not steps or any(len(s) != len(steps[0]) for s in steps):
            raise ValueError(f"steps={[list(s) for s in steps]} must be tuples of one length, one for each axis")
        axes = len(steps[0])
        kernel = (3,) * axes if kernel is None else tuple(kernel)
        if len(kernel) != axes:
            raise ValueError(f"kernel={list(kernel)} has {len(kernel)} lengths, but steps have {axes} axes")
        self.factors = tuple(math.prod(s[i] for s in steps) for i in range(axes))
        widths = [width * 2 ** min(i, 2) for i in range(len(steps) + 1)]
        down: list[nn.Module] = [convolution(channels, width, kernel)]
        up: list[nn.Module] = [convolution(width, channels, kernel)]
        for a, b, factor in zip(widths[:-1], widths[1:], steps, strict=True):
            down += [ConvBlock(a, kernel), Resample(a, b, factor)]
            up = [Resample(b, a, factor, up=True), ConvBlock(a, kernel), *up]
        encoded = self.bottleneck.in_channels(latent_channels)
        self.encoder = nn.Sequential(*down, ConvBlock(widths[-1], kernel), convolution(widths[-1], encoded, kernel))
        self.decoder = nn.Sequential(
            convolution(latent_channels, widths[-1], kernel), ConvBlock(widths[-1], kernel), *up
        )

    def features(self, x: Tensor) -> Tensor:
        check_sizes(x.shape[2:], self.factors)
        return self.encoder(x)

    def generate(self, z: Tensor) -> Tensor:
        return self.decoder(z)

    def last_weight(self) -> Tensor:
        return self.decoder[-1].weight  # type: ignore[return-value]
