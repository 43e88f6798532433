"""Networks with one forward: `(x, c_noise, cond) -> x-shaped`. Import them into any project; torch and einops suffice."""

from .unet import UNet

__all__ = ["UNet"]
