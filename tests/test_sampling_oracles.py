"""Every sampler on every grid against exact solutions: order, law, and that the parametrisation changes nothing.

All in float64 with the exact denoiser of one Gaussian and of a mixture of two, in 2 and 64 dimensions (oracles.py).
"""

import math
from itertools import pairwise
from typing import Literal

import pytest
import torch
from torch import Tensor

from mmdiff import precond
from mmdiff.precond import Precond
from mmdiff.sampling import (
    RK4,
    AdamsBashforth,
    AdaptiveODE,
    Ancestral,
    Consistency,
    DPMpp2M,
    DPMpp2MSDE,
    DPMpp2S,
    DPMpp3M,
    DPMpp3MSDE,
    Euler,
    Heun,
    Langevin,
    PredictorCorrector,
    Sampler,
    UniPC,
)
from mmdiff.sigmas import DDPM, Cosine, Flow, Geometric, Karras, Sigmas
from tests.oracles import Mixture, distance, through_network, torch_noise

GRIDS: dict[str, Sigmas] = {
    "karras": Karras(),
    "geometric": Geometric(),
    "flow": Flow(),
    "flow shifted": Flow(3.0),
    "cosine": Cosine(),
    "ddpm linear": DDPM(),
    "ddpm scaled": DDPM("scaled_linear", beta_start=0.00085, beta_end=0.012),
    "ddpm cosine": DDPM("cosine"),
    "zero terminal snr": DDPM(zero_terminal_snr=True),  # starts at 1e5
}
# The declared order of the global error. UniPC's corrector adds one to that of its predictor.
ORDERS: list[tuple[Sampler, int]] = [
    (Ancestral(), 1),
    (Euler(), 1),
    (AdamsBashforth(1), 1),
    (Heun(), 2),
    (Heun("flow"), 2),
    (DPMpp2S(), 2),
    (DPMpp2S(0.3), 2),
    (DPMpp2M(), 2),
    (DPMpp2MSDE(0.0), 2),
    (AdamsBashforth(2), 2),
    (AdamsBashforth(2, "sigma"), 2),
    (UniPC(1), 2),
    (UniPC(2), 3),
    (UniPC(2, "bh1"), 3),
    (DPMpp3M(), 3),
    (DPMpp3MSDE(0.0), 3),
    (AdamsBashforth(3), 3),
    (AdamsBashforth(3, "sigma"), 3),
    (UniPC(3), 4),
    (RK4(), 4),
]
# With the longest step in ln(sigma) and the number of samples: the bias of the steps must be small beside an error.
# test_sampling_law.py draws from them.
STOCHASTIC: list[tuple[Sampler, float, int]] = [
    (Ancestral(0.5), 0.02, 200),
    (Ancestral(1.0), 0.01, 200),
    (Euler(s_churn=40), 0.0075, 200),
    (Heun("flow", s_churn=40), 0.1, 2000),
    (DPMpp2MSDE(), 0.15, 2000),
    (DPMpp3MSDE(), 0.2, 2000),
    (DPMpp3MSDE(0.5), 0.2, 2000),
    (Langevin(10, 0.4), 0.05, 200),
    (PredictorCorrector(), 0.02, 200),
    (PredictorCorrector(0.0, 2), 0.04, 200),
]
PRECONDS: list[Precond] = [precond.Eps(), precond.X0(), precond.V(), precond.EDM(), precond.VE(), precond.Flow()]


def name(sampler: Sampler) -> str:
    changed = {k: v for k, v in vars(sampler).items() if v != getattr(type(sampler), k)}
    return f"{type(sampler).__name__}({', '.join(f'{k}={v}' for k, v in changed.items())})"


def describe(value: object) -> str:
    return name(value) if isinstance(value, Sampler) else ""


def levels_of(grid: Sigmas, end: float) -> list[float]:
    """ln(sigma) of ten steps of the grid, cut off at `end`."""
    return [*(v for v in grid.levels(10).log().tolist() if v > math.log(1.1 * end)), math.log(end)]


def refined(levels: list[float], longest: float, parts: int) -> Tensor:
    """The grid with every step cut into equal parts of ln(sigma), `parts` times as many as make them <= longest.

    The first of them is cut anew by halves: a multistep method starts with a step of first order, and that one step
    must not hide the order of all the others.
    """
    fine = levels[:1]
    for high, low in pairwise(levels):
        count = parts * math.ceil((high - low) / longest)
        fine += [high + (low - high) * (i + 1) / count for i in range(count)]
    ramp = [fine[0] + (fine[1] - fine[0]) * 2.0**-i for i in range(6, 0, -1)]
    return torch.tensor([fine[0], *ramp, *fine[1:]], dtype=torch.float64).exp()


def path_error(sampler: Sampler, oracle: Mixture, sigmas: Tensor, at: list[float]) -> float:
    """Error at the levels `at` of the walk, in parts of the data's spread there: one level alone could be crossed."""
    x = oracle.sample(8, torch.Generator().manual_seed(1), float(sigmas[0]))
    numbers = {int((sigmas - level).abs().argmin()) - 1: level for level in at}
    squares = []
    for step in sampler.steps(oracle.denoise, x, sigmas, torch_noise(0)):
        if step.number in numbers:
            level = numbers[step.number]
            error = (step.x - oracle.flow(x, float(sigmas[0]), level)) / math.hypot(oracle.std, level)
            squares.append(error.square().mean().item())
    assert len(squares) == len(at)
    return math.sqrt(sum(squares))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("sampler", "order"), ORDERS, ids=describe)
def test_order_of_global_error(sampler: Sampler, order: int, grid: str) -> None:
    """Within 0.2 of the declared order, from two refinements of the grid. Measured: within 0.182."""
    levels = levels_of(GRIDS[grid], 0.05)
    oracles = [Mixture(2, gap=0.0), Mixture(64)] + ([Mixture(2), Mixture(64, gap=0.0)] if grid == "karras" else [])
    at = [math.exp(level) for level in levels[1:]]
    for oracle in oracles:
        coarse, fine = (path_error(sampler, oracle, refined(levels, 0.25, parts), at) for parts in (2, 4))
        assert abs(math.log2(coarse / fine) - order) < 0.2, (oracle, coarse, fine)


@pytest.mark.parametrize("grid", GRIDS)
def test_adaptive_ode_keeps_its_tolerance(grid: str) -> None:
    """Error below 7 times the tolerance, and every call of the denoiser between the levels of the grid.

    A step may err by tolerance * (1 + |z|) in z, here 2.4 tolerances. What one errs at sigma the path multiplies, in
    parts of the data's spread, by at most 6.9: the largest slope of `flow` at the 8 starts, for an error made at the
    last sigma where they part; later ones count less. The worst of all steps at once would add up to 63 tolerances at
    1e-4 and 200 at 1e-7; but the method's own error lies below its estimate, which is that of a lower order, and this
    is not the worst case. Measured: at most 4.3, and 8.9 to 27 at 1e-4 where the last step is interpolated.
    """
    pytest.importorskip("torchdiffeq", reason="needs torchdiffeq: pip install 'mmdiff[ode]'")
    levels = levels_of(GRIDS[grid], 0.05)
    sigmas = torch.tensor([levels[0], 0.0, levels[-1]], dtype=torch.float64).exp()
    for tolerance in (1e-4, 1e-7):
        error = path_error(AdaptiveODE(tolerance, tolerance), Mixture(2), sigmas, [1.0, math.exp(levels[-1])])
        assert error < 7 * tolerance


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3", "adaptive_heun"])
def test_adaptive_ode_calls_within_its_levels(method: Literal["dopri5", "dopri8", "bosh3", "adaptive_heun"]) -> None:
    """Also from 1e5, where the slope is almost 0: no trial step below the end, to levels that no network has seen."""
    pytest.importorskip("torchdiffeq", reason="needs torchdiffeq: pip install 'mmdiff[ode]'")
    oracle, seen = Mixture(2), list[float]()

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(float(sigma))
        return oracle.denoise(x, sigma)

    x = oracle.sample(8, torch.Generator().manual_seed(1), 1e5)
    end = AdaptiveODE(1e-4, 1e-4, method)(denoise, x, torch.tensor([1e5, 0.5], dtype=torch.float64), torch_noise(0))
    assert 0.5 * (1 - 1e-9) < min(seen) < max(seen) < 1e5 * (1 + 1e-9)
    assert distance(end, oracle.flow(x, 1e5, 0.5)) < 1e-3


def test_adaptive_ode_keeps_the_tolerance_of_one_sample_among_many() -> None:
    """999 neighbours whose path stands still in z, data of N(0, 1), change nothing: they dilute no error."""
    pytest.importorskip("torchdiffeq", reason="needs torchdiffeq: pip install 'mmdiff[ode]'")
    oracle, sigmas = Mixture(2), torch.tensor([80.0, 0.05], dtype=torch.float64)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.cat([oracle.denoise(x[:1], sigma), x[1:] / (1 + sigma**2)])

    x = oracle.sample(1000, torch.Generator().manual_seed(1), 80.0)
    ends = [AdaptiveODE()(denoise, rows, sigmas, torch_noise(0))[:1] for rows in (x[:1], x)]
    assert distance(*ends) < 1e-12


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    "sampler", [*(s for s, _ in ORDERS), *(s for s, *_ in STOCHASTIC), Consistency(0.002)], ids=name
)
def test_the_parametrisation_changes_no_sample(sampler: Sampler, grid: str) -> None:
    """The same D through each kind of network. Less than 1e-5 apart; measured 4e-10, Heun from 2e4."""
    sigmas, oracle = GRIDS[grid](12).double(), Mixture(2)
    x = oracle.sample(4, torch.Generator().manual_seed(6), float(sigmas[0]))
    plain = sampler(oracle.denoise, x, sigmas, torch_noise(7))
    assert plain.isfinite().all()
    for kind in PRECONDS:
        assert distance(sampler(through_network(oracle.denoise, kind), x, sigmas, torch_noise(7)), plain) < 1e-5, kind
