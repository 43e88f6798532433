"""Training and sampling with the transformer: checkpointing, compiling, half precision, control taps, errors."""

from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser
from torch import Tensor, nn

from mmdiff.backbones import DiT1D, SpatioTemporalDiT
from mmdiff.conditioning import Cond
from mmdiff.config import build
from tests.dit_cases import SIZES, data, full, perturbed, small


def gradients(net: nn.Module, axes: int, cond: Cond) -> list[Tensor]:
    net.zero_grad()
    torch.manual_seed(5)
    x, c_noise = data(axes)
    x.requires_grad_()
    net(x, c_noise, cond).square().sum().backward()
    return [x.grad, *(p.grad for p in net.parameters())]


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_checkpointing_gives_equal_gradients_exactly(joint: bool, training: bool) -> None:
    """With dropout too, in training mode, and as well out of it."""
    settings: dict[str, Any] = {"dropout": 0.3, "joint": joint}
    plain, cond = full(3, **settings)
    light, _ = full(3, **settings, checkpoint=True)
    results = [gradients(perturbed(net).train(training), 3, cond) for net in (plain, light)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_checkpointing_runs_blocks_again_only_where_gradients_are_due() -> None:
    counts = []
    for settings, grad in (({}, True), ({"checkpoint": True}, True), ({"checkpoint": True}, False)):
        net = perturbed(small(2, **settings)).eval()
        calls: list[int] = []
        net.blocks[0].stream.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        net.blocks[0].stream.mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        with torch.set_grad_enabled(grad):
            out = net(*data(2))
        if grad:
            out.sum().backward()
        counts.append(len(calls))
    assert counts == [1, 2, 1]


VARIANTS: dict[str, dict[str, Any]] = {
    "cross": {},
    "joint": {"joint": True},
    "windows": {"window": [2, 3, 0], "depth": 4},
    "checkpoint": {"checkpoint": True},
}


@pytest.mark.parametrize("name", ["joint", "checkpoint"])
def test_compiles_without_graph_breaks(name: str) -> None:
    net, cond = full(3, **VARIANTS[name])
    perturbed(net)
    torch.compiler.reset()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*data(3), cond), net(*data(3), cond), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_compiled_network_takes_other_sizes() -> None:
    net = perturbed(small(3, window=[2, 3, 0], depth=4))
    torch.compiler.reset()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    for sizes in ((3, 4, 4), (5, 4, 4), (4, 8, 2), (1, 2, 2)):
        x, c_noise = torch.randn(2, 2, *sizes), torch.rand(2)
        torch.testing.assert_close(compiled(x, c_noise), net(x, c_noise), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("name", "backend"), [*((name, "aot_eager") for name in VARIANTS), ("windows", "inductor")])
def test_compiled_training_has_equal_gradients(name: str, backend: str) -> None:
    net, cond = full(3, **VARIANTS[name])
    perturbed(net)
    torch.compiler.reset()
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    x, c_noise = data(3)
    for noise in (c_noise, c_noise[:, None].expand(2, 3)):
        net.zero_grad()
        out = net(x, noise, cond)
        out.sum().backward()
        plain = [p.grad for p in net.parameters()]
        net.zero_grad()
        again = compiled(x, noise, cond)
        again.sum().backward()
        torch.testing.assert_close(again, out, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close([p.grad for p in net.parameters()], plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_runs_near_the_exact_result(dtype: torch.dtype, joint: bool) -> None:
    net, cond = full(3, joint=joint)
    x, c_noise = data(3)
    exact = perturbed(net)(x, c_noise, cond)
    with torch.autocast("cpu", dtype):
        half = net(x, c_noise, cond)
    assert half.dtype == dtype
    assert (half.float() - exact).abs().mean() < 0.05 * exact.abs().mean()
    half.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_runs_in_the_dtype_of_its_weights(dtype: torch.dtype) -> None:
    net, cond = full(2)
    net = perturbed(net).to(dtype)
    cond = Cond(cond.tokens.to(dtype), cond.mask, cond.vector.to(dtype), cond.concat.to(dtype))
    x, c_noise = data(2)
    assert net(x.to(dtype), c_noise, cond).dtype == dtype


def test_attention_is_unmasked_where_no_mask_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask would keep the fast kernels from running."""
    real, masks = torch.nn.functional.scaled_dot_product_attention, []

    def attend(*args: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        assert all(z.ndim == 4 for z in args)
        masks.append(attn_mask)
        return real(*args, attn_mask=attn_mask)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    cond = Cond(tokens=torch.randn(2, 3, 6))
    for settings in ({"joint": True}, {"window": [1, 3]}):
        small(2, tokens_width=6, **settings)(*data(2), cond)
    assert len(masks) == 6  # two joint blocks, and twice windows and tokens
    assert masks[:5] == [None] * 5, "windows of 1 and 3 fill the axes until they are shifted"
    small(2, tokens_width=6)(*data(2), Cond(cond.tokens, torch.ones(2, 3, dtype=torch.bool)))
    assert masks[-1] is not None


def test_every_matrix_is_a_plain_linear_layer() -> None:
    """So that whatever adds LoRA finds all of them."""
    for joint in (False, True):
        net, _ = full(3, joint=joint)
        for module in net.modules():
            for name, parameter in module.named_parameters(recurse=False):
                assert parameter.ndim == 1 or name == "gain" or type(module) is nn.Linear


@pytest.mark.parametrize("joint", [False, True])
def test_taps_are_the_first_half_and_control_joins_them(joint: bool) -> None:
    net, cond = full(3, depth=3, joint=joint)
    perturbed(net)
    x, c_noise = data(3)
    taps = net.taps(x, c_noise, cond)
    assert [tap.shape[net.tap_axis] for tap in taps] == net.tap_channels == [16, 16]
    assert taps[0].shape == (2, 3 * 2 * 2, 16)
    bare = net(x, c_noise, cond)
    assert torch.equal(net(x, c_noise, cond, control=[torch.zeros_like(tap) for tap in taps]), bare)
    for i in range(2):
        control = [torch.zeros_like(tap) for tap in taps]
        control[i][0, 5] = torch.randn(16)
        changed = net(x, c_noise, cond, control=control)
        assert not torch.allclose(changed[0], bare[0], atol=1e-3)
        torch.testing.assert_close(changed[1], bare[1])
    # a control of one minus the tap leaves the second half nothing but ones
    seen: list[Tensor] = []
    net.blocks[2].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    net(x, c_noise, cond, control=[torch.zeros_like(taps[0]), 1 - taps[1]])
    torch.testing.assert_close(seen[0], torch.ones_like(seen[0]))


def test_a_hint_is_added_to_the_stem() -> None:
    net = perturbed(small(3))
    x, c_noise = data(3)
    hint = torch.randn(2, 12, net.hint_channels)
    outputs: list[Tensor] = []
    net.blocks[0].register_forward_pre_hook(lambda _, args: outputs.append(args[0].flatten(1, -2)))
    net.taps(x, c_noise)
    net.taps(x, c_noise, hint=hint)
    torch.testing.assert_close(outputs[1], outputs[0] + hint)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_what_is_named_as_after_the_taps_is_what_they_never_run(depth: int) -> None:
    net, cond = full(1, depth=depth)
    perturbed(net)
    sum(tap.square().sum() for tap in net.taps(*data(1), cond)).backward()
    dead = {name for name, p in net.named_parameters() if p.grad is None}
    assert dead == {n for n, _ in net.named_parameters() if n.startswith(tuple(f"{part}." for part in net.after_taps))}


def test_taps_and_control_refuse_what_does_not_fit() -> None:
    net = small(3)
    with pytest.raises(ValueError, match="control has 2 tensors, but the network has 1 taps"):
        net(*data(3), control=[torch.zeros(2, 12, 16)] * 2)
    with pytest.raises(ValueError, match=r"hint has shape \(2, 5, 16\); the stem's output, \(2, 12, 16\), is due"):
        net.taps(*data(3), hint=torch.zeros(2, 5, 16))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"in_channels": 0}, "in_channels=0 must be at least 1"),
        ({"out_channels": 0}, "out_channels=0 must be at least 1"),
        ({"depth": 0}, "depth=0 must be at least 1"),
        ({"mlp_ratio": 0}, "mlp_ratio=0 must be at least 1"),
        ({"width": 20}, "width=20 is not a multiple of head_channels=8"),
        ({"head_channels": 5, "width": 20}, "head_channels=5 must be even and at least 4"),
        ({"head_channels": 2}, r"head_channels=2 must be even and at least 4: 2 for each axis of \[0, 1\]"),
        ({"patch": ()}, r"patch=\[\] must be 1, 2 or 3 numbers from 1 up"),
        ({"patch": (0, 2)}, r"patch=\[0, 2\] must be 1, 2 or 3 numbers"),
        ({"patch": (1, 1, 1, 1)}, "must be 1, 2 or 3 numbers"),
        ({"attend": []}, r"attend=\[\] must hold a pattern at least"),
        ({"attend": [[]]}, r"attend: \[\] must name different axes out of \[0, 1\]"),
        ({"attend": [[0], [2]]}, r"attend: \[2\] must name different axes"),
        ({"attend": [[0, 0]]}, r"attend: \[0, 0\] must name different axes"),
        ({"window": [2]}, r"window=\[2\] must be 2 numbers of tokens"),
        ({"window": [2, -1]}, r"window=\[2, -1\] must be 2 numbers"),
        ({"attend": [[0]], "window": [2, 2]}, r"window=\[2, 2\] parts axis 1, which no pattern of attend reads"),
        ({"rate": 0.0}, "rate=0.0 must be positive and finite"),
        ({"radian_s": float("inf")}, "radian_s=inf must be positive and finite"),
        ({"dropout": 1.0}, "dropout=1.0 must be from 0 up to, but not, 1"),
        ({"tokens_width": -1}, "tokens_width=-1 must be at least 0"),
        ({"cross": [True]}, "cross is set, but tokens_width=0: give the width"),
        ({"cross": [True, True], "tokens_width": 6}, "cross has 2 entries, but attend has 1"),
        ({"cross": [False], "tokens_width": 6}, "tokens_width=6, but cross=.*: no block would read the tokens"),
        ({"joint": True}, "joint=True, but tokens_width=0"),
        (
            {"joint": True, "tokens_width": 6, "attend": [[0]]},
            r"joint=True is attention over all axes .*attend=\[\[0\]\]",
        ),
        ({"joint": True, "tokens_width": 6, "window": [2, 2]}, r"joint=True .* window=\[2, 2\]"),
    ],
)
def test_settings_that_disagree_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**{"axes": 2, **settings})


def test_named_networks_refuse_other_axes() -> None:
    with pytest.raises(ValueError, match=r"patch=\[2, 2\] must be 3 numbers: steps of time, height and width"):
        SpatioTemporalDiT(4, patch=(2, 2))
    with pytest.raises(ValueError, match=r"patch=\[2, 2\] must be 1 number: steps of time"):
        DiT1D(4, patch=(2, 2))


def test_inputs_that_do_not_fit_are_refused() -> None:
    net = small(2, tokens_width=6, concat_channels=1)
    x, c_noise = data(2)
    cond = Cond(tokens=torch.randn(2, 3, 6), concat=torch.randn(2, 1, *SIZES[2]))
    net(x, c_noise, cond)
    with pytest.raises(ValueError, match="axes=2 takes 4 dimensions"):
        net(x[0], c_noise, cond)
    with pytest.raises(ValueError, match="T=5 is not a multiple of 2; nearest: 4 or 6"):
        net(x[:, :, :5], c_noise, cond)
    with pytest.raises(ValueError, match=r"needs \(B,\) or \(B, T\)"):
        net(x, c_noise[:1], cond)
    with pytest.raises(ValueError, match="x has 1 channels, but the network was built with in_channels=2"):
        net(x[:, :1], c_noise, cond)
    with pytest.raises(ValueError, match="cond.tokens has width 0, but the network was built with tokens_width=6"):
        net(x, c_noise)
    with pytest.raises(ValueError, match="cond.vector has width 5, but the network was built with vector_width=0"):
        net(x, c_noise, Cond(cond.tokens, vector=torch.randn(2, 5), concat=cond.concat))


def test_built_from_yaml_and_restored_from_a_folder(tmp_path: Path) -> None:
    settings = {"in_channels": 2, "width": 16, "depth": 2, "head_channels": 8, "window": [2, 0, 0], "rate": 8.0}
    net = perturbed(build({"class_path": "mmdiff.backbones.SpatioTemporalDiT", "init_args": settings}))
    restored = SpatioTemporalDiT.from_pretrained(net.save_pretrained(tmp_path / "dit"))
    x, c_noise = data(3)
    assert restored.rate == 8.0
    assert torch.equal(restored(x, c_noise), net.eval()(x, c_noise))
    sized = SpatioTemporalDiT.S(2, rate=8.0)
    assert sized.spec()["init_args"] | {"width": 384, "depth": 12, "rate": 8.0} == sized.spec()["init_args"]


def test_the_command_line_knows_the_arguments_of_named_networks() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(nn.Module, "net")
    path = "mmdiff.backbones.SpatioTemporalDiT"
    arguments = {"in_channels": 2, "width": 16, "depth": 1, "head_channels": 8, "attend": [[0, 1, 2]]}
    config = parser.parse_object({"net": {"class_path": path, "init_args": arguments}})
    assert parser.instantiate(config).net.axes_of_blocks == [(0, 1, 2)]
    with pytest.raises(ArgumentError, match="depht"):
        parser.parse_object({"net": {"class_path": path, "init_args": {"in_channels": 2, "depht": 1}}})
    with pytest.raises(ArgumentError, match="depth"):
        parser.parse_object({"net": {"class_path": path, "init_args": {"in_channels": 2, "depth": "many"}}})
