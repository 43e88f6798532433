"""The causal video autoencoder in chunks, tiles and streams makes what the whole makes; no frame sees a later one."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.small_video import STEPS, TOLERANCE, clip, expect_same, make
from video.passes import Passes, Tiles

# Time


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("chunk", [1, 2, 5, 8, 11, 100])
@torch.no_grad()
def test_chunks_make_the_whole(name: str, chunk: int) -> None:
    model = make(name, depth=2)
    x = clip(model, 7)
    z = model.encode(x)
    y = model.decode(z)
    model.chunk = chunk
    expect_same(model.encode(x), z)
    expect_same(model.decode(z), y)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("chunk", [None, 1, 6])
@pytest.mark.parametrize("pieces", [[1], [2, 1, 5], [100]], ids=str)
@torch.no_grad()
def test_streams_make_the_whole_of_pieces_of_any_length(name: str, chunk: int | None, pieces: list[int]) -> None:
    model = make(name)
    x = clip(model, 6)
    z = model.encode(x)
    y = model.decode(z)
    model.chunk = chunk
    expect_same(torch.cat([*model.encode_stream(iter(cut(x, pieces)))], dim=2), z)
    expect_same(torch.cat([*model.decode_stream(iter(cut(z, pieces)))], dim=2), y)


def cut(x: Tensor, lengths: list[int]) -> list[Tensor]:
    """Pieces of x of the lengths in turn, until there is no more."""
    pieces, start, turn = [], 0, 0
    while start < x.shape[2]:
        pieces.append(x[:, :, start : start + lengths[turn % len(lengths)]])
        start, turn = start + lengths[turn % len(lengths)], turn + 1
    return pieces


def test_a_stream_gives_a_latent_as_soon_as_its_frames_are_there() -> None:
    model = make("4x8")
    came = 0

    def frames() -> Any:
        nonlocal came
        for frame in clip(model, 4).split(1, dim=2):
            came += 1
            yield frame

    at = [(came, z.shape[2]) for z in model.encode_stream(frames())]
    assert at == [(1, 1), (5, 1), (9, 1), (13, 1)]


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([3, 4], r"T=7 is not 1 \+ a multiple of 4; nearest: 5 or 9"),
        ([], r"T=0 is not 1 \+ a multiple of 4; nearest: 1"),
    ],
)
def test_a_stream_that_ends_within_a_latent_is_refused(lengths: list[int], message: str) -> None:
    model = make("4x8")
    with pytest.raises(ValueError, match=message):
        list(model.encode_stream(torch.zeros(1, 2, n, 8, 8) for n in lengths))


def test_a_stream_of_different_sizes_is_refused() -> None:
    model = make()
    with pytest.raises(ValueError, match=r"shape \(1, 2, 1, 8, 12\) does not continue"):
        list(model.encode_stream([torch.zeros(1, 2, 1, 8, 8), torch.zeros(1, 2, 1, 8, 12)]))
    with pytest.raises(ValueError, match="H=6 is not a multiple of 4"):
        list(model.encode_stream([torch.zeros(1, 2, 1, 6, 8)]))


@pytest.mark.parametrize("name", STEPS)
def test_later_frames_cannot_touch_earlier_latents(name: str) -> None:
    model = make(name)
    x = clip(model, 5).requires_grad_()
    z = model.encode(x)
    for cell in range(5):
        own = cell * model.stride  # the last frame of the latent
        (grad,) = torch.autograd.grad(z[:, :, : cell + 1].sum(), x, retain_graph=True)
        assert not grad[:, :, own + 1 :].any()
        (grad,) = torch.autograd.grad(z[:, :, cell].sum(), x, retain_graph=True)
        assert grad[:, :, own].any()
        changed = torch.cat([x[:, :, : own + 1], torch.randn_like(x[:, :, own + 1 :]) * 1e3], dim=2)
        assert torch.equal(model.encode(changed)[:, :, : cell + 1], z[:, :, : cell + 1])


@pytest.mark.parametrize("name", STEPS)
def test_later_latents_cannot_touch_earlier_frames(name: str) -> None:
    model = make(name)
    z = torch.randn(1, 3, 5, 3, 2, requires_grad=True)
    y = model.decode(z)
    for cell in range(5):
        own = cell * model.stride
        (grad,) = torch.autograd.grad(y[:, :, : own + 1].sum(), z, retain_graph=True)
        assert not grad[:, :, cell + 1 :].any()
        assert grad[:, :, cell].any()
        changed = torch.cat([z[:, :, : cell + 1], torch.randn_like(z[:, :, cell + 1 :]) * 1e3], dim=2)
        assert torch.equal(model.decode(changed)[:, :, : own + 1], y[:, :, : own + 1])


@pytest.mark.parametrize("name", STEPS)
def test_history_is_how_far_back_is_seen(name: str) -> None:
    model = make(name, frames=[2] * len(STEPS[name]))
    frames, latents = model.history
    x = clip(model, 12).requires_grad_()
    cell = 11 - latents
    grad = torch.autograd.grad(model.encode(x)[:, :, -1].sum(), x)[0].abs().sum((0, 1, 3, 4))
    first = 1 + 10 * model.stride - frames
    assert frames > 0
    assert not grad[:first].any()
    assert grad[first:].all()
    z = model.encode(x).detach().requires_grad_()
    own = model.decode(z)[:, :, 1 + 10 * model.stride]  # the first frame of the last latent
    grad = torch.autograd.grad(own.sum(), z)[0].abs().sum((0, 1, 3, 4))
    assert latents > 0
    assert not grad[:cell].any()
    assert grad[cell:].all()


@pytest.mark.parametrize("name", STEPS)
@torch.no_grad()
def test_the_first_frame_of_a_video_is_an_image(name: str) -> None:
    model = make(name)
    x = clip(model, 4, 6, 6, batch=2)
    z = model.encode(x)
    assert torch.equal(model.encode(x[:, :, :1]), z[:, :, :1])
    assert torch.equal(model.decode(z[:, :, :1]), model.decode(z)[:, :, :1])


@pytest.mark.parametrize("name", STEPS)
@torch.no_grad()
def test_a_still_clip_has_still_latents(name: str) -> None:
    model = make(name)
    still = clip(model, 1)
    z = model.encode(still.expand(-1, -1, 1 + 3 * model.stride, -1, -1))
    expect_same(z, model.encode(still).expand(-1, -1, 4, -1, -1))


# Space


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("tile", [(1, 1), (2, 3), (4, 9), (40, 40)])
@torch.no_grad()
def test_tiles_make_the_whole(name: str, tile: tuple[int, int]) -> None:
    model = make(name)
    x = clip(model, 2, 9, 11)  # which no tile but the smallest divides
    z = model.encode(x)
    y = model.decode(z)
    model.tile = (tile[0] * model.cell[0], tile[1] * model.cell[1])
    expect_same(model.encode(x), z)
    expect_same(model.decode(z), y)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("axis", [0, 1], ids=["H", "W"])
@torch.no_grad()
def test_no_smaller_halo_will_do(name: str, axis: int) -> None:
    model = make(name)
    x = clip(model, 2, 16, 16)
    z = model.encode(x)
    ways = [(model.encoder, x, model.cell, (1, 1)), (model.decoder, z, (1, 1), model.cell)]
    for (network, given, taken, made), halo in zip(ways, model.halo, strict=True):
        less = (halo[0] - 1, halo[1]) if axis == 0 else (halo[0], halo[1] - 1)
        errors = []
        for size in (halo, less):
            tiles = Tiles((5, 5), size, taken, made)
            passes = Passes(network, tiles, model.stride if network is model.encoder else 1, None)
            errors.append((passes.whole(given) - network(given)).abs().max().item())
        assert errors[0] <= TOLERANCE < errors[1]


@torch.no_grad()
def test_chunks_tiles_and_streams_together_make_the_whole() -> None:
    model = make("4x8")
    x = clip(model, 5, 5, 4)
    z = model.encode(x)
    y = model.decode(z)
    parts = make("4x8", chunk=4, tile=[16, 24])
    parts.load_state_dict(model.state_dict())
    expect_same(parts.encode(x), z)
    expect_same(torch.cat([*parts.encode_stream(x.split(3, dim=2))], dim=2), z)
    expect_same(torch.cat([*parts.decode_stream(z.split(2, dim=2))], dim=2), y)


def test_chunks_and_tiles_have_the_gradient_of_the_whole() -> None:
    model = make()
    x = clip(model, 4, 6, 6).requires_grad_()
    (wanted,) = torch.autograd.grad(model.decode(model.encode(x)).square().sum(), x)
    model.chunk, model.tile = 2, (8, 12)
    (found,) = torch.autograd.grad(model.decode(model.encode(x)).square().sum(), x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3 * wanted.abs().max().item())


class Tracked(TorchDispatchMode):
    """Bytes of the tensors that come and go while it is on, and the most that there have been."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor) and id(storage := tensor.untyped_storage()) not in self.seen:
                self.seen.add(id(storage))
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self._freed, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return out

    def _freed(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.bytes -= size


def test_streams_of_2000_frames_need_the_memory_of_200() -> None:
    model = make("4x8", chunk=40)

    def peak(stream: Callable[[Any], Any], piece: Tensor, count: int) -> int:
        gc.collect()
        with Tracked() as tracked:
            pieces = (piece[:, :, :1] if i == 0 else piece.clone() for i in range(1 + count))
            made = sum(part.shape[2] for part in stream(pieces))
        assert made == 1 + 5 * count * (1 if piece is frames else 4)
        return tracked.peak

    frames, latents = torch.randn(1, 2, 20, 8, 8), torch.randn(1, 3, 5, 1, 1)
    for stream, piece in ((model.encode_stream, frames), (model.decode_stream, latents)):
        few, many = peak(stream, piece, 10), peak(stream, piece, 100)
        assert piece.nbytes < many == few
