"""The picture of a sound: its waveform and its spectrogram."""

import math
import os

import numpy as np
import torch
from torch import Tensor

from mmdiff.data.media import whole_file


def spectrogram_picture(path: str | os.PathLike[str], waveform: Tensor, sample_rate: int) -> None:
    """PNG for the eye: the waveform above, its log-power spectrogram (dB below the loudest point) below.

    waveform: (C, T) float; the spectrogram is that of the channels' mean. Raises ValueError for a wrong shape or
    non-finite samples.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import; no pyplot, so no global state
    from matplotlib.figure import Figure

    if waveform.ndim != 2 or 0 in waveform.shape:
        raise ValueError(f"waveform has shape {tuple(waveform.shape)}; (C, T) with at least one sample is needed")
    waveform = waveform.detach().float().cpu()
    if not torch.isfinite(waveform).all():
        raise ValueError("waveform holds non-finite samples; nothing is drawn")
    n_fft = 2 ** round(math.log2(max(64, sample_rate * 0.032)))
    hop_length = n_fft // 4
    window = torch.hann_window(n_fft)
    mean = torch.nn.functional.pad(waveform.mean(0), (n_fft // 2, n_fft // 2))
    power = torch.stft(mean, n_fft, hop_length, window=window, center=False, return_complex=True).abs() ** 2  # (F, T)
    decibels = 10 * torch.log10(power.clamp_min(1e-12))
    decibels = decibels - decibels.max()
    length_s = waveform.shape[1] / sample_rate
    figure = Figure(figsize=(8, 5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
    upper.plot(np.arange(waveform.shape[1]) / sample_rate, waveform.T.numpy(), linewidth=0.5)
    upper.set(ylim=(-1.05, 1.05), ylabel="amplitude")
    extent = (0.0, power.shape[1] * hop_length / sample_rate, 0.0, sample_rate / 2)
    picture = lower.imshow(
        decibels.numpy(), origin="lower", aspect="auto", extent=extent, vmin=-80, vmax=0, cmap="magma"
    )
    lower.set(xlim=(0, length_s), xlabel="time (s)", ylabel="frequency (Hz)")
    figure.colorbar(picture, ax=lower, label="dB")
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
