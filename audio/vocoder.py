"""A trained way back from a mel spectrogram to its waveform: one pass of a network, where Griffin-Lim iterates.

B batch, T samples, T' frames of hop_length samples, M mel bins, D width, F frequencies.
"""

import math

import torch
from torch import Tensor, nn

from audio.mel import FLOOR, Mel
from mmdiff.autoencoder import Reconstruction, TrainableAutoencoder


class FrameBlock(nn.Module):
    """ConvNeXt block over frames (Liu et al. 2022): a depthwise convolution, then a wide layer for each frame alone."""

    def __init__(self, width: int, kernel: int, expansion: int, scale: float) -> None:
        super().__init__()
        self.mix = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.net = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, expansion * width), nn.GELU(), nn.Linear(expansion * width, width)
        )
        self.scale = nn.Parameter(torch.full((width,), scale))

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(self.mix(x).transpose(1, 2))  # (B, T', D)
        return x + (self.scale * y).transpose(1, 2)


class Vocoder(TrainableAutoencoder):
    """`mel`, decoded by a network on its frames with an inverse STFT at the end (Vocos, Siuzdak 2023).

    Args:
        mel: encodes, and gives the transform's n_fft and hop_length.
        width: D. depth: number of blocks. kernel: of the convolutions over frames, odd. expansion: of `width` within
            a block.

    The network gives phases and, what Vocos does not, magnitudes over those that a flat spectrum within each mel bin
    has; everything runs at the rate of frames. The latents are those of `mel`, so it takes the place of `mel` in any
    model trained on it. Decoding T' frames gives exactly T' * hop_length samples.
    """

    latent_channels = 1

    def __init__(self, mel: Mel, width: int = 192, depth: int = 6, kernel: int = 7, expansion: int = 3) -> None:
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel={kernel} must be odd, to have a centre; 7 suits most")
        if min(width, depth, expansion) < 1:
            raise ValueError(f"width={width}, depth={depth} and expansion={expansion} must be 1 or more")
        self.mel = mel
        self.factors = mel.factors
        self.stem = nn.Conv1d(mel.mels, width, kernel, padding=kernel // 2)
        self.stem_norm = nn.LayerNorm(width)
        self.blocks = nn.Sequential(*(FrameBlock(width, kernel, expansion, 1 / depth) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 2 * (mel.n_fft // 2 + 1))
        heights = mel.bank.sum(dim=1, keepdim=True).clamp(min=1e-6)  # (F, 1), of the triangles over a frequency
        self.register_buffer("spread", mel.bank / heights / mel.bank.sum(dim=0), persistent=False)  # (F, M)
        self.spread: Tensor

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.mel.latent_shape(shape)

    def known(self, mask: Tensor) -> Tensor:
        return self.mel.known(mask)

    def encode(self, x: Tensor) -> Tensor:
        return self.mel.encode(x)

    def decode(self, z: Tensor) -> Tensor:
        if z.ndim != 4 or z.shape[1] != 1 or not z.shape[2] or z.shape[3] != self.mel.mels:
            raise ValueError(
                f"z has shape {tuple(z.shape)}; (B, 1, T', {self.mel.mels}) is needed, with at least one frame"
            )
        frames = torch.cat([z, z[:, :, -1:]], dim=2)[:, 0].transpose(1, 2)  # (B, M, T' + 1): one centred on the end
        x = self.stem_norm(self.stem(frames).transpose(1, 2)).transpose(1, 2)  # (B, D, T' + 1)
        x = self.head(self.norm(self.blocks(x).transpose(1, 2)))  # (B, T' + 1, 2 F)
        with torch.autocast(z.device.type, enabled=False):
            gain, phase = x.float().transpose(1, 2).chunk(2, dim=1)  # (B, F, T' + 1)
            magnitude = gain.clamp(max=5).exp() * self.flat(frames.float()) * (self.mel.window.sum() / 2)
            wave = torch.istft(
                torch.polar(magnitude, phase), self.mel.n_fft, self.mel.hop_length, window=self.mel.window,
                length=z.shape[2] * self.mel.hop_length,
            )  # fmt: skip
        return wave[:, None].to(z.dtype)

    def flat(self, frames: Tensor) -> Tensor:
        """Magnitudes (B, F, T') of the spectra that are flat within each mel bin, for frames (B, M, T') of latents."""
        mel = 10 ** (frames * self.mel.std + self.mel.mean).clamp(math.log10(FLOOR), 2)
        return (self.spread @ mel).clamp(min=FLOOR)

    def reconstruct(self, x: Tensor, generator: torch.Generator | None = None) -> Reconstruction:
        z = self.encode(x)
        return Reconstruction(self.decode(z), z.new_zeros(()), {}, z)

    def last_weight(self) -> Tensor:
        return self.head.weight
