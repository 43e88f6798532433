"""ControlNet over both families: the bare backbone before training, the hint's follower after it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mmdiff.backbones import ControlNet, DiT, UNet
from mmdiff.conditioning import Cond

SIZES = {1: (8,), 2: (8, 4), 3: (4, 4, 8)}


def unet(axes: int, **settings: object) -> nn.Module:
    return UNet(axes, 3, channels=8, multipliers=[1, 2], head_channels=4, **settings)


def dit(axes: int, patch: tuple[int, ...] | None = None, **settings: object) -> nn.Module:
    return DiT(3, patch or (1,) * axes, width=16, depth=3, head_channels=8, **settings)


FAMILIES = {"unet": unet, "dit": dit}


def awake(module: nn.Module) -> nn.Module:
    """The module with no weight at zero, as after training: an untrained backbone gives zero whatever it is told."""
    for parameter in module.parameters():
        with torch.no_grad():
            parameter += 0.1 * torch.randn_like(parameter)
    return module


def inputs(axes: int, *, concat: int = 2, per_step: bool = False, **slots: Tensor) -> tuple[Tensor, Tensor, Cond]:
    x = torch.randn(2, 3, *SIZES[axes])
    c_noise = torch.randn(2, x.shape[2]) if per_step else torch.randn(2)
    return x, c_noise, Cond(concat=torch.randn(2, concat, *SIZES[axes]), **slots)


def trained(net: ControlNet, steps: int) -> ControlNet:
    """After some steps on random data."""
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        net(*inputs(len(net.backbone.patch), concat=net.concat_channels)).square().mean().backward()
        optimizer.step()
    return net


families = pytest.mark.parametrize("family", FAMILIES)


@families
@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("patched", [False, True], ids=["whole", "patched"])
@pytest.mark.parametrize("per_step", [False, True], ids=["item", "step"])
def test_untrained_it_is_the_bare_backbone_bit_for_bit(family: str, axes: int, patched: bool, per_step: bool) -> None:
    """Within 1e-5 where gradients are on: for what needs one, torch takes other kernels."""
    patch = (2,) * axes if patched else (1,) * axes
    bare = awake(FAMILIES[family](axes, patch=patch, tokens_width=5, vector_width=6, concat_channels=1))
    slots = {"tokens": torch.randn(2, 3, 5), "mask": torch.rand(2, 3) < 0.7, "vector": torch.randn(2, 6)}
    x, c_noise, cond = inputs(axes, concat=3, per_step=per_step, **slots)
    net, own = ControlNet(bare, hint_channels=2), replace(cond, concat=cond.concat[:, :1])
    with torch.no_grad():
        expected = bare(x, c_noise, own)
        assert expected.abs().min() > 0
        assert torch.equal(net(x, c_noise, cond), expected)
    assert (net(x, c_noise, cond) - expected).abs().max() < 1e-5


@families
def test_the_copy_is_the_first_half_with_the_backbone_s_weights(family: str) -> None:
    bare = awake(FAMILIES[family](3))
    net = ControlNet(bare, 2)
    own, state = net.copy.state_dict(), bare.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in own.items())
    assert len(own) < len(state)
    assert all(a is not b for a, b in zip(net.copy.parameters(), bare.parameters(), strict=False))
    x, c_noise, _ = inputs(3)
    taps = zip(net.copy.taps(x, c_noise), bare.taps(x, c_noise), strict=True)
    assert all((a - b).abs().max() < 1e-5 for a, b in taps)


@families
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_all_that_trains_gets_a_gradient_by_the_third_step(family: str, axes: int) -> None:
    net = ControlNet(awake(FAMILIES[family](axes)), 2)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    alive = []
    for _ in range(3):
        optimizer.zero_grad()
        net(*inputs(axes)).square().mean().backward()
        alive.append({name for name, p in net.named_parameters() if p.grad is not None and p.grad.abs().max() > 0})
        optimizer.step()
    trainable = {name for name, p in net.named_parameters() if p.requires_grad}
    assert alive[0] == {name for name in trainable if name.startswith("joins.")}
    assert alive[2] == trainable


@families
@pytest.mark.parametrize("freeze", [True, False], ids=["frozen", "free"])
def test_a_frozen_backbone_keeps_its_weights_and_a_free_one_does_not(family: str, freeze: bool) -> None:
    net = ControlNet(awake(FAMILIES[family](1)), 2, freeze=freeze)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    trained(net, 4)
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert {name for name in before if not name.startswith("backbone.")} <= changed
    assert any(name.startswith("backbone.") for name in changed) is not freeze


@families
def test_scale_weakens_the_control_down_to_the_bare_backbone(family: str) -> None:
    net = trained(ControlNet(awake(FAMILIES[family](2)), 2), 3).eval()
    x, c_noise, cond = inputs(2)
    with torch.no_grad():
        bare = net.backbone(x, c_noise)
        distances = []
        for scale in (0.0, 0.5, 1.0):
            net.scale = scale
            distances.append(float((net(x, c_noise, cond) - bare).norm()))
    assert distances[0] == 0
    assert 0 < distances[1] < distances[2]


def toy(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Data whose sign changes at a random place, which the hint shows, and noise says nothing of."""
    place = torch.randint(2, 15, (n, 1, 1), generator=generator)
    hint = torch.where(torch.arange(16) < place, 1.0, -1.0)
    return hint * torch.tensor([0.5, 0.8, 1.0])[:, None], hint


@families
def test_it_learns_to_follow_its_hint_and_the_right_one(family: str) -> None:
    """Flow matching at t = 0.9, where the noised data tells little: the right hint more than halves the loss."""
    generator = torch.Generator().manual_seed(0)

    def loss(net: nn.Module, hinted: bool, shuffle: bool = False) -> Tensor:
        x0, hint = toy(32, generator)
        noise = torch.randn(x0.shape, generator=generator)
        cond = Cond(concat=hint.roll(1, 0) if shuffle else hint) if hinted else None
        out = net(0.1 * x0 + 0.9 * noise, torch.full((32,), 0.9), cond)
        return (out - (noise - x0)).square().mean()

    def fit(net: nn.Module, hinted: bool, steps: int) -> None:
        optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=0.01)
        for _ in range(steps):
            optimizer.zero_grad()
            loss(net, hinted).backward()
            optimizer.step()

    bare = FAMILIES[family](1)
    fit(bare, hinted=False, steps=40)
    before = {name: value.clone() for name, value in bare.state_dict().items()}
    net = ControlNet(bare, 1)
    fit(net, hinted=True, steps=40)
    with torch.no_grad():
        right, wrong, none = loss(net, True), loss(net, True, shuffle=True), loss(bare, False)
    assert right < 0.5 * none
    assert right < 0.3 * wrong
    assert all(torch.equal(value, before[name]) for name, value in bare.state_dict().items())


@families
def test_it_starts_from_the_weights_of_a_trained_backbone(family: str) -> None:
    donor, net = awake(FAMILIES[family](1)), ControlNet(FAMILIES[family](1), 2)
    net.start_from(donor.state_dict())
    x, c_noise, cond = inputs(1)
    with torch.no_grad():
        assert torch.equal(net(x, c_noise, cond), donor.requires_grad_(False)(x, c_noise))
        assert torch.equal(net.copy.requires_grad_(False).taps(x, c_noise)[-1], donor.taps(x, c_noise)[-1])
    with pytest.raises(ValueError, match="the weights are not of this"):
        net.start_from(nn.Linear(2, 2).state_dict())


@families
def test_it_is_stored_with_its_backbone(family: str, tmp_path: Path) -> None:
    net = trained(ControlNet(awake(FAMILIES[family](2)), 2, scale=0.7), 3).eval()
    net.save_pretrained(tmp_path)
    again = ControlNet.from_pretrained(tmp_path)
    given = inputs(2)
    with torch.no_grad():
        assert torch.equal(again(*given), net(*given))
    assert again.scale == 0.7
    assert not any(p.requires_grad for p in again.backbone.parameters())


@families
def test_the_hint_reaches_the_stem_where_it_stands(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two convolutions of 3 reach 2 cells: what is changed in a corner changes the patches of that corner alone."""
    net = ControlNet(FAMILIES[family](3, patch=(1, 2, 2)), 1)
    nn.init.normal_(net.enter.weight)
    seen: list[Tensor] = []
    taps = net.copy.taps
    monkeypatch.setattr(net.copy, "taps", lambda *args, hint: (seen.append(hint), taps(*args, hint=hint))[1])
    x, hint = torch.randn(1, 3, 4, 8, 16), torch.randn(1, 1, 4, 8, 16)
    other = hint.clone()
    other[..., 0, 0, 0] += 1
    for given in (hint, other):
        net(x, torch.zeros(1), Cond(concat=given))
    changed = (seen[0] - seen[1]).abs().amax(dim=net.backbone.tap_axis).reshape(4, 4, 8) > 0
    assert changed[:3, :2, :2].all()
    assert changed.sum() == 3 * 2 * 2


@families
def test_checkpointing_gives_the_same_gradients(family: str) -> None:
    net = trained(ControlNet(awake(FAMILIES[family](1)), 2), 2)
    given, gradients = inputs(1), []
    for checkpoint in (False, True):
        net.zero_grad()
        net.backbone.checkpoint = net.copy.checkpoint = checkpoint
        net(*given).square().sum().backward()
        gradients.append({name: p.grad for name, p in net.named_parameters() if p.requires_grad})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@families
def test_it_runs_in_half_precision_by_autocast(family: str) -> None:
    net = trained(ControlNet(awake(FAMILIES[family](1)), 2), 2)
    given = inputs(1)
    expected = net(*given)
    with torch.autocast("cpu", torch.bfloat16):
        got = net(*given)
    assert 0 < (got - expected).abs().max() < 0.1 * expected.abs().max()


@families
def test_it_compiles_without_a_graph_break(family: str) -> None:
    net = trained(ControlNet(awake(FAMILIES[family](1)), 2), 2)
    given = inputs(1)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    assert (compiled(*given) - net(*given)).abs().max() < 1e-5


def test_a_condition_without_its_hint_is_refused() -> None:
    net = ControlNet(unet(1, concat_channels=1), hint_channels=2)
    x, c_noise, _ = inputs(1)
    message = "cond.concat has {} channels; the backbone's concat_channels=1 and after them hint_channels=2 are due"
    for cond, found in ((None, 0), (Cond(), 0), (Cond(concat=x[:, :2]), 2)):
        with pytest.raises(ValueError, match=message.format(found)):
            net(x, c_noise, cond)
    with pytest.raises(ValueError, match=r"cond.concat has sizes \(4,\), but x has \(8,\)"):
        net(x, c_noise, Cond(concat=x[..., :4]))


def test_what_has_no_taps_or_no_channels_is_refused() -> None:
    with pytest.raises(ValueError, match="backbone=Linear has no control taps"):
        ControlNet(nn.Linear(2, 2), 1)
    with pytest.raises(ValueError, match="hint_channels=0 and width=32 must be at least 1"):
        ControlNet(unet(1), 0)
