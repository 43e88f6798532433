"""What a clip shows besides its content, as hints for a ControlNet: edges.

B batch, C channels, T time, H W space. Hints are computed from data in [-1, 1], in training from the clip itself.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)


class Edges(nn.Module):
    """Edges of each frame: (B, C, T, H, W) -> (B, 1, T, H, W), the size of Sobel's gradient of the luminance.

    0 where nothing changes, 1 along a straight edge between black (-1) and white (1), at most sqrt(2). The frame's rim
    is repeated outwards, so that it is no edge. C is 1 (grey) or 3 (RGB); raises ValueError otherwise.
    """

    kernels: Tensor

    def __init__(self) -> None:
        super().__init__()
        across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
        self.register_buffer("kernels", torch.stack([across, across.mT])[:, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 5 or x.shape[1] not in (1, 3):
            raise ValueError(f"x has shape {tuple(x.shape)}; edges are of grey or RGB clips (B, 1 or 3, T, H, W)")
        luma = x if x.shape[1] == 1 else torch.einsum("bcthw,c->bthw", x, x.new_tensor(LUMA))
        frames = F.pad(luma.flatten(0, -3)[:, None], (1, 1, 1, 1), mode="replicate")  # (B T, 1, H + 2, W + 2)
        slopes = F.conv2d(frames, self.kernels.to(x))  # (B T, 2, H, W)
        return torch.linalg.vector_norm(slopes, dim=1).reshape(len(x), 1, *x.shape[2:])
