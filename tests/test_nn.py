"""Blocks over one, two and three axes: folding undone, identities before training."""

import math

import pytest
import torch
from torch import nn

from mmdiff.nn import (
    AdaGroupNorm,
    NoiseEmbedding,
    Resample,
    Standardize,
    convolution,
    group_norm,
    pool_time,
    sinusoid,
)
from mmdiff.nn.conv import check_sizes, fold_cells, unfold_cells

SHAPES = {1: (6,), 2: (6, 4), 3: (6, 4, 2)}
FACTORS = {1: (3,), 2: (3, 2), 3: (3, 4, 2)}


def perturb(module: nn.Module) -> None:
    """Moves every parameter off its zero start, so that a test sees all of them."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_unfold_undoes_fold(axes: int) -> None:
    x = torch.randn(2, 5, *SHAPES[axes])
    folded = fold_cells(x, FACTORS[axes])
    assert folded.shape == (
        2,
        5 * math.prod(FACTORS[axes]),
        *(n // f for n, f in zip(SHAPES[axes], FACTORS[axes], strict=True)),
    )
    assert torch.equal(unfold_cells(folded, FACTORS[axes]), x)


def test_fold_keeps_cells_together() -> None:
    x = torch.arange(8.0).reshape(1, 1, 4, 2)
    assert fold_cells(x, (2, 2))[0, :, 1, 0].tolist() == [4, 5, 6, 7]  # the steps of one cell, in order
    image = torch.randn(2, 3, 4, 6)
    assert torch.equal(fold_cells(image, (2, 2)), nn.functional.pixel_unshuffle(image, 2))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_resample_up_undoes_down_when_mixing_is_the_identity(axes: int) -> None:
    cells = math.prod(FACTORS[axes])
    down, up = Resample(2, 2 * cells, FACTORS[axes]), Resample(2 * cells, 2, FACTORS[axes], up=True)
    for layer in (down.mix, up.mix):
        nn.init.dirac_(layer.weight)
        nn.init.zeros_(layer.bias)
    x = torch.randn(2, 2, *SHAPES[axes])
    assert torch.equal(up(down(x)), x)


def test_convolution_keeps_sizes_and_starts_at_zero_if_told() -> None:
    x = torch.randn(1, 2, 5, 7)
    assert convolution(2, 3, (3, 5))(x).shape == (1, 3, 5, 7)
    assert convolution(2, 3, (3, 5), zero=True)(x).count_nonzero() == 0
    with pytest.raises(ValueError, match=r"kernel=\(3, 4\) has an even length"):
        convolution(1, 1, (3, 4))


@pytest.mark.parametrize(
    ("sizes", "multiples", "message"),
    [
        ((13,), (4,), "T=13 is not a multiple of 4; nearest: 12 or 16"),
        ((4, 3), (4, 8), "F=3 is not a multiple of 8; nearest: 8$"),
        ((4, 8, 18), (1, 8, 8), "W=18 is not a multiple of 8; nearest: 16 or 24"),
    ],
)
def test_illegal_sizes_name_the_nearest_legal_ones(sizes: tuple, multiples: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_sizes(sizes, multiples)


def test_every_illegal_size_is_named_at_once() -> None:
    message = "T=5 is not a multiple of 2; nearest: 4 or 6, and W=9 is not a multiple of 4; nearest: 8 or 12$"
    with pytest.raises(ValueError, match=message):
        check_sizes((5, 8, 9), (2, 4, 4))
    with pytest.raises(ValueError, match="T=0 is not a multiple of 1; nearest: 1$"):
        check_sizes((0,), (1,))


@pytest.mark.parametrize(
    ("kernel", "dilation"), [((3, 1, 1), (1, 1, 1)), ((5, 1, 1), (2, 1, 1)), ((3, 3, 3), (4, 1, 1)), ((1, 1, 1), None)]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d], ids=["contiguous", "last"])
def test_convolution_over_time_is_the_3d_convolution(
    kernel: tuple[int, ...], dilation: tuple[int, ...] | None, layout: torch.memory_format
) -> None:
    layer = convolution(4, 6, kernel, dilation=dilation)
    plain = nn.Conv3d(4, 6, kernel, padding=layer.padding, dilation=layer.dilation)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 4, 9, 3, 5).to(memory_format=layout).requires_grad_()
    results = []
    for conv in (layer, plain):
        out = conv(x)
        results.append([out, *torch.autograd.grad((out**2).sum(), [x, *conv.parameters()])])
    assert results[0][0].shape == (2, 6, 9, 3, 5)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_pool_time_is_the_mean_and_leaves_what_has_no_time() -> None:
    embedding = torch.arange(6.0).reshape(1, 1, 6)
    assert pool_time(embedding, 3).tolist() == [[[1, 4]]]
    assert pool_time(embedding[..., 0], 3) is not None
    assert pool_time(embedding[..., 0], 3).shape == (1, 1)


def test_sinusoid_tells_neighbours_apart_at_both_ends_of_its_range() -> None:
    for values in (torch.tensor([0.0, 0.01]), torch.tensor([998.0, 999.0])):
        a, b = sinusoid(values, 64)
        assert a.norm() == pytest.approx(math.sqrt(32), rel=1e-4)
        assert (a - b).norm() > 0.1
    assert not torch.allclose(sinusoid(values, 8, shortest=0.1), sinusoid(values, 8, shortest=1.0))
    assert not torch.allclose(sinusoid(values, 8, longest=10.0), sinusoid(values, 8, longest=100.0))
    with pytest.raises(ValueError, match="width=7 is odd"):
        sinusoid(values, 7)


@pytest.mark.parametrize("channels", [1, 3, 6, 30, 48, 96, 128, 1024])
def test_group_norm_divides_channels(channels: int) -> None:
    assert channels % group_norm(channels).num_groups == 0
    assert group_norm(channels).num_groups <= 32


def test_noise_embedding_per_step_equals_one_for_all() -> None:
    layer = NoiseEmbedding(16, vector_width=3)
    c_noise, vector = torch.randn(2), torch.randn(2, 3)
    steps = layer(c_noise[:, None].expand(2, 5), vector)
    assert steps.shape == (2, 16, 5)
    torch.testing.assert_close(steps, layer(c_noise, vector)[..., None].expand(2, 16, 5))
    assert not torch.allclose(layer(c_noise, vector), layer(c_noise, -vector))


def test_adaptive_norm_modulates_each_step_by_its_own_embedding() -> None:
    layer = AdaGroupNorm(8, 4)
    x, embedding = torch.randn(2, 8, 5, 3), torch.randn(2, 4, 5)
    assert torch.equal(layer(x, embedding), layer.norm(x))
    perturb(layer)
    for step in range(5):
        alone = layer(x, embedding[..., step])
        torch.testing.assert_close(layer(x, embedding)[:, :, step], alone[:, :, step])


def test_standardize_removes_what_is_constant_and_keeps_items_apart() -> None:
    layer = Standardize(4, gain=2.0, rate=0.01)
    data = 5 + 0.3 * torch.randn(4000, 4, generator=torch.Generator().manual_seed(0))
    for batch in data.split(8):
        layer(batch)
    layer.eval()
    y = layer(data)
    assert y.mean().abs() < 0.2
    assert abs(float(y.std()) - 2.0) < 0.2
    torch.testing.assert_close(layer(data[:1]), y[:1])
    before = layer.mean.clone()
    layer(data + 100)
    assert torch.equal(layer.mean, before), "statistics moved in eval mode"
