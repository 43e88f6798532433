"""The denoiser: identities of its preconditioning, its loss against each formulation's own, and a Gaussian optimum."""

import pytest
import torch
from torch import Tensor, nn

from mmdiff.conditioning import Cond
from mmdiff.denoiser import Denoiser, expand_like
from mmdiff.precond import EDM, VE, X0, Eps, Flow, Precond, V

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
    Denoiser(network, Flow()).loss(x0, sigma, noise=torch.randn(1, 2, 3))
    assert torch.equal(network.x[:, :, 0], x0[:, :, 0])


def test_an_item_of_which_nothing_counts_has_no_loss_and_a_batch_of_such_is_refused() -> None:
    denoiser, x0, noise = Denoiser(Recorder(), EDM()), torch.randn(2, 1, 3), torch.randn(2, 1, 3)
    sigma = torch.tensor([[0.0, 0, 0], [0, 1, 0]])
    loss = denoiser.loss(x0, sigma, noise=noise)
    torch.testing.assert_close(loss, torch.cat([torch.zeros(1), denoiser.loss(x0[1:], sigma[1:], noise=noise[1:])]))
    for nothing, mask in ((torch.zeros(2, 3), None), (torch.ones(2), torch.zeros(2, 3, dtype=torch.bool))):
        with pytest.raises(ValueError, match="sigma is 0, or the mask False, in all of the batch"):
            denoiser.loss(x0, nothing, noise=noise, mask=mask)


def test_noise_and_condition_reach_the_network() -> None:
    network, cond = Recorder(), Cond(vector=torch.ones(2, 4))
    denoiser = Denoiser(network, EDM())
    x0, sigma = torch.randn(2, 1, 3), torch.ones(2)
    a, b = (denoiser.loss(x0, sigma, noise=torch.randn(2, 1, 3)) for _ in range(2))
    assert not torch.equal(a, b)
    denoiser(x0, sigma, cond)
    assert network.cond is cond


def test_noise_is_never_drawn_behind_the_callers_back() -> None:
    with pytest.raises(TypeError, match="noise"):
        Denoiser(Recorder(), EDM()).loss(torch.randn(2, 1, 3), torch.ones(2))  # type: ignore[call-arg]


class Typed(nn.Module):
    """Records the types it is given; its weight is of the type that Denoiser must cast to."""

    def __init__(self, dtype: torch.dtype, channels: int = 1) -> None:
        super().__init__()
        self.weight, self.channels = nn.Parameter(torch.ones((), dtype=dtype)), channels

    def forward(self, x: Tensor, c_noise: Tensor, cond: Cond | None = None) -> Tensor:
        self.seen = x.dtype, c_noise.dtype, None if cond is None else (cond.tokens.dtype, cond.mask.dtype)
        self.c_noise = c_noise
        return (self.weight * x).repeat(1, self.channels, *(1,) * (x.ndim - 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_backbone_gets_its_own_type_and_all_else_stays_float32(dtype: torch.dtype) -> None:
    network = Typed(dtype)
    denoiser = Denoiser(network, Eps())
    x, sigma = torch.randn(2, 1, 4), torch.tensor([0.3, 7.7])
    cond = Cond(tokens=torch.randn(2, 3, 5), mask=torch.ones(2, 3, dtype=torch.bool))
    assert denoiser(x, sigma, cond).dtype == torch.float32
    assert network.seen == (dtype, torch.float32, (dtype, torch.bool))
    # the index in the table, 0..999, has fractions that half precision would lose
    assert torch.equal(network.c_noise, Eps()(sigma)[3])
    assert denoiser.loss(x, sigma, noise=torch.randn(2, 1, 4)).dtype == torch.float32
    assert denoiser(x.to(torch.float16), sigma).dtype == torch.float32
    assert denoiser(x.double(), sigma.double()).dtype == torch.float64


def test_a_half_precision_backbone_keeps_the_state_exact_where_the_noise_is_low() -> None:
    """D differs from x by c_out F alone: rounding of F at sigma 0.001 is 1e-3 * 2^-8, that of x would be 2^-8."""
    x, sigma = torch.randn(2, 1, 400), torch.tensor(0.001)
    half, full = (Denoiser(Typed(dtype), EDM())(x, sigma) for dtype in (torch.bfloat16, torch.float32))
    torch.testing.assert_close(half, full, rtol=0, atol=5e-5)
    assert not torch.equal(half, full)


def test_channels_beyond_the_datas_are_kept_apart() -> None:
    x0, noise, sigma = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.ones(2)
    plain, double = Denoiser(Typed(torch.float32), V()), Denoiser(Typed(torch.float32, 2), V())
    assert torch.equal(double(x0, sigma), plain(x0, sigma))
    errors = double.errors(x0, sigma, noise=noise)
    assert errors.extra.shape == x0.shape
    assert plain.errors(x0, sigma, noise=noise).extra.shape == (2, 0, 4)
    assert torch.equal(errors.total(errors.error), plain.loss(x0, sigma, noise=noise))
    torch.testing.assert_close(errors.estimate, plain(x0 + noise, sigma))
    narrow = nn.Conv1d(3, 1, 1)
    narrow.forward = lambda x, c_noise, cond: nn.Conv1d.forward(narrow, x)  # type: ignore[method-assign, misc]
    with pytest.raises(ValueError, match="gives 1 channels for an x of 3"):
        Denoiser(narrow, V())(x0, sigma)


@pytest.mark.parametrize("precond", [*PRECONDS, X0(), VE()], ids=repr)
def test_the_target_has_no_cancellation_at_low_noise(precond: Precond) -> None:
    """float32 against float64 at sigma 1e-3: rounding may grow by 1 / sigma at most where x0 is part of the target."""
    x0, noise, sigma = torch.randn(2, 1, 300), torch.randn(2, 1, 300), torch.full((2,), 1e-3)
    one = Denoiser(Zero(), precond).loss(x0, sigma, noise=noise)
    exact = Denoiser(Zero(), precond).loss(x0.double(), sigma.double(), noise=noise.double())
    torch.testing.assert_close(one.double(), exact, rtol=2e-4, atol=0)
    if isinstance(precond, Eps | VE):  # their target is the noise alone
        torch.testing.assert_close(one.double(), exact, rtol=1e-6, atol=0)
