"""The Frechet distance against closed forms and scipy's matrix root; features that are functions of their seed."""

import math

import pytest
import scipy.linalg
import torch

from mmdiff.distance import RandomFeatures, frechet_distance, kernel_distance, measure


def normals(count: int, size: int, seed: int, mix: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, size, generator=generator, dtype=torch.float64)
    return x @ (mix * torch.randn(size, size, generator=generator, dtype=torch.float64))


def whitened(count: int, size: int, seed: int) -> torch.Tensor:
    """Features whose sample mean is 0 and whose sample covariance is the identity, to rounding."""
    x = torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q, _ = torch.linalg.qr(x - x.mean(0))
    return q * math.sqrt(count - 1)


def test_distance_of_two_scaled_and_moved_sets_is_the_closed_form() -> None:
    x = whitened(200, 6, 0)
    scale, shift = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0, 0.1]).double(), torch.arange(6).double()
    expected = float((scale - 1).square().sum() + shift.square().sum())
    assert frechet_distance(x, whitened(300, 6, 1) * scale + shift) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("size", [1, 5, 20])
def test_distance_equals_the_matrix_root(size: int) -> None:
    a, b = normals(100, size, 1), normals(80, size, 2, mix=0.3) + 0.5
    root = scipy.linalg.sqrtm(torch.cov(a.T).reshape(size, size).numpy() @ torch.cov(b.T).reshape(size, size).numpy())
    trace = torch.cov(a.T).reshape(size, size).trace() + torch.cov(b.T).reshape(size, size).trace()
    expected = float((a.mean(0) - b.mean(0)).square().sum() + trace) - 2 * float(root.trace().real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_distance_of_gaussians_whose_axes_differ_is_the_closed_form() -> None:
    """In two dimensions tr (A^1/2 B A^1/2)^1/2 = (tr AB + 2 (det A det B)^1/2)^1/2, whatever their axes."""
    generator = torch.Generator().manual_seed(0)
    for seed in range(20):
        mixes = torch.randn(2, 2, 2, generator=generator, dtype=torch.float64)
        shift = torch.randn(2, generator=generator, dtype=torch.float64)
        a, b = (whitened(60 + seed, 2, 2 * seed + k) @ mixes[k] for k in (0, 1))
        cov_a, cov_b = (mix.T @ mix for mix in mixes)
        root = ((cov_a @ cov_b).trace() + 2 * (cov_a.det() * cov_b.det()).sqrt()).sqrt()
        expected = float(shift.square().sum() + cov_a.trace() + cov_b.trace() - 2 * root)
        assert frechet_distance(a, b + shift) == pytest.approx(expected, rel=1e-6)


def test_kernel_distance_of_gaussians_is_the_closed_form_on_average() -> None:
    """For x of N(m, 1) and y of N(n, 1), E (x y + 1)^3 = E x^3 E y^3 + 3 E x^2 E y^2 + 3 E x E y + 1."""

    def mean(m: float, n: float) -> float:
        return (m**3 + 3 * m) * (n**3 + 3 * n) + 3 * (m * m + 1) * (n * n + 1) + 3 * m * n + 1

    exact = mean(0, 0) + mean(0.5, 0.5) - 2 * mean(0, 0.5)
    generator = torch.Generator().manual_seed(0)
    found = torch.tensor(
        [
            kernel_distance(
                torch.randn(80, 1, generator=generator),
                torch.randn(50, 1, generator=generator, dtype=torch.float64) + 0.5,
            )
            for _ in range(600)
        ]
    )
    assert abs(float(found.mean()) - exact) < 3 * float(found.std()) / math.sqrt(600)
    assert float(found.std()) / math.sqrt(600) < 0.2 * exact


def test_fewer_clips_than_features_give_a_real_distance_that_is_nought_to_itself() -> None:
    a = normals(5, 40, 3)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9 * float(a.square().sum()))
    assert frechet_distance(a, a + 1) == pytest.approx(40, rel=1e-6)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(1, 3), torch.zeros(4, 3), "a has shape"),
        (torch.zeros(4, 3), torch.zeros(4, 2), "b has shape"),
        (torch.zeros(4, 3), torch.full((4, 3), float("nan")), "not finite"),
    ],
)
def test_what_has_no_distance_is_refused(a: torch.Tensor, b: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frechet_distance(a, b)


def test_kernel_distance_equals_the_double_sum_over_pairs() -> None:
    a, b = normals(7, 3, 0), normals(5, 3, 1) + 0.3

    def mean(x: torch.Tensor, y: torch.Tensor, same: bool) -> float:
        pairs = [(i, j) for i in range(len(x)) for j in range(len(y)) if not (same and i == j)]
        return sum((float(x[i] @ y[j]) / 3 + 1) ** 3 for i, j in pairs) / len(pairs)

    expected = mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False)
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_is_that_of_torchmetrics() -> None:
    from torchmetrics.image.kid import poly_mmd

    a, b = normals(60, 8, 0), normals(60, 8, 1, mix=0.5)
    assert kernel_distance(a, b) == pytest.approx(float(poly_mmd(a, b)), rel=1e-6)


def test_kernel_distance_of_one_distribution_is_nought_on_average_for_sets_of_any_size() -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (10, 40):
        found = [kernel_distance(*torch.randn(2, count, 4, generator=generator)) for _ in range(400)]
        mean, spread = torch.tensor(found).mean(), torch.tensor(found).std() / math.sqrt(400)
        assert abs(mean) < 3 * spread
        assert min(found) < 0 < max(found)


def test_intervals_hold_what_other_sets_of_that_size_have_and_the_extrapolation_what_endless_ones_have() -> None:
    generator = torch.Generator().manual_seed(0)
    size, exact = 8, 8 * (1.5 - 1) ** 2 + 8 * 0.1**2
    found = []
    for _ in range(25):
        a = torch.randn(60, size, generator=generator, dtype=torch.float64)
        b = torch.randn(80, size, generator=generator, dtype=torch.float64) * 1.5 + 0.1
        found.append(measure(frechet_distance, a, b, protocol="drawn"))
    usual = sum(m.value for m in found) / len(found)
    assert sum(m.low < usual < m.high for m in found) >= 22
    assert sum(m.infinite_low < exact < m.infinite_high for m in found) >= 22
    assert abs(sum(m.infinite for m in found) / len(found) - exact) < 0.3 * (usual - exact)
    half = sum(m.high - m.low for m in found) / len(found) / 2
    spread = torch.tensor([m.value for m in found]).std()
    assert 1.4 < half / spread < 3.4  # 1.96, and the jackknife's excess


def test_a_measured_distance_says_all_that_it_rests_on() -> None:
    a, b = normals(40, 3, 0), normals(50, 3, 1)
    found = measure(kernel_distance, a, b, protocol="eval sprites, random features")
    assert str(found).startswith(f"kernel {found.value:.4g} [{found.low:.4g}, {found.high:.4g}], extrapolated ")
    assert str(found).endswith("; 95 %, 40/50 clips, eval sprites, random features")
    assert found == measure(kernel_distance, a, b, protocol="eval sprites, random features")
    with pytest.raises(ValueError, match="sets of 39 and 50 clips; an interval needs 40 or more"):
        measure(kernel_distance, a[:39], b, protocol="")


@pytest.mark.parametrize(("axes", "shape"), [(1, (2, 3, 50)), (2, (2, 3, 9, 12)), (3, (2, 3, 4, 9, 9))])
def test_features_follow_from_the_seed_and_leave_the_global_generator_alone(axes: int, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    state = torch.get_rng_state()
    found = RandomFeatures(3, axes, width=4)(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.shape == (2, 28)
    assert torch.equal(found, RandomFeatures(3, axes, width=4)(x))
    assert not torch.allclose(found, RandomFeatures(3, axes, width=4, seed=1)(x))
    assert torch.allclose(found[:1], RandomFeatures(3, axes, width=4)(x[:1]), atol=1e-6)


def test_features_tell_blurred_clips_from_sharp_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    sharp = 2.0 * torch.randint(0, 2, (64, 3, 8, 16, 16), generator=generator) - 1
    blurred = torch.nn.functional.avg_pool3d(sharp, (1, 3, 3), 1, (0, 1, 1))
    features = RandomFeatures(3, 3, width=4)
    halves = frechet_distance(features(sharp[:32]), features(sharp[32:]))
    assert frechet_distance(features(sharp[:32]), features(blurred[32:])) > 5 * halves
