"""What is written is read back: counts, levels, loudness; files appear whole or not at all."""

import math
import os
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from PIL import Image

from audio.files import AudioReader, read_audio
from audio.loudness import at_loudness, integrated_loudness
from audio.spectrogram import spectrogram_picture
from audio.writers import SUFFIXES, write_audio

LOSSLESS = [("wav", 16), ("wav", 24), ("wav", 32), ("flac", 16), ("flac", 24)]


def tone(samples: int, channels: int = 1, rate: int = 16000, level: float = 0.5) -> torch.Tensor:
    time_s = torch.arange(samples, dtype=torch.float64) / rate
    return torch.stack([level * torch.sin(2 * torch.pi * 440 * (c + 1) * time_s) for c in range(channels)]).float()


@pytest.mark.parametrize(("suffix", "bits"), LOSSLESS)
@pytest.mark.parametrize(("samples", "channels"), [(1, 1), (2, 2), (7999, 1), (16000, 2), (12345, 3), (4097, 8)])
def test_lossless_is_read_back_to_the_sample(tmp_path, suffix, bits, samples, channels):
    path = tmp_path / f"a.{suffix}"
    wave = tone(samples, channels)
    write_audio(path, wave, 16000, bits=bits)
    found, rate = read_audio(path)
    assert (found.shape, found.dtype, rate) == ((channels, samples), torch.float32, 16000)
    nearest = 0.0 if bits == 32 else 0.5 / 2 ** (bits - 1) + 1e-8
    assert (found.double() - wave.double()).abs().max() <= nearest
    info = soundfile.info(path)  # another reader
    subtype = "FLOAT" if bits == 32 else f"PCM_{bits}"
    assert (info.frames, info.channels, info.samplerate, info.subtype) == (samples, channels, 16000, subtype)
    write_audio(tmp_path / f"b.{suffix}", wave, 16000, bits=bits)
    assert path.read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


def test_every_length_up_to_400(tmp_path):
    for samples in range(1, 401):
        path = tmp_path / f"a.{'wav' if samples % 2 else 'flac'}"
        write_audio(path, tone(samples), 8000)
        assert soundfile.info(path).frames == read_audio(path)[0].shape[1] == samples


LOSSY = [("mp3", 44100), ("mp3", 16000), ("ogg", 44100), ("ogg", 8000), ("opus", 48000), ("opus", 16000),
         ("m4a", 44100), ("m4a", 16000)]  # fmt: skip


@pytest.mark.parametrize(("suffix", "rate"), LOSSY)
@pytest.mark.parametrize("channels", [1, 2])
def test_lossy_keeps_count_place_and_level(tmp_path, suffix, rate, channels):
    found_rate = 48000 if suffix == "opus" else rate
    for samples in (50, 1023, 1024, 1025, 4096, 2 * rate + 7):
        wave = tone(samples, channels, rate)
        write_audio(tmp_path / f"a.{suffix}", wave, rate)
        with AudioReader(tmp_path / f"a.{suffix}") as reader:
            assert (reader.samples, reader.sample_rate) == (samples * found_rate // rate, found_rate), samples
            assert (reader.channels, reader.start_s) == (channels, 0)
            found = reader.read()
    wanted = tone(found.shape[1], channels, found_rate)
    middle = slice(found_rate // 4, -found_rate // 4)
    error = (found - wanted)[:, middle].pow(2).mean().sqrt() / wanted.pow(2).mean().sqrt()
    assert error < 0.06, "one sample of delay would be 0.06 and more, LAME's softening 0.05 beside its noise"
    gain = (found * wanted)[:, middle].sum() / (wanted**2)[:, middle].sum()
    assert float(gain) == pytest.approx(1, abs=0.02)


def test_mp3_of_less_than_47_samples_is_filled_up(tmp_path):
    write_audio(tmp_path / "a.mp3", tone(5), 16000)
    assert read_audio(tmp_path / "a.mp3")[0].shape == (1, 47)


def test_level_policy(tmp_path):
    for suffix, bits in LOSSLESS:
        path = tmp_path / f"a.{suffix}"
        write_audio(path, torch.tensor([[1.0, -1.0, 0.5]]), 16000, bits=bits)
        assert read_audio(path)[0][0].tolist() == pytest.approx([1.0, -1.0, 0.5], abs=4e-5), "as the samples say"
        write_audio(path, torch.tensor([[3.0, -1.5]]), 16000, peak=0.9, bits=bits)
        assert read_audio(path)[0][0].tolist() == pytest.approx([0.9, -0.45], abs=4e-5)
        write_audio(path, torch.tensor([[0.3, -0.15]]), 16000, peak=0.9, bits=bits)
        assert read_audio(path)[0][0].tolist() == pytest.approx([0.3, -0.15], abs=4e-5), "a softer one is left"
        with pytest.raises(ValueError, match="reaches 1.001, beyond .* give peak"):
            write_audio(path, torch.tensor([[0.1, -1.001]]), 16000, bits=bits)


def test_lufs_policy(tmp_path):
    wave = tone(48000, 2, 48000, 0.02)
    write_audio(tmp_path / "a.wav", wave, 48000, lufs=-16, bits=32)
    found, _ = read_audio(tmp_path / "a.wav")
    assert integrated_loudness(found, 48000) == pytest.approx(-16, abs=0.01)
    spiky = wave.clone()
    spiky[:, 1000] = 0.9
    with pytest.raises(ValueError, match="beyond .* lower lufs, or give peak"):
        write_audio(tmp_path / "b.wav", spiky, 48000, lufs=-16)
    write_audio(tmp_path / "b.wav", spiky, 48000, lufs=-16, peak=0.95)
    found, _ = read_audio(tmp_path / "b.wav")
    assert float(found.abs().max()) == pytest.approx(0.95, abs=1e-4)
    with pytest.raises(ValueError, match="silent"):
        write_audio(tmp_path / "c.wav", torch.zeros(1, 16000), 16000, lufs=-23)
    with pytest.raises(ValueError, match="lufs=3"):
        write_audio(tmp_path / "c.wav", wave, 16000, lufs=3)
    assert not (tmp_path / "c.wav").exists()


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000, 192000])
def test_loudness_of_the_standard_s_sine(rate):
    time_s = torch.arange(rate * 3, dtype=torch.float64) / rate
    sine = 10 ** (-23 / 20) * torch.sin(2 * torch.pi * 997 * time_s)
    assert integrated_loudness(sine.expand(2, -1), rate) == pytest.approx(-23, abs=0.1)
    assert integrated_loudness(sine[None], rate) == pytest.approx(-26, abs=0.1)
    film = torch.zeros(6, len(sine), dtype=torch.float64)
    film[3] = sine  # low frequencies do not count
    assert integrated_loudness(film, rate) == -math.inf
    film[4] = sine  # surround counts 1.5 dB more
    assert integrated_loudness(film, rate) == pytest.approx(-26 + 1.5, abs=0.15)


@pytest.mark.parametrize("rate", [1000, 2000, 4000])
def test_loudness_at_low_rates_is_that_at_high_ones(rate):
    time_s = torch.arange(rate * 3, dtype=torch.float64) / rate
    sine = 0.1 * torch.sin(2 * torch.pi * 300 * time_s)[None]
    fine = 0.1 * torch.sin(2 * torch.pi * 300 * torch.arange(48000 * 3, dtype=torch.float64) / 48000)[None]
    assert integrated_loudness(sine, rate) == pytest.approx(integrated_loudness(fine, 48000), abs=0.1)


def test_loudness_beside_torchaudio():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 48000 * 6, generator=generator)
    shapes = {"even": torch.ones(6), "gated": torch.tensor([1, 1, 0.5, 0.01, 0, 1.0]), "soft": torch.full((6,), 0.02)}
    for name, shape in shapes.items():
        wave = 0.1 * noise * shape.repeat_interleave(48000)
        theirs = float(torchaudio.functional.loudness(wave, 48000))
        assert integrated_loudness(wave, 48000) == pytest.approx(theirs, abs=0.2), name
    assert integrated_loudness(0.1 * noise, 48000) - integrated_loudness(0.05 * noise, 48000) == pytest.approx(
        20 * math.log10(2), abs=0.01
    )


def test_loudness_of_little():
    assert integrated_loudness(torch.zeros(1, 16000), 16000) == -math.inf
    long = integrated_loudness(tone(16000), 16000)
    assert integrated_loudness(tone(3200), 16000) == pytest.approx(long, abs=0.5), "a short one is measured repeated"
    assert integrated_loudness(at_loudness(tone(3200), 16000, -30), 16000) == pytest.approx(-30, abs=0.01)
    for wave, match in ((torch.zeros(16000), "C, T"), (torch.full((1, 9), math.nan), "non-finite")):
        with pytest.raises(ValueError, match=match):
            integrated_loudness(wave, 16000)


def test_wrong_arguments_are_named_and_leave_nothing(tmp_path):
    for call, match in (
        (lambda: write_audio(tmp_path / "a.wma", tone(10), 16000), r"\.wav, \.flac, .* \.m4a is needed"),
        (lambda: write_audio(tmp_path / "a.wav", tone(10)[0], 16000), r"\(C, T\)"),
        (lambda: write_audio(tmp_path / "a.wav", torch.zeros(9, 10), 16000), "1 to 8 channels"),
        (lambda: write_audio(tmp_path / "a.wav", torch.zeros(1, 10, dtype=torch.int16), 16000), "dtype"),
        (lambda: write_audio(tmp_path / "a.wav", tone(10), 10), "sample_rate=10"),
        (lambda: write_audio(tmp_path / "a.wav", tone(10), 16000, peak=2), "peak=2"),
        (lambda: write_audio(tmp_path / "a.wav", tone(10), 16000, bits=8), "bits=8 is not possible in .wav; 16 or 24"),
        (lambda: write_audio(tmp_path / "a.flac", tone(10), 16000, bits=32), "bits=32"),
        (lambda: write_audio(tmp_path / "a.mp3", tone(10), 16000, bits=24), "bits=24 means nothing"),
        (lambda: write_audio(tmp_path / "a.mp3", tone(10), 96000), "96000 Hz .*resample"),
        (lambda: write_audio(tmp_path / "a.mp3", tone(10, 3), 48000), "at most 2 channels"),
        (lambda: write_audio(tmp_path / "a.opus", tone(10), 44100), "24000, 48000 Hz"),
        (lambda: write_audio(tmp_path / "a.ogg", tone(10), 4000), "8000 to 192000 Hz"),
        (lambda: write_audio(tmp_path / "a.wav", tone(10) * 4, 16000), "give peak"),
        (lambda: write_audio(tmp_path / "a.wav", tone(10) * math.nan, 16000), "non-finite"),
        (lambda: write_audio(tmp_path / "a.m4a", tone(10) * math.inf, 16000), "non-finite"),
        (lambda: spectrogram_picture(tmp_path / "a.png", tone(10) * math.nan, 16000), "non-finite"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    assert list(tmp_path.iterdir()) == []


def test_an_absent_encoder_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(av, "codecs_available", av.codecs_available - {"libmp3lame"})
    with pytest.raises(ValueError, match=r"no libmp3lame for \.mp3; write \.wav"):
        write_audio(tmp_path / "a.mp3", tone(10), 16000)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_text("old")

    def fail(source: Path, target: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_audio(path, tone(2000), 16000)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_minute_of_vorbis_is_written(tmp_path):
    write_audio(tmp_path / "a.ogg", 0.1 * torch.rand(2, 60 * 16000), 16000)  # at once, libsndfile overflows its stack
    assert soundfile.info(tmp_path / "a.ogg").frames == 60 * 16000


def test_spectrogram_picture(tmp_path):
    for name, wave in (("a", tone(8000, 2)), ("b", tone(8000, 2)), ("short", tone(3)), ("zero", tone(9) * 0)):
        spectrogram_picture(tmp_path / f"{name}.png", wave, 16000)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    picture = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    assert picture.shape == (500, 800, 3)
    assert picture[:200].std() > 0
    assert picture[200:].std() > 0
