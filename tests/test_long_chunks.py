"""Clips longer than a model's own, chunk after chunk: the law against closed forms, and latents never made twice."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmdiff.autoencoder import Autoencoder, Pool
from mmdiff.backbones import UNet
from mmdiff.cascade import Cascade, Decode, Generate
from mmdiff.conditioning import Hint, Join, Number
from mmdiff.config import build
from mmdiff.editing import Chunks, Edit, Window, extend
from mmdiff.given import Ends, Given
from mmdiff.model import DiffusionModel
from mmdiff.precond import EDM
from mmdiff.sampling import Ancestral, DPMpp2M, Heun, seeded_noise
from mmdiff.sigmas import Karras
from tests.edit_oracles import CASCADES, GRID, ar1, correlated, distance, normal, stage

LONG = 80
PROMPT = {"caption": ["x", "y"]}


def check_covered(chunks: Chunks, given: Tensor) -> list[int]:
    """The chunks' starts, each of which finds its context known and something to make; together they make all."""
    done, total = given.clone(), len(given)
    starts = chunks.starts(given)
    for first in starts:
        place = slice(first, min(first + chunks.length, total))
        assert 0 <= first <= max(0, total - chunks.length)
        assert not done[place].all()
        missing = first + int((~done[place]).nonzero()[0])
        assert done[:missing].all()  # nothing before is left out
        assert missing - first >= min(chunks.context, missing)
        done[place] = True
    assert done.all()
    return starts


@pytest.mark.parametrize(("length", "context"), [(8, 4), (8, 1), (8, 7), (5, 2)])
def test_chunks_cover_every_length_and_every_mask_in_order(length: int, context: int) -> None:
    chunks = Chunks(length, context)
    generator = torch.Generator().manual_seed(length + context)
    for total in range(1, 40):
        starts = check_covered(chunks, torch.zeros(total, dtype=torch.bool))
        assert len(starts) == 1 + max(0, -((length - total) // (length - context)))  # no more than needed
        check_covered(chunks, torch.rand(total, generator=generator) < 0.5)
        check_covered(chunks, torch.arange(total) < total // 2)
        assert chunks.starts(torch.ones(total, dtype=torch.bool)) == []


def law(chunks: Chunks, way: str, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Exact mean (T,) and covariance (T, T) of clips made by the denoiser of `chunks.length` steps of an AR(1).

    Each chunk is affine in its noise and in what it knows: unit vectors of the noise of all chunks go through at once.
    """
    denoise, sigmas = correlated(ar1(chunks.length, 0.8)), Karras(0.01, 80.0)(48)
    known = torch.zeros(LONG, dtype=torch.bool) if given is None else given != 0
    count = len(chunks.starts(known))
    noises = torch.eye(count * chunks.length, dtype=torch.float64).view(-1, count, chunks.length)
    noises = torch.cat([torch.zeros_like(noises[:1]), noises])

    def make(edit: Edit, number: int, of: int) -> Tensor:
        assert of == count
        x, rest = edit.start(noises[:, None, number, :], sigmas)
        bound = edit.keep_steps(denoise) if way == "per step" else denoise
        return edit.paste(Heun()(edit.keep(bound), x, rest, torch.zeros_like))

    clip = torch.zeros(1, 1, LONG, dtype=torch.float64) if given is None else given.view(1, 1, LONG)
    out = chunks(make, Edit(clip, known=known.view(1, 1, LONG)))[:, 0]
    linear = (out[1:] - out[0]).mT
    return out[0], linear @ linear.mT


@pytest.mark.parametrize(("length", "context"), [(8, 4), (8, 1), (16, 8)])
def test_ten_times_the_length_has_the_law_of_the_process(length: int, context: int) -> None:
    """By known steps at level 0: 80 x 80 covariances are right within 0.015 (measured 0.011), and no mean drifts."""
    mean, covariance = law(Chunks(length, context), "per step")
    assert distance(covariance, ar1(LONG, 0.8)) < 0.015
    assert distance(mean, torch.zeros(LONG)) < 1e-9


def test_a_given_past_goes_on_by_the_conditional_law_and_replacement_only_nearly() -> None:
    given = torch.where(torch.arange(LONG) < 6, 2.0, 0.0).double()
    ahead = torch.arange(1, LONG - 5, dtype=torch.float64)
    errors = {}
    for way in ("per step", "replacement"):
        mean, covariance = law(Chunks(8, 4), way, given)
        assert torch.equal(mean[:6], given[:6])
        variance = distance(covariance.diagonal()[6:], 1 - 0.8 ** (2 * ahead))
        errors[way] = max(distance(mean[6:], 2.0 * 0.8**ahead), variance)
    assert errors["per step"] < 0.03
    assert errors["replacement"] > 5 * errors["per step"]


# In a stage


def seen_by(part: Generate) -> list[Tensor]:
    """What the network is given from now on, x after x."""
    seen: list[Tensor] = []
    part.model.denoiser.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    return seen


@pytest.mark.parametrize("sampler", [Ancestral(1.0), DPMpp2M()], ids=repr)
def test_a_stage_makes_ten_times_its_length_by_calls_of_its_own_length(sampler: Any) -> None:
    part = stage(3, 3, sampler=sampler, window=Chunks(8, 3))
    seen, progress = seen_by(part), []
    shape = (3, 80, 4, 4)
    made = part(
        PROMPT, shape=shape, rate=8.0, noise=seeded_noise([1, 2]), progress=lambda *step: progress.append(step)
    ).data
    assert made.shape == (2, *shape)
    assert {tuple(x.shape) for x in seen} == {(2, 3, 8, 4, 4)}
    assert progress == [(i + 1, 4 * 16) for i in range(4 * 16)]  # 16 chunks: 8 steps, then 5 more each
    plain = replace(part, window=None)
    first = plain(PROMPT, shape=(3, 8, 4, 4), rate=8.0, noise=seeded_noise([1, 2])).data
    assert torch.equal(made[:, :, :8], first)  # nothing later changes the first chunk
    second = plain(
        PROMPT, shape=(3, 8, 4, 4), rate=8.0, noise=after([1, 2], seen, part),
        edit=Edit(first.roll(3, 2), known=(torch.arange(8) < 3).view(1, 1, 8, 1, 1)),
    ).data  # fmt: skip
    torch.testing.assert_close(made[:, :, 5:13], second, rtol=1e-4, atol=1e-5)


def after(seeds: list[int], seen: list[Tensor], part: Generate) -> Any:
    """Noise as it is once the first chunk has taken its own."""
    noise = seeded_noise(seeds)
    part.sampler(lambda x, _: x, noise(seen[0]), GRID(4), noise)
    return noise


def test_a_clip_of_one_chunk_is_what_the_stage_makes_without() -> None:
    for kind, cascade in ((kind, make()) for kind, make in CASCADES.items()):
        length = cascade.plan(tuple(cascade.shape), cascade.rate)[0][0][1]
        for settings in ({}, {"per_step": True}):
            whole, parts = (
                cascade.with_base(**settings, window=window)(PROMPT, noise=seeded_noise([1, 2])).data
                for window in (None, Chunks(length, 1))
            )
            assert torch.equal(whole, parts), kind


def test_what_is_known_comes_back_wherever_it_is_and_strength_counts() -> None:
    part = stage(2, 1, window=Chunks(8, 3))
    clip = 0.3 * normal(1, 1, 40, 4)
    known = torch.rand(1, 1, 40, 4, generator=torch.Generator().manual_seed(3)) < 0.3
    known[:, :, 20:23] = True

    def made(edit: Edit | None) -> Tensor:
        return part(PROMPT, shape=(1, 40, 4), rate=8.0, noise=seeded_noise([1, 2]), edit=edit).data

    got, where = made(Edit(clip, known=known)), known.expand(2, -1, -1, -1)
    assert torch.equal(got[where], clip.expand_as(got)[where])
    loud = made(Edit(2 * clip, known=known))
    assert distance(loud[~where], got[~where]) > 1e-3
    noisy = torch.where(known, clip, 5 * normal(1, 1, 40, 4, seed=9))
    assert torch.equal(made(Edit(noisy, known=known)), got)  # what is not known never leaks
    near, far = (distance(made(Edit(clip, strength))[:, :, -8:], clip[:, :, -8:]) for strength in (0.25, 1.0))
    assert near < 0.5 * far


class Conditions(nn.Module):
    """A backbone that keeps what it is conditioned on."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.5))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, c_noise: Tensor, cond: Any) -> Tensor:
        self.seen.append(cond.concat)
        return self.gain * x


def test_a_model_of_given_parts_is_shown_the_end_of_the_chunk_before() -> None:
    net = Conditions()
    model = DiffusionModel(net, EDM(), Given([Ends(share=0.5, first=(3, 3))])).eval()
    part = Generate(model, GRID, Ancestral(), 2, window=Chunks(8, 3))
    made = part(PROMPT, shape=(1, 18), rate=8.0, noise=seeded_noise([1, 2])).data
    assert (net.seen[0] == 0).all()
    for first, concat in ((5, net.seen[2]), (10, net.seen[4])):
        assert concat[0, 0].tolist() == [1.0] * 3 + [0.0] * 5
        assert torch.equal(concat[:, 1:, :3], made[:, :, first : first + 3])
        assert (concat[:, 1:, 3:] == 0).all()


def test_a_chunk_is_told_its_own_duration() -> None:
    number = Number("duration_s", 8, 0.1, 10.0)
    told: list[float] = []
    number.register_forward_pre_hook(lambda _, args: told.append(float(args[0]["duration_s"][0])))
    net = UNet(1, 1, channels=8, multipliers=(1, 1), head_channels=8, vector_width=8)
    part = Generate(DiffusionModel(net, EDM(), number).eval(), GRID, Ancestral(), 1, window=Chunks(8, 4))
    for prompt in ({"caption": ["x"]}, {"caption": ["x"], "duration_s": [10.0]}):
        part(prompt, shape=(1, 80), rate=8.0, noise=seeded_noise([1]))
    assert told == pytest.approx([1.0] * len(told))


# In a cascade


class Dull(Autoencoder):
    """Twice the steps, and a tenth darker on every way there and back; counts its ways."""

    latent_channels = None
    factors = (2,)

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.ways = Pool([2]), {"there": 0, "back": 0}

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.pool.latent_shape(shape)

    def encode(self, x: Tensor) -> Tensor:
        self.ways["there"] += 1
        return self.pool.encode(x)

    def known(self, mask: Tensor) -> Tensor:
        return self.pool.known(mask)

    def decode(self, z: Tensor) -> Tensor:
        self.ways["back"] += 1
        return 0.9 * self.pool.decode(z)


class Holds(nn.Module):
    """A denoiser whose estimate of every step is the first one that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, c_noise: Tensor, cond: Any = None) -> Tensor:
        sigma = (4 * c_noise[:1]).exp()
        scale = torch.hypot(sigma, torch.tensor(0.5))
        seen = x * scale  # c_in and c_skip undone
        return (seen[:, :, :1].expand_as(x) - seen * 0.25 / scale**2) / (0.5 * sigma / scale) * self.one


def test_a_continuation_is_encoded_and_decoded_once_so_that_nothing_fades() -> None:
    dull = Dull()
    base = Generate(DiffusionModel(Holds(), EDM(sigma_data=0.5)).eval(), GRID, Ancestral(), 3)
    cascade = Cascade({"base": base, "out": Decode(dull)}, (1, 16), 8.0, 2)
    longer = extend(cascade, PROMPT, torch.ones(1, 1, 16), 144, noise=seeded_noise([1, 2])).data
    assert dull.ways == {"there": 1, "back": 2}  # once for each of the two clips
    assert torch.equal(longer[:, :, :16], torch.ones(2, 1, 16))
    torch.testing.assert_close(longer[:, :, 16:], torch.full((2, 1, 144), 0.9), rtol=0, atol=0.03)  # not 0.9**18


def test_a_continuation_looks_at_what_is_given_whatever_windows_the_first_stage_has() -> None:
    """Windows without overlap see nothing of the given clip; chunks and rolling, where a stage has them, stay."""
    cascade = CASCADES["video"]()
    clip = 0.3 * normal(1, *cascade.shape)

    def continued(by: Cascade, clip: Tensor, **settings: Any) -> Tensor:
        return extend(by, PROMPT, clip, 8, noise=seeded_noise([1, 2]), **settings).data[:, :, 8:]

    plain = continued(cascade, clip)
    windows = cascade.with_base(window=Window(4, 0))
    assert torch.equal(continued(windows, clip), plain)
    assert distance(continued(windows, 2 * clip), plain) > 1e-3
    chunks = cascade.with_base(window=Chunks(4, 1))
    assert distance(continued(chunks, clip), plain) > 1e-3
    assert torch.equal(continued(chunks, clip, context=7), continued(chunks, clip))


def test_chunks_and_windows_bound_what_every_stage_of_a_continuation_sees() -> None:
    cascade = CASCADES["video"]()
    seen = {name: seen_by(part) for name, part in cascade.stages.items() if isinstance(part, Generate)}
    longer = extend(cascade, PROMPT, 0.3 * normal(1, *cascade.shape), 72, noise=seeded_noise([1, 2]))
    assert longer.data.shape == (2, 3, 80, 8, 8)
    assert {name: {x.shape[2] for x in inputs} for name, inputs in seen.items()} == {"base": {4}, "up": {8}}


def test_settings_that_cannot_be_are_refused_and_the_others_are_lines_of_yaml() -> None:
    for context in (0, 8):
        with pytest.raises(ValueError, match=rf"context={context} must lie in 1..length-1=7"):
            Chunks(8, context)
    assert build({"class_path": "mmdiff.editing.Chunks", "init_args": {"length": 8, "context": 3}}) == Chunks(8, 3)
    with pytest.raises(ValueError, match=r"window=Chunks cannot cut a low-resolution clip or a hint; use .*Window"):
        CASCADES["waveform"]().with_stage("up", window=Chunks(8, 4))
    hinted = DiffusionModel(UNet(1, 1, channels=8, multipliers=(1, 1), concat_channels=1), EDM(), Join([Hint()])).eval()
    with pytest.raises(ValueError, match="window=Chunks cannot cut a low-resolution clip or a hint"):
        Generate(hinted, GRID, Ancestral(), window=Chunks(8, 4))
    assert Generate(hinted, GRID, Ancestral(), window=Window(8, 4)).window == Window(8, 4)
