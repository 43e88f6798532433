"""What benchmarks/long_video.py concludes, on clips whose faults are known."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.bars import MET, MISSED
from benchmarks.long_video import check, main, measure_long, windowed
from mmdiff.cascade import Cascade, Clip, Generate, Stage
from mmdiff.editing import Window
from mmdiff.readers import Labels
from mmdiff.tasks import Prompt
from tests.edit_oracles import CASCADES

RATE = 8.0


@dataclass(frozen=True)
class Fading(Stage):
    """Clips as bright as their captions say, fading by `fade` every 4 steps; after `holds` a bright one is dark."""

    fade: float = 0.0
    holds: int = 1000

    def needs(self, shape: Any, rate: float) -> None:
        return None

    def __call__(self, prompt: Any, start: Any = None, *, shape: Any, noise: Any, **_: Any) -> Clip:
        steps = torch.arange(shape[1])
        bright = torch.tensor([float(caption) for caption in prompt["caption"]])
        lines = bright[:, None] - self.fade * (steps // 4)
        lines = torch.where((steps >= self.holds) & (bright[:, None] > 0.15), 0.0, lines)
        noise(lines[:, :1])
        return Clip(lines[:, None, :, None, None].expand(-1, *shape).clone(), RATE)


def read(clips: Tensor, rate: float) -> list[Labels]:
    """The brightness that is nearest, and whether the clip is as long as those that were trained on."""
    assert rate == RATE
    words = ["0.3" if clip.mean() > 0.2 else "0.1" for clip in clips]
    return [{"bright": word, "long": str(clips.shape[2])} for word in words]


def measured(stage: Stage, times: int = 5, batch_size: int = 2) -> Any:
    prompts = [Prompt(word, {"bright": word, "long": "4"}, seed) for seed, word in enumerate(("0.1", "0.3", "0.1"))]
    return measure_long(Cascade({"base": stage}, (3, 4, 2, 2), RATE), prompts, read, times, batch_size)


def test_clips_that_stay_as_they_are_lose_nothing() -> None:
    found = measured(Fading())
    assert found.right == found.short == {"bright": 1.0, "long": 1.0}
    assert (found.fall, found.low, found.high) == (0.0, 0.0, 0.0)
    assert found.drift == [0.0] * 5
    assert [bar.verdict for bar in found.bars] == [MET, MET]


def test_lost_words_and_faded_colours_are_counted_by_window() -> None:
    """One clip of three loses one of two words after 2 of 5 windows: 60 % of its points for that word."""
    found = measured(Fading(holds=8))
    assert found.right == pytest.approx({"bright": 1 - 0.6 / 3, "long": 1.0})
    assert found.short == {"bright": 1.0, "long": 1.0}
    lost = torch.tensor([0.0, 30.0, 0.0])
    assert found.fall == pytest.approx(10.0)
    half = 1.959964 * float(lost.std()) / math.sqrt(3)
    assert (found.low, found.high) == pytest.approx((10.0 - half, 10.0 + half), rel=1e-5)
    assert found.by_window == pytest.approx([1.0, 1.0, 5 / 6, 5 / 6, 5 / 6])
    assert found.bars[0].verdict == MISSED
    assert found.drift == pytest.approx([0.0, 0.0, 5.0, 5.0, 5.0])  # 0.3 of a range of 2, in one clip of three
    fading = measured(Fading(fade=0.008))
    assert fading.drift == pytest.approx([0.4 * i for i in range(5)], abs=1e-4)
    assert [bar.verdict for bar in fading.bars] == [MET, MET]
    assert [bar.verdict for bar in measured(Fading(fade=0.011)).bars] == [MET, MISSED]
    assert "falls by 10.0 points" in found.table()
    assert "0.00 0.00 5.00" in found.table()


def test_batches_and_one_clip_alone_change_no_share() -> None:
    assert measured(Fading(holds=8), batch_size=3) == measured(Fading(holds=8), batch_size=1)
    one = measure_long(
        Cascade({"base": Fading()}, (3, 4, 2, 2), RATE), [Prompt("0.1", {"bright": "0.1"}, 0)], read, 2, 4
    )
    assert one.fall == 0
    assert one.high == math.inf  # one clip tells nothing of others


def test_words_that_are_not_read_are_wrong() -> None:
    assert check([{"a": "1", "b": "2"}], [{"b": "2"}]).tolist() == [[0.0, 1.0]]


def test_windows_of_the_first_stage_are_chosen_by_their_overlap() -> None:
    cascade = CASCADES["video"]()  # 8 steps, of which the first stage makes 4
    first = windowed(cascade, "3").first
    assert isinstance(first, Generate)
    assert first.window == Window(4, 3)
    assert windowed(cascade, None) is cascade
    assert windowed(windowed(cascade, "3"), "none").first == cascade.first
    with pytest.raises(ValueError, match="--window half must be an overlap, 0 or more time steps, or none"):
        windowed(cascade, "half")
    with pytest.raises(ValueError, match=r"overlap=4 must lie in 0\.\.length-1=3"):
        windowed(cascade, "4")
    with pytest.raises(ValueError, match="--batch-size 0 is below 1"):
        main(["sprites", "--batch-size", "0"])
