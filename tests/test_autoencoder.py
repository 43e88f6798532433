"""Autoencoders: what encoding keeps, shapes that come out as promised, latents of unit variance."""

from typing import Any

import pytest
import torch

from mmdiff.autoencoder import Autoencoder, Chain, ConvKL, Identity, Pool, Subsample

CASES: list[tuple[Autoencoder, tuple[int, ...]]] = [
    (Identity(), (2, 5, 3)),
    (Pool([2]), (3, 6)),
    (Pool([1, 2, 3]), (2, 5, 4, 6)),
    (Subsample(3), (1, 9, 2)),
    (Chain([Subsample(2), Pool([1, 2, 2])]), (3, 4, 6, 2)),
    (ConvKL(2, 3, [[2], [3]], width=4), (2, 12)),
    (ConvKL(1, 2, [[1, 2], [2, 2]], width=4), (1, 6, 8)),
    (ConvKL(3, 4, [[1, 2, 2]], width=4, kernel=[1, 3, 3]), (3, 1, 4, 2)),
    (Chain([ConvKL(1, 2, [[2, 2]], width=4), Pool([3, 1])]), (1, 6, 4)),
]


def name(case: Any) -> str:
    return repr(case).split("(")[0] if isinstance(case, Autoencoder) else ""


@pytest.mark.parametrize(("autoencoder", "shape"), CASES, ids=name)
@pytest.mark.parametrize("batch", [1, 2])
def test_shapes_are_as_promised(autoencoder: Autoencoder, shape: tuple[int, ...], batch: int) -> None:
    x = torch.randn(batch, *shape)
    z = autoencoder.encode(x)
    assert z.shape == (batch, *autoencoder.latent_shape(shape))
    assert z.shape[1] == (autoencoder.latent_channels or shape[0])
    factors = (*autoencoder.factors, *(1,) * len(shape))
    assert [n // f for n, f in zip(shape[1:], factors, strict=False)] == list(z.shape[2:])
    assert autoencoder.decode(z).shape == x.shape


def test_identity_is_the_identity() -> None:
    x = torch.randn(1, 2, 3)
    assert Identity().encode(x) is x
    assert Identity().decode(x) is x


@pytest.mark.parametrize("factor", [1, 2, 5])
def test_subsample_keeps_known_frames_exactly(factor: int) -> None:
    z = torch.randn(2, 3, 4, 5)
    subsample = Subsample(factor)
    full = subsample.decode(z)
    assert torch.equal(full[:, :, ::factor], z)
    assert torch.equal(subsample.encode(full), z)
    assert torch.equal(full[:, :, -factor:], z[:, :, -1:].expand(2, 3, factor, 5))  # the last is held


def test_subsample_puts_linear_steps_between() -> None:
    line = torch.arange(0.0, 12).reshape(1, 1, 12)
    full = Subsample(4).decode(line[:, :, ::4])
    torch.testing.assert_close(full[:, :, :9], line[:, :, :9])


def test_pool_takes_means_and_keeps_constants() -> None:
    x = torch.arange(8.0).reshape(1, 1, 2, 4)
    assert Pool([2, 2]).encode(x).flatten().tolist() == [2.5, 4.5]
    constant = torch.full((1, 2, 4, 6), 0.3)
    pool = Pool([2, 3])
    torch.testing.assert_close(pool.decode(pool.encode(constant)), constant)


def test_chain_is_one_after_the_other() -> None:
    first, second = Subsample(2), Pool([1, 2])
    x = torch.randn(2, 1, 4, 6)
    chain = Chain([first, second])
    assert chain.factors == (2, 2)
    assert torch.equal(chain.encode(x), second.encode(first.encode(x)))
    z = chain.encode(x)
    assert torch.equal(chain.decode(z), first.decode(second.decode(z)))
    assert Chain([Identity(), ConvKL(1, 5, [[2]], width=4), Identity()]).latent_channels == 5
    with pytest.raises(ValueError, match="at least one part"):
        Chain([])


@pytest.mark.parametrize(
    ("autoencoder", "shape", "message"),
    [
        (Pool([2, 4]), (1, 4, 6), "F=6 is not a multiple of 4; nearest: 4 or 8"),
        (Subsample(4), (1, 6, 3), "T=6 is not a multiple of 4; nearest: 4 or 8"),
        (ConvKL(1, 1, [[2], [4]], width=4), (1, 12), "T=12 is not a multiple of 8; nearest: 8 or 16"),
    ],
    ids=["pool", "subsample", "convkl"],
)
def test_illegal_sizes_name_the_nearest_legal_ones(
    autoencoder: Autoencoder, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        autoencoder.encode(torch.randn(1, *shape))
    with pytest.raises(ValueError, match=message):
        autoencoder.latent_shape(shape)


def test_too_few_axes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape=\(1, 8\) is \(C, \*axes\) of 1 axes, too few for factors=\[2, 2\]"):
        Pool([2, 2]).latent_shape((1, 8))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Pool([]), r"factors=\[\] must be one to three"),
        (lambda: Pool([2, 0]), r"factors=\[2, 0\]"),
        (lambda: Subsample(0), "factor=0 must be 1 or more"),
        (lambda: ConvKL(1, 1, []), r"steps=\[\] must be tuples of one length"),
        (lambda: ConvKL(1, 1, [[2], [2, 2]]), r"steps=\[\[2\], \[2, 2\]\]"),
        (lambda: ConvKL(1, 1, [[2]], kernel=[3, 3]), r"kernel=\[3, 3\] has 2 lengths, but steps have 1 axes"),
        (lambda: ConvKL(1, 0, [[2]]), "latent_channels=0 must be 1 or more"),
    ],
)
def test_wrong_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_statistics_bring_latents_to_mean_0_and_variance_1_and_decoding_undoes_them() -> None:
    model = ConvKL(1, 3, [[2]], width=8)
    x = 3 + 2 * torch.randn(64, 1, 32)
    plain = model.decode(model.encode(x))  # shift 0, scale 1
    latents = model.reconstruct(x).latents.movedim(1, 0).flatten(1)
    model.normalise(latents.mean(dim=1), latents.std(dim=1, correction=0))
    z = model.encode(x).movedim(1, 0).flatten(1)
    torch.testing.assert_close(z.mean(dim=1), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.std(dim=1, correction=0), torch.ones(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(model.decode(model.encode(x)), plain, rtol=1e-4, atol=1e-4)


def test_a_running_estimate_moves_by_its_rate_and_a_constant_channel_is_not_divided_by_zero() -> None:
    model = ConvKL(1, 2, [[2]], width=4)
    model.normalise(torch.tensor([2.0, -1.0]), torch.tensor([3.0, 0.0]), rate=0.25)
    torch.testing.assert_close(model.shift, torch.tensor([0.5, -0.25]))
    torch.testing.assert_close(model.scale, torch.tensor([1.5, 0.75 + 0.25e-4]))


def test_a_reconstruction_is_of_the_latents_that_encoding_gives() -> None:
    model = ConvKL(2, 3, [[2], [2]], width=4)
    model.normalise(torch.randn(3), torch.rand(3) + 0.5)
    x = torch.randn(2, 2, 8)
    out = model.reconstruct(x)
    torch.testing.assert_close(out.x, model.decode(model.encode(x)))
    torch.testing.assert_close(out.latents, model.encode(x) * model.scale.view(-1, 1) + model.shift.view(-1, 1))
    assert model.last_weight() is model.decoder[-1].weight


def test_half_precision_weights_reconstruct() -> None:
    model = ConvKL(1, 2, [[2]], width=4).to(torch.bfloat16)
    x = torch.randn(1, 1, 8, dtype=torch.bfloat16)
    assert model.reconstruct(x, torch.Generator()).x.dtype == torch.bfloat16
    assert model.decode(model.encode(x)).dtype == torch.bfloat16


def test_latents_of_other_channels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"latents have shape \(1, 2, 4\); latent_channels=3 are needed"):
        ConvKL(1, 3, [[2]], width=4).decode(torch.randn(1, 2, 4))
