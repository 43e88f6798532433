"""Averages of any width after the training, beside those of the weights stored at every step."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmdiff.callbacks import PowerFunction
from mmdiff.post_hoc import CHUNK, Profile, combination, file_name, gamma, keep, read, synthesised


def walk(steps: int, size: int = 50) -> Tensor:
    """(steps, size) float64: weights of a training, a random walk around a large constant."""
    return 10 + 0.1 * torch.randn(steps, size, dtype=torch.float64).cumsum(dim=0)


def average(weights: Tensor, profile: Profile) -> Tensor:
    return profile.shares(1, len(weights)) @ weights


def kept(widths: list[float], steps: list[int]) -> list[Profile]:
    return [Profile(width, step) for width in widths for step in steps]


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.2, 1 / math.sqrt(12)])
def test_the_profile_has_its_width_and_is_the_recursion(width: float) -> None:
    profile, steps = Profile(width, 4000), torch.arange(1, 4001, dtype=torch.float64)
    shares = profile.shares(1, 5000)
    assert float(shares.sum()) == pytest.approx(1, abs=1e-12)
    assert not shares[4000:].any()
    mean = float(shares[:4000] @ steps)
    assert math.sqrt(float(shares[:4000] @ (steps - mean) ** 2)) / 4000 == pytest.approx(width, rel=1e-3)
    decay, brute = PowerFunction(width), torch.zeros(4000, dtype=torch.float64)
    for n in range(1, 4001):
        brute.mul_(decay(n))
        brute[n - 1] += 1 - decay(n)
    torch.testing.assert_close(shares[:4000], brute, rtol=1e-9, atol=1e-15)


def test_exponents_are_those_of_the_paper() -> None:
    assert gamma(0.05) == pytest.approx(16.97, abs=5e-3)  # arXiv 2312.02696, section 3.1
    assert gamma(0.10) == pytest.approx(6.94, abs=5e-3)
    for g in (0.0, 1.0, 30.0, 500.0):
        assert gamma(math.sqrt((g + 1) / (g + 3)) / (g + 2)) == pytest.approx(g, abs=1e-9 + 1e-9 * g)


@pytest.mark.parametrize(
    ("width", "residual_at_most"),
    [(0.02, 0.03), (0.03, 0.008), (0.05, 1e-8), (0.07, 0.001), (0.1, 1e-8), (0.15, 0.002), (0.2, 0.005), (0.25, 0.03)],
)
def test_synthesis_is_near_the_average_of_weights_stored_at_every_step(width: float, residual_at_most: float) -> None:
    """What docs/training.md says of two widths, each kept at 40 steps of the training."""
    weights = walk(1000)
    profiles = kept([0.05, 0.1], list(range(25, 1001, 25)))
    wanted = Profile(width, 1000)
    shares, residual = combination(profiles, wanted)
    found = shares @ torch.stack([average(weights, profile) for profile in profiles])
    exact = average(weights, wanted)
    assert float(shares.sum()) == pytest.approx(1, abs=1e-9)
    error, spread = (found - exact).norm(dim=0), (weights - weights.mean(dim=0)).norm()
    bound = residual * float(wanted.shares(1, 1000).norm()) * float(spread)
    assert float(error) <= bound * (1 + 1e-6) + 1e-8  # by Cauchy and Schwarz, as the shares add up to 1
    assert residual <= residual_at_most
    assert float(error) < 0.01 * float((weights[-1] - exact).norm())  # beside what averaging does at all


def test_more_kept_averages_come_nearer_and_a_kept_one_is_itself() -> None:
    wanted = Profile(0.03, 2000)
    residuals = [combination(kept([0.05, 0.1], list(range(e, 2001, e))), wanted)[1] for e in (200, 100, 50)]
    assert residuals[0] > 2.5 * residuals[1] > 6.25 * residuals[2]
    profiles = kept([0.05, 0.1], [400, 1000, 2000])
    for place, profile in enumerate(profiles):
        shares, residual = combination(profiles, profile)
        assert residual < 1e-8
        torch.testing.assert_close(shares, torch.eye(6, dtype=torch.float64)[place], rtol=0, atol=1e-6)


def test_it_is_the_best_there_is() -> None:
    """No sum with shares of 1 is nearer, step by step, than the one found by steps in chunks."""
    profiles, wanted = kept([0.05, 0.1], [300, 600, 900]), Profile(0.08, 900)
    shares, residual = combination(profiles, wanted)
    rows, goal = torch.stack([p.shares(1, 900) for p in profiles]), wanted.shares(1, 900)
    assert float((shares @ rows - goal).norm() / goal.norm()) == pytest.approx(residual, rel=1e-6)
    for _ in range(20):
        change = torch.randn(6, dtype=torch.float64) * 1e-3
        other = shares + change - change.mean()
        assert float((other @ rows - goal).norm() / goal.norm()) >= residual


def test_long_trainings_go_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    profiles, wanted = kept([0.05, 0.1], [40, 80, 120]), Profile(0.07, 120)
    whole = combination(profiles, wanted)
    monkeypatch.setattr("mmdiff.post_hoc.CHUNK", 7)
    assert CHUNK > 120
    torch.testing.assert_close(combination(profiles, wanted)[0], whole[0], rtol=1e-6, atol=1e-8)
    assert combination(profiles, wanted)[1] == pytest.approx(whole[1], rel=1e-6)


def test_files_are_read_tensor_by_tensor_and_others_are_refused(tmp_path: Path) -> None:
    weights = walk(300, 6)
    sources = {}
    for profile in kept([0.05, 0.1], [100, 200, 300]):
        value = average(weights, profile).float()
        keep(tmp_path, profile.width, profile.steps, {"a": value[:4].reshape(2, 2), "b": value[4:]})
        sources[profile] = read(tmp_path / file_name(profile.width, profile.steps), ["a", "b"])
    wanted = Profile(0.1, 300)
    found, residual = synthesised(sources, ["b", "a"], wanted)
    exact = average(weights, wanted)
    assert residual < 1e-8
    torch.testing.assert_close(found["a"].double(), exact[:4].reshape(2, 2), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found["b"].double(), exact[4:], rtol=1e-6, atol=1e-6)
    path = tmp_path / file_name(0.05, 100)
    with pytest.raises(ValueError, match="of other parameters than the checkpoint's"):
        read(path, ["a"])
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="is no whole average"):
        read(path, ["a", "b"])


def test_weights_that_never_moved_come_out_as_they_were() -> None:
    shares, residual = combination(kept([0.1], [10, 20]), Profile(0.02, 40))  # far from what is kept
    assert residual > 0.5
    assert float(shares.sum()) == pytest.approx(1, abs=1e-9)
