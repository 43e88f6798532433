"""Samplers against the schedulers of diffusers, network by network, on the schedulers' own levels.

Every network here is a formula, so a test takes milliseconds. The tolerances are stated with what was measured.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mmdiff.precond import EDM, Eps, Flow, Precond, V
from mmdiff.sampling import (
    AdamsBashforth,
    Ancestral,
    Denoise,
    DPMpp2M,
    DPMpp2MSDE,
    DPMpp3M,
    Heun,
    UniPC,
    seeded_noise,
    start,
)
from mmdiff.sigmas import DDPM, Karras
from mmdiff.sigmas import Flow as FlowGrid
from tests.oracles import Mixture, distance


def mixture(x: Tensor, sigma: Tensor) -> Tensor:
    """The exact denoiser of a mixture of two Gaussians, of points in the last axis."""
    return Mixture(x.shape[-1]).denoise(x, sigma)


def wrap(network: Callable[[Tensor, Tensor], Tensor], precond: Precond) -> Denoise:
    """D = c_skip x + c_out F(c_in x, c_noise)."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        c_skip, c_out, c_in, c_noise = precond(sigma)
        return c_skip * x + c_out * network(c_in * x, c_noise)

    return denoise


def network(x: Tensor, c_noise: Tensor) -> Tensor:
    """Some network that depends on both its arguments, the same one for us and for diffusers."""
    return 0.9 * torch.tanh(1.3 * x) + 0.2 * torch.sin(x + c_noise / 100)


def eps_network(x_t: Tensor, index: Tensor) -> Tensor:
    """The same for eps: like a trained one it predicts x_t itself where x_t is noise, or the samples would explode."""
    return index / 1000 * x_t + 0.2 * torch.sin(3 * x_t + index / 200)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def never(like: Tensor) -> Tensor:
    raise AssertionError("a deterministic sampler asked for noise")


def in_float64(scheduler: object, grid: DDPM) -> None:
    """Give a scheduler of diffusers our table (compared with its own in test_sigmas) in float64: it rounds no more."""
    scheduler.alphas_cumprod = 1 / (1 + grid.table**2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("table", [("linear", 1e-4, 0.02), ("scaled_linear", 0.00085, 0.012)], ids=["linear", "scaled"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ancestral_matches_ddim(dtype: torch.dtype, spacing: str, table: tuple, eta: float) -> None:
    """Whole loop in x_t against whole loop in sigma, with eps prediction and the same noise.

    Relative to the largest value: 1e-5 to diffusers as it is, in float32; 1e-12 with its table in float64.
    """
    from diffusers import DDIMScheduler

    schedule, low, high = table
    grid = DDPM(schedule, 1000, low, high, spacing)
    scheduler = DDIMScheduler(
        1000, low, high, schedule, timestep_spacing=spacing, clip_sample=False, set_alpha_to_one=True
    )
    scheduler.set_timesteps(50)
    if dtype == torch.float64:
        in_float64(scheduler, grid)
    noise, fresh = normal(2, 32, dtype=dtype), seeded_noise([7, 8])
    x_t = noise
    for t in scheduler.timesteps:
        x_t = scheduler.step(eps_network(x_t, t.to(dtype)), t, x_t, eta=eta, variance_noise=fresh(x_t)).prev_sample
    sigmas = torch.cat([grid.levels(50), torch.zeros(1)]).to(dtype)
    sample = Ancestral(eta)(wrap(eps_network, Eps(grid)), start(noise, sigmas[0]), sigmas, seeded_noise([7, 8]))
    assert sample.dtype == x_t.dtype == dtype
    assert distance(sample, x_t) < (1e-5 if dtype == torch.float32 else 1e-12) * x_t.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ancestral_matches_ddpm(dtype: torch.dtype) -> None:
    """eta = 1 is the DDPM posterior of small variance; both draw from a generator of the same seed.

    Relative to the largest value: 5e-5 to diffusers as it is, in float32 (measured 1.1e-5: its beta_t is a difference
    of rounded products); 1e-12 with its table in float64.
    """
    from diffusers import DDPMScheduler

    grid = DDPM(spacing="leading")
    scheduler = DDPMScheduler(1000, variance_type="fixed_small", clip_sample=False, timestep_spacing="leading")
    scheduler.set_timesteps(100)
    if dtype == torch.float64:
        in_float64(scheduler, grid)
    noise = normal(2, 32, dtype=dtype)
    x_t, theirs, ours = noise, torch.Generator().manual_seed(9), torch.Generator().manual_seed(9)
    for t in scheduler.timesteps:
        x_t = scheduler.step(eps_network(x_t, t.to(dtype)), t, x_t, generator=theirs).prev_sample

    def fresh(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=ours, dtype=like.dtype)

    sigmas = torch.cat([grid.levels(100), torch.zeros(1)]).to(dtype)
    sample = Ancestral(1.0)(wrap(eps_network, Eps(grid)), start(noise, sigmas[0]), sigmas, fresh)
    assert sample.dtype == x_t.dtype == dtype
    assert distance(sample, x_t) < (5e-5 if dtype == torch.float32 else 1e-12) * x_t.abs().max()


def test_ancestral_matches_edm_euler() -> None:
    from diffusers import EDMEulerScheduler

    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    scheduler.set_timesteps(25)
    x = 80 * normal(2, 32)
    theirs = x
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(theirs, t), t)
        theirs = scheduler.step(output, t, theirs).prev_sample
    sample = Ancestral()(wrap(network, EDM(0.5)), x, Karras(0.002, 80.0)(25), never)
    assert distance(sample, theirs) < 1e-5  # measured 7e-7


def test_ancestral_matches_euler_with_v_prediction() -> None:
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler(prediction_type="v_prediction", use_karras_sigmas=True)
    scheduler.set_timesteps(25)
    x = normal(2, 32) * scheduler.init_noise_sigma
    theirs = x
    for t in scheduler.timesteps:  # their t is an index, ours an angle: the network must not see it
        output = network(scheduler.scale_model_input(theirs, t), torch.tensor(0.0))
        theirs = scheduler.step(output, t, theirs).prev_sample
    table = DDPM().table
    denoise = wrap(lambda x, c_noise: network(x, 0 * c_noise), V())
    sample = Ancestral()(denoise, x, Karras(float(table[0]), float(table[-1]))(25), never)
    assert distance(sample, theirs) < 1e-5  # measured 2e-6


def test_heun_matches_heun_discrete() -> None:
    from diffusers import HeunDiscreteScheduler

    scheduler = HeunDiscreteScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear", prediction_type="sample", use_karras_sigmas=True
    )
    scheduler.set_timesteps(15)
    denoise, table = mixture, DDPM().table
    x = normal(2, 32) * table[-1].float()
    theirs = x
    for t in scheduler.timesteps:
        scheduler.scale_model_input(theirs, t)  # sets the step index
        theirs = scheduler.step(denoise(theirs, scheduler.sigmas[scheduler.step_index]), t, theirs).prev_sample
    sample = Heun()(denoise, x, Karras(float(table[0]), float(table[-1]))(15), never)
    assert distance(sample, theirs) < 1e-5  # measured 2e-6


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_ancestral_matches_flow_match_euler(shift: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=torch.linspace(0.999, 0, 21)[:-1].tolist())  # their sigma is our t
    sigmas = FlowGrid(shift)(20)
    torch.testing.assert_close(scheduler.sigmas, sigmas / (1 + sigmas), rtol=0, atol=1e-6)
    z = normal(2, 32)
    x = z * (1 + sigmas[0])
    for t in scheduler.timesteps:
        z = scheduler.step(network(z, t / 1000), t, z).prev_sample
    sample = Ancestral()(wrap(network, Flow()), x, sigmas, never)
    assert distance(sample, z) < 1e-5  # measured 1e-6


@pytest.mark.parametrize("steps", [8, 25])  # below 15 they lower the order of the last step by default
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_dpmpp2m_matches_diffusers(steps: int, final: str) -> None:
    """dpmsolver++, order 2, midpoint: equal with final_sigmas_type="zero", where they too end in first order.

    With "sigma_min" they are equal on a grid that ends above 0, if lower_order_final is off.
    """
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        timestep_spacing="trailing",
        final_sigmas_type=final,
        lower_order_final=final == "zero",
    )
    scheduler.set_timesteps(steps)
    noise = normal(2, 32)
    x_t = noise
    for t in scheduler.timesteps:
        x_t = scheduler.step(eps_network(x_t, t), t, x_t).prev_sample
    grid = DDPM()
    sigmas = grid(steps)
    if final == "sigma_min":
        sigmas[-1] = grid.table[0]
    sample = DPMpp2M()(wrap(eps_network, Eps(grid)), start(noise, sigmas[0]), sigmas, never)
    sample = sample * Eps(grid)(sigmas[-1])[2]
    assert distance(sample, x_t) < 1e-5 * x_t.abs().max()  # measured 2e-6


def multistep(kind: str, steps: int, **settings: object) -> tuple[object, Tensor]:
    """A scheduler of diffusers over the linear table up to sigma_min, ready to step, and its levels in float64."""
    import diffusers

    scheduler = getattr(diffusers, kind)(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear", timestep_spacing="trailing", **settings
    )
    scheduler.set_timesteps(steps)
    return scheduler, scheduler.sigmas.double()


def run_theirs(scheduler: object, noise: Tensor, **settings: object) -> Tensor:
    x_t = noise
    for t in scheduler.timesteps:
        x_t = scheduler.step(eps_network(x_t, t), t, x_t, **settings).prev_sample
    return x_t


@pytest.mark.parametrize("steps", [8, 25])
@pytest.mark.parametrize(("order", "variant"), [(1, "bh2"), (2, "bh1"), (2, "bh2"), (3, "bh1"), (3, "bh2")])
def test_unipc_matches_diffusers(order: int, variant: str, steps: int) -> None:
    """To 1e-4, measured 3e-5: they solve for the weights in float32.

    With a last sigma of 0; order 3 on a grid that ends above 0, or they lower the last but one step too, and bh1 as
    well, or they return NaN.
    """
    final = {"final_sigmas_type": "sigma_min", "lower_order_final": False} if order == 3 or variant == "bh1" else {}
    scheduler, _ = multistep("UniPCMultistepScheduler", steps, solver_order=order, solver_type=variant, **final)
    noise, grid = normal(2, 32), DDPM()
    theirs = run_theirs(scheduler, noise)
    sigmas = grid(steps)
    if final:
        sigmas[-1] = grid.table[0]
    sample = UniPC(order, variant)(wrap(eps_network, Eps(grid)), start(noise, sigmas[0]), sigmas, never)
    assert distance(sample * Eps(grid)(sigmas[-1])[2], theirs) < 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis_matches_diffusers(order: int) -> None:
    scheduler, _ = multistep("DEISMultistepScheduler", 12, solver_order=order, lower_order_final=False)
    noise, grid = normal(2, 32), DDPM()
    scheduler.sigmas[-1] = grid.table[0]  # it knows no "sigma_min", and takes ln(0) otherwise
    theirs = run_theirs(scheduler, noise)
    sigmas = grid(12)
    sigmas[-1] = grid.table[0]
    sample = AdamsBashforth(order)(wrap(eps_network, Eps(grid)), start(noise, sigmas[0]), sigmas, never)
    assert distance(sample * Eps(grid)(sigmas[-1])[2], theirs) < 1e-4 * theirs.abs().max()


def test_dpmpp2m_sde_matches_diffusers() -> None:
    """sde-dpmsolver++ with the increments of our Brownian path as its noise."""
    from mmdiff.sampling import Brownian

    scheduler, _ = multistep("DPMSolverMultistepScheduler", 20, algorithm_type="sde-dpmsolver++", solver_order=2)
    noise, grid = normal(2, 32), DDPM()
    sigmas = grid(20)
    path = Brownian.like(noise, seeded_noise([7, 8]), 1.0)
    x_t = noise
    for t, (sigma, sigma_next) in zip(scheduler.timesteps, pairwise(sigmas.tolist()), strict=True):
        z = torch.zeros_like(noise)
        if sigma_next > 0:
            z = path(sigma, sigma_next) / (sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2))
        x_t = scheduler.step(eps_network(x_t, t), t, x_t, variance_noise=z).prev_sample
    sample = DPMpp2MSDE()(wrap(eps_network, Eps(grid)), start(noise, sigmas[0]), sigmas, seeded_noise([7, 8]))
    assert distance(sample, x_t) < 2e-5 * x_t.abs().max()


def test_the_third_order_of_diffusers_is_second() -> None:
    """Halving the steps divides our error by 8, theirs by 4: their term of the second derivative lacks a factor of 2.

    Both on the levels of a Karras grid from 80 down to 0.05, network for network, on the exact D of a mixture.
    """
    from diffusers import DPMSolverMultistepScheduler

    oracle = Mixture(2)
    errors = []
    for steps in (64, 128):
        sigmas = Karras(0.05, 80.0).levels(steps + 1)
        scheduler = DPMSolverMultistepScheduler(
            solver_order=3, prediction_type="sample", lower_order_final=False, use_flow_sigmas=False
        )
        scheduler.set_timesteps(steps)
        scheduler.sigmas = sigmas
        x = oracle.sample(8, torch.Generator().manual_seed(1), 80.0)
        exact, theirs = oracle.flow(x, 80.0, 0.05), x / math.hypot(1, 80.0)
        for t, sigma in zip(scheduler.timesteps, sigmas[:-1], strict=True):
            x0 = oracle.denoise(theirs * math.hypot(1, float(sigma)), sigma)
            theirs = scheduler.step(x0, t, theirs).prev_sample.double()
        ours = DPMpp3M()(oracle.denoise, x, sigmas, never)
        errors.append((distance(ours, exact), distance(theirs * math.hypot(1, 0.05), exact)))
    ratio_ours, ratio_theirs = (coarse / fine for coarse, fine in zip(*errors, strict=True))
    assert 2.8 < math.log2(ratio_ours) < 3.3
    assert math.log2(ratio_theirs) < 2.3
    assert errors[1][0] < errors[1][1] / 2


def test_bh1_of_diffusers_is_not_finite_on_a_grid_that_ends_at_0() -> None:
    """B(h) = h is infinite there, times a difference of 0; ours ends in the estimate, as every step to 0 does."""
    scheduler, _ = multistep("UniPCMultistepScheduler", 8, solver_order=2, solver_type="bh1")
    noise, sigmas = normal(2, 32), DDPM()(8)
    assert run_theirs(scheduler, noise).isnan().all()
    sample = UniPC(2, "bh1")(wrap(eps_network, Eps(DDPM())), start(noise, sigmas[0]), sigmas, never)
    assert sample.isfinite().all()
