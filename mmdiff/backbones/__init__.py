"""Networks with one forward: `(x, c_noise, cond) -> x-shaped`. For any project: torch and einops suffice."""

from .unet import UNet

__all__ = ["UNet"]
