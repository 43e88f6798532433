"""Clips longer than a model's own, and loops: windows in time against closed forms."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmdiff.backbones import UNet
from mmdiff.cascade import Generate
from mmdiff.conditioning import Cond, Label
from mmdiff.config import build
from mmdiff.editing import Repaint, Window, cut, inpaint, known_steps, window
from mmdiff.model import DiffusionModel
from mmdiff.precond import EDM
from mmdiff.sampling import Denoise, Heun, seeded_noise
from mmdiff.sigmas import Karras
from tests.edit_oracles import (
    SHAPES,
    ar1,
    correlated,
    distance,
    gaussian,
    law,
    normal,
    recorded,
)


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize(("length", "overlap"), [(8, 4), (8, 7), (5, 2), (16, 1)])
def test_weights_sum_to_one_at_every_step_of_every_length(length: int, overlap: int, loop: bool) -> None:
    cutter = Window(length, overlap, loop)
    for total in range(1, 50):
        whole = torch.zeros(total)
        for steps, weight in zip(cutter.windows(total), cutter.weights(total), strict=True):
            assert len(steps) == min(length, total)
            assert len(steps.unique()) == len(steps)
            assert (weight > 0).all()
            whole = whole.index_add(0, steps, weight)
        assert distance(whole, torch.ones(total)) < 1e-6, total


@pytest.mark.parametrize("shape", SHAPES, ids=len)
@pytest.mark.parametrize("loop", [False, True])
def test_windows_leave_a_denoiser_that_acts_on_each_step_as_it_is(loop: bool, shape: tuple[int, ...]) -> None:
    x, pointwise = normal(*shape), gaussian(0.3, 0.5)
    for length, overlap in ((5, 2), (4, 3), (12, 6), (40, 4)):
        cutting = window(pointwise, length, overlap, loop)
        for sigma in (torch.tensor(0.7), torch.tensor([0.7, 2.0]), normal(2, 12, seed=3).abs()):
            torch.testing.assert_close(cutting(x, sigma), pointwise(x, sigma), rtol=1e-5, atol=1e-6)


def test_a_window_never_shows_more_than_its_length() -> None:
    denoise, calls = recorded(gaussian(0.0, 1.0))
    x = normal(1, 1, 37)
    window(denoise, 8, 4)(x, torch.tensor(1.0))
    assert {seen.shape[2] for seen, _ in calls} == {8}
    assert len(calls) == 9
    assert torch.equal(calls[-1][0], x[:, :, -8:])
    for total in (3, 8):
        calls.clear()
        window(denoise, 8, 4)(x[:, :, :total], torch.tensor(1.0))
        assert [seen.shape[2] for seen, _ in calls] == [total]


def test_every_setting_of_a_window_counts() -> None:
    x, sigma = normal(1, 1, 24, 3), torch.tensor(1.0)

    def uneven(x: Tensor, sigma: Tensor) -> Tensor:  # knows where in its window a step is
        return x + torch.linspace(0, 1, x.shape[2])[:, None]

    outs = [window(uneven, *settings)(x, sigma) for settings in ((8, 4), (9, 4), (8, 3), (8, 4, True))]
    for i, a in enumerate(outs):
        for b in outs[i + 1 :]:
            assert distance(a, b) > 0.01
    with pytest.raises(ValueError, match=r"overlap=8 must lie in 0..length-1=7"):
        Window(8, 8)
    with pytest.raises(ValueError, match="overlap=0 leaves the seam of a loop open"):
        Window(8, 0, loop=True)


def test_a_loop_has_no_beginning() -> None:
    """Turned by a whole stride, the input gives the output turned: no step is nearer to an edge than another."""
    x, sigma = normal(1, 1, 24), torch.tensor(1.0)

    def edgy(x: Tensor, sigma: Tensor) -> Tensor:
        y = x.clone()
        y[:, :, 0] += 10.0
        y[:, :, -1] -= 10.0
        return y

    for length in (8, 12, 24):
        turning = window(edgy, length, length // 2, loop=True)
        assert distance(turning(x.roll(length // 2, 2), sigma), turning(x, sigma).roll(length // 2, 2)) < 1e-5
        straight = window(edgy, length, length // 2)
        assert distance(straight(x.roll(length // 2, 2), sigma), straight(x, sigma).roll(length // 2, 2)) > 1


def sampled_covariance(denoise: Denoise, length: int) -> Tensor:
    """The exact covariance (T, T) of the samples of a linear denoiser."""
    _, linear = law(Heun(), denoise, Karras(0.01, 20.0)(24), torch.zeros(length), torch.zeros(length).bool())
    return linear @ linear.mT


def test_long_samples_from_a_short_window_have_no_seam() -> None:
    """48 steps of a stationary Gaussian from the denoiser of 16: neighbours' covariance is level along the clip."""
    short = correlated(ar1(16, 0.8))
    for loop in (False, True):
        covariance = sampled_covariance(window(short, 16, 8, loop), 48)
        assert distance(covariance.diagonal(1), torch.full((47,), 0.8)) < 0.1
        assert distance(covariance.diagonal(), torch.ones(48)) < 0.1
    cut_off = sampled_covariance(window(short, 16, 0), 48).diagonal(1)
    assert cut_off[15].abs() < 1e-6  # these windows know nothing of each other
    assert cut_off[14] > 0.7


def test_ten_times_the_length_drifts_nowhere() -> None:
    """80 steps from windows of 8: mean, variance and neighbours' covariance are those of the first join at the last."""
    short = correlated(ar1(8, 0.8))

    def shifted(x: Tensor, sigma: Tensor) -> Tensor:
        return short(x - 0.7, sigma) + 0.7

    sigmas, nothing = Karras(0.01, 80.0)(24), torch.zeros(80)
    mean, linear = law(Heun(), window(shifted, 8, 4), sigmas, nothing, nothing.bool())
    covariance = linear @ linear.mT
    assert distance(mean, torch.full((80,), 0.7)) < 0.03
    for values in (mean, covariance.diagonal(), covariance.diagonal(1), covariance.diagonal(8)):
        inner = values[8:-8].unfold(0, 4, 4)  # one row for each stride
        assert distance(inner, inner[:1].expand(inner.shape)) < 1e-3
    assert distance(covariance.diagonal(), torch.ones(80)) < 0.2
    assert distance(covariance.diagonal(1), torch.full((79,), 0.8)) < 0.2


def test_a_clip_of_one_window_is_what_the_stage_makes_without_at_the_same_cost() -> None:
    """Guided, prompt and null go through the network together, as they do without windows."""
    label = Label("class", 3, 4)
    net = UNet(1, 1, channels=8, multipliers=(1, 1), head_channels=8, vector_width=4)
    model = DiffusionModel(net, EDM(), label).eval()
    calls: list[int] = []
    net.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    plain = Generate(model, Karras(), Heun(), 3, guidance=2.0)
    made = [
        replace(plain, window=w)({"class": [0, 2]}, shape=(1, 8), rate=8.0, noise=seeded_noise([1, 2])).data
        for w in (None, Window(8, 4), Window(8, 4, loop=True))
    ]
    assert calls == [4] * 10 + [2] * 20
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_a_looped_clip_flows_from_its_end_into_its_start() -> None:
    """Correlation of the last step with the first is that of neighbours; without a loop it is that of 15 steps."""
    short = correlated(ar1(8, 0.8))
    looped = sampled_covariance(window(short, 8, 4, loop=True), 16)
    assert abs(looped[-1, 0] - looped[3, 4]) < 1e-6  # another join of the same kind
    assert looped[-1, 0] / looped[0, 0] > 0.6
    straight = sampled_covariance(window(short, 8, 4), 16)
    assert straight[-1, 0] < 0.2


@pytest.mark.parametrize("shape", SHAPES, ids=len)
def test_a_condition_along_time_goes_with_its_window(shape: tuple[int, ...]) -> None:
    """A model that reads concat at each step gives the same with windows as without; tokens and vector stay whole."""
    x, concat, tokens = normal(*shape), normal(*shape, seed=5), normal(2, 3, 4)
    cond = Cond(tokens=tokens, concat=concat)

    def bind(cond: Cond | None) -> Denoise:
        assert cond is not None
        assert cond.tokens is tokens
        return lambda x, sigma: x - 2 * cond.concat

    whole = bind(cond)(x, torch.tensor(1.0))
    for loop in (False, True):
        parts = Window(5, 3, loop)(lambda steps: bind(cut(cond, steps)))(x, torch.tensor(1.0))
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
    assert cut(None, torch.arange(3)) is None
    assert cut(Cond(tokens=tokens), torch.arange(3)) == Cond(tokens=tokens)


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"class_path": "mmdiff.editing.Window", "init_args": {"length": 8, "overlap": 4}}, Window(8, 4)),
        (
            {"class_path": "mmdiff.editing.Window", "init_args": {"length": 8, "overlap": 4, "loop": True}},
            Window(8, 4, True),
        ),
        (
            {
                "class_path": "mmdiff.editing.Repaint",
                "init_args": {"sampler": {"class_path": "mmdiff.sampling.Heun"}, "jump": 5, "resamples": 4},
            },
            Repaint(Heun(), 5, 4),
        ),
    ],
)
def test_builds_from_one_line_of_yaml(tree: dict[str, Any], expected: object) -> None:
    assert build(tree) == expected


@pytest.mark.parametrize("make", [lambda d, x, m: inpaint(d, x, m), lambda d, x, m: known_steps(d, x, m[0, 0])])
def test_edits_of_windows_and_windows_of_edits_compose(make: Callable[[Denoise, Tensor, Tensor], Denoise]) -> None:
    x, known = normal(2, 1, 12), normal(2, 1, 12, seed=4)
    mask = (torch.arange(12) < 5)[None, None]
    got = make(window(gaussian(0.3, 0.5), 6, 3), known, mask)(x, torch.tensor(2.0))
    want = make(gaussian(0.3, 0.5), known, mask)(x, torch.tensor(2.0))
    torch.testing.assert_close(got, want)
