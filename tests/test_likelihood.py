"""Likelihoods against closed forms: a Gaussian and a mixture with their exact denoisers."""

import math
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
from torch.utils.data import DataLoader

from mmdiff.backbones import UNet
from mmdiff.callbacks import BitsPerDim
from mmdiff.conditioning import Label
from mmdiff.density import LogNormal
from mmdiff.likelihood import (
    BoundTerms,
    Exact,
    FlowLikelihood,
    Hutchinson,
    VariationalBound,
    decoder_nats,
    prior_nats,
    step_nats,
)
from mmdiff.model import DiffusionModel
from mmdiff.module import DiffusionModule
from mmdiff.precond import EDM
from mmdiff.sampling import Denoise, Noise, seeded_noise
from mmdiff.sigmas import DDPM, Cosine, Karras

STD = 0.7
MEANS = torch.tensor([[-1.2, 0.3], [0.8, -0.9], [0.2, 1.4]], dtype=torch.float64)
SPREAD, SHARES = 0.4, torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    """The exact denoiser of N(0, STD^2)."""
    return x * STD**2 / (STD**2 + sigma**2)


def mixture(x: Tensor, sigma: Tensor) -> Tensor:
    """The exact denoiser of the mixture, on x (B, 2, 1)."""
    variance, points = SPREAD**2 + sigma**2, x[..., 0]
    far = -((points[:, None] - MEANS) ** 2).sum(-1) / (2 * variance)
    chosen = (far + SHARES.log()).softmax(-1)
    estimates = MEANS + SPREAD**2 / variance * (points[:, None] - MEANS)
    return (chosen[..., None] * estimates).sum(1)[..., None]


def density(x: Tensor) -> Tensor:
    """ln p of the mixture, from torch."""
    parts = Independent(Normal(MEANS, SPREAD), 1)
    return MixtureSameFamily(Categorical(SHARES), parts).log_prob(x[..., 0])


def draws(n: int) -> Tensor:
    return MixtureSameFamily(Categorical(SHARES), Independent(Normal(MEANS, SPREAD), 1)).sample((n,))[..., None]


def stream(seed: int = 1234) -> Noise:
    """Not the seed that the data is drawn with."""
    generator = torch.Generator().manual_seed(seed)
    return lambda like: torch.randn(like.shape, generator=generator, dtype=like.dtype)


FINE = FlowLikelihood(Karras(0.002, 300), 80, Exact(), bins=None)


@pytest.mark.parametrize("std", [0.3, 1.0, 2.0])
def test_flow_likelihood_of_a_gaussian(std: float) -> None:
    """To 1e-3 nats in 2 dimensions: the prior's variance 1 + sigma^2 for std^2 + sigma^2 costs 4e-5 at sigma 300."""
    x0 = std * torch.randn(5, 1, 2, dtype=torch.float64)
    found = FINE(lambda x, s: x * std**2 / (std**2 + s**2), x0, stream())
    expected = Normal(0.0, std).log_prob(x0).flatten(1).sum(1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_flow_likelihood_of_a_mixture_and_its_order() -> None:
    """RK4's error falls as steps^-4. The grid ends where the prior, off by the data's mean / sigma, has no part."""
    x0 = draws(20)
    errors = [
        float((FlowLikelihood(Cosine(1e6), n, Exact())(mixture, x0, stream()) - density(x0)).abs().max())
        for n in (10, 20, 40)
    ]
    order = math.log2(errors[0] / errors[1]), math.log2(errors[1] / errors[2])
    assert errors[2] < 1e-4
    assert min(order) > 3.5, f"errors {errors}"


def test_hutchinson_is_unbiased_and_sharper_with_probes() -> None:
    """Mean over 64 runs within 4 standard errors of the exact; 16 probes have a quarter of the spread."""
    x0 = draws(4)
    exact = FlowLikelihood(Cosine(), 12, Exact())(mixture, x0, stream())
    many = x0.repeat(64, 1, 1)
    spreads = []
    for probes in (1, 16):
        found = FlowLikelihood(Cosine(), 12, Hutchinson(probes))(mixture, many, stream()).reshape(64, 4)
        error = found.std(0) / 8
        assert ((found.mean(0) - exact).abs() < 4 * error + 1e-9).all()
        spreads.append(float(found.std(0).mean()))
    assert spreads[0] / spreads[1] == pytest.approx(4, rel=0.35)
    # a Jacobian without off-diagonal elements has no variance under random signs
    plain = [FlowLikelihood(Cosine(), 8, d)(gaussian, x0, stream()) for d in (Exact(), Hutchinson())]
    torch.testing.assert_close(*plain, rtol=1e-10, atol=1e-10)


def test_flow_likelihood_in_float32_and_in_inference_mode() -> None:
    x0 = STD * torch.randn(3, 2, 4, 5)
    with torch.inference_mode():
        found = replace(FINE, divergence=Hutchinson())(gaussian, x0.clone(), seeded_noise([0, 1, 2]))
    expected = Normal(0.0, STD).log_prob(x0).flatten(1).sum(1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-2)  # 40 dimensions in float32
    assert not found.requires_grad


def test_an_adaptive_solver_agrees() -> None:
    pytest.importorskip("torchdiffeq")
    x0 = draws(4)
    found = FlowLikelihood(Cosine(1e6), 1, Exact(), tolerance=1e-7)(mixture, x0, stream())
    torch.testing.assert_close(found, density(x0), rtol=0, atol=1e-4)


def test_an_adaptive_solver_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchdiffeq", None)
    with pytest.raises(ValueError, match="needs torchdiffeq: pip install torchdiffeq"):
        FlowLikelihood(tolerance=1e-5)(gaussian, torch.zeros(1, 1, 2), stream())


def bound(denoise: Denoise, x0: Tensor, **settings: Any) -> BoundTerms:
    return VariationalBound(**{"bins": None, **settings})(denoise, x0, stream())


@pytest.mark.parametrize("variance", [-1.0, 1.0])
def test_bound_of_a_gaussian_term_by_term(variance: float) -> None:
    """Means over 40,000 dimensions within 4 standard errors of the closed forms, each written out here."""
    table = DDPM(train_steps=25, beta_end=0.3)
    x0 = STD * torch.randn(1, 1, 40_000, dtype=torch.float64)
    found = bound(gaussian, x0, sigmas=table, steps=25, variance=variance)
    beta = torch.linspace(1e-4, 0.3, 25, dtype=torch.float64)
    bar = (1 - beta).cumprod(0)
    bar_next = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
    tilde = (1 - bar_next) / (1 - bar) * beta  # arXiv 2006.11239, eq. 7
    model = tilde if variance < 0 else beta
    sigma2 = (1 - bar) / bar
    error = STD**2 * sigma2 / (STD**2 + sigma2)  # E |x0 - D|^2
    off = bar_next * beta**2 / (1 - bar) ** 2 * error
    kl = ((tilde + off) / model - 1 + model.log() - tilde.log()) / 2
    spread = off / model / math.sqrt(2) / 200  # standard error of off / (2 model), the square of a normal
    terms = found.terms[0].flip(0) * math.log(2)
    assert ((terms - kl[1:]).abs() < 4 * spread[1:]).all()
    prior = (bar[-1] * (STD**2 - 1) - torch.log1p(-bar[-1])) / 2
    assert float(found.prior[0] * math.log(2)) == pytest.approx(float(prior), abs=4 * float(bar[-1]) / 200)
    decoder = beta[0] if variance > 0 else beta[0] / 2  # the paper's clipped variance
    nats = (error[0] / decoder + decoder.log() + math.log(2 * math.pi)) / 2
    assert float(found.decoder[0] * math.log(2)) == pytest.approx(float(nats), abs=4 * 0.71 / 200 * 2)
    torch.testing.assert_close(found.total, found.prior + found.terms.sum(1) + found.decoder)


def test_bound_of_many_steps_is_the_entropy() -> None:
    """For N(0, 1) every step of variance beta is exact: the bound is tight at any number of steps."""
    x0 = torch.randn(1, 1, 20_000, dtype=torch.float64)
    entropy = 0.5 * math.log2(2 * math.pi * math.e)

    def unit(x: Tensor, sigma: Tensor) -> Tensor:
        return x / (1 + sigma**2)

    own = -float(Normal(0.0, 1.0).log_prob(x0).mean()) / math.log(2)
    assert own == pytest.approx(entropy, abs=0.03)
    table = DDPM(train_steps=200, beta_end=0.1)
    gaps = {v: float(bound(unit, x0, sigmas=table, steps=200, variance=v).total) - own for v in (1.0, -1.0)}
    assert abs(gaps[1.0]) < 0.02, gaps  # noise alone: one draw of it a step
    assert gaps[-1.0] > 0.05, gaps  # the posterior's variance is too small for this data


def test_bound_is_above_the_exact_negative_log_likelihood() -> None:
    """By what falls with the number of steps; each gap's standard error is 0.007 here."""
    x0 = draws(20_000)
    own, gaps = -density(x0) / 2 / math.log(2), []
    for steps in (8, 16):
        gap = bound(mixture, x0, sigmas=DDPM("cosine", steps), steps=steps).total - own
        assert float(gap.mean()) > 4 * float(gap.std()) / math.sqrt(20_000)
        gaps.append(float(gap.mean()))
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.25)


def test_the_learned_variance_takes_the_place_of_the_fixed_one() -> None:
    x0 = STD * torch.randn(2, 1, 50)
    whole = VariationalBound(DDPM(train_steps=10), 10, variance=0.5, bins=None)
    fixed = whole(gaussian, x0, stream())
    learned = replace(whole, variance=-1.0)(gaussian, x0, stream(), lambda x, sigma: torch.full_like(x, 0.5))
    torch.testing.assert_close(learned.total, fixed.total)


def test_the_decoder_of_8_bit_data_is_a_distribution() -> None:
    values = torch.linspace(-1, 1, 256)
    for mean in (-1.3, -0.999, 0.01, 0.7, 1.0):
        for spread in (1e-3, 0.02, 0.5):
            log_variance = torch.full_like(values, 2 * math.log(spread))
            mass = (-decoder_nats(values, torch.full_like(values, mean), log_variance, 256)).exp()
            assert float(mass.sum()) == pytest.approx(1, abs=1e-4)
    # bins far narrower than the Gaussian: its density times their width
    log_variance = torch.full_like(values, 2 * math.log(0.5))
    inner, zero = slice(5, 250), torch.zeros_like(values)
    fine = decoder_nats(values, zero, log_variance, 256) + math.log(2 / 255)
    torch.testing.assert_close(fine[inner], decoder_nats(values, zero, log_variance, None)[inner], rtol=0, atol=1e-4)


def test_the_decoder_has_finite_gradients_however_wrong_the_mean() -> None:
    values = torch.linspace(-1, 1, 256)
    mean = torch.linspace(5, -5, 256).requires_grad_()
    log_variance = torch.full_like(values, -9.0).requires_grad_()
    nats = decoder_nats(values, mean, log_variance, 256)
    nats.sum().backward()
    assert nats.isfinite().all()
    assert mean.grad is not None
    assert log_variance.grad is not None
    assert mean.grad.isfinite().all()
    assert log_variance.grad.isfinite().all()


def test_an_exact_step_and_a_hidden_prior_cost_nothing() -> None:
    x0 = torch.randn(2, 3, 4, dtype=torch.float64)
    free = step_nats(x0, x0, torch.tensor(2.0).double(), torch.tensor(1.0).double(), torch.full_like(x0, -1))
    torch.testing.assert_close(free, torch.zeros_like(x0), rtol=0, atol=1e-12)
    assert float(prior_nats(x0, torch.tensor(1e5, dtype=torch.float64)).abs().max()) < 1e-9
    # per item and per time step alike
    sigma, v = torch.rand(2, 4, dtype=torch.float64) + 1, torch.zeros_like(x0)
    per_step = step_nats(x0, 0 * x0, sigma, sigma / 2, v)
    for b in range(2):
        for t in range(4):
            one = step_nats(x0[b, :, t], 0 * x0[b, :, t], sigma[b, t], sigma[b, t] / 2, v[b, :, t])
            torch.testing.assert_close(per_step[b, :, t], one)


def test_bits_count_the_values_of_the_data() -> None:
    """Uniform noise in 256 values costs 8 bits; the density of one normal is off by its fit alone."""
    x0 = torch.randint(0, 256, (1, 1, 4000)) / 127.5 - 1
    std2 = float(x0.square().mean())
    found = FlowLikelihood(Karras(), 30).bits(lambda x, s: x * std2 / (std2 + s**2), x0, stream())
    expected = 0.5 * math.log2(2 * math.pi * math.e * std2) + math.log2(127.5)
    assert float(found) == pytest.approx(expected, abs=0.01)
    bound = VariationalBound(DDPM(train_steps=100, beta_end=0.2), 100)
    total = bound.bits(lambda x, s: x * std2 / (std2 + s**2), x0, stream())
    assert 8 < float(total) < expected + 0.1, "a bound lies above the data's entropy, which is 8 bits"


@pytest.mark.parametrize(("one", "other"), [
    (FlowLikelihood(steps=4), FlowLikelihood(Cosine(), steps=4)),
    (FlowLikelihood(steps=4), FlowLikelihood(steps=5)),
    (FlowLikelihood(steps=4), FlowLikelihood(steps=4, bins=None)),
    (FlowLikelihood(steps=4), FlowLikelihood(steps=4, divergence=Exact())),
    (FlowLikelihood(steps=4), FlowLikelihood(steps=4, divergence=Hutchinson(2))),
    (VariationalBound(steps=4), VariationalBound(DDPM("cosine"), steps=4)),
    (VariationalBound(steps=4), VariationalBound(steps=5)),
    (VariationalBound(steps=4), VariationalBound(steps=4, variance=0.0)),
    (VariationalBound(steps=4), VariationalBound(steps=4, bins=None)),
], ids=str)  # fmt: skip
def test_every_argument_counts(one: Any, other: Any) -> None:
    x0 = torch.tensor([[[-1.0, 1.0]], [[1.0, 1.0]]], dtype=torch.float64)
    a, b = (likelihood.bits(mixture_of_time, x0, stream()) for likelihood in (one, other))
    assert a.isfinite().all()
    assert not torch.allclose(a, b)


def mixture_of_time(x: Tensor, sigma: Tensor) -> Tensor:
    return mixture(x.transpose(1, 2), sigma).transpose(1, 2)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: VariationalBound(steps=0), "steps=0 must be at least 1"),
    (lambda: VariationalBound(variance=2.0), "variance=2.0 must lie between -1"),
    (lambda: VariationalBound(bins=1), "bins=1 must be at least 2"),
    (lambda: FlowLikelihood(steps=0), "steps=0 must be at least 1"),
    (lambda: FlowLikelihood(tolerance=0.0), "tolerance=0.0 must lie between"),
    (lambda: FlowLikelihood(bins=0), "bins=0 must be at least 2"),
    (lambda: Hutchinson(0), "probes=0 must be at least 1"),
    (lambda: Exact().directions(torch.zeros(1, 5000, 1), stream()), "5000 dimensions, too many"),
    (lambda: VariationalBound(steps=2)(gaussian, torch.tensor([[[0.5]]]), stream()), "beside the 256"),
    (lambda: FlowLikelihood().bits(gaussian, torch.tensor([[[3.0]]]), stream()), "beside the 256"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_validation_logs_bits_per_dimension() -> None:
    """Of the first batch's first items, the same at every validation, in a network that predicts nought."""
    fit = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    net = UNet(1, 1, channels=8, multipliers=(1,), vector_width=4)
    module = DiffusionModule(DiffusionModel(net, EDM(), Label("class", 3, 4)), LogNormal())
    x = torch.randint(0, 256, (6, 1, 8)) / 127.5 - 1
    data = DataLoader([{"x": x[i], "class": torch.tensor(i % 3)} for i in range(6)], batch_size=3)
    found = []
    for likelihood, count in ((VariationalBound(steps=4), 2), (VariationalBound(steps=4), 2),
                              (VariationalBound(steps=4), 3), (FlowLikelihood(steps=4), 2)):  # fmt: skip
        fit.callbacks = [BitsPerDim(likelihood, count)]
        fit.validate(module, data, verbose=False)
        found.append(float(fit.callback_metrics["val/bits_per_dim"]))
    assert found[0] == found[1]
    assert len(set(found)) == 3
    # an untrained UNet predicts 0, so D = c_skip x
    noise = seeded_noise([0, 1])
    by_hand = FlowLikelihood(steps=4).bits(lambda y, s: y * 0.25 / (0.25 + s**2), x[:2], noise).mean()
    assert found[3] == pytest.approx(float(by_hand), rel=1e-4)
    skipped = BitsPerDim(FlowLikelihood(steps=4), every=2)
    fit.callbacks = [skipped]
    for expected in (True, False, True):
        fit.validate(module, data, verbose=False)
        assert ("val/bits_per_dim" in fit.callback_metrics) == expected
    with pytest.raises(ValueError, match="count=0, every=1 must both be at least 1"):
        BitsPerDim(FlowLikelihood(), 0)
