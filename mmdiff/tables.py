"""Noise tables of the discrete variance-preserving models: beta for each index, and from it sigma.

beta_t is the share of variance that step t of the forward chain replaces by noise; alpha_bar_t = prod(1 - beta), and
sigma_t = sqrt((1 - alpha_bar_t) / alpha_bar_t) is the true noise-to-signal ratio (arXiv 2006.11239, eq. 4).
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

Schedule = Literal["linear", "scaled_linear", "cosine", "sigmoid"]
SCHEDULES: tuple[str, ...] = get_args(Schedule)
ZERO_SNR_SIGMA = 1e5  # stands for sigma = inf: a signal-to-noise ratio of 1e-10, and still exact arithmetic in float32


def linspace(start: float, end: float, n: int) -> Tensor:
    """(n,) float64 on the CPU, whatever torch's default dtype and device are."""
    return torch.linspace(start, end, n, dtype=torch.float64, device="cpu")


def betas(schedule: Schedule, n: int, start: float, end: float) -> Tensor:
    """(n,) float64: beta of each index.

    linear: from start to end (arXiv 2006.11239, sec. 4). scaled_linear: linear in sqrt(beta) (latent diffusion, arXiv
    2112.10752). cosine: alpha_bar a squared cosine, beta at most 0.999, start and end unused (arXiv 2102.09672,
    eq. 17). sigmoid: start + (end - start) sigmoid(-6..6) (arXiv 2203.02923).
    """
    if schedule == "cosine":
        bar = ((linspace(0.0, 1.0, n + 1) + 0.008) / 1.008 * (math.pi / 2)).cos() ** 2
        return (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    if schedule == "scaled_linear":
        return linspace(start**0.5, end**0.5, n) ** 2
    if schedule == "sigmoid":
        return start + (end - start) * linspace(-6.0, 6.0, n).sigmoid()
    return linspace(start, end, n)


def sigma_table(beta: Tensor) -> Tensor:
    """(n,) float64, increasing: sigma of each index of a table of beta (n,)."""
    return torch.expm1(-torch.log1p(-beta).cumsum(0)).sqrt()  # sigma^2 = 1 / alpha_bar - 1


def zero_terminal_snr(sigma: Tensor) -> Tensor:
    """A table whose last level holds no signal: alpha shifted so that its last is 0 and scaled so that its first stays.

    Source: arXiv 2305.08891, algorithm 1. The last sigma would be infinite; it is ZERO_SNR_SIGMA = 1e5, where alpha is
    1e-5 in the place of 0. Raises ValueError where the level before it does not lie below (a table that had no signal
    left to remove).
    """
    alpha = (1 + sigma**2).rsqrt()
    first, last = alpha[0], alpha[-1]
    alpha = (alpha - last) * (first / (first - last))
    rescaled = torch.cat([(1 - alpha[:-1] ** 2).sqrt() / alpha[:-1], torch.full_like(sigma[:1], ZERO_SNR_SIGMA)])
    if not rescaled[-2] < ZERO_SNR_SIGMA:
        raise ValueError(
            f"zero_terminal_snr=True puts the last but one of {len(sigma)} levels at sigma={rescaled[-2]:.3g}, not "
            f"below {ZERO_SNR_SIGMA:g}, which stands for infinity; the table ends at {sigma[-1]:.3g} and needs no "
            "rescaling, or take fewer train_steps or a lower beta_end"
        )
    return rescaled
