"""Noise distributions: closed-form distribution functions, stratified and importance draws, the loss."""

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from mmdiff.cascade import Generate
from mmdiff.conditioning import Cond, Conditioner
from mmdiff.config import build
from mmdiff.density import (
    Cosine,
    Importance,
    LogNormal,
    LogUniform,
    Mode,
    Shifted,
    SigmaDensity,
    Stratified,
    Table,
    Uniform,
)
from mmdiff.editing import Window
from mmdiff.model import DiffusionModel
from mmdiff.module import DiffusionModule
from mmdiff.precond import Flow as FlowNetwork
from mmdiff.sampling import Ancestral, seeded_noise
from mmdiff.sigmas import DDPM, Flow, ResolutionShift

SHARES = (1.0, 4.0, 2.0)
LAWS: list[SigmaDensity] = [
    LogNormal(),
    LogUniform(0.01, 100.0),
    Uniform(),
    Mode(),
    Cosine(),
    Table(),
    Shifted(Uniform(), 3.0),
    Stratified(LogNormal()),
    Importance(LogNormal(), SHARES),
]
GRID = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000  # u of a midpoint rule


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def log_normal_cdf(sigma: Tensor) -> Tensor:
    return torch.special.ndtr((sigma.log() + 1.2) / 1.2)


def log_uniform_cdf(sigma: Tensor) -> Tensor:
    return (sigma / 0.01).log() / math.log(1e4)


def cosine_cdf(sigma: Tensor) -> Tensor:
    low, high = math.atan(0.001), math.atan(1000)
    return (sigma.atan() - low) / (high - low)


def time_cdf(sigma: Tensor) -> Tensor:
    return sigma / (1 + sigma)


def shifted_time_cdf(sigma: Tensor) -> Tensor:
    t = sigma / (1 + sigma)
    return t / (3 - 2 * t)  # inverse of t = 3 u / (1 + 2 u), arXiv 2403.03206, eq. 23


def part_of_time_cdf(sigma: Tensor) -> Tensor:
    return (sigma / (1 + sigma) - 0.2) / 0.7


def kolmogorov(values: Tensor, cdf: Callable[[Tensor], Tensor]) -> float:
    """Largest distance of the values' empirical distribution function from `cdf`, times sqrt(n)."""
    share = cdf(values.sort().values.double())
    n = len(values)
    above = torch.arange(1, n + 1) / n - share
    return n**0.5 * torch.maximum(above, 1 / n - above).max().item()


@pytest.mark.parametrize(
    ("law", "cdf"),
    [
        (LogNormal(), log_normal_cdf),
        (LogUniform(0.01, 100.0), log_uniform_cdf),
        (Cosine(), cosine_cdf),
        (Uniform(), time_cdf),
        (Mode(scale=0.0), time_cdf),
        (Uniform(0.2, 0.9), part_of_time_cdf),
        (Shifted(Uniform(), 3.0), shifted_time_cdf),
    ],
    ids=lambda value: value.__name__ if callable(value) and hasattr(value, "__name__") else repr(value),
)
def test_draws_follow_the_closed_form(law: SigmaDensity, cdf: Callable[[Tensor], Tensor]) -> None:
    draws = law.sample(50_000, "cpu", seeded(0))
    assert draws.shape == (50_000,)
    assert draws.dtype == torch.float32
    assert (draws > 0).all()
    assert kolmogorov(draws, cdf) < 1.95  # a right law exceeds it once in 1000 seeds; this seed is fixed
    assert kolmogorov(draws * 1.1, cdf) > 1.95  # and the test has power
    torch.testing.assert_close(cdf(law.quantile(GRID)), GRID, rtol=0, atol=1e-9)


def test_log_normal_is_logit_normal_in_flow_time() -> None:
    sigma = LogNormal(0.0, 1.0).sample(50_000, "cpu", seeded(0))
    assert kolmogorov(sigma / (1 + sigma), lambda t: torch.special.ndtr(t.logit())) < 1.95
    torch.testing.assert_close(
        Shifted(LogNormal(0.3, 1.1), 3.0).quantile(GRID), LogNormal(0.3 + math.log(3), 1.1).quantile(GRID)
    )


@pytest.mark.parametrize("scale", [-1.0, -0.5, 0.81, 1.29, 2 / (math.pi - 2)])
def test_mode_is_eq_20(scale: float) -> None:
    u = 1 - GRID  # the paper's t falls with u
    t = 1 - u - scale * ((math.pi / 2 * u).cos() ** 2 - 1 + u)
    sigma = Mode(scale).quantile(GRID)
    torch.testing.assert_close(sigma / (1 + sigma), t, rtol=0, atol=1e-12)
    assert (sigma.diff() > 0).all()
    ends = torch.tensor([2.0**-26, 1 - 2.0**-24])  # float32, where 1 - t and, at scale -1, t itself would be 0
    exact = Mode(scale).quantile(ends.double())
    torch.testing.assert_close(Mode(scale).quantile(ends).double(), exact, rtol=2e-6, atol=0)


@pytest.mark.parametrize(("side", "least", "most"), [(64, -15, 15), (256, -15, 15), (512, -10, 20)])
def test_shifted_cosine_is_simple_diffusions(side: int, least: float, most: float) -> None:
    low, high = math.atan(math.exp(-0.5 * most)), math.atan(math.exp(-0.5 * least))
    log_snr = -2 * (low + GRID * (high - low)).tan().log() + 2 * math.log(64 / side)  # arXiv 2301.11093, app. B
    law = Shifted(Cosine(math.exp(-most / 2), math.exp(-least / 2)), side / 64)
    torch.testing.assert_close(-2 * law.quantile(GRID).log(), log_snr, rtol=1e-9, atol=1e-9)


def test_table_draws_are_uniform_over_its_levels() -> None:
    grid = DDPM("cosine", train_steps=20)
    draws = Table(grid).sample(50_000, "cpu", seeded(0))
    levels, counts = draws.unique(return_counts=True)
    assert torch.equal(levels, grid.table.float())
    chi_square = ((counts - 2500) ** 2 / 2500).sum()
    assert chi_square < 43.8  # 99.9 % quantile at 19 degrees of freedom


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_draws_depend_on_the_generator_alone(law: SigmaDensity) -> None:
    first, again, other = (law.sample(8, "cpu", seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    before = torch.random.get_rng_state()
    law.sample(8, "cpu", torch.Generator())
    assert torch.equal(before, torch.random.get_rng_state())
    assert law.sample(2).shape == (2,)
    ends = law.quantile(torch.tensor([2.0**-26, 1 - 2.0**-24]))
    assert ends.isfinite().all()
    assert (ends > 0).all()


@pytest.mark.parametrize("law", [LogNormal(), Table(DDPM(train_steps=64)), Importance(LogNormal(), SHARES)], ids=repr)
@pytest.mark.parametrize("n", [1, 7, 64])
def test_stratified_draws_one_level_of_each_nth(law: SigmaDensity, n: int) -> None:
    for seed in range(20):
        u = Stratified(law).uniform(n, "cpu", seeded(seed))
        assert ((u.sort().values.diff() - 1 / n).abs() < 1e-6).all()
        assert ((0 <= u) & (u < 1)).all()
        torch.testing.assert_close(
            Stratified(law).sample(n, "cpu", seeded(seed)), law.quantile(u.clamp(2.0**-26, 1 - 2.0**-24))
        )


def test_stratified_keeps_the_law_of_each_draw_and_lowers_the_variance_of_the_mean() -> None:
    law, generator = LogNormal(), seeded(0)
    batches = torch.stack([Stratified(law).sample(16, "cpu", generator) for _ in range(4000)])
    assert kolmogorov(batches[:, 5], log_normal_cdf) < 1.95  # one place of the batch, over the batches
    plain = law.sample(64_000, "cpu", generator).view(4000, 16)
    means = [(b / (1 + b)).mean(dim=1) for b in (batches, plain)]
    assert abs(means[0].mean() - means[1].mean()) < 5 * (means[1].std() / 4000**0.5)
    assert means[0].var() < means[1].var() / 6  # 16 draws; measured 1 / 10, and it falls as 1 / n beside the plain one


IMPORTANT: list[SigmaDensity] = [
    LogNormal(),
    Mode(),
    Shifted(Cosine(), 2.0),
    Table(DDPM(train_steps=10)),  # 10 levels in 3 bins: two levels lie across an edge
    Table(DDPM(train_steps=1000)),
]


@pytest.mark.parametrize("law", IMPORTANT, ids=repr)
def test_importance_weights_leave_every_mean_as_it_was(law: SigmaDensity) -> None:
    fine = (torch.arange(2**18, dtype=torch.float64) + 0.5) / 2**18
    plain, drawn = law.quantile(fine), Importance(law, SHARES).quantile(fine)
    weight = Importance(law, SHARES).weight(drawn)
    for measure in (torch.ones_like, lambda s: s / (1 + s), lambda s: s.log(), lambda s: (s > 0.5).double()):
        # the error is the midpoint rule's at the steps of the integrand, a few 2^-18
        torch.testing.assert_close((weight * measure(drawn)).mean(), measure(plain).mean(), rtol=0, atol=4e-5)
    assert not torch.allclose(drawn.log().mean(), plain.log().mean(), atol=0.01)  # and the draws are others


@pytest.mark.parametrize("law", [LogNormal(), Uniform()], ids=repr)
def test_importance_draws_each_bin_by_its_share(law: SigmaDensity) -> None:
    important = Importance(law, SHARES)
    draws = important.sample(70_000, "cpu", seeded(1))
    edges = law.quantile(torch.tensor([1 / 3, 2 / 3]))
    counts = torch.bucketize(draws, edges).bincount(minlength=3)
    expected = torch.tensor([10_000, 40_000, 20_000])
    assert ((counts - expected) ** 2 / expected).sum() < 13.8  # 99.9 % quantile at 2 degrees of freedom
    weights = important.weight(torch.stack([edges[0] / 2, edges.mean(), edges[1] * 2]))
    torch.testing.assert_close(weights, torch.tensor([7 / 3, 7 / 12, 7 / 6]))


@pytest.mark.parametrize("wrap", [Stratified, lambda law: Shifted(law, 1.7), lambda law: Stratified(Shifted(law, 1.7))])
def test_wrappers_pass_the_weight_on(wrap: Callable[[SigmaDensity], SigmaDensity]) -> None:
    for inner in (Importance(Table(DDPM(train_steps=10)), SHARES), Importance(LogNormal(), SHARES)):
        sigma, u = wrap(inner).quantile(GRID.float()), GRID.float()
        torch.testing.assert_close(wrap(inner).weight(sigma), inner.weight(inner.quantile(u)))
        assert wrap(inner).weight(sigma).mean() == pytest.approx(1, abs=1e-4)
    assert torch.equal(wrap(LogNormal()).weight(torch.rand(2, 3)), torch.ones(2, 3))


def test_equal_shares_change_nothing() -> None:
    same = Importance(LogNormal(), (2, 2, 2)).quantile(GRID)
    torch.testing.assert_close(same, LogNormal().quantile(GRID), rtol=1e-5, atol=0)  # the edges lie 1e-6 low
    assert torch.allclose(Importance(LogNormal(), (2, 2)).weight(torch.rand(5)), torch.ones(5))


SIZED = ResolutionShift(16)


@pytest.mark.parametrize(
    "law",
    [
        Shifted(LogNormal(), SIZED),
        Stratified(Shifted(LogNormal(), SIZED)),
        Shifted(Stratified(LogNormal()), SIZED),
        Importance(Shifted(LogNormal(), SIZED), SHARES),
        Shifted(Importance(LogNormal(), SHARES), SIZED),
    ],
    ids=repr,
)
def test_a_shift_by_size_reaches_through_wrappers_once(law: SigmaDensity) -> None:
    with pytest.raises(ValueError, match="depends on the clip's size: call .sized"):
        law.quantile(GRID)
    torch.testing.assert_close(law.sized((4, 8, 8)).quantile(GRID), 4 * law.sized((1, 4, 4)).quantile(GRID))
    assert law.sized((4, 8, 8)).sized((1, 1, 1)) == law.sized((4, 8, 8))
    weights = [law.sized(shape).weight(law.sized(shape).quantile(GRID)) for shape in ((4, 8, 8), (1, 4, 4))]
    torch.testing.assert_close(*weights)


def test_laws_without_a_size_stay_themselves() -> None:
    for law in LAWS:
        assert law.sized((3, 5)) is law


class Level(nn.Module):
    """Network that predicts the noise level it is told, so that its loss tells what was drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, c_noise: Tensor, cond: Cond | None = None) -> Tensor:
        self.seen.append(c_noise)
        return self.scale * c_noise.reshape(-1, *(1,) * (x.ndim - 1)).expand_as(x)


class Nothing(Conditioner):
    def forward(self, batch: Any, generator: torch.Generator | None = None) -> Cond:
        return Cond()

    def null(self, batch: Any) -> Cond:
        return Cond()


def test_training_and_sampling_shift_sigma_by_the_same_factor() -> None:
    """A shift by size in both: the levels that the network sees are its unshifted ones times one factor."""
    shape = (3, 8, 6, 6)  # (C, T, H, W), 288 positions: channels do not count
    torch.manual_seed(0)
    model = DiffusionModel(Level(), FlowNetwork(), Nothing())
    expected = math.sqrt(288 / 18)

    def seen() -> Tensor:
        t = torch.cat(model.denoiser.backbone.seen).double()
        model.denoiser.backbone.seen.clear()
        return t / (1 - t)

    levels = []
    for law in (Shifted(LogNormal(), ResolutionShift(18)), LogNormal()):
        DiffusionModule(model, law).losses({"x": torch.zeros(5, *shape)}, (0, 0, 0))
        levels.append(seen())
    torch.testing.assert_close(levels[0], expected * levels[1], rtol=1e-5, atol=0)
    model.eval()
    for window, factor in ((None, expected), (Window(2, 1), math.sqrt(72 / 18))):  # of 2 of the 8 time steps
        levels = []
        for grid in (Flow(ResolutionShift(18), t_max=0.9), Flow(t_max=0.9)):
            stage = Generate(model, grid, Ancestral(), steps=5, window=window)
            stage({"caption": ["a"]}, shape=shape, rate=8.0, noise=seeded_noise([0]))
            levels.append(seen().unique())
        assert len(levels[0]) == 5
        torch.testing.assert_close(levels[0], factor * levels[1], rtol=1e-5, atol=0)


def test_training_multiplies_the_loss_by_the_weight() -> None:
    """The mean loss of many importance draws is that of the density they stand for, not of the draws."""
    model = DiffusionModel(Level(), FlowNetwork())
    data, often = {"x": torch.zeros(20_000, 1, 2)}, Importance(LogNormal(), (1.0, 1.0, 8.0))

    def expected(law: SigmaDensity) -> float:
        t = law.quantile(GRID) / (1 + law.quantile(GRID))
        return 1 + (t**2).mean().item()  # E (t - eps)^2, x0 = 0

    truth = expected(LogNormal())
    for law in (LogNormal(), often):
        loss = DiffusionModule(model, Stratified(law)).losses(data, (0, 0, 0))["loss"].item()
        assert loss == pytest.approx(truth, abs=0.04)  # 4 standard errors of 40 000 squared normals, weighted
    assert expected(often) > truth + 0.1


def concrete(kind: type) -> set[type]:
    below = {found for sub in kind.__subclasses__() for found in concrete(sub)}
    own = {kind} if kind.__module__.startswith("mmdiff.") and not getattr(kind, "__abstractmethods__", None) else set()
    return own | below


CHANGES: list[tuple[SigmaDensity, dict[str, Any]]] = [
    (LogNormal(), {"mean": 0.0, "std": 1.0}),
    (LogUniform(0.01, 100.0), {"sigma_min": 0.02, "sigma_max": 50.0}),
    (Uniform(), {"t_min": 0.1, "t_max": 0.9}),
    (Mode(), {"scale": 0.5}),
    (Cosine(), {"sigma_min": 0.01, "sigma_max": 100.0}),
    (Table(), {"table": DDPM("cosine")}),
    (Shifted(Uniform(), 2.0), {"density": Cosine(), "shift": 3.0}),
    (Stratified(Uniform()), {"density": Cosine()}),
    (Importance(Uniform(), SHARES), {"density": Cosine(), "shares": (4.0, 1.0, 2.0)}),
]


@pytest.mark.parametrize(("law", "changes"), CHANGES, ids=lambda value: type(value).__name__)
def test_every_argument_changes_the_draws(law: SigmaDensity, changes: dict[str, Any]) -> None:
    assert {field.name for field in fields(law)} == set(changes)  # type: ignore[arg-type]
    for name, value in changes.items():
        other = replace(law, **{name: value})  # type: ignore[type-var]
        assert not torch.equal(other.sample(8, "cpu", seeded(0)), law.sample(8, "cpu", seeded(0))), name


def test_no_density_is_left_out() -> None:
    assert concrete(SigmaDensity) == {type(law) for law, _ in CHANGES}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LogNormal(std=0), r"std=0 positive"),
        (lambda: LogUniform(1, 1), r"sigma_min=1, sigma_max=1 must satisfy"),
        (lambda: Cosine(sigma_max=math.inf), r"sigma_max=inf must satisfy"),
        (lambda: Uniform(0.5, 0.5), r"t_min=0.5, t_max=0.5 must satisfy"),
        (lambda: Mode(2.0), r"scale=2.0 must lie between -1 and"),
        (lambda: Shifted(LogNormal(), 0.0), r"shift=0.0 must be positive"),
        (lambda: Importance(LogNormal(), (1.0,)), r"must be at least two positive numbers"),
        (lambda: Importance(LogNormal(), (1.0, 0.0)), r"shares=\(1.0, 0.0\) must be"),
        (lambda: Importance(Table(DDPM(train_steps=2)), SHARES).sample(1), r"has fewer levels than these bins"),
    ],
)
def test_wrong_settings_are_named(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def named(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"mmdiff.density.{name}", "init_args": arguments}


BY_SIZE = {"class_path": "mmdiff.sigmas.ResolutionShift", "init_args": {"base": 1024}}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (named("LogNormal", mean=0.0), LogNormal(mean=0.0)),
        (named("LogUniform", sigma_min=0.01, sigma_max=50), LogUniform(0.01, 50.0)),
        (named("Uniform", t_max=0.9), Uniform(t_max=0.9)),
        (named("Mode", scale=0.8), Mode(0.8)),
        (named("Cosine"), Cosine()),
        (named("Table", table={"train_steps": 50}), Table(DDPM(train_steps=50))),
        (named("Shifted", density=named("Uniform"), shift=3), Shifted(Uniform(), 3.0)),
        (named("Shifted", density=named("Uniform"), shift=BY_SIZE), Shifted(Uniform(), ResolutionShift(1024))),
        (named("Stratified", density=named("LogNormal")), Stratified(LogNormal())),
        (named("Importance", density=named("Mode"), shares=[1, 2.5]), Importance(Mode(), (1.0, 2.5))),
    ],
)
def test_builds_from_a_config(config: dict[str, Any], expected: SigmaDensity) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--part", type=SigmaDensity)
    assert parser.instantiate(parser.parse_object({"part": config})).part == expected
    assert build(config) == expected
