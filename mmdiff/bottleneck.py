"""What an autoencoder's latents are made of: Gaussians, steps of a grid, or bounded numbers; a codebook's codes are in
`mmdiff.codebook`.

B batch, C channels, `*axes` T and what follows it.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

Bottled = tuple[Tensor, Tensor, dict[str, Tensor]]


class Bottleneck(nn.Module, ABC):
    """From the encoder network's output h to latents z (B, C, *axes), with what training adds to the loss.

    Computes in float32, whatever the precision of h.
    """

    def in_channels(self, latent_channels: int) -> int:
        """Channels of h for latents of `latent_channels`. Raises ValueError where the bottleneck's own differ."""
        return latent_channels

    @abstractmethod
    def forward(self, h: Tensor, generator: torch.Generator | None = None) -> Bottled:
        """h (B, in_channels, *axes) -> z (B, C, *axes), the loss () to add, already weighted, and what to log, each ().

        generator: of what is random in training. None leaves nothing to chance and changes nothing of the bottleneck.
        """

    def encode(self, h: Tensor) -> Tensor:
        """z (B, C, *axes) for use: the same for the same h."""
        return self.forward(h)[0]

    def decode(self, z: Tensor) -> Tensor:
        """What the decoder has been trained on that is nearest to `z`, which may come from a sampler."""
        return z


class KL(Bottleneck):
    """Diagonal Gaussian, pulled to N(0, 1) by its KL divergence (Kingma & Welling 2014, appendix B).

    weight: of the divergence, which is in nats per element of z. h holds the means, then the log-variances, which are
    bounded to -30 and 4.
    """

    def __init__(self, weight: float = 1e-4) -> None:
        super().__init__()
        if not 0 <= weight < math.inf:
            raise ValueError(f"weight={weight} of the KL divergence must be 0 or more")
        self.weight = weight

    def in_channels(self, latent_channels: int) -> int:
        return 2 * latent_channels

    def forward(self, h: Tensor, generator: torch.Generator | None = None) -> Bottled:
        z, log_variance = h.float().chunk(2, dim=1)
        # A deviation beyond e^2 in one place would swamp the decoder; the gradient still leads back into the bounds.
        log_variance = log_variance.detach().clamp(-30, 4) + (log_variance - log_variance.detach())
        kl = 0.5 * (z.square() + log_variance.exp() - 1 - log_variance).mean()
        if generator is not None:
            noise = torch.randn(z.shape, generator=generator, device=generator.device).to(z)
            z = z + (log_variance / 2).exp() * noise
        return z, self.weight * kl, {"kl": kl.detach()}

    def encode(self, h: Tensor) -> Tensor:
        return h.float().chunk(2, dim=1)[0]


class Tanh(Bottleneck):
    """Latents between -1 and 1, at no loss."""

    def forward(self, h: Tensor, generator: torch.Generator | None = None) -> Bottled:
        return h.float().tanh(), h.new_zeros((), dtype=torch.float32), {}

    def decode(self, z: Tensor) -> Tensor:
        return z.clamp(-1, 1)


class FSQ(Bottleneck):
    """Finite scalar quantisation: channel i of z takes one of levels[i] values, evenly from -1 to 1.

    Source: Mentzer et al. 2023 (arXiv 2309.15505), sec. 3.1, with straight-through rounding after a tanh. The values
    stand symmetrically for even levels too, which the paper shifts by half a step.

    levels: of each latent channel, each 2 or more; the product is the number of codes, [8, 5, 5, 5] has 1,000.
    """

    levels: Tensor

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        if not levels or any(level < 2 for level in levels):
            raise ValueError(f"levels={list(levels)} must be one or more whole numbers from 2 up, one for each channel")
        if math.prod(levels) >= 2**63:
            raise ValueError(f"levels={list(levels)} make more codes than 64-bit indices can name; lower them")
        self.codes_count = math.prod(levels)
        self.register_buffer("levels", torch.tensor(list(levels)), persistent=False)

    def in_channels(self, latent_channels: int) -> int:
        if latent_channels != len(self.levels):
            raise ValueError(
                f"latent_channels={latent_channels}, but levels={self.levels.tolist()} are of {len(self.levels)} "
                "channels: give one level for each"
            )
        return latent_channels

    def forward(self, h: Tensor, generator: torch.Generator | None = None) -> Bottled:
        bounded = h.float().tanh()
        q = self.decode(bounded.detach())
        z = q + (bounded - bounded.detach())  # q to the last bit, with the gradient of the tanh
        _, counts = self.indices(q).unique(return_counts=True)
        logs = {"perplexity": perplexity(counts), "usage": counts.new_tensor(len(counts)) / self.codes_count}
        return z, h.new_zeros((), dtype=torch.float32), logs

    def encode(self, h: Tensor) -> Tensor:
        return self.decode(h.float().tanh())

    def decode(self, z: Tensor) -> Tensor:
        """The nearest code of each cell."""
        steps = self.steps(z)
        return torch.round((z.clamp(-1, 1) + 1) / 2 * steps) / steps * 2 - 1

    def indices(self, z: Tensor) -> Tensor:
        """z (B, C, *axes) -> number of its nearest code (B, *axes), from 0 to the product of the levels - 1."""
        digits = torch.round((z.movedim(1, -1).clamp(-1, 1) + 1) / 2 * (self.levels - 1)).long()
        return (digits * self.places).sum(dim=-1)

    def codes(self, indices: Tensor) -> Tensor:
        """Numbers of codes (B, *axes) -> z (B, C, *axes)."""
        digits = indices[..., None] // self.places % self.levels
        z = digits.movedim(-1, 1)
        steps = self.steps(z)
        return z / steps * 2 - 1

    @property
    def places(self) -> Tensor:
        """Value of each channel's digit in an index."""
        return torch.cat([torch.ones_like(self.levels[:1]), self.levels[:-1].cumprod(dim=0)])

    def steps(self, like: Tensor) -> Tensor:
        return (self.levels - 1).view(-1, *(1,) * (like.ndim - 2))


def perplexity(counts: Tensor) -> Tensor:
    """Number of codes () that, used evenly, would have the entropy of these counts."""
    share = counts / counts.sum()
    return torch.special.entr(share).sum().exp()
