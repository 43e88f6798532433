"""Bottlenecks against closed forms: KL divergence, grids of levels, bounded latents, and what all have in common."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from mmdiff.autoencoder import ConvKL
from mmdiff.bottleneck import FSQ, KL, Bottleneck, Tanh, perplexity
from mmdiff.codebook import VQ

LEVELS = [[2], [3], [4, 4], [8, 5, 2, 3]]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def grid(level: int) -> Tensor:
    """The values of a channel of so many levels."""
    return torch.arange(level) / (level - 1) * 2 - 1


def learned_book(codes: int = 8, channels: int = 3) -> VQ:
    vq = VQ(codes, channels)
    vq(torch.randn(2, channels, 32), seeded())
    return vq


ALL = [KL(0.5), Tanh(), FSQ([4, 5, 2]), learned_book()]
names = [type(bottleneck).__name__ for bottleneck in ALL]


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_kl_is_torch_s_divergence_times_its_weight(weight: float) -> None:
    h = torch.randn(3, 8, 5, 2)
    mean, log_variance = h.chunk(2, dim=1)
    expected = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).mean()
    _, loss, logs = KL(weight)(h)
    torch.testing.assert_close(loss, weight * expected)
    torch.testing.assert_close(logs["kl"], expected)


def test_kl_draws_mean_plus_deviation_times_the_generator_s_noise() -> None:
    h = torch.randn(3, 8, 5)
    mean, log_variance = h.chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=seeded(7))
    torch.testing.assert_close(KL()(h, seeded(7))[0], mean + (log_variance / 2).exp() * noise)
    assert torch.equal(KL().encode(h), mean)


def test_kl_of_absurd_log_variances_is_bounded_and_its_gradient_leads_back() -> None:
    h = torch.tensor([0.0, 1e6, 0.0, -1e6]).reshape(2, 2, 1).requires_grad_()
    z, loss, _ = KL(1.0)(h, seeded())
    assert z.abs().max() < 5 * math.exp(2)
    torch.testing.assert_close(loss, torch.tensor(0.5 * (math.exp(4) - 1 - 4 + 29) / 2))
    loss.backward()
    assert h.grad is not None
    torch.testing.assert_close(h.grad[:, 1, 0], torch.tensor([math.exp(4) - 1, -1.0]) / 4)


def test_tanh_bounds_latents_at_no_loss() -> None:
    h = 5 * torch.randn(2, 3, 4)
    z, loss, logs = Tanh()(h, seeded())
    assert torch.equal(z, h.tanh())
    assert loss == 0
    assert logs == {}
    assert torch.equal(Tanh().decode(torch.tensor([-3.0, 0.2, 1.5])), torch.tensor([-1.0, 0.2, 1.0]))


@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_every_code_of_fsq_has_its_own_index_and_comes_back(levels: list[int]) -> None:
    fsq = FSQ(levels)
    count = fsq.codes_count
    indices = torch.arange(count).reshape(1, count)
    z = fsq.codes(indices)
    assert torch.equal(fsq.indices(z), indices)
    every = torch.tensor(list(itertools.product(*(grid(level).tolist() for level in levels))))
    assert torch.equal(z[0].T.unique(dim=0), every.unique(dim=0))


@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_fsq_gives_each_channel_its_levels_and_no_other(levels: list[int]) -> None:
    h = torch.cat([torch.linspace(-6, 6, 4001), torch.tensor([-1e4, 1e4])]).expand(1, len(levels), -1)
    z = FSQ(levels).encode(h)
    for channel, level in enumerate(levels):
        assert torch.equal(z[0, channel].unique(), grid(level))


def test_fsq_rounds_to_the_nearest_level_and_passes_the_tanh_s_gradient() -> None:
    fsq = FSQ([4, 5])
    h = torch.randn(2, 2, 50, requires_grad=True)
    z, loss, logs = fsq(h, seeded())
    for channel, level in enumerate([4, 5]):
        nearest = (h.detach().tanh()[:, channel, :, None] - grid(level)).abs().argmin(dim=-1)
        assert torch.equal(z[:, channel].detach(), grid(level)[nearest])
    weight = torch.randn_like(z)
    (z * weight).sum().backward()
    torch.testing.assert_close(h.grad, weight * (1 - h.detach().tanh() ** 2))
    assert loss == 0
    assert logs["usage"] == len(fsq.indices(z.detach()).unique()) / 20


def test_perplexity_counts_codes_in_even_use() -> None:
    torch.testing.assert_close(perplexity(torch.tensor([5.0, 5.0, 0.0, 5.0])), torch.tensor(3.0))
    torch.testing.assert_close(perplexity(torch.tensor([7])), torch.tensor(1.0))


@pytest.mark.parametrize("bottleneck", ALL, ids=names)
def test_use_is_without_chance_and_without_effect(bottleneck: Bottleneck) -> None:
    h = torch.randn(2, bottleneck.in_channels(3), 8)
    before = {name: value.clone() for name, value in bottleneck.state_dict().items()}
    z = bottleneck.encode(h)
    assert torch.equal(bottleneck.encode(h), z)
    assert torch.equal(bottleneck(h)[0], z)
    assert torch.equal(bottleneck.decode(z), z)  # already what the decoder is trained on
    assert all(torch.equal(value, before[name]) for name, value in bottleneck.state_dict().items())


@pytest.mark.parametrize("bottleneck", ALL, ids=names)
def test_the_same_generator_gives_the_same_latents_and_the_global_one_is_not_touched(bottleneck: Bottleneck) -> None:
    h, state = torch.randn(2, bottleneck.in_channels(3), 8), torch.get_rng_state()
    before = {name: value.clone() for name, value in bottleneck.state_dict().items()}
    first = bottleneck(h, seeded(3))[0]
    bottleneck.load_state_dict(before)
    assert torch.equal(bottleneck(h, seeded(3))[0], first)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("bottleneck", ALL, ids=names)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_float32(bottleneck: Bottleneck, dtype: torch.dtype) -> None:
    h = torch.randn(2, bottleneck.in_channels(3), 8).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, loss, _ = bottleneck(h)
    assert z.dtype == loss.dtype == torch.float32
    assert torch.equal(z, bottleneck(h.float())[0])


@pytest.mark.parametrize("bottleneck", [KL(), Tanh(), FSQ([4, 5, 2]), VQ(8, 3)], ids=names)
def test_an_autoencoder_with_any_bottleneck_learns_in_every_parameter(bottleneck: Bottleneck) -> None:
    model = ConvKL(2, 3, [[2], [1]], width=8, bottleneck=bottleneck)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(2, 2, 8)
    out = model.reconstruct(x, seeded())
    ((out.x - x).square().mean() + out.loss).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or p.grad.count_nonzero() == 0] == []
    assert out.latents.shape == (2, 3, 4)


@pytest.mark.parametrize("bottleneck", [FSQ([4, 5, 2]), learned_book()], ids=["FSQ", "VQ"])
def test_decoding_brings_sampled_latents_to_the_nearest_code(bottleneck: Any) -> None:
    model = ConvKL(1, 3, [[2]], width=4, bottleneck=bottleneck)
    x = torch.randn(2, 1, 8)
    model.normalise(torch.tensor([0.1, -0.2, 0.3]), torch.tensor([0.5, 2.0, 0.7]))
    z = model.encode(x)
    assert torch.equal(model.decode(z), model.decode(z + 1e-3 * torch.randn_like(z)))
    torch.testing.assert_close(model.decode(z), model.reconstruct(x).x)
    assert not torch.equal(model.decode(z), model.decode(z + 3 * torch.randn_like(z)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KL(-1.0), "weight=-1.0 of the KL divergence must be 0 or more"),
        (lambda: FSQ([]), r"levels=\[\] must be one or more whole numbers from 2 up"),
        (lambda: FSQ([4, 1]), r"levels=\[4, 1\]"),
        (lambda: FSQ([2**32, 2**32]), "more codes than 64-bit indices"),
        (lambda: ConvKL(1, 2, [[2]], bottleneck=FSQ([4, 4, 4])), r"latent_channels=2, but levels=\[4, 4, 4\] are of 3"),
        (lambda: ConvKL(1, 2, [[2]], bottleneck=VQ(4, 3)), "latent_channels=2, but the codes of VQ have channels=3"),
        (lambda: VQ(1, 3), "codes=1 must be 2 or more"),
        (lambda: VQ(4, 0), "channels=0"),
        (lambda: VQ(4, 3, decay=1.0), "decay=1.0 must be at least 0 and below 1"),
        (lambda: VQ(4, 3, commitment=-0.1), "commitment=-0.1 must not be negative"),
        (lambda: VQ(4, 3, revive=1.0), "revive=1.0 must be at least 0 and below 1"),
    ],
)
def test_wrong_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
