"""Guidance: the two ends, what lies between, and what it does to a distribution that is known in closed form."""

import math

import pytest
import torch
from torch import Tensor

from mmdiff.guidance import cfg
from mmdiff.sampling import Denoise, DPMpp2M, Heun, start
from mmdiff.sigmas import Karras

X = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
SIGMA = torch.tensor(0.7)


def gaussian(mean: float, std: float) -> Denoise:
    """The exact denoiser of data ~ N(mean, std^2)."""
    return lambda x, sigma: (mean * sigma**2 + x * std**2) / (sigma**2 + std**2)


def never(x: Tensor, sigma: Tensor) -> Tensor:
    raise AssertionError("called in vain")


POS, NEG = gaussian(1.0, 0.5), gaussian(-0.4, 0.5)


@pytest.mark.parametrize("scale", [1, 1.0])
def test_scale_1_is_the_positive_alone(scale: float) -> None:
    assert torch.equal(cfg(POS, never, scale)(X, SIGMA), POS(X, SIGMA))


@pytest.mark.parametrize("scale", [0, 0.0])
def test_scale_0_is_the_negative_alone(scale: float) -> None:
    assert torch.equal(cfg(never, NEG, scale)(X, SIGMA), NEG(X, SIGMA))


@pytest.mark.parametrize("scale", [-1.0, 0.5, 0.999, 1.001, 2.0, 7.5])
def test_guided_is_negative_plus_scaled_difference(scale: float) -> None:
    pos, neg = POS(X, SIGMA), NEG(X, SIGMA)
    torch.testing.assert_close(cfg(POS, NEG, scale)(X, SIGMA), neg + scale * (pos - neg))


def test_same_prompts_guide_nowhere() -> None:
    torch.testing.assert_close(cfg(POS, POS, 5.0)(X, SIGMA), POS(X, SIGMA))


def test_swapping_the_prompts_mirrors_the_scale() -> None:
    torch.testing.assert_close(cfg(POS, NEG, 3.0)(X, SIGMA), cfg(NEG, POS, -2.0)(X, SIGMA))


def test_guidance_nests() -> None:
    once = cfg(cfg(POS, NEG, 2.0), NEG, 3.0)(X, SIGMA)
    torch.testing.assert_close(once, cfg(POS, NEG, 6.0)(X, SIGMA))


def test_every_argument_is_live() -> None:
    guided = cfg(POS, NEG, 3.0)(X, SIGMA)
    for other in (cfg(gaussian(2.0, 0.5), NEG, 3.0), cfg(POS, gaussian(0.0, 0.5), 3.0), cfg(POS, NEG, 4.0)):
        assert (other(X, SIGMA) - guided).abs().min() > 1e-3


@pytest.mark.parametrize("sampler", [Heun(), DPMpp2M()], ids=repr)
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
def test_guided_gaussians_land_on_the_extrapolated_mean(sampler: Heun | DPMpp2M, scale: float) -> None:
    """Two Gaussians of one width: the guided denoiser is that of the Gaussian at neg + scale * (pos - neg)."""
    sigmas = Karras()(60)
    noise = torch.randn(1, 20_000, generator=torch.Generator().manual_seed(1))
    sample = sampler(cfg(POS, NEG, scale), start(noise, sigmas[0]), sigmas, torch.zeros_like)
    assert sample.mean().item() == pytest.approx(-0.4 + scale * 1.4, abs=0.03)  # 4 standard errors and sigma_max = 80
    assert sample.std().item() == pytest.approx(0.5, abs=0.015)


@pytest.mark.parametrize("shape", [(), (2,), (2, 5)])
def test_sigma_of_every_shape_reaches_both(shape: tuple[int, ...]) -> None:
    seen = []

    def spy(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(sigma.shape)
        return x

    cfg(spy, spy, 2.0)(X, torch.ones(shape))
    assert seen == [shape, shape]


def test_gradients_reach_both() -> None:
    pos, neg = torch.tensor(1.0, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    cfg(lambda x, _: pos * x, lambda x, _: neg * x, 3.0)(X, SIGMA).square().sum().backward()
    assert pos.grad != 0
    assert neg.grad != 0


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_scale_that_is_not_finite_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match=rf"scale={scale} must be finite"):
        cfg(POS, NEG, scale)
