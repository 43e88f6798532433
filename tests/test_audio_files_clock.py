"""Sound is heard when the file's clock says, whatever the container, and comes out the same from any place."""

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch

from audio import blocks
from audio.files import AudioReader, read_audio
from mmdiff.data.media import DamagedError
from tests.media_corpus import Made, cases, make

SOUNDS = [case for case in cases() if case.audio]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> list[Made]:
    folder = tmp_path_factory.mktemp("corpus")
    return [make(case, folder) for case in SOUNDS]


def begins_s(reader: AudioReader, near_s: float) -> float:
    """When a beep begins on the file's clock: the first loud sample within 50 ms."""
    first = max(0, round((near_s - 0.05 - reader.start_s) * reader.sample_rate))
    part = reader.read(first, min(reader.samples - first, round(0.1 * reader.sample_rate)))[0].abs()
    return reader.start_s + (first + int((part > 0.4).int().argmax())) / reader.sample_rate


def test_beeps_are_heard_at_their_times(corpus):
    errors: dict[bool, list[float]] = {False: [], True: []}
    for made in corpus:
        with AudioReader(made.path) as reader:
            assert (reader.sample_rate, reader.channels) == (made.case.sample_rate, made.case.channels), made.case.name
            for beep_s in made.beeps_s:
                errors[made.lossy].append(abs(begins_s(reader, beep_s) - beep_s))
    assert len(errors[False]) > 60
    assert len(errors[True]) > 60
    assert max(errors[False]) <= 1e-3, "lossless: at most 1 ms"
    assert max(errors[True]) <= 5e-3, "lossy: at most 5 ms"
    assert np.median(errors[False] + errors[True]) < 1e-9, "most are right to the sample"


def test_priming_and_padding_are_cut_to_the_sample(corpus):
    kept = set()
    for made in corpus:
        with AudioReader(made.path) as reader:
            extra = reader.samples - made.samples
            late_s = reader.start_s - made.sound_start_s
        if (extra, round(late_s, 4)) != (0, 0):
            kept.add(made.case.name)
            assert 0 < extra <= 1024, "what the container does not say cannot be cut: one frame of AAC at most"
        if not made.lossy:
            assert (extra, late_s) == (0, pytest.approx(0, abs=1e-9)), made.case.name
    # a delayed AAC track of FFmpeg's muxer has an edit list that forgets the priming; Matroska has no padding of AAC
    assert kept == {"offset_+0.04_mp4", "offset_+1.00_mp4", "offset_+4.40_mp4", "aac_mkv"}


def encode(
    path: Path,
    wave: np.ndarray,
    rate: int,
    codec: str,
    *,
    pts: list[int] | None = None,
    bit_rate: int = 0,
    **options: str,
) -> None:
    """wave (C, T) by PyAV in frames of 960 samples; pts: of each frame, in samples."""
    layout = {1: "mono", 2: "stereo"}[len(wave)]
    names = {"aac": "fltp", "libopus": "flt", "libmp3lame": "fltp", "vorbis": "fltp", "pcm_s16le": "s16"}
    with av.open(str(path), mode="w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout, options={"strict": "-2", **options})
        if bit_rate:
            stream.bit_rate = bit_rate
        resampler = av.AudioResampler(format=names.get(codec, "s16"), layout=layout, rate=rate)
        for index, start in enumerate(range(0, wave.shape[1], 960)):
            frame = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(wave[:, start : start + 960]), format="fltp", layout=layout
            )
            frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
            frame.pts = start if pts is None else pts[index]
            for part in resampler.resample(frame):
                container.mux(stream.encode(part))
        container.mux(stream.encode(None))


def voice(seconds: float, rate: int, channels: int = 1) -> np.ndarray:
    """(C, T): tones that come and go over noise; no two places are alike."""
    time = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(0).standard_normal((channels, len(time)))
    tone = np.sin(2 * np.pi * (220 + 40 * np.sin(time)) * time) * (np.sin(3 * time) > 0)
    return (0.3 * tone + 0.05 * noise).astype(np.float32)


NO_NOISE = {"aac_pns": "0"}
KINDS = [
    ("a.m4a", "aac", 44100, 2, NO_NOISE),
    ("noisy.m4a", "aac", 44100, 2, {}),
    ("a.mp4", "libopus", 48000, 1, {}),
    ("a.mkv", "aac", 48000, 1, NO_NOISE),
    ("vorbis.webm", "vorbis", 44100, 2, {}),
    ("a.webm", "libopus", 48000, 2, {}),
    ("a.opus", "libopus", 48000, 1, {}),
    ("flac.mkv", "flac", 22050, 1, {}),
    ("pcm.mov", "pcm_s16le", 16000, 1, {}),
    ("high.mp3", "libmp3lame", 44100, 2, {"bit_rate": 192000}),
    ("low.mp3", "libmp3lame", 24000, 1, {"bit_rate": 8000}),
    ("a.aac", "aac", 32000, 1, NO_NOISE),
    ("a.ts", "aac", 44100, 1, NO_NOISE),
]


@pytest.mark.parametrize(("name", "codec", "rate", "channels", "options"), KINDS, ids=[kind[0] for kind in KINDS])
def test_any_window_equals_that_part_of_the_whole(tmp_path, monkeypatch, name, codec, rate, channels, options):
    monkeypatch.setattr(blocks, "BLOCK", 1 << 15)  # seven and more of them in six seconds
    monkeypatch.setattr("audio.packets.WHOLE", 1 << 15)
    path = tmp_path / name
    wave = voice(6.21371, rate, channels)
    encode(path, wave, rate, codec, **options)
    with AudioReader(path) as reader:
        whole = reader.read()
        assert whole.shape == (channels, reader.samples)
        if path.suffix in (
            ".m4a",
            ".mp4",
            ".mov",
            ".opus",
            ".mp3",
        ):  # the edit list of mp4 says it in ms, and is rounded
            assert reader.samples == wave.shape[1]
    rng = np.random.default_rng(1)
    with AudioReader(path.read_bytes(), name=name) as reader:
        for _ in range(12):
            start = int(rng.integers(0, reader.samples - 1))
            count = int(rng.integers(1, min(2 * rate, reader.samples - start) + 1))
            assert torch.equal(reader.read(start, count), whole[:, start : start + count]), (start, count)
        assert torch.equal(reader.read(), whole)
    with av.open(str(path)) as container:  # the reference: all of it decoded in one go
        stream = container.streams.audio[0]
        parts = [frame.to_ndarray() for frame in container.decode(stream)]
        plain = np.concatenate([part if len(part) == channels else part.reshape(-1, channels).T for part in parts], 1)
    plain = plain / 32768 if plain.dtype == np.int16 else plain
    count = min(plain.shape[1], whole.shape[1])
    assert plain.shape[1] - whole.shape[1] in range(1025), "plain decoding leaves padding in"
    difference = np.abs(whole.numpy()[:, :count] - plain[:, :count])
    if name == "noisy.m4a":  # what AAC substitutes by random noise differs, and nothing else
        assert np.sqrt((difference**2).mean()) < 0.15 * plain.std()
    else:
        assert difference.max() < 1e-6


@pytest.mark.parametrize(("suffix", "subtype"), [("wav", "PCM_16"), ("wav", "DOUBLE"), ("flac", "PCM_24"),
                                                 ("ogg", "VORBIS")])  # fmt: skip
def test_windows_of_sndfile_formats(tmp_path, suffix, subtype):
    path = tmp_path / f"a.{suffix}"
    wave = voice(13.4, 44100, 2)
    with soundfile.SoundFile(path, "w", 44100, 2, format=suffix.upper(), subtype=subtype) as file:
        for start in range(0, wave.shape[1], 8000):
            file.write(wave.T[start : start + 8000])
    whole, _ = read_audio(path)
    rng = np.random.default_rng(2)
    with AudioReader(path) as reader:
        assert reader.samples == wave.shape[1]
        for index in range(
            150 if suffix == "ogg" else 20
        ):  # every fourth near the end, where libsndfile's own seeking is off
            start = int(rng.integers(0, reader.samples)) if index % 4 else reader.samples - int(rng.integers(1, 9000))
            count = reader.samples - start  # to the very end, after which libsndfile's seeking is off elsewhere too
            if index % 4 or index % 8 == 0:
                count = int(rng.integers(1, min(88200, count) + 1))
            assert torch.equal(reader.read(start, count), whole[:, start : start + count]), (start, count)


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "aac"), ("a.mkv", "pcm_s16le"), ("flac.mp4", "flac")])
def test_a_gap_is_silent_and_what_follows_is_in_time(tmp_path, name, codec):
    rate = 48000
    wave = np.zeros((1, 100 * 960), dtype=np.float32)
    wave[0, 10 * 960 : 11 * 960] = wave[0, 80 * 960 : 81 * 960] = 0.8
    pts = [960 * index + (24000 if index >= 50 else 0) for index in range(100)]  # half a second is missing
    encode(tmp_path / name, wave, rate, codec, pts=pts)
    with AudioReader(tmp_path / name) as reader:
        sound = reader.read()[0]
        assert abs(reader.samples - (len(wave[0]) + 24000)) <= 2048
    loud = (sound.abs() > 0.4).nonzero().flatten() / rate
    assert abs(float(loud[0]) - 0.2) < 0.005
    assert abs(float(loud[loud > 1][0]) - (1.6 + 0.5)) <= (0.005 if codec == "aac" else 0.001)


def test_an_edit_that_begins_within_a_frame(tmp_path):
    wave = np.zeros((1, 100 * 960), dtype=np.float32)
    wave[0, 30 * 960 : 31 * 960] = 0.8
    encode(tmp_path / "a.m4a", wave, 48000, "aac", pts=[960 * index - 500 for index in range(100)])
    with AudioReader(tmp_path / "a.m4a") as reader:
        assert (reader.start_s, reader.samples) == (0, wave.shape[1] - 500)
        first = int((reader.read()[0].abs() > 0.4).int().argmax())
    assert abs(first - (30 * 960 - 500)) < 48


def test_timestamps_that_overlap_lose_no_sound(tmp_path):
    wave = voice(2, 48000)
    encode(tmp_path / "a.mkv", wave, 48000, "pcm_s16le", pts=[480 * index for index in range(100)])
    found, _ = read_audio(tmp_path / "a.mkv")
    assert np.abs(found.numpy() - wave).max() < 1e-4


def test_mp3_without_tags_and_with_rubbish_in_it(tmp_path):
    rate = 44100
    wave = voice(3, rate)
    encode(tmp_path / "a.mp3", wave, rate, "libmp3lame")
    tagged, _ = read_audio(tmp_path / "a.mp3")
    assert tagged.shape[1] == wave.shape[1], "LAME's tag tells priming and padding"
    data = (tmp_path / "a.mp3").read_bytes()
    bare = data[data.find(b"\xff\xfb", data.find(b"Info") + 150) :]
    found, _ = read_audio(bare)
    assert found.shape[1] % 1152 == 0
    assert torch.equal(found[:, 1105 : 1105 + wave.shape[1]], tagged)
    middle = bare.find(b"\xff\xfb", len(bare) // 2)
    for dirty in (bare + b"TAG" + b" " * 125, b"ID3\x04\0\0\0\0\0\x20" + b" " * 32 + bare,
                  bare[:middle] + b"rubbish \xff\xfb\xff" + bare[middle:]):  # fmt: skip
        again, _ = read_audio(dirty)
        assert torch.equal(again, found)
    for cut in (data[: len(data) // 2], bare[:-7]):
        with pytest.raises(DamagedError, match="cut off"):
            read_audio(cut, name="half.mp3")


def test_a_tag_that_promises_frames_is_held_to_it(tmp_path):
    encode(tmp_path / "a.mp3", voice(3, 44100), 44100, "libmp3lame")
    data = (tmp_path / "a.mp3").read_bytes()
    place = data.find(b"Info")
    frames = int.from_bytes(data[place + 8 : place + 12], "big")
    lying = data[: place + 8] + (frames + 9).to_bytes(4, "big") + data[place + 12 :]
    with pytest.raises(DamagedError, match=f"of {frames + 9} frames"):
        AudioReader(lying, name="a.mp3")


def test_files_and_bytes_and_paths_give_the_same(tmp_path):
    for name, codec, rate in (("a.m4a", "aac", 16000), ("a.mp3", "libmp3lame", 16000), ("a.wav", "pcm_s16le", 16000)):
        encode(tmp_path / name, voice(1, rate), rate, codec)
        data = (tmp_path / name).read_bytes()
        found = [read_audio(source)[0] for source in (tmp_path / name, str(tmp_path / name), data, io.BytesIO(data))]
        assert all(torch.equal(found[0], other) for other in found[1:])


def test_windows_of_vorbis_whose_last_page_is_long(tmp_path):
    rate = 96000
    time_s = np.arange(40 * rate + 13610) / rate
    tone = np.sin(2 * np.pi * (220 + 40 * np.sin(time_s)) * time_s) * (np.sin(3 * time_s) > 0)
    noise = np.random.default_rng(0).standard_normal(len(time_s)) * (np.sin(time_s) > 0)
    wave = 0.3 * tone + 0.05 * noise
    with soundfile.SoundFile(tmp_path / "a.ogg", "w", rate, 2, format="OGG", subtype="VORBIS") as file:
        for start in range(0, len(wave), 4096):
            file.write(np.repeat(wave[start : start + 4096, None], 2, axis=1))
    whole, _ = read_audio(tmp_path / "a.ogg")
    rng = np.random.default_rng(3)
    with AudioReader(tmp_path / "a.ogg") as reader:
        for before_end in (1, 41, 146, 500, 1023, 2433, 5000, 9000, 20000, 40000):
            start = reader.samples - before_end
            assert torch.equal(reader.read(start, before_end), whole[:, start:]), before_end
            start = int(rng.integers(0, reader.samples - rate))
            assert torch.equal(reader.read(start, rate), whole[:, start : start + rate]), start
