"""Known parts of a clip against closed forms: replacement, RePaint, one noise level per time step."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mmdiff.denoiser import expand_like
from mmdiff.editing import Edit, Repaint, infill, inpaint, known_steps
from mmdiff.sampling import Ancestral, Heun, Langevin, Sampler, seeded_noise, start
from mmdiff.sigmas import Karras
from tests.edit_oracles import (
    SAMPLERS,
    SHAPES,
    STOCHASTIC,
    ar1,
    correlated,
    distance,
    law,
    normal,
    recorded,
    rough,
)


@pytest.mark.parametrize("shape", SHAPES, ids=len)
@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_what_is_known_comes_back_exactly_and_has_each_steps_noise_on_the_way(
    sampler: Sampler, shape: tuple[int, ...]
) -> None:
    """The state less what is known, over sigma, is eps: the very one it started with, or fresh of deviation 1."""
    known, sigmas, noise = 3 * normal(*shape), Karras(0.02, 20.0)(8), seeded_noise([5, 6])
    mask = torch.zeros(1, 1, *shape[2:], dtype=torch.bool)
    mask[:, :, 3:9] = True
    eps = noise(known)
    x = torch.where(mask, known + sigmas[0] * eps, start(eps, sigmas[0]))
    where = mask.expand(shape)
    walk = list(sampler.steps(inpaint(rough, known, mask), x, sigmas, noise))
    for step, sigma in zip(walk[:-1], sigmas[1:-1].tolist(), strict=True):
        assert torch.equal(step.x0[where], known[where])
        found = ((step.x - known) / sigma)[where]
        if isinstance(sampler, Langevin):
            continue  # it only relaxes towards each level
        if sampler in STOCHASTIC:
            assert abs(found.std().item() - 1) < 4 / math.sqrt(2 * found.numel())
        else:
            assert distance(found, eps[where]) < 1e-3
    assert torch.equal(walk[-1].x[where], known[where])
    free = sampler(rough, start(noise(known), sigmas[0]), sigmas, noise)
    assert distance(walk[-1].x[~where], free[~where]) > 0.01


@pytest.mark.parametrize("shape", SHAPES, ids=len)
@pytest.mark.parametrize("strength", [0.25, 0.5, 1.0])
def test_an_edit_starts_what_is_known_at_the_noise_of_the_first_step_that_is_run(
    strength: float, shape: tuple[int, ...]
) -> None:
    clip, eps, sigmas = normal(1, *shape[1:]), normal(*shape, seed=1), Karras(0.02, 20.0)(8)
    known = (torch.arange(12) < 5).view(1, 1, 12, *(1,) * (len(shape) - 3))
    x, rest = Edit(clip, strength, known).start(eps, sigmas)
    first = sigmas[8 - round(8 * strength)]
    assert rest[0] == first
    free = start(eps, first) if strength == 1 else clip + first * eps
    torch.testing.assert_close(x, torch.where(known, clip + first * eps, free), rtol=0, atol=0)


def test_noise_drawn_anew_has_the_level_of_the_call() -> None:
    """20000 numbers: what the model sees of known 2 is 2 + sigma eps, within 4 standard errors, wherever x is."""
    known, mask = torch.full((1, 1, 40_000), 2.0), torch.arange(40_000) < 20_000
    for sigma in (0.05, 1.0, 40.0):
        denoise, calls = recorded(rough)
        keep = inpaint(denoise, known, mask, seeded_noise([0]))
        x = torch.full_like(known, 77.0)
        got = keep(x, torch.tensor(sigma))
        seen = calls[0][0][..., :20_000]
        assert abs(seen.mean().item() - 2) < 4 * sigma / math.sqrt(20_000)
        assert abs(seen.std().item() / sigma - 1) < 4 / math.sqrt(40_000)
        assert torch.equal(calls[0][0][..., 20_000:], x[..., 20_000:])
        assert torch.equal(got[..., :20_000], known[..., :20_000])


MASK = torch.tensor([True, True, False, False, False, False, True, True])
GIVEN = torch.tensor([1.0, 1.5, 0, 0, 0, 0, -1.0, -1.5], dtype=torch.float64)


def conditional(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the unknown steps given the known ones."""
    across, within = covariance[~MASK][:, MASK], covariance[MASK][:, MASK]
    gain = torch.linalg.solve(within, across.mT).mT
    return gain @ GIVEN[MASK], covariance[~MASK][:, ~MASK] - gain @ across.mT


def test_repaint_comes_nearer_to_the_conditional_mean_than_replacement() -> None:
    """Both ends of a correlated Gaussian are known; the largest error of the mean, exactly.

    Measured: replacement 0.42 (DDPM), 0.56 (DDIM); RePaint 0.29, 0.17, 0.12, 0.05 with 2, 5, 10, 40 resamples.
    """
    covariance, sigmas = ar1(8, 0.9), Karras(0.01, 20.0)(24)
    mean, _ = conditional(covariance)
    denoise = inpaint(correlated(covariance), GIVEN, MASK)

    def error(sampler: Sampler) -> float:
        return distance(law(sampler, denoise, sigmas, GIVEN, MASK)[0][~MASK], mean)

    replaced = error(Ancestral(1.0))
    errors = [error(Repaint(Ancestral(1.0), 1, n)) for n in (2, 5, 10, 40)]
    assert replaced > errors[0] > errors[1] > errors[2] > errors[3], (replaced, errors)
    assert errors[2] < 0.4 * replaced, (replaced, errors)
    assert errors[3] < 0.05, (replaced, errors)
    assert error(Ancestral(0.0)) > 0.2


def test_known_steps_sample_the_conditional_distribution() -> None:
    """With one noise level per step, mean and covariance to within the grid's 0.01; by replacement they are far off."""
    covariance, sigmas = ar1(8, 0.9), Karras(0.01, 80.0)(80)
    mean, spread = conditional(covariance)
    got, linear = law(Heun(), known_steps(correlated(covariance), GIVEN[None, None], MASK), sigmas, GIVEN, MASK)
    assert torch.equal(got[MASK], GIVEN[MASK])
    assert distance(got[~MASK], mean) < 0.01
    assert distance((linear @ linear.mT)[~MASK][:, ~MASK], spread) < 0.01
    assert linear[:, MASK].abs().max() < 1e-12  # noise at known steps is never read
    got, linear = law(Heun(), inpaint(correlated(covariance), GIVEN, MASK), sigmas, GIVEN, MASK)
    assert distance(got[~MASK], mean) > 0.2


@pytest.mark.parametrize("shape", SHAPES, ids=len)
def test_known_steps_are_shown_clean_at_level_0(shape: tuple[int, ...]) -> None:
    known, x = normal(*shape), 5 * normal(*shape, seed=1)
    steps = torch.arange(12) < 4
    for given in (steps, torch.stack([steps, ~steps])):
        denoise, calls = recorded(lambda x, sigma: 0.5 * x)
        for sigma in (torch.tensor(3.0), torch.tensor([3.0, 2.0]), torch.full((2, 12), 3.0)):
            got = known_steps(denoise, known, given)(x, sigma)
            seen, levels = calls[-1]
            where = given.expand(2, 12)
            assert torch.equal(levels == 0, where)
            assert torch.equal(levels[0][~where[0]], torch.full((8,), 3.0))
            clean = expand_like(where, x).expand(shape)
            assert torch.equal(seen[clean], known[clean])
            assert torch.equal(seen[~clean], x[~clean])
            assert torch.equal(got[clean], known[clean])
            assert torch.equal(got[~clean], 0.5 * x[~clean])


def test_masks_that_are_no_masks_are_refused() -> None:
    known = normal(1, 1, 4)
    with pytest.raises(ValueError, match=r"dtype torch.float32; it must be bool"):
        inpaint(rough, known, torch.ones(4))
    with pytest.raises(ValueError, match="must be bool"):
        known_steps(rough, known, torch.ones(4))
    for steps in (torch.ones(5, dtype=torch.bool), torch.ones(1, 1, 4, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"needs \(T,\) or \(B, T\) with T=4"):
            known_steps(rough, known, steps)


@pytest.mark.parametrize("inner", SAMPLERS, ids=repr)
def test_repaint_with_one_pass_over_the_whole_grid_is_its_sampler(inner: Sampler) -> None:
    x, sigmas = 80 * normal(2, 1, 6), Karras()(6)
    plain = inner(rough, x, sigmas, seeded_noise([1, 2]))
    assert torch.equal(Repaint(inner, 6, 1)(rough, x, sigmas, seeded_noise([1, 2])), plain)
    others = [Repaint(inner, 6, 2), Repaint(inner, 3, 2), Repaint(inner, 6, 3)]
    samples = [s(rough, x, sigmas, seeded_noise([1, 2])) for s in others]
    for a, b in pairwise([plain, *samples]):
        assert distance(a, b) > 1e-3


def test_repaint_goes_up_by_the_noise_between_the_levels_and_counts_places() -> None:
    """After a jump x - x0 has deviation sigma again: 20000 numbers, 4 standard errors, at every place of the grid."""
    sigmas, noise = torch.tensor([2.0, 1.8, 1.6, 1.4, 1.2, 1.0, 0.0]), seeded_noise([0])
    denoise, calls = recorded(lambda x, sigma: torch.full_like(x, 2.0))
    x = 2.0 + sigmas[0] * noise(torch.empty(1, 20_000))
    walk = list(Repaint(Ancestral(), jump=2, resamples=3).steps(denoise, x, sigmas, noise))
    assert [step.number for step in walk] == [0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3, 4, 5, 4, 5, 4, 5]
    for seen, sigma in calls:
        assert abs((seen - 2.0).std().item() / sigma.item() - 1) < 4 / math.sqrt(40_000)
    assert torch.equal(walk[-1].x, torch.full((1, 20_000), 2.0))


@pytest.mark.parametrize("settings", [{"jump": 0}, {"resamples": 0}])
def test_repaint_refuses_no_steps(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must both be at least 1"):
        Repaint(**settings)


def test_both_ends_given_the_middle_follows_the_conditional_mean() -> None:
    """Frame infilling as a whole: ends of a random walk given, what lies between is its bridge, a straight line."""
    ends = torch.tensor([[[-1.0, 1.0]]], dtype=torch.float64)
    full, mask = infill(ends, (0, 8), 9)
    denoise = inpaint(correlated(ar1(9, 0.99)), full, mask)
    got, _ = law(Repaint(Ancestral(1.0), 1, 40), denoise, Karras(0.01, 20.0)(24), full, mask)
    assert distance(got, torch.linspace(-1, 1, 9, dtype=torch.float64)) < 0.1
