"""Edits of whole cascades on tiny models: what each stage is given, what comes back, what leaks, clips made longer."""

from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmdiff.autoencoder import Autoencoder, Chain, Identity, Pool, Subsample
from mmdiff.cascade import Cascade, Clip, Generate, Stage
from mmdiff.conditioning import Conditioner, LowRes
from mmdiff.config import build
from mmdiff.editing import Chunks, Edit, Repaint, Window, extend
from mmdiff.model import DiffusionModel
from mmdiff.precond import EDM
from mmdiff.sampling import Ancestral, DPMpp2M, Rolling, Sampler, seeded_noise
from tests.edit_oracles import CASCADES, GRID, MEL, distance, normal, stage

KINDS = pytest.mark.parametrize("kind", CASCADES)
PROMPT = {"caption": ["x", "y"]}


def clip_of(cascade: Cascade, seed: int = 7) -> Tensor:
    return 0.3 * normal(1, *cascade.shape, seed=seed)


def half(clip: Tensor, keep: float = 0.5) -> Tensor:
    """The mask of the first half in time."""
    known = torch.arange(clip.shape[2]) < keep * clip.shape[2]
    return known.view(1, 1, -1, *(1,) * (clip.ndim - 3))


def made(cascade: Cascade, edit: Edit | None = None, **settings: Any) -> Tensor:
    return cascade(PROMPT, noise=seeded_noise([1, 2]), edit=edit, **settings).data


@KINDS
def test_strength_0_returns_the_input_1_ignores_it_and_between_lies_between(kind: str) -> None:
    cascade = CASCADES[kind]()
    clip, plain = clip_of(cascade), made(cascade)
    assert torch.equal(made(cascade, Edit(clip, 0.0)), clip.expand(2, *cascade.shape))
    assert torch.equal(made(cascade, Edit(clip, 1.0)), plain)
    some = [made(cascade, Edit(clip, s)) for s in (0.25, 0.75)]
    others = made(cascade, Edit(clip_of(cascade, 8), 0.25))
    for a, b in ((some[0], some[1]), (some[0], plain), (some[1], plain), (some[0], others)):
        assert distance(a, b) > 1e-3


@KINDS
def test_strength_is_the_share_of_the_first_stages_steps(kind: str) -> None:
    cascade = CASCADES[kind]()
    for strength, steps in ((0.1, 1), (0.5, 2), (0.75, 3), (1.0, 4)):
        seen: list[tuple[str, int, int]] = []
        made(cascade, Edit(clip_of(cascade), strength), progress=lambda *step, seen=seen: seen.append(step))
        assert [step for step in seen if step[0] == "base"] == [("base", i + 1, steps) for i in range(steps)]
        assert len([step for step in seen if step[0] == "up"]) == 4


@KINDS
def test_what_is_known_comes_back_exactly_and_what_is_not_known_never_leaks(kind: str) -> None:
    """The unknown half of the input may hold anything; the known half changes what is made of the other."""
    cascade = CASCADES[kind]()
    clip = clip_of(cascade)
    known = half(clip)
    got = made(cascade, Edit(clip, known=known))
    where = known.expand(got.shape)
    assert torch.equal(got[where], clip.expand_as(got)[where])
    assert distance(got[~where], made(cascade)[~where]) > 1e-4
    noisy = torch.where(known, clip, 5 * clip_of(cascade, 9))
    assert torch.equal(made(cascade, Edit(noisy, known=known)), got)
    loud = torch.where(known, 2 * clip, clip)
    assert distance(made(cascade, Edit(loud, known=known))[~where], got[~where]) > 1e-4
    assert distance(made(cascade, Edit(clip, 0.5, known=known))[~where], got[~where]) > 1e-4


@KINDS
def test_every_stage_keeps_its_own_share_of_what_is_known(kind: str) -> None:
    cascade = CASCADES[kind]()
    clip = clip_of(cascade)
    plan = cascade.plan(tuple(cascade.shape), cascade.rate)
    edits = cascade.edits(Edit(clip, 0.5, known=half(clip)), plan)
    assert [tuple(e.clip.shape[1:]) for e in edits] == [shape for shape, _ in plan]
    assert [e.strength for e in edits] == [0.5] + [1.0] * (len(plan) - 1)
    data, low = {}, None
    for (name, part), edit, (shape, rate) in zip(cascade.stages.items(), edits, plan, strict=True):
        seen: list[tuple[Tensor, Tensor]] = []
        if isinstance(part, Generate):
            part.model.denoiser.backbone.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[:2]))
        low = part(PROMPT, low, shape=shape, rate=rate, noise=seeded_noise([1, 2]), edit=edit)
        assert edit.mask is not None
        where = edit.mask.expand(low.data.shape)
        for scaled, c_noise in seen:  # the network's own input, which tells what is known at its noise level
            sigma = (4 * c_noise[0]).exp()
            x = scaled * torch.hypot(sigma, torch.tensor(0.5))
            assert ((x - edit.clip)[where].abs() < 6 * sigma + 1e-5).all(), (name, sigma)
        assert 0 < where.float().mean() < 1, name
        assert torch.equal(low.data[where], edit.clip.expand_as(low.data)[where])
        data[name] = low.data


@pytest.mark.parametrize(
    ("autoencoder", "shape"),
    [
        (Identity(), (1, 12)),
        (Pool([3]), (2, 12)),
        (Pool([2, 3]), (1, 12, 6)),
        (Subsample(3), (3, 12, 4, 4)),
        (Chain([Subsample(2), Pool([1, 2, 2])]), (3, 12, 4, 4)),
        (MEL, (1, 192)),
        (Chain([MEL, Pool([2, 2])]), (1, 192)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_a_latent_is_known_exactly_where_it_depends_on_known_data_alone(
    autoencoder: Autoencoder, shape: tuple[int, ...]
) -> None:
    """Probed: other data in the unknown part changes every latent that counts as unknown, and no other."""
    for first, last in ((0, 5), (1, 8), (4, 12), (0, 12), (6, 6)):
        known = torch.zeros(1, 1, *shape[1:], dtype=torch.bool)
        known[:, :, first * shape[1] // 12 : last * shape[1] // 12] = True
        data = [torch.where(known, normal(8, *shape), normal(8, *shape, seed=s)) for s in (1, 2)]
        latents = [autoencoder.encode(x) for x in data]
        same = (latents[0] == latents[1]).all(dim=0).all(dim=0)
        assert torch.equal(autoencoder.known(known)[0, 0].expand(same.shape), same), (first, last)


def test_first_frame_reaches_the_first_frame_of_every_stage() -> None:
    cascade = CASCADES["video"]()
    clip = clip_of(cascade)
    known = torch.arange(8).view(1, 1, 8, 1, 1) == 0
    edits = cascade.edits(Edit(clip, known=known), cascade.plan(tuple(cascade.shape), cascade.rate))
    for edit in edits:
        assert edit.mask is not None
        assert edit.mask[0, 0].flatten(1).all(dim=1).tolist() == [True] + [False] * (edit.clip.shape[2] - 1)


@KINDS
def test_lengths_that_no_stage_can_make_are_padded_and_cut(kind: str) -> None:
    cascade = CASCADES[kind]()
    short = clip_of(cascade)[:, :, :-3]
    shape = (cascade.shape[0], short.shape[2], *cascade.shape[2:])
    known = half(short, 1.0)
    known[:, :, 3] = False
    got = made(cascade, Edit(short, known=known), shape=shape)
    assert got.shape[1:] == shape
    where = known.expand(got.shape)
    assert torch.equal(got[where], short.expand_as(got)[where])
    with pytest.raises(ValueError, match="the edit's clip has shape .* is to be made; resize it, or give its shape"):
        made(cascade, Edit(short))


@KINDS
def test_one_noise_level_per_step_is_another_way_to_know(kind: str) -> None:
    cascade = CASCADES[kind]()
    clip = clip_of(cascade)
    edit = Edit(clip, known=half(clip))
    first = cascade.stages["base"]
    assert isinstance(first, Generate)
    levels: list[Tensor] = []
    hook = first.model.denoiser.backbone.register_forward_pre_hook(lambda _, args: levels.append(args[1]))
    got = made(cascade.with_base(per_step=True), edit)
    hook.remove()
    mask = cascade.edits(edit, cascade.plan(tuple(cascade.shape), cascade.rate))[0].mask
    assert mask is not None
    steps = mask[0, 0].reshape(mask.shape[2], -1).all(dim=1)
    lowest = torch.tensor(1e-4).log() / 4  # EDM's c_noise of sigma 0
    for c_noise in levels:
        assert torch.equal(torch.isclose(c_noise, lowest), steps.expand(c_noise.shape))
    where = half(clip).expand(got.shape)
    assert torch.equal(got[where], clip.expand_as(got)[where])
    assert distance(got[~where], made(cascade, edit)[~where]) > 1e-4
    assert torch.equal(made(cascade.with_base(per_step=True)), made(cascade))  # nothing known, nothing changed


class Pointwise(nn.Module):
    """A backbone that acts on each step alone, and reads concat there."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.5))
        self.lengths: list[int] = []

    def forward(self, x: Tensor, c_noise: Tensor, cond: Any = None) -> Tensor:
        self.lengths.append(x.shape[2])
        return self.gain * x - (0 if cond is None else cond.concat[:, :1])


@pytest.mark.parametrize("loop", [False, True])
def test_windows_of_a_cascade_are_what_its_models_see(loop: bool) -> None:
    """Base and upsampler on windows of 4 and 8 make what they make whole, low-resolution clip and all."""

    def pipeline(window: bool) -> Cascade:
        low: list[Conditioner | None] = [None, LowRes(Pool([2]))]
        parts = [
            Generate(DiffusionModel(Pointwise(), EDM(), c).eval(), GRID, DPMpp2M(), 3,
                     window=Window(length, length // 2, loop) if window else None)
            for c, length in zip(low, (4, 8), strict=True)
        ]  # fmt: skip
        return Cascade({"base": parts[0], "up": parts[1]}, (1, 32), 8.0)

    whole, cut = pipeline(False), pipeline(True)
    inner = slice(2, -2) if loop else slice(None)  # at the ends a loop interpolates the low clip as one without ends
    torch.testing.assert_close(made(cut)[:, :, inner], made(whole)[:, :, inner], rtol=1e-4, atol=1e-5)
    for name, length in (("base", 4), ("up", 8)):
        assert set(cut.stages[name].model.denoiser.backbone.lengths) == {length}  # type: ignore[attr-defined]
    clip = clip_of(whole)
    edit = Edit(clip, known=half(clip))
    torch.testing.assert_close(made(cut, edit)[:, :, inner], made(whole, edit)[:, :, inner], rtol=1e-4, atol=1e-5)


def test_a_looping_upsampler_has_no_beginning_either() -> None:
    """Turned by a stride, the low-resolution clip gives the clip turned."""
    low, settings = 0.3 * normal(1, 1, 16), {"shape": (1, 32), "rate": 8.0, "noise": torch.zeros_like}
    turned = [low, low.roll(2, 2)]
    for window, same in ((Window(8, 4, loop=True), True), (Window(8, 4), False)):
        part = stage(1, 1, Pool([2]), window=window, sampler=DPMpp2M())
        a, b = (part({"caption": ["x"]}, Clip(data, 4.0), **settings).data for data in turned)
        assert (distance(a.roll(4, 2), b) < 1e-5) == same


@pytest.mark.parametrize(
    ("sampler", "window"),
    [
        (Repaint(Ancestral(1.0), 2, 3), Window(8, 4)),
        (Ancestral(), Chunks(8, 3)),
        (Rolling(8, 3, order=2), None),
    ],
    ids=["repaint and windows", "chunks", "rolling"],
)
def test_window_repaint_and_per_step_are_lines_of_yaml(sampler: Sampler, window: Window | Chunks | None) -> None:
    def line(part: Any) -> Any:
        if not is_dataclass(part):
            return part
        settings = {f.name: line(getattr(part, f.name)) for f in fields(part)}
        return {"class_path": f"{type(part).__module__}.{type(part).__qualname__}", "init_args": settings}

    tree = {
        "class_path": "mmdiff.cascade.Generate",
        "init_args": {
            "model": {
                "class_path": "mmdiff.model.DiffusionModel",
                "init_args": {
                    "backbone": {"class_path": "mmdiff.backbones.UNet", "init_args": {"axes": 1, "in_channels": 1}},
                    "precond": {"class_path": "mmdiff.precond.EDM"},
                },
            },
            "sigmas": {"class_path": "mmdiff.sigmas.Karras"},
            "sampler": line(sampler),
            "window": line(window),
            "per_step": True,
        },
    }
    built = build(tree)
    assert (built.window, built.per_step, built.sampler) == (window, True, sampler)


def test_repaint_samples_a_cascade_and_its_progress_ends() -> None:
    cascade = CASCADES["video"]()
    clip = clip_of(cascade)
    seen: list[tuple[str, int, int]] = []
    edit = Edit(clip, known=half(clip))
    got = made(cascade.with_base(sampler=Repaint(jump=2, resamples=2)), edit, progress=lambda *s: seen.append(s))
    assert [done for name, done, _ in seen if name == "base"] == [1, 2, 1, 2, 3, 4, 3, 4]
    assert torch.equal(got[:, :, :4], clip[:, :, :4].expand_as(got[:, :, :4]))
    assert distance(got, made(cascade, edit)) > 1e-4


# Pasting


def test_a_fade_is_counted_inside_what_is_known_and_the_ends_of_the_clip_are_no_edges() -> None:
    clip, data = torch.ones(1, 1, 16), torch.zeros(2, 1, 16)
    known = torch.tensor([1] * 6 + [0] * 4 + [1] * 6).bool().view(1, 1, 16)
    ramp = [1, 1, 1, 0.75, 0.5, 0.25, 0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    got = Edit(clip, known=known, fade=3).paste(data)
    torch.testing.assert_close(got, torch.tensor(ramp).expand(2, 1, 16))
    assert torch.equal(Edit(clip, known=known).paste(data), known.float().expand(2, 1, 16))
    assert torch.equal(Edit(clip).paste(data), data)
    everything = torch.ones(1, 1, 16, dtype=torch.bool)
    assert torch.equal(Edit(clip, known=everything, fade=3).paste(data), clip.expand(2, 1, 16))
    wide = clip[..., None].expand(1, 1, 16, 3)
    tall = Edit(wide, known=known[..., None], fade=3).paste(torch.zeros(2, 1, 16, 3))
    torch.testing.assert_close(tall, torch.tensor(ramp)[:, None].expand(2, 1, 16, 3))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"strength": 1.5}, r"strength=1.5 must lie between 0"),
        ({"fade": 3}, r"fade=3 must be 0 or more steps, and needs a mask"),
        ({"fade": -1, "known": torch.ones(1, 1, 4).bool()}, "fade=-1"),
        ({"known": torch.ones(1, 1, 4)}, "it must be bool"),
        ({"known": torch.ones(1, 1, 5).bool()}, r"known has shape \(1, 1, 5\), but a clip of \(1, 2, 4\) needs"),
        ({"known": torch.ones(1, 2, 4).bool()}, r"needs \(1, 1, 4\), or 1 in the place of a size"),
        ({"known": torch.ones(4).bool()}, r"known has shape \(4,\)"),
    ],
)
def test_edits_that_cannot_be_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Edit(normal(1, 2, 4), **settings)


class Blind(Stage):
    """A stage that has no way back."""

    def needs(self, shape: Any, rate: float) -> Any:
        return shape, rate

    def __call__(self, prompt: Any, start: Any = None, **_: Any) -> Clip:
        return Clip(start.data + 1, start.rate)


def test_a_stage_without_a_way_back_takes_part_in_plain_sampling_alone() -> None:
    cascade = Cascade({"base": stage(1, 1), "blind": Blind()}, (1, 8), 8.0)
    assert made(cascade).shape == (2, 1, 8)
    with pytest.raises(ValueError, match="a Blind stage takes no edits"):
        made(cascade, Edit(normal(1, 1, 8)))


# Continuation


@KINDS
def test_a_clip_goes_on_for_as_long_as_asked_and_begins_as_it_was(kind: str) -> None:
    cascade = CASCADES[kind]()
    length = cascade.shape[1]
    for have, more in ((length, 1), (length // 4, length // 2), (length + 4, 2 * length)):
        clip = 0.3 * normal(1, cascade.shape[0], have, *cascade.shape[2:])
        got = extend(cascade, PROMPT, clip, more, noise=seeded_noise([1, 2]))
        assert got.data.shape == (2, cascade.shape[0], have + more, *cascade.shape[2:])
        assert got.rate == cascade.rate
        assert torch.equal(got.data[:, :, :have], clip.expand(2, *clip.shape[1:]))
        assert got.data.isfinite().all()
        assert got.data[:, :, have:].std() > 0
    assert distance(got.data[0], got.data[1]) > 1e-3  # another seed goes on otherwise


def test_each_chunk_of_a_continuation_knows_the_end_of_the_last() -> None:
    """In the first stage's own space: 16 steps, of which 6 are known, for 32 with a context of 12."""
    cascade = CASCADES["waveform"]()
    first = cascade.first
    assert isinstance(first, Generate)
    calls: list[Edit] = []

    class Listening(Generate):
        def known(self, edit: Edit | None, like: Tensor) -> dict[str, Tensor]:
            assert edit is not None
            calls.append(edit)
            return super().known(edit, like)

    spy = replace(cascade, stages={**cascade.stages, "base": Listening(**vars(first))})
    clip, made = normal(1, 1, 40), []
    got = extend(
        spy, PROMPT, clip, 50, noise=seeded_noise([1, 2]), context=12, watch=lambda name, clip: made.append(clip.data)
    ).data
    base = made[0]
    assert base.shape == (2, 1, 46)  # 90 steps, and 2 more that the cascade can make
    assert len(calls) == 3
    for call, (begin, known) in zip(calls, ((14, 6), (24, 6), (30, 10)), strict=True):  # the last one ends the clip
        assert call.known is not None
        assert call.known.flatten().tolist() == [True] * known + [False] * (16 - known)
        assert torch.equal(call.clip[:, :, :known].expand(2, 1, known), base[:, :, begin : begin + known])
    assert distance(got, extend(cascade, PROMPT, clip, 50, noise=seeded_noise([1, 2])).data) > 1e-4


def test_a_continuation_by_a_decoder_fades_into_it() -> None:
    cascade = CASCADES["mel"]()
    clip = clip_of(cascade)[:, :, :200]
    hard, faded = (
        extend(cascade, PROMPT, clip, 100, noise=seeded_noise([1, 2]), context=96, fade=fade).data for fade in (0, 10)
    )
    assert torch.equal(hard[:, :, :200], clip.expand(2, 1, 200))
    assert torch.equal(faded[:, :, :190], clip[:, :, :190].expand(2, 1, 190))
    assert distance(faded[:, :, 190:200], hard[:, :, 190:200]) > 1e-4
    assert torch.equal(faded[:, :, 200:], hard[:, :, 200:])


def test_continuations_that_cannot_be_are_refused() -> None:
    cascade, clip = CASCADES["waveform"](), normal(1, 1, 8)
    with pytest.raises(ValueError, match="steps=0 must be at least 1"):
        extend(cascade, PROMPT, clip, 0, noise=seeded_noise([1, 2]))
    for context in (0, 32):
        with pytest.raises(ValueError, match=rf"context={context} must lie in 1..31"):
            extend(cascade, PROMPT, clip, 8, noise=seeded_noise([1, 2]), context=context)


def test_a_negative_prompt_and_progress_reach_the_cascade() -> None:
    with pytest.raises(ValueError, match="negative prompt has no effect"):
        extend(CASCADES["waveform"](), PROMPT, normal(1, 1, 8), 4, noise=seeded_noise([1, 2]), negative=PROMPT)
    seen: list[str] = []
    extend(CASCADES["waveform"](), PROMPT, normal(1, 1, 8), 4, noise=seeded_noise([1, 2]),
           progress=lambda name, *_: seen.append(name))  # fmt: skip
    assert set(seen) == {"base", "up"}


def test_padding_holds_the_last_step_and_does_not_know_it() -> None:
    edit = Edit(normal(1, 1, 5), 0.5)
    assert replace(edit).padded(5).clip is edit.clip
    longer = Edit(edit.clip, known=torch.ones(1, 1, 1).bool()).padded(7)
    assert torch.equal(longer.clip[:, :, 5:], edit.clip[:, :, 4:].expand(1, 1, 2))
    assert longer.known is not None
    assert longer.known.flatten().tolist() == [True] * 5 + [False] * 2
    assert edit.padded(7).known is None
    assert edit.padded(7).strength == 0.5
