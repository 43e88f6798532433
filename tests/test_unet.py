"""U-Net over one, two and three axes: zero before training, every argument alive, every parameter reached."""

import math
from typing import Any

import pytest
import torch

from mmdiff.conditioning import Cond
from mmdiff.nn import Snake
from tests.unet_cases import SIZES, data, full, perturbed, small, without_norms


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_zero_before_training_and_of_the_right_shape(axes: int) -> None:
    net, cond = full(axes)
    x, c_noise = data(axes)
    out = net(x, c_noise, cond)
    assert out.shape == (2, 4, *SIZES[axes])
    assert out.count_nonzero() == 0


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_gradients_reach_every_parameter(axes: int) -> None:
    net, cond = full(axes)
    perturbed(net)(*data(axes), cond).square().sum().backward()
    dead = [name for name, p in net.named_parameters() if p.grad is None or p.grad.count_nonzero() == 0]
    assert not dead


@pytest.mark.parametrize("slot", ["tokens", "mask", "vector", "concat"])
def test_every_slot_of_a_condition_is_read(slot: str) -> None:
    net, cond = full(2)
    perturbed(net)
    changed = {"tokens": cond.tokens, "mask": cond.mask, "vector": cond.vector, "concat": cond.concat}
    changed[slot] = ~cond.mask if slot == "mask" else -changed[slot]
    assert not torch.allclose(net(*data(2), cond), net(*data(2), Cond(**changed)), atol=1e-4)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_one_noise_level_equals_the_same_at_every_step(axes: int) -> None:
    net = perturbed(small(axes, attend=[[], [[0]]], patch=(2,) + (1,) * (axes - 1))).double()
    x, c_noise = data(axes)
    x, steps = x.double(), c_noise[:, None].expand(2, x.shape[2])
    torch.testing.assert_close(net(x, c_noise), net(x, steps), rtol=1e-12, atol=1e-12)


def test_a_steps_noise_level_matters() -> None:
    net = perturbed(small(1))
    x, c_noise = data(1)
    steps = c_noise[:, None].repeat(1, x.shape[2])
    steps[:, -1] += 1
    assert not torch.allclose(net(x, c_noise), net(x, steps), atol=1e-4)


def test_items_of_a_batch_do_not_mix() -> None:
    net, cond = full(3)
    perturbed(net)
    x, c_noise = data(3)
    both = net(x, c_noise, cond)
    for i in range(2):
        one = Cond(cond.tokens[i : i + 1], cond.mask[i : i + 1], cond.vector[i : i + 1], cond.concat[i : i + 1])
        torch.testing.assert_close(net(x[i : i + 1], c_noise[i : i + 1], one)[0], both[i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("axes", "settings", "sizes"),
    [
        (1, {"multipliers": (1,)}, (7,)),
        (1, {"multipliers": (1, 1, 2), "factors": [[3], [5]]}, (15,)),
        (2, {"factors": [[1, 3]]}, (5, 9)),
        (3, {"factors": [[1, 2, 1]], "patch": (1, 1, 3), "kernels": [[1, 3, 3], [3, 1, 1]]}, (1, 2, 3)),
        (3, {"factors": [[1, 1, 1]]}, (5, 3, 7)),
    ],
)
def test_odd_sizes(axes: int, settings: dict[str, Any], sizes: tuple[int, ...]) -> None:
    x = torch.randn(1, 2, *sizes)
    out = perturbed(small(axes, **settings))(x, torch.rand(1))
    assert out.shape == x.shape
    assert torch.isfinite(out).all()


CHANGES: dict[str, dict[str, Any]] = {
    "channels": {"channels": 16},
    "multipliers": {"multipliers": (1, 3)},
    "factors": {"factors": [[1, 2]]},
    "blocks": {"blocks": 2},
    "kernels": {"kernels": [[1, 3], [3, 1]]},
    "attend": {"attend": [[[0]], []]},
    "patch": {"patch": (2, 1)},
    "out_channels": {"out_channels": 3},
    "dilations": {"dilations": [2]},
    "gated": {"gated": True},
    "activation": {"activation": Snake},
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_setting_changes_the_result(name: str) -> None:
    x, c_noise = data(2)
    a, b = perturbed(small(2))(x, c_noise), perturbed(small(2, **CHANGES[name]))(x, c_noise)
    assert a.shape != b.shape or not torch.allclose(a, b, atol=1e-4)


def test_head_channels_cross_and_dropout_change_the_result() -> None:
    x, c_noise = data(2)
    heads = [perturbed(small(2, attend=[[], [[0, 1]]], head_channels=h))(x, c_noise) for h in (8, 16)]
    assert not torch.allclose(*heads, atol=1e-5)
    cond = Cond(tokens=torch.randn(2, 3, 6))
    nets = [perturbed(small(2, tokens_width=6, cross=cross)) for cross in ([True, True], [False, True])]
    assert not torch.allclose(nets[0](x, c_noise, cond), nets[1](x, c_noise, cond), atol=1e-5)
    net = perturbed(small(2, dropout=0.5))
    assert not torch.allclose(net(x, c_noise), net(x, c_noise))
    net.eval()
    assert torch.equal(net(x, c_noise), net(x, c_noise))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"axes": 4}, "axes=4 must be 1, 2 or 3"),
        ({"blocks": 0}, "blocks=0 must be at least 1"),
        ({"out_channels": 0}, "out_channels=0 must be at least 1"),
        ({"in_channels": 0}, "in_channels=0 must be at least 1"),
        ({"channels": -8}, "channels=-8 must be at least 1"),
        ({"head_channels": 0}, "head_channels=0 must be at least 1"),
        ({"dropout": 1.0}, "dropout=1.0 must be from 0 to below 1"),
        ({"multipliers": (1, 0)}, r"multipliers=\[1, 0\] must start with 1.*from 1 up"),
        ({"kernels": []}, r"kernels=\[\] leaves no convolution"),
        ({"vector_width": -1}, r"the width of cond.vector, -1, must be 0"),
        ({"tokens_width": 6, "cross": [False, False]}, "tokens_width=6, but cross is False in every level"),
        ({"dilations": [1, 2]}, "dilations has 2 entries, but blocks=1 needs 1"),
        ({"dilations": [0]}, r"dilations=\[0\] must be whole numbers from 1 up"),
        ({"dilations": [2], "kernels": [[1, 3]]}, r"dilations=\[2\] act on time, but no kernel"),
        ({"multipliers": (2, 4)}, r"multipliers=\[2, 4\] must start with 1"),
        ({"multipliers": ()}, r"multipliers=\[\] must start with 1"),
        ({"factors": []}, "factors has 0 entries, but 2 multipliers need 1"),
        ({"attend": [[]]}, "attend has 1 entries, but 2 multipliers need 2"),
        ({"cross": [True]}, "cross has 1 entries"),
        ({"cross": [True, False]}, "tokens_width=0: give the width"),
        ({"factors": [[2]]}, r"factors: \[2\] must be 2 numbers"),
        ({"factors": [[0, 2]]}, r"factors: \[0, 2\] must be 2 numbers from 1 up"),
        ({"kernels": [[3]]}, r"kernels: \[3\] must be 2 numbers"),
        ({"kernels": [[2, 3]]}, "even length"),
        ({"patch": (2,)}, r"patch: \[2\] must be 2 numbers"),
        ({"attend": [[], [[2]]]}, r"attend=\[2\] must name different axes"),
        ({"attend": [[[0]], []], "head_channels": 5}, "channels=8 is not a multiple of head_channels=5"),
    ],
)
def test_settings_that_disagree_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**{"axes": 2, **settings})


def test_inputs_that_do_not_fit_are_refused() -> None:
    net = small(2, tokens_width=6, concat_channels=1, patch=(2, 1))
    x, c_noise = data(2)
    cond = Cond(tokens=torch.randn(2, 3, 6), concat=torch.randn(2, 1, *SIZES[2]))
    net(x, c_noise, cond)
    with pytest.raises(ValueError, match=r"axes=2 takes 4 dimensions"):
        net(x[0], c_noise, cond)
    with pytest.raises(ValueError, match="x has 3 channels, but the network was built with in_channels=2"):
        net(torch.cat([x, x[:, :1]], dim=1), c_noise, cond)
    with pytest.raises(ValueError, match=r"needs \(B,\) or \(B, T\)"):
        net(x, c_noise[:1], cond)
    with pytest.raises(ValueError, match="cond.tokens has width 0, but the network was built with tokens_width=6"):
        net(x, c_noise)
    with pytest.raises(ValueError, match="cond.vector has width 5, but the network was built with vector_width=0"):
        net(x, c_noise, Cond(cond.tokens, vector=torch.randn(2, 5), concat=cond.concat))
    with pytest.raises(ValueError, match="cond.concat has width 2, but the network was built with concat_channels=1"):
        net(x, c_noise, Cond(cond.tokens, concat=torch.randn(2, 2, *SIZES[2])))
    with pytest.raises(ValueError, match=r"cond.concat has sizes \(6, 4\), but x has \(12, 4\)"):
        net(x, c_noise, Cond(cond.tokens, concat=torch.randn(2, 1, 6, 4)))
    with pytest.raises(ValueError, match="cond.tokens has a batch of 1, but x has 2"):
        net(x, c_noise, Cond(cond.tokens[:1], concat=cond.concat))
    with pytest.raises(ValueError, match=r"cond.mask has shape \(2, 4\), but cond.tokens is \(2, 3, 6\)"):
        net(x, c_noise, Cond(cond.tokens, torch.ones(2, 4, dtype=torch.bool), concat=cond.concat))


def test_one_error_names_the_nearest_legal_size_of_every_axis() -> None:
    net = small(3, factors=[[1, 2, 2]], patch=(1, 2, 1))
    with pytest.raises(
        ValueError, match="H=6 is not a multiple of 4; nearest: 4 or 8, and W=5 is not a multiple of 2; nearest: 4 or 6"
    ):
        net(torch.randn(1, 2, 3, 6, 5), torch.rand(1))
    net(torch.randn(1, 2, 3, 8, 6), torch.rand(1))
    with pytest.raises(ValueError, match="T=0 is not a multiple of 1; nearest: 1"):
        net(torch.randn(1, 2, 0, 8, 6), torch.rand(1))


def test_any_object_with_the_four_slots_is_a_condition() -> None:
    class Slots:
        tokens = mask = concat = None
        vector = torch.randn(2, 5)

    net = perturbed(small(1, vector_width=5))
    x, c_noise = data(1)
    assert torch.equal(net(x, c_noise, Slots()), net(x, c_noise, Cond(vector=Slots.vector)))


def test_time_attention_carries_far_what_convolution_carries_near() -> None:
    x, c_noise = data(1)
    steps, reach = c_noise[:, None].expand(2, x.shape[2]), []
    for attend in ([[]], [[[0]]]):
        net = perturbed(small(1, multipliers=(1,), kernels=[[1]], attend=attend))
        without_norms(net)
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(net(x, steps)[:, :, 0].sum(), x)
        reach.append(int((gradient[0].abs().sum(0) > 0).sum()))
    assert reach == [3, math.prod(SIZES[1])]  # stem and head have kernels of 3: two steps to the right, and itself
