"""Weights of the loss in every parametrisation, distances and their limits, masks, learned uncertainty and variance."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from mmdiff import weighting
from mmdiff.denoiser import Denoiser, expand_like
from mmdiff.density import LogUniform, Table
from mmdiff.likelihood import LearnedVariance
from mmdiff.precond import EDM, VE, X0, Eps, Flow, Precond, V, learned_log_variance
from mmdiff.sigmas import DDPM
from mmdiff.weighting import (
    ELBO,
    L1,
    MSE,
    P2,
    VLB,
    Distance,
    LearnedUncertainty,
    MinSNR,
    Natural,
    PseudoHuber,
    Sigmoid,
    Weighting,
)

PRECONDS = [Eps(), V(), X0(), VE(), EDM(), EDM(0.8), Flow()]
SIGMA = torch.logspace(-2, 2, 9, dtype=torch.float64)


class Sine(nn.Module):
    """A network that works on each element alone, so that a clip's part is worth the same alone."""

    def __init__(self, extra: int = 0) -> None:
        super().__init__()
        self.gain, self.extra = nn.Parameter(torch.tensor(1.3)), extra

    def forward(self, x: Tensor, c_noise: Tensor, cond: object = None) -> Tensor:
        out = torch.sin(self.gain * x) + 0.1
        return torch.cat([out] + [0.3 * x] * self.extra, dim=1)


def weights(rule: Weighting, precond: Precond, sigma: Tensor = SIGMA) -> Tensor:
    return rule.weigh(torch.ones_like(sigma), sigma, precond)


def of_estimate(rule: Weighting, precond: Precond) -> Tensor:
    """The weight that |D - x0|^2 has in the end: the network's own target is off by (D - x0) / c_out."""
    return weights(rule, precond) / precond(SIGMA)[1] ** 2


@pytest.mark.parametrize(
    "rule", [MinSNR(), MinSNR(1.0), P2(), weighting.EDM(0.7), ELBO(), Sigmoid(-1.0), VLB()], ids=repr
)
def test_a_rule_weighs_the_estimate_alike_whatever_the_network_predicts(rule: Weighting) -> None:
    reference = of_estimate(rule, Eps())
    for precond in PRECONDS:
        torch.testing.assert_close(of_estimate(rule, precond), reference, rtol=1e-10, atol=0)


def test_min_snr_is_the_papers_in_each_parametrisation() -> None:
    """arXiv 2303.09556, sec. 3.4, for data of unit variance; the flow's follows from t = sigma / (1 + sigma)."""
    snr, gamma, t = SIGMA**-2, 5.0, SIGMA / (1 + SIGMA)
    least = snr.clamp(max=gamma)
    for precond, expected in [(Eps(), least / snr), (V(), least / (snr + 1)), (X0(), least), (Flow(), least * t**2)]:
        torch.testing.assert_close(weights(MinSNR(gamma), precond), expected, rtol=1e-10, atol=0)


def test_weights_against_their_papers_formulas() -> None:
    snr, log_snr = SIGMA**-2, -2 * SIGMA.log()
    eps_loss = {  # each as it multiplies |eps - eps_hat|^2
        P2(1.0, 1.0): 1 / (1 + snr),
        P2(0.5, 2.0): (2 + snr) ** -0.5,
        P2(0.0): torch.ones_like(snr),
        Sigmoid(-3.0): 1 / (1 + torch.exp(3.0 + log_snr)),
        ELBO(): torch.full_like(snr, 0.5),
    }
    for rule, expected in eps_loss.items():
        torch.testing.assert_close(weights(rule, Eps()), expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(weights(weighting.EDM(0.5), EDM(0.5)), torch.ones_like(SIGMA), rtol=1e-12, atol=0)
    error = torch.rand(9)
    assert torch.equal(Natural().weigh(error, SIGMA.float(), Flow()), error)


def test_vlb_is_the_kl_of_the_chains_steps() -> None:
    """Against torch's KL of the two Gaussians, for an estimate that is off by 1 (posterior's variance)."""
    table = DDPM(train_steps=50)
    levels = table.table
    s, n = levels[1:], levels[:-1]
    variance = n**2 * (1 - n**2 / s**2)
    off = 1 - n**2 / s**2  # how far the step's mean moves with the estimate
    kl = kl_divergence(Normal(torch.zeros_like(off), variance.sqrt()), Normal(off, variance.sqrt()))
    weight = VLB(table).of_estimate(levels)
    torch.testing.assert_close(weight[1:], 50 * kl, rtol=1e-9, atol=0)
    # -ln of a Gaussian of variance sigma^2, less that of an exact estimate
    torch.testing.assert_close(weight[0], 50 * 0.5 / levels[0] ** 2, rtol=1e-12, atol=0)
    between = (levels[3] * levels[4]).sqrt()
    assert VLB(table).of_estimate(between[None]) == weight[4]
    assert VLB(table).of_estimate(levels[-1:] * 2) == weight[-1]


def test_vlb_of_many_steps_is_the_continuous_weight() -> None:
    """A step's KL over its fall of ln(SNR) tends to SNR / 2, at first order in the step: halved when steps double."""
    errors = []
    for steps in (1000, 2000):
        table = DDPM("cosine", train_steps=steps)
        levels = table.table
        fall = -2 * (levels[:-1].log() - levels[1:].log())
        discrete = VLB(table).of_estimate(levels)[1:] / steps / fall
        middle = slice(steps // 10, -steps // 10)
        errors.append(float((discrete / ELBO().of_estimate(levels[1:]) - 1)[middle].abs().max()))
    assert errors[0] < 0.02
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)


def test_mean_loss_of_elbo_and_of_vlb_is_the_same_integral() -> None:
    """Data ~ N(0, 1) and D = x / (1 + sigma^2): |D - x0|^2 is sigma^2 / (1 + sigma^2), the integral is closed.

    The chain's sum is above the integral, at first order in its steps. (Its lowest steps, which double sigma^2 however
    many there are, are left out.)
    """

    def square(sigma: Tensor) -> Tensor:
        return sigma**2 / (1 + sigma**2)

    above = []
    for steps in (1000, 2000):
        table = DDPM("cosine", train_steps=steps)
        first = steps // 10
        low, high = float(table.table[first]), float(table.table[-1])
        exact = 0.5 * math.log((low**-2 + 1) / (high**-2 + 1))  # of sigma^2 / (1 + sigma^2) d SNR / 2
        sigma = LogUniform(low, high).quantile((torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000)
        elbo = (ELBO().of_estimate(sigma) * square(sigma)).mean() * 2 * math.log(high / low)
        assert float(elbo) == pytest.approx(exact, rel=1e-6)
        sigma = Table(table).quantile((torch.arange(steps, dtype=torch.float64) + 0.5) / steps)
        terms = VLB(table).of_estimate(sigma) * square(sigma)
        above.append(float(terms[first + 1 :].sum() / steps) / exact - 1)
    assert 0 < above[1] < above[0] < 0.02
    assert above[0] / above[1] == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize(("rules", "precond"), [
    ([MinSNR(), MinSNR(2.0)], Eps()), ([P2(), P2(0.5)], Eps()), ([P2(), P2(1.0, 2.0)], Eps()),
    ([weighting.EDM(), weighting.EDM(0.6)], EDM()), ([Sigmoid(), Sigmoid(1.0)], V()),
    ([VLB(), VLB(DDPM("cosine"))], Eps()),
    ([LearnedUncertainty(features=4), LearnedUncertainty(features=8)], Eps()),
    ([LearnedUncertainty(), LearnedUncertainty(MinSNR())], Eps()),
], ids=str)  # fmt: skip
def test_every_argument_of_a_weighting_counts(rules: list[Any], precond: Precond) -> None:
    for rule in rules:
        if isinstance(rule, LearnedUncertainty):
            nn.init.ones_(rule.linear.weight)
    one, other = (weights(rule, precond, SIGMA.float()) for rule in rules)
    assert one.isfinite().all()
    assert not torch.allclose(one, other, rtol=1e-3)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: MinSNR(0), "gamma=0 must be positive"), (lambda: P2(-1), "gamma=-1 must be 0 or"),
    (lambda: P2(k=0), "k=0 must be positive"), (lambda: weighting.EDM(0), "sigma_data=0 must be positive"),
    (lambda: Sigmoid(math.inf), "bias=inf must be finite"), (lambda: PseudoHuber(0), "c=0 must be positive"),
    (lambda: LearnedUncertainty(features=0), "features=0 must be at least 1"),
    (lambda: LearnedVariance(scale=0), "scale=0 must be positive"),
    (lambda: LearnedVariance(bins=1), "bins=1 must be at least 2"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def distance(rule: Distance, error: Tensor) -> Tensor:
    return rule.whole(rule.element(error).mean())


def test_distances_and_the_limits_of_pseudo_huber() -> None:
    error = torch.randn(500, dtype=torch.float64)
    square = error.square().mean()
    torch.testing.assert_close(distance(MSE(), error), square)
    torch.testing.assert_close(distance(L1(), error), error.abs().mean())
    # the next terms are m / 4c^2 and c / sqrt(m)
    torch.testing.assert_close(distance(PseudoHuber(1e4), error) * 2e4, square, rtol=1e-7, atol=0)
    torch.testing.assert_close(distance(PseudoHuber(1e-6), error), square.sqrt(), rtol=2e-6, atol=0)
    c, n = 0.03 * math.sqrt(500), 500  # the paper's own form
    paper = (torch.linalg.vector_norm(error) ** 2 + c**2).sqrt() - c
    torch.testing.assert_close(distance(PseudoHuber(0.03), error), paper / math.sqrt(n))


@pytest.mark.parametrize("rule", [MSE(), L1(), PseudoHuber(), PseudoHuber(0.5)], ids=repr)
@pytest.mark.parametrize("per_step", [False, True])
def test_a_masked_clip_is_worth_the_cropped_one(rule: Distance, per_step: bool) -> None:
    """Loss and gradient: padding is in no numerator and no denominator, whatever it holds."""
    x0, noise = torch.randn(2, 3, 2, 6, 5, dtype=torch.float64)
    sigma = torch.rand(3, 6, dtype=torch.float64) + 0.2 if per_step else torch.tensor([0.3, 1.0, 4.0]).double()
    denoiser = Denoiser(Sine().double(), Flow())
    gain = denoiser.backbone.gain
    x0[:, :, 4:] = 1e6
    mask = (torch.arange(6) < 4).expand(3, 6)
    whole = denoiser.loss(x0, sigma, noise=noise, distance=rule, mask=mask)
    cropped = denoiser.loss(x0[:, :, :4], sigma[:, :4] if per_step else sigma, noise=noise[:, :, :4], distance=rule)
    torch.testing.assert_close(whole, cropped, rtol=1e-12, atol=0)
    slopes = [torch.autograd.grad(loss.mean(), gain)[0] for loss in (whole, cropped)]
    torch.testing.assert_close(*slopes, rtol=1e-12, atol=0)
    assert slopes[0] != 0
    rows = torch.ones(3, 1, 1, 5, dtype=torch.bool)
    rows[..., 3:] = False
    part = denoiser.loss(x0[:, :, :4], sigma[:, :4] if per_step else sigma, noise=noise[:, :, :4], mask=rows)
    alone = denoiser.loss(x0[:, :, :4, :3], sigma[:, :4] if per_step else sigma, noise=noise[:, :, :4, :3])
    torch.testing.assert_close(part, alone, rtol=1e-12, atol=0)


def test_items_of_unequal_length_count_alike() -> None:
    x0, noise = torch.randn(2, 2, 1, 6)
    denoiser, sigma = Denoiser(Sine(), EDM()), torch.tensor([0.5, 2.0])
    mask = torch.arange(6) < torch.tensor([[2], [6]])
    loss = denoiser.loss(x0, sigma, noise=noise, mask=mask)
    short = denoiser.loss(x0[:1, :, :2], sigma[:1], noise=noise[:1, :, :2])
    torch.testing.assert_close(loss[:1], short)
    torch.testing.assert_close(loss[1:], denoiser.loss(x0[1:], sigma[1:], noise=noise[1:]))


@pytest.mark.parametrize(("mask", "message"), [
    (torch.ones(2, 6), "mask is torch.float32; it must be bool"),
    (torch.ones(2, 5, dtype=torch.bool), r"mask has shape \(2, 5\)"),
    (torch.ones(2, 1, 6, 1, dtype=torch.bool), r"mask has shape \(2, 1, 6, 1\)"),
    (torch.zeros(2, 6, dtype=torch.bool), "in all of the batch: nothing is left"),
])  # fmt: skip
def test_masks_that_do_not_fit_are_refused(mask: Tensor, message: str) -> None:
    x0, noise = torch.randn(2, 2, 1, 6)
    with pytest.raises(ValueError, match=message):
        Denoiser(Sine(), EDM()).loss(x0, torch.ones(2), noise=noise, mask=mask)


def test_learned_uncertainty_finds_the_loss_of_each_level() -> None:
    """At the optimum exp(u) is the mean loss (eq. 16), here 0.1 to 3 over four decades of sigma."""
    rule = LearnedUncertainty(features=64)
    sigma = torch.logspace(-2, 2, 64)
    error = 0.1 + 2.9 * sigma.log10().add(2).div(4) ** 2
    assert torch.equal(rule.weigh(error, sigma, EDM()), error), "before training it is no weight"
    optimizer = torch.optim.Adam(rule.parameters(), lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        rule.weigh(error, sigma, EDM()).mean().backward()
        optimizer.step()
    torch.testing.assert_close(rule.u(sigma).exp(), error, rtol=0.1, atol=0)
    again = LearnedUncertainty(features=64)
    assert torch.equal(again.frequency, rule.frequency), "the features do not hang on the global seed"
    assert rule.u(sigma.reshape(8, 8)).shape == (8, 8)


def test_the_learned_variance_has_the_iddpm_loss() -> None:
    """arXiv 2102.09672, eq. 15: against torch's KL, in the variance-preserving coordinates of the paper."""
    table = DDPM(train_steps=20)
    i = torch.tensor([3, 12])  # levels; the step goes to the one below
    s, n = table.table[i], table.table[i - 1]
    bar, bar_next = 1 / (1 + s**2), 1 / (1 + n**2)
    beta = 1 - bar / bar_next
    tilde = (1 - bar_next) / (1 - bar) * beta
    x0, noise = torch.randn(2, 2, 3, 4, dtype=torch.float64)
    denoiser, rule = Denoiser(Sine(extra=1).double(), Eps(table)), LearnedVariance(table, scale=0.01)
    errors = denoiser.errors(x0, s, noise=noise)
    xt = (x0 + expand_like(s, x0) * noise) * expand_like(bar.sqrt(), x0)

    def mean(clean: Tensor) -> Tensor:  # DDPM, eq. 7
        of_clean, of_x = bar_next.sqrt() * beta / (1 - bar), (1 - beta).sqrt() * (1 - bar_next) / (1 - bar)
        return expand_like(of_clean, x0) * clean + expand_like(of_x, x0) * xt

    v = (errors.extra + 1) / 2
    variance = (v * expand_like(beta.log(), x0) + (1 - v) * expand_like(tilde.log(), x0)).exp()
    true = Normal(mean(x0), expand_like(tilde.sqrt(), x0).expand_as(x0))
    kl = kl_divergence(true, Normal(mean(errors.estimate), variance.sqrt()))
    loss = rule(errors, x0, s)
    torch.testing.assert_close(loss, 0.01 * 20 * kl.flatten(1).mean(1), rtol=1e-8, atol=0)
    for other in (LearnedVariance(table, 0.02), LearnedVariance(DDPM(train_steps=10), 0.01)):
        assert not torch.allclose(other(errors, x0, s), loss)
    shorter = denoiser.errors(x0, s, noise=noise, mask=(torch.arange(4) < 2).expand(2, 4))
    torch.testing.assert_close(rule(shorter, x0, s), 0.01 * 20 * kl[..., :2].flatten(1).mean(1), rtol=1e-8, atol=0)


def test_the_learned_variance_leaves_the_mean_alone_and_ends_in_the_data() -> None:
    table, x0, noise = DDPM(train_steps=20), torch.randint(0, 256, (1, 2, 4)) / 127.5 - 1, torch.randn(1, 2, 4)
    sigma = table.table[:1].float()
    network = Sine(extra=1)
    errors = Denoiser(network, Eps(table)).errors(x0, sigma, noise=noise)
    assert not errors.extra.equal(errors.estimate)
    continuous = LearnedVariance(table, 1.0)(errors, x0, sigma)
    log_variance = learned_log_variance(errors.extra, sigma, torch.zeros(1))
    density = -Normal(errors.estimate, (log_variance / 2).exp()).log_prob(x0)
    torch.testing.assert_close(continuous, 20 * density.mean()[None], rtol=1e-4, atol=0)
    assert not torch.allclose(LearnedVariance(table, 1.0, bins=256)(errors, x0, sigma), continuous)
    v = errors.extra.detach().requires_grad_()
    LearnedVariance(table)(errors._replace(extra=v), x0, sigma).sum().backward()
    assert v.grad is not None
    assert v.grad.abs().min() > 0
    assert network.gain.grad is None, "the bound's gradient reached the mean"
    with pytest.raises(ValueError, match="gives 0 channels beyond x's 2"):
        LearnedVariance(table)(Denoiser(Sine(), Eps(table)).errors(x0, sigma, noise=noise), x0, sigma)
    with pytest.raises(ValueError, match="x0 takes values beside the 256"):
        LearnedVariance(table, bins=256)(errors, x0 + 0.001, sigma)
