"""Mel spectrograms as an autoencoder: waveform (B, 1, T) <-> log-mel (B, 1, T / hop_length, mels).

B batch, T samples, F linear frequency bins, M mel bins. torchaudio's (..., M, T) is transposed here and nowhere else.
"""

import math
from typing import Literal

import torch
import torchaudio
from torch import Tensor

from mmdiff.autoencoder import Autoencoder
from mmdiff.nn.conv import check_sizes

FLOOR = 1e-5  # of the mel magnitude: -100 dB under a full-scale bin


class Mel(Autoencoder):
    """Log-mel magnitudes, scaled to about [-1, 1]; decoding is Griffin-Lim on a non-negative least-squares inverse.

    Args:
        sample_rate: of the waveform, Hz. n_fft, hop_length: of the Hann-windowed STFT, samples.
        mels: mel bins (M), triangles of height 1 from 0 Hz to half the sample rate. scale: by which they are spaced.
        mean, std: of log10(magnitude) over the data; the defaults suit speech at peak 1 with silence around it.
        iterations: of Griffin-Lim (Griffin & Lim 1984, with the momentum of Perraudin et al. 2013).

    For equal settings the magnitudes are those of torchaudio's MelSpectrogram and librosa's melspectrogram (power 1,
    norm None, centred frames padded with zeros) to a relative 1e-4, times 2 / sum(window), without the last frame.

    Decoding starts from fixed phases, so it is a function of its input. Raises ValueError for waveforms that are not
    mono or whose length is not a multiple of hop_length.
    """

    latent_channels = 1

    def __init__(
        self,
        sample_rate: int = 16_000,
        n_fft: int = 1024,
        hop_length: int = 256,
        mels: int = 64,
        mean: float = -2.5,
        std: float = 1.5,
        iterations: int = 64,
        scale: Literal["htk", "slaney"] = "htk",
    ) -> None:
        super().__init__()
        if scale not in ("htk", "slaney"):
            raise ValueError(f"scale={scale!r} is unknown; choose htk or slaney")
        if n_fft % hop_length:
            raise ValueError(f"n_fft={n_fft} is not a multiple of hop_length={hop_length}")
        if n_fft == hop_length:
            raise ValueError(
                f"hop_length={hop_length} must be at most n_fft / 2={n_fft // 2}: windows must overlap to be inverted"
            )
        if not std > 0:
            raise ValueError(f"std={std} must be positive: of log10(magnitude) over the data; 1.5 suits speech")
        self.sample_rate, self.n_fft, self.hop_length, self.mels = sample_rate, n_fft, hop_length, mels
        self.mean, self.std, self.iterations = mean, std, iterations
        self.factors = (hop_length,)
        bank = torchaudio.functional.melscale_fbanks(
            n_fft // 2 + 1, 0.0, sample_rate / 2, mels, sample_rate, mel_scale=scale
        )  # (F, M)
        if (bank.sum(dim=0) == 0).any():
            raise ValueError(f"mels={mels} is too many for n_fft={n_fft}: some mel bins hold no frequency; raise n_fft")
        self.register_buffer("bank", bank, persistent=False)
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)
        self.bank: Tensor
        self.window: Tensor

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if len(shape) != 2 or shape[0] != 1:
            raise ValueError(f"a mel spectrogram is of mono waveforms (1, T), not {shape}")
        check_sizes(shape[1:], self.factors)
        return (1, shape[1] // self.hop_length, self.mels)

    def encode(self, x: Tensor) -> Tensor:
        if x.ndim != 3 or x.shape[1] != 1 or x.shape[2] % self.hop_length:
            raise ValueError(
                f"a mel spectrogram needs (B, 1, T) with T a multiple of {self.hop_length}, not {tuple(x.shape)}"
            )
        with torch.autocast(x.device.type, enabled=False):  # half precision would round levels by some 0.1 dB
            spectrum = torch.stft(
                x[:, 0].float(), self.n_fft, self.hop_length, window=self.window, pad_mode="constant",
                return_complex=True,
            )  # (B, F, T / hop + 1)  # fmt: skip
            magnitude = spectrum.abs()[..., :-1].transpose(1, 2) * (2 / self.window.sum())  # 1 is a full-scale sine
            mel = magnitude @ self.bank
            return ((mel.clamp(min=FLOOR).log10() - self.mean) / self.std)[:, None]

    def known(self, mask: Tensor) -> Tensor:
        half = self.n_fft // 2  # of the window around a frame; beyond the ends there is silence, which is known
        missing = torch.nn.functional.max_pool1d(
            torch.nn.functional.pad((~mask).float(), (half, half)), self.n_fft, self.hop_length
        )
        return (missing[..., :-1] == 0)[..., None].expand(-1, -1, -1, self.mels)

    def decode(self, z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            mel = 10 ** (z[:, 0].float() * self.std + self.mean).clamp(math.log10(FLOOR), 2.0)
            mel = torch.where(mel <= FLOOR * 1.01, 0, mel)
            magnitude = nonnegative_inverse(mel, self.bank)  # (B, T', F)
        magnitude = torch.cat([magnitude, magnitude[:, -1:]], dim=1).transpose(1, 2) * (self.window.sum() / 2)
        return torch.stack([self.griffin_lim(item) for item in magnitude.cpu()])[:, None].to(z)

    def griffin_lim(self, magnitude: Tensor) -> Tensor:
        """Magnitudes (F, T' + 1) -> waveform (T,): one at a time, so that it depends on no neighbour in the batch."""
        frames = max(magnitude.shape[1], self.n_fft // 2 // self.hop_length + 2)  # fewer cannot be padded by reflection
        padded = torch.nn.functional.pad(magnitude, (0, frames - magnitude.shape[1]))
        with torch.random.fork_rng(devices=[]):
            # griffinlim draws its first phases from the CPU's global generator; torch.manual_seed would reseed GPUs too
            torch.default_generator.manual_seed(0)
            wave = torchaudio.functional.griffinlim(
                padded, self.window.cpu(), self.n_fft, self.hop_length, self.n_fft, power=1.0, n_iter=self.iterations,
                momentum=0.99, length=(frames - 1) * self.hop_length, rand_init=True,
            )  # fmt: skip
        return wave[: (magnitude.shape[1] - 1) * self.hop_length]


def nonnegative_inverse(mel: Tensor, bank: Tensor, iterations: int = 100) -> Tensor:
    """Magnitudes (B, T, F) >= 0 whose mel bins come nearest to `mel` (B, T, M): multiplicative updates.

    Source: Lee & Seung 2001, eq. 4, with the bank (F, M) held fixed.
    """
    x = mel @ bank.T + 1e-8
    above = mel @ bank.T
    for _ in range(iterations):
        x = x * above / ((x @ bank) @ bank.T + 1e-12)
    return x
