"""Transformer over one, two and three axes: zero before training, every argument alive, every parameter reached."""

from typing import Any

import pytest
import torch

from mmdiff.backbones import DiT, DiT1D, SpatioTemporalDiT
from mmdiff.conditioning import Cond
from tests.dit_cases import ATTEND, SIZES, data, full, perturbed, small

KINDS = [(axes, joint) for axes in (1, 2, 3) for joint in (False, True)]


@pytest.mark.parametrize(("axes", "joint"), KINDS)
def test_exactly_zero_before_training_and_of_the_right_shape(axes: int, joint: bool) -> None:
    net, cond = full(axes, joint=joint)
    out = net(*data(axes), cond)
    assert out.shape == (2, 4, *SIZES[axes])
    assert out.count_nonzero() == 0


def test_the_first_step_moves_the_result_by_a_head_that_is_not_zero() -> None:
    """What is zero is the last norm: it gets its gradient at once, and head and blocks theirs a step later."""
    net, cond = full(3)
    assert net.head.weight.std() > 0.1
    moved = []
    for _ in range(2):
        net.zero_grad()
        (net(*data(3), cond) - 1).square().mean().backward()
        moved.append({name.split(".")[0] for name, p in net.named_parameters() if p.ndim == 2 and p.grad.any()})
        with torch.no_grad():
            for parameter in net.parameters():
                parameter -= 0.1 * parameter.grad.sign()
    assert moved[0] == {"modulation"}
    assert {"modulation", "head", "blocks"} <= moved[1]


@pytest.mark.parametrize(("axes", "joint"), KINDS)
def test_gradients_reach_every_parameter(axes: int, joint: bool) -> None:
    net, cond = full(axes, joint=joint)
    perturbed(net)(*data(axes), cond).square().sum().backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None or p.grad.count_nonzero() == 0]


def test_a_seed_gives_the_same_network_and_result_again() -> None:
    results = []
    for _ in range(2):
        net, cond = full(3)
        results.append(perturbed(net)(*data(3), cond))
    assert torch.equal(*results)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("slot", ["tokens", "mask", "vector", "concat"])
def test_every_slot_of_a_condition_is_read(slot: str, joint: bool) -> None:
    net, cond = full(2, joint=joint)
    perturbed(net)
    slots = {"tokens": cond.tokens, "mask": cond.mask, "vector": cond.vector, "concat": cond.concat}
    slots[slot] = ~cond.mask if slot == "mask" else -slots[slot]
    assert not torch.allclose(net(*data(2), cond), net(*data(2), Cond(**slots)), atol=1e-4)


@pytest.mark.parametrize("joint", [False, True])
def test_masked_tokens_are_as_good_as_absent(joint: bool) -> None:
    net, cond = full(3, joint=joint)
    perturbed(net)
    mask = torch.tensor([[True, False, True]] * 2)
    with_mask = Cond(torch.where(mask[..., None], cond.tokens, 1e3), mask, cond.vector, cond.concat)
    without = Cond(cond.tokens[:, [0, 2]], None, cond.vector, cond.concat)
    torch.testing.assert_close(net(*data(3), with_mask), net(*data(3), without), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("joint", [False, True])
def test_a_row_of_tokens_with_nothing_to_attend_is_finite_and_ignores_them(joint: bool) -> None:
    net, cond = full(2, joint=joint)
    perturbed(net)
    mask = torch.tensor([[False, False, False], [True, True, True]])
    out = [net(*data(2), Cond(sign * cond.tokens, mask, cond.vector, cond.concat)) for sign in (1, -1)]
    assert torch.isfinite(out[0]).all()
    torch.testing.assert_close(out[0][0], out[1][0])
    assert not torch.allclose(out[0][1], out[1][1], atol=1e-4)
    net.zero_grad()
    out[0].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


@pytest.mark.parametrize(("axes", "joint"), KINDS)
def test_one_noise_level_equals_the_same_at_every_step(axes: int, joint: bool) -> None:
    net, cond = full(axes, joint=joint)
    net = perturbed(net).double()
    cond = Cond(cond.tokens.double(), cond.mask, cond.vector.double(), cond.concat.double())
    x, c_noise = data(axes)
    x, steps = x.double(), c_noise[:, None].expand(2, x.shape[2])
    torch.testing.assert_close(net(x, c_noise, cond), net(x, steps, cond), rtol=1e-10, atol=1e-10)


def test_a_patch_sees_the_mean_of_its_steps_noise_embeddings() -> None:
    net = perturbed(small(1, depth=1))  # patches of 2 steps
    x, _ = data(1)
    swapped, moved = torch.zeros(2, 8), torch.zeros(2, 8)
    swapped[:, 3], swapped[:, 2] = 1, 0.5
    moved[:, 2], moved[:, 3] = 1, 0.5
    torch.testing.assert_close(net(x, swapped), net(x, moved))
    assert not torch.allclose(net(x, swapped), net(x, torch.zeros(2)), atol=1e-4)


def test_a_steps_noise_level_modulates_that_step() -> None:
    """Without attention over time no other step can tell."""
    net = perturbed(small(3, attend=[[1, 2]]))
    x, c_noise = data(3)
    steps = c_noise[:, None].repeat(1, 3)
    steps[:, 1] += 1
    change = (net(x, steps) - net(x, c_noise)).abs().amax(dim=(0, 1, 3, 4))
    assert change[1] > 1e-3
    assert change[[0, 2]].max() < 1e-6


@pytest.mark.parametrize(("axes", "joint"), KINDS)
def test_items_of_a_batch_do_not_mix(axes: int, joint: bool) -> None:
    net, cond = full(axes, joint=joint)
    perturbed(net)
    x, c_noise = data(axes)
    both = net(x, c_noise, cond)
    for i in range(2):
        one = Cond(cond.tokens[i : i + 1], cond.mask[i : i + 1], cond.vector[i : i + 1], cond.concat[i : i + 1])
        torch.testing.assert_close(net(x[i : i + 1], c_noise[i : i + 1], one)[0], both[i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ({"patch": (1,)}, (1,)),
        ({"patch": (3,)}, (15,)),
        ({"patch": (1,), "window": [4]}, (7,)),
        ({"patch": (2, 5)}, (6, 5)),
        ({"patch": (1, 2, 2)}, (1, 6, 2)),
        ({"patch": (2, 3, 1), "attend": [[1, 2], [0]]}, (6, 9, 7)),
        ({"patch": (1, 1, 1), "window": [2, 2, 3], "depth": 3}, (5, 3, 7)),
    ],
)
def test_any_multiples_of_the_patch(settings: dict[str, Any], sizes: tuple[int, ...]) -> None:
    x = torch.randn(1, 2, *sizes)
    out = perturbed(small(**settings))(x, torch.rand(1))
    assert out.shape == x.shape
    assert torch.isfinite(out).all()


def test_factorised_attention_keeps_the_other_axes_apart() -> None:
    """One block of space leaves time apart, one of time leaves space apart, both mix all: seen by gradients."""
    reached = {}
    for name, attend, depth in (("space", [[1, 2]], 1), ("time", [[0]], 1), ("both", [[1, 2], [0]], 2)):
        net = perturbed(small(3, patch=(1, 1, 1), attend=attend, depth=depth))
        x = torch.randn(2, 2, 3, 4, 2, requires_grad=True)
        (gradient,) = torch.autograd.grad(net(x, torch.rand(2))[0, :, 1, 2, 0].sum(), x)
        assert gradient[1].count_nonzero() == 0
        reached[name] = gradient[0].abs().sum(0) > 0
    assert reached["space"][1].all()
    assert not reached["space"][[0, 2]].any()
    assert reached["time"][:, 2, 0].all()
    assert reached["time"].sum() == 3
    assert reached["both"].all()


def test_shifted_windows_connect_what_windows_part() -> None:
    reached = []
    for depth in (1, 2):
        net = perturbed(small(1, patch=(1,), window=[4], depth=depth))
        x = torch.randn(1, 2, 8, requires_grad=True)
        (gradient,) = torch.autograd.grad(net(x, torch.rand(1))[0, :, 2].sum(), x)
        reached.append((gradient[0].abs().sum(0) > 0).tolist())
    assert reached[0] == [True] * 4 + [False] * 4
    assert reached[1] == [True] * 8


def test_what_shifts_with_the_data_shifts_the_result() -> None:
    """Positions are relative: two equal clips that start elsewhere get equal results (cut so that borders agree)."""
    net = perturbed(small(1, patch=(1,), window=[4], depth=1)).double()
    x = torch.randn(1, 2, 12, dtype=torch.float64)
    c_noise = torch.rand(1)
    torch.testing.assert_close(net(x, c_noise)[..., 4:], net(x[..., 4:], c_noise), rtol=1e-5, atol=1e-5)


CHANGES: dict[str, dict[str, Any]] = {
    "patch": {"patch": (1, 1)},
    "attend": {"attend": [[0]]},
    "window": {"window": [2, 0]},
    "out_channels": {"out_channels": 3},
    "width": {"width": 24},
    "depth": {"depth": 3},
    "head_channels": {"head_channels": 16},
    "mlp_ratio": {"mlp_ratio": 2},
    "rate": {"rate": 5.0},
    "radian_s": {"radian_s": 1.0},
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_setting_changes_the_result(name: str) -> None:
    x, c_noise = data(2)
    a, b = perturbed(small(2))(x, c_noise), perturbed(small(2, **CHANGES[name]))(x, c_noise)
    assert a.shape != b.shape or not torch.allclose(a, b, atol=1e-4)


def test_cross_joint_and_dropout_change_the_result() -> None:
    x, c_noise = data(2)
    cond = Cond(tokens=torch.randn(2, 3, 6))
    kinds = ({"attend": ATTEND[2]}, {"attend": ATTEND[2], "cross": [True, False]}, {"joint": True})
    results = [perturbed(small(2, tokens_width=6, **kind))(x, c_noise, cond) for kind in kinds]
    assert not torch.allclose(results[0], results[1], atol=1e-4)
    assert not torch.allclose(results[0], results[2], atol=1e-4)
    net = perturbed(small(2, dropout=0.5))
    assert not torch.allclose(net(x, c_noise), net(x, c_noise))
    net.eval()
    assert torch.equal(net(x, c_noise), net(x, c_noise))


def test_named_networks_are_dit_with_other_defaults() -> None:
    settings: dict[str, Any] = {"width": 16, "depth": 2, "head_channels": 8}
    for named, plain, sizes in (
        (SpatioTemporalDiT(2, **settings), DiT(2, (1, 2, 2), [[1, 2], [0]], **settings), (3, 4, 4)),
        (SpatioTemporalDiT(2, attend=[[0, 1, 2]], **settings), DiT(2, (1, 2, 2), **settings), (3, 4, 4)),
        (DiT1D(2, (2,), **settings), DiT(2, (2,), **settings), (8,)),
    ):
        plain.load_state_dict(perturbed(named).state_dict())
        x = torch.randn(1, 2, *sizes)
        assert torch.equal(named(x, torch.zeros(1)), plain(x, torch.zeros(1)))


@pytest.mark.parametrize(("size", "millions"), [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_sizes_are_those_of_the_paper(size: str, millions: int) -> None:
    with torch.device("meta"):
        net = getattr(SpatioTemporalDiT, size)(4, rate=8.0)
    assert isinstance(net, SpatioTemporalDiT)
    assert net.rate == 8.0
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, rel=0.02)
