"""Sound for reports and curation: loudness, silence, fingerprints, conversion to FLAC.

C channels, T samples.
"""

import io
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import soundfile
import torch
from PIL import Image
from torch import Tensor

from audio.files import EXTENSIONS, AudioReader, resample, write_audio
from audio.loudness import LAYOUTS, integrated_loudness
from audio.scores import clap_score
from mmdiff.data.duplicates import fingerprint_bits
from mmdiff.data.media import TooLargeError
from mmdiff.data.medium import Encoded, Fingerprint, MediaSource, Medium, Piece, Seen
from mmdiff.data.towers import weights_key

_SILENT_DB = -60.0  # below full scale, as FFmpeg's silencedetect
_FLOOR_DB = -120.0  # what digital silence counts as
_PLAIN = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac", ".aiff")  # not the sound of a film
_TIMES, _BANDS = 32, 16  # of a fingerprint
_LOW_HZ, _HIGH_HZ = 100.0, 3600.0  # of its bands; 8 kHz sound holds them too
_WINDOW_S = 0.064
_RANGE_DB, _STEPS = 30.0, 8  # below its loudest point, in steps of an eighth of a decibel: a copy is within 3 dB


@dataclass(frozen=True)
class AudioMedium(Medium):
    """Settings of sound curation; all are off by default, so that files are kept as they are, byte for byte.

    sample_rate: Hz of the output. channels: of the output, see `audio.data.mix_to`. What is changed is written as
    16-bit FLAC. clap_weights: folder, see `audio.scores`; it adds the measure clap. Measures: lufs (integrated
    loudness, BS.1770), peak_db and rms_db (dB below full scale).
    Raises ValueError for numbers out of range.
    """

    sample_rate: int | None = None
    channels: int | None = None
    clap_weights: str | None = None

    extensions: ClassVar[tuple[str, ...]] = EXTENSIONS
    tellers: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "resampled": ("sample_rate", "buckets"),
        "mixed": ("channels",),
        "padded in time": ("short", "buckets"),
    }

    def __post_init__(self) -> None:
        if self.sample_rate is not None and self.sample_rate < 1000:
            raise ValueError(f"sample_rate={self.sample_rate} is below 1000 Hz; leave it out to keep each file's own")
        if self.channels is not None and not 1 <= self.channels <= 8:
            raise ValueError(f"channels={self.channels} is outside 1 to 8; leave it out to keep each file's own")

    def measures(self) -> Sequence[str]:
        return ["lufs", "peak_db", "rms_db", *(["clap"] if self.clap_weights is not None else [])]

    def key(self) -> str:
        weights = [weights_key(self.clap_weights)] if self.clap_weights is not None else []
        return " ".join([f"soundfile {soundfile.__version__} {soundfile.__libsndfile_version__}", *weights])

    def pieces(self, source: MediaSource, name: str) -> tuple[list[Piece], float]:
        with AudioReader(source, name=name) as reader:
            return [Piece()], reader.samples / reader.sample_rate

    def look(self, source: MediaSource, name: str, piece: Piece, caption: str = "") -> Seen:
        return self.heard(*_read(source, name, piece), caption)

    def heard(self, waveform: Tensor, rate: int, caption: str) -> Seen:
        """What is to say of (C, T) at `rate` Hz. Of more than 8 channels the loudness is that of their mean."""
        peak, rms = _db(float(waveform.abs().max())), _db(float(waveform.double().pow(2).mean().sqrt()))
        loud = waveform if waveform.shape[0] in LAYOUTS else waveform.mean(0, keepdim=True)
        measures = {"lufs": max(_FLOOR_DB, integrated_loudness(loud, rate)), "peak_db": peak, "rms_db": rms}
        if self.clap_weights is not None:
            measures["clap"] = clap_score(self.clap_weights, waveform, rate, caption)
        faults = ("silent",) if peak < _SILENT_DB else ()
        return Seen(_facts(waveform, rate), measures, fingerprint(waveform, rate), faults, _picture(waveform))

    def encode(self, source: MediaSource, name: str, suffix: str, piece: Piece) -> Encoded:
        waveform, rate = _read(source, name, piece)
        done = [] if piece.whole else ["cut"]
        if self.channels not in (None, waveform.shape[0]):
            from audio.data import mix_to  # imports Lightning, which a worker that only looks does without

            waveform = mix_to(waveform, int(self.channels or 1))
            done.append("mixed")
        if self.sample_rate not in (None, rate):
            waveform, rate = resample(waveform, rate, int(self.sample_rate or rate)), int(self.sample_rate or rate)
            done.append("resampled")
        if not done and suffix.lower() in _PLAIN:
            data = source if isinstance(source, bytes) else Path(source).read_bytes()
            return Encoded(data, suffix, _facts(waveform, rate))
        if float(waveform.abs().max()) > 1:
            done.append("scaled to full scale")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "clip.flac"
            write_audio(path, waveform, rate, peak=1.0)
            return Encoded(path.read_bytes(), ".flac", _facts(waveform, rate), tuple(done or ["converted"]))

    def changes(self, facts: Mapping[str, Any], sample: Any) -> tuple[str, ...]:
        found = ["resampled"] if float(sample.rate) != float(facts["sample_rate"]) else []
        return tuple(found + (["mixed"] if sample.data.shape[0] != facts["channels"] else []))


def fingerprint(waveform: Tensor, rate: int) -> Fingerprint:
    """Of (C, T): the level of 16 bands from 100 Hz to 3.6 kHz at 32 moments, in dB below the loudest of them.

    Gain, resampling, mixing and lossy coding move a level by a decibel or two, another take of the same word by many.
    bits: which of four quarters' 8 x 8 levels are above their median (after Haitsma and Kalker 2002, coarser).
    """
    mono = waveform.float().mean(0)
    n_fft = max(64, round(rate * _WINDOW_S))  # the same bins in Hz at every rate
    mono = torch.nn.functional.pad(mono, (0, max(0, 2 * n_fft - mono.shape[0])))
    hop_length = max(1, min(n_fft // 4, (mono.shape[0] - n_fft) // (4 * _TIMES)))
    # a long sound in few enough frames; each moment is the mean of its frames' power
    power = torch.stft(mono, n_fft, hop_length, window=torch.hann_window(n_fft), center=False, return_complex=True)
    power = power.abs().pow(2)  # (F, frames)
    edges = np.geomspace(_LOW_HZ, _HIGH_HZ, _BANDS + 1) * n_fft / rate
    bins = [(math.floor(a), max(math.floor(a) + 1, math.floor(b))) for a, b in pairwise(edges)]
    bands = torch.stack([power[a:b].mean(0) if a < power.shape[0] else torch.zeros(power.shape[1]) for a, b in bins])
    levels = torch.nn.functional.adaptive_avg_pool1d(bands, _TIMES).T.double()  # (32, 16)
    decibels = 10 * torch.log10(levels.clamp_min(1e-30))
    above = (decibels - decibels.max() + _RANGE_DB).clamp_min(0).numpy()
    coarse = above.reshape(4, 8, 8, 2).mean(-1).reshape(4, 64)
    values = (above * _STEPS).round().astype(np.uint8).tobytes()
    return Fingerprint(fingerprint_bits(coarse.round(3)), values, waveform.shape[1] / rate)


def _read(source: MediaSource, name: str, piece: Piece) -> tuple[Tensor, int]:
    """((C, T) float32, Hz) of the piece. Raises TooLargeError for more than can be held."""
    with AudioReader(source, name=name) as reader:
        rate = reader.sample_rate
        first = min(reader.samples - 1, round(piece.start_s * rate))
        last = reader.samples if piece.end_s is None else min(reader.samples, round(piece.end_s * rate))
        try:
            return reader.read(first, max(1, last - first)), rate
        except TooLargeError as error:
            raise TooLargeError(f"{error}; --longest cuts it") from error


def _facts(waveform: Tensor, rate: int) -> dict[str, float | int | str]:
    channels, samples = waveform.shape
    return {"sample_rate": rate, "channels": channels, "num_samples": samples, "duration": round(samples / rate, 6)}


def _db(level: float) -> float:
    return max(_FLOOR_DB, 20 * math.log10(max(level, 1e-10)))


def _picture(waveform: Tensor, width: int = 128, height: int = 64) -> bytes:
    """PNG of the levels, for a contact sheet: darkest where the sound spends its time."""
    mono = waveform.mean(0).numpy()
    columns = np.array_split(mono, min(width, mono.shape[0]))
    sheet = np.full((height, len(columns)), 255, dtype=np.uint8)
    for place, part in enumerate(columns):
        low, high = (round((1 - level) / 2 * (height - 1)) for level in (float(part.min()), float(part.max())))
        sheet[max(0, high) : min(height, low + 1), place] = 40
    file = io.BytesIO()
    Image.fromarray(sheet).resize((width, height)).save(file, format="PNG")
    return file.getvalue()
