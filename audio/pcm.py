"""Sound of wav, flac, aiff, caf and their like by libsndfile: seeking is exact, the header tells the length."""

import io
from typing import BinaryIO

import numpy as np
import soundfile

from audio.containers import before_last_page
from mmdiff.data.containers import opened
from mmdiff.data.media import DamagedError

MAGIC = (b"RIFF", b"RIFX", b"RF64", b"riff", b"FORM", b"fLaC", b"caff", b".snd", b"OggS")  # how a file begins
_BY_PACKETS = (  # (format, subtype); * is any
    ("OGG", "OPUS"),  # its seeking takes a second
    ("MP3", "*"),  # its seeking is not exact at low bit rates
)
# What libsndfile does wrong when it seeks in Vorbis: the overlap with the block before, of up to 8192 samples, is
# missing; on the last page of a file it is off by as much as is cut off at the end, and the first page may be the last;
# and after the end has been read, it may be off anywhere: each part is read with a handle of its own.
_OVERLAP = 2 * 8192
_SHORT = 1 << 18  # samples of a file that is decoded whole


class SampleReader:
    """Open file of samples: a part of it is read without what comes before.

    sample_rate: Hz. channels. samples. start_s: 0. Raises soundfile.SoundFileError when libsndfile does not know it.
    """

    start_s = 0.0
    _whole: np.ndarray | None = None  # (C, T), of a short file that cannot be sought in

    def __init__(self, source: str | bytes | BinaryIO, name: str) -> None:
        self.name = name
        self._source = source
        self._file = self._open()
        self.sample_rate, self.channels, self.samples = self._file.samplerate, self._file.channels, self._file.frames
        kinds = {(self._file.format, self._file.subtype), (self._file.format, "*")}
        # GSM 6.10 and its like cannot be sought in; PyAV reads them
        if kinds & set(_BY_PACKETS) or not self._file.seekable() or not 0 <= self.samples < 1 << 48:
            self._file.close()
            raise soundfile.SoundFileRuntimeError(f"{self._file.format} is read by packets")
        self._vorbis = self._file.subtype == "VORBIS"
        if self._vorbis:
            with opened(source, name) as file:
                self._last = max(0, before_last_page(file) - _OVERLAP)
                file.seek(0)

    def close(self) -> None:
        self._file.close()

    def read(self, start: int, count: int) -> np.ndarray:
        """(C, count) float32 from sample `start` on; the range must lie within the file."""
        if not self._vorbis:
            return self._read(start, count)
        if self._whole is None and self.samples <= _SHORT:
            self._whole = self._read(0, self.samples)
        if self._whole is not None:
            return self._whole[:, start : start + count]
        self._file.close()
        self._file = self._open()
        begin = max(0, min(start - _OVERLAP, self._last))
        return self._read(begin, start - begin + count)[:, start - begin :]

    def _open(self) -> soundfile.SoundFile:
        if isinstance(self._source, str):
            return soundfile.SoundFile(self._source)
        file = io.BytesIO(self._source) if isinstance(self._source, bytes) else self._source
        file.seek(0)
        return soundfile.SoundFile(file)

    def _read(self, start: int, count: int) -> np.ndarray:
        try:
            self._file.seek(start)
            samples = self._file.read(count, dtype="float32", always_2d=True)  # (T, C)
        except soundfile.SoundFileError as error:
            at_s = start / self.sample_rate
            raise DamagedError(
                f"{self.name}: cannot be read on from {at_s:.2f} s ({error}); fetch it again or leave it out"
            ) from error
        if len(samples) < count:
            at_s = (start + len(samples)) / self.sample_rate
            raise DamagedError(f"{self.name}: the sound breaks off at {at_s:.2f} s; fetch it again or leave it out")
        return samples.T
