"""Guidance: every rule against its paper's formula written out anew, and the ends at which it is no guidance.

Estimates are formulas in float64, where two ways to the same number differ by 1e-12 or less.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmdiff.guidance import (
    APG,
    Autoguidance,
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
    as_guidance,
    cfg,
    compose,
)
from mmdiff.io import build
from mmdiff.model import DiffusionModel
from mmdiff.precond import EDM
from mmdiff.sampling import Ancestral, Denoise, DPMpp2M, Heun, start
from mmdiff.sigmas import Karras

X = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
GRID = Karras(0.02, 20.0)(8).double()
SIGMA = GRID[3]
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def gaussian(mean: float, std: float) -> Denoise:
    """The exact denoiser of data ~ N(mean, std^2)."""
    return lambda x, sigma: (mean * sigma**2 + x * std**2) / (sigma**2 + std**2)


def bent(x: Tensor, sigma: Tensor) -> Tensor:
    """Some estimate that is not in line with the others."""
    return torch.sin(2 * x) + x / (1 + sigma)


def never(x: Tensor, sigma: Tensor) -> Tensor:
    raise AssertionError("called in vain")


POS, NEG = bent, gaussian(-0.4, 0.5)


def guided(rule: Guidance, pos: Denoise = POS, neg: Denoise = NEG, x: Tensor = X, sigma: Tensor = SIGMA) -> Tensor:
    return rule(pos, neg, GRID)(x, sigma)


# cfg, and several conditions


@pytest.mark.parametrize("scale", [1, 1.0])
def test_scale_1_is_the_positive_alone(scale: float) -> None:
    assert torch.equal(cfg(POS, never, scale)(X, SIGMA), POS(X, SIGMA))


@pytest.mark.parametrize("scale", [0, 0.0])
def test_scale_0_is_the_negative_alone(scale: float) -> None:
    assert torch.equal(cfg(never, NEG, scale)(X, SIGMA), NEG(X, SIGMA))


@pytest.mark.parametrize("scale", [-1.0, 0.5, 0.999, 1.001, 2.0, 7.5])
def test_guided_is_negative_plus_scaled_difference(scale: float) -> None:
    pos, neg = POS(X, SIGMA), NEG(X, SIGMA)
    torch.testing.assert_close(cfg(POS, NEG, scale)(X, SIGMA), neg + scale * (pos - neg))


def test_same_prompts_guide_nowhere() -> None:
    torch.testing.assert_close(cfg(POS, POS, 5.0)(X, SIGMA), POS(X, SIGMA))


def test_swapping_the_prompts_mirrors_the_scale() -> None:
    torch.testing.assert_close(cfg(POS, NEG, 3.0)(X, SIGMA), cfg(NEG, POS, -2.0)(X, SIGMA))


def test_guidance_nests() -> None:
    once = cfg(cfg(POS, NEG, 2.0), NEG, 3.0)(X, SIGMA)
    torch.testing.assert_close(once, cfg(POS, NEG, 6.0)(X, SIGMA))


@pytest.mark.parametrize("sampler", [Heun(), DPMpp2M()], ids=repr)
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
def test_guided_gaussians_land_on_the_extrapolated_mean(sampler: Heun | DPMpp2M, scale: float) -> None:
    """Two Gaussians of one width: the guided denoiser is that of the Gaussian at neg + scale * (pos - neg)."""
    sigmas = Karras()(60)
    noise = torch.randn(1, 20_000, generator=torch.Generator().manual_seed(1))
    ends = gaussian(1.0, 0.5), gaussian(-0.4, 0.5)
    sample = sampler(cfg(*ends, scale), start(noise, sigmas[0]), sigmas, torch.zeros_like)
    assert sample.mean().item() == pytest.approx(-0.4 + scale * 1.4, abs=0.03)  # 4 standard errors and sigma_max = 80
    assert sample.std().item() == pytest.approx(0.5, abs=0.015)


@pytest.mark.parametrize("shape", [(), (2,), (2, 5)])
def test_sigma_of_every_shape_reaches_both(shape: tuple[int, ...]) -> None:
    seen = []

    def spy(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(sigma.shape)
        return x

    cfg(spy, spy, 2.0)(X, torch.ones(shape))
    assert seen == [shape, shape]


def test_gradients_reach_both() -> None:
    pos, neg = torch.tensor(1.0, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    cfg(lambda x, _: pos * x, lambda x, _: neg * x, 3.0)(X, SIGMA).square().sum().backward()
    assert pos.grad != 0
    assert neg.grad != 0


def test_one_condition_composed_is_cfg_and_three_are_their_sum() -> None:
    torch.testing.assert_close(compose([POS], NEG, [3.0])(X, SIGMA), cfg(POS, NEG, 3.0)(X, SIGMA), **EXACT)
    third = gaussian(2.0, 0.3)
    d, p, t = NEG(X, SIGMA), POS(X, SIGMA), third(X, SIGMA)
    composed = compose([POS, third, POS], NEG, [2.0, -0.5, 1.0])(X, SIGMA)
    torch.testing.assert_close(composed, d + 3 * (p - d) - 0.5 * (t - d), **EXACT)
    rule = Compose({"other": -0.5, "pos": 1.0}, scale=2.0)
    bound = {"other": third, "pos": POS}
    by_name = rule(POS, NEG, GRID, lambda changes, model=None: bound[changes["caption"]])
    torch.testing.assert_close(by_name(X, SIGMA), composed, **EXACT)
    with pytest.raises(ValueError, match="Compose needs `bind`"):
        rule(POS, NEG, GRID)
    with pytest.raises(ValueError, match="2 conditions need as many scales, at least one, not 1"):
        compose([POS, NEG], NEG, [1.0])


# Over time


@pytest.mark.parametrize("frames", [1, 2, 5, 8])
@pytest.mark.parametrize("shape", ["linear", "triangle"])
def test_scale_over_time_is_that_of_the_video_suites(shape: str, frames: int) -> None:
    """linear: diffusers' Stable Video Diffusion takes torch.linspace(min, max, frames). triangle: SV3D's wave."""
    ones = torch.ones(2, 3, frames, 4, dtype=torch.float64)
    scale = guided(OverTime(1.0, 2.5, shape), lambda x, _: x, lambda x, _: 0 * x, ones)[0, 0, :, 0]  # type: ignore[arg-type]
    if shape == "linear":
        expected = torch.linspace(1.0, 2.5, frames, dtype=torch.float64)
    else:
        place = torch.linspace(0, 1, frames, dtype=torch.float64)
        expected = 1.0 + 1.5 * 2 * (place - (place + 0.5).floor()).abs()
    torch.testing.assert_close(scale, expected, **EXACT)


def test_equal_ends_over_time_are_cfg() -> None:
    torch.testing.assert_close(guided(OverTime(3.0, 3.0)), guided(Cfg(3.0)), **EXACT)
    torch.testing.assert_close(guided(OverTime(0.0, 0.0)), NEG(X, SIGMA), **EXACT)


# Rescale


@pytest.mark.parametrize("phi", [0.3, 0.7, 1.0])
def test_rescale_is_the_papers_and_that_of_diffusers(phi: float) -> None:
    from diffusers.guiders.guider_utils import rescale_noise_cfg

    x_cfg, x_pos = guided(Cfg(6.0)), POS(X, SIGMA)
    rows = [c * (p.numpy().std() / c.numpy().std()) for c, p in zip(x_cfg, x_pos, strict=True)]
    expected = phi * torch.stack(rows) + (1 - phi) * x_cfg
    rescaled = guided(Rescale(6.0, phi))
    torch.testing.assert_close(rescaled, expected, **EXACT)
    torch.testing.assert_close(rescaled, rescale_noise_cfg(x_cfg, x_pos, phi), **EXACT)


def test_rescale_0_is_none_and_silence_stays_silent() -> None:
    assert torch.equal(guided(Rescale(6.0, 0.0)), guided(Cfg(6.0)))
    still = guided(Rescale(6.0), lambda x, _: 0 * x, lambda x, _: 0 * x)
    assert torch.equal(still, torch.zeros_like(X))


def test_rescale_calls_each_network_once() -> None:
    seen: list[str] = []

    def spy(name: str) -> Denoise:
        return lambda x, sigma: seen.append(name) or x.sin()  # type: ignore[func-returns-value]

    guided(Rescale(Interval(APG(4.0, momentum=0.0))), spy("pos"), spy("neg"))
    assert sorted(seen) == ["neg", "pos"]
    seen.clear()
    guided(Rescale(0.0), spy("pos"), spy("neg"))  # the rule inside never calls `pos`
    assert sorted(seen) == ["neg", "pos"]


# Interval


def test_interval_over_all_is_plain_and_outside_is_conditional_at_half_the_cost() -> None:
    assert torch.equal(guided(Interval(4.0, 0.0, math.inf)), guided(Cfg(4.0)))
    narrow = Interval(4.0, float(GRID[4]), float(GRID[3]))  # low is outside, high inside
    for level in GRID[:-1]:
        neg = NEG if level == GRID[3] else never
        scale = 4.0 if level == GRID[3] else 1.0
        torch.testing.assert_close(guided(narrow, neg=neg, sigma=level), cfg(POS, NEG, scale)(X, level), **EXACT)


@pytest.mark.parametrize("axes", [1, 2])
def test_interval_counts_each_level_of_a_batch(axes: int) -> None:
    sigma = torch.full((2, 5)[:axes], 9.0, dtype=torch.float64)
    sigma[0] = 1.0
    limited = Interval(4.0, 0.5, 2.0)(lambda x, _: x, lambda x, _: 0 * x, GRID)(X, sigma)
    torch.testing.assert_close(limited, torch.stack([4 * X[0], X[1]]), **EXACT)
    sigma[1] = 0.0  # a known part, for which no network is called once more
    assert torch.equal(Interval(0.0, 0.5, 2.0)(never, lambda x, _: 3 * x, GRID)(X, sigma), 3 * X)


def test_an_interval_that_holds_no_level_is_refused() -> None:
    with pytest.raises(ValueError, match=r"low=30, high=40: no level of the grid \(20 down to 0.02\) lies between"):
        Interval(4.0, 30, 40)(POS, NEG, GRID)


# Dynamic thresholding


@pytest.mark.parametrize("percentile", [0.5, 0.9, 0.995, 1.0])
def test_threshold_is_imagens(percentile: float) -> None:
    x0 = guided(Cfg(6.0))
    expected = []
    for item in x0.numpy():
        s = max(np.percentile(np.abs(item), 100 * percentile), 1.0)
        expected.append(torch.from_numpy(np.clip(item, -s, s) / s))
    torch.testing.assert_close(guided(Threshold(6.0, percentile)), torch.stack(expected), **EXACT)


def test_threshold_leaves_what_is_inside_and_its_limit_is_the_datas_end() -> None:
    small = guided(Threshold(1.0), lambda x, _: 0.9 * x / X.abs().max())
    torch.testing.assert_close(small, 0.9 * X / X.abs().max(), **EXACT)
    assert guided(Threshold(6.0, 0.9, 0.1)).abs().max() <= 0.1


# Messages, liveness, YAML


class Slope(nn.Module):
    """Logits of two classes, linear in x."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = gain
        self.eval()

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        logit = self.gain * x.flatten(1).mean(dim=1) / (1 + sigma)
        return torch.stack([-logit, logit], dim=1)


WEAK = lambda: DiffusionModel(nn.Identity(), EDM()).eval()
CHANGES: list[tuple[type, dict[str, object], dict[str, list[object]]]] = [
    (Cfg, {}, {"scale": [2.0]}),
    (OverTime, {}, {"first": [0.5], "last": [2.0], "shape": ["triangle"]}),
    (Rescale, {}, {"guidance": [4.0, APG()], "phi": [0.2]}),
    (Interval, {}, {"guidance": [4.0, APG()], "low": [3.0], "high": [1.0]}),
    (Threshold, {}, {"guidance": [4.0, APG()], "percentile": [0.9], "limit": [0.5]}),
    (APG, {}, {"scale": [3.0], "eta": [0.5], "threshold": [0.1], "momentum": [0.5]}),
    (CfgPP, {}, {"scale": [0.9]}),
    (CfgZero, {}, {"scale": [3.0], "zero_steps": [0, 5]}),
    (Classifier, {"classifier": Slope(), "target": 1},
     {"classifier": [Slope(2.0)], "target": [0, [0, 1]], "scale": [2.0], "guidance": [2.0]}),
    (Compose, {"others": {"a": 1.0}}, {"others": [{"a": 2.0}, {"b": 1.0}], "scale": [2.0], "key": ["label"]}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "given", "changes"), CHANGES, ids=lambda v: getattr(v, "__name__", ""))
def test_every_argument_is_live(
    kind: type[Guidance], given: dict[str, object], changes: dict[str, list[object]]
) -> None:
    """A whole run of 8 steps changes with each argument."""
    bound = {"a": gaussian(2.0, 0.3), "b": gaussian(-2.0, 0.3)}

    def bind(changes: dict[str, str], model: nn.Module | None = None) -> Denoise:
        return bound[changes["caption"]] if "caption" in changes else gaussian(1.5, 0.4)

    def run(**arguments: object) -> Tensor:
        denoise = kind(**arguments)(POS, NEG, GRID, bind)
        return Ancestral()(denoise, start(X, GRID[0]), GRID, torch.zeros_like)

    plain = run(**given)
    assert plain.isfinite().all()
    names = {name for name in kind.__dataclass_fields__ if kind.__dataclass_fields__[name].init}  # type: ignore[attr-defined]
    assert names == set(changes)
    for name, values in changes.items():
        for value in values:
            assert (run(**{**given, name: value}) - plain).abs().max() > 1e-3, (name, value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cfg(POS, NEG, math.nan), "scale=nan must be finite"),
        (lambda: Cfg(math.inf), "scale=inf must be finite"),
        (lambda: as_guidance("3"), "guidance='3' must be a number or a Guidance"),
        (lambda: OverTime(shape="wave"), "shape='wave' must be linear or triangle"),
        (lambda: OverTime(first=math.nan), "first=nan must be finite"),
        (lambda: Compose({}), "others={} names no further prompt"),
        (lambda: Compose({"a": math.nan}), "a=nan must be finite"),
        (lambda: Rescale(phi=1.1), "phi=1.1 must lie between 0"),
        (lambda: Rescale("big"), "guidance='big' must be a number"),
        (lambda: Interval(low=2, high=1), "low=2, high=1 must satisfy"),
        (lambda: Threshold(percentile=0), "percentile=0 must lie in 0..1"),
        (lambda: Threshold(limit=0), "limit=0 must be positive"),
        (lambda: APG(0.5), "scale=0.5 must be at least 1"),
        (lambda: APG(eta=math.nan), "eta=nan must be finite"),
        (lambda: APG(threshold=0), "threshold=0 must be positive"),
        (lambda: APG(momentum=1), "momentum=1 must lie between -1 and 1"),
        (lambda: CfgPP(-0.1), "scale=-0.1 must be finite and not negative"),
        (lambda: CfgZero(0.0), "scale=0.0 must be at least 1"),
        (lambda: CfgZero(zero_steps=-1), "zero_steps=-1 must not be negative"),
        (lambda: CfgZero(zero_steps=8)(POS, NEG, GRID), "zero_steps=8 leaves nothing of a grid of 8 steps"),
        (lambda: Classifier(Slope(), 1, scale=0), "scale=0 must be finite and not 0"),
        (lambda: guided(Classifier(Slope(), 2)), "target=2: the classifier knows the classes 0..1"),
        (lambda: guided(Classifier(Slope(), [0, 1, 1])), "3 classes for a batch of 2; give one each"),
        (lambda: Classifier(Slope().train(), 1), "classifier is in training mode"),
        (lambda: Autoguidance(Slope()), "weak=Slope is a Slope, not a DiffusionModel"),
        (lambda: Autoguidance(WEAK().train()), "weak is in training mode"),
        (lambda: Autoguidance(WEAK(), 1.0), "guidance=1.0 never reads the weaker model"),
        (lambda: Autoguidance(WEAK())(POS, NEG, GRID), "Autoguidance needs `bind`"),
        (lambda: Autoguidance("nowhere"), "no such model folder: nowhere"),
    ],
)
def test_wrong_settings_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("rule", "reads"),
    [
        (Cfg(1.0), False), (Cfg(0.0), True), (OverTime(1.0, 1.0), False), (OverTime(1.0, 2.0), True),
        (Rescale(Interval(1.0)), False), (Threshold(2.0), True), (APG(1.0), False), (CfgPP(), True),
        (CfgZero(1.0), False), (Classifier(Slope(), 0), False), (Classifier(Slope(), 0, 1.0, 2.0), True),
        (Compose({"a": 1.0}), True), (Autoguidance(WEAK()), False),
    ],
)  # fmt: skip
def test_a_rule_says_whether_it_reads_the_negative(rule: Guidance, reads: bool) -> None:
    """What says no never calls `neg`, so that a negative prompt given with it would be lost."""
    assert rule.reads_neg == reads
    if not reads:
        assert rule(POS, never, GRID, lambda changes, model=None: NEG)(X, SIGMA).isfinite().all()


def test_rules_build_from_a_config_and_nest() -> None:
    inner = {"class_path": "mmdiff.guidance.Interval", "init_args": {"guidance": 4, "low": 0.3}}
    tree = {"class_path": "mmdiff.guidance.Rescale", "init_args": {"guidance": inner, "phi": 0.5}}
    assert build(tree) == Rescale(Interval(4.0, 0.3), 0.5)
    tree = {"class_path": "mmdiff.guidance.Compose", "init_args": {"others": {"rain": 2, "snow": -1.5}}}
    assert build(tree) == Compose({"rain": 2.0, "snow": -1.5})
    tree = {"class_path": "mmdiff.guidance.APG", "init_args": {"threshold": float("inf"), "momentum": 0}}
    assert build(tree) == APG(threshold=math.inf, momentum=0.0)
    with pytest.raises(ValueError, match="phi=2.0 must lie between"):
        build({"class_path": "mmdiff.guidance.Rescale", "init_args": {"phi": 2}})
