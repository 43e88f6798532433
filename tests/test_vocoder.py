"""The trained inverse of a mel spectrogram: exact lengths, its place beside `Mel`, what its frames depend on."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from audio.mel import FLOOR, Mel
from audio.stft_loss import MultiResolutionSTFTLoss
from audio.vocoder import Vocoder
from mmdiff.autoencoder import Chain, Pool
from mmdiff.io import load, save

MEL = {"sample_rate": 8000, "n_fft": 256, "hop_length": 64, "mels": 32, "mean": -3.0}


def make(**settings: Any) -> Vocoder:
    return Vocoder(Mel(**MEL), **{"width": 16, "depth": 2, **settings}).eval()  # type: ignore[arg-type]


def tones(batch: int, samples: int = 1024) -> Tensor:
    pitch = 100 * 2 ** (3 * torch.rand(batch, 1, 1))
    return 0.3 * torch.sin(2 * math.pi * pitch * torch.arange(samples) / 8000)


@torch.no_grad()
@pytest.mark.parametrize("hop_length", [32, 64, 128])
@pytest.mark.parametrize("frames", [1, 2, 3, 17])
def test_every_number_of_frames_gives_its_exact_length(hop_length: int, frames: int) -> None:
    vocoder = Vocoder(Mel(**{**MEL, "hop_length": hop_length}), width=8, depth=1)  # type: ignore[arg-type]
    x = torch.randn(2, 1, frames * hop_length)
    z = vocoder.encode(x)
    assert z.shape == (2, *vocoder.latent_shape((1, frames * hop_length))) == (2, 1, frames, 32)
    y = vocoder.decode(z)
    assert y.shape == x.shape
    assert y.isfinite().all()
    assert y[..., -hop_length // 4 :].abs().max() < 100 * y.abs().mean(), "the end is divided by nearly nothing"


def test_its_latents_are_those_of_its_mel() -> None:
    vocoder, mel, x = make(), Mel(**MEL), tones(2)  # type: ignore[arg-type]
    assert torch.equal(vocoder.encode(x), mel.encode(x))
    mask = torch.rand(1, 1, 1024) > 0.1
    assert torch.equal(vocoder.known(mask), mel.known(mask))
    found = vocoder.reconstruct(x)
    assert torch.equal(found.latents, mel.encode(x))
    assert torch.equal(found.x, vocoder.decode(vocoder.encode(x)))
    assert found.loss == 0


@torch.no_grad()
def test_magnitudes_start_from_a_spectrum_that_is_flat_within_each_bin() -> None:
    vocoder = make()
    mel = vocoder.mel
    height = torch.tensor([0.5, 0.02])  # of flat spectra, (B,)
    bins = height[:, None, None] * mel.bank.sum(dim=0)[None, :, None]  # (B, M, 1)
    flat = vocoder.flat((bins.log10() - mel.mean) / mel.std)
    torch.testing.assert_close(flat[:, 1:-1], height[:, None, None].expand(2, 127, 1), rtol=1e-4, atol=0)
    assert (flat[:, [0, -1]] == FLOOR).all()  # in no bin
    vocoder.head.weight.zero_()
    vocoder.head.bias.zero_()
    loud, soft = vocoder.decode((bins.log10() - mel.mean).transpose(1, 2)[:, None] / mel.std)
    torch.testing.assert_close(soft, 0.04 * loud, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("value", [-1e3, 1e3])
def test_latents_beyond_all_sound_give_finite_waveforms(value: float) -> None:
    vocoder = make()
    assert vocoder.flat(torch.full((1, 32, 2), value)).max() <= 200  # as Mel's own inverse has it
    assert vocoder.decode(torch.full((1, 1, 4, 32), value)).isfinite().all()


def test_it_takes_the_place_of_mel_in_a_chain() -> None:
    vocoder, x = make(), tones(2)
    with_mel, trained = Chain([vocoder.mel, Pool([2, 2])]), Chain([vocoder, Pool([2, 2])])
    assert torch.equal(trained.encode(x), with_mel.encode(x))
    assert trained.latent_shape((1, 1024)) == with_mel.latent_shape((1, 1024))
    assert torch.equal(trained.decode(trained.encode(x)), vocoder.decode(trained.parts[1].decode(trained.encode(x))))  # type: ignore[operator]


def test_gradients_reach_every_parameter() -> None:
    vocoder, x = make(), tones(2)
    vocoder.reconstruct(x).x.square().mean().backward()
    assert [name for name, p in vocoder.named_parameters() if p.grad is None or not p.grad.count_nonzero()] == []
    assert any(vocoder.last_weight() is p for p in vocoder.parameters())


def test_its_weights_are_the_network_alone_and_load_through_a_model_folder(tmp_path: Path) -> None:
    vocoder, x = make(), tones(1)
    assert not any(name.startswith("mel") for name in vocoder.state_dict())
    mel = {"class_path": "audio.mel.Mel", "init_args": MEL}
    tree = {"class_path": "audio.vocoder.Vocoder", "init_args": {"mel": mel, "width": 16, "depth": 2}}
    save(vocoder, tree, tmp_path / "v")
    loaded = load(tmp_path / "v")
    assert isinstance(loaded, Vocoder)
    assert torch.equal(loaded.reconstruct(x).x, vocoder.reconstruct(x).x)


@torch.no_grad()
def test_each_clip_is_decoded_alone_and_the_same_every_time() -> None:
    vocoder, x = make(), tones(3)
    z = vocoder.encode(x)
    state = torch.get_rng_state()
    together = vocoder.decode(z)
    assert torch.equal(vocoder.decode(z), together)
    assert torch.equal(torch.get_rng_state(), state)
    for i in range(3):
        torch.testing.assert_close(vocoder.decode(z[i : i + 1])[0], together[i], rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_samples_depend_on_frames_near_them_alone() -> None:
    vocoder = make()  # three convolutions over 7 frames, and windows of 4 hops around them
    z = torch.randn(1, 1, 60, 32)
    moved = z.clone()
    moved[:, :, 30:] += 1
    change = (vocoder.decode(moved) - vocoder.decode(z))[0, 0].abs().unflatten(0, (60, 64)).amax(dim=1)
    assert change[: 30 - 9 - 2].max() < 1e-6
    assert change[31:].min() > 1e-6


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_comes_near(dtype: torch.dtype) -> None:
    vocoder, x = make(), tones(1)
    z = vocoder.encode(x)
    plain = vocoder.decode(z)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(vocoder.encode(x), z)
        half = vocoder.decode(z)
    assert half.dtype == torch.float32
    assert (half - plain).norm() < 0.05 * plain.norm()


@torch.no_grad()
def test_compiles_without_a_graph_break() -> None:
    vocoder, x = make(), tones(1)
    z = vocoder.encode(x)
    compiled = torch.compile(vocoder.decode, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(z), vocoder.decode(z), rtol=1e-5, atol=1e-6)


def test_it_learns() -> None:
    vocoder, loss = make(width=32), MultiResolutionSTFTLoss([256, 128], [32, 16], [256, 128])
    optimizer = torch.optim.AdamW(vocoder.parameters(), 3e-3)
    losses, x = [], tones(4)
    for _ in range(40):
        losses.append(loss(vocoder.reconstruct(x).x, x))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: make(kernel=4), "kernel=4 must be odd"),
        (lambda: make(width=0), "width=0, depth=2 and expansion=3 must be 1 or more"),
        (lambda: make(depth=0), "depth=0"),
        (lambda: make().decode(torch.zeros(1, 1, 4, 30)), r"z has shape \(1, 1, 4, 30\); \(B, 1, T', 32\) is needed"),
        (lambda: make().decode(torch.zeros(1, 1, 0, 32)), "with at least one frame"),
        (lambda: make().encode(torch.zeros(1, 1, 65)), "T a multiple of 64"),
    ],
)
def test_what_does_not_fit_is_refused(make_it: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_it()
