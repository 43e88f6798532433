"""Clips beside the clips that they should be, and clips by themselves: is the picture right, is it steady?

B batch, T frames, H W space. Clips are (B, 3, T, H, W) in [-1, 1]; every function gives a number for each clip (B,).
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from mmdiff.perceptual import NETWORKS, Perceptual
from video.flow import carry, motion, seen_again


def psnr(made: Tensor, true: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of whole clips, for the range [-1, 1]; infinite for equal ones."""
    _check(made, true)
    return torch.stack(
        [
            peak_signal_noise_ratio(a.clamp(-1, 1), b.clamp(-1, 1), data_range=2.0)
            for a, b in zip(made, true, strict=True)
        ]
    )


def ssim(made: Tensor, true: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004, windows of 11 pixels) in [-1, 1], mean of the frames' in [0, 1]."""
    _check(made, true)
    if min(made.shape[-2:]) < 11:
        raise ValueError(f"frames of {made.shape[-2]}x{made.shape[-1]} are too small for SSIM; it needs 11x11 or more")
    a, b = ((x.clamp(-1, 1).movedim(1, 2).flatten(0, 1) + 1) / 2 for x in (made, true))  # (B T, 3, H, W)
    found = structural_similarity_index_measure(a, b, data_range=1.0, reduction="none")
    assert isinstance(found, Tensor)
    return found.view(len(made), -1).mean(1)


def lpips(made: Tensor, true: Tensor) -> Tensor | None:
    """Perceptual distance by AlexNet (`mmdiff.perceptual.Perceptual`), mean of the frames'; None without weights."""
    _check(made, true)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is not there is said by None
        network = Perceptual()
    if not network.hidden or min(made.shape[-2:]) < NETWORKS[network.net][1]:
        return None
    with torch.no_grad():
        return torch.stack([network(a[None], b[None]) for a, b in zip(made, true, strict=True)])


def compare(made: Tensor, true: Tensor) -> dict[str, Tensor]:
    """All of the above that can be had for these clips, by name and unit."""
    found: dict[str, Tensor | None] = {"PSNR dB": psnr(made, true)}
    if min(made.shape[-2:]) >= 11:
        found["SSIM"] = ssim(made, true)
    found["LPIPS"] = lpips(made, true)
    return {name: values for name, values in found.items() if values is not None}


def stretch(low: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A low clip (B, 3, T', H', W') made (B, *shape) by what knows no clips: frames blended linearly, pixels bicubic.

    Frame k of the low clip is frame k T / T' of the other; after the last one there is nothing to blend with, and it
    is held. A pixel of the low clip is the mean of a cell of the other.
    """
    frames, height, width = shape[1:]
    pixels = low.movedim(1, 2).flatten(0, 1)  # (B T', 3, H', W')
    if (height, width) != tuple(low.shape[-2:]):
        pixels = F.interpolate(pixels, (height, width), mode="bicubic", align_corners=False)
    x = pixels.unflatten(0, (len(low), -1)).movedim(2, 1)  # (B, 3, T', H, W)
    at = torch.arange(frames, device=low.device) * (low.shape[2] / frames)
    before = at.long()
    after = (before + 1).clamp(max=low.shape[2] - 1)
    share = (at - before).view(-1, 1, 1).to(x.dtype)
    return torch.lerp(x[:, :, before], x[:, :, after], share).clamp(-1, 1)


def flicker(x: Tensor) -> Tensor:
    """Temporal flicker in grey levels of 255: how far a frame is from the mean of its two neighbours, on average.

    0 where nothing changes or all changes steadily; of a clip whose brightness goes up and down by `a` levels around
    its mean from frame to frame 2 a. Motion adds to it: compare with real clips. 0 for fewer than three frames.
    """
    if x.shape[2] < 3:
        return x.new_zeros(len(x))
    middle = x[:, :, 1:-1] - (x[:, :, 2:] + x[:, :, :-2]) / 2
    return 127.5 * middle.abs().flatten(1).mean(1)


def warping_error(x: Tensor, reference: Tensor | None = None) -> Tensor:
    """Warping error in grey levels of 255: how far the next frame, moved back, is from this one, root mean square.

    Lai et al. 2018 (arXiv 1808.00449, sec. 4): only where the motion can be seen there and back. Motion is found by
    `video.flow.motion` in `reference`, such as the true clip of an upsampled one, or in the clip itself; whole pixels
    leave an error at moving edges in real clips too: compare with those. 0 for fewer than two frames.
    """
    guide = x if reference is None else reference
    if x.shape[2] < 2:
        return x.new_zeros(len(x))
    first, then = (part.movedim(1, 2).flatten(0, 1) for part in (guide[:, :, :-1], guide[:, :, 1:]))  # (B (T-1), 3, ..)
    there = motion(first, then)
    mask = seen_again(there, motion(then, first))
    here, moved = (part.movedim(1, 2).flatten(0, 1) for part in (x[:, :, :-1], x[:, :, 1:]))
    squares = ((carry(moved, there) - here).square().mean(1, keepdim=True) * mask).view(len(x), -1).sum(1)
    return 127.5 * (squares / mask.view(len(x), -1).sum(1).clamp(min=1)).sqrt()


def _check(made: Tensor, true: Tensor) -> None:
    if made.shape != true.shape or made.ndim != 5 or made.shape[1] != 3:
        raise ValueError(
            f"clips of shapes {tuple(made.shape)} and {tuple(true.shape)} cannot be compared; "
            "both must be (B, 3, T, H, W)"
        )
