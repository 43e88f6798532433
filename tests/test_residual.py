"""A condition's mean: the denoiser works on what differs from it, in training, sampling, windows and joined calls."""

import pytest
import torch
from torch import Tensor, nn

from mmdiff.autoencoder import Pool, Subsample
from mmdiff.cascade import Clip, Generate
from mmdiff.conditioning import Cond, Join, LowRes
from mmdiff.denoiser import Denoiser
from mmdiff.editing import Window
from mmdiff.editing.window import cut
from mmdiff.guidance.together import stacked
from mmdiff.model import DiffusionModel
from mmdiff.precond import EDM, X0, Flow, Precond, V
from mmdiff.sampling import Heun, seeded_noise
from mmdiff.sigmas import Karras


class Wave(nn.Module):
    """Any network of its input and its level, which does not look at the condition."""

    def forward(self, x: Tensor, c_noise: Tensor, cond: object = None) -> Tensor:
        return torch.sin(3 * x + c_noise.reshape(-1, *(1,) * (x.ndim - 1)))


@pytest.mark.parametrize("precond", [EDM(0.1), V(), Flow(), X0()], ids=repr)
def test_a_mean_moves_the_data_and_the_estimate_alike(precond: Precond) -> None:
    """D(x | mean) - mean is D of the residual x - mean, and so are the errors, to float rounding (1e-6)."""
    generator = torch.Generator().manual_seed(0)
    x0, mean, noise = (torch.randn(3, 2, 4, 5, generator=generator) for _ in range(3))
    sigma = torch.tensor([0.05, 1.0, 10.0])
    denoiser, cond = Denoiser(Wave(), precond), Cond(mean=mean)
    x = x0 + sigma.view(3, 1, 1, 1) * noise
    torch.testing.assert_close(denoiser(x, sigma, cond) - mean, denoiser(x - mean, sigma), rtol=1e-5, atol=2e-6)
    around, alone = denoiser.errors(x0, sigma, cond, noise=noise), denoiser.errors(x0 - mean, sigma, noise=noise)
    torch.testing.assert_close(around.error, alone.error, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(around.estimate, alone.estimate + mean, rtol=1e-6, atol=1e-6)
    assert (denoiser(x, sigma, cond) - denoiser(x, sigma)).abs().max() > 0.01


@pytest.mark.parametrize(
    ("degrade", "shape"),
    [(Pool([1, 2, 2]), (1, 3, 4, 8, 8)), (Subsample(2), (1, 2, 32))],
    ids=["space of a video", "time of a sound"],
)
def test_a_network_that_says_nothing_gives_the_low_clip_at_full_size(
    degrade: nn.Module, shape: tuple[int, ...]
) -> None:
    """Residual N(0, 0.1^2): without a network the estimate at a high level is the mean, whatever noise is added to
    the low clip that the network sees; the mean's own noise would stay in the result."""

    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.device_of = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor, c_noise: Tensor, cond: object = None) -> Tensor:
            return torch.zeros_like(x)

    model = DiffusionModel(Silent(), EDM(0.1), LowRes(degrade, noise=0.5, level=0.5, residual=True)).eval()
    clip = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    low = degrade.encode(clip)
    cond = model.condition({"latents": clip})
    assert cond is not None
    assert cond.mean is not None
    assert cond.concat is not None
    assert (cond.concat[:, : shape[1]] - cond.mean).std() > 0.2
    torch.testing.assert_close(cond.mean, degrade.decode(low), rtol=0, atol=0)
    stage = Generate(model, Karras(0.01, 1000.0), Heun(), steps=1)
    made = stage({"caption": [""]}, Clip(low, 4.0), shape=shape[1:], rate=8.0, noise=seeded_noise([0])).data
    torch.testing.assert_close(made, degrade.decode(low), rtol=0, atol=2e-3)


def test_windows_cut_the_mean_and_joined_calls_keep_each_items() -> None:
    mean = torch.arange(12.0).view(1, 1, 12)
    steps = torch.tensor([3, 4, 5])
    part = cut(Cond(mean=mean, known=mean > 5), steps)
    assert part is not None
    assert part.mean is not None
    assert part.known is not None
    assert part.mean.flatten().tolist() == [3.0, 4.0, 5.0]
    assert not part.known.any()
    both = stacked([Cond(mean=mean), Cond(mean=-mean)])
    assert both.mean is not None
    assert torch.equal(both.mean, torch.cat([mean, -mean]))

    class Nothing(nn.Module):
        def forward(self, x: Tensor, c_noise: Tensor, cond: object = None) -> Tensor:
            return torch.zeros_like(x)

    denoiser, x = Denoiser(Nothing(), X0()), torch.randn(1, 1, 12)
    cond = Cond(mean=mean)
    windowed = Window(5, 2)(lambda steps: lambda x, sigma: denoiser(x, sigma, cut(cond, steps)))
    torch.testing.assert_close(windowed(x, torch.tensor(2.0)), mean, rtol=0, atol=1e-5)


def test_a_join_keeps_the_mean() -> None:
    parts = [LowRes(Pool([1, 2, 2]), residual=True), LowRes(Pool([2, 1, 1]))]
    cond = Join(parts).eval()({"latents": torch.randn(1, 1, 2, 4, 4)})
    assert cond.mean is not None
    assert cond.mean.shape == (1, 1, 2, 4, 4)
