"""What is trained, saved and sampled: a denoiser with its conditioner and its autoencoder."""

from dataclasses import dataclass

from torch import Tensor, nn

from .autoencoder import Autoencoder, Identity
from .backbones import ControlNet
from .conditioning import Batch, Cond, Conditioner, Join
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

    def start_from(self, trained: "DiffusionModel") -> None:
        """Takes the weights of a trained model's backbone and conditioner.

        A ControlNet takes those of the backbone that it steers, and a `Join` those of its first part, so that a hint
        can join what the trained model was conditioned on. A conditioner that takes weights is frozen where the
        backbone is. Raises ValueError where the weights do not fit.
        """
        backbone, conditioner = self.denoiser.backbone, self.conditioner
        weights = trained.denoiser.backbone.state_dict()
        try:
            if isinstance(backbone, ControlNet):
                backbone.start_from(weights)
                backbone = backbone.backbone
            else:
                backbone.load_state_dict(weights)
            if trained.conditioner is not None:
                if isinstance(conditioner, Join) and not isinstance(trained.conditioner, Join):
                    conditioner = conditioner.parts[0]  # type: ignore[assignment]
                if conditioner is None:
                    raise ValueError("the model has no conditioner for the weights of the trained model's")
                conditioner.load_state_dict(trained.conditioner.state_dict())
                conditioner.requires_grad_(any(p.requires_grad for p in backbone.parameters()))
        except RuntimeError as error:
            raise ValueError(f"the trained model's weights are not of this model: {error}") from error

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

    def latents(self, batch: Batch) -> Tensor:
        """Those that the batch holds, as a `mmdiff.data.cache.LatentCache` gives them, or else those of its data."""
        return batch["latents"] if "latents" in batch else self.encode(batch["x"])
