"""Audio files of every kind are read as what they say, or refused by a typed error that names them."""

import json
import os
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch

from audio.files import AudioReader, read_audio, resample
from audio.writers import write_audio
from mmdiff.data.media import (
    DamagedError,
    MediaError,
    NoStreamError,
    NotMediaError,
    TooLargeError,
    UnreachableError,
    UnsupportedError,
)
from tests.media_corpus import by_name, make

ROOT = Path(__file__).resolve().parents[1]
TORTURE = ROOT.parent / "shared" / "data" / "torture" / "files"


def tones(samples: int, channels: int = 1, rate: int = 16000) -> np.ndarray:
    """(C, T) float64: each channel has a tone and a level of its own."""
    time_s = np.arange(samples) / rate
    return np.stack([(0.1 + 0.1 * c) * np.sin(2 * np.pi * 55 * (c + 1) * time_s) for c in range(channels)])


@pytest.mark.parametrize(
    ("suffix", "subtype", "error"),
    [
        ("wav", "PCM_U8", 2**-7),
        ("wav", "PCM_16", 2**-15),
        ("wav", "PCM_24", 2**-23),
        ("wav", "PCM_32", 2**-25),
        ("wav", "FLOAT", 2**-25),
        ("wav", "DOUBLE", 2**-25),
        ("wav", "ULAW", 0.02),
        ("wav", "MS_ADPCM", 0.05),
        ("flac", "PCM_S8", 2**-7),
        ("flac", "PCM_16", 2**-15),
        ("flac", "PCM_24", 2**-23),
        ("aiff", "PCM_24", 2**-23),
        ("caf", "PCM_32", 2**-25),
        ("w64", "PCM_16", 2**-15),
        ("rf64", "PCM_16", 2**-15),
    ],
)
def test_sample_formats(tmp_path, suffix, subtype, error):
    wave = tones(4000)
    soundfile.write(tmp_path / f"a.{suffix}", wave.T, 16000, subtype=subtype, format=suffix.upper())
    found, rate = read_audio(tmp_path / f"a.{suffix}")
    assert (found.dtype, rate, found.shape[0]) == (torch.float32, 16000, 1)
    assert found.shape[1] - 4000 in range(2000 if "ADPCM" in subtype else 1)  # ADPCM comes in blocks
    assert np.abs(found[:, :4000].numpy() - wave).max() <= error * 1.01


@pytest.mark.parametrize("channels", range(1, 9))
@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.mov", "a.mka"])
def test_channels_keep_their_order(tmp_path, channels, name):
    wave = tones(2000, channels)
    path = tmp_path / name
    if path.suffix in (".wav", ".flac"):
        soundfile.write(path, wave.T, 16000)
    else:
        layout = {1: "mono", 2: "stereo", 3: "2.1", 4: "quad", 5: "5.0", 6: "5.1", 7: "6.1", 8: "7.1"}[channels]
        with av.open(str(path), mode="w", format="mov" if path.suffix == ".mov" else "matroska") as container:
            stream = container.add_stream("pcm_s24le", rate=16000, layout=layout)
            samples = np.ascontiguousarray((wave.T * 2**31).astype(np.int32).reshape(1, -1))
            frame = av.AudioFrame.from_ndarray(samples, format="s32", layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = 16000, 0, Fraction(1, 16000)
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    found, _ = read_audio(path)
    assert np.abs(found.numpy() - wave).max() < 2**-15


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 88200, 96000, 176400, 192000])
def test_rates(tmp_path, rate):
    wave = tones(rate // 10, 1, rate)
    for name in ("a.wav", "a.flac"):
        soundfile.write(tmp_path / name, wave.T, rate)
        with AudioReader(tmp_path / name) as reader:
            assert (reader.sample_rate, reader.samples, reader.start_s) == (rate, rate // 10, 0)
            assert np.abs(reader.read().numpy() - wave).max() < 2**-15


def test_reading_out_of_range_is_refused(tmp_path):
    soundfile.write(tmp_path / "a.wav", tones(100).T, 16000)
    with AudioReader(tmp_path / "a.wav") as reader:
        assert reader.read(100, 0).shape == (1, 0)
        assert reader.read(40).shape == (1, 60)
        for start, count in ((-1, 5), (0, 101), (99, 2), (5, -1)):
            with pytest.raises(ValueError, match=r"a\.wav: samples .* are not within its 100"):
                reader.read(start, count)


@pytest.mark.parametrize("name", ["räume und 音 (1).m4a", "-dash.mp3", "a b.wav"])
def test_names_of_all_kinds(tmp_path, name):
    write_audio(tmp_path / name, torch.from_numpy(tones(3000)).float(), 16000)
    assert read_audio(tmp_path / name)[0].shape == (1, 3000)


def test_film_without_sound_and_sound_of_a_film(tmp_path):
    silent = make(by_name("sound_missing_mp4"), tmp_path)
    with pytest.raises(NoStreamError, match=r"sound_missing_mp4\.mp4: no audio stream"):
        AudioReader(silent.path)
    later = make(by_name("offset_+1.00_mkv"), tmp_path)
    with AudioReader(later.path) as reader:
        assert (reader.start_s, reader.samples) == (1.0, later.samples)


def broken(folder: Path) -> dict[str, tuple[type[MediaError], str]]:
    """Makes broken files; what each must raise."""
    wave = torch.from_numpy(tones(16000)).float()
    for suffix in ("wav", "flac", "mp3", "ogg", "opus", "m4a"):
        write_audio(folder / f"good.{suffix}", wave, 16000)
        data = (folder / f"good.{suffix}").read_bytes()
        (folder / f"half.{suffix}").write_bytes(data[: len(data) // 2])
        (folder / f"empty.{suffix}").write_bytes(b"")
        (folder / f"text.{suffix}").write_bytes(b"<html>not found</html>" * 20)
        (folder / f"zeros.{suffix}").write_bytes(bytes(1000))
    film = make(by_name("rate_25fps_mkv"), folder)
    film.path.rename(folder / "film.mkv")
    data = (folder / "film.mkv").read_bytes()
    (folder / "half.mkv").write_bytes(data[: len(data) // 2])
    header = (folder / "good.wav").read_bytes()[:44]
    (folder / "headeronly.wav").write_bytes(header[:40] + bytes(4))
    (folder / "claims4gb.wav").write_bytes(header[:40] + (0xF0000000).to_bytes(4, "little") + bytes(100))
    soundfile.write(folder / "nan.wav", np.array([0.0, np.nan], dtype=np.float32), 16000, subtype="FLOAT")
    soundfile.write(folder / "inf.wav", np.array([0.0, -np.inf]), 16000, subtype="DOUBLE")
    soundfile.write(folder / "slow.wav", np.zeros(100), 50)
    long = bytearray((folder / "good.flac").read_bytes())
    long[21] |= 15
    long[22:26] = b"\xff\xff\xff\xff"  # 2^36 - 1 samples are claimed, 48 days
    (folder / "claims48days.flac").write_bytes(long)
    (folder / "folder.wav").mkdir()
    os.mkfifo(folder / "pipe.wav")
    expected: dict[str, tuple[type[MediaError], str]] = {
        "missing.wav": (UnreachableError, "No such file"),
        "folder.wav": (UnreachableError, "directory"),
        "pipe.wav": (UnreachableError, "it is a pipe"),
        "a\0b.wav": (UnreachableError, "check the path"),
        "a\udcff.wav": (UnreachableError, "check the path"),
        "half.mkv": (DamagedError, "cut off"),
        "headeronly.wav": (NoStreamError, "no audio samples"),
        "claims4gb.wav": (DamagedError, "cut off: 144 of"),
        "nan.wav": (DamagedError, "non-finite"),
        "inf.wav": (DamagedError, "non-finite"),
        "slow.wav": (UnsupportedError, "50 Hz"),
        "claims48days.flac": (TooLargeError, "samples x 1 channels are over"),
    }
    for suffix in ("wav", "flac", "mp3", "ogg", "opus", "m4a"):
        expected[f"half.{suffix}"] = (DamagedError, "fetch it again")
        expected[f"empty.{suffix}"] = (NotMediaError, "empty")
        expected[f"text.{suffix}"] = (NotMediaError, "cannot be read as audio")
        expected[f"zeros.{suffix}"] = (NotMediaError, "cannot be read as audio")
    return expected


def test_broken_files_are_typed_and_named(tmp_path):
    expected = broken(tmp_path)
    assert len(expected) > 30
    for name, (kind, match) in expected.items():
        start_s = time.process_time()
        with pytest.raises(MediaError, match=match) as error:
            read_audio(tmp_path / name)
        assert type(error.value) is kind, (name, error.value)
        assert name in str(error.value)
        assert "\n" not in str(error.value)
        assert time.process_time() - start_s < 2
    with pytest.raises(DamagedError, match="shard.tar:key"):
        read_audio((tmp_path / "half.m4a").read_bytes(), name="shard.tar:key.m4a")
    assert read_audio(tmp_path / "good.m4a")[0].shape == (1, 16000)


def test_hours_are_refused_before_they_are_decoded(tmp_path):
    path = tmp_path / "silence.flac"
    with soundfile.SoundFile(path, "w", 8000, 8, subtype="PCM_16") as file:
        for _ in range(30):
            file.write(np.zeros((80000, 8), dtype=np.int16))
    assert path.stat().st_size < 100_000
    start_s = time.process_time()
    with pytest.raises(TooLargeError, match=r"silence\.flac: 2400000 samples x 8 channels are over 19199999"):
        read_audio(path, max_values=19_199_999)
    assert time.process_time() - start_s < 0.1
    with AudioReader(path) as reader:
        assert reader.read(2_300_000, 1000).shape == (8, 1000)


def test_damage_in_the_middle_is_not_silent(tmp_path):
    write_audio(tmp_path / "a.flac", torch.rand(1, 200_000) - 0.5, 16000)
    data = bytearray((tmp_path / "a.flac").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 400] = bytes(400)
    (tmp_path / "a.flac").write_bytes(data)
    with pytest.raises(DamagedError, match=r"a\.flac"):
        read_audio(tmp_path / "a.flac")


def test_resampling_keeps_tone_and_length(tmp_path):
    soundfile.write(tmp_path / "a.wav", tones(8000, rate=8000).T, 8000)
    wave, rate = read_audio(tmp_path / "a.wav", 16000)
    assert (wave.shape, rate) == ((1, 16000), 16000)
    assert np.abs(wave.numpy() - tones(16000, rate=16000))[:, 200:-200].max() < 0.01
    assert resample(wave, 16000, 16000) is wave
    soundfile.write(tmp_path / "odd.wav", tones(50000, rate=44101).T, 44101)
    with pytest.raises(UnsupportedError, match=r"odd\.wav.*rounder rate"):
        read_audio(tmp_path / "odd.wav", 96001)


def test_playlist_opens_no_other_file(tmp_path):
    write_audio(tmp_path / "secret.wav", torch.zeros(1, 100), 16000)
    (tmp_path / "list.mp4").write_text(f"ffconcat version 1.0\nfile '{tmp_path / 'secret.wav'}'\n")
    (tmp_path / "hls.m4a").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nsecret.wav\n#EXT-X-ENDLIST\n")
    for name in ("list.mp4", "hls.m4a"):
        with pytest.raises(NotMediaError, match=name):
            read_audio(tmp_path / name)


@pytest.mark.skipif(not TORTURE.is_dir(), reason="../shared/data/torture is not there")
def test_odd_files_are_read_or_named():
    read, kinds = {}, {}
    for file in sorted(TORTURE.iterdir()):
        if file.stat().st_size > 400_000:
            continue
        start_s = time.process_time()
        try:
            with AudioReader(file) as reader:
                sound = reader.read()
                assert sound.shape == (reader.channels, reader.samples)
                read[file.name] = (reader.sample_rate, reader.channels, reader.samples)
        except MediaError as error:
            kinds[file.name] = error.kind if file.name in str(error) else "nameless"
        assert time.process_time() - start_s < 10
    assert len(read) >= 70
    assert "nameless" not in kinds.values()
    assert read["data_size_ffffffff.wav"] == (16000, 1, 16000), "a streamed wav does not know its length"
    assert read["media__sample-with-large-length.avi"][2] > 80_000
    assert read["ExoPlayer__sample_dthd.mp4"][1] == 8
    for name, kind in {
        "zero_byte.mp4": "not media", "html_error_page.mp4": "not media", "text_renamed.wav": "not media",
        "truncated_faststart.mp4": "damaged", "truncated_moov_at_end.mp4": "damaged", "float_nan_inf.wav": "damaged",
        "header_only.wav": "no stream", "fps120.mp4": "no stream",
        "media__sample_mhm1_prefaudiolang.mp4": "unsupported",
    }.items():  # fmt: skip
        assert kinds[name] == kind, name


MEASURE = """
import json, sys, time
from audio.files import AudioReader
def peak_kb(field):
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith(field)))
found = {}
with AudioReader(sys.argv[1]) as reader:
    reader.read(0, 10)  # what is imported once
for path in sys.argv[2:]:
    spent = []
    before = peak_kb("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # VmHWM starts anew
    for share in (0.97, 0.5, 0.01):
        start = time.process_time()
        with AudioReader(path) as reader:
            first = int(share * reader.samples)
            assert reader.read(first, 2 * reader.sample_rate).shape[1] == 2 * reader.sample_rate
            seconds = reader.samples / reader.sample_rate
        spent.append(time.process_time() - start)
    found[path] = [seconds, sorted(spent)[1], (peak_kb("VmHWM") - before) / 1024]
print(json.dumps(found))
"""


def repeated(path: Path, target: Path, times: int) -> None:
    """The packets of `path`, several times one after the other."""
    with av.open(str(target), mode="w") as out:
        stream, offset = None, 0
        for _ in range(times):
            with av.open(str(path)) as container:
                stream = stream or out.add_stream_from_template(container.streams.audio[0])
                end = 0
                for packet in container.demux(container.streams.audio[0]):
                    if packet.size and (packet.pts >= 0 or not offset):
                        end = packet.pts + packet.duration
                        packet.pts += offset
                        packet.dts, packet.stream = packet.pts, stream
                        out.mux(packet)
                offset += end


def hours(folder: Path, kinds: list[str]) -> list[Path]:
    """An hour of sound in each of these forms."""
    wave = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 10 * 44100)) * 0.1).float()
    paths = [folder / f"hour.{kind}" for kind in kinds]
    for path in paths:
        kind = path.suffix[1:]
        if kind in ("wav", "flac", "ogg"):
            with soundfile.SoundFile(path, "w", 44100, 1, format=kind.upper()) as file:
                for _ in range(360):
                    for start in range(0, wave.shape[1], 44100):
                        file.write(wave[0, start : start + 44100].numpy())
            continue
        rate = 48000 if kind == "opus" else 44100
        short = path.with_name(f"short.{kind}")
        write_audio(short, wave, rate)
        if kind == "mp3":
            data = short.read_bytes()
            path.write_bytes(data[data.find(b"\xff\xfb", data.find(b"Xing") + 150) :] * 361)
        else:
            repeated(short, path, 400)
    return paths


def check_windows(tmp_path: Path, kinds: list[str]) -> None:
    write_audio(tmp_path / "first.m4a", torch.zeros(1, 5000), 16000)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "first.m4a"), *map(str, hours(tmp_path, kinds))]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for path, (seconds, spent_s, grown_mb) in json.loads(run.stdout).items():
        assert seconds >= 3600
        assert spent_s < 0.15, f"{path}: {spent_s:.3f} s of processor time for 2 s"
        assert grown_mb < 200, path


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_two_seconds_of_an_hour(tmp_path):
    check_windows(tmp_path, ["m4a", "mp3"])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_two_seconds_of_an_hour_of_every_form(tmp_path):
    """pytest tests/test_audio_files.py -m slow"""
    check_windows(tmp_path, ["wav", "flac", "ogg", "opus", "m4a", "mp3"])


LEAK = """
import random, sys
from audio.files import AudioReader
def resident_kb():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmRSS")))
rng = random.Random(0)
paths, count = sys.argv[2:], int(sys.argv[1])
for index in range(count + 200):
    if index == 200:
        before = resident_kb()
    with AudioReader(rng.choice(paths)) as reader:
        length = rng.randint(1, reader.samples)
        reader.read(rng.randint(0, reader.samples - length), length)
print((resident_kb() - before) / 1024)
"""


def grown_mb(tmp_path: Path, count: int) -> float:
    wave = torch.from_numpy(tones(32000, 2)).float()
    for suffix in ("wav", "flac", "mp3", "ogg", "opus", "m4a"):
        write_audio(tmp_path / f"a.{suffix}", wave, 16000)
    film = make(by_name("rate_25fps_mkv"), tmp_path).path
    command = [sys.executable, "-c", LEAK, str(count), *(str(file) for file in tmp_path.glob("a.*")), str(film)]
    return float(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_reading_leaks_nothing(tmp_path):
    assert grown_mb(tmp_path, 300) < 8


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_reading_5000_clips_leaks_nothing(tmp_path):
    """pytest tests/test_audio_files.py -m slow"""
    assert grown_mb(tmp_path, 5000) < 20
