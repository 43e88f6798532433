"""Distances of waveforms in time and frequency, to train autoencoders and vocoders by.

B batch, C channels, T samples, F frequencies, T' frames. Spectra are taken in float32, with silence beyond the ends,
and scaled so that a full-scale sine peaks at 1. Each loss takes (found, target), both (B, C, T), and gives a mean ().
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audio.mel import FLOOR, Mel


def spectrum(x: Tensor, window: Tensor, n_fft: int, hop_length: int) -> Tensor:
    """(B, C, T) -> complex (B, C, F, T') of frames centred on multiples of hop_length; window (at most n_fft,)."""
    with torch.autocast(x.device.type, enabled=False):
        found = torch.stft(
            x.float().flatten(0, 1), n_fft, hop_length, len(window), window, pad_mode="constant", return_complex=True
        )
        return (found * (2 / window.sum())).unflatten(0, x.shape[:2])


class STFTLoss(nn.Module):
    """Spectral convergence plus the mean distance of log magnitudes, at one resolution (Yamamoto et al. 2020).

    n_fft, hop_length, window: of the STFT, samples; the window is Hann's. floor: magnitudes below it count as it, so
    that what nobody hears is not learned; the default is 100 dB under a full-scale sine.

    Spectral convergence, the norm of the difference of magnitudes over that of the target, is taken of each clip and
    channel, so that loud ones do not drown soft ones. Where the target is silent its norm is the floor's.
    """

    def __init__(self, n_fft: int, hop_length: int, window: int, floor: float = FLOOR) -> None:
        super().__init__()
        if not 0 < hop_length <= window <= n_fft:
            raise ValueError(
                f"hop_length={hop_length}, window={window} and n_fft={n_fft} must rise in this order: frames that "
                "leave no sample out, windows that fit the transform"
            )
        if floor <= 0:
            raise ValueError(f"floor={floor} must be above 0: the logarithm of silence is not finite")
        self.n_fft, self.hop_length, self.floor = n_fft, hop_length, floor
        self.register_buffer("window", torch.hann_window(window), persistent=False)
        self.window: Tensor

    def forward(self, found: Tensor, target: Tensor) -> Tensor:
        a, b = (
            spectrum(x, self.window, self.n_fft, self.hop_length).abs().clamp(min=self.floor) for x in (found, target)
        )  # (B, C, F, T')
        convergence = torch.linalg.matrix_norm(a - b) / torch.linalg.matrix_norm(b)  # (B, C)
        return convergence.mean() + F.l1_loss(a.log(), b.log())


class MultiResolutionSTFTLoss(nn.Module):
    """Mean of `STFTLoss` at several resolutions; the defaults are those of Yamamoto et al. 2020, for 24 kHz.

    n_ffts, hop_lengths, windows: one of each for every resolution, samples; for 8 kHz a third of the defaults does.
    Raises ValueError where their numbers differ.
    """

    def __init__(
        self,
        n_ffts: Sequence[int] = (1024, 2048, 512),
        hop_lengths: Sequence[int] = (120, 240, 50),
        windows: Sequence[int] = (600, 1200, 240),
        floor: float = FLOOR,
    ) -> None:
        super().__init__()
        if not len(n_ffts) == len(hop_lengths) == len(windows) or not n_ffts:
            raise ValueError(
                f"n_ffts={list(n_ffts)}, hop_lengths={list(hop_lengths)} and windows={list(windows)} must be as many: "
                "one of each for every resolution"
            )
        self.parts = nn.ModuleList(STFTLoss(*sizes, floor) for sizes in zip(n_ffts, hop_lengths, windows, strict=True))

    def forward(self, found: Tensor, target: Tensor) -> Tensor:
        return torch.stack([part(found, target) for part in self.parts]).mean()


class MelLoss(nn.Module):
    """Mean distance of log-mel spectrograms, in the deviations that `mel` scales them by. Takes mono (B, 1, T)."""

    def __init__(self, mel: Mel) -> None:
        super().__init__()
        self.mel = mel

    def forward(self, found: Tensor, target: Tensor) -> Tensor:
        pad = 0, -target.shape[-1] % self.mel.hop_length
        a, b = (self.mel.encode(F.pad(x, pad)) for x in (found, target))
        return F.l1_loss(a, b)
