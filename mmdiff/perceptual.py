"""Perceptual distance of pictures, by a network that has been trained to see."""

import os
from importlib.util import find_spec
from typing import Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

NETWORKS = {  # file of the weights in torch.hub's cache, and the smallest picture that the network takes
    "alex": ("alexnet-owt-7be5be79.pth", 31),
    "squeeze": ("squeezenet1_1-b8a52dc0.pth", 17),
    "vgg": ("vgg16-397923af.pth", 16),
}


class Perceptual(nn.Module):
    """LPIPS (Zhang et al. 2018) of pictures or of a clip's frames, by torchmetrics; a loss of `AutoencoderModule`.

    Never downloads. It needs the packages torchmetrics and torchvision, and the network's weights in torch.hub's cache
    (~/.cache/torch/hub/checkpoints, or under TORCH_HOME); where one is missing it is off: it warns once, and is 0.

    net: alex, squeeze or vgg. The network is no part of the state, so that a checkpoint loads where there is none.
    """

    def __init__(self, net: Literal["alex", "squeeze", "vgg"] = "alex") -> None:
        super().__init__()
        if net not in NETWORKS:
            raise ValueError(f"net={net!r} must be one of {', '.join(NETWORKS)}")
        self.net = net
        self.hidden: list[nn.Module] = []  # in a list, which keeps it from the state dict
        missing = next((name for name in ("torchmetrics", "torchvision") if find_spec(name) is None), None)
        path = os.path.join(torch.hub.get_dir(), "checkpoints", NETWORKS[net][0])
        if missing is None and not os.path.isfile(path):
            missing = path
        if missing is not None:
            rank_zero_warn(f"the perceptual loss is off: {missing} is not there, and nothing is downloaded")
            return
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        self.hidden.append(LearnedPerceptualImagePatchSimilarity(net).net.requires_grad_(False).eval())

    def forward(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """Pictures (B, C, H, W) or clips (B, C, T, H, W) in [-1, 1], C 1 or 3 -> () mean over items and frames."""
        if not self.hidden:
            return x_hat.new_zeros(())
        least = NETWORKS[self.net][1]
        if x.ndim not in (4, 5) or x.shape[1] not in (1, 3) or min(x.shape[-2:]) < least:
            raise ValueError(
                f"the perceptual loss by {self.net} is of pictures (B, C, H, W) or clips (B, C, T, H, W) of 1 or 3 "
                f"channels and at least {least} by {least}, not {tuple(x.shape)}"
            )
        return self.hidden[0].to(x.device)(frames(x_hat), frames(x)).mean()


def frames(x: Tensor) -> Tensor:
    """(B, C, ..., H, W) -> (B ..., 3, H, W), bounded to [-1, 1]."""
    return x.movedim(1, -3).flatten(0, -4).expand(-1, 3, -1, -1).clamp(-1, 1)
