"""Three networks of mmdiff in a LightningModule that has nothing else of it: rectified flow on toy data, in seconds.

python train.py            # each network's loss before and after, and the folder it is saved in
"""

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mmdiff.backbones import SpatioTemporalDiT, UNet1D, UNet3D

NETWORKS = {  # the network, and the sizes of one item (C, T, ...)
    "UNet3D": (UNet3D(in_channels=3, channels=16, multipliers=[1, 2], head_channels=16), (3, 4, 8, 8)),
    "SpatioTemporalDiT": (SpatioTemporalDiT(in_channels=3, width=64, depth=4, head_channels=32), (3, 4, 8, 8)),
    "UNet1D": (UNet1D(in_channels=1, channels=16, multipliers=[1, 2], head_channels=16), (1, 64)),
}


class RectifiedFlow(pl.LightningModule):
    """The network learns the velocity from data at t = 0 to noise at t = 1."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def loss(self, x: Tensor) -> Tensor:
        noise, t = torch.randn_like(x), torch.rand(len(x), device=x.device)
        at = t.view(-1, *(1,) * (x.ndim - 1))
        return (self.net(torch.lerp(x, noise, at), t) - (noise - x)).square().mean()

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self.loss(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def waves(n: int, channels: int, *sizes: int) -> Tensor:
    """Waves (n, channels, *sizes) along the last axis, each of its own phase."""
    phase = 6.28 * torch.rand(n, channels, *(1,) * len(sizes))
    return torch.sin(torch.linspace(0, 12.56, sizes[-1]) + phase).expand(n, channels, *sizes).contiguous()


for name, (net, shape) in NETWORKS.items():
    pl.seed_everything(0, verbose=False)
    module, data = RectifiedFlow(net), waves(64, *shape)
    with torch.no_grad():
        before = module.loss(data)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(max_epochs=5, accelerator="cpu", **quiet)
    trainer.fit(module, DataLoader(TensorDataset(data), batch_size=8, shuffle=True))
    with torch.no_grad():
        print(f"{name}: loss {before:.3f} -> {module.loss(data):.3f}, saved in", net.save_pretrained(f"saved/{name}"))
