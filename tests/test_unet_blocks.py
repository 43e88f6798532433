"""Blocks of the U-Net against references: diffusers' residual block, WaveNet's by its formula, receptive fields."""

import math

import pytest
import torch
from torch import Tensor, nn

from mmdiff.backbones import UNet1D
from mmdiff.backbones.blocks import GatedBlock, ResBlock
from mmdiff.nn import AdaGroupNorm, Snake
from tests.unet_cases import perturbed, small, without_norms


def perturb(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize(("c_in", "c_out"), [(32, 32), (32, 64)])
def test_residual_block_is_diffusers_own_with_scale_and_shift(c_in: int, c_out: int) -> None:
    resnet = pytest.importorskip("diffusers.models.resnet")
    block = ResBlock(c_in, c_out, 16, [(3, 3)])
    perturb(block)
    groups = block.norm_in.num_groups, block.norm_out.norm.num_groups
    theirs = resnet.ResnetBlock2D(
        in_channels=c_in,
        out_channels=c_out,
        temb_channels=16,
        groups=groups[0],
        groups_out=groups[1],
        eps=1e-5,
        time_embedding_norm="scale_shift",
    )
    parts = {
        "norm1": block.norm_in,
        "conv1": block.conv_in[0],
        "norm2": block.norm_out.norm,
        "time_emb_proj": block.norm_out.affine,
        "conv2": block.conv_out[0],
        "conv_shortcut": block.skip,
    }
    state = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}
    theirs.load_state_dict(state)
    x, embedding = torch.randn(2, c_in, 6, 5), torch.randn(2, 16)
    torch.testing.assert_close(
        block(x, nn.functional.silu(embedding)), theirs(x, embedding), rtol=1e-5, atol=1e-5
    )  # diffusers activates the embedding in each block, we once for all


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_adaptive_norm_in_one_pass_is_norm_scale_shift(layout: torch.memory_format) -> None:
    norm = AdaGroupNorm(24, 5).double()
    perturb(norm)
    x = torch.randn(3, 24, 4, 6, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    embedding = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    scale, shift = norm.affine(embedding)[..., None, None].chunk(2, dim=1)
    expected, found = norm.norm(x) * (1 + scale) + shift, norm(x, embedding)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(expected)
    inputs = [x, embedding, *norm.parameters()]
    gradients = [torch.autograd.grad((y * weight).sum(), inputs) for y in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


def test_gated_block_is_wavenet_s_formula() -> None:
    block = GatedBlock(4, 8, 6, [(3,)], dilation=2)
    x, embedding = torch.randn(2, 4, 20), torch.randn(2, 6)
    assert torch.equal(block(x, embedding), block.skip(x))
    perturb(block)
    y = nn.functional.pad(block.norm(x, embedding), (2, 2))
    taps = torch.stack([y[..., 2 * k : 2 * k + 20] for k in range(3)], dim=-1)  # x[t - 2], x[t], x[t + 2]
    conv = block.conv[0]
    z = torch.einsum("bctk,ock->bot", taps, conv.weight) + conv.bias[:, None]
    gate = torch.tanh(z[:, :8]) * torch.sigmoid(z[:, 8:])
    expected = block.skip(x) + torch.einsum("bct,oc->bot", gate, block.out.weight[..., 0]) + block.out.bias[:, None]
    torch.testing.assert_close(block(x, embedding), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "residual"])
@pytest.mark.parametrize("dilations", [[1, 2, 4, 8], [1, 1, 1, 1], [8, 1]])
def test_a_dilated_stack_reaches_exactly_as_far_as_its_dilations_say(dilations: list[int], gated: bool) -> None:
    """The middle output sees `reach` steps to each side and not one more, by gradient."""
    net = perturbed(small(1, multipliers=(1,), blocks=len(dilations), dilations=dilations, gated=gated))
    without_norms(net)
    convolutions = 1 if gated else 2  # in a block
    # stem and head see one step each; down and up go through the dilations once each, the two middle blocks do not
    reach = 2 + 2 * convolutions * sum(dilations) + 2 * convolutions
    length = 2 * reach + 21
    x = torch.randn(1, 2, length, requires_grad=True, dtype=torch.float64)
    out = net.double()(x, torch.rand(1, length))
    (gradient,) = torch.autograd.grad(out[:, :, length // 2].sum(), x)
    seen = gradient[0].abs().sum(0).nonzero().flatten()
    assert (int(seen[0]), int(seen[-1])) == (length // 2 - reach, length // 2 + reach)
    if max(dilations) == 8 and dilations[0] == 1:
        assert len(seen) == 2 * reach + 1, "a doubling stack leaves no hole"


def test_dilation_acts_on_time_alone() -> None:
    net = small(2, dilations=[3])
    assert {conv.dilation for block in net.down for conv in block[0].res.conv_in} == {(3, 1)}
    assert {conv.dilation for block in net.middle for conv in block.res.conv_in} == {(1, 1)}


@pytest.mark.parametrize(
    ("settings", "length"),
    [
        ({"factors": [[4], [4], [4], [2]], "multipliers": [1, 1, 2, 2, 2], "patch": None}, 16384),
        ({"factors": [[4], [4], [4], [2]], "multipliers": [1, 1, 2, 2, 2], "patch": [2]}, 256 * 75),
        ({"gated": True, "blocks": 5, "dilations": [1, 2, 4, 8, 16], "multipliers": [1], "patch": None}, 16411),
        ({"activation": Snake, "multipliers": [1, 2], "factors": [[8]]}, 48_000),
    ],
    ids=["strided", "odd", "DiffWave", "snake"],
)
def test_waveforms_of_thousands_of_samples(settings: dict, length: int) -> None:
    attend = {"attend": [[] for _ in settings["multipliers"]]} if len(settings["multipliers"]) == 1 else {}
    net = perturbed(UNet1D(1, channels=8, head_channels=8, **attend, **settings))
    x = torch.randn(1, 1, length)
    out = net(x, torch.rand(1))
    assert out.shape == x.shape
    assert torch.isfinite(out).all()
    if net.multiples[0] > 1:
        below = length - net.multiples[0]
        with pytest.raises(ValueError, match=f"T={length - 1} is not a multiple.*nearest: {below} or {length}"):
            net(x[..., 1:], torch.rand(1))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_snake_is_its_formula_and_oscillates_with_alpha(axes: int) -> None:
    snake = Snake(3)
    alpha = torch.tensor([0.3, 1.0, 7.0])
    with torch.no_grad():
        snake.log_alpha.copy_(alpha.log())
    x = 4 * torch.randn(2, 3, *(5, 4, 3)[:axes])
    wide = alpha.reshape(-1, *(1,) * axes)
    torch.testing.assert_close(snake(x), x + torch.sin(wide * x) ** 2 / wide, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(snake(x), x + (1 - torch.cos(2 * wide * x)) / (2 * wide), rtol=1e-5, atol=1e-5)


def test_snake_is_safe_for_any_alpha_and_monotonic() -> None:
    """Its slope 1 + sin(2 alpha x) is never negative; a tiny alpha makes it the identity, not a division by zero."""
    x = torch.linspace(-20, 20, 4001).reshape(1, 1, -1).requires_grad_()
    for exponent in (-60.0, -20.0, 0.0, 3.0):
        snake = Snake(1)
        with torch.no_grad():
            snake.log_alpha.fill_(exponent)
        y = snake(x)
        (slope,) = torch.autograd.grad(y.sum(), x)
        assert torch.isfinite(y).all()
        assert slope.min() > -1e-3
        torch.testing.assert_close(slope, 1 + torch.sin(2 * math.exp(exponent) * x), rtol=1e-3, atol=2e-3)
    with pytest.raises(ValueError, match="alpha=0 must be above 0"):
        Snake(1, alpha=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_snake_keeps_the_type_of_what_it_gets(dtype: torch.dtype) -> None:
    snake = Snake(2, alpha=2.0)
    x = torch.randn(1, 2, 50)
    assert snake(x.to(dtype)).dtype == dtype
    torch.testing.assert_close(snake(x.to(dtype)).float(), snake(x), rtol=0.05, atol=0.05)


def test_a_network_with_snake_is_stored_and_built_again(tmp_path: object) -> None:
    net = perturbed(UNet1D(1, channels=8, multipliers=[1, 2], head_channels=8, activation=Snake))
    again = UNet1D.from_pretrained(net.save_pretrained(tmp_path))  # type: ignore[arg-type]
    x, c_noise = torch.randn(1, 1, 64), torch.rand(1)
    assert torch.equal(again(x, c_noise), net(x, c_noise))
    assert sum(isinstance(module, Snake) for module in again.modules()) == snakes(net) > 0


def snakes(net: nn.Module) -> int:
    return sum(isinstance(module, Snake) for module in net.modules())


def test_every_activation_is_one_of_its_own() -> None:
    net = small(2, activation=Snake, blocks=2)
    assert snakes(net) == 2 * (2 * 2 * 2 + 2) + 1  # two in each of the blocks down, up and middle, one before the head
    parameters: list[Tensor] = [module.log_alpha for module in net.modules() if isinstance(module, Snake)]
    assert len({id(p) for p in parameters}) == len(parameters)
