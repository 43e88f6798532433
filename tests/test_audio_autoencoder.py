"""Waveform autoencoder: every length exactly, chunks that equal the whole, what a latent depends on."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from audio.autoencoder import Upsample, WaveAutoencoder
from audio.streaming import stream
from mmdiff.bottleneck import FSQ, KL, Bottleneck, Tanh
from mmdiff.codebook import VQ

Pair = tuple[WaveAutoencoder, Tensor]


def make(strides: tuple[int, ...] = (2, 4, 8), **settings: Any) -> WaveAutoencoder:
    """A tiny one whose every weight counts."""
    given: dict[str, Any] = {
        "latent_channels": 3,
        "width": 4,
        "dilations": (1, 3),
        "kernel": 5,
        "level": 0.3,
        **settings,
    }
    model = WaveAutoencoder(strides=strides, **given)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
        z = model.reconstruct(sound(4096, channels=model.channels)).latents
    model.normalise(z.mean(dim=(0, 2)), z.std(dim=(0, 2)))
    return model.eval()


def sound(length: int, batch: int = 1, channels: int = 1) -> Tensor:
    return 0.3 * torch.randn(batch, channels, length)


def expect_exact_length(model: WaveAutoencoder, length: int) -> None:
    x = sound(length, channels=model.channels)
    z = model.encode(x)
    assert z.shape == (1, *model.latent_shape(x.shape[1:]))
    y = model.decode(z)
    assert y.shape[:2] == x.shape[:2]
    assert length <= y.shape[2] < length + model.stride
    assert model.reconstruct(x).x.shape == x.shape


@torch.no_grad()
@pytest.mark.parametrize("channels", [1, 2])
def test_every_short_length_and_the_edges_of_long_ones_are_exact(channels: int) -> None:
    model = make(channels=channels)
    for length in [*range(1, 301, channels), 4095, 4096, 4097, 19_967, 19_968, 19_969, 19_999, 20_000]:
        expect_exact_length(model, length)


def test_the_promised_length_is_exact_for_every_length_up_to_20_000() -> None:
    for model in (make(), make((3, 5)), make((2, 2, 4, 8, 16))):
        for length in range(1, 20_001):
            _, steps = model.latent_shape((1, length))
            assert steps * model.stride - model.stride < length <= steps * model.stride


@pytest.mark.slow
@torch.no_grad()
def test_every_length_up_to_20_000_is_exact() -> None:
    model = make((4, 16), width=1, dilations=(), kernel=3)
    for length in range(1, 20_001):
        found = model.reconstruct(torch.zeros(1, 1, length))
        assert found.x.shape == (1, 1, length)
        assert found.latents.shape == (1, 3, -(-length // 64))


@torch.no_grad()
@pytest.mark.parametrize("strides", [(64,), (2, 4, 8), (3, 5, 7), (4, 4, 4, 8), (2, 4, 4, 8, 8)], ids=str)
def test_total_strides_from_64_to_2048_keep_lengths(strides: tuple[int, ...]) -> None:
    model = make(strides, multipliers=[1] * (len(strides) + 1))
    for length in (1, model.stride - 1, model.stride, model.stride + 1, 3 * model.stride + 5):
        expect_exact_length(model, length)


@torch.no_grad()
def test_reconstruction_is_what_encoding_and_decoding_give() -> None:
    model, x = make(), sound(777, batch=2)
    found = model.reconstruct(x)
    torch.testing.assert_close(found.x, model.decode(model.encode(x))[..., :777], rtol=1e-5, atol=1e-5)
    assert found.latents.shape == (2, 3, 13)
    again = model.reconstruct(x, torch.Generator().manual_seed(1)).x
    assert not torch.equal(again, found.x)
    assert torch.equal(again, model.reconstruct(x, torch.Generator().manual_seed(1)).x)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 500, 6_000])
@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_chunks_equal_the_whole(length: int, chunk: int) -> None:
    model, x = make(channels=2), sound(length, channels=2)
    z = model.encode(x)
    y = model.decode(z)
    assert 0.01 < y.abs().max() < 3  # about full scale
    pieces = list(x.split([length // 3, length - length // 3], dim=-1))
    for parts in ([x], [p for p in pieces if p.shape[-1]]):
        torch.testing.assert_close(torch.cat([*model.encode_stream(parts, chunk)], -1), z, rtol=0, atol=1e-5)
    for parts in ([z], list(z.split(7, dim=-1))):
        torch.testing.assert_close(torch.cat([*model.decode_stream(parts, chunk)], -1), y, rtol=0, atol=1e-5)


@torch.no_grad()
def test_without_its_halo_a_chunk_is_not_the_whole() -> None:
    model, x = make(), sound(4096)
    bare = stream(model.encode, [x], taken=64, given=1, chunk=8, halo=0)
    assert (torch.cat([*bare], -1) - model.encode(x)).abs().max() > 1e-3


@torch.no_grad()
def test_a_stream_holds_no_more_than_a_chunk_and_its_surroundings() -> None:
    model, seen, taken = make(), [], 0

    def pieces() -> Iterator[Tensor]:
        nonlocal taken
        for _ in range(400):
            taken += 1
            yield sound(1000)

    def encode(x: Tensor) -> Tensor:
        seen.append(x.shape[-1])
        return model.encode(x)

    steps = 0
    for z in stream(encode, pieces(), taken=64, given=1, chunk=32, halo=model.halo):
        steps += z.shape[-1]
        assert taken * 1000 < (steps + 32 + model.halo) * 64 + 2 * 1000, "it read ahead"
    assert steps == 400_000 // 64
    assert max(seen) <= (32 + 2 * model.halo) * 64


@pytest.mark.parametrize("strides", [(2, 4), (3, 5), (7,)], ids=str)
def test_a_latent_depends_on_what_its_reach_covers_and_no_further(strides: tuple[int, ...]) -> None:
    model = make(strides)
    x = sound(41 * model.stride).requires_grad_()
    (slope,) = torch.autograd.grad(model.encode(x)[..., 20].square().sum(), x)
    used = slope[0, 0].nonzero().flatten()
    assert int(used[0]) == 20 * model.stride - model.reach
    assert 21 * model.stride - 1 < int(used[-1]) <= 21 * model.stride - 1 + model.reach
    assert model.halo * model.stride >= model.reach


def test_samples_depend_on_the_latents_within_the_halo_alone() -> None:
    model = make((2, 4))
    z = torch.randn(1, 3, 60, requires_grad=True)
    (slope,) = torch.autograd.grad(model.decode(z)[..., 30 * 8 : 31 * 8].square().sum(), z)
    used = slope[0].abs().sum(dim=0).nonzero().flatten()
    assert 30 - model.halo <= int(used[0]) < 30 - model.halo + 2
    assert 30 < int(used[-1]) <= 30 + model.halo


@torch.no_grad()
def test_known_latents_are_those_that_unknown_samples_cannot_touch() -> None:
    model, x = make((2, 4)), sound(203)
    mask = torch.ones(1, 1, 203, dtype=torch.bool)
    mask[..., 90:100] = False
    known = model.known(mask)
    assert known.shape == (1, 1, 26)
    moved = (model.encode(torch.where(mask, x, 0.5)) - model.encode(x)).abs().amax(dim=1, keepdim=True) > 1e-6
    assert not (moved & known).any()
    assert 0 < int((known & ~moved).sum()) <= 26 - int(moved.sum())
    assert int((~moved & ~known).sum()) <= 2, "more is called unknown than the reach explains"
    assert model.known(torch.ones(1, 1, 203, dtype=torch.bool)).all()


@torch.no_grad()
def test_nothing_is_normalised_across_time() -> None:
    model, x = make(), sound(6400)
    longer = torch.cat([x, 3 * sound(12_800)], dim=-1)
    steps = 100 - model.halo - 1
    torch.testing.assert_close(model.encode(longer)[..., :steps], model.encode(x)[..., :steps], rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("stride", [2, 3, 4, 5, 8])
def test_upsampling_starts_without_a_tone_at_the_cells_rate(stride: int) -> None:
    up = Upsample(6, 2, stride)
    still = up(torch.randn(1, 6, 1).expand(1, 6, 20))
    inside = still[..., stride:-stride]
    assert still.shape == (1, 2, 20 * stride)
    assert inside.abs().max() > 0.1
    torch.testing.assert_close(inside, inside[..., :1].expand_as(inside), rtol=0, atol=1e-6)
    x, mix = torch.randn(2, 6, 20), up.conv.weight.sum(dim=2)[::stride]  # (C', C)
    linear = torch.nn.functional.interpolate(mix @ x, scale_factor=stride, mode="linear")
    torch.testing.assert_close(up(x)[..., stride:-stride], linear[..., stride:-stride], rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("stride", [2, 3, 8])
def test_upsampling_is_a_transposed_convolution_over_two_cells(stride: int) -> None:
    up, x = Upsample(3, 2, stride), torch.randn(2, 3, 9)
    torch.nn.init.normal_(up.conv.weight)
    torch.nn.init.normal_(up.conv.bias)  # type: ignore[arg-type]
    taps = up.conv.weight.unflatten(0, (2, stride)).permute(2, 0, 3, 1).flip(2).flatten(2)  # (C, C', 2 s)
    whole = torch.nn.functional.conv_transpose1d(x, taps, stride=stride)  # (B, C', (9 + 1) s)
    whole = whole + up.conv.bias.unflatten(0, (2, stride)).repeat(1, 10)  # type: ignore[union-attr]
    start = stride // 2
    torch.testing.assert_close(up(x), whole[..., start : start + 9 * stride], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("level", [0.01, 0.3])
def test_levels_do_not_fade_at_the_start(level: float) -> None:
    model = WaveAutoencoder(strides=(2, 4, 4, 8), width=8, latent_channels=8, level=level)
    x = level * torch.randn(1, 1, 8192)
    found = model.reconstruct(x)
    assert 0.3 < found.latents.std() < 3
    assert 0.3 < found.x.std() / level < 3


@pytest.mark.parametrize(
    "bottleneck", [KL(0.1), Tanh(), FSQ([5, 5, 5]), VQ(8, 3)], ids=lambda bottleneck: type(bottleneck).__name__
)
def test_gradients_reach_every_parameter_behind_any_bottleneck(bottleneck: Bottleneck) -> None:
    model = make(bottleneck=bottleneck)
    found = model.reconstruct(sound(500, batch=2), torch.Generator().manual_seed(0))
    (found.x.square().mean() + found.loss).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.count_nonzero()] == []
    assert model.last_weight().shape == (1, 4, 5)
    assert any(model.last_weight() is p for p in model.decoder.parameters())


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [{"strides": (4, 4, 4)}, {"latent_channels": 4}, {"width": 6}, {"multipliers": [1, 1, 2, 2]}, {"dilations": (1,)},
     {"kernel": 3}, {"channels": 2}],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_every_setting_changes_the_network(change: dict[str, Any]) -> None:
    given = {"strides": (2, 4, 8), "latent_channels": 3, "width": 4, "dilations": (1, 3), "kernel": 5}
    a, b = WaveAutoencoder(**given), WaveAutoencoder(**{**given, **change})
    assert sum(p.numel() for p in a.parameters()) != sum(p.numel() for p in b.parameters())


@torch.no_grad()
def test_compiles_without_a_graph_break() -> None:
    model, x = make((2, 4)), sound(100)
    compiled = torch.compile(lambda x: model.decode(model.encode(x)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model.decode(model.encode(x)), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_inductor_gives_the_same() -> None:
    model, x = make((2, 4)), sound(100)
    compiled = torch.compile(lambda x: model.decode(model.encode(x)), fullgraph=True)
    torch.testing.assert_close(compiled(x), model.decode(model.encode(x)), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_comes_near(dtype: torch.dtype) -> None:
    model, x = make(), sound(1000)
    plain = model.reconstruct(x).x
    with torch.autocast("cpu", dtype=dtype):
        half = model.reconstruct(x).x.float()
    assert (half - plain).norm() < 0.05 * plain.norm()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": 0}, "channels=0 must be 1 or more"),
        ({"latent_channels": 0}, "latent_channels=0 must be 1 or more"),
        ({"strides": ()}, r"strides=\[\] must be one or more"),
        ({"strides": (2, 1)}, r"strides=\[2, 1\]"),
        ({"width": 0}, "width=0 must be 1 or more"),
        ({"kernel": 4}, "kernel=4 must be odd"),
        ({"level": 0}, "level=0 must be above 0"),
        ({"dilations": (1, 0)}, r"dilations=\[1, 0\] must be 1 or more"),
        ({"multipliers": [1, 2]}, r"multipliers=\[1, 2\] has 2 entries, but strides=\[2, 4, 8\] need 4"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WaveAutoencoder(**settings)


@pytest.mark.parametrize("shape", [(1, 2, 64), (1, 64), (1, 1, 0)])
def test_what_is_no_waveform_of_its_channels_is_refused(shape: tuple[int, ...]) -> None:
    model = make()
    with pytest.raises(ValueError, match=r"\(B, 1, T\) with T >= 1 is needed"):
        model.encode(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"is not that of a waveform \(1, T\)"):
        model.latent_shape(shape[1:])


def test_streams_refuse_nothing_and_chunks_of_nothing() -> None:
    model = make()
    with pytest.raises(ValueError, match="nothing to encode or decode"):
        list(model.encode_stream([]))
    with pytest.raises(ValueError, match="chunk=0 must be 1 or more"):
        list(model.encode_stream([sound(100)], chunk=0))
