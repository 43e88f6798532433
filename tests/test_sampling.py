"""Samplers against closed-form solutions, their noise, their settings. See also test_sampling_oracles and its like.

Every denoiser here is a formula, so a test takes milliseconds. The tolerances are stated with what was measured.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from mmdiff.precond import Eps
from mmdiff.sampling import Ancestral, Denoise, DPMpp2M, Heun, Sampler, seeded_noise, start
from mmdiff.sigmas import DDPM, Karras, Sigmas
from mmdiff.sigmas import Flow as FlowGrid

SAMPLERS = [Ancestral(), Ancestral(1.0), Heun(), Heun("flow"), DPMpp2M()]
DETERMINISTIC = [Ancestral(), Heun(), Heun("flow"), DPMpp2M()]


def gaussian(mean: float, std: float) -> Denoise:
    """The exact denoiser of data ~ N(mean, std^2)."""
    return lambda x, sigma: (mean * sigma**2 + x * std**2) / (sigma**2 + std**2)


def mixture(share: float, std: float) -> Denoise:
    """The exact denoiser of data ~ share N(1, std^2) + (1 - share) N(-1, std^2)."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        right = torch.sigmoid(2 * x / (std**2 + sigma**2) + math.log(share / (1 - share)))
        means = gaussian(1.0, std)(x, sigma), gaussian(-1.0, std)(x, sigma)
        return right * means[0] + (1 - right) * means[1]

    return denoise


def never(like: Tensor) -> Tensor:
    raise AssertionError("a deterministic sampler asked for noise")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def distance(got: Tensor, expected: Tensor) -> float:
    return (got - expected).abs().max().item()


# Identities


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
@pytest.mark.parametrize("shape", [(1, 1, 7), (2, 1, 5, 3), (1, 3, 2, 5, 7)])
def test_one_step_is_the_denoiser(sampler: Sampler, shape: tuple[int, ...]) -> None:
    denoise, x = mixture(0.3, 0.1), normal(*shape)
    sample = sampler(denoise, 80 * x, torch.tensor([80.0, 0.0]), never)
    torch.testing.assert_close(sample, denoise(80 * x, torch.tensor(80.0)))


def test_ancestral_without_noise_is_euler() -> None:
    denoise, x, sigmas = mixture(0.3, 0.5), 80 * normal(64, dtype=torch.float64), Karras()(20).double()
    euler = x
    for sigma, sigma_next in pairwise(sigmas):
        euler = euler + (sigma_next - sigma) * (euler - denoise(euler, sigma)) / sigma
    assert distance(Ancestral(0.0)(denoise, x, sigmas, never), euler) < 1e-12


def test_heun_is_the_trapezoid_rule_in_both_clocks() -> None:
    denoise, x, sigmas = mixture(0.3, 0.5), 9 * normal(64, dtype=torch.float64), FlowGrid(t_max=0.9)(12).double()
    slope = z = x
    for sigma, sigma_next in pairwise(sigmas):
        slope = (z - denoise(z, sigma)) / sigma
        z_next = z + (sigma_next - sigma) * slope
        if sigma_next > 0:
            z_next = z + (sigma_next - sigma) * (slope + (z_next - denoise(z_next, sigma_next)) / sigma_next) / 2
        z = z_next
    assert distance(Heun("sigma")(denoise, x, sigmas, never), z) < 1e-12

    def velocity(z: Tensor, t: Tensor) -> Tensor:  # of z = (1 - t) x0 + t eps = (1 - t) x
        return (z - denoise(z / (1 - t), t / (1 - t))) / t

    times = sigmas / (1 + sigmas)
    z = x * (1 - times[0])
    for t, t_next in pairwise(times):
        slope = velocity(z, t)
        z_next = z + (t_next - t) * slope
        z = z + (t_next - t) * (slope + velocity(z_next, t_next)) / 2 if t_next > 0 else z_next
    assert distance(Heun("flow")(denoise, x, sigmas, never), z) < 1e-12


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_steps_are_the_walk(sampler: Sampler) -> None:
    x, sigmas = 80 * normal(2, 3), Karras()(6)
    sample = sampler(mixture(0.3, 0.5), x, sigmas, seeded_noise([1, 2]))
    walk = list(sampler.steps(mixture(0.3, 0.5), x, sigmas, seeded_noise([1, 2])))
    assert [step.number for step in walk] == list(range(6))
    assert [step.sigma for step in walk] == sigmas[:-1].tolist()
    assert torch.equal(walk[-1].x, sample)
    states = [x] + [step.x for step in walk]
    for (_, sigma, _, x0), state in zip(walk, states[:-1], strict=True):
        assert torch.equal(x0, mixture(0.3, 0.5)(state, torch.tensor(sigma)))


@pytest.mark.parametrize("sampler", DETERMINISTIC, ids=repr)
def test_stopping_and_going_on_is_one_walk_for_one_step_methods(sampler: Sampler) -> None:
    x, sigmas = 80 * normal(8, dtype=torch.float64), Karras()(8).double()
    whole = sampler(mixture(0.3, 0.5), x, sigmas, never)
    half = sampler(mixture(0.3, 0.5), x, sigmas[:5], never)
    parts = sampler(mixture(0.3, 0.5), half, sigmas[4:], never)
    if isinstance(sampler, DPMpp2M):  # a multistep method begins anew, with a first-order step
        assert distance(parts, whole) > 1e-6
    else:
        assert torch.equal(parts, whole)


# Oracles


@pytest.mark.parametrize(
    ("sampler", "order"), [(Ancestral(), 1), (Heun(), 2), (Heun("flow"), 2), (DPMpp2M(), 2)], ids=repr
)
def test_order_of_convergence(sampler: Sampler, order: int) -> None:
    """On a Gaussian the exact solution is x - mean ~ sqrt(std^2 + sigma^2). Measured: 0.99, 2.01, 1.99, 2.01."""
    mean, std, grid = 0.3, 0.5, Karras(0.05, 10.0)
    x = 10 * normal(16, dtype=torch.float64)
    exact = mean + (x - mean) * math.sqrt((std**2 + 0.05**2) / (std**2 + 10.0**2))
    errors = [distance(sampler(gaussian(mean, std), x, grid.levels(n + 1), never), exact) for n in (64, 128, 256)]
    for coarse, fine in pairwise(errors):
        assert abs(math.log2(coarse / fine) - order) < 0.05


def test_on_a_flow_grid_heun_wants_the_flow_clock() -> None:
    """Why `clock` exists: with 10 steps of a flow grid, the slope averaged over sigma is worse than plain Euler."""
    x, sigmas = normal(64, dtype=torch.float64), FlowGrid()(10).double()
    exact = 0.5 * x
    x = x * math.hypot(0.5, float(sigmas[0]))
    error = {s: distance(s(gaussian(0.0, 0.5), x, sigmas, never), exact) for s in (Ancestral(), Heun(), Heun("flow"))}
    assert error[Heun("flow")] < 0.3 * error[Ancestral()]
    assert error[Heun("sigma")] > error[Ancestral()]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_samples_follow_the_mixture(sampler: Sampler) -> None:
    """20000 samples of 0.3 N(1, 0.2^2) + 0.7 N(-1, 0.2^2): its distribution function within 0.02."""
    sigmas = Karras(0.002, 20.0)(100)
    noise = seeded_noise([5])
    sample = sampler(mixture(0.3, 0.2), start(normal(1, 20_000), sigmas[0]), sigmas, noise)[0].sort().values
    cdf = 0.3 * torch.special.ndtr((sample - 1) / 0.2) + 0.7 * torch.special.ndtr((sample + 1) / 0.2)
    assert distance(cdf, torch.linspace(0, 1, 20_000)) < 0.02


@pytest.mark.parametrize("sigma", [0.5, 1.0, 10.0])
def test_start_is_exact_for_gaussian_data_of_unit_variance(sigma: float) -> None:
    """Why sqrt(1 + sigma^2): the exact ODE then gives back the very noise, while noise * sigma gives too little."""
    noise = normal(64, dtype=torch.float64)
    sigmas = torch.cat([torch.linspace(sigma, 1e-3, 400, dtype=torch.float64), torch.zeros(1)])
    sample = Heun()(gaussian(0.0, 1.0), start(noise, sigma), sigmas, never)
    assert distance(sample, noise) < 1e-3
    low = Heun()(gaussian(0.0, 1.0), noise * sigma, sigmas, never)
    assert distance(low, noise * sigma / math.hypot(1, sigma)) < 1e-3
    torch.testing.assert_close(start(noise, sigma) * Eps()(torch.tensor(sigma))[2], noise)


def test_float32_is_exact_at_sigma_1e5() -> None:
    """From sigma 1e5 the interpolation stays within 1e-6 of float64; x + d_sigma * slope is 2e-2 off in one step."""
    x, sigmas = 1e5 * normal(256), Karras(0.002, 1e5)(30)
    for sampler in DETERMINISTIC[:1] + DETERMINISTIC[2:]:  # Heun in sigma extrapolates by sigma / sigma_next
        single = sampler(gaussian(0.3, 0.5), x, sigmas, never)
        assert single.dtype == torch.float32
        double = sampler(gaussian(0.3, 0.5), x.double(), sigmas, never)
        assert distance(single, double) < 5e-6
    one = torch.tensor([1e5, 0.0])
    exact = gaussian(0.3, 0.5)(x, one[0])
    assert torch.equal(Ancestral()(gaussian(0.3, 0.5), x, one, never), exact)
    assert distance(x + (one[1] - one[0]) * (x - exact) / one[0], exact) > 1e-3


def test_state_stays_in_float32() -> None:
    """A half-precision start and a half-precision denoiser leave the state between the steps in float32."""
    dtypes = []

    def half(x: Tensor, sigma: Tensor) -> Tensor:
        dtypes.append((x.dtype, sigma.dtype, sigma.shape))
        return gaussian(0.3, 0.5)(x, sigma).half()

    assert Heun()(half, normal(4).half(), Karras(0.1, 1.0)(3), never).dtype == torch.float32
    assert set(dtypes) == {(torch.float32, torch.float32, ())}


def test_gradients_flow_through_the_walk() -> None:
    x = normal(4).requires_grad_()
    DPMpp2M()(gaussian(0.3, 0.5), x, Karras()(5), never).sum().backward()
    assert x.grad is not None
    assert (x.grad != 0).all()


# Noise


def test_a_batch_is_its_singles() -> None:
    """Batch of 4 and 4 batches of 1: the same noise bit for bit, the same samples to 1e-6."""
    seeds, sigmas, like = [3, 1, 4, 15], Karras()(10), torch.empty(4, 1, 5, 3)

    def run(seeds: list[int]) -> Tensor:
        noise = seeded_noise(seeds)
        first = noise(like[: len(seeds)])
        return Ancestral(1.0)(mixture(0.3, 0.5), start(first, sigmas[0]), sigmas, noise)

    batch, singles = run(seeds), torch.cat([run([seed]) for seed in seeds])
    assert torch.equal(seeded_noise(seeds)(like), torch.cat([seeded_noise([s])(like[:1]) for s in seeds]))
    assert distance(batch, singles) < 1e-6
    assert distance(run(seeds[::-1]).flip(0), batch) < 1e-6
    assert distance(run([3, 1, 4, 16])[3], batch[3]) > 0.01


def test_seeded_noise_is_a_stream_that_leaves_the_global_one_alone() -> None:
    before = torch.random.get_rng_state()
    noise, like = seeded_noise([0, 0]), torch.empty(2, 3, dtype=torch.float64)
    first, second = noise(like), noise(like)
    assert first.dtype == torch.float64
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first, second)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_a_sample_does_not_depend_on_the_device(sampler: Sampler) -> None:
    def run(device: str) -> Tensor:
        noise, sigmas = seeded_noise([1, 2]), Karras()(20)
        x = start(noise(torch.empty(2, 1, 64, device=device)), sigmas[0])
        return sampler(mixture(0.3, 0.5), x, sigmas.to(device), noise).cpu()

    assert distance(run("cuda"), run("cpu")) < 1e-4


# Settings and messages


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"class_path": "mmdiff.sampling.Ancestral", "init_args": {"eta": 1}}, Ancestral(1.0)),
        ({"class_path": "mmdiff.sampling.Heun", "init_args": {"clock": "flow"}}, Heun("flow")),
        ({"class_path": "mmdiff.sampling.DPMpp2M"}, DPMpp2M()),
    ],
)
def test_builds_from_a_config(config: dict, expected: Sampler) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--sampler", type=Sampler)
    assert parser.instantiate(parser.parse_object({"sampler": config})).sampler == expected


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Ancestral(1.5), r"eta=1.5 must lie between 0"),
        (lambda: Heun("t"), r"clock='t' must be sigma"),
        (lambda: seeded_noise([]), r"seeds=\[\] must hold one seed"),
        (lambda: seeded_noise([1, 2])(torch.empty(3, 1)), r"batch of 3 needs as many seeds, not 2"),
    ],
)
def test_wrong_settings_are_named(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    "sigmas", [[1.0], [1.0, 1.0], [0.0, 1.0], [1.0, -1.0], [math.inf, 0.0], [math.nan, 0.0], [[1.0, 0.0]], 1.0]
)
@pytest.mark.parametrize("sampler", DETERMINISTIC, ids=repr)
def test_wrong_grids_are_refused_before_any_call(sampler: Sampler, sigmas: list) -> None:
    with pytest.raises(ValueError, match=r"sigmas=.* must be a list of at least 2 finite, strictly decreasing"):
        sampler.steps(lambda x, sigma: pytest.fail("called"), normal(4), torch.tensor(sigmas), never)


@pytest.mark.parametrize("grid", [Karras(), FlowGrid(), DDPM("cosine")], ids=repr)
@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_every_sampler_walks_every_grid(sampler: Sampler, grid: Sigmas) -> None:
    sigmas = grid(12)
    noise = seeded_noise([1, 2, 3])
    sample = sampler(mixture(0.3, 0.5), start(noise(torch.empty(3, 500)), sigmas[0]), sigmas, noise)
    assert sample.isfinite().all()
    if not (sampler == Heun("sigma") and grid == DDPM("cosine")):  # its first step falls from 20291 to 7: wrong clock
        assert sample.abs().max() < 4
