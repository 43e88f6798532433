"""Networks with one forward: `(x, c_noise, cond) -> x-shaped`. For any project: torch and einops suffice."""

from .condition import Condition, check_input
from .control import ControlNet
from .dit import DiT, DiT1D, SpatioTemporalDiT
from .share import Shareable
from .unet import UNet
from .unet_presets import UNet1D, UNet2D, UNet3D

__all__ = [
    "Condition",
    "ControlNet",
    "DiT",
    "DiT1D",
    "Shareable",
    "SpatioTemporalDiT",
    "UNet",
    "UNet1D",
    "UNet2D",
    "UNet3D",
    "check_input",
]
