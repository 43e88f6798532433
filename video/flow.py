"""Motion between frames by matching blocks: whole pixels, no training.

B batch, C channels, H W space; a motion is (B, 2, H, W) long, by how many pixels down and right.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def motion(a: Tensor, b: Tensor, reach: int = 3, window: int = 5) -> Tensor:
    """Where each pixel of frames `a` (B, C, H, W) is found in `b`: the shift whose neighbourhood differs least.

    reach: the furthest that is looked for, along each axis. window: side of the neighbourhood, odd. Of shifts that fit
    alike, as on a plain ground, the shortest.
    """
    shifts = sorted(
        ((y, x) for y in range(-reach, reach + 1) for x in range(-reach, reach + 1)),
        key=lambda s: s[0] ** 2 + s[1] ** 2,
    )
    height, width = a.shape[-2:]
    padded = F.pad(b, (reach,) * 4, mode="replicate")
    best = torch.full_like(a[:, :1], torch.inf)
    found = torch.zeros(len(a), 2, height, width, dtype=torch.long, device=a.device)
    for y, x in shifts:
        moved = padded[..., reach + y : reach + y + height, reach + x : reach + x + width]
        misses = (moved - a).square().mean(1, keepdim=True)
        misses = F.avg_pool2d(misses, window, 1, window // 2, count_include_pad=False)
        better = misses < best - 1e-6
        best = torch.where(better, misses, best)
        found = torch.where(better, torch.tensor([y, x], device=a.device).view(1, 2, 1, 1), found)
    return found


def carry(x: Tensor, moved: Tensor) -> Tensor:
    """Values of `x` (B, C, H, W) at the places that the pixels move to; at the edge, beyond it."""
    height, width = x.shape[-2:]
    rows = (torch.arange(height, device=x.device)[:, None] + moved[:, 0]).clamp(0, height - 1)
    columns = (torch.arange(width, device=x.device) + moved[:, 1]).clamp(0, width - 1)
    flat = (rows * width + columns).flatten(1)[:, None].expand(-1, x.shape[1], -1)
    return x.flatten(2).gather(2, flat).view(x.shape)


def seen_again(there: Tensor, back: Tensor) -> Tensor:
    """Mask (B, 1, H, W) of the pixels that stay in the picture and whose motion there and back ends within a pixel."""
    height, width = there.shape[-2:]
    rows = torch.arange(height, device=there.device)[:, None] + there[:, 0]
    columns = torch.arange(width, device=there.device) + there[:, 1]
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    astray = there + carry(back.float(), there).long()
    return (astray.abs().amax(1) <= 1).logical_and(inside)[:, None]
