"""Our denoisers in diffusers' loops and pipelines give what our own samplers give."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmdiff.backbones import UNet
from mmdiff.conditioning import Cond
from mmdiff.denoiser import Denoiser
from mmdiff.diffusers_model import DiffusersModel
from mmdiff.precond import EDM, V
from mmdiff.precond import Flow as FlowPrecond
from mmdiff.sampling import Ancestral, start
from mmdiff.sigmas import DDPM, Flow

SHAPE = (2, 3, 4, 5)
PREDICTIONS = ["epsilon", "v_prediction", "sample"]


class Gaussian(nn.Module):
    """The exact denoiser of N(mean, 0.5^2) in every element: a straight line, so that only the loop is tested."""

    def forward(self, x: Tensor, sigma: Tensor, cond: Cond | None = None) -> Tensor:
        mean = torch.linspace(-1, 1, 5, dtype=x.dtype)
        share = 0.25 / (0.25 + sigma**2)
        share = share.reshape(-1, *(1,) * (x.ndim - 1)) if share.ndim else share
        return torch.lerp(mean.expand_as(x), x, share.to(x).expand_as(x))


def noise(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(3), dtype=dtype)


def never(like: Tensor) -> Tensor:
    raise AssertionError("a deterministic sampler asked for noise")


def walked(model: nn.Module, scheduler: Any, sample: Tensor, **kwargs: Any) -> Tensor:
    """A diffusers loop, as its pipelines write it."""
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(sample, t) if hasattr(scheduler, "scale_model_input") else sample
        sample = scheduler.step(model(given, t, **kwargs).sample, t, sample).prev_sample
    return sample


def ours(sigmas: Tensor, x: Tensor) -> Tensor:
    return Ancestral(0.0)(Gaussian(), x * sigmas[0], sigmas, never)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim_drives_our_denoiser_to_our_own_sample(prediction: str, spacing: str, dtype: torch.dtype) -> None:
    """1e-5 with diffusers' tables in float32, 1e-12 with our table in float64 (measured 1.2e-6, 6e-15; values to 2)."""
    from diffusers import DDIMScheduler

    grid = DDPM(spacing=spacing)
    scheduler = DDIMScheduler(
        1000, timestep_spacing=spacing, clip_sample=False, prediction_type=prediction, set_alpha_to_one=True
    )
    scheduler.set_timesteps(20)
    if dtype == torch.float64:
        scheduler.alphas_cumprod = 1 / (1 + grid.table**2)
    sigmas = torch.cat([grid.levels(20), torch.zeros(1)]).to(dtype)
    theirs = walked(DiffusersModel(Gaussian(), scheduler), scheduler, noise(dtype))
    assert theirs.dtype == dtype
    expected = Ancestral(0.0)(Gaussian(), start(noise(dtype), sigmas[0]), sigmas, never)
    assert (theirs - expected).abs().max() < (1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_euler_drives_our_denoiser_to_our_own_sample(shift: float) -> None:
    """1e-5 on our own levels; the last of diffusers' levels is 0, as ours (measured 2.4e-7)."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    sigmas = Flow(shift)(15)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=(sigmas / (1 + sigmas))[:-1].tolist())
    x_t = 0.999 * noise()  # at t = 0.999 of a shift of 1, data and all
    theirs = walked(DiffusersModel(Gaussian(), scheduler), scheduler, x_t)
    expected = Ancestral(0.0)(Gaussian(), x_t * (1 + sigmas[0]), sigmas, never)
    assert (theirs - expected).abs().max() < 1e-5


def test_flow_matching_starts_from_noise_alone_at_its_own_first_level() -> None:
    """The scheduler's first level is t = 1, sigma = inf: its sample is that of a grid from sigma 1e5, to 1e-4."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    scheduler.set_timesteps(15)
    assert scheduler.sigmas[0] == 1
    model = DiffusersModel(Gaussian(), scheduler)
    assert model.sigma(scheduler.timesteps[0]) == 1e5
    levels = scheduler.sigmas.double()
    sigmas = torch.cat([torch.tensor([1e5]), (levels / (1 - levels))[1:]])
    theirs = walked(model, scheduler, noise())
    assert (theirs - Ancestral(0.0)(Gaussian(), noise() * (1 + 1e5), sigmas, never)).abs().max() < 1e-4


@pytest.mark.parametrize("karras", [False, True], ids=["linear", "karras"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_euler_drives_our_denoiser_through_levels_between_its_table_s(prediction: str, karras: bool) -> None:
    """Its timesteps are no whole numbers; 1e-5 of values up to 2 (measured 4.4e-7)."""
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler(prediction_type=prediction, use_karras_sigmas=karras)
    scheduler.set_timesteps(13)
    theirs = walked(DiffusersModel(Gaussian(), scheduler), scheduler, noise() * scheduler.init_noise_sigma)
    expected = Ancestral(0.0)(Gaussian(), noise() * scheduler.init_noise_sigma, scheduler.sigmas, never)
    assert (theirs - expected).abs().max() < 1e-5


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SOLVERS = {
    "DPMSolverMultistep": {},
    "DPMSolverMultistep-flow": FLOW,
    "DPMSolverMultistep-flow-eps": FLOW | {"prediction_type": "epsilon"},
    "UniPCMultistep": {"prediction_type": "v_prediction"},
    "UniPCMultistep-flow": FLOW,
    "HeunDiscrete": {},
    "FlowMatchHeunDiscrete-flow": {},
}


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_of_higher_order_land_on_the_exact_solution(solver: str) -> None:
    """40 steps of order 2 come within 0.01 of the flow's closed form, whose values reach 2."""
    import diffusers

    name, *flow = solver.split("-")
    scheduler = getattr(diffusers, f"{name}Scheduler")(**SOLVERS[solver])
    scheduler.set_timesteps(40)
    model = DiffusersModel(Gaussian(), scheduler)
    sigma = float(model.sigma(scheduler.timesteps[0]))
    # what the scheduler takes: x_t, or, for Heun, x at sigma
    scale = 1 / (1 + sigma) if flow else 1.0 if name == "HeunDiscrete" else (1 + sigma**2) ** -0.5
    theirs = walked(model, scheduler, noise() * sigma * scale)
    mean = torch.linspace(-1, 1, 5)
    exact = mean + (noise() * sigma - mean) * 0.5 / (0.25 + sigma**2) ** 0.5
    assert (theirs - exact).abs().max() < 0.01


@pytest.mark.parametrize("precond", [V(), EDM(0.5), FlowPrecond()], ids=["v", "edm", "flow"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_parametrisation_and_every_prediction_give_one_sample(precond: Any, prediction: str) -> None:
    """A network and its condition in DDIM's loop and in ours: 1e-4 of values up to 3."""
    from diffusers import DDIMScheduler

    net = UNet(1, 3, channels=8, multipliers=[1, 2], head_channels=4, tokens_width=5, vector_width=6).eval()
    denoiser = Denoiser(net, precond).requires_grad_(False)
    for parameter in net.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    tokens, vector = torch.randn(2, 4, 5), torch.randn(2, 6)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    x = torch.randn(2, 3, 8)
    scheduler = DDIMScheduler(timestep_spacing="trailing", clip_sample=False, prediction_type=prediction)
    scheduler.set_timesteps(8)
    conditions = {"encoder_hidden_states": tokens, "encoder_attention_mask": mask, "pooled_projections": vector}
    theirs = walked(DiffusersModel(denoiser, scheduler), scheduler, x, **conditions)
    cond, sigmas = Cond(tokens, mask.bool(), vector), DDPM()(8)
    expected = Ancestral(0.0)(lambda z, s: denoiser(z, s, cond), start(x, sigmas[0]), sigmas, never)
    assert (theirs - expected).abs().max() < 1e-4
    other = Ancestral(0.0)(lambda z, s: denoiser(z, s, Cond(tokens, None, vector)), start(x, sigmas[0]), sigmas, never)
    assert (theirs - other).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["DDIMPipeline", "DDPMPipeline"])
def test_an_unconditional_pipeline_makes_our_clips(name: str) -> None:
    """A tuple as sample_size may have any number of axes; output_type "pt" keeps them."""
    import diffusers

    scheduler = getattr(diffusers, name.replace("Pipeline", "Scheduler"))(clip_sample=False)
    pipe = getattr(diffusers, name)(DiffusersModel(Gaussian(), scheduler, 3, (4, 2, 5)), scheduler)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    images = pipe(batch_size=2, generator=generator, num_inference_steps=10, output_type="pt")[0]
    assert images.shape == (2, 3, 4, 2, 5)
    if name == "DDIMPipeline":
        sigmas = DDPM(spacing="leading")(10)
        x = torch.randn(2, 3, 4, 2, 5, generator=torch.Generator().manual_seed(3))
        expected = Ancestral(0.0)(Gaussian(), start(x, sigmas[0]), sigmas, never)
        # diffusers ends at the table's first level, sigma 0.01, and not at 0
        assert (images - (expected / 2 + 0.5).clamp(0, 1)).abs().max() < 0.02


def test_items_may_stand_at_different_timesteps_and_a_tuple_comes_where_no_dict_is_due() -> None:
    from diffusers import DDIMScheduler

    model = DiffusersModel(Gaussian(), DDIMScheduler())
    together = model(noise(), torch.tensor([10, 900]), return_dict=False)
    assert isinstance(together, tuple)
    apart = [model(noise()[i : i + 1], t).sample for i, t in enumerate((10, 900))]
    assert (together[0] - torch.cat(apart)).abs().max() < 1e-6
    assert torch.allclose(model.sigma(torch.tensor([10, 900])), DDPM().table[[10, 900]], rtol=1e-4)


def test_levels_that_share_a_rounded_timestep_are_told_apart_by_where_the_scheduler_stands() -> None:
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(use_karras_sigmas=True)
    scheduler.set_timesteps(120)
    assert len(set(scheduler.timesteps.tolist())) < 120
    model, seen = DiffusersModel(Gaussian(), scheduler), []
    sample = noise()
    for t in scheduler.timesteps:
        seen.append(float(model.sigma(t)))
        sample = scheduler.step(model(sample, t).sample, t, sample).prev_sample
    assert torch.allclose(torch.tensor(seen), scheduler.sigmas[:-1])


def test_what_does_not_fit_is_refused() -> None:
    from diffusers import (
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        EDMEulerScheduler,
        EulerDiscreteScheduler,
        KDPM2DiscreteScheduler,
    )

    for scheduler in (EDMEulerScheduler(), KDPM2DiscreteScheduler()):
        with pytest.raises(ValueError, match=f"scheduler={type(scheduler).__name__} is neither"):
            DiffusersModel(Gaussian(), scheduler)
    odd = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="v_prediction")
    with pytest.raises(ValueError, match="prediction_type='v_prediction' of DPMSolverMultistepScheduler is not one of"):
        DiffusersModel(Gaussian(), odd)
    stepped = EulerDiscreteScheduler(use_karras_sigmas=True)
    stepped.set_timesteps(7)
    model = DiffusersModel(Gaussian(), EulerDiscreteScheduler(use_karras_sigmas=True))
    with pytest.raises(ValueError, match="is none of the scheduler's: give the model the EulerDiscreteScheduler that"):
        model(noise(), stepped.timesteps[2])
    with pytest.raises(ValueError, match="timestep=1000 is none of the scheduler's"):
        DiffusersModel(Gaussian(), DDIMScheduler())(noise(), 1000)


def test_without_diffusers_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match="DiffusersModel needs diffusers: pip install"):
        DiffusersModel(Gaussian(), object())
