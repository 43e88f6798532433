"""SDEdit, inversion and room around a clip, against closed forms, on waveforms, spectrograms and videos alike."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from mmdiff.editing import infill, invert, noised, outpaint, sdedit
from mmdiff.sampling import Ancestral, Heun, Sampler, seeded_noise, start
from mmdiff.sigmas import Karras, Sigmas
from tests.edit_oracles import (
    GRIDS,
    SAMPLERS,
    SHAPES,
    distance,
    gaussian,
    never,
    normal,
    recorded,
    rough,
)

# SDEdit


@pytest.mark.parametrize("shape", SHAPES, ids=len)
@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_strength_0_returns_the_input_and_asks_nobody(sampler: Sampler, shape: tuple[int, ...]) -> None:
    x0 = normal(*shape)
    for grid in GRIDS:
        assert torch.equal(sdedit(never, x0, grid(8), 0.0, sampler, seeded_noise([1, 2])), x0)


@pytest.mark.parametrize("shape", SHAPES, ids=len)
@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_strength_1_is_plain_sampling_bit_for_bit(sampler: Sampler, shape: tuple[int, ...]) -> None:
    for grid in GRIDS:
        sigmas, noise = grid(6), seeded_noise([1, 2])
        plain = sampler(rough, start(noise(torch.empty(shape)), sigmas[0]), sigmas, noise)
        for x0 in (normal(*shape), 100 * normal(*shape, seed=9)):
            assert torch.equal(sdedit(rough, x0, sigmas, 1.0, sampler, seeded_noise([1, 2])), plain)


@pytest.mark.parametrize(("strength", "steps"), [(0.01, 1), (0.125, 1), (0.13, 2), (0.5, 4), (0.875, 7), (0.99, 8)])
@pytest.mark.parametrize("grid", GRIDS, ids=repr)
def test_strength_is_a_share_of_steps_from_the_clip_at_the_first_ones_noise(
    grid: Sigmas, strength: float, steps: int
) -> None:
    x0, sigmas = normal(2, 1, 5), grid(8)
    denoise, calls = recorded(rough)
    sdedit(denoise, x0, sigmas, strength, Ancestral(), seeded_noise([3, 4]))
    assert [sigma.item() for _, sigma in calls] == sigmas[8 - steps : 8].tolist()
    eps = seeded_noise([3, 4])(x0)
    assert torch.equal(calls[0][0], x0 + sigmas[8 - steps] * eps)  # neither scaled twice nor by sigmas[0]


def test_what_sdedit_keeps_of_the_input_is_what_theory_says() -> None:
    """Of data N(0, v) the exact flow takes x0 + s eps to (x0 + s eps) sqrt(v / (v + s^2)); measured within 2e-4."""
    x0, sigmas = normal(1, 1, 500, dtype=torch.float64), Karras(0.002, 10.0)(200).double()
    kept = []
    for strength in (0.2, 0.5, 0.9):
        x, rest = noised(x0, sigmas, strength, seeded_noise([0])(x0))
        exact = x * 0.5 / (0.25 + rest[0] ** 2).sqrt()
        got = sdedit(gaussian(0.0, 0.5), x0, sigmas, strength, Heun(), seeded_noise([0]))
        assert distance(got, exact) < 1e-3
        kept.append(torch.corrcoef(torch.stack([got.flatten(), x0.flatten()]))[0, 1].item())
    assert kept[0] > 0.99 > kept[1] > kept[2]


def test_a_strength_outside_0_to_1_is_refused() -> None:
    for strength in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"strength=.* must lie between 0 \(keeps the input\) and 1"):
            sdedit(never, normal(1, 1, 3), Karras()(4), strength, Ancestral(), seeded_noise([0]))


# Inversion


@pytest.mark.parametrize(("order", "back"), [(1, Ancestral()), (2, Heun())], ids=["1", "2"])
def test_inversion_and_round_trip_have_their_order(order: Any, back: Sampler) -> None:
    """Errors on a Gaussian fall as the number of steps to the power of -order. Measured: 0.97 and 1.01, 1.98 and 2.00.

    The grid is that of order tests of samplers, closed with a 0: its first step from 0 must not spoil the order.
    """
    mean, std, top = 0.3, 0.5, 3.0
    x0 = normal(64, dtype=torch.float64)
    exact = mean + (x0 - mean) * math.hypot(std, top) / std
    there, again = [], []
    for steps in (64, 128, 256):
        sigmas = torch.linspace(top, 0, steps + 1, dtype=torch.float64)
        x = invert(gaussian(mean, std), x0, sigmas, order)
        there.append(distance(x, exact))
        again.append(distance(back(gaussian(mean, std), x, sigmas, never), x0))
    for errors in (there, again):
        for coarse, fine in pairwise(errors):
            assert abs(math.log2(coarse / fine) - order) < 0.1, (there, again)


@pytest.mark.parametrize("shape", SHAPES, ids=len)
def test_a_clip_comes_back_from_its_noise_and_another_denoiser_edits_it(shape: tuple[int, ...]) -> None:
    x0, sigmas = normal(*shape), Karras(0.01, 20.0)(100)
    x = invert(gaussian(0.0, 1.0), x0, sigmas, 2)
    assert x.shape == x0.shape
    assert abs(x.std().item() / (x0.std().item() * math.hypot(1, 20)) - 1) < 0.01
    assert distance(Heun()(gaussian(0.0, 1.0), x, sigmas, never), x0) < 0.01
    moved = Heun()(gaussian(5.0, 1.0), x, sigmas, never)  # the same noise under another prompt
    assert distance(moved - 5.0 * (1 - 1 / math.hypot(1, 20)), x0) < 0.02


def test_inversion_in_float32_at_sigma_1e5_is_that_of_float64() -> None:
    x0, sigmas = normal(256), Karras(0.002, 1e5)(60)
    single, double = (invert(gaussian(0.3, 0.5), x, sigmas) for x in (x0, x0.double()))
    assert single.dtype == torch.float32
    assert distance(single / 1e5, double / 1e5) < 1e-5


def test_inversion_refuses_other_orders_and_grids() -> None:
    with pytest.raises(ValueError, match="order=3 must be 1"):
        invert(never, normal(4), Karras()(4), 3)  # type: ignore[arg-type]
    for sigmas in (torch.tensor([1.0]), torch.tensor([0.0, 1.0]), torch.tensor([math.inf, 0.0])):
        with pytest.raises(ValueError, match="must fall strictly from a finite number"):
            invert(never, normal(4), sigmas)


# Room around a clip


@pytest.mark.parametrize("shape", SHAPES, ids=len)
def test_outpainting_makes_room_along_any_axis(shape: tuple[int, ...]) -> None:
    clip = normal(*shape)
    for axis in range(2, clip.ndim):
        wide, mask = outpaint(clip, axis, before=2, after=3)
        size = clip.shape[axis]
        assert wide.shape[axis] == size + 5
        assert mask.shape == (1, 1, *wide.shape[2:])
        assert torch.equal(wide.narrow(axis, 2, size), clip)
        assert torch.equal(wide[mask.expand(wide.shape)], clip.flatten())
        assert mask.sum() == clip[0, 0].numel()
        assert torch.equal(wide.select(axis, 0), clip.select(axis, 0))
        assert torch.equal(wide.select(axis, -1), clip.select(axis, -1))
    for wrong in ({"axis": 1, "after": 1}, {"axis": clip.ndim, "after": 1}):
        with pytest.raises(ValueError, match="must be one of 2"):
            outpaint(clip, **wrong)
    for wrong in ({}, {"before": -1, "after": 2}):
        with pytest.raises(ValueError, match="must not be negative, nor both 0"):
            outpaint(clip, 2, **wrong)


@pytest.mark.parametrize("shape", SHAPES, ids=len)
def test_infilling_spreads_the_given_steps(shape: tuple[int, ...]) -> None:
    clip = normal(*shape)
    full, mask = infill(clip, range(1, 36, 3), 37)
    assert full.shape == (*shape[:2], 37, *shape[3:])
    assert mask.flatten().nonzero().flatten().tolist() == list(range(1, 36, 3))
    assert torch.equal(full[:, :, 1:36:3], clip)
    torch.testing.assert_close(full[:, :, 2], (2 * clip[:, :, 0] + clip[:, :, 1]) / 3)
    assert torch.equal(full[:, :, 0], clip[:, :, 0])
    assert torch.equal(full[:, :, 36], clip[:, :, -1])
    for places in ([0], [0, 1], list(range(11, -1, -1)), [*range(11), 37], [-1, *range(1, 12)]):
        with pytest.raises(ValueError, match=r"must be 12 rising numbers in 0\.\.36"):
            infill(clip, places, 37)
