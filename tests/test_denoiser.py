"""The denoiser: identities of its preconditioning, its loss against each formulation's own, and a Gaussian optimum."""

import pytest
import torch
from torch import Tensor, nn

from mmdiff.denoiser import Denoiser, expand_like
from mmdiff.precond import EDM, Eps, Flow, Precond, V

PRECONDS = [Eps(), V(), EDM(), EDM(sigma_data=0.7), Flow()]
STD = 0.7


class Zero(nn.Module):
    def forward(self, x: Tensor, c_noise: Tensor, cond: object = None) -> Tensor:
        return torch.zeros_like(x)


class Recorder(nn.Module):
    """Any network: a fixed function of its input, which it keeps."""

    def forward(self, x: Tensor, c_noise: Tensor, cond: object = None) -> Tensor:
        self.x, self.c_noise, self.cond = x, c_noise, cond
        return torch.sin(3 * x) + 0.1


class Gaussian(nn.Module):
    """The network of which a precond makes the exact denoiser of data ~ N(0, STD^2), plus `error` of its own."""

    def __init__(self, precond: Precond, sigma: Tensor) -> None:
        super().__init__()
        self.precond, self.sigma = precond, sigma
        self.error = nn.Parameter(torch.zeros(()))

    def forward(self, scaled: Tensor, c_noise: Tensor, cond: object = None) -> Tensor:
        c_skip, c_out, c_in, _ = (expand_like(c, scaled) for c in self.precond(self.sigma))
        x = scaled / c_in
        sigma = expand_like(self.sigma, x)
        return (x * STD**2 / (STD**2 + sigma**2) - c_skip * x) / c_out + self.error


@pytest.mark.parametrize("precond", PRECONDS, ids=repr)
@pytest.mark.parametrize("shape", [(), (3,), (3, 4)])
def test_zero_network_leaves_the_skip(precond: Precond, shape: tuple[int, ...]) -> None:
    x, sigma = torch.randn(3, 2, 4, 5), torch.rand(shape) + 0.1
    expected = expand_like(precond(sigma)[0], x) * x
    assert torch.equal(Denoiser(Zero(), precond)(x, sigma), expected)


def test_zero_network_of_edm_is_the_linear_estimate() -> None:
    x, sigma = torch.randn(3, 2, 4), torch.tensor([0.1, 1.0, 10.0])
    expected = x * (0.25 / (sigma**2 + 0.25))[:, None, None]
    torch.testing.assert_close(Denoiser(Zero(), EDM(0.5))(x, sigma), expected)


@pytest.mark.parametrize("precond", PRECONDS, ids=repr)
def test_sigma_of_any_shape_means_the_same(precond: Precond) -> None:
    denoiser, x, sigma = Denoiser(Recorder(), precond), torch.randn(3, 2, 4, 5), torch.tensor(0.8)
    one = denoiser(x, sigma)
    assert denoiser.backbone.c_noise.shape == (3,)
    torch.testing.assert_close(denoiser(x, sigma.expand(3)), one)
    torch.testing.assert_close(denoiser(x, sigma.expand(3, 4)), one)
    assert denoiser.backbone.c_noise.shape == (3, 4)


@pytest.mark.parametrize("precond", PRECONDS, ids=repr)
def test_known_steps_pass_through(precond: Precond) -> None:
    sigma = torch.tensor([[0.0, 0.5, 2.0]])
    x = torch.randn(1, 2, 3, 4)
    out = Denoiser(Recorder(), precond)(x, sigma)
    torch.testing.assert_close(out[:, :, 0], x[:, :, 0], rtol=0, atol=1e-6)
    assert not torch.allclose(out[:, :, 1:], x[:, :, 1:])


def eps_target(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    return noise


def v_target(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    angle = sigma.atan()
    return angle.cos() * noise - angle.sin() * x0


def velocity_target(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    return noise - x0


@pytest.mark.parametrize(
    ("precond", "target"), [(Eps(), eps_target), (V(), v_target), (Flow(), velocity_target)], ids=["eps", "v", "flow"]
)
@pytest.mark.parametrize("per_step", [False, True])
def test_loss_is_the_mean_square_error_of_the_formulations_own_target(
    precond: Precond, target: object, per_step: bool
) -> None:
    x0, noise = torch.randn(2, 3, 2, 4, 5)
    sigma = torch.rand(3, 4) * 3 + 0.1 if per_step else torch.tensor([0.1, 1.0, 9.0])
    network = Recorder()
    loss = Denoiser(network, precond).loss(x0, sigma, noise=noise)
    predicted = network(network.x, network.c_noise)
    expected = (predicted - target(x0, noise, expand_like(sigma, x0))) ** 2  # type: ignore[operator]
    torch.testing.assert_close(loss, expected.flatten(1).mean(1), rtol=1e-4, atol=1e-5)


def test_edm_loss_is_the_weighted_error_of_the_estimate() -> None:
    """Karras et al. 2022, eq. 2 with table 1's weight (sigma^2 + d^2) / (sigma d)^2."""
    x0, noise, sigma, d = torch.randn(3, 2, 4), torch.randn(3, 2, 4), torch.tensor([0.2, 1.0, 9.0]), 0.5
    denoiser = Denoiser(Recorder(), EDM(d))
    estimate = denoiser(x0 + sigma[:, None, None] * noise, sigma)
    weight = (sigma**2 + d**2) / (sigma * d) ** 2
    expected = weight * (estimate - x0).square().flatten(1).mean(1)
    torch.testing.assert_close(denoiser.loss(x0, sigma, noise=noise), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precond", PRECONDS, ids=repr)
def test_the_exact_gaussian_denoiser_has_the_least_loss(precond: Precond) -> None:
    x0, noise = STD * torch.randn(64, 1, 400), torch.randn(64, 1, 400)
    sigma = torch.linspace(0.2, 5, 64)
    network = Gaussian(precond, sigma)
    denoiser = Denoiser(network, precond)
    x = x0 + sigma[:, None, None] * noise
    exact = x * (STD**2 / (STD**2 + sigma**2))[:, None, None]
    torch.testing.assert_close(denoiser(x, sigma), exact, rtol=1e-4, atol=1e-4)
    loss = denoiser.loss(x0, sigma, noise=noise).mean()
    (slope,) = torch.autograd.grad(loss, network.error)
    assert abs(float(slope)) < 0.05
    for error in (-0.3, 0.3):
        network.error.data.fill_(error)
        assert float(denoiser.loss(x0, sigma, noise=noise).mean()) > float(loss) + 0.05
    # the least loss itself: var(x0 | x) / c_out^2
    c_out = precond(sigma)[1]
    least = (STD**2 * sigma**2 / (STD**2 + sigma**2) / c_out**2).mean()
    torch.testing.assert_close(loss, least.to(loss), rtol=0.03, atol=0)


@pytest.mark.parametrize("precond", PRECONDS, ids=repr)
def test_given_steps_count_in_no_loss(precond: Precond) -> None:
    x0, noise, network = torch.randn(2, 2, 6, 3), torch.randn(2, 2, 6, 3), Recorder()
    denoiser = Denoiser(network, precond)
    sigma = torch.full((2, 6), 0.9)
    sigma[:, :2] = 0
    loss = denoiser.loss(x0, sigma, noise=noise)
    # Recorder works on each step alone, so the loss of the free steps is the loss of a clip of these alone
    alone = denoiser.loss(x0[:, :, 2:], sigma[:, 2:], noise=noise[:, :, 2:])
    torch.testing.assert_close(loss, alone)
    assert torch.isfinite(loss).all()
    other = torch.cat([torch.randn(2, 2, 2, 3), noise[:, :, 2:]], dim=2)
    assert torch.equal(denoiser.loss(x0, sigma, noise=other), loss)


def test_a_given_step_reaches_the_network_clean() -> None:
    network = Recorder()
    x0, sigma = torch.randn(1, 2, 3), torch.tensor([[0.0, 1.0, 2.0]])
    Denoiser(network, Flow()).loss(x0, sigma)
    assert torch.equal(network.x[:, :, 0], x0[:, :, 0])


def test_nothing_to_learn_is_refused() -> None:
    with pytest.raises(ValueError, match="sigma is 0 at every time step of an item"):
        Denoiser(Recorder(), EDM()).loss(torch.randn(2, 1, 3), torch.tensor([[0.0, 0, 0], [0, 1, 0]]))


def test_noise_and_condition_reach_the_network() -> None:
    network, cond = Recorder(), object()
    denoiser = Denoiser(network, EDM())
    x0, sigma = torch.randn(2, 1, 3), torch.ones(2)
    a, b = denoiser.loss(x0, sigma), denoiser.loss(x0, sigma)
    assert not torch.equal(a, b)
    denoiser(x0, sigma, cond)  # type: ignore[arg-type]
    assert network.cond is cond
