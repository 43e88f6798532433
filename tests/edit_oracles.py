"""What the tests of editing share: Gaussian data, whose denoisers and conditional distributions are formulas."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from audio.mel import Mel
from mmdiff.autoencoder import Autoencoder, Chain, Pool, Subsample
from mmdiff.backbones import UNet
from mmdiff.cascade import Cascade, Decode, Generate
from mmdiff.conditioning import LowRes
from mmdiff.denoiser import expand_like
from mmdiff.model import DiffusionModel
from mmdiff.precond import EDM
from mmdiff.sampling import (
    RK4,
    AdamsBashforth,
    AdaptiveODE,
    Ancestral,
    Consistency,
    Denoise,
    DPMpp2M,
    DPMpp2MSDE,
    DPMpp2S,
    DPMpp3M,
    DPMpp3MSDE,
    Euler,
    Heun,
    Langevin,
    PredictorCorrector,
    Sampler,
    UniPC,
    start,
)  # fmt: skip
from mmdiff.sigmas import Cosine, Karras
from mmdiff.sigmas import Flow as FlowGrid

SHAPES = [(2, 1, 12), (2, 1, 12, 4), (2, 3, 12, 4, 6)]
DETERMINISTIC: list[Sampler] = [
    Ancestral(), Heun(), Heun("flow"), RK4(), DPMpp2S(), DPMpp2M(), DPMpp3M(), UniPC(), AdamsBashforth(),
    AdaptiveODE(1e-6, 1e-6),
]  # fmt: skip
STOCHASTIC: list[Sampler] = [
    Ancestral(1.0), Euler(s_churn=2.0), Heun(s_churn=2.0), DPMpp2MSDE(), DPMpp3MSDE(), Consistency(), Langevin(),
    PredictorCorrector(),
]  # fmt: skip
SAMPLERS = DETERMINISTIC + STOCHASTIC
GRIDS = [Karras(), FlowGrid(), Cosine()]


def gaussian(mean: float, std: float) -> Denoise:
    """The exact denoiser of data ~ N(mean, std^2), step by step."""
    return lambda x, sigma: (mean * expand_like(sigma, x) ** 2 + x * std**2) / (expand_like(sigma, x) ** 2 + std**2)


def correlated(covariance: Tensor) -> Denoise:
    """The exact denoiser of (B, 1, T) ~ N(0, covariance), for sigma () or one level per time step (B, T)."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        rows = sigma if sigma.ndim == 2 else sigma.reshape(1, 1)
        assert (rows == rows[:1]).all()  # so that one solution serves all rows
        levels = rows[:1].expand(1, x.shape[2]).to(covariance)
        gain = torch.linalg.solve(covariance + torch.diag_embed(levels**2), covariance).mT  # C (C + S)^-1
        return (gain @ x[:, 0].to(covariance)[..., None])[..., 0][:, None].to(x)

    return denoise


def rough(x: Tensor, sigma: Tensor) -> Tensor:
    """A denoiser that is no one's: neither linear nor local in anything."""
    return torch.tanh(x + x.roll(1, -1)) * 0.7 + 0.1 * torch.sin(sigma)


def never(*_: object) -> Tensor:
    raise AssertionError("called, though it must not be")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def distance(got: Tensor, expected: Tensor) -> float:
    return (got - expected).abs().max().item()


def recorded(denoise: Denoise) -> tuple[Denoise, list[tuple[Tensor, Tensor]]]:
    calls: list[tuple[Tensor, Tensor]] = []

    def listen(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append((x, sigma))
        return denoise(x, sigma)

    return listen, calls


def ar1(length: int, correlation: float) -> Tensor:
    steps = torch.arange(length, dtype=torch.float64)
    return correlation ** (steps[:, None] - steps).abs()


def law(
    sampler: Sampler, denoise: Denoise, sigmas: Tensor, given: Tensor | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Exact mean (T,) and linear map (T, T) from initial noise to sample: every walk here is affine in its noises.

    The mean of the samples is the walk of the means, without noise; the map is that of unit vectors.
    """
    length = 8 if given is None else given.shape[-1]
    eps = torch.cat([torch.zeros(1, length), torch.eye(length)]).double()[:, None]
    x = start(eps, sigmas[0])
    if given is not None and mask is not None:
        x = torch.where(mask, given + sigmas[0] * eps, x)
    out = sampler(denoise, x, sigmas, torch.zeros_like)[:, 0]
    return out[0], (out[1:] - out[0]).mT


GRID = Karras(sigma_max=10)


def stage(axes: int, channels: int, degrade: Autoencoder | None = None, **settings: Any) -> Generate:
    torch.manual_seed(axes)
    concat = 0 if degrade is None else channels + 1
    net = UNet(axes, channels, channels=8, multipliers=(1, 1), head_channels=8, concat_channels=concat)
    model = DiffusionModel(net, EDM(), None if degrade is None else LowRes(degrade)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return Generate(model, GRID, **{"sampler": Ancestral(1.0), "steps": 4, **settings})


MEL = Mel(sample_rate=8000, n_fft=64, hop_length=16, mels=8, iterations=4)
CASCADES: dict[str, Callable[[], Cascade]] = {
    "waveform": lambda: Cascade({"base": stage(1, 1), "up": stage(1, 1, Pool([2]))}, (1, 32), 32.0, 4),
    "spectrogram": lambda: Cascade({"base": stage(2, 1), "up": stage(2, 1, Pool([2, 2]))}, (1, 16, 8), 16.0, 4),
    "video": lambda: Cascade(
        {"base": stage(3, 3), "up": stage(3, 3, Chain([Subsample(2), Pool([1, 2, 2])]))}, (3, 8, 8, 8), 8.0, 4
    ),
    "mel": lambda: Cascade(
        {"base": stage(2, 1), "up": stage(2, 1, Pool([2, 2])), "out": Decode(MEL)}, (1, 256), 8000.0, 64
    ),
}
