"""The law of what stochastic samplers draw, on every grid: exactly where it is a formula, by samples where it is not.

The denoiser of one Gaussian is affine, so a sampler makes of its start and its noise an affine map, the same in every
coordinate. Run on unit vectors it shows that map, and with it the exact law of its samples at any number of steps.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mmdiff.sampling import (
    Ancestral,
    Consistency,
    DPMpp2MSDE,
    Noise,
    Sampler,
)
from mmdiff.sampling.brownian import Brownian
from mmdiff.sigmas import Karras
from tests.oracles import Mixture, distance, torch_noise
from tests.test_sampling_oracles import GRIDS, STOCHASTIC, describe, levels_of, refined

GAUSSIAN = Mixture(64, gap=0.0)


@dataclass(frozen=True)
class Affine:
    """x_end = of_start x + of_centre centre + sum_j of_noise[j] eps_j, for each coordinate of a Gaussian's samples."""

    of_start: float
    of_centre: float
    of_noise: Tensor

    def variance(self, start: float) -> float:
        """Of the samples, from starts of this variance."""
        return self.of_start**2 * start + float(self.of_noise.square().sum())


def affine(sampler: Sampler, sigmas: Tensor, std: float) -> Affine:
    """One run with a column for each unit vector: the start, the centre, and each draw of noise."""
    draws = 0

    def count(like: Tensor) -> Tensor:
        nonlocal draws
        draws += 1
        return torch.zeros_like(like)

    sampler(lambda x, sigma: x, torch.ones(1, 1, dtype=torch.float64), sigmas, count)
    x, centre = torch.zeros(2, 1, draws + 2, dtype=torch.float64)
    x[0, 0] = centre[0, 1] = 1
    columns = iter(range(2, draws + 2))

    def unit(like: Tensor) -> Tensor:
        vector = torch.zeros_like(like)
        vector[0, next(columns)] = 1
        return vector

    end = sampler(lambda x, sigma: torch.lerp(centre, x, std**2 / (std**2 + sigma**2)), x, sigmas, unit)[0]
    return Affine(float(end[0]), float(end[1]), end[2:])


@dataclass(frozen=True)
class Independent:
    """In the place of a Brownian path: each step's noise drawn by itself, with the variance that the path declares."""

    x: Tensor
    noise: Noise
    eta: float

    def __call__(self, sigma: float, sigma_next: float) -> Tensor:
        return self.noise(self.x) * sigma_next * math.sqrt(1 - (sigma_next / sigma) ** (2 * self.eta))


@pytest.fixture
def independent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Brownian, "like", Independent)


def one_row(oracle: Mixture) -> Callable[[Tensor, Tensor], Tensor]:
    """The denoiser of points that are one batch row, so that a Brownian path has one seed for all."""
    return lambda x, sigma: oracle.denoise(x.view(-1, oracle.dim), sigma).view_as(x)


@pytest.mark.usefixtures("independent")
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("sampler", [sampler for sampler, *_ in STOCHASTIC], ids=describe)
def test_samples_are_the_affine_map_of_their_noise(sampler: Sampler, grid: str) -> None:
    """Each draw of noise enters once, as it is, with its gain: so normal noise gives the law that the gains give."""
    sigmas = refined(levels_of(GRIDS[grid], 0.05), 0.5, 1)
    x = GAUSSIAN.sample(4, torch.Generator().manual_seed(1), float(sigmas[0]))
    drawn: list[Tensor] = []
    noise = torch_noise(2)

    def kept(like: Tensor) -> Tensor:
        drawn.append(noise(like))
        return drawn[-1]

    found = affine(sampler, sigmas, GAUSSIAN.std)
    points = sampler(GAUSSIAN.denoise, x, sigmas, kept)
    expected = found.of_start * x + found.of_centre * GAUSSIAN.centre
    expected += torch.einsum("j,jbd->bd", found.of_noise, torch.stack(drawn))
    assert distance(points, expected) < 1e-9


def excess(sampler: Sampler, sigmas: Tensor) -> float:
    """Of the variance of the exact discrete law over the data's at the last level, in parts of it."""
    std = GAUSSIAN.std
    variance = affine(sampler, sigmas, std).variance(std**2 + float(sigmas[0]) ** 2)
    return variance / (std**2 + float(sigmas[-1]) ** 2) - 1


@pytest.mark.usefixtures("independent")
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("sampler", "longest", "count"), STOCHASTIC, ids=describe)
def test_the_exact_law_converges(sampler: Sampler, longest: float, count: int, grid: str) -> None:
    """No tolerance of chance: the mean is exact, and the variance tends to the data's as the steps shorten.

    Eight times as many steps leave at most 0.4 of the error (first order would leave 1/8, but the churn of a step has
    a ceiling, and Langevin's noise stays). The steps of `STOCHASTIC` leave at most 0.4 standard errors of its samples.
    """
    levels = levels_of(GRIDS[grid], 0.05)
    found = affine(sampler, refined(levels, 0.25, 1), GAUSSIAN.std)
    assert abs(found.of_start + found.of_centre - 1) < 1e-12
    coarse, fine = (excess(sampler, refined(levels, 0.25, parts)) for parts in (1, 8))
    assert abs(fine) < 0.4 * abs(coarse)
    assert abs(excess(sampler, refined(levels, longest, 1))) < 0.4 * math.sqrt(2 / count)


def features(oracle: Mixture, points: Tensor) -> Tensor:
    """(N, 5 or 6): what the mean and the covariance are means of, along the axis, across it, and in all directions."""
    across = torch.eye(oracle.dim, dtype=torch.float64)[0]
    across = across - (across @ oracle.axis) * oracle.axis
    centred = points - oracle.mean()
    u, w = centred @ oracle.axis, centred @ (across / across.norm())
    every = [centred.square().sum(1)] if oracle.dim > 2 else []  # in 2 dimensions u^2 + w^2
    return torch.stack([u, w, u * u, w * w, u * w, *every], 1)


def standard_errors(oracle: Mixture, points: Tensor, sigma: float) -> float:
    """How far mean and covariance of points (N, dim) lie from the law of x0 + sigma eps, as one number.

    Hotelling's T^2 of the features, with their covariance from 40000 exact draws, is chi^2 for a right sampler; its
    tail probability is given as the standard errors of a normal number with that tail. So 3 has one meaning, 0.27 %,
    however many directions are looked at, and a single one counts: T^2 is at least the square of any direction's.
    """
    exact = features(oracle, oracle.sample(40000, torch.Generator().manual_seed(9), sigma))
    covariance = oracle.covariance(sigma)
    u = oracle.axis
    along, total = u @ covariance @ u, covariance.trace()
    zero = torch.zeros_like(total)
    mean = torch.stack([zero, zero, along, zero + oracle.std**2 + sigma**2, zero, total])[: exact.shape[1]]
    off = features(oracle, points).mean(0) - mean
    squared = len(points) * (off @ torch.linalg.solve(exact.T.cov(), off))
    tail = torch.special.gammaincc(torch.full_like(squared, len(off) / 2), squared / 2)
    return float(-torch.special.ndtri(tail / 2))


def draw(
    sampler: Sampler, oracle: Mixture, sigmas: Tensor, count: int, scale: float = 1.0, start: float = 1.0
) -> Tensor:
    """`count` samples from exact starts; `scale` and `start` make noise and start wrong."""
    x = start * oracle.sample(count, torch.Generator().manual_seed(0), float(sigmas[0]))
    noise = torch_noise(100)
    return sampler(one_row(oracle), x.view(1, -1), sigmas, lambda like: scale * noise(like)).view_as(x)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("sampler", "longest", "count"), STOCHASTIC, ids=describe)
def test_law_of_samples(sampler: Sampler, longest: float, count: int, grid: str) -> None:
    """Within 3 standard errors, one draw: of the exact discrete law in 64 dimensions, of the data for a mixture in 2.

    The mixture's denoiser is not affine; the steps are so short that the bias is small beside a standard error.
    """
    levels = levels_of(GRIDS[grid], 0.05)
    few, many = refined(levels, 0.5, 1), refined(levels, longest, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Brownian, "like", Independent)
        variance = affine(sampler, few, GAUSSIAN.std).variance(GAUSSIAN.std**2 + float(few[0]) ** 2)
    discrete = Mixture(64, std=math.sqrt(variance), gap=0.0)
    assert standard_errors(discrete, draw(sampler, GAUSSIAN, few, 500), 0.0) < 3
    assert standard_errors(Mixture(2), draw(sampler, Mixture(2), many, count), 0.05) < 3


def test_the_law_is_measured_well_enough() -> None:
    """The same number tells noise that is 20 % too strong, and a start that is too wide."""
    sigmas, oracle = refined(levels_of(Karras(), 0.05), 0.1, 1), Mixture(2)
    assert standard_errors(oracle, draw(Ancestral(1.0), oracle, sigmas, 2000, scale=1.2), 0.05) > 3
    assert standard_errors(oracle, draw(DPMpp2MSDE(0.0), oracle, sigmas, 2000, start=1.2), 0.05) > 3


@pytest.mark.parametrize("dim", [2, 64])
def test_law_of_consistency_sampling(dim: int) -> None:
    """With the exact consistency function, the end of the ODE's path, any number of steps gives the data's law."""
    oracle = Mixture(dim)
    for sigmas in ([80.0, 0.0], [80.0, 2.0, 0.0], [80.0, 5.0, 1.0, 0.2, 0.0]):
        x = oracle.sample(2000, torch.Generator().manual_seed(4), 80.0)
        points = Consistency()(
            lambda x, sigma: oracle.flow(x, float(sigma), 0.0), x, torch.tensor(sigmas), torch_noise(5)
        )
        assert standard_errors(oracle, points, 0.0) < 3
