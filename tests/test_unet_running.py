"""The U-Net as other code runs it: compiled, in half precision, checkpointed, tapped, with LoRA, in other layouts."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from mmdiff.backbones import UNet
from mmdiff.conditioning import Cond
from tests.unet_cases import SIZES, data, full, perturbed, small


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    """A compiler that has seen no other test's sizes, and counts none of them against its limit."""
    torch._dynamo.reset()


def check_compiled(net: UNet, cond: Cond, tolerance: float, **options: Any) -> None:
    """Raises AssertionError unless the compiled network's output and gradients are the network's own."""
    x, c_noise = data(len(net.patch))
    control = [torch.randn_like(tap) for tap in net.taps(x, c_noise, cond)]
    results = []
    for run in (net, torch.compile(net, fullgraph=True, **options)):
        net.zero_grad()
        out = run(x, c_noise, cond, control)
        out.square().sum().backward()
        results.append([out, *(p.grad for p in net.parameters())])
    torch.testing.assert_close(results[1], results[0], rtol=tolerance, atol=tolerance)


def test_compiles_without_graph_breaks() -> None:
    net, cond = full(3)
    x, c_noise = data(3)
    compiled = torch.compile(perturbed(net), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, c_noise, cond), net(x, c_noise, cond), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_other_batches_and_lengths_compile_once_more_at_most(axes: int) -> None:
    net = perturbed(small(axes, attend=[[], [list(range(axes))]]))
    counter = CompileCounter()
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    for batch, length in ((2, 8), (3, 12), (4, 16), (5, 20), (7, 24)):
        x, c_noise = torch.randn(batch, 2, length, *SIZES[axes][1:]), torch.rand(batch)
        torch.testing.assert_close(compiled(x, c_noise), net(x, c_noise), rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 2


@pytest.mark.slow
def test_noise_levels_by_time_step_compile_without_graph_breaks() -> None:
    net, cond = full(2)
    x, c_noise = data(2)
    steps = c_noise[:, None] + torch.arange(x.shape[2])
    compiled = torch.compile(perturbed(net), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, steps, cond), net(x, steps, cond), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "residual"])
def test_compiled_gradients_are_the_network_s_own(gated: bool) -> None:
    net, cond = full(2, checkpoint=True, gated=gated, blocks=2, dilations=[1, 2])
    check_compiled(perturbed(net), cond, 1e-4, backend="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("axes", [1, 2])
def test_inductor_agrees_with_eager_gradients_included(axes: int) -> None:
    net, cond = full(axes)
    check_compiled(perturbed(net), cond, 1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("axes", [1, 3])
def test_autocast_trains_near_float32(axes: int, dtype: torch.dtype) -> None:
    """Output within 5 % of float32's, gradients of every parameter finite and, together, within 10 %."""
    # torch 2.11 on a CPU reads foreign memory for bfloat16 weight gradients of 3 x 3 x 3 kernels over T=2: T stays 4
    net, cond = full(axes, factors=[(1,) * (axes - 1) + (2,)])
    perturbed(net)
    x, c_noise = data(axes)

    def gradients(precision: torch.dtype | None) -> tuple[Tensor, Tensor]:
        net.zero_grad()
        with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
            out = net(x, c_noise, cond)
        out.float().square().mean().backward()
        return out, torch.cat([p.grad.flatten() for p in net.parameters()])

    exact, exact_gradient = gradients(None)
    half, half_gradient = gradients(dtype)
    assert half.dtype == dtype
    assert (half.float() - exact).norm() < 0.05 * exact.norm()
    assert torch.isfinite(half_gradient).all()
    assert (half_gradient - exact_gradient).norm() < 0.1 * exact_gradient.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bf16", "fp64"])
def test_runs_in_a_dtype_of_its_own(dtype: torch.dtype) -> None:
    net, cond = full(2)
    perturbed(net).to(dtype)
    x, c_noise = data(2)
    cast = Cond(cond.tokens.to(dtype), cond.mask, cond.vector.to(dtype), cond.concat.to(dtype))
    out = net(x.to(dtype), c_noise.to(dtype), cast)
    assert out.dtype == dtype
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("settings", [{}, {"gated": True}], ids=["residual", "gated"])
def test_checkpointing_gives_equal_gradients_dropout_included(settings: dict[str, Any], training: bool) -> None:
    gradients = []
    for checkpoint in (False, True):
        net, cond = full(2, dropout=0.3, checkpoint=checkpoint, **settings)
        perturbed(net).train(training)
        x, c_noise = data(2)
        x.requires_grad_()
        torch.manual_seed(5)
        net(x, c_noise, cond).square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in net.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("training", [False, True])
def test_checkpointing_keeps_less_for_the_backward_pass(training: bool) -> None:
    def kept(checkpoint: bool) -> int:
        """Bytes that autograd holds on to, each storage once."""
        held: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        net = small(2, checkpoint=checkpoint, blocks=2).train(training)
        own = {p.untyped_storage().data_ptr() for p in net.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = net(torch.randn(2, 2, 32, 32), torch.rand(2))
        del out
        return sum(size for pointer, size in held.items() if pointer not in own)

    assert kept(True) < 0.5 * kept(False)


@pytest.mark.parametrize("axes", [2, 3])
def test_channels_last_gives_the_same_result(axes: int) -> None:
    net, cond = full(axes)
    x, c_noise = data(axes)
    expected = perturbed(net)(x, c_noise, cond)
    layout = torch.channels_last if axes == 2 else torch.channels_last_3d
    out = net.to(memory_format=layout)(x.to(memory_format=layout), c_noise, cond)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_a_seed_decides_weights_output_and_gradients() -> None:
    runs = []
    for _ in range(2):
        net, cond = full(3, dropout=0.2)
        out = perturbed(net)(*data(3), cond)
        out.square().sum().backward()
        runs.append([out.detach(), *(p.grad for p in net.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_batch_of_another_size_gives_each_item_the_same() -> None:
    net, cond = full(2)
    x, c_noise = data(2)
    both = perturbed(net)(x, c_noise, cond)
    twice = Cond(*(torch.cat([slot, slot]) for slot in (cond.tokens, cond.mask, cond.vector, cond.concat)))
    torch.testing.assert_close(net(torch.cat([x, x]), torch.cat([c_noise, c_noise]), twice)[2:], both)


class LoRA(nn.Module):
    """A frozen linear layer plus a trained product of two thin ones (Hu et al. 2022), as LoRA is made elsewhere."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base
        self.a, self.b = nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


@pytest.mark.parametrize("settings", [{}, {"gated": True}], ids=["residual", "gated"])
def test_every_matrix_lies_in_a_plain_layer(settings: dict[str, Any]) -> None:
    net, _ = full(3, **settings)
    plain = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    inside = {id(p) for module in net.modules() if isinstance(module, plain) for p in module.parameters(recurse=False)}
    assert not [name for name, p in net.named_parameters() if p.ndim >= 2 and id(p) not in inside]


def test_lora_replaces_linears_and_trains_alone() -> None:
    net, cond = full(2)
    x, c_noise = data(2)
    before = perturbed(net)(x, c_noise, cond)
    net.requires_grad_(False)
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.Linear):
            net.set_submodule(name, LoRA(module))
    torch.testing.assert_close(net(x, c_noise, cond), before, rtol=1e-5, atol=1e-6)
    trained = [p for p in net.parameters() if p.requires_grad]
    assert len(trained) == 2 * sum(isinstance(module, LoRA) for module in net.modules())
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = (net(x, c_noise, cond) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(p.grad is not None and p.grad.count_nonzero() for p in trained)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_taps_are_what_control_is_added_to(axes: int) -> None:
    net, cond = full(axes, blocks=2, patch=(2,) + (1,) * (axes - 1))
    x, c_noise = data(axes)
    taps = perturbed(net).taps(x, c_noise, cond)
    assert [tap.shape[net.tap_axis] for tap in taps] == net.tap_channels
    assert len(taps) == 2 * 2 + 1
    plain = net(x, c_noise, cond)
    assert torch.equal(net(x, c_noise, cond, [torch.zeros_like(tap) for tap in taps]), plain)
    for i in range(len(taps)):
        control = [torch.ones_like(tap) if j == i else torch.zeros_like(tap) for j, tap in enumerate(taps)]
        assert not torch.allclose(net(x, c_noise, cond, control), plain, atol=1e-4), f"tap {i} is not read"
    with pytest.raises(ValueError, match="control has 4 tensors, but the network has 5 taps"):
        net(x, c_noise, cond, taps[:-1])


def test_a_hint_joins_the_stem() -> None:
    net = perturbed(small(2, patch=(2, 1)))
    x, c_noise = data(2)
    hint = torch.randn(2, net.hint_channels, x.shape[2] // 2, x.shape[3])
    plain = net.taps(x, c_noise)
    assert all(torch.equal(a, b) for a, b in zip(net.taps(x, c_noise, hint=0 * hint), plain, strict=True))
    assert all(not torch.allclose(a, b) for a, b in zip(net.taps(x, c_noise, hint=hint), plain, strict=True))
    with pytest.raises(ValueError, match=r"hint has shape \(2, 8, 12, 4\); the stem's output, \(2, 8, 6, 4\), is due"):
        net.taps(x, c_noise, hint=torch.randn(2, 8, 12, 4))


def test_the_first_half_needs_nothing_that_comes_after_the_taps() -> None:
    net, cond = full(2)
    x, c_noise = data(2)
    taps = perturbed(net).taps(x, c_noise, cond)
    first = [name for name, _ in net.named_parameters() if name.split(".")[0] not in net.after_taps]
    sum(tap.square().sum() for tap in taps).backward()
    assert [name for name, p in net.named_parameters() if p.grad is not None] == first


def test_a_network_as_large_as_asked_for() -> None:
    """Parameters grow with the square of the width, but for biases, norms and the two ends."""
    counts = [sum(p.numel() for p in UNet(2, 1, channels=c).parameters()) for c in (32, 64)]
    assert math.isclose(counts[1] / counts[0], 4, rel_tol=0.02)
