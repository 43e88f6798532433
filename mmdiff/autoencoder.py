"""What stands between data and the space a model denoises: learned, or as plain as a mean over cells.

B batch, C channels, T time, `*axes` T and what follows it.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .nn.conv import Resample, check_sizes, convolution
from .nn.norm import group_norm


class Autoencoder(nn.Module, ABC):
    """encode: data (B, C, *axes) -> latents (B, latent_channels, *axes / factors) of about unit variance; decode: back.

    latent_channels: C of the latents, or None for "as the data's". factors: by what each axis is divided, time first.
    """

    latent_channels: int | None = None
    factors: tuple[int, ...] = (1,)

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


class Identity(Autoencoder):
    """Latents are the data."""

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
        self.factors = (factor,)

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


class ConvKL(Autoencoder):
    """Convolutional autoencoder with a Gaussian bottleneck (Kingma & Welling 2014; Rombach et al. 2022, sec. 3.1).

    Args:
        channels: C of the data. latent_channels: C of the latents. width: channels of the first level.
        steps: one tuple for each level, by what it divides the axes; [[1, 2, 2], [1, 2, 2]] is a spatial factor of 4.
        kernel: of every convolution, one length per axis; default 3 on every axis.

    `encode` returns the posterior's mean, normalised by running statistics, so that latents have mean 0 and variance 1
    in every channel; `decode` undoes it. Trained by `mmdiff.autoencoder_module.AutoencoderModule`.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        channels: int,
        latent_channels: int,
        steps: Sequence[Sequence[int]],
        width: int = 32,
        kernel: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if not steps or any(len(s) != len(steps[0]) for s in steps):
            raise ValueError(f"steps={[list(s) for s in steps]} must be tuples of one length, one for each axis")
        axes = len(steps[0])
        kernel = (3,) * axes if kernel is None else tuple(kernel)
        if len(kernel) != axes:
            raise ValueError(f"kernel={list(kernel)} has {len(kernel)} lengths, but steps have {axes} axes")
        self.latent_channels = latent_channels
        self.factors = tuple(math.prod(s[i] for s in steps) for i in range(axes))
        widths = [width * 2 ** min(i, 2) for i in range(len(steps) + 1)]
        down: list[nn.Module] = [convolution(channels, width, kernel)]
        up: list[nn.Module] = [convolution(width, channels, kernel)]
        for a, b, factor in zip(widths[:-1], widths[1:], steps, strict=True):
            down += [ConvBlock(a, kernel), Resample(a, b, factor)]
            up = [Resample(b, a, factor, up=True), ConvBlock(a, kernel), *up]
        self.encoder = nn.Sequential(
            *down, ConvBlock(widths[-1], kernel), convolution(widths[-1], 2 * latent_channels, kernel)
        )
        self.decoder = nn.Sequential(
            convolution(latent_channels, widths[-1], kernel), ConvBlock(widths[-1], kernel), *up
        )
        self.register_buffer("shift", torch.zeros(latent_channels))
        self.register_buffer("scale", torch.ones(latent_channels))

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (B, latent_channels, *axes / factors), not normalised."""
        check_sizes(x.shape[2:], self.factors)
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)

    @torch.no_grad()
    def update_statistics(self, mean: Tensor, rate: float = 0.02) -> None:
        """Moves the running mean and deviation of the latents' channels towards this batch's."""
        flat = rearrange(mean, "b c ... -> c (b ...)")
        self.shift.lerp_(flat.mean(dim=1), rate)
        self.scale.lerp_(flat.std(dim=1).clamp(min=1e-4), rate)

    def encode(self, x: Tensor) -> Tensor:
        mean, _ = self.posterior(x)
        ones = (1,) * (mean.ndim - 2)
        return (mean - self.shift.view(-1, *ones)) / self.scale.view(-1, *ones)

    def decode(self, z: Tensor) -> Tensor:
        ones = (1,) * (z.ndim - 2)
        return self.decoder(z * self.scale.view(-1, *ones) + self.shift.view(-1, *ones))
