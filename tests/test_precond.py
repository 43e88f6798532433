"""What networks predict: targets, identities, limits, conversions, learned variances, and diffusers as a reference."""

import math
from dataclasses import fields, replace
from itertools import permutations
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from mmdiff.config import build
from mmdiff.precond import EDM, SIGMA_FLOOR, VE, X0, Eps, Flow, Precond, V, convert, learned_log_variance
from mmdiff.sigmas import DDPM

ROWS = [Eps(), X0(), V(), EDM(), EDM(1.0), VE(), Flow()]
PAIRS = list(permutations(ROWS, 2))
SIGMA = torch.logspace(-3, 5, 33, dtype=torch.float64)


def target(precond: Precond, x0: torch.Tensor, eps: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """What the network has to predict, solved from D = x0."""
    c_skip, c_out, _, _ = precond(sigma)
    return (x0 - c_skip * (x0 + sigma * eps)) / c_out


def test_targets_are_eps_v_and_velocity() -> None:
    x0, eps = torch.randn(2, 33, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    alpha = 1 / (1 + SIGMA**2).sqrt()
    # the tolerance is float64's cancellation in x0 - c_skip x, which grows as sigma or as 1 / sigma
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(target(Eps(), x0, eps, SIGMA), eps, **close)
    torch.testing.assert_close(target(V(), x0, eps, SIGMA), alpha * eps - alpha * SIGMA * x0, **close)
    torch.testing.assert_close(target(Flow(), x0, eps, SIGMA), eps - x0, **close)
    torch.testing.assert_close(target(X0(), x0, eps, SIGMA), x0, **close)
    torch.testing.assert_close(target(VE(), x0, eps, SIGMA), -eps, **close)


@pytest.mark.parametrize("sigma_data", [0.1, 0.5, 1.0])
def test_edm_input_and_target_have_unit_variance(sigma_data: float) -> None:
    c_skip, c_out, c_in, c_noise = EDM(sigma_data)(SIGMA)
    data, noise = sigma_data**2, SIGMA**2
    torch.testing.assert_close(c_in**2 * (data + noise), torch.ones_like(SIGMA))
    torch.testing.assert_close(((1 - c_skip) ** 2 * data + c_skip**2 * noise) / c_out**2, torch.ones_like(SIGMA))
    torch.testing.assert_close(c_noise, SIGMA.log() / 4)


def test_v_is_edm_of_unit_variance_data_with_the_sign_turned() -> None:
    for ours, other, sign in zip(V()(SIGMA)[:3], EDM(1.0)(SIGMA)[:3], (1, -1, 1), strict=True):
        torch.testing.assert_close(ours, sign * other)


@pytest.mark.parametrize("precond", [Eps(), X0(), V()])
def test_input_is_the_variance_preserving_state(precond: Precond) -> None:
    torch.testing.assert_close(precond(SIGMA)[2], 1 / (1 + SIGMA**2).sqrt())


def test_flow_input_is_the_interpolation_at_its_own_time() -> None:
    x0, eps = torch.randn(2, 33, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    _, _, c_in, t = Flow()(SIGMA)
    torch.testing.assert_close(c_in * (x0 + SIGMA * eps), (1 - t) * x0 + t * eps)


@pytest.mark.parametrize("precond", ROWS, ids=repr)
@pytest.mark.parametrize("shape", [(), (3,), (2, 5)])
def test_known_parts_pass_unchanged(precond: Precond, shape: tuple[int, ...]) -> None:
    scalars = precond(torch.zeros(shape))
    assert all(s.shape == shape and s.dtype == torch.float32 and s.isfinite().all() for s in scalars)
    assert (scalars[0] == 1).all()  # with c_out = 0: D(x, 0) = x
    assert (scalars[1] == 0).all()


@pytest.mark.parametrize("precond", ROWS, ids=repr)
def test_finite_in_float32_at_extremes_and_elementwise(precond: Precond) -> None:
    sigma = torch.tensor([[0.0, 1e-6, 1.0], [1e5, 1e15, 0.3]])
    whole = precond(sigma)
    for row in range(2):
        for step in range(3):
            for got, scalar in zip(whole, precond(sigma[row, step]), strict=True):
                assert got.shape == sigma.shape
                assert scalar.isfinite()
                torch.testing.assert_close(got[row, step], scalar)


@pytest.mark.parametrize("precond", ROWS, ids=repr)
def test_c_noise_does_not_fall(precond: Precond) -> None:
    assert (precond(SIGMA)[3].diff() >= 0).all()


def test_logarithms_stop_at_the_floor() -> None:
    floor = torch.tensor(SIGMA_FLOOR)
    assert EDM()(torch.tensor(0.0))[3] == EDM()(floor)[3] == floor.log() / 4
    assert VE()(torch.tensor(0.0))[3] == VE()(floor)[3] == (floor / 2).log()


def test_ve_sees_x_itself_and_the_log_of_half_sigma() -> None:
    _, _, c_in, c_noise = VE()(SIGMA)
    assert (c_in == 1).all()
    torch.testing.assert_close(c_noise, (SIGMA / 2).log())


@pytest.mark.parametrize("table", [DDPM(), DDPM("scaled_linear", 1000, 0.00085, 0.012), DDPM("cosine", 50)], ids=repr)
def test_eps_c_noise_is_the_index_in_the_table(table: DDPM) -> None:
    indices = torch.arange(table.train_steps)
    assert torch.equal(Eps(table)(table.table.float())[3], indices.float())  # exact, in float32 too
    between = (table.table[1:] * table.table[:-1]).sqrt()  # the middle in ln(sigma)
    torch.testing.assert_close(Eps(table)(between)[3], indices[:-1] + 0.5, check_dtype=False)
    assert Eps(table)(torch.tensor(1e-6))[3] == 0
    assert Eps(table)(torch.tensor(1e6))[3] == table.train_steps - 1


def test_edm_matches_diffusers() -> None:
    from diffusers import EDMEulerScheduler

    scheduler = EDMEulerScheduler(sigma_data=0.5)
    x, output = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    for sigma in torch.tensor([0.002, 0.1, 1.0, 80.0]):
        c_skip, c_out, c_in, c_noise = EDM(0.5)(sigma)
        torch.testing.assert_close(c_in * x, scheduler.precondition_inputs(x, sigma))
        torch.testing.assert_close(c_noise, scheduler.precondition_noise(sigma))
        torch.testing.assert_close(c_skip * x + c_out * output, scheduler.precondition_outputs(x, output, sigma))


def clean_and_noise(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    x0, eps = torch.randn(2, len(SIGMA), 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x0.to(dtype), eps.to(dtype)


@pytest.mark.parametrize(("source", "other"), PAIRS, ids=repr)
def test_conversion_gives_the_other_networks_target_and_comes_back(source: Precond, other: Precond) -> None:
    x0, eps = clean_and_noise(torch.float64)
    x = x0 + SIGMA[:, None, None] * eps
    columns = SIGMA[:, None, None].expand_as(x0)
    given, wanted = target(source, x0, eps, columns), target(other, x0, eps, columns)
    found = convert(given, x, SIGMA, source, other)
    # the targets are known to 2e-16 of numbers up to 1e5, and x0 from eps or eps from x0 enlarges that once more
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(convert(found, x, SIGMA, other, source), given, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("source", "other"), PAIRS, ids=repr)
def test_conversion_in_float32_loses_what_the_formula_must(source: Precond, other: Precond) -> None:
    """Its two terms are rounded, 2^-24 each and twice; on the way back the error there comes back enlarged."""
    x0, eps = clean_and_noise(torch.float64)
    level = SIGMA.float()
    sigma = level.double()[:, None, None]
    x = (x0 + sigma * eps).float()
    given = target(source, x0, eps, sigma.expand_as(x0)).float()
    (skip, out, *_), (new_skip, new_out, *_) = source(sigma), other(sigma)
    of_x, of_given, back = (skip - new_skip) / new_out, out / new_out, (new_out / out).abs()
    there = convert(given, x, level, source, other)
    assert there.dtype == torch.float32
    terms = (of_x * x).abs() + (of_given * given).abs()
    assert ((there - (of_x * x.double() + of_given * given.double())).abs() <= 3 * 2.0**-24 * terms).all()
    again = convert(there, x, level, other, source)
    assert ((again - given).abs() <= 3 * 2.0**-24 * (2 * back * terms + given.abs())).all()


@pytest.mark.parametrize(("source", "other"), list(permutations([V(), EDM(), EDM(1.0), Flow()], 2)), ids=repr)
def test_v_flow_and_edm_convert_without_loss_at_every_sigma(source: Precond, other: Precond) -> None:
    x0, eps = clean_and_noise(torch.float64)
    sigma = SIGMA[:, None, None].float().double()
    x, columns = x0 + sigma * eps, sigma.expand_as(x0)
    given, wanted = target(source, x0, eps, columns), target(other, x0, eps, columns)
    found = convert(given.float(), x.float(), sigma.flatten().float(), source, other)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=2e-6)  # of numbers up to 4: some 5 roundings


def test_conversion_takes_a_level_for_each_time_step() -> None:
    x0, eps = torch.randn(2, 2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    sigma = torch.rand(2, 5, generator=torch.Generator().manual_seed(1)) + 0.1
    x = x0 + sigma[:, None, :, None] * eps
    together = convert(eps, x, sigma, Eps(), V())
    for item in range(2):
        for step in range(5):
            alone = convert(eps[item, :, step], x[item, :, step], sigma[item, step], Eps(), V())
            torch.testing.assert_close(together[item, :, step], alone)


@pytest.mark.parametrize("sigma", [torch.tensor(0.0), torch.tensor([1.0, 0.0]), torch.tensor([1.0, math.nan])])
def test_a_known_part_has_no_prediction_to_convert(sigma: Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be positive: a known part"):
        convert(torch.ones(2, 1, 3), torch.ones(2, 1, 3), sigma, Eps(), V())


@pytest.mark.parametrize("index", [0, 10, 500, 999])
def test_eps_is_minus_sqrt_one_minus_alpha_bar_times_the_score(index: int) -> None:
    """Of a mixture of two Gaussians: E[x0 | x] in closed form, the score of x_t by differentiating its density."""
    sigma = DDPM().table[index]
    alpha_bar = 1 / (1 + sigma**2)
    means, spreads = torch.tensor([-1.0, 0.5], dtype=torch.float64), torch.tensor([0.3, 0.2], dtype=torch.float64)
    x_t = torch.linspace(-3, 3, 41, dtype=torch.float64).requires_grad_()
    variance = alpha_bar * spreads**2 + 1 - alpha_bar
    log_parts = -((x_t[:, None] - alpha_bar.sqrt() * means) ** 2) / (2 * variance) - variance.log() / 2
    (score,) = torch.autograd.grad(log_parts.logsumexp(1).sum(), x_t)
    x = x_t.detach() / alpha_bar.sqrt()  # our x
    posterior = (spreads**2 * x[:, None] + sigma**2 * means) / (spreads**2 + sigma**2)
    x0 = (log_parts.detach().softmax(1) * posterior).sum(1)
    expected = -(1 - alpha_bar).sqrt() * score
    torch.testing.assert_close(convert(x0, x, sigma, X0(), Eps()), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(convert(x0, x, sigma, X0(), VE()), -expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("index", [1, 10, 500, 999])
@pytest.mark.parametrize("v", [-1.0, -0.2, 0.0, 0.7, 1.0])
def test_learned_variance_matches_diffusers(index: int, v: float) -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(variance_type="learned_range")
    theirs = scheduler._get_variance(index, predicted_variance=torch.tensor(v))
    sigma, sigma_next = DDPM().table[index], DDPM().table[index - 1]
    ours = learned_log_variance(torch.tensor(v, dtype=torch.float64), sigma, sigma_next)
    # theirs is of x_{t-1} = alpha x; 1 - alpha_bar in float32 has 3 digits at index 0, see tests/test_sigmas.py
    torch.testing.assert_close(ours - (1 + sigma_next**2).log(), theirs.double(), rtol=0, atol=1e-3)


def test_limits_of_the_learned_variance_are_exact_posteriors() -> None:
    sigma, sigma_next = SIGMA[1:], SIGMA[:-1]
    chain = 1 / (sigma**2 - sigma_next**2)  # precision of x at sigma about x at sigma_next
    known = (1 / (1 / sigma_next**2 + chain)).log()  # data that is one point
    normal = (1 / (1 / (1 + sigma_next**2) + chain)).log()  # standard normal data
    ones = torch.ones_like(sigma)
    torch.testing.assert_close(learned_log_variance(-ones, sigma, sigma_next), known)
    torch.testing.assert_close(learned_log_variance(ones, sigma, sigma_next), normal)
    torch.testing.assert_close(learned_log_variance(0 * ones, sigma, sigma_next), (known + normal) / 2)


def test_learned_variance_of_the_last_step_is_finite_and_per_time_step() -> None:
    v = torch.tensor([-1.0, 1.0]).reshape(1, 1, 2, 1).expand(1, 3, 2, 4).clone().requires_grad_()
    sigma, sigma_next = torch.tensor([[0.5, 2.0]]), torch.tensor([[0.0, 1.0]])
    found = learned_log_variance(v, sigma, sigma_next)
    assert found.shape == v.shape
    torch.testing.assert_close(found[0, 0, 0, 0].exp(), torch.tensor(0.1))  # half of 0.25 / 1.25
    torch.testing.assert_close(found[0, 0, 1, 0].exp(), torch.tensor(1.2))  # 3 * 2 / 5
    (slope,) = torch.autograd.grad(found.sum(), v)
    assert slope.isfinite().all()
    assert (slope > 0).all()
    with torch.no_grad():
        extreme = learned_log_variance(v, torch.tensor(1e5), torch.tensor([1e-3]))
    assert extreme.isfinite().all()


def concrete(kind: type) -> set[type]:
    return {
        found for sub in kind.__subclasses__() if sub.__module__ == "mmdiff.precond" for found in (sub, *concrete(sub))
    }


CHANGES: list[tuple[Precond, dict[str, Any]]] = [
    (Eps(), {"table": DDPM("cosine")}),
    (EDM(), {"sigma_data": 1.0}),
    *((precond, {}) for precond in (X0(), V(), VE(), Flow())),
]


def test_every_argument_changes_the_four_numbers_and_no_parametrisation_is_another() -> None:
    assert concrete(Precond) == {type(precond) for precond, _ in CHANGES}
    for precond, changes in CHANGES:
        assert {field.name for field in fields(precond)} == set(changes)  # type: ignore[arg-type]
        for name, value in changes.items():
            other = replace(precond, **{name: value})  # type: ignore[type-var]
            assert not torch.equal(torch.stack(other(SIGMA)), torch.stack(precond(SIGMA))), name
    for (one, _), (two, _) in permutations(CHANGES, 2):
        assert not torch.equal(torch.stack(one(SIGMA)), torch.stack(two(SIGMA)))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"class_path": "mmdiff.precond.V"}, V()),
        ({"class_path": "mmdiff.precond.EDM", "init_args": {"sigma_data": 1.0}}, EDM(1.0)),
        ({"class_path": "mmdiff.precond.X0"}, X0()),
        ({"class_path": "mmdiff.precond.VE"}, VE()),
        ({"class_path": "mmdiff.precond.Flow"}, Flow()),
        ({"class_path": "mmdiff.precond.Eps"}, Eps()),
        (
            {"class_path": "mmdiff.precond.Eps", "init_args": {"table": {"schedule": "cosine", "train_steps": 50}}},
            Eps(DDPM("cosine", 50)),
        ),
    ],
)
def test_builds_from_a_config(config: dict[str, Any], expected: Precond) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--precond", type=Precond)
    assert parser.instantiate(parser.parse_object({"precond": config})).precond == expected
    assert build(config) == expected


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match=r"sigma_data=0 must be positive"):
        EDM(sigma_data=0)
    with pytest.raises(ValueError, match=r"a network that predicts eps cannot be trained there"):
        Eps(DDPM(zero_terminal_snr=True))
