"""Every task of a video cascade by one model with `Given`, in pixels and in latents, on tiny untrained models.

B batch, C channels, T time, H W space.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmdiff.autoencoder import Autoencoder, Chain, Identity, Pool, Subsample
from mmdiff.backbones import UNet
from mmdiff.cascade import Cascade, Clip, Decode, Generate
from mmdiff.conditioning import Conditioner, Join, LowRes, Number, Text
from mmdiff.editing import Edit, Window, extend
from mmdiff.given import Given
from mmdiff.model import DiffusionModel
from mmdiff.precond import EDM, X0
from mmdiff.reference import Reference
from mmdiff.sampling import Ancestral, DPMpp2M, seeded_noise
from mmdiff.sigmas import Karras
from mmdiff.text import ByteTransformer
from tests.edit_oracles import normal
from tests.small_video import make

GRID = Karras(0.02, 10)
PROMPT = {"caption": ["a red circle", "a blue square"]}


def stage(
    conditioners: list[Conditioner], channels: int = 3, autoencoder: Autoencoder | None = None, **settings: Any
) -> Generate:
    """A stage of a small network, every weight moved off its start."""
    torch.manual_seed(0)
    text = Text(ByteTransformer(8, 1, 2))
    concat = sum(1 + channels for part in conditioners if isinstance(part, (Given, LowRes)))
    vectors = 8 + sum(part.width for part in conditioners if isinstance(part, Number))
    net = UNet(3, channels, channels=8, multipliers=(1,), head_channels=8, kernels=[[1, 3, 3], [3, 1, 1]],
               tokens_width=8, vector_width=vectors, concat_channels=concat)  # fmt: skip
    model = DiffusionModel(net, EDM(), Join([text, *conditioners]), autoencoder).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("autoencoder"):
                parameter.add_(0.05 * torch.randn_like(parameter))
    return Generate(model, GRID, DPMpp2M(), **{"steps": 2, "guidance": 1.5, **settings})


def pixels() -> Cascade:
    """8 frames of 8x8 at 4 fps, then 16 frames at 8 fps, then 16x16."""
    stages = {
        "base": stage([Given([])]),
        "between": stage([LowRes(Subsample(2))]),
        "up": stage([LowRes(Pool([1, 2, 2]))], guidance=1.0),
    }
    return Cascade(stages, (3, 16, 16, 16), 8.0, multiple=2)


def causal() -> Cascade:
    """Latents of a causal video autoencoder: 17 frames of 16x16 are 9 latents of 4x4."""
    autoencoder = make("2x4", channels=3)
    base = stage([Given([])], autoencoder=autoencoder)
    return Cascade({"base": base, "decode": Decode(autoencoder)}, (3, 17, 16, 16), 8.0, multiple=2, offset=1)


def pooled() -> Cascade:
    """Latents that are means of 2x2 pixels."""
    base = stage([Given([])], autoencoder=Pool([1, 2, 2]))
    return Cascade({"base": base, "decode": Decode(Pool([1, 2, 2]))}, (3, 16, 16, 16), 8.0)


CASCADES: dict[str, Callable[[], Cascade]] = {"pixels": pixels, "causal": causal, "pooled": pooled}


def along(cascade: Cascade, given: Callable[[int, int], bool]) -> Tensor:
    length = cascade.shape[1]
    return torch.tensor([given(t, length) for t in range(length)]).view(1, 1, -1, 1, 1)


def box(cascade: Cascade, inside: bool) -> Tensor:
    mask = torch.zeros(1, 1, 1, *cascade.shape[2:], dtype=torch.bool)
    mask[..., 4:12, 4:12] = True
    return mask if inside else ~mask


TASKS: dict[str, Callable[[Cascade], Tensor | None]] = {
    "text-to-video": lambda c: None,
    "image-to-video": lambda c: along(c, lambda t, n: t == 0),
    "first-and-last": lambda c: along(c, lambda t, n: t == 0 or t >= n - 2),
    "interpolation": lambda c: along(c, lambda t, n: t % 4 == 0),
    "continuation": lambda c: along(c, lambda t, n: t < n // 2),
    "any frames": lambda c: along(c, lambda t, n: t in (0, 5, 6, 7, 12)),
    "inpainting": lambda c: box(c, inside=False),
    "outpainting": lambda c: box(c, inside=True),
}


def psnr_db(a: Tensor, b: Tensor) -> float:
    return float(10 * torch.log10(4 / (a - b).square().mean().clamp(min=1e-12)))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", CASCADES)
def test_every_task_gives_back_what_is_given_and_makes_the_rest(kind: str, task: str) -> None:
    cascade = CASCADES[kind]()
    known, clip = TASKS[task](cascade), 0.4 * normal(1, *cascade.shape, seed=5)
    base: Any = cascade.first
    shown: list[Tensor] = []
    base.model.denoiser.backbone.register_forward_pre_hook(lambda _, args: shown.append(args[2].concat))
    edit = None if known is None else Edit(clip, known=known)
    made = cascade(PROMPT, noise=seeded_noise([1, 2]), edit=edit)
    assert made.data.shape == (2, *cascade.shape)
    assert made.rate == cascade.rate
    assert made.data.isfinite().all()
    assert (made.data[0] - made.data[1]).abs().mean() > 1e-3
    given_to_base = shown[0][:, 0].mean().item()
    if known is None:
        assert given_to_base == 0
        return
    where = known.expand(made.data.shape)
    assert psnr_db(made.data[where], clip.expand_as(made.data)[where]) >= 45
    assert torch.equal(made.data[where], clip.expand_as(made.data)[where])  # pasted, so without any error
    assert (made.data - clip)[~where].abs().mean() > 0.05, "the rest is new"
    assert 0 < given_to_base < 1, "the first stage is shown what is given"
    if kind != "causal":  # whose latents see a little of what lies beside their own cell
        other = cascade(PROMPT, noise=seeded_noise([1, 2]), edit=Edit(torch.where(known, clip, 3.0), known=known))
        assert torch.equal(other.data, made.data), "what is not given is not looked at"


@pytest.mark.parametrize("kind", CASCADES)
def test_a_clip_goes_on_by_any_of_them(kind: str) -> None:
    cascade = CASCADES[kind]()
    clip = 0.4 * normal(1, *cascade.shape, seed=5)
    longer = extend(cascade, PROMPT, clip, 7, noise=seeded_noise([1, 2]))
    assert longer.data.shape[2] == cascade.shape[1] + 7
    assert torch.equal(longer.data[:, :, : clip.shape[2]], clip.expand(2, *clip.shape[1:]))


def test_a_first_frame_of_another_size_is_refused_with_the_cure() -> None:
    cascade = pixels()
    small = Edit(torch.zeros(1, 3, 16, 8, 8), known=torch.arange(16).view(1, 1, 16, 1, 1) == 0)
    with pytest.raises(
        ValueError, match=r"shape \(1, 3, 16, 8, 8\), but a clip of \(3, 16, 16, 16\) is to be made; resize"
    ):
        cascade(PROMPT, noise=seeded_noise([1, 2]), edit=small)


# Interpolation between frames that stay


@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize("axes", [(), (4, 4)], ids=["waveform", "video"])
def test_interpolation_keeps_the_frames_it_is_given_to_the_bit(factor: int, axes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    net = UNet(1 + len(axes), 1, channels=8, multipliers=(1,), head_channels=8, concat_channels=2)
    model = DiffusionModel(net, EDM(), LowRes(Subsample(factor), noise=0.5, level=0.3)).eval()
    low = normal(2, 1, 10, *axes)
    seen: list[Tensor] = []
    net.register_forward_pre_hook(lambda _, args: seen.append(args[2].concat))
    for window in (None, Window(2 * factor, factor), Window(2 * factor, factor, loop=True)):
        part = Generate(model, GRID, Ancestral(1.0), 3, window=window)
        made = part(
            PROMPT, Clip(low, 4.0), shape=(1, 10 * factor, *axes), rate=4.0 * factor, noise=seeded_noise([1, 2])
        )
        assert torch.equal(made.data[:, :, ::factor], low)
        assert made.data[:, :, 1::factor].std() > 0.01
    shown = seen[0]  # what the network sees is noised all the same, and it is told how much
    assert torch.equal(shown[:, 1:], torch.full_like(shown[:, 1:], 0.3))
    error = (shown[:, :1, ::factor] - low).std()
    assert 0.15 < error < 0.5
    assert torch.equal(shown, seen[1])  # one field of noise for all steps


def test_only_what_takes_steps_out_has_steps_to_keep() -> None:
    kept = [Identity(), Subsample(3), Chain([Subsample(2), Subsample(3)]), Chain([Subsample(2), Identity()])]
    assert [part.every for part in kept] == [1, 3, 6, 2]
    mixed = [Pool([2]), Pool([1, 2, 2]), Chain([Subsample(2), Pool([1, 2, 2])]), make("2x4")]
    assert [part.every for part in mixed] == [None] * 4
    for part, clip in ((kept[2], normal(2, 1, 12, 2)), (kept[1], normal(1, 2, 9))):
        assert part.every is not None
        assert torch.equal(part.encode(clip), clip[:, :, :: part.every])


def test_the_edit_of_a_user_and_the_frames_of_the_stage_before_are_both_kept() -> None:
    part = stage([LowRes(Subsample(2))])
    low, clip = normal(2, 3, 4, 4, 4), normal(1, 3, 8, 4, 4, seed=9)
    known = torch.zeros(1, 1, 8, 4, 4, dtype=torch.bool)
    known[:, :, 3, :2] = known[:, :, 4, 2:] = True
    made = part(
        PROMPT, Clip(low, 4.0), shape=(3, 8, 4, 4), rate=8.0, noise=seeded_noise([1, 2]), edit=Edit(clip, known=known)
    )
    assert torch.equal(made.data[:, :, 3, :2], clip[:, :, 3, :2].expand(2, -1, -1, -1))
    assert torch.equal(made.data[:, :, 4, 2:], clip[:, :, 4, 2:].expand(2, -1, -1, -1))  # the user's goes first
    assert torch.equal(made.data[:, :, 4, :2], low[:, :, 2, :2])
    assert torch.equal(made.data[:, :, [0, 2, 6]], low[:, :, [0, 1, 3]])


class Shown(nn.Module):
    """A backbone that returns the low-resolution clip it is shown, or without one the time of every step in seconds."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate, self.weight = rate, nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, c_noise: Tensor, cond: Any = None) -> Tensor:
        if cond is not None:
            return cond.concat[:, : x.shape[1]]
        return (torch.arange(x.shape[2]) / self.rate).view(1, 1, -1, 1, 1).expand_as(x)


@pytest.mark.parametrize("factors", [[2], [4], [2, 2], [3, 2]], ids=str)
def test_frame_times_stay_in_sync_through_the_stages(factors: list[int]) -> None:
    """A clip that shows its own time still does after interpolation and super-resolution: frame j at j / rate."""
    rate = 4.0
    stages: dict[str, Any] = {"base": Generate(DiffusionModel(Shown(rate), X0()).eval(), GRID, DPMpp2M(), 2)}
    for place, factor in enumerate(factors):
        low = LowRes(Subsample(factor), level=0.0)
        stages[f"between {place}"] = Generate(DiffusionModel(Shown(0), X0(), low).eval(), GRID, DPMpp2M(), 2)
        rate *= factor
    up = LowRes(Pool([1, 2, 2]), level=0.0)
    stages["up"] = Generate(DiffusionModel(Shown(0), X0(), up).eval(), GRID, DPMpp2M(), 2)
    length = 8 * round(rate / 4)
    clips: dict[str, Clip] = {}
    whole = Cascade(stages, (1, length, 8, 8), rate)
    made = whole({"caption": ["x"]}, noise=seeded_noise([0]), watch=clips.__setitem__)
    assert made.rate == rate
    shown_s, due_s = made.data.mean(dim=(0, 1, 3, 4)), torch.arange(length) / rate
    last = length - round(rate / 4)  # behind the last frame of the base nothing is known: it is held
    torch.testing.assert_close(shown_s[: last + 1], due_s[: last + 1], rtol=0, atol=1e-5)
    assert list(clips) == list(stages)
    for clip in clips.values():  # frame k of a low clip is frame k * (rate / its rate) of the last
        step = round(rate / clip.rate)
        torch.testing.assert_close(clip.data.mean(dim=(0, 1, 3, 4)), shown_s[::step], rtol=0, atol=1e-5)


# Parts of a cascade


def test_a_cascade_stops_after_any_stage_with_the_clip_of_that_stage() -> None:
    for kind, names in (("pixels", ["base", "between", "up"]), ("causal", ["base", "decode"])):
        cascade = CASCADES[kind]()
        clips: dict[str, Clip] = {}
        cascade(PROMPT, noise=seeded_noise([1, 2]), watch=clips.__setitem__)
        for name in names:
            part = cascade.until(name)
            made = part(PROMPT, noise=seeded_noise([1, 2]))
            assert torch.equal(made.data, clips[name].data), (kind, name)
            assert made.rate == clips[name].rate == part.rate
    with pytest.raises(ValueError, match="there is no stage 'middle'; the cascade has base, between, up"):
        pixels().until("middle")
    short = pixels().until("between")(PROMPT, noise=seeded_noise([1, 2]), shape=(3, 5, 8, 8))
    assert short.data.shape == (2, 3, 5, 8, 8)


def test_settings_of_one_stage() -> None:
    cascade = pixels().with_stage("up", steps=5, sampler=Ancestral())
    assert [stage.steps for stage in cascade.stages.values()] == [2, 2, 5]  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="stage 'decode' is a Decode, which has no steps"):
        causal().with_stage("decode", steps=3)
    with pytest.raises(ValueError, match="no stage 'x'"):
        cascade.with_stage("x", steps=3)


def test_a_lower_frame_rate_leaves_out_stages_then_frames() -> None:
    stages = {"base": stage([]), "between": stage([LowRes(Subsample(2))]), "more": stage([LowRes(Subsample(2))])}
    cascade = Cascade(stages, (3, 16, 4, 4), 16.0, multiple=4)
    full = cascade(PROMPT, noise=seeded_noise([1, 2])).data
    for rate, names, every in ((16, 3, 1), (8, 2, 1), (4, 1, 1), (2, 1, 2), (16 / 3, 3, 3)):
        part, kept = cascade.at(rate)
        assert (len(part.stages), kept) == (names, every)
        assert part.rate / kept == pytest.approx(rate)
        made = part(PROMPT, noise=seeded_noise([1, 2])).data[:, :, ::kept]
        if rate != 16 / 3:
            assert torch.equal(made, full[:, :, :: round(16 / rate)]), "the frames are those of the whole cascade"
    up, every = pixels().at(4.0)  # the last stage works on frames that the stage before adds
    assert (len(up.stages), every) == (3, 2)
    for rate in (32.0, 7.0):
        with pytest.raises(ValueError, match=rf"{rate:g} steps per second cannot be made: .* \(16, 8, 5.333, 4, ...\)"):
            cascade.at(rate)


def test_chunks_of_latents_decode_to_what_the_whole_does() -> None:
    autoencoder = make("2x4", channels=3)
    latents = Clip(normal(2, 3, 9, 4, 4), 4.0)
    lengths: list[int] = []
    stream = type(autoencoder).decode_stream

    def listening(self: Any, pieces: Any) -> Any:
        return stream(self, (lengths.append(piece.shape[2]) or piece for piece in pieces))

    settings: dict[str, Any] = {"shape": (3, 17, 16, 16), "rate": 8.0, "noise": seeded_noise([1, 2])}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(autoencoder), "decode_stream", listening)
        parts = Decode(autoencoder, chunk=2)(PROMPT, latents, **settings).data
    assert lengths == [2, 2, 2, 2, 1] * 2  # one clip after the other
    torch.testing.assert_close(parts, autoencoder.decode(latents.data), rtol=0, atol=1e-5)
    chained = Chain([Subsample(1), autoencoder])
    torch.testing.assert_close(Decode(chained, chunk=2)(PROMPT, latents, **settings).data, parts, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="chunk=0 must be 1 or more latent steps"):
        Decode(autoencoder, chunk=0)


# What else a model may be conditioned on


def test_a_rate_and_a_duration_are_those_of_what_one_call_sees() -> None:
    """In the units of training: steps per second of the data, latents or not, and seconds of the clip."""
    numbers: list[Conditioner] = [Number("rate", 8, 1, 40), Number("duration_s", 8, 0.1, 40)]
    autoencoder = Chain([Subsample(2), Pool([1, 2, 2])])
    base = stage([*numbers, Given([])], autoencoder=autoencoder)
    low = stage([*numbers, LowRes(autoencoder)], guidance=1.0)
    whole = Cascade({"base": base, "up": low}, (3, 16, 8, 8), 8.0)
    seen: dict[str, list[Any]] = {"rate": [], "duration_s": []}
    for part in numbers:
        part.register_forward_pre_hook(lambda part, args: seen[part.key].append(args[0][part.key].tolist()))  # type: ignore[operator, union-attr, index]
    whole(PROMPT, noise=seeded_noise([1, 2]))
    assert all(value == [8.0, 8.0] for value in seen["rate"])
    assert all(value == [2.0, 2.0] for value in seen["duration_s"])
    seen["duration_s"].clear()
    whole(PROMPT, noise=seeded_noise([1, 2]), shape=(3, 12, 8, 8))
    assert all(value == [1.5, 1.5] for value in seen["duration_s"])
    seen["duration_s"].clear()
    whole.with_base(window=Window(4, 2))({**PROMPT}, noise=seeded_noise([1, 2]), shape=(3, 32, 8, 8))
    assert {tuple(value) for value in seen["duration_s"]} == {(1.0, 1.0), (4.0, 4.0)}  # a window's, and the whole's
    seen["duration_s"].clear()
    asked = {**PROMPT, "duration_s": [3.0, 1.0]}
    whole.until("base")(asked, noise=seeded_noise([1, 2]))
    assert seen["duration_s"][0] == [3.0, 1.0]
    made = [whole.at(rate)[0](PROMPT, noise=seeded_noise([1, 2])) for rate in (8.0, 12.5)]
    assert [clip.rate for clip in made] == [8.0, 12.5]
    assert not torch.allclose(made[0].data, made[1].data, atol=1e-4)
    with pytest.raises(ValueError, match=r"80 steps per second cannot be made: .* or 1..40, which its models"):
        whole.at(80.0)


def test_a_reference_is_seen_by_every_stage_that_reads_one() -> None:
    part = Reference(3, 8, (4, 4), steps=2)
    whole = Cascade(
        {"base": stage([part]), "up": stage([LowRes(Chain([Subsample(2), Pool([1, 2, 2])]))])}, (3, 8, 16, 16), 8.0
    )
    base: Any = whole.first
    tokens: list[Tensor] = []
    base.model.denoiser.backbone.register_forward_pre_hook(lambda _, args: tokens.append(args[2].tokens))
    picture, other = normal(1, 3, 1, 16, 16), normal(1, 3, 20, 16, 16, seed=3)
    plain, by_picture, by_clip = (
        whole({**PROMPT, **given}, noise=seeded_noise([1, 2])).data
        for given in ({}, {"reference": picture}, {"reference": other})
    )
    assert (plain - by_picture).abs().mean() > 1e-4
    assert (by_picture - by_clip).abs().mean() > 1e-4
    low = Chain([Subsample(2), Pool([1, 2, 2])]).encode(picture.expand(-1, -1, 8, -1, -1))
    expected = part.eval()({"caption": [""], "reference": low}).tokens
    assert expected is not None
    errors = [(shown[:, -8:] - expected).abs().amax(dim=(1, 2)).min() for shown in tokens if shown.shape[1] > 8]
    assert min(errors) < 1e-5, "in the space of the stage"
    with pytest.raises(ValueError, match="no model of the cascade reads a reference"):
        pixels()({**PROMPT, "reference": normal(1, 3, 1, 16, 16)}, noise=seeded_noise([1, 2]))
    with pytest.raises(ValueError, match=r"the reference has shape \(1, 3, 1, 8, 8\), but a clip of \(3, 8, 16, 16\)"):
        whole({**PROMPT, "reference": normal(1, 3, 1, 8, 8)}, noise=seeded_noise([1, 2]))


@pytest.mark.parametrize(("patch", "axes"), [((), ()), ((2,), (6,)), ((2, 3), (4, 6))], ids=str)
def test_a_reference_is_a_bag_of_patches_or_one_empty_token(patch: tuple[int, ...], axes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    part = Reference(2, 8, patch, steps=3, dropout=0.5)
    part.empty.data.normal_()
    clip = normal(40, 2, 9, *axes)
    cells = 1
    for size, side in zip(axes, patch, strict=True):
        cells *= size // side
    shown = part.eval()({"reference": clip})
    assert shown.tokens is not None
    assert shown.tokens.shape == (40, 3 * cells, 8)
    assert torch.equal(shown.tokens, part({"reference": clip[:, :, [0, 4, 8]]}).tokens)  # type: ignore[arg-type]
    null = part({"latents": clip})
    assert null.tokens is not None
    assert torch.equal(null.tokens, part.empty.expand(40, 1, 8))
    generators = [torch.Generator().manual_seed(i) for i in range(40)]
    drawn = part.train()({"latents": clip}, generators)  # in training, steps of the clip itself, and some dropped
    assert drawn.tokens is not None
    assert drawn.mask is not None
    gone = ~drawn.mask.all(dim=1) | (drawn.tokens == part.empty).all(dim=2).all(dim=1)
    assert 8 <= int(gone.sum()) <= 32
    assert torch.equal(drawn.tokens[gone][:, 0], part.empty.expand(int(gone.sum()), 8))
    own = part.eval()({"reference": clip}).tokens
    every = Reference.tokens(part, clip).unflatten(1, (9, cells))
    for item in torch.where(~gone)[0].tolist():
        for step in drawn.tokens[item].unflatten(0, (3, cells)):
            assert (every[item] - step).abs().flatten(1).amax(1).min() < 1e-5, "a step of the item's own clip"
    assert own is not None
    drawn.tokens.sum().backward()
    assert part.empty.grad is not None
    assert all(p.grad is not None for p in part.net.parameters())
    with pytest.raises(ValueError, match="steps=0 must be 1 or more"):
        Reference(2, 8, patch, steps=0)
