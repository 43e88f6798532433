"""Mel spectrograms against torchaudio and librosa, and the way back by Griffin-Lim."""

import math
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torchaudio
from torch import Tensor

from audio.mel import FLOOR, Mel, nonnegative_inverse

RATE = 8000


def make(**settings: Any) -> Mel:
    return Mel(**{"sample_rate": RATE, "n_fft": 256, "hop_length": 64, "mels": 32, **settings})


def speechlike(seconds: float = 0.512) -> Tensor:
    """A gliding harmonic tone with a pause, (1, 1, T)."""
    t = torch.arange(round(seconds * RATE)) / RATE
    phase = 2 * math.pi * (140 * t + 60 * t**2)
    wave = sum(torch.sin(k * phase) / k for k in range(1, 12)) * 0.2
    return (wave * (torch.sin(2 * math.pi * 2 * t) > -0.6))[None, None]


def magnitudes(mel: Mel, z: Tensor) -> Tensor:
    return 10 ** (z[:, 0] * mel.std + mel.mean)


def test_a_full_scale_sine_peaks_at_one() -> None:
    mel, frequency = make(), 1000.0  # 1000 Hz is bin 32 of 256 at 8 kHz, exactly
    x = torch.sin(2 * math.pi * frequency * torch.arange(4096) / RATE)[None, None]
    spectrum = torch.stft(x[:, 0], 256, 64, window=mel.window, return_complex=True).abs() * 2 / mel.window.sum()
    assert spectrum[0, 32, 20] == pytest.approx(1, rel=1e-3)
    expected = spectrum[0, :, 20] @ mel.bank
    torch.testing.assert_close(magnitudes(mel, mel.encode(x))[0, 20], expected.clamp(min=FLOOR), rtol=1e-3, atol=1e-6)


SETTINGS = [(256, 64, 32, RATE), (512, 128, 64, RATE), (1024, 512, 40, 22050)]  # n_fft, hop_length, mels, sample_rate


@pytest.mark.parametrize("scale", ["htk", "slaney"])
@pytest.mark.parametrize(("n_fft", "hop_length", "mels", "rate"), SETTINGS)
@pytest.mark.parametrize("hops", [1, 3, 32])
def test_equals_torchaudio(
    n_fft: int, hop_length: int, mels: int, rate: int, hops: int, scale: Literal["htk", "slaney"]
) -> None:
    mel, x = Mel(rate, n_fft, hop_length, mels, scale=scale), 0.3 * torch.randn(2, 1, hops * hop_length)
    reference = torchaudio.transforms.MelSpectrogram(
        rate, n_fft=n_fft, hop_length=hop_length, n_mels=mels, power=1.0, center=True, pad_mode="constant",
        mel_scale=scale,
    )(x[:, 0])  # fmt: skip
    expected = reference[..., :-1].transpose(1, 2) * 2 / torch.hann_window(n_fft).sum()
    torch.testing.assert_close(magnitudes(mel, mel.encode(x)), expected.clamp(min=FLOOR), rtol=1e-4, atol=0)


@pytest.mark.slow  # librosa compiles itself on its first import
@pytest.mark.parametrize("scale", ["htk", "slaney"])
@pytest.mark.parametrize(("n_fft", "hop_length", "mels", "rate"), SETTINGS)
def test_equals_librosa(n_fft: int, hop_length: int, mels: int, rate: int, scale: Literal["htk", "slaney"]) -> None:
    import librosa

    mel, x = Mel(rate, n_fft, hop_length, mels, scale=scale), 0.3 * torch.randn(1, 1, 32 * hop_length)
    reference = librosa.feature.melspectrogram(
        y=x[0, 0].numpy(), sr=rate, n_fft=n_fft, hop_length=hop_length, n_mels=mels, power=1.0, htk=scale == "htk",
        norm=None, center=True, pad_mode="constant",
    )  # fmt: skip
    expected = reference[:, :-1].T * 2 / np.hanning(n_fft + 1)[:-1].sum()
    found = magnitudes(mel, mel.encode(x))[0].numpy()
    np.testing.assert_allclose(found, np.maximum(expected, FLOOR), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_around_it_changes_nothing(dtype: torch.dtype) -> None:
    mel, x = make(iterations=2), speechlike()
    z = mel.encode(x)
    y = mel.decode(z)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(mel.encode(x), z)
        assert torch.equal(mel.decode(z), y)
    assert mel.encode(x.to(dtype)).isfinite().all()


def test_shape_is_as_promised() -> None:
    mel = make()
    for batch, length in ((1, 64), (3, 640)):
        z = mel.encode(torch.randn(batch, 1, length))
        assert z.shape == (batch, *mel.latent_shape((1, length)))
        assert mel.decode(z).shape == (batch, 1, length)


def test_silence_stays_silent() -> None:
    mel = make()
    z = mel.encode(torch.zeros(1, 1, 512))
    torch.testing.assert_close(z, torch.full_like(z, (math.log10(FLOOR) - mel.mean) / mel.std))
    assert mel.decode(z).abs().max() < 1e-4


def test_decoding_re_encodes_near_the_input() -> None:
    mel, x = make(), speechlike()
    z = mel.encode(x)
    again = mel.encode(mel.decode(z))
    error = (magnitudes(mel, again) - magnitudes(mel, z)).norm() / magnitudes(mel, z).norm()
    assert error < 0.15
    loud = z > z.max() - 40 / 20 / mel.std  # within 40 dB of the loudest bin
    assert ((again - z)[loud].abs() * mel.std * 20).mean() < 3  # dB
    assert mel.decode(z).abs().max() == pytest.approx(float(x.abs().max()), rel=0.5)


def test_more_iterations_come_nearer() -> None:
    x, errors = speechlike(), []
    for iterations in (1, 64):
        mel = make(iterations=iterations)
        z = mel.encode(x)
        errors.append(float((magnitudes(mel, mel.encode(mel.decode(z))) - magnitudes(mel, z)).norm()))
    assert errors[1] < 0.8 * errors[0]


def test_decoding_is_a_function_of_each_item_alone() -> None:
    mel, x = make(iterations=8), speechlike()
    z = mel.encode(torch.cat([x, 0.5 * x.flip(-1), -0.2 * x]))
    state = torch.get_rng_state()
    together = mel.decode(z)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    for i in range(3):
        torch.testing.assert_close(mel.decode(z[i : i + 1])[0], together[i], rtol=1e-4, atol=1e-5)


def test_least_squares_inverse_is_non_negative_and_fits() -> None:
    bank = make().bank
    mel = torch.rand(1, 4, bank.shape[0]) @ bank
    found = nonnegative_inverse(mel, bank)
    assert found.min() >= 0
    assert (found @ bank - mel).norm() < 0.02 * mel.norm()


@pytest.mark.parametrize(
    "change",
    [{"sample_rate": 16000}, {"n_fft": 512}, {"hop_length": 32}, {"mels": 30}, {"mean": -1}, {"std": 1},
     {"scale": "slaney"}],
)  # fmt: skip
def test_every_setting_changes_the_spectrogram(change: dict[str, Any]) -> None:
    x = speechlike()
    a, b = make().encode(x), make(**change).encode(x)
    assert a.shape != b.shape or not torch.allclose(a, b, atol=1e-3)


@pytest.mark.parametrize("shape", [(1, 2, 640), (1, 640), (1, 1, 650)])
def test_what_is_not_a_mono_waveform_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"needs \(B, 1, T\) with T a multiple of 64"):
        make().encode(torch.zeros(shape))


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 650), "T=650 is not a multiple of 64; nearest: 640 or 704"), ((2, 640), "mono"), ((1, 640, 2), "mono")],
)
def test_no_latent_shape_for_what_cannot_be_encoded(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make().latent_shape(shape)


@pytest.mark.filterwarnings("ignore:At least one mel filterbank:UserWarning")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hop_length": 100}, "n_fft=256 is not a multiple of hop_length=100"),
        ({"hop_length": 256}, "hop_length=256 must be at most n_fft / 2=128"),
        ({"mels": 128}, "mels=128 is too many for n_fft=256"),
        ({"std": 0}, "std=0 must be positive"),
        ({"scale": "bark"}, "scale='bark' is unknown; choose htk or slaney"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**settings)
