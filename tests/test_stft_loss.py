"""Losses in time and frequency against plain numpy, and the STFT discriminator at the seam of adversarial training."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from audio.discriminator import STFTDiscriminator
from audio.mel import FLOOR, Mel
from audio.stft_loss import MelLoss, MultiResolutionSTFTLoss, STFTLoss, spectrum
from mmdiff.adversarial import Adversarial, r1_penalty

SIZES = [(64, 10, 40), (128, 32, 128), (32, 7, 15)]  # n_fft, hop_length, window


def multi() -> MultiResolutionSTFTLoss:
    return MultiResolutionSTFTLoss(*(list(column) for column in zip(*SIZES, strict=True)))


def magnitudes(x: NDArray[np.float64], n_fft: int, hop: int, window: int) -> NDArray[np.float64]:
    """By the definition: a frame around each multiple of the hop, windowed and transformed; a full-scale sine is 1."""
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    left = (n_fft - window) // 2
    padded = np.pad(x, (n_fft // 2, n_fft // 2))
    frames = [padded[start + left : start + left + window] * hann for start in range(0, len(x) + 1, hop)]
    return np.abs(np.fft.rfft(np.stack(frames), n_fft)) * 2 / hann.sum()


def expected_loss(a: Tensor, b: Tensor, sizes: tuple[int, int, int]) -> float:
    """Yamamoto et al. 2020, one clip and channel at a time."""
    losses = []
    for x, y in zip(a.flatten(0, 1).double().numpy(), b.flatten(0, 1).double().numpy(), strict=True):
        found, target = np.maximum(magnitudes(x, *sizes), FLOOR), np.maximum(magnitudes(y, *sizes), FLOOR)
        convergence = np.sqrt(((target - found) ** 2).sum()) / np.sqrt((target**2).sum())
        losses.append(convergence + np.abs(np.log(target) - np.log(found)).mean())
    return float(np.mean(losses))


@pytest.mark.parametrize("shape", [(1, 1, 300), (2, 2, 77), (3, 1, 1)], ids=str)
def test_equals_the_definition_in_numpy(shape: tuple[int, ...]) -> None:
    a, b = 0.3 * torch.randn(shape), 0.3 * torch.randn(shape)
    each = [expected_loss(a, b, sizes) for sizes in SIZES]
    for sizes, expected in zip(SIZES, each, strict=True):
        assert float(STFTLoss(*sizes)(a, b)) == pytest.approx(expected, rel=1e-4)
    assert float(multi()(a, b)) == pytest.approx(float(np.mean(each)), rel=1e-4)


@pytest.mark.slow  # librosa compiles itself on its first import
def test_magnitudes_equal_librosas() -> None:
    import librosa

    x = 0.3 * torch.randn(1, 1, 3000)
    for n_fft, hop, window in [(1024, 120, 600), (512, 50, 240)]:
        reference = librosa.stft(
            x[0, 0].numpy(), n_fft=n_fft, hop_length=hop, win_length=window, center=True, pad_mode="constant"
        )
        found = spectrum(x, torch.hann_window(window), n_fft, hop)[0, 0] * torch.hann_window(window).sum() / 2
        np.testing.assert_allclose(found.numpy(), reference, rtol=1e-3, atol=1e-4)


def test_defaults_are_the_papers() -> None:
    found = [(part.n_fft, part.hop_length, len(part.window)) for part in MultiResolutionSTFTLoss().parts]  # type: ignore[union-attr,arg-type]
    assert found == [(1024, 120, 600), (2048, 240, 1200), (512, 50, 240)]


def test_a_full_scale_sine_peaks_at_one() -> None:
    x = torch.sin(2 * math.pi * 8 / 64 * torch.arange(640.0))[None, None]
    assert float(spectrum(x, torch.hann_window(64), 64, 16)[0, 0, 8, 20].abs()) == pytest.approx(1, rel=1e-4)


def test_equal_waveforms_have_no_distance_and_level_is_in_the_logarithm() -> None:
    x = 0.3 * torch.randn(2, 1, 400)
    assert float(multi()(x, x)) == 0
    assert float(STFTLoss(64, 16, 64, floor=1e-12)(0.5 * x, x)) == pytest.approx(0.5 + math.log(2), rel=1e-3)


def test_soft_clips_count_as_much_as_loud_ones() -> None:
    x, y = torch.randn(2, 1, 400), torch.randn(2, 1, 400)
    level = torch.tensor([1.0, 0.1]).view(2, 1, 1)
    torch.testing.assert_close(multi()(level * x, level * y), multi()(x, y), rtol=1e-3, atol=0)


def test_silence_gives_finite_losses_and_gradients() -> None:
    silent = torch.zeros(1, 1, 400)
    for found, target in ((silent, silent), (silent, 0.1 * torch.randn(1, 1, 400)), (1e-6 * silent + 1e-7, silent)):
        found = found.clone().requires_grad_()
        loss = multi()(found, target)
        loss.backward()
        assert loss.isfinite()
        assert found.grad is not None
        assert found.grad.isfinite().all()
    assert float(multi()(silent, silent)) == 0


def test_half_precision_around_it_changes_nothing() -> None:
    a, b = torch.randn(1, 1, 400), torch.randn(1, 1, 400)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(multi()(a, b), multi()(a, b))
        assert torch.equal(multi()(a.bfloat16(), b.bfloat16()), multi()(a.bfloat16().float(), b.bfloat16().float()))
        inside = multi()(a, b)
    assert torch.equal(inside, multi()(a, b))


def test_mel_loss_is_the_distance_of_spectrograms() -> None:
    mel = Mel(8000, n_fft=256, hop_length=64, mels=32, std=2.0)
    a, b = 0.1 * torch.randn(2, 1, 640), 0.1 * torch.randn(2, 1, 640)
    expected = (mel.encode(a) - mel.encode(b)).abs().mean()
    assert torch.equal(MelLoss(mel)(a, b), expected)
    assert MelLoss(mel)(a[..., :600], b[..., :600]) > 0  # not a multiple of the hop
    assert not list(MelLoss(mel).parameters())


def test_compiles_without_a_graph_break() -> None:
    a, b = torch.randn(1, 1, 400), torch.randn(1, 1, 400)
    compiled = torch.compile(multi(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(a, b), multi()(a, b))


@pytest.mark.parametrize("shape", [(2, 1, 700), (1, 2, 64), (1, 1, 1)], ids=str)
def test_discriminator_judges_patches_at_every_resolution(shape: tuple[int, ...]) -> None:
    judged = STFTDiscriminator(shape[1], n_ffts=[64, 128], width=4)(torch.randn(shape))
    assert len(judged) == 2
    for n_fft, (score, features) in zip([64, 128], judged, strict=True):
        assert score.shape == (shape[0], 1, shape[2] // (n_fft // 4) + 1, n_fft // 16 + 1)
        assert len(features) == 4
        assert all(f.shape[:2] == (shape[0], 4) for f in features)


def test_discriminator_sees_noise_at_its_own_level() -> None:
    judge, seen = STFTDiscriminator(n_ffts=[64, 256], width=4), []
    for part in judge.parts:
        part.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))  # type: ignore[union-attr,index]
    judge(0.1 * torch.randn(4, 1, 8000))
    assert [round(float(x[..., 1:-1].std()), 2) for x in seen] == [0.1, 0.1]  # without 0 Hz and the highest, half real


def test_discriminator_hears_phases() -> None:
    judge, x = STFTDiscriminator(n_ffts=[64], width=4), torch.randn(1, 1, 640)
    mirrored = judge(-x)[0].score
    assert (mirrored - judge(x)[0].score).abs().max() > 1e-3  # magnitudes are the same


def test_discriminator_trains_with_r1_and_an_autoencoder_against_it() -> None:
    judge, x = STFTDiscriminator(n_ffts=[32, 64], width=4), torch.randn(2, 1, 300)
    last = nn.Conv1d(1, 1, 3, padding=1)
    x_hat = last(x)
    adversarial = Adversarial([judge], features=1.0, r1=1.0, r1_every=1)
    loss, _ = adversarial.discriminator_loss(x, x_hat, step=0)
    assert loss.isfinite()
    sum(judgement.score.square().mean() for judgement in judge(x)).backward()  # type: ignore[union-attr]
    assert [name for name, p in judge.named_parameters() if p.grad is None or not p.grad.count_nonzero()] == []
    assert r1_penalty(judge, x) > 0
    loss, _ = adversarial.generator_loss(x, x_hat, (x_hat - x).abs().mean(), last.weight)
    (slope,) = torch.autograd.grad(loss, last.weight)
    assert slope.isfinite().all()
    assert slope.count_nonzero() == 3


def test_discriminator_learns_to_tell_buzz_from_noise() -> None:
    judge = STFTDiscriminator(n_ffts=[32, 64], width=4)
    optimizer = torch.optim.Adam(judge.parameters(), 3e-3)
    adversarial = Adversarial([judge])

    def batch() -> tuple[Tensor, Tensor]:
        phase = torch.rand(8, 1, 1)
        return torch.sin(2 * math.pi * (0.11 * torch.arange(400) + phase)), 0.7 * torch.randn(8, 1, 400)

    for step in range(30):
        loss, _ = adversarial.discriminator_loss(*batch(), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    loss, _ = adversarial.discriminator_loss(*batch(), 30)
    assert loss < 0.5  # chance is 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: STFTLoss(64, 50, 40), "hop_length=50, window=40 and n_fft=64 must rise"),
        (lambda: STFTLoss(64, 10, 80), "window=80 and n_fft=64"),
        (lambda: STFTLoss(64, 10, 40, floor=0), "floor=0 must be above 0"),
        (lambda: MultiResolutionSTFTLoss([64], [10, 20], [40]), r"hop_lengths=\[10, 20\] and windows=\[40\]"),
        (lambda: MultiResolutionSTFTLoss([], [], []), r"n_ffts=\[\]"),
        (lambda: STFTDiscriminator(0), "channels=0 and width=16"),
        (lambda: STFTDiscriminator(n_ffts=[66]), r"n_ffts=\[66\] must be multiples of 4"),
        (lambda: STFTDiscriminator(2)(torch.zeros(1, 1, 64)), r"\(B, 2, T\) is needed"),
    ],
)
def test_wrong_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
