"""Given parts of a clip: what the masks may be, that they count in no loss, and one model that learns a mix of them."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmdiff.backbones import UNet
from mmdiff.cascade import Clip, Generate
from mmdiff.conditioning import Join, LowRes, Text
from mmdiff.config import build
from mmdiff.density import LogNormal
from mmdiff.editing import Edit, Window
from mmdiff.given import Box, Ends, Every, Given, Part, Steps
from mmdiff.model import DiffusionModel
from mmdiff.module import DiffusionModule
from mmdiff.precond import EDM, X0
from mmdiff.sampling import Ancestral, DPMpp2M, seeded_noise
from mmdiff.sigmas import Karras
from mmdiff.text import ByteTransformer
from mmdiff.weighting import EDM as EDMWeighting
from tests.edit_oracles import normal

PARTS: dict[str, Part] = {
    "first frame": Ends(share=1.0),
    "first and last": Ends(share=1.0, last=(1, 1)),
    "last alone": Ends(share=1.0, first=(0, 0), last=(1, 3)),
    "continuation": Ends(share=1.0, first=(2, 5)),
    "any": Steps(share=1.0, most=1.0),
    "interpolation": Every(share=1.0),
    "inpainting": Box(share=1.0),
    "whole box": Box(share=1.0, size=(1.0, 1.0)),
    "outpainting": Box(share=1.0, outside=True),
    "box in time": Box(share=1.0, along_time=True),
    "outside in time": Box(share=1.0, outside=True, along_time=True),
}
SIZES = [(8, 6, 6), (2, 2, 2), (7, 5), (12,), (1, 4, 4), (1,)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", PARTS)
def test_every_part_leaves_something_to_generate(name: str, sizes: tuple[int, ...]) -> None:
    draw = generator()
    for _ in range(40):
        mask = PARTS[name].mask(sizes, draw)
        assert mask.dtype == torch.bool
        assert not mask.expand(sizes).all(), "nothing is left to generate"


def shares(name: str, sizes: tuple[int, ...] = (8, 8, 8), count: int = 200) -> list[Tensor]:
    draw = generator(3)
    return [PARTS[name].mask(sizes, draw).expand(sizes) for _ in range(count)]


def test_parts_are_what_they_say() -> None:
    def steps(mask: Tensor) -> list[bool]:
        assert (mask.flatten(1).all(1) == mask.flatten(1).any(1)).all(), "a step is given whole or not at all"
        return mask.flatten(1).all(1).tolist()

    assert all(steps(m) == [True] + [False] * 7 for m in shares("first frame"))
    assert all(steps(m) == [True] + [False] * 6 + [True] for m in shares("first and last"))
    assert {steps(m).count(True) for m in shares("last alone")} == {1, 2, 3}
    assert all(steps(m)[-1] and not steps(m)[0] for m in shares("last alone"))
    assert {tuple(steps(m)) for m in shares("continuation")} == {(True,) * n + (False,) * (8 - n) for n in range(2, 6)}
    strides = {2: [0, 2, 4, 6], 3: [0, 3, 6], 4: [0, 4]}
    found = {tuple(i for i, given in enumerate(steps(m)) if given) for m in shares("interpolation")}
    assert found == {tuple(places) for places in strides.values()}
    counts = [steps(m).count(True) for m in shares("any", count=600)]
    assert {0, 7} <= set(counts) <= set(range(8))
    assert abs(sum(counts) / 600 - 7 / 2) < 0.35  # each of the 7 that are not kept back with probability 1/2 on average


def test_boxes_have_their_sizes_and_lie_anywhere() -> None:
    inside = [~m for m in shares("inpainting")]
    for box in inside:
        assert (box == box[:1]).all(), "the same at all times"
        height, width = box[0].any(1).sum().item(), box[0].any(0).sum().item()
        assert box[0].sum() == height * width, "a box"
        assert 2 <= height <= 6
        assert 2 <= width <= 6
    assert torch.stack(inside).any(0).all(), "everywhere sometimes"
    for box in shares("outpainting"):
        assert 2 <= box[0].any(1).sum() <= 6
        assert (box == box[:1]).all()
    lengths = {(~m).flatten(1).any(1).sum().item() for m in shares("box in time")}
    assert lengths == {2, 3, 4, 5, 6}


def test_a_mask_is_its_generators_alone() -> None:
    state = torch.get_rng_state()
    for part in PARTS.values():
        a, b, c = (part.mask((16, 16, 16), generator(seed)) for seed in (1, 1, 2))
        assert torch.equal(a, b)
        if isinstance(part, (Steps, Box)) and part != PARTS["whole box"]:
            assert not torch.equal(a, c)
    given = Given([Ends(share=0.5), Box(share=0.5)]).train()
    clip = normal(4, 2, 8, 4, 4)
    both = [given({"latents": clip}, [generator(s) for s in (1, 2, 3, 4)]).concat for _ in range(2)]
    assert both[0] is not None
    assert both[1] is not None
    assert torch.equal(both[0], both[1])
    alone = given({"latents": clip[2:3]}, [generator(3)]).concat
    assert alone is not None
    assert torch.equal(alone[0], both[0][2])  # an item's is its own, whatever its neighbours
    assert torch.equal(torch.get_rng_state(), state)


def test_shares_are_shares_of_the_items() -> None:
    given = Given([Ends(share=0.2), Ends(share=0.3, first=(3, 3))]).train()
    cond = given({"latents": torch.zeros(2000, 1, 4)}, [generator(i) for i in range(2000)])
    assert cond.known is not None
    counts = cond.known[:, 0].sum(1).bincount(minlength=4) / 2000
    for count, share in ((0, 0.5), (1, 0.2), (3, 0.3)):
        assert abs(counts[count] - share) < 4 * math.sqrt(share * (1 - share) / 2000), (count, counts)


def test_the_condition_shows_what_is_given_and_nothing_else() -> None:
    clip = normal(2, 3, 6, 4, 4)
    known = torch.rand(1, 1, 6, 4, 4, generator=generator()) < 0.5
    given = Given([]).eval()
    cond = given({"given": clip, "known": known})
    assert cond.concat is not None
    assert cond.concat.shape == (2, 4, 6, 4, 4)
    assert torch.equal(cond.concat[:, :1], known.expand(2, -1, -1, -1, -1).float())
    assert torch.equal(cond.concat[:, 1:], clip * known)
    secret = torch.where(known, clip, 9.0)
    assert torch.equal(given({"given": secret, "known": known}).concat, cond.concat)  # type: ignore[arg-type]
    kept = given.null({"given": clip, "known": known}).concat
    assert torch.equal(kept, cond.concat)  # type: ignore[arg-type]
    nothing = given({"latents": clip})
    assert nothing.concat is not None
    assert nothing.concat.count_nonzero() == 0


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Ends(share=1.5), r"share=1.5 of Ends must lie in 0..1"),
        (lambda: Ends(share=0.1, first=(3, 2)), r"first=\[3, 2\] must be two rising numbers"),
        (lambda: Ends(share=0.1, first=(0, 0)), "gives nothing; leave the part out"),
        (lambda: Steps(share=0.1, most=0.0), r"most=0.0 must be a probability above 0"),
        (lambda: Every(share=0.1, steps=(1, 2)), r"steps=\[1, 2\] must be two rising numbers from 2 up"),
        (lambda: Box(share=0.1, size=(0.0, 0.5)), r"size=\[0.0, 0.5\] must be two rising shares"),
        (lambda: Given([Ends(share=0.6), Box(share=0.6)]), r"shares of the parts, \[0.6, 0.6\], add up to more than 1"),
    ],
)
def test_parts_that_cannot_be_are_refused(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


# In the loss


class Constant(nn.Module):
    """A backbone whose output is its weight, so that the gradient says which elements the loss reads."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.out = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor, c_noise: Tensor, cond: Any = None) -> Tensor:
        return self.out.expand_as(x)


def module_of(backbone: nn.Module, conditioner: Any, **settings: Any) -> DiffusionModule:
    return DiffusionModule(DiffusionModel(backbone, X0(), conditioner), LogNormal(0.0, 1.0), **settings).train()


def test_what_is_given_counts_in_no_loss() -> None:
    """Also in sum with steps that a low-resolution clip has, and with padding."""
    shape = (1, 2, 8, 4, 4)
    given, low = Given([Box(share=1.0)]), LowRes(build_subsample())
    for conditioner in (given, low, Join([given, low])):
        module = module_of(Constant(shape), conditioner)
        batch = {"x": normal(*shape), "mask": torch.arange(8)[None] < 7}
        module.losses(batch, (0, 0))["loss"].backward()
        cond = conditioner.train()({"latents": batch["x"]}, [seeded(module, 0, 0)])
        assert cond.known is not None
        read = module.model.denoiser.backbone.out.grad != 0  # type: ignore[union-attr]
        expected = ~cond.known & batch["mask"][:, None, :, None, None]
        assert torch.equal(read, expected.expand(shape))
        assert expected.any()


def build_subsample() -> Any:
    return build({"class_path": "mmdiff.autoencoder.Subsample", "init_args": {"factor": 2}})


def seeded(module: DiffusionModule, *key: int) -> torch.Generator:
    from mmdiff.module import seeded as make

    first = make(module.seed, *key, 0)
    torch.randn(2, 8, 4, 4, generator=first)  # an item's noise is drawn before its condition
    return first


def test_the_loss_is_the_mean_over_what_is_left() -> None:
    clip = normal(2, 1, 8)
    module = module_of(Constant((2, 1, 8)), Given([Ends(share=1.0, first=(4, 4))]))
    losses = module.losses({"x": clip}, (0, 0))
    torch.testing.assert_close(losses["items"], clip[:, 0, 4:].square().mean(1))  # X0's target is x0, the output 0


# In a model


@pytest.fixture(scope="module")
def trained() -> DiffusionModel:
    """One model of clips that have one random level at all times, taught with a mix of parts."""
    torch.manual_seed(0)
    parts: list[Part] = [
        Ends(share=0.3),
        Ends(share=0.2, first=(0, 0), last=(1, 1)),
        Steps(share=0.2),
        Every(share=0.1),
    ]
    net = UNet(1, 1, channels=16, multipliers=(1,), head_channels=16, attend=[[[0]]], concat_channels=2)
    module = DiffusionModule(DiffusionModel(net, EDM(), Given(parts)), LogNormal(0.0, 1.5), weighting=EDMWeighting(1.0))
    module.train()
    optimizer = torch.optim.Adam(module.parameters(), 3e-3)
    for step in range(150):
        level = torch.randn(64, 1, 1, generator=generator(step))
        loss = module.losses({"x": level.expand(-1, -1, 8)}, (0, step))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return module.model.eval()


@pytest.mark.parametrize("places", [[0], [7], [0, 7], [0, 2, 4, 6], [3]], ids=str)
def test_one_checkpoint_does_every_task_that_it_was_taught(places: list[int], trained: DiffusionModel) -> None:
    """Given one step of a constant clip, the others are what it is: within 0.2, where without it they spread by 1."""
    stage = Generate(trained, Karras(0.02, 20), Ancestral(), steps=12)
    level = torch.linspace(-1.5, 1.5, 16).view(16, 1, 1)
    known = torch.tensor([t in places for t in range(8)]).view(1, 1, 8)
    settings: dict[str, Any] = {"shape": (1, 8), "rate": 8.0, "noise": seeded_noise(range(16))}
    prompt = {"caption": [""] * 16}
    made = stage(prompt, edit=Edit(level.expand(16, 1, 8), known=known), **settings).data
    assert torch.equal(made[:, :, places], level.expand(16, 1, len(places)))
    assert (made - level).square().mean().sqrt() < 0.2
    free = stage(prompt, **settings).data
    assert free.std() > 0.5
    assert (free - level).square().mean().sqrt() > 0.5


def test_what_is_given_reaches_the_network_of_every_kind_of_stage() -> None:
    """With text and guidance, over windows, and where a low-resolution clip joins it."""
    torch.manual_seed(0)
    clip, known = normal(1, 1, 8, seed=1), (torch.arange(8) < 3).view(1, 1, 8)
    text = Text(ByteTransformer(8, 1, 2))
    for conditioner, channels, low in (
        (Join([text, Given([])]), 2, None),
        (Join([text, LowRes(build_subsample()), Given([])]), 4, Clip(normal(1, 1, 4), 4.0)),
    ):
        net = UNet(1, 1, channels=8, multipliers=(1,), head_channels=8, tokens_width=8, vector_width=8,
                   concat_channels=channels)  # fmt: skip
        model = DiffusionModel(net, EDM(), conditioner).eval()
        seen: list[Tensor] = []
        net.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[2].concat[:, -2:]))
        for window in (None, Window(4, 2)):
            stage = Generate(model, Karras(), DPMpp2M(), 2, guidance=2.0, window=window)
            made = stage(
                {"caption": ["a"]}, low, shape=(1, 8), rate=8.0, noise=seeded_noise([0]), edit=Edit(clip, known=known)
            )
            assert torch.equal(made.data[:, :, :3], clip[:, :, :3])
        whole = torch.cat([known.float(), clip * known], dim=1)
        assert seen
        for concat in seen[:4]:  # two guided calls at once; then windows of it
            assert torch.equal(concat[:1], whole) or concat.shape[2] == 4
        assert torch.equal(seen[-1][:1], whole[:, :, 4:])
