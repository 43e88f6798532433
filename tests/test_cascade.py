"""Cascades: the plan of shapes, one stage after another, samples that depend on their own seed alone."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmdiff.autoencoder import Autoencoder, Chain, Identity, Pool, Subsample
from mmdiff.backbones import UNet
from mmdiff.cascade import Cascade, Clip, Decode, Generate
from mmdiff.conditioning import Conditioner, Join, LowRes, Text
from mmdiff.model import DiffusionModel
from mmdiff.precond import EDM
from mmdiff.sampling import Ancestral, DPMpp2M, seeded_noise
from mmdiff.sigmas import Karras
from mmdiff.text import ByteTransformer

GRID = Karras(sigma_max=10)
DEGRADE = Chain([Subsample(2), Pool([1, 2])])


def model(conditioner: Conditioner | None, **settings: Any) -> DiffusionModel:
    torch.manual_seed(3)
    net = UNet(2, 1, channels=8, multipliers=(1, 1), head_channels=8, **settings)
    built = DiffusionModel(net, EDM(), conditioner).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return built


def text() -> Text:
    torch.manual_seed(2)
    return Text(ByteTransformer(8, 1, 2))


def base(**settings: Any) -> Generate:
    return Generate(
        model(text(), tokens_width=8, vector_width=8), GRID, Ancestral(1.0), **{"steps": 3, "guidance": 2.0, **settings}
    )


def upsampler(**settings: Any) -> Generate:
    conditioner = Join([text(), LowRes(DEGRADE)])
    net = model(conditioner, tokens_width=8, vector_width=8, concat_channels=2)
    return Generate(net, GRID, DPMpp2M(), **{"steps": 2, **settings})


def cascade() -> Cascade:
    return Cascade({"base": base(), "up": upsampler(guidance=1.5), "out": Decode(Pool([1, 2]))}, (1, 8, 16), 8.0)


CAPTIONS = ["a dog", "", "two very loud cats", "rain"]


def test_plan_divides_by_what_each_stage_multiplies() -> None:
    assert cascade().plan((1, 8, 16), 8.0) == [((1, 4, 4), 4.0), ((1, 8, 8), 8.0), ((1, 8, 16), 8.0)]
    assert Cascade({"base": base()}, (1, 4, 4), 2.0).plan((1, 6, 2), 2.0) == [((1, 6, 2), 2.0)]


def test_plans_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="T=7 is not a multiple of 2; nearest: 6 or 8"):
        cascade().plan((1, 7, 16), 8.0)
    with pytest.raises(ValueError, match="the first stage, 'up', needs a clip to start from"):
        Cascade({"up": upsampler()}, (1, 8, 8), 8.0).plan((1, 8, 8), 8.0)
    with pytest.raises(ValueError, match="stage 'first' stands before one that starts from nothing"):
        Cascade({"first": base(), "second": base()}, (1, 8, 8), 8.0).plan((1, 8, 8), 8.0)
    with pytest.raises(ValueError, match="at least one stage"):
        Cascade({}, (1, 8, 8), 8.0)({"caption": ["x"]}, noise=seeded_noise([0]))


def test_a_batch_of_four_equals_four_singles_and_a_seed_its_clip() -> None:
    whole = cascade()
    together = whole({"caption": CAPTIONS}, noise=seeded_noise([5, 6, 7, 8]))
    assert together.data.shape == (4, 1, 8, 16)
    assert together.rate == 8
    assert torch.isfinite(together.data).all()
    for i, caption in enumerate(CAPTIONS):
        single = whole({"caption": [caption]}, noise=seeded_noise([5 + i])).data[0]
        torch.testing.assert_close(single, together.data[i], rtol=1e-3, atol=1e-3)
    state = torch.get_rng_state()
    again = whole({"caption": CAPTIONS}, noise=seeded_noise([5, 6, 7, 8]))
    assert torch.equal(again.data, together.data)
    assert torch.equal(torch.get_rng_state(), state)
    other = whole({"caption": CAPTIONS}, noise=seeded_noise([5, 6, 7, 9])).data
    torch.testing.assert_close(other[:3], together.data[:3], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(other[3], together.data[3], atol=1e-2)


def test_lengths_no_stage_can_make_are_made_longer_and_cut() -> None:
    stages = {"base": base(steps=1, guidance=1.0), "up": upsampler(steps=1)}
    clip = Cascade(stages, (1, 8, 8), 8.0, multiple=4)({"caption": ["x"]}, noise=seeded_noise([0]), shape=(1, 5, 8))
    assert clip.data.shape == (1, 1, 5, 8)


class FirstAlone(Autoencoder):
    """As of a causal video autoencoder: 1 + 4 k steps are 1 + k latents; and of an uneven end, decoded beyond it."""

    factors = (4, 1)

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if shape[1] % 4 != 1:
            raise ValueError(f"T={shape[1]} is not 1 plus a multiple of 4")
        return (shape[0], 1 + shape[1] // 4, *shape[2:])

    def encode(self, x: Tensor) -> Tensor:
        return x[:, :, ::4]

    def decode(self, z: Tensor) -> Tensor:
        return z.repeat_interleave(4, dim=2)


@pytest.mark.parametrize(("length", "made"), [(1, 1), (2, 5), (5, 5), (6, 9)])
def test_lengths_may_be_one_plus_a_multiple(length: int, made: int) -> None:
    still = Generate(model(text(), tokens_width=8, vector_width=8, factors=[(1, 2)]), GRID, Ancestral(), steps=1)
    stages = {"base": still, "out": Decode(FirstAlone())}
    whole = Cascade(stages, (1, 9, 4), 8.0, multiple=4, offset=1)
    clip = whole({"caption": ["x"]}, noise=seeded_noise([0]), shape=(1, length, 4))
    assert clip.data.shape == (1, 1, length, 4)
    assert clip.rate == 8
    out = whole.stages["out"]
    full = out({}, Clip(torch.randn(1, 1, 1 + made // 4, 4), 2.0), shape=(1, made, 4), rate=8, noise=seeded_noise([0]))
    assert full.data.shape == (1, 1, made, 4)


def generated(stage: Generate, caption: str = "a dog", **given: Any) -> Tensor:
    return stage({"caption": [caption]}, shape=(1, 4, 4), rate=4.0, noise=seeded_noise([0]), **given).data


def test_every_setting_of_generate_counts() -> None:
    plain = generated(base())
    changes = [{"sigmas": Karras(sigma_max=5)}, {"sampler": DPMpp2M()}, {"steps": 4}, {"guidance": 3.0}]
    for change in changes:
        settings = {"model": base().model, "sigmas": GRID, "sampler": Ancestral(1.0), "steps": 3, "guidance": 2.0}
        assert not torch.allclose(generated(Generate(**{**settings, **change})), plain, atol=1e-4), change
    assert not torch.allclose(generated(base(), "rain"), plain, atol=1e-5)
    assert not torch.allclose(generated(base(), negative={"caption": ["rain"]}), plain, atol=1e-5)
    assert torch.equal(generated(base(), negative={"caption": [""]}), plain)  # the null prompt is the empty one


def test_guidance_0_is_unconditional_and_1_needs_no_null() -> None:
    torch.testing.assert_close(generated(base(guidance=0.0)), generated(base(guidance=1.0), ""))


def test_upsampling_depends_on_the_clip_and_gets_one() -> None:
    stage, low = upsampler(), torch.randn(1, 1, 2, 2)
    ends = [generated(stage, start=Clip(data, 2.0)) for data in (low, -low)]
    assert not torch.allclose(*ends, atol=1e-3)
    for lost in (stage, Decode(Identity())):
        with pytest.raises(ValueError, match="needs the clip of a stage before it"):
            lost({"caption": ["x"]}, shape=(1, 4, 4), rate=4.0, noise=seeded_noise([0]))


def test_without_a_conditioner() -> None:
    stage = Generate(model(None), GRID, DPMpp2M(), steps=2)
    assert generated(stage).shape == (1, 1, 4, 4)
    assert stage.needs((1, 4, 4), 4.0) is None


def test_progress_counts_to_the_end_of_every_stage() -> None:
    seen: list[tuple[str, int, int]] = []
    cascade()({"caption": ["x"]}, noise=seeded_noise([0]), progress=lambda *step: seen.append(step))
    assert seen == [("base", 1, 3), ("base", 2, 3), ("base", 3, 3), ("up", 1, 2), ("up", 2, 2), ("out", 1, 1)]


def test_with_base_changes_the_first_stage_alone() -> None:
    before = cascade()
    after = before.with_base(steps=7, guidance=1.0)
    assert (after.stages["base"].steps, after.stages["base"].guidance) == (7, 1.0)  # type: ignore[attr-defined]
    assert after.stages["up"] is before.stages["up"]
    assert before.stages["base"].steps == 3  # type: ignore[attr-defined]
    assert replace(after, stages={}) == replace(before, stages={})
    with pytest.raises(ValueError, match="steps=0 must be at least 1"):
        before.with_base(steps=0)


def test_to_moves_every_model() -> None:
    whole = Cascade({"base": base(), "out": Decode(Owner())}, (1, 4, 4), 4.0).to("meta")
    assert next(whole.stages["base"].model.parameters()).is_meta  # type: ignore[attr-defined]
    assert next(whole.stages["out"].autoencoder.parameters()).is_meta  # type: ignore[attr-defined]


class Owner(Identity):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))


def test_a_model_in_training_mode_is_refused() -> None:
    stage = base()
    stage.model.train()
    with pytest.raises(ValueError, match=r"in training mode, .* call model.eval\(\) first"):
        generated(stage)


def test_a_negative_prompt_that_nothing_would_read_is_refused() -> None:
    deaf = Cascade({"base": base(guidance=1.0)}, (1, 4, 4), 4.0)
    with pytest.raises(ValueError, match="a negative prompt has no effect at guidance=1"):
        deaf({"caption": ["x"]}, noise=seeded_noise([0]), negative={"caption": ["y"]})
