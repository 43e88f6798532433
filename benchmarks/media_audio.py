"""Reading sound: whole files and windows of two seconds, ours beside soundfile, PyAV, librosa, torchaudio, torchcodec.

`benchmarks/media.py` runs it. The files are made on the spot: ten seconds and ten minutes of noise and tones, 44.1 kHz
stereo, as wav, flac, mp3, m4a and ogg. Each gives (C, T) float32 in memory; a file is opened for each read.
Soundfile's windows of low-rate mp3 and near the end of Vorbis are not the right samples: see `audio.pcm`.
"""

import itertools
import random
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import soundfile
import torch

from audio.files import AudioReader
from audio.writers import write_audio
from benchmarks.measure import Work

Read = Callable[[Path, float, float], object]  # (file, start in s, length in s)
RATE = 44100
FORMATS = ("wav", "flac", "mp3", "m4a", "ogg")


def make_sound(path: Path, seconds: int) -> None:
    time_s = torch.arange(seconds * RATE) / RATE
    noise = torch.randn(2, seconds * RATE, generator=torch.Generator().manual_seed(0))
    write_audio(path, 0.3 * torch.sin(2 * torch.pi * 330 * time_s) + 0.05 * noise, RATE)


def read_ours(path: Path, start_s: float, length_s: float) -> object:
    with AudioReader(path) as reader:
        first = round(start_s * RATE)
        return reader.read(first, min(round(length_s * RATE), reader.samples - first))


def read_soundfile(path: Path, start_s: float, length_s: float) -> object:
    with soundfile.SoundFile(path) as file:
        file.seek(round(start_s * RATE))
        return torch.from_numpy(file.read(round(length_s * RATE), dtype="float32", always_2d=True).T.copy())


def read_pyav(path: Path, start_s: float, length_s: float) -> object:
    """What a user writes by hand: seek, decode, join, cut."""
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        assert stream.time_base is not None
        if start_s:
            container.seek(int(Fraction(start_s) / stream.time_base), stream=stream)
        resampler = av.AudioResampler(format="fltp")
        parts: list[np.ndarray] = []
        first_s = None
        for frame in container.decode(stream):
            first_s = frame.time if first_s is None else first_s
            parts += [part.to_ndarray() for part in resampler.resample(frame)]
            if frame.time is not None and frame.time + frame.samples / RATE >= start_s + length_s:
                break
        skip = round((start_s - (first_s or 0)) * RATE)
        return torch.from_numpy(np.concatenate(parts, 1)[:, max(0, skip) :][:, : round(length_s * RATE)].copy())


def read_librosa(path: Path, start_s: float, length_s: float) -> object:
    import librosa

    return torch.from_numpy(librosa.load(path, sr=None, mono=False, offset=start_s, duration=length_s)[0])


def read_torchaudio(path: Path, start_s: float, length_s: float) -> object:
    import torchaudio

    load = torchaudio.load  # noqa: TID251 - this is what is measured
    return load(str(path), frame_offset=round(start_s * RATE), num_frames=round(length_s * RATE))[0]


def read_torchcodec(path: Path, start_s: float, length_s: float) -> object:
    from torchcodec.decoders import AudioDecoder

    return AudioDecoder(str(path)).get_samples_played_in_range(start_s, start_s + length_s).data


READERS: dict[str, Read] = {
    "mmdiff": read_ours,
    "soundfile": read_soundfile,
    "PyAV": read_pyav,
    "librosa": read_librosa,
    "torchaudio": read_torchaudio,
    "torchcodec": read_torchcodec,
}


def audio_works(folder: Path) -> tuple[dict[str, dict[str, Work]], list[str]]:
    """({title: {name: a work that reads the file, or the next random window of it}}, what is absent and why)."""
    cases: dict[str, dict[str, Work]] = {}
    absent: dict[str, None] = {}
    for suffix in FORMATS:
        short, long = folder / f"short.{suffix}", folder / f"long.{suffix}"
        make_sound(short, 10)
        make_sound(long, 600)
        readers: dict[str, Read] = {}
        for name, read in READERS.items():
            try:
                read(short, 1, 2)
            except Exception as error:  # one that is not there, lacks FFmpeg or does not know the format
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                absent[f"{name} for {suffix} ({reason[:80]})"] = None
            else:
                readers[name] = read
        cases[f"10 s of {suffix}, whole"] = {name: whole(read, short) for name, read in readers.items()}
        cases[f"2 s of 10 minutes of {suffix}"] = {name: windows(read, long) for name, read in readers.items()}
    return cases, list(absent)


def whole(read: Read, path: Path) -> Work:
    def work() -> None:
        read(path, 0, 10)

    return work


def windows(read: Read, path: Path) -> Work:
    """Reads the next of the same endless random windows."""
    generator = random.Random(0)
    starts_s = itertools.cycle([generator.randrange(590) for _ in range(64)])

    def work() -> None:
        read(path, next(starts_s), 2)

    return work
