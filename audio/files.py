"""Audio files by soundfile, with PyAV for the containers it does not know; wav, flac and spectrogram pictures.

C channels, T samples. A waveform is (C, T) float32 in [-1, 1].
"""

import io
import math
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import torch
from torch import Tensor

from mmdiff.data.media import MediaError, whole_file

MediaSource = str | os.PathLike[str] | bytes | BinaryIO

EXTENSIONS = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac", ".aiff", ".mp4", ".mov", ".webm", ".mkv")
MAX_VALUES = 1 << 28  # C * T of one file, 1 GiB as float32
_RATES = (1000, 768000)  # Hz; a header outside of this is damaged
_MAX_RESAMPLE_TAPS = 1 << 26
_FORMATS = "mov,mp4,m4a,3gp,matroska,webm,avi,mpeg,mpegts,asf,flv,ogg,mp3,aac,wav,w64,aiff,caf,flac,amr,ac3,wv,ape"
_SUBTYPES = {".wav": "WAV", ".flac": "FLAC"}


def read_audio(
    source: MediaSource, sample_rate: int | None = None, *, name: str | None = None, max_values: int = MAX_VALUES
) -> tuple[Tensor, int]:
    """(waveform (C, T) float32, sample_rate in Hz), resampled when `sample_rate` is given and differs.

    source: path, bytes or seekable binary file. A float file may hold values beyond [-1, 1]; they are kept.
    Raises MediaError, naming `name` (default: the path), when the file is broken, empty, holds non-finite samples or
    more than `max_values` values.
    """
    name = name or (os.fspath(source) if isinstance(source, str | os.PathLike) else "audio data")
    try:
        with soundfile.SoundFile(_opened(source)) as file:
            if file.frames * file.channels > max_values:
                raise MediaError(
                    f"{name}: {file.frames} samples x {file.channels} channels are over {max_values} values"
                )
            rate = file.samplerate
            if not file.seekable():  # GSM 6.10 and its like, which PyAV reads
                raise soundfile.SoundFileRuntimeError("not seekable")
            samples = file.read(dtype="float32", always_2d=True).T  # (C, T)
    except (soundfile.SoundFileError, OSError) as error:
        samples, rate = _read_by_av(source, name, max_values, error)
    if samples.shape[1] == 0:
        raise MediaError(f"{name}: no audio samples")
    if not _RATES[0] <= rate <= _RATES[1]:
        raise MediaError(f"{name}: a sample rate of {rate} Hz is outside {_RATES[0]} to {_RATES[1]}")
    waveform = torch.from_numpy(np.ascontiguousarray(samples))
    if not torch.isfinite(waveform).all():
        raise MediaError(f"{name}: holds non-finite samples")
    if sample_rate is None or sample_rate == rate:
        return waveform, rate
    try:
        return resample(waveform, rate, sample_rate), sample_rate
    except ValueError as error:
        raise MediaError(f"{name}: {error}") from error


def resample(waveform: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """(..., T) at `from_rate` Hz -> (..., ceil(T * to_rate / from_rate)) at `to_rate`, windowed sinc (torchaudio).

    Raises ValueError when the rates have so little in common that the filter would not fit into memory.
    """
    if from_rate == to_rate:
        return waveform
    from torchaudio.functional import resample as sinc  # slow to import, and seldom needed

    common = math.gcd(from_rate, to_rate)
    if (from_rate // common) * (to_rate // common) > _MAX_RESAMPLE_TAPS:
        raise ValueError(f"resampling {from_rate} Hz to {to_rate} Hz needs too large a filter; use a rounder rate")
    return sinc(waveform, from_rate, to_rate)


def write_audio(path: str | os.PathLike[str], waveform: Tensor, sample_rate: int, *, peak: float | None = None) -> None:
    """16-bit `.wav` or `.flac` (by suffix) with exactly T samples; the same input gives the same bytes.

    waveform: (C, T) float in [-1, 1]. Values beyond are an error, never clipped in silence; with `peak` (in (0, 1])
    a waveform whose largest magnitude is over `peak` is scaled down to it, a softer one is left as it is.
    Raises ValueError for a wrong shape, suffix, rate or level and for non-finite samples; then no file is made.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in _SUBTYPES:
        raise ValueError(f"path={str(path)!r} ends in {suffix!r}; .wav or .flac is needed")
    if waveform.ndim != 2 or 0 in waveform.shape or waveform.shape[0] > 8:
        raise ValueError(f"waveform has shape {tuple(waveform.shape)}; (C, T) with 1 to 8 channels is needed")
    if not waveform.is_floating_point():
        raise ValueError(f"waveform has dtype {waveform.dtype}; floats in [-1, 1] are needed")
    if sample_rate != int(sample_rate) or not _RATES[0] <= sample_rate <= _RATES[1]:
        raise ValueError(f"sample_rate={sample_rate} is not a whole number from {_RATES[0]} to {_RATES[1]} Hz")
    if peak is not None and not 0 < peak <= 1:
        raise ValueError(f"peak={peak} is outside (0, 1]; 1 is full scale")
    waveform = waveform.detach().double().cpu()
    if not torch.isfinite(waveform).all():
        raise ValueError("waveform holds non-finite samples; the model or its input is broken, nothing is written")
    level = float(waveform.abs().max())
    if peak is not None and level > peak:
        waveform = waveform * (peak / level)
    elif level > 1:
        raise ValueError(f"waveform reaches {level:.4g}, beyond [-1, 1]; scale it, or give peak, e.g. peak=0.99")
    samples = (waveform * 32768).round().clamp(-32768, 32767).to(torch.int16).T.contiguous().numpy()  # (T, C)
    with whole_file(path) as temporary:
        soundfile.write(temporary, samples, int(sample_rate), subtype="PCM_16", format=_SUBTYPES[suffix])


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


def _opened(source: MediaSource) -> str | BinaryIO:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    source.seek(0)
    return source


def _read_by_av(source: MediaSource, name: str, max_values: int, first: Exception) -> tuple[np.ndarray, int]:
    """(C, T) float32 and Hz of the first audio stream; `first` is why soundfile gave up."""
    import av

    if isinstance(first, OSError):
        raise MediaError(f"{name}: cannot be read ({first})") from first
    blocks: list[np.ndarray] = []
    try:
        with av.open(
            _opened(source), mode="r", options={"format_whitelist": _FORMATS}, metadata_errors="ignore"
        ) as container:
            if not container.streams.audio:
                raise MediaError(f"{name}: no audio stream")
            stream = container.streams.audio[0]
            # changes the sample format only; interleaved, as reading planes of TrueHD crashes PyAV 18.1
            resampler = av.AudioResampler(format="flt")
            count = 0
            for frame in container.decode(stream):
                channels = frame.layout.nb_channels
                blocks += [block.to_ndarray().reshape(-1, channels).T for block in resampler.resample(frame)]
                count += frame.samples * channels
                if count > max_values:
                    raise MediaError(f"{name}: more than {max_values} values")
            rate = stream.codec_context.sample_rate
            samples = np.concatenate(blocks, axis=1) if blocks else np.zeros((1, 0), dtype=np.float32)
            if stream.duration is not None and stream.time_base is not None:
                # AAC comes in blocks of 1024; the container tells where the sound ends
                samples = samples[:, : max(1, round(stream.duration * stream.time_base * rate))]
    except (av.FFmpegError, OSError, UnicodeDecodeError) as error:
        raise MediaError(f"{name}: cannot be read as audio ({first}; {error})") from error
    except ValueError as error:  # blocks of different channel counts
        if isinstance(error, MediaError):
            raise
        raise MediaError(f"{name}: the channels change within the file") from error
    return samples, rate
