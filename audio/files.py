"""Audio files: sound of nearly every format from any place on, to the sample; resampling. Writing: `audio.writers`.

C channels, T samples. A waveform is (C, T) float32 in [-1, 1].
"""

import io
import math
import os
from types import TracebackType
from typing import BinaryIO, Protocol, Self

import numpy as np
import soundfile
import torch
from torch import Tensor

from audio.frames import open_frames
from audio.packets import open_container
from audio.pcm import MAGIC, SampleReader
from audio.spectrogram import spectrogram_picture
from audio.writers import write_audio
from mmdiff.data.containers import check_whole, opened
from mmdiff.data.media import DamagedError, NoStreamError, TooLargeError, UnsupportedError

__all__ = ["EXTENSIONS", "AudioReader", "MediaSource", "read_audio", "resample", "spectrogram_picture", "write_audio"]

MediaSource = str | os.PathLike[str] | bytes | BinaryIO

EXTENSIONS = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac", ".aiff", ".mp4", ".mov", ".webm", ".mkv")
MAX_VALUES = 1 << 28  # C * T of one call, 1 GiB as float32
RATES = (1000, 768000)  # Hz; a header outside of this is damaged
_MAX_RESAMPLE_TAPS = 1 << 26


class _Reader(Protocol):
    sample_rate: int
    channels: int

    @property
    def samples(self) -> int: ...
    @property
    def start_s(self) -> float: ...
    def read(self, start: int, count: int) -> np.ndarray: ...
    def close(self) -> None: ...


class AudioReader:
    """Open audio file, or the first audio stream of a film, with random access to its samples.

    Use it as a context manager; it holds an open file and must not be shared between processes.
    sample_rate: Hz. channels. samples: their number, without a codec's priming and padding. start_s: when sample 0 is
    heard on the file's clock, in seconds; the clock is that of its container after edit lists, for pictures too.
    Sound that has gaps in its timestamps has silence there. A float file may hold values beyond [-1, 1]; they are kept.

    source: path, bytes or seekable binary file. Raises, naming `name` (default: the path), the kinds of MediaError:
    UnreachableError, NotMediaError, NoStreamError, DamagedError (cut off, non-finite), UnsupportedError (codec, rate),
    TooLargeError; all but damage in the middle of the sound before anything is read.
    """

    def __init__(self, source: MediaSource, *, name: str | None = None) -> None:
        self.name = name or (os.fspath(source) if isinstance(source, str | os.PathLike) else "audio data")
        plain = os.fspath(source) if isinstance(source, str | os.PathLike) else source
        with opened(plain, self.name) as file:
            check_whole(file, self.name)
            self._reader: _Reader = _open(plain, file, self.name)
        self.sample_rate, self.channels = self._reader.sample_rate, self._reader.channels
        self.samples, self.start_s = self._reader.samples, self._reader.start_s
        if self.samples <= 0 or not RATES[0] <= self.sample_rate <= RATES[1]:
            self._reader.close()
            if self.samples <= 0:
                raise NoStreamError(f"{self.name}: no audio samples; leave it out")
            raise UnsupportedError(
                f"{self.name}: a sample rate of {self.sample_rate} Hz is outside {RATES[0]} to {RATES[1]}; resample it"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.close()

    def read(self, start: int = 0, count: int | None = None) -> Tensor:
        """(C, count) float32 from sample `start` on, by default to the end. Only what it needs of the file is read.

        Raises ValueError for a range outside of the file, TooLargeError for more than MAX_VALUES values, DamagedError
        when a part of it cannot be decoded or holds non-finite samples.
        """
        count = self.samples - start if count is None else count
        if start < 0 or count < 0 or start + count > self.samples:
            raise ValueError(f"{self.name}: samples {start} to {start + count} are not within its {self.samples}")
        if count * self.channels > MAX_VALUES:
            raise TooLargeError(
                f"{self.name}: {count} samples x {self.channels} channels are over {MAX_VALUES} values; read parts"
            )
        if count == 0:
            return torch.zeros(self.channels, 0)
        samples = torch.from_numpy(np.ascontiguousarray(self._reader.read(start, count)))
        # a sum is many times faster, and finite where all samples are; all are looked at where it is not
        if not torch.isfinite(samples.sum()) and not torch.isfinite(samples).all():
            raise DamagedError(f"{self.name}: holds non-finite samples; write it again from its source")
        return samples


def _open(source: str | bytes | BinaryIO, file: BinaryIO, name: str) -> _Reader:
    """Reader by what the file holds; `file` is the source, opened."""
    frames = open_frames(io.BytesIO(source) if isinstance(source, bytes) else source, file, name)
    if frames is not None:
        return frames
    file.seek(0)
    if file.read(4) in MAGIC:
        try:
            return SampleReader(source, name)
        except soundfile.SoundFileError:  # a codec that libsndfile does not know
            pass
    return open_container(source, name)


def read_audio(
    source: MediaSource, sample_rate: int | None = None, *, name: str | None = None, max_values: int = MAX_VALUES
) -> tuple[Tensor, int]:
    """(waveform (C, T) float32, sample_rate in Hz) of the whole file, resampled to `sample_rate` when it is given.

    See `AudioReader` for what is read and raised. More than `max_values` values (C * T, by the file's header) are
    refused with TooLargeError before anything is decoded.
    """
    with AudioReader(source, name=name) as reader:
        if reader.samples * reader.channels > max_values:
            raise TooLargeError(
                f"{reader.name}: {reader.samples} samples x {reader.channels} channels are over {max_values} values; "
                "cut it into parts"
            )
        waveform, rate = reader.read(), reader.sample_rate
    if sample_rate is None or sample_rate == rate:
        return waveform, rate
    try:
        return resample(waveform, rate, sample_rate), sample_rate
    except ValueError as error:
        raise UnsupportedError(f"{reader.name}: {error}") from error


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
