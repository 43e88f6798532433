"""What is trained, saved and sampled: a denoiser with its conditioner and its autoencoder."""

from dataclasses import dataclass

from torch import Tensor, nn

from .autoencoder import Autoencoder, Identity
from .conditioning import Batch, Cond, Conditioner
from .denoiser import Denoiser
from .precond import Precond


@dataclass(frozen=True)
class Bound:
    """A denoiser with its condition bound, which is a `Denoise`."""

    denoiser: Denoiser
    cond: Cond | None

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.denoiser(x, sigma, self.cond)


class DiffusionModel(nn.Module):
    """A diffusion model of latents, with all that it takes to train it and to sample from it.

    Args:
        backbone: any module with forward(x, c_noise, cond).
        precond: what the backbone predicts.
        conditioner: batch -> Cond; None trains without a condition.
        autoencoder: data <-> latents; frozen. None denoises the data itself.
    """

    def __init__(
        self,
        backbone: nn.Module,
        precond: Precond,
        conditioner: Conditioner | None = None,
        autoencoder: Autoencoder | None = None,
    ) -> None:
        super().__init__()
        self.denoiser = Denoiser(backbone, precond)
        self.conditioner = conditioner
        self.autoencoder = (autoencoder or Identity()).requires_grad_(False)

    def train(self, mode: bool = True) -> "DiffusionModel":
        super().train(mode)
        self.autoencoder.eval()
        return self

    def bind(self, cond: Cond | None) -> Bound:
        """The denoiser with its condition bound: all that a sampler sees."""
        return Bound(self.denoiser, cond)

    def condition(self, batch: Batch) -> Cond | None:
        """The condition that a batch describes."""
        return None if self.conditioner is None else self.conditioner(batch)

    def null(self, batch: Batch) -> Cond | None:
        """The condition to guide away from."""
        return None if self.conditioner is None else self.conditioner.null(batch)

    def encode(self, x: Tensor) -> Tensor:
        """Data (B, C, T, ...) in [-1, 1] -> the latents that are denoised."""
        return self.autoencoder.encode(x)
