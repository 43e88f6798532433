"""An edit of a clip by a whole cascade: what goes in, how it gets to each stage, and what is pasted back.

B batch, C channels, T time; clips are (B, C, T, ...), masks bool (1 or B, 1, T, ...), True where the clip is given.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmdiff.autoencoder import Autoencoder
from mmdiff.sampling import Denoise

from .known import check_mask, inpaint, known_steps, outpaint
from .start import noised


@dataclass(frozen=True, eq=False)
class Edit:
    """A clip to start from, or with parts to keep, in the space of what a stage or a cascade makes.

    clip: (1 or B, C, T, ...). strength: share of the first stage's steps that are run (`noised`): 0 returns the clip,
    1 ignores it but for what is known. known: bool (1 or B, 1, T, ...), sizes of 1 standing for all, True where the
    clip is kept; None keeps nothing. fade: steps of T over which what is known gives way to what is new, counted
    inside the known part; 0 pastes it exactly. Sounds decoded from a spectrogram need some: their phases do not meet.
    Raises ValueError for a strength outside 0..1, a mask that does not fit, and a fade with nothing known.
    """

    clip: Tensor
    strength: float = 1.0
    known: Tensor | None = None
    fade: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength={self.strength} must lie between 0 (keeps the input) and 1 (ignores it)")
        if self.fade < 0 or (self.fade and self.known is None):
            raise ValueError(f"fade={self.fade} must be 0 or more steps, and needs a mask of what is known")
        if self.known is not None:
            check_mask(self.known)
            want = (self.clip.shape[0], 1, *self.clip.shape[2:])
            if self.known.ndim != self.clip.ndim or any(
                n not in (1, w) for n, w in zip(self.known.shape, want, strict=True)
            ):
                raise ValueError(
                    f"known has shape {tuple(self.known.shape)}, but a clip of {tuple(self.clip.shape)} needs "
                    f"{want}, or 1 in the place of a size"
                )

    @property
    def mask(self) -> Tensor | None:
        """`known` at the clip's sizes, (1 or B, 1, T, ...)."""
        return None if self.known is None else self.known.expand(-1, -1, *self.clip.shape[2:])

    def to(self, device: torch.device | str) -> "Edit":
        known = None if self.known is None else self.known.to(device)
        return replace(self, clip=self.clip.to(device), known=known)

    def back(self, autoencoder: Autoencoder) -> "Edit":
        """The same edit in the autoencoder's latents: a latent is known where all data that it depends on is."""
        known = None if self.mask is None else autoencoder.known(self.mask)
        return replace(self, clip=autoencoder.encode(self.clip), known=known, fade=0)

    def padded(self, length: int) -> "Edit":
        """The same edit with the clip's last step held to `length`, the added steps unknown."""
        if length == self.clip.shape[2]:
            return self
        clip, given = outpaint(self.clip, 2, after=length - self.clip.shape[2])
        if self.mask is None:
            return replace(self, clip=clip)
        return replace(self, clip=clip, known=outpaint(self.mask, 2, after=length - self.mask.shape[2])[0] & given)

    def start(self, eps: Tensor, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        """State to sample from and the grid that is left (`noised`); what is known starts at its own noise level."""
        clip = self.clip.expand(eps.shape)
        x, rest = noised(clip, sigmas, self.strength, eps)
        if self.mask is not None:
            x = torch.where(self.mask, clip + rest[0].to(clip) * eps, x)
        return x, rest

    def keep(self, denoise: Denoise) -> Denoise:
        """The denoiser that returns the clip where it is known."""
        return denoise if self.mask is None else inpaint(denoise, self.clip, self.mask)

    def keep_steps(self, denoise: Denoise) -> Denoise:
        """The same for a model with one noise level per time step: steps that are known whole get level 0."""
        if self.mask is None:
            return denoise
        whole = self.mask[:, 0].reshape(len(self.mask), self.mask.shape[2], -1).all(dim=2)
        return known_steps(denoise, self.clip, whole)

    def paste(self, data: Tensor) -> Tensor:
        """`data` (B, C, T, ...) with the clip where it is known, faded along T."""
        if self.mask is None:
            return data
        clip, mask = self.clip.to(data), self.mask.to(data.device)
        if not self.fade:
            return torch.where(mask, clip, data)
        lines = mask.movedim(2, -1).flatten(0, -2)[:, None].to(data)  # (lines, 1, T)
        weight, kept = lines, lines
        for _ in range(self.fade):  # each round takes one step off both edges; the clip's own ends are no edges
            kept = -torch.nn.functional.max_pool1d(-kept, 3, 1, 1)
            weight = weight + kept
        weight = (weight / (self.fade + 1)).view(mask.movedim(2, -1).shape).movedim(-1, 2)
        return torch.where(weight == 1, clip, torch.lerp(data, clip.expand_as(data), weight))
