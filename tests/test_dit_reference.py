"""Blocks of the transformer by hand and by diffusers with the same weights; positions in seconds."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdiff.nn.pattern import Pattern
from mmdiff.nn.rotary import Rotation
from mmdiff.nn.tokens import Block, JointBlock, LastJointBlock, Stream
from tests.dit_cases import data, perturbed, small

WIDTH, HEADS, CHANNELS = 16, 2, 8


def layer_norm(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()


def rms_norm(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-12).sqrt()


def heads(x: Tensor) -> Tensor:
    """(B, N, D) -> (B, H, N, K)."""
    return x.unflatten(-1, (HEADS, CHANNELS)).transpose(1, 2)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, H, N, K) -> (B, N, D)."""
    return ((q @ k.mT / math.sqrt(CHANNELS)).softmax(-1) @ v).transpose(1, 2).flatten(2)


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """x (B, H, N, K) with pairs (j, j + K / 2) as complex numbers, turned by angles (N, K / 2)."""
    a, b = x.chunk(2, dim=-1)
    pairs = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([pairs.real, pairs.imag], dim=-1)


def unpacked(stream: Stream, i: int) -> Tensor:
    """Weight of the queries' (0), keys' (1) or values' (2) projection."""
    return stream.qkv.weight.unflatten(0, (HEADS, 3, CHANNELS))[:, i].flatten(0, 1)


def no_turn(sizes: int) -> Rotation:
    """A table that turns nothing, for grids of `sizes` axes."""
    shape = (1,) * (sizes + 2) + (CHANNELS,)
    return Rotation(torch.ones(shape), torch.zeros(shape))


def test_a_block_is_its_formulas() -> None:
    """adaLN-zero, normalised and turned queries and keys, attention to tokens, MLP: written out (N = 6 steps)."""
    block = perturbed(Block(Pattern((0,)), True, WIDTH, CHANNELS, 4, 0.0))
    x, tokens, embedding = torch.randn(2, 6, WIDTH), torch.randn(2, 3, WIDTH), torch.randn(2, 1, WIDTH)
    angles = torch.randn(6, CHANNELS // 2)
    table = Rotation(
        torch.cat([angles.cos(), angles.cos()], -1)[:, None, None],
        torch.cat([-angles.sin(), angles.sin()], -1)[:, None, None],
    )
    result, passed = block(x, tokens, None, embedding, table)
    assert passed is tokens

    stream, cross = block.stream, block.cross
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = stream.modulation(embedding).chunk(6, -1)
    y = (1 + scale) * layer_norm(x) + shift
    q, k, v = (heads(F.linear(y, unpacked(stream, i))) for i in range(3))
    q, k = (stream.gain[:, i : i + 1] * rms_norm(z) for i, z in enumerate((q, k)))
    x = x + gate * stream.out(softmax_attention(turned(q, angles), turned(k, angles), v))
    q = rms_norm(heads(cross.query(layer_norm(x))))
    k, v = cross.key_value(tokens).unflatten(-1, (HEADS, 2, CHANNELS)).permute(3, 0, 2, 1, 4)
    x = x + cross.out(softmax_attention(q, cross.gain[:, None] * rms_norm(k), v))
    y = (1 + mlp_scale) * layer_norm(x) + mlp_shift
    hidden = stream.mlp[0](y)
    x = x + mlp_gate * stream.mlp[2](0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2))))
    torch.testing.assert_close(result, x, rtol=1e-4, atol=1e-5)


def copy_stream(stream: Stream, theirs: Any, context: bool) -> None:
    """Give one of diffusers' two streams our weights."""
    attn, norm = theirs.attn, theirs.norm1_context if context else theirs.norm1
    names = ["add_q_proj", "add_k_proj", "add_v_proj"] if context else ["to_q", "to_k", "to_v"]
    for i, name in enumerate(names):
        getattr(attn, name).weight.copy_(unpacked(stream, i))
        getattr(attn, name).bias.zero_()
    for i, name in enumerate(["norm_added_q", "norm_added_k"] if context else ["norm_q", "norm_k"]):
        getattr(attn, name).weight.fill_(float(stream.gain[0, i, 0]))
    norm.linear.load_state_dict(stream.modulation.state_dict())
    (attn.to_add_out if context else attn.to_out[0]).load_state_dict(stream.out.state_dict())
    feed = theirs.ff_context if context else theirs.ff
    feed.net[0].proj.weight.copy_(stream.mlp[0].weight)
    feed.net[0].proj.bias.zero_()
    feed.net[2].load_state_dict(stream.mlp[2].state_dict())


def alike(stream: Stream) -> None:
    """Bring a stream to what diffusers has: one gain for all heads, and the tanh form of GELU."""
    stream.gain.copy_(stream.gain[:1].expand_as(stream.gain))
    stream.mlp[1] = nn.GELU(approximate="tanh")


@torch.no_grad()
@pytest.mark.parametrize("last", [False, True])
def test_joint_attention_is_that_of_diffusers_with_the_same_weights(last: bool) -> None:
    attention = pytest.importorskip("diffusers.models.attention")
    theirs = attention.JointTransformerBlock(WIDTH, HEADS, CHANNELS, context_pre_only=last, qk_norm="rms_norm")
    ours = perturbed((LastJointBlock if last else JointBlock)(WIDTH, CHANNELS, 4, 0.0))
    alike(ours.stream)
    copy_stream(ours.stream, theirs, context=False)
    if last:
        ours.tokens.gain.copy_(ours.tokens.gain[:1].expand_as(ours.tokens.gain))
        shift, scale = ours.tokens.modulation.weight.chunk(2)
        theirs.norm1_context.linear.weight.copy_(torch.cat([scale, shift]))  # theirs has the scale first
        shift, scale = ours.tokens.modulation.bias.chunk(2)
        theirs.norm1_context.linear.bias.copy_(torch.cat([scale, shift]))
        for i, name in enumerate(("add_k_proj", "add_v_proj")):
            weight = ours.tokens.key_value.weight.unflatten(0, (HEADS, 2, CHANNELS))[:, i].flatten(0, 1)
            getattr(theirs.attn, name).weight.copy_(weight)
            getattr(theirs.attn, name).bias.zero_()
        theirs.attn.norm_added_k.weight.fill_(float(ours.tokens.gain[0, 0]))
    else:
        alike(ours.tokens)
        copy_stream(ours.tokens, theirs, context=True)
    x, tokens, embedding = torch.randn(2, 3, 4, WIDTH), torch.randn(2, 5, WIDTH), torch.randn(2, WIDTH)
    x_ours, tokens_ours = ours(x, tokens, None, F.silu(embedding)[:, None, None], no_turn(2))
    tokens_theirs, x_theirs = theirs(x.flatten(1, 2), tokens, embedding)
    torch.testing.assert_close(x_ours.flatten(1, 2), x_theirs, rtol=1e-4, atol=1e-5)
    if not last:
        torch.testing.assert_close(tokens_ours, tokens_theirs, rtol=1e-4, atol=1e-5)


def test_attention_to_nobody_but_oneself_passes_values_through() -> None:
    """One token alone: softmax over a single score is 1, whatever the queries, keys and positions are."""
    block = perturbed(Block(Pattern((0,)), False, WIDTH, CHANNELS, 4, 0.0))
    x, embedding = torch.randn(2, 1, WIDTH), torch.zeros(2, 1, WIDTH)
    shift, scale, gate, *mlp = block.stream.modulation(embedding).chunk(6, -1)
    value = F.linear((1 + scale) * layer_norm(x) + shift, unpacked(block.stream, 2))
    expected = block.stream.fed(x + gate * block.stream.out(value), tuple(mlp))
    torch.testing.assert_close(block(x, None, None, embedding, no_turn(1))[0], expected, rtol=1e-5, atol=1e-5)


def test_the_same_motion_at_another_rate_has_the_same_angles() -> None:
    slow, fast = small(3, rate=8.0), small(3, rate=16.0)
    for axes in ((0,), (0, 1, 2)):
        a = slow.table(axes, (4, 2, 2), torch.device("cpu"))
        b = fast.table(axes, (8, 2, 2), torch.device("cpu"))
        for one, other in zip(a, b, strict=True):
            torch.testing.assert_close(other[::2], one, rtol=1e-6, atol=1e-6)


def test_a_patch_lies_where_it_starts_in_seconds() -> None:
    steps, patches = small(3, patch=(1, 2, 2), rate=12.0), small(3, patch=(3, 2, 2), rate=12.0)
    a, b = (net.table((0,), (n, 1, 1), torch.device("cpu")) for net, n in ((steps, 9), (patches, 3)))
    torch.testing.assert_close(a.cos[::3], b.cos, rtol=1e-6, atol=1e-6)
    # the first pair of channels turns by a radian in radian_s
    net = small(1, rate=10.0, radian_s=0.5, patch=(1,))
    assert float(net.table((0,), (6,), torch.device("cpu")).cos[5, 0, 0, 0]) == pytest.approx(math.cos(1.0), abs=1e-6)


def test_seconds_are_all_that_counts_of_rate_and_unit() -> None:
    x, c_noise = data(1)
    a, b = (perturbed(small(1, rate=rate, radian_s=unit)) for rate, unit in ((10.0, 0.1), (20.0, 0.05)))
    torch.testing.assert_close(a(x, c_noise), b(x, c_noise))


def test_every_channel_of_a_head_is_turned() -> None:
    """Three axes share 8 pairs as 4, 2 and 2; over one axis all turn."""
    net = small(3, head_channels=16)
    for axes, pairs in (((0, 1, 2), (4, 2, 2)), ((1, 2), (4, 4)), ((0,), (8,))):
        table = net.table(axes, (3, 3, 3), torch.device("cpu"))
        assert table.cos.shape[-1] == 16
        moving = [(table.sin.select(axis, 1) != table.sin.select(axis, 0)).flatten(0, -2).any(0)[:8] for axis in axes]
        assert tuple(int(m.sum()) for m in moving) == pairs
        assert torch.stack(moving).sum(0).tolist() == [1] * 8


def test_far_times_keep_apart_under_half_precision() -> None:
    """A minute at 100 Hz: neighbours at its end differ in angle as they do at its start."""
    net = small(1, patch=(1,), rate=100.0)
    with torch.autocast("cpu", torch.bfloat16):
        cos, sin = net.table((0,), (6000,), torch.device("cpu"))
    assert cos.dtype == torch.float32
    angles = torch.atan2(sin[:, 0, 0, 4:], cos[:, 0, 0, 4:]).double()  # the second half holds the sines as they are
    step = (angles[1:] - angles[:-1]).remainder(2 * math.pi)
    torch.testing.assert_close(step[-1], step[0], rtol=0.02, atol=1e-6)


def test_tokens_of_a_joint_block_see_the_mean_of_the_steps_noise_levels() -> None:
    block = perturbed(JointBlock(WIDTH, CHANNELS, 4, 0.0))
    with torch.no_grad():
        block.tokens.out.weight.zero_()  # what attention brings them from the steps stands aside
    x, tokens, embedding = torch.randn(2, 3, 4, WIDTH), torch.randn(2, 5, WIDTH), torch.randn(2, 3, 1, WIDTH)
    results = [block(x, tokens, None, e, no_turn(2))[1] for e in (embedding, embedding.flip(1), embedding[:, :1])]
    torch.testing.assert_close(results[0], results[1])
    assert not torch.allclose(results[0], results[2], atol=1e-3)
