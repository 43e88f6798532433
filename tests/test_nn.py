"""Blocks over one, two and three axes: folding undone, identities before training, rotary by its definition."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from mmdiff.nn import (
    AdaGroupNorm,
    AxisAttention,
    CrossAttention,
    NoiseEmbedding,
    Resample,
    Standardize,
    convolution,
    group_norm,
    pool_time,
    sinusoid,
)
from mmdiff.nn.attention import rotary
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


def complex_rotary(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """RoFormer's eq. 34 by complex multiplication, position by position, each axis on its own share of channels."""
    out, share = x.clone(), x.shape[-1] // len(sizes) // 2 * 2
    for index, position in enumerate(itertools.product(*(range(n) for n in sizes))):
        for axis, p in enumerate(position):
            for j in range(share // 2):
                c = axis * share + 2 * j
                pair = torch.view_as_complex(x[:, :, index, c : c + 2].contiguous())
                turn = torch.polar(torch.tensor(1.0), torch.tensor(p * 10_000 ** (-2 * j / share)))
                out[:, :, index, c : c + 2] = torch.view_as_real(pair * turn)
    return out


@pytest.mark.parametrize(("sizes", "width"), [((5,), 8), ((5,), 7), ((3, 2), 8), ((2, 3, 2), 16)])
def test_rotary_is_complex_multiplication(sizes: tuple[int, ...], width: int) -> None:
    x = torch.randn(2, 3, math.prod(sizes), width)
    torch.testing.assert_close(rotary(x, sizes), complex_rotary(x, sizes), rtol=1e-5, atol=1e-5)


def test_rotary_tells_far_positions_apart_in_half_precision() -> None:
    """Positions in bfloat16 are whole numbers up to 256 alone: from there on steps would share their angles."""
    x = torch.randn(1, 1, 1, 16).expand(1, 1, 600, 16)
    turned = rotary(x.bfloat16(), (600,))
    assert turned.dtype == torch.bfloat16
    torch.testing.assert_close(turned.float(), complex_rotary(x.bfloat16().float(), (600,)), rtol=0.01, atol=0.02)


def test_rotary_scores_depend_on_distances_alone() -> None:
    q, k = torch.randn(2, 1, 1, 1, 16)
    turned_q, turned_k = rotary(q.expand(1, 1, 9, 16), [9])[0, 0], rotary(k.expand(1, 1, 9, 16), [9])[0, 0]
    scores = turned_q @ turned_k.T
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("axes", "pattern"), [(1, [0]), (2, [1]), (2, [1, 0]), (3, [0]), (3, [1, 2]), (3, [0, 1, 2])])
def test_axis_attention_mixes_the_named_axes_and_no_other(axes: int, pattern: list[int]) -> None:
    layer = AxisAttention(8, pattern, axes, head_channels=8)
    x = torch.randn(2, 8, *(3, 4, 2)[:axes])
    assert torch.equal(layer(x), x)
    perturb(layer)
    # group norm mixes over all positions, so it stands aside to show what attention itself mixes
    layer.norm = nn.Identity()
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x)[(0, slice(None), *(0,) * axes)].sum(), x)
    for axis in range(axes):
        reached = gradient[0].abs().sum(0).movedim(axis, 0).reshape(x.shape[2 + axis], -1).sum(1)
        assert (reached[1:] > 0).all() == (axis in pattern)
    assert gradient[1].count_nonzero() == 0


def test_axis_attention_refuses() -> None:
    with pytest.raises(ValueError, match="channels=10 is not a multiple of head_channels=4"):
        AxisAttention(10, [0], 1, head_channels=4)
    for pattern in ([], [0, 0], [2]):
        with pytest.raises(ValueError, match="must name different axes"):
            AxisAttention(8, pattern, 2, head_channels=4)
    with pytest.raises(ValueError, match="head_channels=4 must be at least 6"):
        AxisAttention(8, [0, 1, 2], 3, head_channels=4)


def test_masked_tokens_are_as_good_as_absent() -> None:
    layer = CrossAttention(8, 6, head_channels=4)
    x, tokens = torch.randn(2, 8, 3, 2), torch.randn(2, 5, 6)
    assert torch.equal(layer(x, tokens), x)
    perturb(layer)
    mask = torch.tensor([[True, True, False, True, False]] * 2)
    torch.testing.assert_close(layer(x, tokens, mask), layer(x, tokens[:, mask[0]]))
    torch.testing.assert_close(layer(x, tokens, torch.ones(2, 5, dtype=torch.bool)), layer(x, tokens))
    wild = torch.where(mask[..., None], tokens, 1e4)
    torch.testing.assert_close(layer(x, wild, mask), layer(x, tokens, mask))


def test_attention_to_nothing_is_finite_and_ignores_the_tokens() -> None:
    layer = CrossAttention(8, 6, head_channels=4)
    perturb(layer)
    x, mask = torch.randn(2, 8, 3), torch.tensor([[True, False], [False, False]])
    a, b = layer(x, torch.randn(2, 2, 6), mask), layer(x, torch.randn(2, 2, 6), mask)
    assert torch.isfinite(a).all()
    assert torch.equal(a[1], b[1])
    assert not torch.equal(a[0], b[0])
    torch.testing.assert_close(a[1] - x[1], layer.out.bias[:, None].expand(8, 3))


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
