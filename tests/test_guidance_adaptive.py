"""APG, CFG++, CFG-Zero* and classifier guidance against the papers' algorithms as printed, whole runs of them.

All in float64, where two ways to the same number differ by 1e-12 or less, unless a tolerance says otherwise.
"""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmdiff.guidance import (
    APG,
    Cfg,
    CfgPP,
    CfgZero,
    Classifier,
    Compose,
    Guidance,
    Interval,
    OverTime,
    Rescale,
    Threshold,
)
from mmdiff.sampling import Ancestral, Denoise, DPMpp2M, Heun, start
from mmdiff.sigmas import DDPM, Flow, Karras

X = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
GRID = Karras(0.02, 20.0)(8).double()
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def gaussian(mean: float, std: float) -> Denoise:
    """The exact denoiser of data ~ N(mean, std^2)."""
    return lambda x, sigma: (mean * sigma**2 + x * std**2) / (sigma**2 + std**2)


def bent(x: Tensor, sigma: Tensor) -> Tensor:
    """Some estimate that is not in line with the others, and as smooth as one: a run does not magnify rounding."""
    return torch.sin(2 * x / (1 + sigma)) + x / (1 + sigma)


def never(x: Tensor, sigma: Tensor) -> Tensor:
    raise AssertionError("called in vain")


POS, NEG = bent, gaussian(-0.4, 0.5)


def sample(denoise: Denoise, x: Tensor = X, sigmas: Tensor = GRID) -> Tensor:
    return Ancestral()(denoise, start(x, sigmas[0]), sigmas, torch.zeros_like)


# Adaptive projected guidance


@pytest.mark.parametrize(
    ("scale", "eta", "r", "momentum"),
    [(4.0, 0.0, 2.5, -0.5), (7.0, 0.3, 15.0, 0.0), (2.0, 1.0, 0.7, 0.6), (3.0, -1.0, math.inf, -0.75)],
)
def test_apg_is_algorithm_1(scale: float, eta: float, r: float, momentum: float) -> None:
    """Call by call over a falling sigma, with the difference's running sum, in numpy."""
    rule = APG(scale, eta, r / math.sqrt(X[0].numel()), momentum)(POS, NEG, GRID)
    running = np.zeros(X.shape)
    for sigma in GRID[:-1]:
        pos, neg = POS(X, sigma).numpy(), NEG(X, sigma).numpy()
        running = (pos - neg) + momentum * running
        expected = []
        for diff, cond in zip(running, pos, strict=True):
            diff = diff * min(1.0, r / np.linalg.norm(diff))
            unit = cond / np.linalg.norm(cond)
            parallel = (diff * unit).sum() * unit
            expected.append(cond + (scale - 1) * (diff - parallel + eta * parallel))
        torch.testing.assert_close(rule(X, sigma), torch.from_numpy(np.stack(expected)), **EXACT)


def test_apg_is_that_of_diffusers() -> None:
    from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance

    buffer, r = MomentumBuffer(-0.5), 2.5
    rule = APG(5.0, 0.2, r / math.sqrt(X[0].numel()), -0.5)(POS, NEG, GRID)
    for sigma in GRID[:-1]:  # their "original formulation" starts at the conditional estimate, as the paper's does
        theirs = normalized_guidance(POS(X, sigma), NEG(X, sigma), 4.0, buffer, 0.2, r, use_original_formulation=True)
        torch.testing.assert_close(rule(X, sigma), theirs, **EXACT)


def test_apg_that_keeps_all_is_cfg_and_scale_1_is_conditional() -> None:
    keep = APG(4.0, eta=1.0, threshold=math.inf, momentum=0.0)(POS, NEG, GRID)
    torch.testing.assert_close(keep(X, GRID[2]), Cfg(4.0)(POS, NEG, GRID)(X, GRID[2]), **EXACT)
    assert torch.equal(APG(1.0)(POS, never, GRID)(X, GRID[2]), POS(X, GRID[2]))


def test_momentum_lasts_a_run_and_no_longer() -> None:
    denoise = APG(4.0, momentum=-0.7)(POS, NEG, GRID)
    first = sample(denoise)
    assert torch.equal(sample(denoise), first)  # the same closure, run again, begins anew
    assert torch.equal(sample(APG(4.0, momentum=-0.7)(POS, NEG, GRID)), first)
    other = sample(denoise, X[:1])  # and with another batch
    torch.testing.assert_close(other, first[:1], **EXACT)
    assert (sample(APG(4.0, momentum=0.0)(POS, NEG, GRID)) - first).abs().max() > 1e-3


@pytest.mark.parametrize("rule", [APG(4.0), CfgZero(4.0), Rescale(4.0)], ids=lambda rule: type(rule).__name__)
def test_an_item_does_not_depend_on_its_neighbours(rule: APG | CfgZero | Rescale) -> None:
    both = sample(rule(POS, NEG, GRID))
    for i in range(2):
        torch.testing.assert_close(sample(rule(POS, NEG, GRID), X[i : i + 1]), both[i : i + 1], **EXACT)


@pytest.mark.parametrize("rule", [APG(4.0), CfgPP(), CfgZero(4.0, 0)], ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("shape", [(2,), (2, 5)])
def test_one_level_for_each_item_or_time_step_is_the_level_of_all(
    rule: APG | CfgPP | CfgZero, shape: tuple[int, ...]
) -> None:
    def broad(mean: float) -> Denoise:
        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            level = sigma.reshape(2, 1, -1, 1) if sigma.ndim else sigma
            return mean * torch.sin(x) / (1 + level)

        return denoise

    ends = broad(1.0), broad(-0.5)
    torch.testing.assert_close(rule(*ends, GRID)(X, GRID[2].expand(shape)), rule(*ends, GRID)(X, GRID[2]), **EXACT)


# CFG++


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0, 1.7])
@pytest.mark.parametrize("grid", [DDPM(), Karras(), Flow(3.0)], ids=lambda grid: type(grid).__name__)
def test_cfg_pp_renoises_with_the_unconditional_noise(scale: float, grid: DDPM | Karras | Flow) -> None:
    """Algorithm 2 as printed, in x_t = sqrt(abar) x and eps, against Ancestral(0) over the guided denoiser."""
    sigmas = grid(10).double()
    abar = 1 / (1 + sigmas**2)
    x_t = start(X, sigmas[0]) * abar[0].sqrt()
    for i in range(10):
        eps_c, eps_u = ((x_t / abar[i].sqrt() - d(x_t / abar[i].sqrt(), sigmas[i])) / sigmas[i] for d in (POS, NEG))
        eps = eps_u + scale * (eps_c - eps_u)
        x0 = (x_t - (1 - abar[i]).sqrt() * eps) / abar[i].sqrt()
        x_t = abar[i + 1].sqrt() * x0 + (1 - abar[i + 1]).sqrt() * eps_u
    ours = sample(CfgPP(scale)(POS, NEG, sigmas), X, sigmas)
    torch.testing.assert_close(ours, x_t, rtol=1e-11, atol=1e-11)  # abar near 1 has lost digits of sigma


def test_cfg_pp_is_not_cfg_and_wants_the_levels_of_its_grid() -> None:
    plain, renoised = (sample(rule(POS, NEG, GRID)) for rule in (Cfg(0.6), CfgPP(0.6)))
    assert (plain - renoised).abs().max() > 0.1
    with pytest.raises(ValueError, match=r"CfgPP at sigma=\[1.0\], which is no level of the grid"):
        CfgPP()(POS, NEG, GRID)(X, torch.tensor(1.0))
    single = Karras()(8)
    for sampler in (DPMpp2M(), Heun()):  # they call at levels of the grid too, in float32 as it is
        found = sampler(CfgPP()(POS, NEG, single), start(X.float(), single[0]), single, torch.zeros_like)
        assert found.isfinite().all()


# CFG-Zero*


@pytest.mark.parametrize(("scale", "zero_steps"), [(1.0, 0), (1.0, 2), (4.0, 0), (4.0, 1), (2.5, 3)])
def test_cfg_zero_is_the_flow_algorithm(scale: float, zero_steps: int) -> None:
    """Euler over velocities of z = (1 - t) x0 + t eps, v = eps - x0, with v = 0 in the first steps."""
    sigmas = Flow()(10).double()
    times = sigmas / (1 + sigmas)
    z = start(X, sigmas[0]) * (1 - times[0])
    for step, (t, t_next) in enumerate(pairwise(times)):
        v_c, v_u = ((z - d(z / (1 - t), t / (1 - t))) / t for d in (POS, NEG))
        rows = [float((c * u).sum() / (u * u).sum()) for c, u in zip(v_c, v_u, strict=True)]
        s = torch.tensor(rows, dtype=z.dtype).reshape(-1, 1, 1, 1)
        v = 0 * z if step < zero_steps else (1 - scale) * s * v_u + scale * v_c
        z = z + (t_next - t) * v
    found = sample(CfgZero(scale, zero_steps)(POS, NEG, sigmas), X, sigmas)
    torch.testing.assert_close(found, z, rtol=1e-11, atol=1e-11)  # the first level is 999: x has 1e3 times z's rounding


def test_cfg_zero_scales_as_diffusers() -> None:
    from diffusers.guiders.classifier_free_zero_star_guidance import cfg_zero_star_scale

    sigma = GRID[3]
    v_c, v_u = (((X - d(X, sigma)) / sigma - d(X, sigma)) for d in (POS, NEG))
    s = cfg_zero_star_scale(v_c.flatten(1), v_u.flatten(1)).reshape(-1, 1, 1, 1)
    v = s * v_u + 4.0 * (v_c - s * v_u)
    x0 = (X - sigma * v) / (1 + sigma)
    found = CfgZero(4.0, 0)(POS, NEG, GRID)(X, sigma)
    torch.testing.assert_close(found, x0, rtol=1e-5, atol=1e-5)  # theirs is computed in float32


def test_the_steps_that_stand_still_call_no_network() -> None:
    rule = CfgZero(4.0, 2)(never, never, GRID)
    for sigma in GRID[:2]:
        torch.testing.assert_close(rule(X, sigma), X / (1 + sigma), **EXACT)
    with pytest.raises(AssertionError, match="called in vain"):
        rule(X, GRID[2])


# Classifier guidance

STD, MEANS = 0.8, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)


class Exact(nn.Module):
    """log p(class | x, sigma), exact for two Gaussian classes of items (B, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.eval()

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return -((x[:, None] - MEANS) ** 2).sum(dim=2) / (2 * (STD**2 + sigma[:, None] ** 2))


def of_class(k: int) -> Denoise:
    return lambda x, sigma: (MEANS[k] * sigma**2 + x * STD**2) / (sigma**2 + STD**2)


def of_all(x: Tensor, sigma: Tensor) -> Tensor:
    share = Exact()(x, sigma.expand(len(x))).softmax(dim=1)
    return share[:, :1] * of_class(0)(x, sigma) + share[:, 1:] * of_class(1)(x, sigma)


@pytest.mark.parametrize("scale", [1.0, 3.5])
@pytest.mark.parametrize("target", [0, 1, [0, 1, 1]])
def test_the_exact_classifier_makes_the_conditional_of_the_unconditional(scale: float, target: int | list[int]) -> None:
    """Bayes: grad log p(x | y) = grad log p(x) + grad log p(y | x); at other scales it is cfg of the two."""
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    wanted = [target] * 3 if isinstance(target, int) else target
    for sigma in GRID[:-1]:
        conditional = torch.stack([of_class(k)(x, sigma)[i] for i, k in enumerate(wanted)])
        expected = torch.lerp(of_all(x, sigma), conditional, scale)
        found = Classifier(Exact(), target, scale)(of_all, never, GRID)(x, sigma)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)  # at sigma 20, 400 times a small gradient


def test_classifier_guidance_is_algorithm_2_in_x_t() -> None:
    """eps - sqrt(1 - abar) * scale * grad of x_t, then x0 from it."""
    x, sigma, scale = X[:, 0, 0, :2], GRID[4], 2.0
    abar = 1 / (1 + sigma**2)
    x_t = (x * abar.sqrt()).requires_grad_()
    log_p = Exact()(x_t / abar.sqrt(), sigma.expand(2)).log_softmax(dim=1)[:, 1]
    (slope,) = torch.autograd.grad(log_p.sum(), x_t)
    x_t = x_t.detach()
    eps = (x - NEG(x, sigma)) / sigma - (1 - abar).sqrt() * scale * slope
    expected = (x_t - (1 - abar).sqrt() * eps) / abar.sqrt()
    found = Classifier(Exact(), 1, scale)(NEG, never, GRID)(x, sigma)
    torch.testing.assert_close(found, expected, **EXACT)


def test_a_classifier_has_its_gradient_under_inference_mode() -> None:
    rule = Interval(Classifier(Exact(), 0, 2.0), 0.0, math.inf)(of_all, never, GRID)
    x = X[:, 0, 0, :2]
    expected = rule(x, GRID[2])
    with torch.inference_mode():
        torch.testing.assert_close(rule(x.clone(), GRID[2].clone()), expected, **EXACT)


# What guidance does to a sample


@pytest.mark.parametrize(
    "rule",
    [
        Cfg(3.0), OverTime(3.0, 2.0), Rescale(3.0, 0.2), Interval(3.0, 0.1, 5.0), Threshold(3.0, 1.0, 20.0),
        APG(3.0, threshold=math.inf), CfgPP(1.5), CfgZero(3.0), Compose({"a": 2.0}, scale=1.0),
    ],
    ids=lambda rule: type(rule).__name__,
)  # fmt: skip
def test_guided_samples_move_towards_the_class(rule: Guidance) -> None:
    pos, neg = of_class(0), lambda x, sigma: of_all(x[:, 0], sigma)[:, None]
    sigmas = Karras(0.02, 40.0)(30).double()
    noise = torch.randn(2000, 1, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def sample(denoise: Denoise) -> Tensor:
        return Ancestral()(denoise, start(noise, sigmas[0]), sigmas, torch.zeros_like)[:, 0, 1]

    plain = sample(pos)
    moved = sample(rule(pos, neg, sigmas, lambda changes, model=None: pos))
    assert plain.mean().item() == pytest.approx(1.0, abs=0.06)  # the class's own mean
    assert (plain > 0).double().mean() < 0.93  # of the class itself 89.4 % lie on its side
    assert (moved > 0).double().mean() > 0.95
    assert moved.mean() > 1.15
