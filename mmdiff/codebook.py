"""Vector quantisation: latents are the codes of a learned book.

B batch, C channels, `*axes` T and what follows it, K codes, N vectors of a batch.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .bottleneck import Bottled, Bottleneck, perplexity
from .processes import shared, summed


class VQ(Bottleneck):
    """The nearest of K codes, whose book follows the vectors by moving averages (van den Oord et al. 2017, app. A.1).

    The gradient passes straight through to h, which the commitment loss holds near its code (eq. 3). The averages are
    of shares of a batch's N vectors, not of counts, so that batches of any size count alike; the codes are the same. A
    code is dead when its share is below `revive` / K; before each batch of training, the dead take vectors of that
    batch, drawn without replacement where there are enough, and the share 1 / K. So the first batch of all makes the
    book. Processes that train together join their shares, and take rank 0's vectors.

    Args:
        codes: K. channels: of a code, the latent channels. decay: of the moving averages.
        commitment: weight of the mean square of h less its code. revive: 0 leaves dead codes dead.

    Learns only where a generator is given.
    """

    book: Tensor
    uses: Tensor
    sums: Tensor
    begun: Tensor

    def __init__(
        self, codes: int, channels: int, decay: float = 0.99, commitment: float = 0.25, revive: float = 0.03
    ) -> None:
        super().__init__()
        if codes < 2 or channels < 1:
            raise ValueError(f"codes={codes} must be 2 or more and channels={channels} 1 or more")
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay} must be at least 0 and below 1; 0.99 averages over some 100 batches")
        if commitment < 0:
            raise ValueError(f"commitment={commitment} must not be negative; 0.25 is usual")
        if not 0 <= revive < 1:
            raise ValueError(f"revive={revive} must be at least 0 and below 1, a share of even use")
        self.decay, self.commitment, self.revive = decay, commitment, revive
        self.register_buffer("book", torch.zeros(codes, channels))
        self.register_buffer("uses", torch.zeros(codes))  # the paper's N over the vectors of a batch
        self.register_buffer("sums", torch.zeros(codes, channels))  # the paper's m over the same
        self.register_buffer("begun", torch.zeros((), dtype=torch.bool))

    def in_channels(self, latent_channels: int) -> int:
        if latent_channels != self.book.shape[1]:
            raise ValueError(
                f"latent_channels={latent_channels}, but the codes of VQ have channels={self.book.shape[1]}: "
                "make them equal"
            )
        return latent_channels

    def forward(self, h: Tensor, generator: torch.Generator | None = None) -> Bottled:
        h = h.float()
        vectors = h.detach().movedim(1, -1).flatten(0, -2)  # (N, C)
        if generator is not None:
            self.revive_dead(vectors, generator)
        indices = self.indices(h)
        q = self.codes(indices)
        counts = torch.bincount(indices.flatten(), minlength=len(self.book)).float()
        if generator is not None:
            sums = vectors.new_zeros(self.sums.shape).index_add_(0, indices.flatten(), vectors)
            total = summed(counts.sum())
            self.follow(summed(counts) / total, summed(sums) / total)
        commitment = F.mse_loss(h, q)
        logs = {
            "commitment": commitment.detach(),
            "perplexity": perplexity(counts),
            "usage": (counts > 0).float().mean(),
        }
        return q + (h - h.detach()), self.commitment * commitment, logs  # q to the last bit, with h's gradient

    def encode(self, h: Tensor) -> Tensor:
        return self.decode(h)

    def decode(self, z: Tensor) -> Tensor:
        """The nearest code of each cell."""
        return self.codes(self.indices(z))

    def indices(self, z: Tensor) -> Tensor:
        """z (B, C, *axes) -> number of its nearest code (B, *axes), the lowest of equals."""
        flat = z.float().movedim(1, -1)
        book = self.book.float()
        with torch.autocast(z.device.type, enabled=False):  # whose half precision would choose wrong codes
            distance = book.square().sum(dim=1) - 2 * flat.detach() @ book.T  # less the vector's own square
        return distance.argmin(dim=-1)

    def codes(self, indices: Tensor) -> Tensor:
        """Numbers of codes (B, *axes) -> z (B, C, *axes)."""
        return F.embedding(indices, self.book.float()).movedim(-1, 1)

    @torch.no_grad()
    def follow(self, shares: Tensor, sums: Tensor) -> None:
        """Moves the averages towards a batch's shares (K,) and sums of vectors (K, C), and the used codes with them.

        A batch that is not finite moves nothing. A code that is not used stays, as its average's quotient does.
        """
        rate = (1 - self.decay) * sums.isfinite().all()
        self.uses.copy_(self.uses.float().lerp(shares, rate))
        self.sums.copy_(self.sums.float().lerp(sums.nan_to_num(0, 0, 0), rate))
        used = (shares > 0) & (rate > 0)
        self.book.copy_(torch.where(used[:, None], self.sums / self.uses[:, None], self.book))

    @torch.no_grad()
    def revive_dead(self, vectors: Tensor, generator: torch.Generator) -> None:
        """Puts vectors (N, C) of a batch in the place of dead codes."""
        order = [torch.randperm(len(vectors), generator=generator, device=generator.device)]
        while len(order) * len(vectors) < len(self.book):
            order.append(torch.randperm(len(vectors), generator=generator, device=generator.device))
        drawn = shared(vectors[torch.cat(order)[: len(self.book)].to(vectors.device)])  # (K, C)
        even = 1 / len(self.book)
        dead = (self.uses < self.revive * even) | ~self.begun
        dead = dead[:, None] & drawn.isfinite().all()
        self.uses.copy_(torch.where(dead[:, 0], even, self.uses))
        self.sums.copy_(torch.where(dead, even * drawn, self.sums))
        self.book.copy_(torch.where(dead, drawn, self.book))
        self.begun.copy_(self.begun | dead.any())
