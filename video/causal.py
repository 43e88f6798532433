"""Layers over frames that look at the past alone, and can go on where the last chunk of frames ended.

B batch, C channels, T time, H W space. Inside, tensors are (B, T, H, W, C): norms and folding act on the last axis.
Before the first frame of a clip stands the first frame, so a still clip gives still features, and an image is T=1.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Triple = tuple[int, int, int]  # of T, H, W


class Memory:
    """What the layers of one network keep of the frames before a chunk. A new one stands at the start of a clip.

    A network that is given it reads and replaces what it holds.
    """

    def __init__(self) -> None:
        self.started = False
        self.frames: dict[nn.Module, Tensor] = {}


def extended(x: Tensor, count: int, memory: Memory | None, layer: nn.Module) -> Tensor:
    """x with the `count` frames before it, as `layer` has seen them; at the start of a clip, its first frame again."""
    if count == 0:
        return x
    starts = memory is None or not memory.started
    before = x[:, :1].expand(-1, count, -1, -1, -1) if memory is None or starts else memory.frames[layer]
    x = torch.cat([before, x], dim=1)
    if memory is not None:
        memory.frames[layer] = x[:, -count:].clone()  # a view would keep the whole chunk
    return x


class Layer(nn.Module, ABC):
    """(B, T, H, W, C) -> (B, T', H', W', C'), without a look at later frames.

    factors: by what it divides (or multiplies) T, H, W. radius, past: how many steps of its coarser side it reaches to
    each side in space, and back in time.
    """

    factors: Triple = (1, 1, 1)
    radius: int = 0
    past: int = 0

    @abstractmethod
    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor: ...


class Conv(Layer):
    """Convolution of odd lengths `kernel` (T, H, W): over the frame and those before it, zeros around the picture."""

    def __init__(self, c_in: int, c_out: int, kernel: Triple) -> None:
        super().__init__()
        self.conv = nn.Conv3d(c_in, c_out, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))
        self.radius, self.past = kernel[1] // 2, kernel[0] - 1

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        x = extended(x, self.past, memory, self)
        return self.conv(x.movedim(-1, 1)).movedim(1, -1)


class Block(Layer):
    """Residual block: a norm, a convolution within frames, SiLU, a convolution over `frames` frames."""

    def __init__(self, channels: int, frames: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.first, self.second = Conv(channels, channels, (1, 3, 3)), Conv(channels, channels, (frames, 3, 3))
        self.radius, self.past = 2, frames - 1

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        return x + self.second(F.silu(self.first(self.norm(x))), memory)


class Down(Layer):
    """Cells of `factors` steps become channels, then a convolution. In time the first cell is the first frame alone."""

    def __init__(self, c_in: int, c_out: int, factors: Triple, kernel: int = 1) -> None:
        super().__init__()
        t, h, w = self.factors = factors
        self.conv = Conv(c_in * t * h * w, c_out, (1, kernel, kernel))
        self.radius = self.conv.radius

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        t, h, w = self.factors
        if t > 1 and (memory is None or not memory.started):
            x = torch.cat([x[:, :1].expand(-1, t - 1, -1, -1, -1), x], dim=1)  # the first cell holds one frame t times
        return self.conv(rearrange(x, "b (t p) (h q) (w r) c -> b t h w (p q r c)", p=t, q=h, r=w))


class Up(Layer):
    """A convolution, then channels become cells of `factors` steps. In time the first cell is the first frame alone."""

    def __init__(self, c_in: int, c_out: int, factors: Triple, kernel: int = 1) -> None:
        super().__init__()
        t, h, w = self.factors = factors
        self.conv = Conv(c_in, c_out * t * h * w, (1, kernel, kernel))
        self.radius = self.conv.radius

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        t, h, w = self.factors
        x = rearrange(self.conv(x), "b t h w (p q r c) -> b (t p) (h q) (w r) c", p=t, q=h, r=w)
        return x if memory is not None and memory.started else x[:, t - 1 :]


class Network(nn.Module):
    """Layers one after another beside one linear layer, (B, C, T, H, W) -> (B, C', T', H', W').

    shortcut: from cells to latents or back; what a linear map can do is learnt in the first steps, and the layers add
    the rest. With a memory the network goes on with its clip.
    """

    def __init__(self, layers: Iterable[Layer], shortcut: Layer) -> None:
        super().__init__()
        self.layers, self.shortcut = nn.ModuleList(layers), shortcut

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        x = x.movedim(1, -1)  # (B, T, H, W, C)
        linear = self.shortcut(x, memory)
        for layer in self.layers:
            x = layer(x, memory)
        if memory is not None:
            memory.started = True
        return (x + linear).movedim(-1, 1)


class Level(NamedTuple):
    """By what it divides T, H, W; channels; frames that the second convolution of a block sees; number of blocks."""

    step: Triple
    width: int
    frames: int
    depth: int


def factors(levels: Iterable[Level]) -> Triple:
    """By what all levels together divide T, H, W."""
    t, h, w = (math.prod(sizes) for sizes in zip(*(level.step for level in levels), strict=True))
    return t, h, w


def reach(layers: Iterable[nn.Module], axis: int) -> int:
    """Steps of the finest side that a cell of the coarsest reaches beyond its own: axis 0 back in time, 1 and 2 aside.

    layers: `Layer`s from the finest to the coarsest, an encoder's in order, a decoder's in reverse.
    """
    total, stride = 0, 1
    for layer in layers:
        assert isinstance(layer, Layer)
        stride *= layer.factors[axis]
        total += stride * (layer.past if axis == 0 else layer.radius)
    return total


def encoder(channels: int, c_out: int, latent_channels: int, levels: Sequence[Level]) -> Network:
    """Encoder network: pixels folded into the channels of the first level, blocks at each level, a linear end.

    c_out: channels that the bottleneck reads. The first `latent_channels` start as the smoothest parts of each cell;
    the others, log-variances of a Gaussian, at -8, a noise that does not hide them.
    """
    layers: list[Layer] = []
    for i, level in enumerate(levels):
        layers.append(Down(levels[i - 1].width if i else channels, level.width, level.step, kernel=1 if i else 3))
        layers += [Block(level.width, level.frames) for _ in range(level.depth)]
    last = Conv(levels[-1].width, c_out, (1, 1, 1))
    shortcut = Down(channels, c_out, factors(levels))
    _start_linear(last, shortcut.conv, smooth_basis(channels, factors(levels), latent_channels), inverse=False)
    return Network([*layers, last], shortcut)


def decoder(c_in: int, channels: int, levels: Sequence[Level]) -> Network:
    """Decoder network, the mirror of `encoder`; its first convolution looks at the neighbours of a latent."""
    layers: list[Layer] = [Conv(c_in, levels[-1].width, (levels[-1].frames, 3, 3))]
    for i, level in reversed(list(enumerate(levels))):
        layers += [Block(level.width, level.frames) for _ in range(level.depth)]
        last = Up(level.width, levels[i - 1].width if i else channels, level.step, kernel=1 if i else 3)
        layers.append(last)
    shortcut = Up(c_in, channels, factors(levels))
    _start_linear(last.conv, shortcut.conv, smooth_basis(channels, factors(levels), c_in), inverse=True)
    return Network(layers, shortcut)


def smooth_basis(channels: int, cell: Triple, count: int) -> Tensor:
    """The `count` directions (count, t h w channels) in which smooth clips vary most within a cell, of length 1.

    Principal components where neighbours correlate by exp(-1/8) along each axis and colours by 0.9, as in pictures.
    Where a cell has fewer values than `count` the rest is zero.
    """
    covariance = torch.full((channels, channels), 0.9) + 0.1 * torch.eye(channels)
    for size in reversed(cell):
        place = torch.arange(size)
        covariance = torch.kron(torch.exp(-(place[:, None] - place).abs() / 8), covariance)
    found = torch.linalg.eigh(covariance.double()).eigenvectors.flip(1).T[:count].float()
    found = found * torch.where(found.sum(dim=1, keepdim=True) < 0, -1, 1)  # a brighter cell has a greater mean
    return torch.cat([found, found.new_zeros(count - len(found), found.shape[1])])


@torch.no_grad()
def _start_linear(last: Conv, shortcut: Conv, basis: Tensor, inverse: bool) -> None:
    """A network that starts as a projection on `basis`, in units of the cell's mean, or as its inverse."""
    scale = math.sqrt(basis.shape[1])
    for conv in (last.conv, shortcut.conv):
        nn.init.zeros_(conv.weight)
        conv.bias.zero_()  # type: ignore[union-attr]
    if inverse:
        shortcut.conv.weight.copy_((basis.T * scale)[:, :, None, None, None])
    else:
        shortcut.conv.weight[: len(basis)] = (basis / scale)[:, :, None, None, None]
        shortcut.conv.bias[len(basis) :] = -8  # type: ignore[index]
