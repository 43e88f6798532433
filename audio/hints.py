"""What a recording has besides its sound, as hints for a ControlNet: the envelope of its level, a melody's chroma.

B batch, C channels, T samples, N frames, F linear frequency bins. Hints have `hop_length` samples to a frame: frame n
is about sample n * hop_length. In training they are computed from the recording itself.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FLOOR = 1e-4  # of the level: -80 dB


class Envelope(nn.Module):
    """Level over time: (B, C, T) -> (B, 1, N), N = ceil(T / hop_length), from -1 (silence) to 1 (root mean square 1).

    The root mean square of `window` samples around each frame, all channels together, in dB: -1 is -80 dB and below.
    """

    def __init__(self, hop_length: int = 256, window: int = 1024) -> None:
        super().__init__()
        if not 1 <= hop_length <= window:
            raise ValueError(f"hop_length={hop_length}, window={window} must satisfy 1 <= hop_length <= window")
        self.hop_length, self.window = hop_length, window

    def forward(self, x: Tensor) -> Tensor:
        check_waveform(x)
        power = x.float().square().mean(dim=1, keepdim=True)
        # samples beyond the ends are silence, and count: a frame at the rim is half as loud
        level = F.avg_pool1d(pad(power, self.window, self.hop_length), self.window, self.hop_length).sqrt()
        return (1 + 2 * level.clamp(min=FLOOR).log10() / -math.log10(FLOOR)).to(x)


class Chroma(nn.Module):
    """Share of each pitch class, C to B, over time: (B, C, T) -> (B, 12, N), N = ceil(T / hop_length).

    The power spectrum of a Hann window of n_fft samples, its bins given to the two nearest pitch classes of equal
    temperament (A4 = 440 Hz) by their distance in semitones; a frame's largest class is 1, and a frame below -80 dB is
    0 throughout. low, high: range of frequencies that count, Hz.
    """

    bank: Tensor
    hann: Tensor

    def __init__(
        self,
        sample_rate: int = 16_000,
        hop_length: int = 256,
        n_fft: int = 4096,
        low: float = 60.0,
        high: float = 5000.0,
    ) -> None:
        super().__init__()
        if not 1 <= hop_length <= n_fft:
            raise ValueError(f"hop_length={hop_length}, n_fft={n_fft} must satisfy 1 <= hop_length <= n_fft")
        if not 0 < low < high <= sample_rate / 2:
            raise ValueError(f"low={low}, high={high} must satisfy 0 < low < high <= sample_rate / 2={sample_rate / 2}")
        self.hop_length, self.n_fft = hop_length, n_fft
        frequencies = torch.arange(n_fft // 2 + 1) * sample_rate / n_fft  # (F,)
        pitch = 12 * (frequencies.clamp(min=1.0) / 440).log2() + 9  # in semitones above C4, where A is 9
        distance = (pitch[:, None] - torch.arange(12) + 6).remainder(12) - 6  # (F, 12), in -6..6
        counts = (frequencies >= low) & (frequencies <= high)
        self.register_buffer("bank", (1 - distance.abs()).clamp(min=0) * counts[:, None], persistent=False)
        self.register_buffer("hann", torch.hann_window(n_fft), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        check_waveform(x)
        wave = pad(x.float().mean(dim=1), self.n_fft, self.hop_length)
        with torch.autocast(x.device.type, enabled=False):
            spectrum = torch.stft(
                wave, self.n_fft, self.hop_length, window=self.hann, center=False, return_complex=True
            )  # (B, F, N)
            magnitude = spectrum.abs() * (2 / self.hann.sum())  # 1 is a full-scale sine
            classes = self.bank.mT @ magnitude.square()  # (B, 12, N)
            loudest = classes.amax(dim=1, keepdim=True)
            return torch.where(loudest < FLOOR**2, 0, classes / loudest.clamp(min=FLOOR**2)).to(x)


def pad(x: Tensor, window: int, hop: int) -> Tensor:
    """Silence around (..., T), so that ceil(T / hop) windows are centred on samples 0, hop, 2 hop, ..."""
    frames = -(-x.shape[-1] // hop)
    left = (window - 1) // 2
    return F.pad(x, (left, (frames - 1) * hop + window - left - x.shape[-1]))


def check_waveform(x: Tensor) -> None:
    """Raises ValueError unless x is (B, C, T)."""
    if x.ndim != 3 or x.shape[-1] < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}; this hint is of waveforms (B, C, T)")
