"""The causal video autoencoder: shapes, settings, gradients, and its place in latent diffusion."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmdiff.bottleneck import FSQ, KL, Bottleneck, Tanh
from mmdiff.cascade import Cascade, Clip, Decode, Generate, reduced
from mmdiff.codebook import VQ
from mmdiff.editing import Edit
from mmdiff.model import DiffusionModel
from mmdiff.precond import EDM
from mmdiff.sampling import Ancestral, seeded_noise
from mmdiff.sigmas import Karras
from tests.small_video import STEPS, clip, expect_same, make
from video.autoencoder import CausalVideo

# Shapes


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("cells", [1, 2, 4])
def test_shapes_are_as_promised(name: str, cells: int) -> None:
    model = make(name)
    x = clip(model, cells, 3, 5, batch=2)
    z = model.encode(x)
    assert z.shape == (2, 3, cells, 3, 5) == (2, *model.latent_shape(tuple(x.shape[1:])))
    assert model.decode(z).shape == x.shape
    assert model.reconstruct(x).x.shape == x.shape


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 16, 16, 16), r"T=16 is not 1 \+ a multiple of 4; nearest: 13 or 17"),
        ((2, 4, 16, 16), r"T=4 is not 1 \+ a multiple of 4; nearest: 1 or 5"),
        ((2, 0, 16, 16), r"T=0 is not 1 \+ a multiple of 4; nearest: 1"),
        ((2, 5, 12, 16), "H=12 is not a multiple of 8; nearest: 8 or 16"),
        ((2, 5, 16, 4), "W=4 is not a multiple of 8; nearest: 8"),
        ((3, 5, 16, 16), r"shape=\(3, 5, 16, 16\) is not \(2, T, H, W\)"),
        ((2, 5, 16), r"shape=\(2, 5, 16\) is not \(2, T, H, W\)"),
    ],
)
def test_illegal_sizes_name_the_nearest_legal_ones(shape: tuple[int, ...], message: str) -> None:
    model = make("4x8")
    with pytest.raises(ValueError, match=message):
        model.latent_shape(shape)
    with pytest.raises(ValueError, match=message):
        model.encode(torch.zeros(1, *shape))


def test_what_is_no_latent_is_refused() -> None:
    for shape in ((1, 2, 1, 2, 2), (3, 1, 2, 2)):
        with pytest.raises(ValueError, match=r"\(B, 3, T, H, W\) is needed"):
            make().decode(torch.zeros(shape))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": []}, r"steps=\[\] must be one triple"),
        ({"steps": [[2, 2]]}, r"steps=\[\[2, 2\]\] must be one triple"),
        ({"steps": [[1, 0, 2]]}, r"steps=\[\[1, 0, 2\]\]"),
        ({"widths": [8]}, r"widths=\[8\] must be 2 numbers"),
        ({"frames": [1, 3, 3]}, r"frames=\[1, 3, 3\] must be 2 numbers"),
        ({"frames": [0, 3]}, r"frames=\[0, 3\]"),
        ({"depth": -1}, "depth=-1 not negative"),
        ({"channels": 0}, "channels=0 must be 1 or more"),
        ({"latent_channels": 0}, "latent_channels=0"),
        ({"chunk": 0}, "chunk=0 must be 1 or more frames"),
        ({"tile": [16]}, r"tile=\[16\] must be \(H, W\), multiples of \[4, 4\]"),
        ({"tile": [16, 6]}, r"tile=\[16, 6\]"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**settings)


@pytest.mark.parametrize("setting", [{"depth": 2}, {"frames": [2, 1]}, {"widths": [8, 16]}, {"steps": STEPS["1x4"]}])
def test_every_setting_of_the_networks_changes_them(setting: dict[str, Any]) -> None:
    def sizes(model: nn.Module) -> list[torch.Size]:
        return [p.shape for p in model.parameters()]

    assert sizes(make(**setting)) != sizes(make())


def test_untrained_it_gives_back_what_the_latents_have_room_for() -> None:
    model = CausalVideo(1, 16, [[1, 2, 2], [1, 2, 2]], [8, 12])
    x = torch.randn(1, 1, 3, 8, 12)
    expect_same(model.decode(model.encode(x)), x)
    smooth = torch.linspace(-1, 1, 16).view(1, 1, 1, 1, -1).expand(1, 3, 9, 16, 16)
    few = CausalVideo(3, 4, [[1, 2, 2], [2, 2, 2]], [8, 12])
    assert (few.decode(few.encode(smooth)) - smooth).abs().max() < 0.1
    z = few.reconstruct(smooth, torch.Generator().manual_seed(0)).latents
    assert (z - few.encode(smooth)).abs().max() < 0.1  # the noise of the latents hides nothing


# What stands around it


@pytest.mark.parametrize("name", ["1x4", "2x4", "4x8"])
def test_a_latent_is_known_where_its_own_cell_is(name: str) -> None:
    model = make(name)
    t, h, w = model.factors
    known = torch.rand(2, 1, 4, 3, 2) < 0.6
    frames = known[:, :, [0] + [1 + i // t for i in range(3 * t)]]
    mask = frames.repeat_interleave(h, dim=3).repeat_interleave(w, dim=4)
    assert torch.equal(model.known(mask), known)
    holed = mask.clone()
    holed[:, :, 1 + t - 1, h - 1, 0] = False  # one pixel of the last frame of the second cell
    known[:, :, 1, 0, 0] = False
    assert torch.equal(model.known(holed), known)


def test_latents_have_the_rate_of_whole_cells() -> None:
    assert reduced(make(), (2, 9, 16, 12), 8.0) == ((3, 5, 4, 3), 4.0)
    assert reduced(make("4x8"), (2, 1, 16, 16), 8.0) == ((3, 1, 2, 2), 2.0)


@pytest.mark.parametrize("bottleneck", [KL(), VQ(16, 3), FSQ([5, 4, 3]), Tanh()], ids=lambda b: type(b).__name__)
def test_every_bottleneck_fits(bottleneck: Bottleneck) -> None:
    model = make(bottleneck=bottleneck)
    x = clip(model, 3)
    found = model.train().reconstruct(x, torch.Generator().manual_seed(0))
    (found.x.square().mean() + found.loss).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.encoder.parameters())
    model.eval()
    with torch.no_grad():
        z = model.encode(x)
        y = model.decode(z)
        expect_same(torch.cat([*model.encode_stream(x.split(1, dim=2))], dim=2), z)
        expect_same(torch.cat([*model.decode_stream(z.split(1, dim=2))], dim=2), y)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("frames", [1, 9])
def test_gradients_reach_every_parameter(name: str, frames: int) -> None:
    model = make(name).train()
    x = torch.randn(1, 2, frames, 16, 16)
    found = model.reconstruct(x, torch.Generator().manual_seed(0))
    ((found.x - x).square().mean() + found.loss).backward()
    for parameter, value in model.named_parameters():
        assert value.grad is not None, parameter
        assert value.grad.isfinite().all(), parameter
        assert value.grad.any(), parameter
    assert model.last_weight().grad is not None


@torch.no_grad()
def test_bfloat16_autocast_is_near_float32() -> None:
    model = make("4x8", chunk=8, tile=[16, 16])
    x = clip(model, 4, 4, 4)
    z = model.encode(x)
    with torch.autocast("cpu", torch.bfloat16):
        low = model.encode(x)
        y = model.decode(low)
    assert low.dtype == torch.float32
    assert (low - z).abs().mean() < 0.05 * z.abs().mean()
    assert y.isfinite().all()
    assert y.shape == x.shape


@pytest.mark.parametrize(
    ("name", "settings", "cells"),
    [("2x4", {}, 3), ("4x4 at once", {"chunk": 4, "tile": [4, 4]}, 2)],
    ids=["whole", "parts"],
)
@torch.no_grad()
def test_compiles_without_a_break(name: str, settings: dict[str, Any], cells: int) -> None:
    model = make(name, **settings)
    x = clip(model, cells, 2, 1)
    compiled = torch.compile(lambda x: model.decode(model.encode(x)), backend="aot_eager", fullgraph=True)
    expect_same(compiled(x), model.decode(model.encode(x)))


def test_a_seed_gives_the_same_model_and_the_same_reconstruction() -> None:
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        model = CausalVideo(2, 3, widths=[8, 12])
        x = clip(model, 3)
        made = model.reconstruct(x, torch.Generator().manual_seed(4)).x
        made.square().mean().backward()
        found.append([made, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# In latent diffusion


class Backbone(nn.Module):
    """A network of three channels that does almost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv3d(3, 3, 1)

    def forward(self, x: Tensor, c_noise: Tensor, cond: Any = None) -> Tensor:
        return self.mix(x)


def test_a_cascade_makes_clips_of_any_length_with_it() -> None:
    autoencoder = make("4x8")
    model = DiffusionModel(Backbone(), EDM(), autoencoder=autoencoder).eval()
    stages = {"base": Generate(model, Karras(), Ancestral(), 2), "decode": Decode(autoencoder)}
    cascade = Cascade(stages, (2, 9, 16, 16), rate=8.0, multiple=4, offset=1)
    assert [shape for shape, _ in cascade.plan((2, 9, 16, 16), 8.0)] == [(3, 3, 2, 2), (2, 9, 16, 16)]
    for length in (1, 2, 5, 8, 16):
        made = cascade({"caption": [""]}, noise=seeded_noise([0]), shape=(2, length, 16, 16))
        assert made.data.shape == (1, 2, length, 16, 16)
        assert made.rate == 8.0
    known = torch.arange(9).view(1, 1, -1, 1, 1) < 6
    given = Clip(torch.randn(1, 2, 9, 16, 16), 8.0)
    made = cascade({"caption": [""]}, noise=seeded_noise([0]), edit=Edit(given.data, known=known))
    assert torch.equal(made.data[:, :, :6], given.data[:, :, :6])


@pytest.mark.slow
def test_it_learns_what_its_linear_start_cannot() -> None:
    torch.manual_seed(0)
    model = CausalVideo(3, 4, widths=[24, 48])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    grid = torch.linspace(-1, 1, 32)
    colour, ground = torch.rand(2, 4, 3, 1, 1, 1) * 2 - 1
    place, speed = torch.rand(2, 2, 4, 1, 1) * 1.2 - 0.6
    y, x = (place[i] + torch.linspace(0, 1, 5).view(1, 5, 1) * speed[i] for i in range(2))
    inside = (grid.view(1, 1, -1, 1) - y[..., None]) ** 2 + (grid.view(1, 1, 1, -1) - x[..., None]) ** 2 < 0.16
    clips = torch.where(inside[:, None], colour, ground)  # discs that move

    @torch.no_grad()
    def psnr() -> float:
        return 10 * torch.log10(4 / (model.reconstruct(clips).x - clips).square().mean()).item()

    before = psnr()
    for step in range(200):
        found = model.reconstruct(clips, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        ((found.x - clips).abs().mean() + found.loss).backward()
        optimizer.step()
    assert psnr() > max(before + 6, 28)
