"""The four rows of DESIGN.md's table: targets, identities, limits, and diffusers as a reference."""

import pytest
import torch
from jsonargparse import ArgumentParser

from mmdiff.precond import EDM, SIGMA_FLOOR, Eps, Flow, Precond, V
from mmdiff.sigmas import DDPM

ROWS = [Eps(), V(), EDM(), EDM(1.0), Flow()]
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


@pytest.mark.parametrize("precond", [Eps(), V()])
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


def test_edm_c_noise_stops_at_the_floor() -> None:
    expected = torch.tensor(SIGMA_FLOOR).log() / 4
    assert EDM()(torch.tensor(0.0))[3] == EDM()(torch.tensor(SIGMA_FLOOR))[3] == expected


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


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"class_path": "mmdiff.precond.V"}, V()),
        ({"class_path": "mmdiff.precond.EDM", "init_args": {"sigma_data": 1.0}}, EDM(1.0)),
        ({"class_path": "mmdiff.precond.Flow"}, Flow()),
        ({"class_path": "mmdiff.precond.Eps"}, Eps()),
        (
            {"class_path": "mmdiff.precond.Eps", "init_args": {"table": {"schedule": "cosine", "train_steps": 50}}},
            Eps(DDPM("cosine", 50)),
        ),
    ],
)
def test_builds_from_a_config(config: dict, expected: Precond) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--precond", type=Precond)
    assert parser.instantiate(parser.parse_object({"precond": config})).precond == expected


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match=r"sigma_data=0 must be positive"):
        EDM(sigma_data=0)
