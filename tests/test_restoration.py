"""How stages restore real clips: a stage that knows the clips beats stretching, one that stretches gains nothing."""

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmdiff.autoencoder import Chain, Pool, Subsample
from mmdiff.backbones import UNet
from mmdiff.cascade import Cascade, Clip, Decode, Generate
from mmdiff.conditioning import LowRes
from mmdiff.data.clips import ClipDataset, Sample
from mmdiff.data.items import Item
from mmdiff.model import DiffusionModel
from mmdiff.precond import EDM
from mmdiff.restoration import restored
from mmdiff.sampling import Ancestral
from mmdiff.sigmas import Karras
from mmdiff.tasks import Restoring
from video.fidelity import psnr, stretch

SHAPE, RATE = (3, 8, 12, 12), 8.0


def clip_of(number: int) -> Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(number)) * 2 - 1


def clips(count: int) -> ClipDataset:
    def decode(item: Item, rng: random.Random | None) -> Sample:
        return Sample(clip_of(item.meta["number"]), RATE, 1.0)

    return ClipDataset([Item(f"{i}", f"{i}", [f"clip {i}"], {"number": i}, Path()) for i in range(count)], decode)


@dataclasses.dataclass(frozen=True)
class Scripted(Generate):
    """Makes what `make` makes of the low clip, the captions and the shape, and keeps what it was given."""

    make: Callable[[Tensor, list[str], tuple[int, ...]], Tensor] = lambda low, captions, shape: low
    given: list[tuple[Tensor, float]] = dataclasses.field(default_factory=list)

    def __call__(self, prompt: Any, start: Clip | None = None, *, shape: Any, rate: float, **rest: Any) -> Clip:
        assert start is not None
        self.given.append((start.data, start.rate))
        return Clip(self.make(start.data, prompt["caption"], shape), rate)


def stage(degrade: Any, make: Any) -> Scripted:
    model = DiffusionModel(UNet(3, 3, channels=8, multipliers=(1,), concat_channels=4), EDM(), LowRes(degrade)).eval()
    return Scripted(model, Karras(), Ancestral(), make=make)


def base() -> Generate:
    model = DiffusionModel(UNet(3, 3, channels=8, multipliers=(1,)), EDM()).eval()
    return Generate(model, Karras(), Ancestral())


def stretched(low: Tensor, captions: list[str], shape: tuple[int, ...]) -> Tensor:
    return stretch(low, shape)


def nearly_right(low: Tensor, captions: list[str], shape: tuple[int, ...]) -> Tensor:
    return torch.stack([clip_of(int(caption.split()[1])) for caption in captions]) + 0.02


RESTORING = Restoring(stretch, lambda made, true: {"PSNR dB": psnr(made, true)})


def test_each_stage_gets_the_true_low_clip_and_is_compared_with_the_true_clip() -> None:
    between, up = stage(Subsample(2), stretched), stage(Pool([1, 2, 2]), nearly_right)
    cascade = Cascade({"base": base(), "between": between, "up": up}, SHAPE, RATE)
    found = restored(cascade, clips(5), RESTORING, count=4, seed=0, batch_size=3)
    assert [(one.stage, one.count) for one in found] == [("between", 4), ("up", 4)]
    true = torch.stack([clip_of(k) for k in range(4)])
    pooled = Pool([1, 2, 2]).encode(true)
    assert torch.equal(torch.cat([data for data, _ in up.given]), pooled)
    assert {rate for _, rate in up.given} == {8.0}
    assert torch.equal(torch.cat([data for data, _ in between.given]), pooled[:, :, ::2])
    assert {rate for _, rate in between.given} == {4.0}
    assert found[0].gain["PSNR dB"] == (0.0, 0.0, 0.0)
    by_hand = psnr((true + 0.02).clamp(-1, 1), true) - psnr(stretch(pooled, SHAPE), true)
    gain, low, high = found[1].gain["PSNR dB"]
    assert gain == pytest.approx(float(by_hand.mean()), abs=1e-4)
    half = 1.959964 * float(by_hand.std()) / 2
    assert (low, high) == pytest.approx((gain - half, gain + half), abs=1e-4)
    assert str(found[1]).startswith(f"stage up: PSNR dB {found[1].made['PSNR dB']:.4g} against ")
    assert str(found[1]).endswith("; 95 %, 4 clips")


def test_a_stage_of_time_and_space_at_once_is_judged_too() -> None:
    up = stage(Chain([Subsample(2), Pool([1, 2, 2])]), stretched)
    (found,) = restored(Cascade({"base": base(), "up": up}, SHAPE, RATE), clips(2), RESTORING, 2, 0, 2)
    assert up.given[0][0].shape == (2, 3, 4, 6, 6)
    assert found.gain["PSNR dB"][0] == 0.0


def test_without_an_upsampling_stage_of_pixels_there_is_nothing_to_restore() -> None:
    up = stage(Pool([1, 2, 2]), stretched)
    for stages in ({"base": base()}, {"base": base(), "up": up, "out": Decode(Pool([1, 1, 1]))}):
        assert restored(Cascade(stages, SHAPE, RATE), clips(2), RESTORING, 2, 0, 2) == []
    assert up.given == []
