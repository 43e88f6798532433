"""Discriminators of waveforms that look at their spectra.

B batch, C channels, T samples, F frequencies, T' frames.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from audio.stft_loss import spectrum
from mmdiff.discriminator import Discriminator, Judgement


class STFTDiscriminator(Discriminator):
    """One judgement for each resolution, by convolutions over real and imaginary parts of the spectrum.

    As the multi-scale STFT discriminator of EnCodec (Defossez et al. 2022), which judges phases too.

    Args:
        channels: C of the waveforms. n_ffts: of the STFTs, with Hann windows of that length and hops of a quarter.
        width: channels of the convolutions.
    """

    def __init__(self, channels: int = 1, n_ffts: Sequence[int] = (512, 1024, 2048), width: int = 16) -> None:
        super().__init__()
        if channels < 1 or width < 1:
            raise ValueError(f"channels={channels} and width={width} must be 1 or more")
        if not n_ffts or any(n < 16 or n % 4 for n in n_ffts):
            raise ValueError(f"n_ffts={list(n_ffts)} must be multiples of 4 from 16 up, at least one")
        self.channels = channels
        self.parts = nn.ModuleList(SpectrumJudge(channels, n_fft, width) for n_fft in n_ffts)

    def forward(self, x: Tensor) -> list[Judgement]:
        if x.ndim != 3 or x.shape[1] != self.channels:
            raise ValueError(f"x has shape {tuple(x.shape)}; (B, {self.channels}, T) is needed")
        return [part(x) for part in self.parts]


class SpectrumJudge(nn.Module):
    """Judgement of a waveform at one resolution; each score sees some frames and frequencies."""

    def __init__(self, channels: int, n_fft: int, width: int) -> None:
        super().__init__()
        self.n_fft = n_fft
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)
        self.window: Tensor

        def layer(c_in: int, stride: int, dilation: int) -> nn.Conv2d:
            return nn.Conv2d(c_in, width, (3, 9), (1, stride), (dilation, 4), (dilation, 1))

        self.layers = nn.ModuleList([layer(2 * channels, 1, 1), *(layer(width, 2, d) for d in (1, 2, 4))])
        self.score = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Judgement:
        found = spectrum(x, self.window, self.n_fft, self.n_fft // 4)  # (B, C, F, T')
        y = torch.view_as_real(found).movedim(-1, 2).flatten(1, 2).transpose(2, 3)  # (B, 2 C, T', F)
        y = (
            y * (self.n_fft / 3) ** 0.5
        )  # white noise keeps its variance: of a Hann window sum(w^2) / sum(w)^2 is 1.5 / n
        features = []
        for layer in self.layers:
            y = nn.functional.leaky_relu(layer(y), 0.2)
            features.append(y)
        return Judgement(self.score(y), features)
