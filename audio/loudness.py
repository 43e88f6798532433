"""Loudness of a sound in LUFS (ITU-R BS.1770-4, gated), by FFmpeg's `ebur128`, and gain to a wanted one.

C channels, T samples. A waveform is (C, T) float; channels stand in the order of wav files: left, right, centre, low
frequencies (not counted), back, side. A sine at 997 Hz, 23 dB below full scale in both of two channels, has -23 LUFS.
"""

import math

import av
import numpy as np
from av.filter import Graph
from torch import Tensor

_BLOCK_S = 0.4  # of the standard; a shorter sound is repeated up to it
_LEAST_HZ = 8000  # below, the filters of FFmpeg's meter are not those of the standard; measured resampled
_QUIETEST = -70.0  # LUFS, the absolute gate: softer blocks do not count
LAYOUTS = {1: "mono", 2: "stereo", 3: "3.0", 4: "quad", 5: "5.0", 6: "5.1", 7: "6.1", 8: "7.1"}


def integrated_loudness(waveform: Tensor, sample_rate: int) -> float:
    """LUFS of (C, T) at `sample_rate` Hz; -inf for silence. A sound shorter than 0.4 s is measured repeated.

    Raises ValueError for a wrong shape or non-finite samples.
    """
    if waveform.ndim != 2 or waveform.shape[0] not in LAYOUTS or waveform.shape[1] == 0:
        raise ValueError(f"waveform has shape {tuple(waveform.shape)}; (C, T) with 1 to 8 channels is needed")
    if sample_rate < _LEAST_HZ:
        from audio.files import resample  # which writes files, and so needs this module

        factor = -(-48000 // sample_rate)  # the rate that the standard gives them for
        waveform, sample_rate = resample(waveform.double(), sample_rate, factor * sample_rate), factor * sample_rate
    samples = waveform.detach().double().cpu().numpy()
    if not np.isfinite(samples).all():
        raise ValueError("waveform holds non-finite samples; it has no loudness")
    least = math.ceil(_BLOCK_S * sample_rate) + 1
    if samples.shape[1] < least:
        samples = np.tile(samples, (1, -(-least // samples.shape[1])))[:, :least]
    loudness = _ebur128(samples, sample_rate)
    return loudness if loudness > _QUIETEST else -math.inf


def at_loudness(waveform: Tensor, sample_rate: int, lufs: float) -> Tensor:
    """(C, T) scaled to a loudness of `lufs`; peaks may then be beyond full scale.

    Raises ValueError for silence, which has no loudness to change, and for `lufs` outside [-70, 0).
    """
    if not _QUIETEST <= lufs < 0:
        raise ValueError(f"lufs={lufs} is outside [-70, 0); -23 is broadcast (EBU R 128), -14 is common for streaming")
    found = integrated_loudness(waveform, sample_rate)
    if found == -math.inf:
        raise ValueError(f"waveform is silent and cannot be brought to {lufs} LUFS; leave lufs out")
    return waveform * 10 ** ((lufs - found) / 20)


def _ebur128(samples: np.ndarray, sample_rate: int) -> float:
    layout = LAYOUTS[len(samples)]
    graph = Graph()
    source = graph.add_abuffer(format="dblp", sample_rate=sample_rate, layout=layout)
    meter, sink = graph.add("ebur128", "metadata=1:framelog=quiet"), graph.add("abuffersink")
    source.link_to(meter)
    meter.link_to(sink)
    graph.configure()
    found = -math.inf

    def drain() -> None:
        nonlocal found
        while True:
            try:
                measured = graph.pull().metadata.get("lavfi.r128.I")
            except (av.BlockingIOError, av.EOFError):
                return
            found = found if measured is None else float(measured)

    for start in range(0, samples.shape[1], sample_rate):
        part = np.ascontiguousarray(samples[:, start : start + sample_rate])
        frame = av.AudioFrame.from_ndarray(part, format="dblp", layout=layout)
        frame.sample_rate, frame.pts = sample_rate, start
        graph.push(frame)
        drain()
    graph.push(None)
    drain()
    return found
