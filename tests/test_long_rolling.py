"""Clips of any length whose time steps fall one after another, against closed forms, and in a cascade."""

import gc
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmdiff.autoencoder import Pool
from mmdiff.cascade import Cascade, Clip, Generate
from mmdiff.conditioning import Join, Label, LowRes
from mmdiff.config import build
from mmdiff.denoiser import expand_like
from mmdiff.editing import Edit, Window, extend, known_steps
from mmdiff.guidance import OverTime
from mmdiff.model import DiffusionModel
from mmdiff.precond import EDM
from mmdiff.sampling import Ancestral, Denoise, Rolling, seeded_noise, start
from mmdiff.sigmas import Karras
from tests.edit_oracles import CASCADES, ar1, correlated, distance, gaussian, law, normal, recorded
from tests.oracles import torch_noise

LONG = 80  # ten times the 8 steps that the denoiser knows
GRID = Karras(0.01, 80.0)


def shifted(denoise: Denoise, mean: float) -> Denoise:
    """The denoiser of the same data, `mean` added."""
    return lambda x, sigma: denoise(x - mean, sigma) + mean


def uneven(x: Tensor, sigma: Tensor) -> Tensor:
    """A denoiser that is no one's: neither linear nor blind to the steps around, nor to their levels."""
    return torch.tanh(x + x.roll(1, 2)) * 0.7 + 0.1 * torch.sin(expand_like(sigma, x))


def sampled(sampler: Rolling, steps: int, denoise: Denoise, total: int = LONG) -> tuple[Tensor, Tensor]:
    """Exact mean (T,) and covariance (T, T) of the samples of a linear denoiser of `sampler.length` steps."""
    nothing = torch.zeros(total)
    mean, linear = law(sampler, sampler.front(lambda _: denoise), GRID(steps), nothing, nothing.bool())
    return mean, linear @ linear.mT


@pytest.mark.parametrize(("length", "context"), [(8, 4), (8, 1), (16, 8)])
def test_ten_times_the_length_has_the_law_of_the_process(length: int, context: int) -> None:
    """All 80 x 80 covariances of a stationary Gaussian from the denoiser of 8 or 16 steps, and its mean, undrifted.

    Measured with 48 steps of order 2: 0.011, 0.010, 0.009. The mean of 0.7 is 0.674, and level: every step starts
    from noise of mean 0 at sigma 80, and passes on the 0.005 that this leaves (0.6 / 80 of its mean) to the next.
    """
    sampler = Rolling(length, context, order=2)
    mean, covariance = sampled(sampler, 48, shifted(correlated(ar1(length, 0.8)), 0.7))
    assert distance(covariance, ar1(LONG, 0.8)) < 0.015
    assert distance(mean, torch.full((LONG,), 0.7)) < 0.03
    assert distance(mean[30:75], mean[30].expand(45)) < 1e-3


def test_the_error_falls_with_the_steps_and_order_2_is_better() -> None:
    errors = {
        (order, steps): distance(sampled(Rolling(8, 4, order=order), steps, correlated(ar1(8, 0.8)))[1], ar1(LONG, 0.8))  # type: ignore[arg-type]
        for order, steps in ((1, 24), (1, 96), (2, 24), (2, 96))
    }
    assert errors[1, 24] > 2.5 * errors[1, 96]
    assert errors[1, 24] > 2.5 * errors[2, 24]
    assert errors[1, 96] > 2.5 * errors[2, 96]


def test_renewed_noise_leaves_the_law_as_it_is() -> None:
    """Covariances of 6,000 samples with all noise renewed: 0.05 off at 200 steps of order 1, most of it the step's."""
    sampler = Rolling(4, 2, eta=1.0)
    x = start(normal(6000, 1, 10), GRID.sigma_max)
    out = sampler(sampler.front(lambda _: correlated(ar1(4, 0.8))), x, GRID(200), torch_noise(5))[:, 0]
    assert distance(out.mT @ out / len(out), ar1(10, 0.8).float()) < 0.09
    again = sampler(sampler.front(lambda _: correlated(ar1(4, 0.8))), x[:5], GRID(20), torch_noise(6))[:, 0]
    assert distance(again, out[:5]) > 0.5  # the noise at the start does not decide


def test_a_given_past_goes_on_by_the_conditional_law() -> None:
    """After known steps the mean falls by 0.8 a step and the variance rises to 1, as those of the process do."""
    sampler, known = Rolling(8, 4, order=2), torch.arange(24) < 6
    given = torch.where(known, 2.0, 0.0).double()
    front = known_steps(sampler.front(lambda _: correlated(ar1(8, 0.8))), given[None, None], known)
    mean, linear = law(sampler, front, GRID(48), given, known)
    ahead = torch.arange(1, 19, dtype=torch.float64)
    assert distance(mean[6:], 2.0 * 0.8**ahead) < 0.03
    assert distance((linear @ linear.mT).diagonal()[6:], 1 - 0.8 ** (2 * ahead)) < 0.02
    assert torch.equal(mean[:6], given[:6])


def test_no_call_sees_more_than_a_window_and_later_steps_have_more_noise() -> None:
    sampler, (denoise, calls) = Rolling(8, 3), recorded(gaussian(0.0, 1.0))
    x, noise = normal(2, 1, 37, 4, seed=2), seeded_noise([1, 2])
    levels = GRID(20)
    seen: list[int] = []
    for step in sampler.steps(sampler.front(lambda steps: (seen.append(int(steps[0])), denoise)[1]), x, levels, noise):
        last = step
    assert len(calls) == 20 + sampler.delay(20) * 36 == 20 + 4 * 36
    assert {window.shape for window, _ in calls} == {(2, 1, 8, 4)}
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (0, 37 - 8)
    for _, sigma in calls:
        assert sigma.shape == (2, 8)
        assert (sigma.diff(dim=1) >= 0).all()
        assert ((sigma[0] > 0) & (sigma[0] < levels[0])).sum() <= 5
    done = [sigma for first, (_, sigma) in zip(seen, calls, strict=True) if first > 0]
    assert all((sigma[:, :3] == 0).all() for sigma in done)  # what went before is clean, and said to be
    assert last.number == 19


def test_a_finished_step_never_changes() -> None:
    sampler = Rolling(8, 3, eta=1.0)
    noise = seeded_noise([1, 2])
    states = [step.x for step in sampler.steps(sampler.front(lambda _: uneven), normal(2, 1, 20), GRID(10), noise)]
    for place in range(20):
        end = 10 + sampler.delay(10) * place - 1  # the call that finishes it
        for state in states[end:]:
            assert torch.equal(state[:, :, place], states[end][:, :, place])
        assert not torch.equal(states[end][:, :, place], states[end - 1][:, :, place])


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("shape", [(2, 1, 30), (1, 3, 30, 4, 6)], ids=len)
def test_a_stream_is_the_walk_without_an_end(shape: tuple[int, ...], order: Any) -> None:
    sampler = Rolling(8, 3, order=order)
    eps, drawn = normal(*shape), iter(range(30))
    steps = sampler.stream(uneven, eps[:, :, :1], GRID(12), lambda _: eps[:, :, next(drawn)][:, :, None])
    streamed = torch.cat(list(islice(steps, 20)), dim=2)
    whole = sampler(sampler.front(lambda _: uneven), start(eps, GRID.sigma_max), GRID(12), torch.zeros_like)
    torch.testing.assert_close(streamed, whole[:, :, :20])


def test_what_a_stream_holds_does_not_grow() -> None:
    def held() -> int:
        gc.collect()
        return sum(o.numel() for o in gc.get_objects() if type(o) is Tensor)

    steps = Rolling(8, 3, order=2).stream(gaussian(0.0, 1.0), torch.zeros(1, 1, 1, 999), GRID(4), torch.zeros_like)
    sizes = []
    for number, step in enumerate(islice(steps, 200)):
        assert step.shape == (1, 1, 1, 999)
        if number in (9, 199):
            sizes.append(held())
    assert abs(sizes[1] - sizes[0]) < 999


def rolling(cascade: Cascade, **settings: Any) -> Cascade:
    """The cascade with a first stage that rolls over the length it was made for."""
    length = cascade.plan(tuple(cascade.shape), cascade.rate)[0][0][1]
    sampler = Rolling(length, length // 2)
    return cascade.with_base(sampler=sampler, per_step=True, **settings)


@pytest.mark.parametrize("kind", CASCADES)
def test_a_cascade_makes_ten_times_its_length_and_goes_on_from_what_is_given(kind: str) -> None:
    cascade = rolling(CASCADES[kind]())
    channels, length, *sizes = cascade.shape
    first = cascade.first
    assert isinstance(first, Generate)
    seen: list[int] = []
    first.model.denoiser.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[2]))
    progress: list[int] = []
    prompt, shape = {"caption": ["x", "y"]}, (channels, 10 * length, *sizes)

    def report(name: str, done: int, total: int) -> None:
        if name == "base":
            progress.append(done)

    made = cascade(prompt, noise=seeded_noise([1, 2]), shape=shape, progress=report).data
    assert made.shape == (2, *shape)
    assert made.isfinite().all()
    assert set(seen) == {cascade.plan(tuple(cascade.shape), cascade.rate)[0][0][1]}
    assert progress == sorted(progress)
    assert set(progress) == {1, 2, 3, 4}
    for part in made.chunk(10, dim=2):
        assert part.std() > 1e-3  # no part was left out
    clip = 0.3 * normal(1, channels, length, *sizes)
    longer = extend(cascade, prompt, clip, 2 * length, noise=seeded_noise([1, 2])).data
    assert torch.equal(longer[:, :, :length], clip.expand(2, *clip.shape[1:]))
    other = extend(cascade, prompt, 2 * clip, 2 * length, noise=seeded_noise([1, 2])).data
    assert distance(longer[:, :, length:], other[:, :, length:]) > 1e-4  # what is given counts


class Pointwise(nn.Module):
    """A backbone that acts on each step alone, and reads concat and vector there."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.5))
        self.lengths: set[int] = set()

    def forward(self, x: Tensor, c_noise: Tensor, cond: Any = None) -> Tensor:
        self.lengths.add(x.shape[2])
        assert c_noise.shape in ((len(x),), (len(x), x.shape[2]))
        return self.gain * x - cond.concat[:, :1] + cond.vector[:, :1, None] + 0.1 * expand_like(c_noise, x)


@pytest.mark.parametrize("guidance", [1.0, 2.5, OverTime(1.0, 3.0)], ids=str)
def test_conditions_along_time_and_guidance_go_with_the_window(guidance: Any) -> None:
    """Where the model acts on each step alone, each falls down the grid as it does in `Ancestral`, one by one."""
    label = Label("class", 3, 4)
    nn.init.normal_(label.table.weight, generator=torch.Generator().manual_seed(0))
    model = DiffusionModel(Pointwise(), EDM(), Join([LowRes(Pool([2])), label])).eval()
    low, prompt = Clip(0.3 * normal(2, 1, 20), 4.0), {"class": [0, 2]}
    edit = Edit(0.3 * normal(1, 1, 40), known=(torch.arange(40) % 5 < 2).view(1, 1, -1))
    plain = Generate(model, GRID, Ancestral(), 12, guidance, per_step=True)
    for given in ({}, {"edit": edit}):
        clips = [
            stage(prompt, low, shape=(1, 40), rate=8.0, noise=seeded_noise([1, 2]), **given).data
            for stage in (plain, replace(plain, sampler=Rolling(8, 3)))
        ]
        assert model.denoiser.backbone.lengths == {40, 8}
        assert distance(*clips) < 1e-4


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"context": 0}, r"context=0 must lie in 1..length-1=7"),
        ({"context": 8}, r"context=8 must lie in 1..length-1=7"),
        ({"context": 4, "eta": 1.5}, r"eta=1.5 must lie between 0"),
        ({"context": 4, "eta": 0.5, "order": 2}, r"order=2 with eta=0.5: it must be 1, or 2 with eta=0"),
        ({"context": 4, "order": 3}, r"order=3 with eta=0.0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Rolling(8, **settings)


def test_rolling_is_a_line_of_yaml_for_models_that_know_a_level_per_step() -> None:
    tree = {"class_path": "mmdiff.sampling.Rolling", "init_args": {"length": 8, "context": 3, "eta": 1.0}}
    assert build(tree) == Rolling(8, 3, 1.0)
    cascade = CASCADES["waveform"]()
    for settings in ({}, {"per_step": True, "window": Window(8, 4)}):
        with pytest.raises(ValueError, match=r"sampler=Rolling needs per_step=True.* give no window"):
            cascade.with_base(sampler=Rolling(8, 3), **settings)
    with pytest.raises(ValueError, match=r"like has shape \(1, 1, 2\); it must be one time step"):
        next(Rolling(8, 3).stream(uneven, torch.zeros(1, 1, 2), GRID(4), torch.zeros_like))
