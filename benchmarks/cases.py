"""What is compared: for each input our network and the peers', with the widths that give them as many parameters."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import networks as n
from benchmarks.networks import OURS, Network

VDP, UNET_V0 = "video-diffusion-pytorch Unet3D", "audio-diffusion-pytorch UNetV0"


@dataclass(frozen=True)
class Case:
    """Networks that do the same work, the first of them ours, and the bars of ours.

    shape: of x, (B, C, *axes). faster: at least so many times the training throughput of the fastest of the peers, or
    of those that faster_than names. share: at least this share of the machine's rate of matrix products.
    """

    name: str
    title: str
    shape: tuple[int, ...]
    networks: Sequence[Network]
    faster: float | None = None
    faster_than: tuple[str, ...] = ()
    share: float | None = None

    @property
    def ours(self) -> Network:
        return self.networks[0]

    def input(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """(x, c_noise, target), the same for every network."""
        generator = torch.Generator().manual_seed(0)
        x, target = (torch.randn(self.shape, generator=generator).to(device) for _ in range(2))
        return x, torch.linspace(-1, 1, self.shape[0]).to(device), target


def our_unet3d(channels: int) -> nn.Module:
    from mmdiff.backbones import UNet3D

    return UNet3D(channels, kernels=[[1, 3, 3], [3, 1, 1]])


def our_unet1d() -> nn.Module:
    from mmdiff.backbones import UNet1D

    return UNet1D(1)


def our_dit(channels: int) -> nn.Module:
    from mmdiff.backbones import SpatioTemporalDiT

    return SpatioTemporalDiT(channels, width=416, depth=3, head_channels=104, rate=8.0)


def our_dit_b() -> nn.Module:
    from mmdiff.backbones import SpatioTemporalDiT

    return SpatioTemporalDiT.B(4)


def unet3d(name: str, shape: tuple[int, ...]) -> Case:
    channels = shape[1]
    return Case(name, f"3D U-Net, x {shape}", shape, [
        Network("mmdiff UNet3D", OURS, partial(our_unet3d, channels)),
        Network(VDP, "video_diffusion_pytorch", partial(n.video_diffusion_pytorch, channels, 32)),
        Network("imagen-pytorch Unet3D", "imagen_pytorch", partial(n.imagen_pytorch, channels, 26)),
        Network("diffusers UNet3DConditionModel", "diffusers", partial(n.diffusers_unet3d, channels, (32, 64, 96, 96))),
    ], faster=1.25)  # fmt: skip


LATENTS, WAVEFORM = (2, 4, 8, 16, 16), (2, 1, 16384)
CASES = {case.name: case for case in (
    unet3d("unet3d", LATENTS),
    unet3d("unet3d-32", (2, 3, 8, 32, 32)),
    Case("dit", f"spatio-temporal DiT, x {LATENTS}, patches of 1x2x2: 512 tokens an item", LATENTS, [
        Network("mmdiff SpatioTemporalDiT", OURS, partial(our_dit, 4)),
        Network("diffusers LatteTransformer3DModel", "diffusers", partial(n.diffusers_latte, LATENTS, 4, 64, 6)),
    ], faster=1.6, share=0.7),
    Case("unet1d", f"1D U-Net, x {WAVEFORM}", WAVEFORM, [
        Network("mmdiff UNet1D", OURS, our_unet1d),
        Network(UNET_V0, "audio_diffusion_pytorch", partial(n.unet_v0, (8, 32, 64, 128, 256, 256), 512)),
        Network("diffusers UNet1DModel", "diffusers", partial(n.diffusers_unet1d, (32, 64, 64, 128, 128, 224))),
    ], faster=1.3, faster_than=(UNET_V0,)),
)}  # fmt: skip

GPU_LATENTS = (16, 4, 16, 32, 32)
GPU_CASES = {case.name: case for case in (
    Case("dit", f"SpatioTemporalDiT-B, x {GPU_LATENTS}", GPU_LATENTS, [
        Network("mmdiff SpatioTemporalDiT-B", OURS, our_dit_b),
    ], share=0.45),
    Case("unet3d", f"3D U-Net, x {GPU_LATENTS}", GPU_LATENTS, [
        Network("mmdiff UNet3D", OURS, partial(our_unet3d, 4)),
    ], share=0.30),
)}  # fmt: skip
