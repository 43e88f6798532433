"""Attention by its formula, rotary positions by complex numbers, patterns and windows by a mask over all tokens."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from mmdiff.nn import AxisAttention, CrossAttention
from mmdiff.nn.pattern import Pattern
from mmdiff.nn.rotary import Rotation, frequencies, rotate, rotation


def perturb(module: nn.Module) -> None:
    """Moves every parameter off its zero start, so that a test sees all of them."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k / sqrt(D)) v, with minus infinity where the mask is False."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1) @ v


def table(sizes: tuple[int, ...], pairs: int, base: float = 10_000.0) -> Rotation:
    """Angles of whole positions on a grid, the same frequencies on every axis, as a sequence."""
    cos, sin = rotation([torch.arange(n).float() for n in sizes], [frequencies(pairs, base)] * len(sizes))
    return Rotation(cos.flatten(0, -2), sin.flatten(0, -2))


def complex_rotary(x: Tensor, sizes: tuple[int, ...], pairs: int) -> Tensor:
    """RoFormer's eq. 34 by complex multiplication, position by position; channel j is paired with j + R / 2."""
    out, half = x.clone(), pairs * len(sizes)
    for index, position in enumerate(itertools.product(*(range(n) for n in sizes))):
        for axis, p in enumerate(position):
            for j in range(pairs):
                c = axis * pairs + j
                pair = torch.complex(x[..., index, c], x[..., index, half + c])
                pair = pair * torch.polar(torch.tensor(1.0), torch.tensor(p * 10_000 ** (-j / pairs)))
                out[..., index, c], out[..., index, half + c] = pair.real, pair.imag
    return out


@pytest.mark.parametrize(("sizes", "pairs", "width"), [((5,), 4, 8), ((5,), 3, 7), ((3, 2), 2, 8), ((2, 3, 2), 2, 16)])
def test_rotary_is_complex_multiplication(sizes: tuple[int, ...], pairs: int, width: int) -> None:
    x = torch.randn(2, 3, math.prod(sizes), width)
    turned = rotate(x, table(sizes, pairs))
    torch.testing.assert_close(turned, complex_rotary(x, sizes, pairs), rtol=1e-5, atol=1e-5)


def test_rotary_tells_far_positions_apart_in_half_precision() -> None:
    """Positions in bfloat16 are whole numbers up to 256 alone: from there on steps would share their angles."""
    x = torch.randn(1, 1, 1, 16).bfloat16().expand(1, 1, 600, 16)
    turned = rotate(x, table((600,), 8))
    assert turned.dtype == torch.bfloat16
    torch.testing.assert_close(turned.float(), complex_rotary(x.float(), (600,), 8), rtol=0.01, atol=0.02)


def test_rotary_tables_stay_in_float32_under_autocast() -> None:
    plain = table((5, 300), 4)
    with torch.autocast("cpu", torch.bfloat16):
        cast = table((5, 300), 4)
    for a, b in zip(plain, cast, strict=True):
        assert b.dtype == torch.float32
        assert torch.equal(a, b)


@pytest.mark.parametrize("shift", [1, 100])
def test_rotary_scores_depend_on_distances_alone(shift: int) -> None:
    q, k = torch.randn(2, 16, dtype=torch.float64)
    turned_q, turned_k = (rotate(z.expand(200, 16), table((200,), 8)) for z in (q, k))
    scores = turned_q @ turned_k.T
    torch.testing.assert_close(scores[shift:, shift:], scores[:-shift, :-shift], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(scores[0, :50], scores[0, 50:100], atol=1e-2)


def test_an_axis_without_positions_broadcasts() -> None:
    time = rotation([torch.arange(3.0), None], [frequencies(4, 100.0)])
    assert time.cos.shape == time.sin.shape == (3, 1, 8)
    both = rotation([torch.arange(3.0), torch.arange(5.0)], [frequencies(4, 100.0), frequencies(2, 100.0)])
    assert both.cos.shape == (3, 5, 12)
    assert torch.equal(both.cos[:, 0, :4], time.cos[:, 0, :4])


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


@pytest.mark.parametrize(("head_channels", "sizes"), [(8, (5,)), (7, (5,)), (8, (3, 2)), (16, (2, 3, 2))])
def test_axis_attention_is_its_formula(head_channels: int, sizes: tuple[int, ...]) -> None:
    """By hand, with neighbouring channels as rotary pairs: what weights saved by earlier versions were trained with."""
    heads, axes = 2, len(sizes)
    layer = AxisAttention(heads * head_channels, list(range(axes)), axes, head_channels)
    perturb(layer)
    x = torch.randn(2, heads * head_channels, *sizes)
    y = layer.qkv(layer.norm(x).flatten(2).transpose(1, 2))
    q, k, v = y.reshape(2, -1, 3, heads, head_channels).permute(2, 0, 3, 1, 4)
    q, k = layer.query_norm(q), layer.key_norm(k)
    share = head_channels // axes // 2 * 2
    for index, position in enumerate(itertools.product(*(range(n) for n in sizes))):
        for axis, p in enumerate(position):
            for j in range(share // 2):
                c = axis * share + 2 * j
                turn = torch.polar(torch.tensor(1.0), torch.tensor(p * 10_000 ** (-2 * j / share)))
                for z in (q, k):
                    pair = torch.view_as_complex(z[:, :, index, c : c + 2].contiguous())
                    z.data[:, :, index, c : c + 2] = torch.view_as_real(pair * turn)
    y = layer.out(softmax_attention(q, k, v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), x + y.transpose(1, 2).reshape(x.shape), rtol=1e-5, atol=1e-5)


def test_axis_attention_tells_far_steps_apart() -> None:
    """Positions rounded to bfloat16 would give the steps 512 and 513 one angle."""
    cos, _ = AxisAttention(8, [0], 1, head_channels=8).table([600], torch.device("cpu"))
    assert cos.dtype == torch.float32
    torch.testing.assert_close(cos[:, 0, 0], torch.arange(600.0).cos(), atol=1e-4, rtol=0)


def test_axis_attention_refuses() -> None:
    with pytest.raises(ValueError, match="channels=10 is not a multiple of head_channels=4"):
        AxisAttention(10, [0], 1, head_channels=4)
    for pattern in ([], [0, 0], [2]):
        with pytest.raises(ValueError, match="must name different axes"):
            AxisAttention(8, pattern, 2, head_channels=4)
    with pytest.raises(ValueError, match="head_channels=4 must be at least 6"):
        AxisAttention(8, [0, 1, 2], 3, head_channels=4)


def test_cross_attention_is_its_formula() -> None:
    layer = CrossAttention(8, 6, head_channels=4)
    perturb(layer)
    x, tokens = torch.randn(2, 8, 3, 2), torch.randn(2, 5, 6)
    mask = torch.tensor([[True, True, False, True, False], [True] * 5])
    q = layer.query(layer.norm(x).flatten(2).transpose(1, 2)).reshape(2, 6, 2, 4).transpose(1, 2)
    k, v = layer.key_value(layer.tokens_norm(tokens)).reshape(2, 5, 2, 2, 4).permute(2, 0, 3, 1, 4)
    y = softmax_attention(layer.query_norm(q), layer.key_norm(k), v, mask[:, None, None])
    y = layer.out(y.transpose(1, 2).flatten(2)).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(layer(x, tokens, mask), x + y, rtol=1e-5, atol=1e-5)


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


def pattern_mask(pattern: Pattern, sizes: tuple[int, ...]) -> Tensor:
    """(N, N): which token attends to which, token by token from the definition of patterns and windows."""

    def group(position: tuple[int, ...]) -> tuple[int, ...]:
        """What two tokens must share to attend to one another: a window on attended axes, the place on others."""
        shared = []
        for axis, (p, n) in enumerate(zip(position, sizes, strict=True)):
            window = pattern.window[axis] if pattern.window else 0
            if axis not in pattern.axes:
                shared.append(p)
            elif not window or window >= n:
                shared.append(0)
            else:
                start = window // 2 if pattern.shifted else 0  # the first window's length where it is cut short
                shared.append((p - start) // window)
        return tuple(shared)

    groups = [group(position) for position in itertools.product(*(range(n) for n in sizes))]
    return torch.tensor([[a == b for b in groups] for a in groups])


PATTERNS = [
    ((6,), Pattern((0,))),
    ((7,), Pattern((0,), (3,))),
    ((7,), Pattern((0,), (3,), shifted=True)),
    ((7,), Pattern((0,), (1,), shifted=True)),
    ((4,), Pattern((0,), (9,), shifted=True)),
    ((3, 4), Pattern((1,))),
    ((5, 4), Pattern((0, 1), (2, 4), shifted=True)),
    ((5, 4), Pattern((0,), (2, 2))),
    ((3, 4, 2), Pattern((0,))),
    ((3, 4, 2), Pattern((1,))),
    ((3, 4, 2), Pattern((1, 2))),
    ((3, 4, 2), Pattern((0, 2))),
    ((3, 4, 2), Pattern((0, 1, 2))),
    ((3, 5, 4), Pattern((0, 1, 2), (2, 2, 3))),
    ((3, 5, 4), Pattern((0, 1, 2), (2, 2, 3), shifted=True)),
    ((3, 5, 4), Pattern((0, 2), (2, 0, 3), shifted=True)),
    ((3, 5, 4), Pattern((1, 2), (0, 4, 4), shifted=True)),
]


@pytest.mark.parametrize(("sizes", "pattern"), PATTERNS)
def test_patterns_and_windows_are_masked_attention_over_all_tokens(sizes: tuple[int, ...], pattern: Pattern) -> None:
    packed = torch.randn(2, *sizes, 3, 3, 4, dtype=torch.float64)  # heads, then query, key, value
    q, k, v = packed.unbind(-2)
    y = pattern(q, k, v)
    assert y.shape == q.shape
    sequences = (z.flatten(1, -3).transpose(1, 2) for z in (q, k, v))
    expected = softmax_attention(*sequences, pattern_mask(pattern, sizes))
    torch.testing.assert_close(y.flatten(1, -3).transpose(1, 2), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("axes", [(0,), (1, 2), (0, 1, 2)])
def test_patterns_of_neighbouring_axes_copy_nothing(axes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries, keys and values reach attention, and its result the next layer, as views: copies are what costs."""
    packed = torch.randn(2, 3, 4, 2, 3, 3, 8)
    seen = []

    def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None) -> Tensor:
        seen.extend((q, k, v))
        assert attn_mask is None
        return torch.empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    y = Pattern(axes)(*packed.unbind(-2))
    assert {z.untyped_storage().data_ptr() for z in seen} == {packed.untyped_storage().data_ptr()}
    assert y.is_contiguous()


def test_heads_stay_below_what_a_grid_of_cuda_can_count(monkeypatch: pytest.MonkeyPatch) -> None:
    real, shapes = torch.nn.functional.scaled_dot_product_attention, []

    def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None) -> Tensor:
        shapes.append(tuple(q.shape[:3]))
        return real(q, k, v, attn_mask=attn_mask)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    for places in (65_535, 65_536):
        v = torch.randn(1, 2, places, 1, 2)
        y = Pattern((0,))(torch.zeros_like(v), torch.zeros_like(v), v)
        torch.testing.assert_close(y, v.mean(1, keepdim=True).expand_as(v))
    assert shapes == [(1, 65_535, 2), (65_536, 1, 2)]
