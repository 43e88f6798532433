"""Measures of clips against clips by hand, and of steadiness on motion that is known."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from video.fidelity import compare, flicker, lpips, psnr, ssim, stretch, warping_error
from video.flow import carry, motion, seen_again


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def smooth(*shape: int, seed: int = 0) -> Tensor:
    """Soft blobs, so that every place looks different."""
    x = noise(*shape[:-2], shape[-2] // 4, shape[-1] // 4, seed=seed)
    x = x.reshape(1, -1, *x.shape[-2:])
    return F.interpolate(x, shape[-2:], mode="bicubic").view(shape).clamp(-1, 1)


def moving(step: tuple[int, int], frames: int = 4, side: int = 24, frame: int = 44) -> Tensor:
    """A picture (1, 3, T, side, side) through a window that moves by `step` pixels a frame: it moves back."""
    whole, (y, x) = smooth(3, frame, frame)[None], step
    views = [whole[..., 10 + y * k : 10 + y * k + side, 10 + x * k : 10 + x * k + side] for k in range(frames)]
    return torch.stack(views, dim=2)


# -- against the true clip


def test_psnr_is_that_of_a_known_error_for_each_clip() -> None:
    true = torch.zeros(3, 3, 2, 8, 8)
    made = true + torch.tensor([0.2, 0.02, 0.0]).view(3, 1, 1, 1, 1)
    found = psnr(made, true)
    assert found[:2].tolist() == pytest.approx([20.0, 40.0], abs=1e-4)  # 20 log10(2 / 0.2)
    assert found[2] == float("inf")


def test_ssim_is_one_of_equal_clips_and_by_hand_of_flat_ones() -> None:
    x = noise(2, 3, 3, 16, 16)
    assert ssim(x, x).tolist() == pytest.approx([1.0, 1.0], abs=1e-6)
    flat = [torch.full((1, 3, 2, 16, 16), level * 2 - 1) for level in (0.3, 0.6)]
    by_hand = (2 * 0.3 * 0.6 + 1e-4) / (0.3**2 + 0.6**2 + 1e-4)  # only the means differ
    assert float(ssim(flat[0], flat[1])) == pytest.approx(by_hand, abs=1e-3)
    assert float(ssim(x, noise(2, 3, 3, 16, 16, seed=1))[0]) < 0.2
    with pytest.raises(ValueError, match="frames of 8x16 are too small for SSIM"):
        ssim(x[..., :8, :], x[..., :8, :])


def test_comparison_holds_what_can_be_had() -> None:
    small, large = noise(1, 3, 2, 8, 8), noise(1, 3, 2, 32, 32)
    assert list(compare(small, small)) == ["PSNR dB"]
    assert list(compare(large, large))[:2] == ["PSNR dB", "SSIM"]
    found = lpips(large, large)
    assert found is None or float(found) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match=r"\(1, 3, 2, 8, 8\) and \(1, 3, 2, 32, 32\) cannot be compared"):
        psnr(small, large)


# -- what needs no training


def test_stretching_blends_frames_linearly_and_keeps_the_known_ones() -> None:
    low = noise(2, 3, 4, 6, 6)
    x = stretch(low, (3, 8, 6, 6))
    assert torch.equal(x[:, :, ::2], low)
    assert torch.allclose(x[:, :, 1:-1:2], (low[:, :, 1:] + low[:, :, :-1]) / 2, atol=1e-6)
    assert torch.equal(x[:, :, -1], low[:, :, -1])
    ramp = torch.linspace(-0.8, 0.4, 4).view(1, 1, 4, 1, 1).expand(1, 3, 4, 2, 2)
    steady = stretch(ramp, (3, 16, 2, 2))[0, 0, :13, 0, 0]
    assert torch.allclose(steady, torch.linspace(-0.8, 0.4, 13), atol=1e-6)


def test_stretching_space_is_bicubic_on_cell_centres() -> None:
    low = 0.5 * noise(1, 3, 2, 6, 8)
    x = stretch(low, (3, 2, 12, 16))
    by_frame = F.interpolate(low[:, :, 1], (12, 16), mode="bicubic", align_corners=False)
    assert torch.allclose(x[:, :, 1], by_frame, atol=1e-6)
    ramp = torch.arange(8.0).view(1, 1, 1, 1, 8).expand(1, 3, 1, 8, 8) / 10 - 0.5
    pooled = F.avg_pool3d(stretch(ramp, (3, 1, 16, 16)), (1, 2, 2))
    assert torch.allclose(pooled[..., 3:5, 3:5], ramp[..., 3:5, 3:5], atol=1e-5)  # a ramp's cells keep their means


# -- motion


@pytest.mark.parametrize("step", [(0, 0), (1, 0), (0, -2), (2, 1), (-3, 3)])
def test_motion_of_a_moved_picture_is_its_shift(step: tuple[int, int]) -> None:
    x = moving(step)
    found = motion(x[:, :, 0], x[:, :, 1])
    inner = found[..., 5:-5, 5:-5]
    assert (inner == torch.tensor([-step[0], -step[1]]).view(1, 2, 1, 1)).float().mean() > 0.99
    assert torch.equal(carry(x[:, :, 1], found)[..., 6:-6, 6:-6], x[:, :, 0, 6:-6, 6:-6])
    back = motion(x[:, :, 1], x[:, :, 0])
    assert bool(seen_again(found, back)[..., 8:-8, 8:-8].all())


def test_a_plain_ground_does_not_move() -> None:
    plain = torch.full((1, 3, 12, 12), 0.3)
    assert not motion(plain, plain).any()


def test_warping_error_is_about_nought_for_motion_and_large_for_what_boils() -> None:
    still, moved = moving((0, 0)), moving((1, 2))
    assert float(warping_error(still)) == 0
    boiling = still + 0.2 * noise(*still.shape, seed=3)
    assert float(warping_error(moved)) < 0.25 * float(warping_error(boiling))
    by_hand = 127.5 * float((boiling[:, :, 1:] - boiling[:, :, :-1]).square().mean().sqrt())
    assert float(warping_error(boiling, reference=still)) == pytest.approx(by_hand, rel=1e-5)
    assert float(warping_error(moved[:, :, :1])) == 0


def test_flicker_counts_what_goes_up_and_down_and_no_steady_change() -> None:
    still = smooth(1, 3, 1, 16, 16).expand(1, 3, 6, 16, 16) * 0.5
    fading = still + torch.linspace(0, 0.4, 6).view(1, 1, 6, 1, 1)
    up_and_down = still + (3 / 127.5) * torch.tensor([1.0, -1, 1, -1, 1, -1]).view(1, 1, 6, 1, 1)
    found = flicker(torch.cat([still, fading, up_and_down]))
    assert found.tolist() == pytest.approx([0, 0, 6], abs=1e-4)
    assert float(flicker(still[:, :, :2])) == 0
