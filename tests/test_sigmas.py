"""Noise grids and tables against their closed forms and diffusers; what a shift is, and that it happens once."""

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from mmdiff.config import build
from mmdiff.sigmas import DDPM, Cosine, Flow, Geometric, Karras, LengthShift, ResolutionShift, Shift, Sigmas
from mmdiff.tables import SCHEDULES, ZERO_SNR_SIGMA, betas, sigma_table

LATENT = DDPM("scaled_linear", 1000, 0.00085, 0.012)  # the table of latent diffusion
TABLES = [DDPM(), LATENT, DDPM("cosine"), DDPM("sigmoid")]
ZERO_SNR = [replace(table, zero_terminal_snr=True) for table in TABLES]
GRIDS = [
    Karras(),
    Geometric(),
    Geometric(rho=2.0),
    Geometric(0.002, 1e5, rho=0.5),
    Flow(),
    Flow(shift=3.0),
    Flow(shift=0.1, t_max=0.99999),
    Cosine(),
    Cosine(shift=4.0),
    *(DDPM(schedule, spacing=s) for schedule in SCHEDULES for s in ("leading", "trailing", "linspace")),
    *ZERO_SNR,
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


@pytest.mark.parametrize("grid", GRIDS[:8], ids=repr)
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
        (DDPM("sigmoid"), "sigmoid"),
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
        (lambda: DDPM("cosine", beta_end=0.01), r"beta_end=0.01 have no meaning with schedule='cosine'"),
        (lambda: DDPM(train_steps=4000, zero_terminal_snr=True), r"puts the last but one of 4000 levels at sigma="),
        (lambda: Geometric(rho=0), r"rho=0 must be positive and finite"),
        (lambda: Geometric(sigma_min=0), r"sigma_min=0, sigma_max=50.0 must satisfy"),
        (lambda: Geometric(rho=6.0)(1000), r"steps=1000: levels of Geometric.* are equal or infinite in float32"),
        (lambda: Cosine(shift=math.inf), r"shift=inf must be positive"),
        (lambda: ResolutionShift(0), r"base=0 must be at least 1"),
        (lambda: ResolutionShift(1, math.nan), r"power=nan must be finite"),
        (lambda: LengthShift(9, 9), r"base_length=9, max_length=9 must satisfy"),
        (lambda: LengthShift(max_mu=math.inf), r"max_mu=inf must be finite"),
        (lambda: Flow(ResolutionShift(256))(8), r"depends on the clip's size: call .sized"),
    ],
)
def test_wrong_settings_are_named(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.schedule)
def test_zero_terminal_snr_matches_diffusers_in_float64(table: DDPM) -> None:
    from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr

    beta = betas(table.schedule, table.train_steps, table.beta_start, table.beta_end)
    alpha_bar = (1 - rescale_zero_terminal_snr(beta)).cumprod(0)
    assert alpha_bar[-1] == 0  # sigma = inf, where ours is 1e5: alpha_bar 1e-10
    theirs, ours = ((1 - alpha_bar[:-1]) / alpha_bar[:-1]).sqrt(), replace(table, zero_terminal_snr=True).table
    # 1 - alpha_bar is 1e-4 at index 0 and the last alphas are differences of close numbers: 1e-16 / 1e-5, accumulated
    torch.testing.assert_close(ours[:-1], theirs, rtol=1e-9, atol=0)
    torch.testing.assert_close(ours[0], table.table[0], rtol=1e-9, atol=0)  # the first level stays
    assert ours[-1] == ZERO_SNR_SIGMA


def test_reference_zero_terminal_snr_is_not_even_falling() -> None:
    """diffusers caps alpha_bar at 2^-24, sigma 4096, below the level before it; ours is the largest level."""
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    scheduler.set_timesteps(1000)
    ours = DDPM(zero_terminal_snr=True)(1000)
    assert scheduler.sigmas[0] < 4096.1
    assert scheduler.sigmas[1] > 15000  # a sampler would add noise in its first step
    torch.testing.assert_close(ours[1:], scheduler.sigmas[1:], rtol=5e-4, atol=0)  # the rest agrees, see above
    assert ours[0] == ours.max() == 1e5


@pytest.mark.parametrize(("before", "beta", "eps", "after"), [(0.8, 0.1, -0.3, 0.664), (0.5, 0.04, 1.5, 0.790)])
def test_one_step_of_the_chain(before: float, beta: float, eps: float, after: float) -> None:
    low, high = sigma_table(torch.tensor([0.02, beta], dtype=torch.float64)).tolist()
    x = before * math.hypot(1, low)  # x_t / alpha_t: our x
    x = x + math.sqrt(high**2 - low**2) * eps
    assert x / math.hypot(1, high) == pytest.approx(after, abs=5e-4)


@pytest.mark.parametrize(
    ("table", "worst", "sigma"),
    [(DDPM(), 2.1e-5, 157.4), (LATENT, 2.4e-3, 14.61), (DDPM("cosine"), 1.3e-9, 20291), (DDPM("sigmoid"), 2e-5, 158.7)]
    + [(table, 1e-10, 1e5) for table in ZERO_SNR],
    ids=repr,
)
def test_the_chain_ends_in_the_standard_normal(table: DDPM, worst: float, sigma: float) -> None:
    """q(x_T | x_0 = 1) by the chain's own recursion is the closed form; its distance from N(0, 1) in nats is stated."""
    alpha_bar = 1 / (1 + table.table**2)
    beta = 1 - alpha_bar / torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    mean, variance = 1.0, 0.0
    for b in beta.tolist():
        mean, variance = math.sqrt(1 - b) * mean, (1 - b) * variance + b
    last = table.table[-1].item()
    assert last == pytest.approx(sigma, rel=1e-3)
    assert mean == pytest.approx(1 / math.hypot(1, last), rel=1e-6)
    assert variance == pytest.approx(last**2 / (1 + last**2), rel=1e-9)
    divergence = (mean**2 + variance - 1 - math.log(variance)) / 2
    assert divergence < worst
    if table == LATENT:  # the fault that the rescaling is for: some signal is left, which sampling never sees
        assert divergence > 1e-3


def test_geometric_levels() -> None:
    torch.testing.assert_close(Geometric(0.01, 100.0)(5), torch.tensor([100, 10, 1, 0.1, 0.01, 0]))
    e = math.e
    torch.testing.assert_close(Geometric(1.0, e**4, rho=2.0)(3), torch.tensor([e**4, e, 1, 0]))


@pytest.mark.parametrize(("option", "kind"), [("use_karras_sigmas", Karras), ("use_exponential_sigmas", Geometric)])
@pytest.mark.parametrize("steps", [2, 20])
def test_continuous_grids_match_k_diffusion_formulas(option: str, kind: type[Sigmas], steps: int) -> None:
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear", **{option: True})
    scheduler.set_timesteps(steps)
    ends: dict[str, Any] = {"sigma_min": scheduler.sigmas[-2].item(), "sigma_max": scheduler.sigmas[0].item()}
    torch.testing.assert_close(kind(**ends)(steps), scheduler.sigmas, rtol=2e-6, atol=0)  # theirs rounds the ends


def flow_times(sigmas: Tensor) -> Tensor:
    return (sigmas.double() / (1 + sigmas.double())).float()


@pytest.mark.parametrize("steps", [1, 4, 50])
def test_flow_shift_matches_diffusers_on_given_levels(steps: int) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    plain = flow_times(Flow()(steps))[:-1].tolist()
    for options, given, shift in [
        ({"shift": 3.0}, {}, 3.0),
        ({"use_dynamic_shifting": True}, {"mu": 0.8}, math.exp(0.8)),
        ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, {"mu": 2.5}, 2.5),
    ]:
        scheduler = FlowMatchEulerDiscreteScheduler(**options)
        scheduler.set_timesteps(sigmas=plain, **given)
        torch.testing.assert_close(flow_times(Flow(shift)(steps)), scheduler.sigmas, rtol=2e-6, atol=0)


def test_reference_flow_shifts_its_own_levels_twice() -> None:
    """diffusers shifts sigma_min when it is built and again in set_timesteps; here sigma is multiplied once."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
    scheduler.set_timesteps(1000)
    t = scheduler.sigmas[-2].double()
    assert t == pytest.approx(0.00893, abs=5e-6)
    assert t / (1 - t) * 999 == pytest.approx(9, rel=1e-4)  # the smallest level is t = 1/1000, sigma = 1/999
    ours = Flow(shift=3.0, t_max=0.999)(999)[-2].item()  # 999 steps of 1/1000 from 0.999: the same smallest level
    assert ours * 999 == pytest.approx(3, rel=1e-4)
    assert ours / (1 + ours) == pytest.approx(0.00299, abs=5e-6)


@pytest.mark.parametrize("grid", [Flow(t_max=0.9), Cosine(sigma_max=50.0)], ids=repr)
def test_a_shift_is_one_multiplication_of_every_level(grid: Flow | Cosine) -> None:
    sized = replace(grid, shift=ResolutionShift(64)).sized((4, 16, 16))
    torch.testing.assert_close(sized(9), grid(9) * 4)  # sqrt(1024 / 64)
    assert sized.sized((1, 1, 1)) == sized  # once sized, no second size applies
    torch.testing.assert_close(replace(grid, shift=4.0)(9), grid(9) * 4)


def test_shift_of_a_resolution_is_eq_23() -> None:
    t = flow_times(Flow()(12)).double()
    ratio = math.sqrt(64 * 64 / 1024)
    expected = ratio * t / (1 + (ratio - 1) * t)
    shifted = flow_times(Flow(ResolutionShift(1024)).sized((1, 64, 64))(12))
    torch.testing.assert_close(shifted, expected.float(), rtol=2e-6, atol=0)


@pytest.mark.parametrize(
    ("positions", "mu"), [(256, 0.5), (4096, 1.15), (2176, 0.825), (128, 0.478333), (8192, 1.843333)]
)
def test_shift_of_a_length_is_linear_in_mu(positions: int, mu: float) -> None:
    assert math.log(LengthShift().factor((positions,))) == pytest.approx(mu, abs=1e-6)
    assert LengthShift().factor((positions // 8, 2, 4)) == LengthShift().factor((positions,))


def test_grids_without_a_size_are_what_they_are_at_every_size() -> None:
    for grid in GRIDS:
        assert grid.sized((3, 5)) is grid


def concrete(kind: type) -> set[type]:
    below = {found for sub in kind.__subclasses__() for found in concrete(sub)}
    own = {kind} if kind.__module__.startswith("mmdiff.") and not getattr(kind, "__abstractmethods__", None) else set()
    return own | below


CHANGES: list[tuple[Sigmas, dict[str, Any]]] = [
    (Karras(), {"sigma_min": 0.01, "sigma_max": 10.0, "rho": 3.0}),
    (Geometric(), {"sigma_min": 0.02, "sigma_max": 10.0, "rho": 2.0}),
    (Flow(), {"shift": 2.0, "t_max": 0.9}),
    (Cosine(), {"sigma_max": 10.0, "shift": 2.0}),
    (
        DDPM(),
        {"schedule": "sigmoid", "train_steps": 500, "beta_start": 2e-4, "beta_end": 0.01, "spacing": "leading"}
        | {"zero_terminal_snr": True},
    ),
]


@pytest.mark.parametrize(("grid", "changes"), CHANGES, ids=lambda value: type(value).__name__)
def test_every_argument_changes_the_grid(grid: Sigmas, changes: dict[str, Any]) -> None:
    assert {field.name for field in fields(grid)} == set(changes)
    for name, value in changes.items():
        assert not torch.equal(replace(grid, **{name: value})(10), grid(10)), name


@pytest.mark.parametrize(
    ("shift", "changes"),
    [
        (ResolutionShift(64), {"base": 32, "power": 1.0}),
        (LengthShift(), {"base_length": 128, "max_length": 1024, "base_mu": 0.0, "max_mu": 2.0}),
    ],
    ids=["resolution", "length"],
)
def test_every_argument_changes_the_shift(shift: Shift, changes: dict[str, Any]) -> None:
    assert {field.name for field in fields(shift)} == set(changes)
    for name, value in changes.items():
        assert replace(shift, **{name: value}).factor((2, 16, 16)) != shift.factor((2, 16, 16)), name


def test_no_grid_and_no_shift_is_left_out() -> None:
    assert concrete(Sigmas) == {type(grid) for grid, _ in CHANGES}
    assert concrete(Shift) == {ResolutionShift, LengthShift}


def flow_with(shift: dict[str, Any]) -> dict[str, Any]:
    return {"class_path": "mmdiff.sigmas.Flow", "init_args": {"shift": shift}}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"class_path": "mmdiff.sigmas.Karras", "init_args": {"sigma_max": 10.0}}, Karras(sigma_max=10.0)),
        ({"class_path": "mmdiff.sigmas.Geometric", "init_args": {"rho": 2}}, Geometric(rho=2.0)),
        ({"class_path": "mmdiff.sigmas.Flow", "init_args": {"shift": 3}}, Flow(3.0)),
        (
            flow_with({"class_path": "mmdiff.sigmas.ResolutionShift", "init_args": {"base": 1024}}),
            Flow(ResolutionShift(1024)),
        ),
        (
            flow_with({"class_path": "mmdiff.sigmas.LengthShift", "init_args": {"max_mu": 2}}),
            Flow(LengthShift(max_mu=2.0)),
        ),
        ({"class_path": "mmdiff.sigmas.Cosine", "init_args": {"shift": 4}}, Cosine(shift=4.0)),
        (
            {"class_path": "mmdiff.sigmas.DDPM", "init_args": {"spacing": "leading", "zero_terminal_snr": True}},
            DDPM(spacing="leading", zero_terminal_snr=True),
        ),
    ],
)
def test_builds_from_a_config(config: dict[str, Any], expected: Sigmas) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--part", type=Sigmas)
    assert parser.instantiate(parser.parse_object({"part": config})).part == expected
    assert build(config) == expected
