"""Audio files written whole or not at all: wav and flac to the sample, mp3, ogg, opus and m4a.

C channels, T samples. A waveform is (C, T) float in [-1, 1]. Level: what the samples say, unless `peak` or `lufs` is
given; beyond full scale is an error, never a clip or a limiter.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import soundfile
import torch
from torch import Tensor

from audio.loudness import LAYOUTS, at_loudness
from mmdiff.data.media import whole_file

_RATES = (1000, 768000)
_MPEG_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
_STEP = 4096  # samples handed to an encoder at a time; libsndfile's Vorbis fails on a minute at once
_SUBTYPES = {
    (".wav", 16): ("WAV", "PCM_16"),
    (".wav", 24): ("WAV", "PCM_24"),
    (".wav", 32): ("WAV", "FLOAT"),
    (".flac", 16): ("FLAC", "PCM_16"),
    (".flac", 24): ("FLAC", "PCM_24"),
}


@dataclass(frozen=True)
class _Codec:
    """A lossy format of FFmpeg's. kbits: kbit/s of one channel; None is a rate that varies. options: of the encoder."""

    encoder: str
    container: str
    sample_format: str
    rates: Sequence[int]
    channels: int
    kbits: int | None
    options: Mapping[str, str] = field(default_factory=dict)


# Variable rate, quality 2 (of 0 to 9, best first; times FF_QP2LAMBDA): at a fixed rate LAME writes all 5 % softer.
_LAME = {"flags": "+qscale", "global_quality": str(2 * 118)}
_LOSSY = {
    ".mp3": _Codec("libmp3lame", "mp3", "fltp", _MPEG_RATES, 2, None, _LAME),
    ".m4a": _Codec("aac", "ipod", "fltp", (*_MPEG_RATES, 64000, 88200, 96000), 8, 160),
    ".opus": _Codec("libopus", "ogg", "flt", (8000, 12000, 16000, 24000, 48000), 8, 64),
}
_VORBIS_RATES = (8000, 192000)
SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a")


def write_audio(
    path: str | os.PathLike[str],
    waveform: Tensor,
    sample_rate: int,
    *,
    peak: float | None = None,
    lufs: float | None = None,
    bits: int = 16,
) -> None:
    """Sound file by suffix: .wav, .flac, .mp3, .ogg (Vorbis), .opus or .m4a (AAC).

    waveform: (C, T) float in [-1, 1]. In wav and flac there are exactly T samples, each the nearest value of the
    format, and the same input gives the same bytes. `AudioReader` finds T in the others too, but for Opus, which is
    always 48 kHz (T * 48000 / sample_rate), and at least 47 in an mp3; other players may keep the padding of an m4a.
    Level: without `peak` and `lufs` the samples are written as they are. peak, in (0, 1]: a waveform whose largest
    magnitude is over it is scaled down to it, a softer one is left. lufs: scaled to this loudness (BS.1770, gated),
    and then, with `peak`, down to that where it is louder. What is beyond [-1, 1] after that is an error.
    bits: 16, 24 or, for wav, 32 (float) of a sample. Lossy: MP3 of variable rate (LAME's quality 2), Vorbis of medium
    quality, AAC of 160 (at 128 FFmpeg's encoder still blurs onsets) and Opus of 64 kbit/s a channel.
    Raises ValueError for a wrong shape, suffix, rate, level or bits, for non-finite samples and where FFmpeg has
    no such encoder; then no file is made.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    _check(str(path), suffix, waveform, sample_rate, bits)
    if peak is not None and not 0 < peak <= 1:
        raise ValueError(f"peak={peak} is outside (0, 1]; 1 is full scale")
    waveform = waveform.detach().double().cpu()
    if not torch.isfinite(waveform).all():
        raise ValueError("waveform holds non-finite samples; the model or its input is broken, nothing is written")
    if lufs is not None:
        waveform = at_loudness(waveform, int(sample_rate), lufs)
    level = float(waveform.abs().max())
    if peak is not None and level > peak:
        waveform = waveform * (peak / level)
    elif level > 1:
        cure = "lower lufs, or give peak" if lufs is not None else "scale it, or give peak"
        raise ValueError(f"waveform reaches {level:.4g}, beyond [-1, 1]; {cure}, e.g. peak=0.99")
    with whole_file(path) as temporary:
        if suffix in _LOSSY:
            _encode(temporary, _LOSSY[suffix], waveform.float().numpy(), int(sample_rate))
        elif suffix == ".ogg":
            _write_sndfile(temporary, waveform.float().T.numpy(), int(sample_rate), "OGG", "VORBIS")
        else:
            container, subtype = _SUBTYPES[suffix, bits]
            _write_sndfile(temporary, _levels(waveform, bits), int(sample_rate), container, subtype)


def _check(path: str, suffix: str, waveform: Tensor, sample_rate: float, bits: int) -> None:
    if suffix not in SUFFIXES:
        raise ValueError(f"path={path!r} ends in {suffix!r}; {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} is needed")
    if waveform.ndim != 2 or 0 in waveform.shape or waveform.shape[0] > 8:
        raise ValueError(f"waveform has shape {tuple(waveform.shape)}; (C, T) with 1 to 8 channels is needed")
    if not waveform.is_floating_point():
        raise ValueError(f"waveform has dtype {waveform.dtype}; floats in [-1, 1] are needed")
    if sample_rate != int(sample_rate) or not _RATES[0] <= sample_rate <= _RATES[1]:
        raise ValueError(f"sample_rate={sample_rate} is not a whole number from {_RATES[0]} to {_RATES[1]} Hz")
    if suffix in (".wav", ".flac"):
        if (suffix, bits) not in _SUBTYPES:
            allowed = [str(depth) for kind, depth in _SUBTYPES if kind == suffix]
            raise ValueError(f"bits={bits} is not possible in {suffix}; {' or '.join(allowed)} is")
        return
    if bits != 16:
        raise ValueError(f"bits={bits} means nothing for {suffix}, which is coded with loss; leave it out")
    codec = _LOSSY.get(suffix)
    if codec is None:
        if not _VORBIS_RATES[0] <= sample_rate <= _VORBIS_RATES[1]:
            raise ValueError(
                f"{suffix} takes {_VORBIS_RATES[0]} to {_VORBIS_RATES[1]} Hz, not {sample_rate}; resample it"
            )
        return
    if sample_rate not in codec.rates or waveform.shape[0] > codec.channels:
        rates = ", ".join(map(str, codec.rates))
        raise ValueError(
            f"{suffix} takes {rates} Hz and at most {codec.channels} channels, not {sample_rate} Hz and "
            f"{waveform.shape[0]}; resample it, or write .wav or .flac"
        )
    if codec.encoder not in av.codecs_available:
        raise ValueError(f"this FFmpeg has no {codec.encoder} for {suffix}; write .wav, .flac or .ogg")


def _levels(waveform: Tensor, bits: int) -> np.ndarray:
    """(T, C) as soundfile writes it without another rounding: int16, int32 with 24 bits on top, or float32."""
    if bits == 32:
        return waveform.float().T.contiguous().numpy()
    full = 1 << (bits - 1)
    levels = (waveform * full).round().clamp(-full, full - 1)
    if bits == 24:
        return (levels.to(torch.int32) << 8).T.contiguous().numpy()
    return levels.to(torch.int16).T.contiguous().numpy()


def _write_sndfile(path: Path, samples: np.ndarray, sample_rate: int, container: str, subtype: str) -> None:
    with soundfile.SoundFile(path, "w", sample_rate, samples.shape[1], format=container, subtype=subtype) as file:
        for start in range(0, len(samples), _STEP):
            file.write(samples[start : start + _STEP])


def _encode(path: Path, codec: _Codec, samples: np.ndarray, sample_rate: int) -> None:
    layout = LAYOUTS[len(samples)]
    options = {"fflags": "+bitexact"}
    if codec.container == "ipod":
        options["movie_timescale"] = str(sample_rate)  # else the end is told in ms, and the last samples are cut off
    with av.open(str(path), mode="w", format=codec.container, options=options) as container:
        stream = container.add_stream(codec.encoder, rate=sample_rate, layout=layout, options=dict(codec.options))
        assert isinstance(stream, av.AudioStream)
        if codec.kbits is not None:
            stream.bit_rate = 1000 * codec.kbits * len(samples)
        for start in range(0, samples.shape[1], _STEP):
            part = np.ascontiguousarray(samples[:, start : start + _STEP])
            if codec.sample_format == "flt":
                part = np.ascontiguousarray(part.T.reshape(1, -1))
            frame = av.AudioFrame.from_ndarray(part, format=codec.sample_format, layout=layout)
            frame.sample_rate = sample_rate
            # without them the encoder's lead-in stays in the file
            frame.pts, frame.time_base = start, Fraction(1, sample_rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
