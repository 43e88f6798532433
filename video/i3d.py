"""The network of the first video distances: I3D (Carreira & Zisserman 2017, arXiv 1705.07750), to be given weights.

B batch, C channels, T time, H W space.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from mmdiff.distance import Extractor
from video.features import spread

SIDE = 224  # pixels a side that it was trained on
LEAST = 9  # frames: time is divided by 8, and two steps of what is left are averaged
# Widths of an Inception block: 1x1; 1x1 and 3x3; 1x1 and 3x3; 1x1 after pooling (Szegedy et al. 2015, table 1).
BLOCKS = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
POOLS = {"Mixed_4b": (3, 2), "Mixed_5b": (2, 2)}  # side and stride, in time too, of what stands before a block


class I3D(Extractor):
    """Logits (B, classes) of I3D on RGB, mean over time: the features of FVD (Unterthiner et al. 2018).

    weights: a safetensors file with the tensors' names of the usual PyTorch port (`Mixed_3b.b1a.conv3d.weight`). Its
    .pt holds a plain state dict; make the file of it once, with a loader that unpickles tensors alone.
    classes: of the weights, 400 of Kinetics-400.
    Raises ValueError if the file's tensors are not those of the network.
    """

    def __init__(self, weights: str, classes: int = 400) -> None:
        super().__init__()
        self.net = Inception(classes)
        stored = load_file(weights)
        own = {name: value.shape for name, value in self.net.state_dict().items() if "num_batches" not in name}
        stored = {name: value for name, value in stored.items() if "num_batches" not in name}
        wrong = sorted({name for name, _ in own.items() ^ {(k, v.shape) for k, v in stored.items()}})
        if wrong:
            raise ValueError(f"{weights} is not I3D of {classes} classes: {', '.join(wrong[:3])} differ")
        counters = {name: value for name, value in self.net.state_dict().items() if "num_batches" in name}
        self.net.load_state_dict({**stored, **counters})
        self.net.eval().requires_grad_(False)
        self.digest = hashlib.sha256(Path(weights).read_bytes()).hexdigest()[:12]

    @property
    def protocol(self) -> str:
        return f"I3D logits {self.digest}, frames of {SIDE}, bilinear, mean over time"

    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        x = spread(x, max(x.shape[2], LEAST))  # shorter clips hold their frames
        pixels = F.interpolate(x.movedim(1, 2).flatten(0, 1), (SIDE, SIDE), mode="bilinear", align_corners=False)
        return self.net(pixels.unflatten(0, (len(x), -1)).movedim(1, 2)).mean(2)


class Inception(nn.Module):
    """(B, 3, T, 224, 224) in [-1, 1] -> logits (B, classes, T')."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = Unit(3, 64, 7, 2)
        self.Conv3d_2b_1x1 = Unit(64, 64, 1)
        self.Conv3d_2c_3x3 = Unit(64, 192, 3)
        width = 192
        for name, widths in BLOCKS.items():
            self.add_module(name, Mixed(width, widths))
            width = widths[0] + widths[2] + widths[4] + widths[5]
        self.logits = nn.ModuleDict({"conv3d": nn.Conv3d(width, classes, 1)})

    def forward(self, x: Tensor) -> Tensor:
        x = pooled(self.Conv3d_1a_7x7(x), (1, 3, 3), (1, 2, 2))  # (B, 64, T / 2, H / 4, W / 4)
        x = self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x))
        x = pooled(x, (1, 3, 3), (1, 2, 2))  # (B, 192, T / 2, H / 8, W / 8)
        for name in BLOCKS:
            if name in POOLS:
                side, stride = POOLS[name]
                x = pooled(x, (side,) * 3, (stride,) * 3)
            x = self.get_submodule(name)(x)
        x = F.avg_pool3d(x, (2, 7, 7), 1)  # (B, 1024, T / 8 - 1, 1, 1)
        return self.logits["conv3d"](x)[..., 0, 0]


class Unit(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, inner: int, outer: int, side: int, stride: int = 1) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(inner, outer, side, stride, bias=False)
        self.bn = nn.BatchNorm3d(outer, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv3d(padded(x, self.conv3d.kernel_size, self.conv3d.stride))))


class Mixed(nn.Module):
    """An Inception block: four branches, side by side."""

    def __init__(self, inner: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.b0 = Unit(inner, widths[0], 1)
        self.b1a, self.b1b = Unit(inner, widths[1], 1), Unit(widths[1], widths[2], 3)
        self.b2a, self.b2b = Unit(inner, widths[3], 1), Unit(widths[3], widths[4], 3)
        self.b3b = Unit(inner, widths[5], 1)

    def forward(self, x: Tensor) -> Tensor:
        branches = [self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled(x, (3,) * 3, (1,) * 3))]
        return torch.cat(branches, dim=1)


def pooled(x: Tensor, side: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    return F.max_pool3d(padded(x, side, stride), side, stride)  # zeros may pad: what is pooled is not negative


def padded(x: Tensor, side: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Zeros around (B, C, T, H, W), the odd one behind, so that a size is divided by its stride and rounded up."""
    amounts: list[int] = []
    for size, k, s in zip(x.shape[2:], side, stride, strict=True):
        whole = max(k - (s if size % s == 0 else size % s), 0)
        amounts = [whole // 2, whole - whole // 2, *amounts]
    return F.pad(x, amounts)
