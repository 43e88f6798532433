"""Brownian paths, the settings of every sampler, and what holds for all of them in a loop on a device."""

import math
from collections.abc import Callable
from dataclasses import fields
from itertools import pairwise
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmdiff import named, sampling
from mmdiff.sampling import (
    RK4,
    AdamsBashforth,
    AdaptiveODE,
    Ancestral,
    Brownian,
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
    Rolling,
    Sampler,
    UniPC,
    seeded_noise,
    start,
)
from mmdiff.sigmas import DDPM, Karras
from tests.oracles import Mixture, distance, torch_noise

KINDS = [
    Ancestral, Euler, Heun, DPMpp2S, DPMpp2M, DPMpp3M, DPMpp2MSDE, DPMpp3MSDE, UniPC, AdamsBashforth, RK4, Langevin,
    PredictorCorrector, AdaptiveODE, Consistency,
]  # fmt: skip
# Every argument of every sampler: settings that it is changed beside, and the change.
CHANGES: list[tuple[type[Sampler], dict[str, Any], str, Any]] = [
    (Ancestral, {}, "eta", 0.5),
    (Euler, {}, "s_churn", 20.0),
    (Euler, {"s_churn": 20.0}, "s_tmin", 1.0),
    (Euler, {"s_churn": 20.0}, "s_tmax", 10.0),
    (Euler, {"s_churn": 20.0}, "s_noise", 1.01),
    (Heun, {}, "clock", "flow"),
    (Heun, {}, "s_churn", 20.0),
    (Heun, {"s_churn": 20.0}, "s_tmin", 1.0),
    (Heun, {"s_churn": 20.0}, "s_tmax", 10.0),
    (Heun, {"s_churn": 20.0}, "s_noise", 1.01),
    (DPMpp2S, {}, "r", 0.3),
    (DPMpp2MSDE, {}, "eta", 0.5),
    (DPMpp3MSDE, {}, "eta", 0.5),
    (UniPC, {}, "order", 2),
    (UniPC, {"order": 2}, "order", 1),
    (UniPC, {}, "variant", "bh1"),
    (AdamsBashforth, {}, "order", 2),
    (AdamsBashforth, {"order": 2}, "order", 1),
    (AdamsBashforth, {}, "clock", "sigma"),
    (Langevin, {}, "repeats", 2),
    (Langevin, {}, "snr", 0.2),
    (PredictorCorrector, {}, "eta", 0.5),
    (PredictorCorrector, {}, "corrections", 2),
    (PredictorCorrector, {}, "snr", 0.2),
    (AdaptiveODE, {"atol": 1e-9}, "rtol", 1e-9),
    (AdaptiveODE, {"rtol": 1e-9}, "atol", 1e-9),
    (AdaptiveODE, {}, "method", "dopri8"),
    (Consistency, {}, "sigma_min", 0.1),
]


def sample(sampler: Sampler, dtype: torch.dtype = torch.float64, high: float = 80.0, steps: int = 8) -> Tensor:
    oracle, noise, sigmas = Mixture(2), torch_noise(0), Karras(0.02, high)(steps)
    x = start(noise(torch.empty(4, 2, dtype=dtype)), sigmas[0])
    return sampler(oracle.denoise, x, sigmas, noise)


def needs(kind: type[Sampler]) -> None:
    if kind is AdaptiveODE:
        pytest.importorskip("torchdiffeq", reason="needs torchdiffeq: pip install 'mmdiff[ode]'")


@pytest.mark.parametrize(("kind", "base", "argument", "value"), CHANGES)
def test_every_argument_changes_the_sample(kind: type[Sampler], base: dict, argument: str, value: object) -> None:
    needs(kind)
    assert distance(sample(kind(**base)), sample(kind(**base | {argument: value}))) > 1e-6


def test_no_argument_is_left_out() -> None:
    public = {value for value in vars(sampling).values() if isinstance(value, type) and issubclass(value, Sampler)}
    assert public - {Sampler, Rolling} == set(KINDS)  # it needs a model of levels per step: tests/test_long_rolling.py
    tried = {(kind, argument) for kind, _, argument, _ in CHANGES}
    assert {(kind, field.name) for kind in KINDS for field in fields(kind)} == tried


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Euler(s_churn=-1), "s_churn=-1 must be 0"),
        (lambda: Euler(s_tmin=1.0), "s_tmin=1.0, .* do nothing with s_churn=0"),
        (lambda: Heun(s_tmax=1.0), "s_tmax=1.0, .* do nothing with s_churn=0"),
        (lambda: Heun(s_noise=1.003), "s_noise=1.003 do nothing with s_churn=0"),
        (lambda: Euler(s_churn=1, s_tmin=2, s_tmax=1), "must satisfy 0 <= s_tmin < s_tmax"),
        (lambda: Euler(s_churn=1, s_noise=math.nan), "s_noise=nan must be a number"),
        (lambda: DPMpp2S(0.0), "r=0.0 must lie between 0"),
        (lambda: DPMpp2MSDE(-1.0), "eta=-1.0 must lie between 0"),
        (lambda: DPMpp3MSDE(11.0), "eta=11.0 must lie between 0"),
        (lambda: UniPC(4), "order=4 must be 1, 2 or 3"),
        (lambda: UniPC(variant="bh3"), "variant='bh3' must be bh1 or bh2"),
        (lambda: AdamsBashforth(0), "order=0 must be 1"),
        (lambda: AdamsBashforth(clock="t"), "clock='t' must be log"),
        (lambda: AdamsBashforth(1, "sigma"), "clock='sigma' does nothing with order=1"),
        (lambda: Langevin(0), "repeats=0 must be at least 1"),
        (lambda: Langevin(snr=0.8), "snr=0.8 must lie between 0"),
        (lambda: PredictorCorrector(eta=2.0), "eta=2.0 must lie between 0"),
        (lambda: PredictorCorrector(corrections=0), "corrections=0 must be at least 1"),
        (lambda: AdaptiveODE(rtol=0), "rtol=0, atol=0.0001 must lie between 0 and 1"),
        (lambda: AdaptiveODE(method="rk4"), "method='rk4' must be dopri5"),
        (lambda: Consistency(-1), "sigma_min=-1 must be a number from 0"),
        (lambda: Brownian([0], (2,), 1.0, torch.float32, "cpu")(1e8, 1.0), "must fall within 1.7e7..6e-8"),
    ],
)
def test_wrong_settings_are_named(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_a_missing_torchdiffeq_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchdiffeq", None)
    with pytest.raises(ValueError, match=r"needs torchdiffeq: pip install 'mmdiff\[ode\]'"):
        sample(AdaptiveODE())


@pytest.mark.parametrize("name", named.SAMPLERS)
def test_every_name_of_the_command_is_one_line_of_yaml(name: str) -> None:
    kind, settings = named.SAMPLERS[name]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--sampler", type=Sampler)
    tree = {"class_path": f"mmdiff.sampling.{kind}", "init_args": settings}
    assert parser.instantiate(parser.parse_object({"sampler": tree})).sampler == named.pick_sampler(name)


def test_every_sampler_has_a_name() -> None:
    assert {kind for kind, _ in named.SAMPLERS.values()} == {kind.__name__ for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_good_from_sigma_1e5(kind: type[Sampler]) -> None:
    """Within 1e-4 of float64 with the same noise, relative to the largest value (Langevin is far from its end here)."""
    needs(kind)
    sampler = Heun("flow") if kind is Heun else kind()  # in sigma it extrapolates by sigma / sigma_next
    double = sample(sampler, high=1e5, steps=30)
    assert double.isfinite().all()
    oracle, sigmas = Mixture(2), Karras(0.02, 1e5)(30)
    noise = torch_noise(0)

    def rounded(like: Tensor) -> Tensor:
        return noise(like.double()).float()

    single = sampler(oracle.denoise, start(rounded(torch.empty(4, 2)), sigmas[0]), sigmas, rounded)
    assert single.dtype == torch.float32
    assert distance(single, double) < 1e-4 * max(1.0, float(double.abs().max()))


class Reads(TorchDispatchMode):
    """Counts the reads of a tensor's value by the host, each of which waits for the device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not AdaptiveODE])
def test_no_step_waits_for_the_device(kind: type[Sampler]) -> None:
    oracle, noise, sigmas = Mixture(2), seeded_noise([1, 2]), Karras()(6)
    sampler = kind(s_churn=20.0) if kind in (Euler, Heun) else kind()
    walk = sampler.steps(oracle.denoise, start(noise(torch.empty(2, 2)), sigmas[0]), sigmas, noise)
    next(walk)
    with Reads() as reads:
        for _ in walk:
            pass
        assert reads.count == 0
        bool(torch.ones(()) > 0)
        assert reads.count == 1  # and the count counts


# Brownian paths


def path(eta: float = 1.0, seeds: tuple[int, ...] = (1, 2), size: int = 20_000) -> Brownian:
    return Brownian(seeds, (size,), eta, torch.float64, "cpu")


@pytest.mark.parametrize("eta", [0.3, 1.0, 2.0])
def test_increments_have_the_law_of_the_sde(eta: float) -> None:
    """Variance sigma_next^2 (1 - q^2 eta), none shared by two steps, from steps of 50 to far less than a leaf."""
    brownian = path(eta)
    levels = [1e5, 2e3, 80.0, 79.999, 79.99, 5.0, 4.9, 0.02, 0.0019]
    steps = [brownian(high, low).flatten() for high, low in pairwise(levels)]
    for (high, low), step in zip(pairwise(levels), steps, strict=True):
        variance = low**2 * -math.expm1(2 * eta * math.log(low / high))
        assert abs(step.square().mean().item() / variance - 1) < 5 * math.sqrt(2 / len(step))
    correlation = torch.corrcoef(torch.stack(steps)).fill_diagonal_(0)
    assert correlation.abs().max() < 5 / math.sqrt(40_000)


def test_two_half_steps_add_what_the_whole_one_adds() -> None:
    """x_next = (low / high)^eta part of the first, damped on the way, and the second."""
    for high, middle, low in ((80.0, 5.0, 0.1), (1.0, 0.9995, 0.999), (1e5, 1e4, 1.0)):
        whole, first, fresh = path(0.7, size=50), path(0.7, size=50), path(0.7, size=50)
        parts = first(high, middle) * (low / middle) ** 1.7 + first(middle, low)
        assert distance(whole(high, low), parts) < 1e-6 * low or high - low < 0.01
        assert torch.equal(fresh(high, middle), path(0.7, size=50)(high, middle))


def test_more_steps_walk_the_same_path() -> None:
    """10 and 20 steps of one noise end nearer to 160 steps of it than to those of another, and 20 nearer than 10."""
    oracle, x = Mixture(2), Mixture(2).sample(200, torch.Generator().manual_seed(0), 80.0)

    def run(steps: int, seed: int) -> Tensor:
        sigmas = Karras(0.02, 80.0)(steps)
        return DPMpp2MSDE()(oracle.denoise, x, sigmas, torch_noise(seed))

    fine = run(160, 1)
    errors = [float((run(steps, 1) - fine).square().mean().sqrt()) for steps in (10, 20, 40)]
    other = float((run(160, 2) - fine).square().mean().sqrt())
    assert errors[0] < 0.5 * other
    assert errors[1] < 0.6 * errors[0]
    assert errors[2] < 0.6 * errors[1]


def test_a_path_belongs_to_its_sample() -> None:
    """A batch is its singles, bit for bit, and the seeds of the samples are all that matters."""
    like = torch.empty(3, 1, 4)
    batch = Brownian.like(like, seeded_noise([5, 6, 7]), 1.0)(3.0, 1.0)
    single = Brownian.like(like[:1], seeded_noise([6]), 1.0)(3.0, 1.0)
    assert torch.equal(batch[1:2], single)
    assert distance(batch[0], batch[1]) > 0.1


# The forward process


@pytest.mark.parametrize(("x", "beta", "eps", "expected"), [(0.8, 0.1, -0.3, 0.664), (0.5, 0.04, 1.5, 0.790)])
def test_one_step_of_the_forward_process(x: float, beta: float, eps: float, expected: float) -> None:
    """x_t = sqrt(1 - beta) x_{t-1} + sqrt(beta) eps: in sigma, x0 + sigma eps with sigma^2 = beta / (1 - beta)."""
    sigma = math.sqrt(beta / (1 - beta))
    x_t = (x + sigma * eps) / math.hypot(1, sigma)  # alpha = 1 / sqrt(1 + sigma^2)
    assert round(x_t, 3) == expected


def test_the_chain_and_the_closed_form_have_one_law() -> None:
    """50 steps of q(x_t | x_{t-1}) and (x0 + sigma eps) / sqrt(1 + sigma^2), within 3 errors."""
    bar = 1 / (1 + DDPM().table[:50].square())  # alpha_bar
    beta = 1 - bar / torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
    draw, count = torch_noise(0), 20_000
    chain = torch.full((count,), 0.7, dtype=torch.float64)
    for b in beta:
        chain = (1 - b).sqrt() * chain + b.sqrt() * draw(chain)
    closed = (0.7 + DDPM().table[49] * draw(chain)) / (1 + DDPM().table[49].square()).sqrt()
    mean, variance = 0.7 * bar[-1].sqrt(), 1 - bar[-1]
    for points in (chain, closed):
        assert abs(points.mean() - mean) < 3 * (variance / count).sqrt()
        assert abs(points.var() / variance - 1) < 3 * math.sqrt(2 / count)
        assert abs((points > mean).double().mean() - 0.5) < 3 * 0.5 / math.sqrt(count)
