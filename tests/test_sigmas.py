"""Grids against their closed forms and diffusers; densities against their closed-form distribution functions."""

import math
from collections.abc import Callable

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from mmdiff import density
from mmdiff.density import LogNormal, LogUniform, SigmaDensity, Table
from mmdiff.sigmas import DDPM, Cosine, Flow, Karras, Sigmas

GRIDS = [
    Karras(),
    Flow(),
    Flow(shift=3.0),
    Cosine(),
    *(DDPM(schedule, spacing=s) for schedule in ("linear", "cosine") for s in ("leading", "trailing", "linspace")),
]


@pytest.mark.parametrize("grid", GRIDS, ids=repr)
@pytest.mark.parametrize("steps", [1, 2, 7, 50, 1000])
def test_grid_falls_strictly_to_zero(grid: Sigmas, steps: int) -> None:
    sigmas = grid(steps)
    assert sigmas.shape == (steps + 1,)
    assert sigmas.dtype == torch.float32
    assert sigmas.isfinite().all()
    assert (sigmas.diff() < 0).all()
    assert sigmas[-1] == 0


@pytest.mark.parametrize("grid", GRIDS[:5], ids=repr)
@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps_are_refused(grid: Sigmas, steps: int) -> None:
    with pytest.raises(ValueError, match=rf"steps={steps} must be at least 1"):
        grid(steps)


def test_karras_ends_and_rho() -> None:
    torch.testing.assert_close(Karras(0.01, 50.0)(10)[[0, -2]], torch.tensor([50.0, 0.01]))
    torch.testing.assert_close(Karras(1.0, 5.0, rho=1.0)(5), torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.0]))


def test_flow_is_uniform_in_time_and_a_shift_multiplies_sigma() -> None:
    sigmas = Flow()(10).double()
    torch.testing.assert_close(sigmas / (1 + sigmas), torch.linspace(0.999, 0, 11).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(Flow(shift=3.0)(10), 3 * Flow()(10))
    t, shifted = (s / (1 + s) for s in (Flow()(10), Flow(shift=3.0)(10)))
    torch.testing.assert_close(shifted, 3 * t / (1 + 2 * t))
    assert Flow(t_max=0.5)(4)[0] == 1


def test_cosine_is_uniform_in_the_angle() -> None:
    angle = Cosine(sigma_max=100.0)(8).double().atan()
    torch.testing.assert_close(angle, torch.linspace(math.atan(100), 0, 9).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 5, 20, 40])
def test_karras_matches_diffusers(steps: int) -> None:
    from diffusers import EDMEulerScheduler

    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, rho=7.0)
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(Karras()(steps), scheduler.sigmas, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("table", "theirs"),
    [
        (DDPM(), "linear"),
        (DDPM("scaled_linear", 1000, 0.00085, 0.012), "scaled_linear"),
        (DDPM("cosine"), "squaredcos_cap_v2"),
        (DDPM("cosine", 100), "squaredcos_cap_v2"),
    ],
    ids=repr,
)
def test_table_matches_diffusers(table: DDPM, theirs: str) -> None:
    from diffusers import DDPMScheduler

    alpha_bar = DDPMScheduler(
        table.train_steps, beta_start=table.beta_start, beta_end=table.beta_end, beta_schedule=theirs
    ).alphas_cumprod.double()
    # their product is in float32, where 1 - alpha_bar = 4e-5 keeps 3 digits at index 0 (measured: at most 2.7e-4)
    torch.testing.assert_close(table.table, ((1 - alpha_bar) / alpha_bar).sqrt(), rtol=5e-4, atol=0)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [2, 7, 30, 50, 999, 1000])
def test_spacing_matches_diffusers(spacing: str, steps: int) -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(1000, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    assert torch.equal(DDPM(spacing=spacing).indices(steps), scheduler.timesteps)


def test_table_outlives_inference_mode() -> None:
    grid = DDPM(train_steps=17)
    with torch.inference_mode():
        assert not grid.table.is_inference()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Karras(sigma_min=0), r"sigma_min=0, sigma_max=80.0 must satisfy"),
        (lambda: Karras(sigma_min=90), r"sigma_min=90, sigma_max=80.0 must satisfy"),
        (lambda: Karras(rho=0), r"rho=0 must be positive"),
        (lambda: Flow(shift=0), r"shift=0 must be positive"),
        (lambda: Flow(t_max=1.0), r"t_max=1.0 must lie between 0 and 1"),
        (lambda: Cosine(sigma_max=math.inf), r"sigma_max=inf must be positive and finite"),
        (lambda: DDPM("squared"), r"schedule='squared' must be one of"),
        (lambda: DDPM(spacing="even"), r"spacing='even' must be one of"),
        (lambda: DDPM(train_steps=1), r"train_steps=1 must be at least 2"),
        (lambda: DDPM(beta_end=1.0), r"beta_start=0.0001, beta_end=1.0 must satisfy"),
        (lambda: DDPM(train_steps=10)(11), r"steps=11 must lie between 1 and train_steps=10"),
        (lambda: LogNormal(std=0), r"std=0 positive"),
        (lambda: LogUniform(1, 1), r"sigma_min=1, sigma_max=1 must satisfy"),
        (lambda: density.Cosine(sigma_max=math.inf), r"sigma_max=inf must satisfy"),
    ],
)
def test_wrong_settings_are_named(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def log_normal_cdf(sigma: Tensor) -> Tensor:
    return torch.special.ndtr((sigma.log() + 1.2) / 1.2)


def log_uniform_cdf(sigma: Tensor) -> Tensor:
    return (sigma / 0.01).log() / math.log(1e4)


def cosine_cdf(sigma: Tensor) -> Tensor:
    low, high = math.atan(0.001), math.atan(1000)
    return (sigma.atan() - low) / (high - low)


def kolmogorov(values: Tensor, cdf: Callable[[Tensor], Tensor]) -> float:
    """Largest distance of the values' empirical distribution function from `cdf`, times sqrt(n)."""
    share = cdf(values.sort().values.double())
    n = len(values)
    above = torch.arange(1, n + 1) / n - share
    return n**0.5 * torch.maximum(above, 1 / n - above).max().item()


@pytest.mark.parametrize(
    ("law", "cdf"),
    [
        (LogNormal(), log_normal_cdf),
        (LogUniform(0.01, 100.0), log_uniform_cdf),
        (density.Cosine(), cosine_cdf),
    ],
    ids=["log-normal", "log-uniform", "cosine"],
)
def test_draws_follow_the_closed_form(law: SigmaDensity, cdf: Callable[[Tensor], Tensor]) -> None:
    draws = law.sample(50_000, "cpu", torch.Generator().manual_seed(0))
    assert draws.shape == (50_000,)
    assert draws.dtype == torch.float32
    assert (draws > 0).all()
    assert kolmogorov(draws, cdf) < 1.95  # a right law exceeds it once in 1000 seeds; this seed is fixed
    assert kolmogorov(draws * 1.1, cdf) > 1.95  # and the test has power


def test_log_normal_is_logit_normal_in_flow_time() -> None:
    sigma = LogNormal(0.0, 1.0).sample(50_000, "cpu", torch.Generator().manual_seed(0))
    assert kolmogorov(sigma / (1 + sigma), lambda t: torch.special.ndtr(t.logit())) < 1.95


def test_table_draws_are_uniform_over_its_levels() -> None:
    grid = DDPM("cosine", train_steps=20)
    draws = Table(grid).sample(50_000, "cpu", torch.Generator().manual_seed(0))
    levels, counts = draws.unique(return_counts=True)
    assert torch.equal(levels, grid.table.float())
    chi_square = ((counts - 2500) ** 2 / 2500).sum()
    assert chi_square < 43.8  # 99.9 % quantile at 19 degrees of freedom


@pytest.mark.parametrize("law", [LogNormal(), LogUniform(0.01, 100.0), density.Cosine(), Table()], ids=repr)
def test_draws_depend_on_the_generator_alone(law: SigmaDensity) -> None:
    first, again, other = (law.sample(8, "cpu", torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    before = torch.random.get_rng_state()
    law.sample(8, "cpu", torch.Generator())
    assert torch.equal(before, torch.random.get_rng_state())
    assert law.sample(2).shape == (2,)
    assert law.quantile(torch.tensor([2.0**-26, 1 - 2.0**-24])).isfinite().all()


@pytest.mark.parametrize(
    ("kind", "config", "expected"),
    [
        (Sigmas, {"class_path": "mmdiff.sigmas.Karras", "init_args": {"sigma_max": 10.0}}, Karras(sigma_max=10.0)),
        (Sigmas, {"class_path": "mmdiff.sigmas.Flow", "init_args": {"shift": 3}}, Flow(3.0)),
        (Sigmas, {"class_path": "mmdiff.sigmas.Cosine"}, Cosine()),
        (Sigmas, {"class_path": "mmdiff.sigmas.DDPM", "init_args": {"spacing": "leading"}}, DDPM(spacing="leading")),
        (SigmaDensity, {"class_path": "mmdiff.density.LogNormal", "init_args": {"mean": 0.0}}, LogNormal(mean=0.0)),
        (SigmaDensity, {"class_path": "mmdiff.density.Cosine"}, density.Cosine()),
        (
            SigmaDensity,
            {"class_path": "mmdiff.density.Table", "init_args": {"table": {"train_steps": 50}}},
            Table(DDPM(train_steps=50)),
        ),
    ],
)
def test_builds_from_a_config(kind: type, config: dict, expected: object) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--part", type=kind)
    assert parser.instantiate(parser.parse_object({"part": config})).part == expected
