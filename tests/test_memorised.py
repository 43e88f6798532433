"""The check for memorised clips: copies are found, fresh draws are not, at the share that is expected of them."""

import pytest
import torch
from torch import Tensor

from mmdiff.accuracy import wilson
from mmdiff.memorised import memorised, nearest


def draws(count: int, seed: int) -> Tensor:
    """(N, 2, 4, 3)"""
    return torch.randn(count, 2, 4, 3, generator=torch.Generator().manual_seed(seed))


def test_nearest_is_the_root_mean_square_by_hand_over_what_both_have() -> None:
    clips, among = draws(5, 0), draws(700, 1)
    distance, place = nearest(clips, among, chunk=64)
    by_hand = (clips[:, None] - among[None]).square().flatten(2).mean(2).sqrt()  # (5, 700)
    assert torch.allclose(distance, by_hand.amin(1), atol=1e-5)
    assert torch.equal(place, by_hand.argmin(1))
    shorter, _ = nearest(clips[:, :, :3], among)
    assert torch.allclose(shorter, nearest(clips[:, :, :3], among[:, :, :3])[0])


def test_copies_are_memorised_even_with_a_little_noise() -> None:
    train = draws(300, 0)
    copied = memorised(train[40:60] + 0.01 * draws(20, 5), train, draws(100, 1))
    assert (copied.near, copied.count) == (20, 20)
    assert copied.nearest.tolist() == list(range(40, 60))
    assert copied.interval == wilson(20, 20)
    assert float(copied.distances.max()) < 0.02 < copied.limit
    assert str(copied).startswith("memorised: 20/20 generated clips (100.0 % [83.9, 100.0])")


def test_fresh_clips_are_near_as_often_as_held_out_ones() -> None:
    shares = [memorised(draws(200, 3 * k), draws(200, 3 * k + 1), draws(400, 3 * k + 2)).share for k in range(10)]
    assert sum(shares) / len(shares) == pytest.approx(0.05, abs=0.015)


def test_half_of_a_model_s_clips_may_be_copies() -> None:
    train = draws(200, 0)
    half = memorised(torch.cat([train[:30], draws(30, 8)]), train, draws(100, 1))
    assert 30 <= half.near <= 36


def test_too_few_held_out_clips_are_refused() -> None:
    with pytest.raises(ValueError, match="19 held-out clips; the check needs some of each, and 20 held-out ones"):
        memorised(draws(3, 0), draws(3, 1), draws(19, 2))
