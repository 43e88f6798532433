"""A backbone made a denoiser: D(x, sigma) -> x0.

B batch, C channels, T time (axis 2). sigma is the true noise-to-signal ratio, of shape (), (B,) or (B, T).
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .conditioning import Cond
from .precond import Precond, expand_like
from .weighting import MSE, Distance


class Errors(NamedTuple):
    """What the loss of a batch is made of. error and share have sigma's shape, (B,) or (B, T)."""

    error: Tensor  # distance from the network's own target, of the elements that count
    share: Tensor  # of an item's elements that count, how many have this level; an item's sum is 1, or 0 if none counts
    extra: Tensor  # what the backbone gives beyond C channels, (B, C', T, ...); C' is 0 for most
    counts: Tensor  # bool, broadcasts to x: neither known nor masked
    parts: tuple[Tensor, ...]  # c_skip and x, c_out and prediction, each broadcasting to x; and what x is around

    @property
    def estimate(self) -> Tensor:
        """D(x, sigma), (B, C, T, ...)."""
        c_skip, x, c_out, prediction, mean = self.parts
        return mean + c_skip * x + c_out * prediction

    def mean(self, values: Tensor) -> Tensor:
        """Mean of values (B, C, T, ...) over what counts at each level, of error's shape; 0 where nothing does."""
        total = torch.where(self.counts, values, 0).sum(_axes(values, self.share.ndim))
        return total / _number(self.counts, values, self.share.ndim).clamp(min=1)

    def total(self, values: Tensor) -> Tensor:
        """Each item's (B,) mean of what has error's shape, every level by its share."""
        return values * self.share if self.share.ndim == 1 else (values * self.share).sum(1)


class Denoiser(nn.Module):
    """D(x, sigma) = c_skip * x + c_out * backbone(c_in * x, c_noise, cond) (Karras et al. 2022, eq. 7).

    The backbone sees c_in * x and the condition in the type of its own weights, so it may be of half precision; all
    else, c_noise too, is float32, or float64 where x is. Where the condition has a mean, x - mean and x0 - mean stand
    in the place of x and x0: the network denoises the residual alone (SRDiff, Li et al. 2022, arXiv 2104.14951).
    """

    def __init__(self, backbone: nn.Module, precond: Precond) -> None:
        super().__init__()
        self.backbone, self.precond = backbone, precond

    def network(self, x: Tensor, sigma: Tensor, cond: Cond | None) -> tuple[Tensor, Tensor]:
        """The backbone's own output for x at sigma: its first C channels, and the rest (learned variance)."""
        *_, c_in, c_noise = self.precond(sigma)
        if c_noise.ndim == 0:
            c_noise = c_noise.expand(x.shape[0])
        scaled = expand_like(c_in, x) * x
        dtype = next((p.dtype for p in self.backbone.parameters() if p.is_floating_point()), None)
        if dtype is not None:
            scaled, cond = scaled.to(dtype), cond if cond is None else _cast(cond, dtype)
        out = self.backbone(scaled, c_noise, cond).to(x.dtype)
        channels = x.shape[1]
        if out.shape[1] < channels:
            raise ValueError(f"the backbone gives {out.shape[1]} channels for an x of {channels}; it needs as many")
        return out[:, :channels], out[:, channels:]

    def forward(self, x: Tensor, sigma: Tensor, cond: Cond | None = None) -> Tensor:
        x, sigma = _at_least_float32(x), sigma.to(x.device)
        mean = _mean(cond, x)
        x = x - mean
        c_skip, c_out, *_ = self.precond(sigma)
        return mean + expand_like(c_skip, x) * x + expand_like(c_out, x) * self.network(x, sigma, cond)[0]

    def errors(
        self,
        x0: Tensor,
        sigma: Tensor,
        cond: Cond | None = None,
        *,
        noise: Tensor,
        distance: Distance | None = None,
        mask: Tensor | None = None,
    ) -> Errors:
        """Distance from the network's own target, (x0 - c_skip x) / c_out, at every noise level.

        sigma (B,) or (B, T); where it is 0 the step is known. noise: standard normal, of x0's shape.
        distance: default mean square. mask: bool, (B, T) or broadcastable to x0; False is padding.
        What is known or masked is in no mean. Raises ValueError where nothing of the batch is left.
        """
        x0, distance = _at_least_float32(x0), distance or MSE()
        mean = _mean(cond, x0)
        x0 = x0 - mean
        sigma = sigma.expand(len(x0)) if sigma.ndim == 0 else sigma
        counts = expand_like(sigma > 0, x0)  # not of x0's size: most batches have no mask
        if mask is not None:
            counts = counts & checked_mask(mask, x0)
        if not counts.any():
            raise ValueError("sigma is 0, or the mask False, in all of the batch: nothing is left to learn from it")
        x = x0 + expand_like(sigma, x0) * noise
        c_skip, c_out, *_ = self.precond(sigma)
        prediction, extra = self.network(x, sigma, cond)
        # (x0 - c_skip x) / c_out with x written out, without the cancellation of x0 in x where sigma is small
        target = expand_like(1 - c_skip, x0) * x0 - expand_like(c_skip * sigma, x0) * noise
        target = target / expand_like(torch.where(sigma > 0, c_out, 1), x0)
        here = _number(counts, x0, sigma.ndim)
        share = here / here.sum(-1, keepdim=True).clamp(min=1) if sigma.ndim == 2 else here > 0
        parts = (expand_like(c_skip, x0), x, expand_like(c_out, x0), prediction, mean)
        errors = Errors(torch.empty(0), share.to(sigma.dtype), extra, counts, parts)
        return errors._replace(error=distance.whole(errors.mean(distance.element(prediction - target))))

    def loss(
        self,
        x0: Tensor,
        sigma: Tensor,
        cond: Cond | None = None,
        *,
        noise: Tensor,
        distance: Distance | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The distance of `errors` for each item, (B,): the eps, v, EDM or flow loss, not weighted; 0 where none."""
        errors = self.errors(x0, sigma, cond, noise=noise, distance=distance, mask=mask)
        return errors.total(errors.error)


def checked_mask(mask: Tensor, x0: Tensor) -> Tensor:
    """mask (B, T) or broadcastable to x0 (B, C, T, ...), in a shape that broadcasts. Raises ValueError otherwise."""
    if mask.dtype != torch.bool:
        raise ValueError(f"mask is {mask.dtype}; it must be bool, True where an element counts")
    full = expand_like(mask, x0) if mask.ndim == 2 else mask
    if full.ndim != x0.ndim or any(m not in (1, n) for m, n in zip(full.shape, x0.shape, strict=True)):
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}; x0 {tuple(x0.shape)} needs (B, T), or a shape that broadcasts to it"
        )
    return full


def _axes(x: Tensor, levels: int) -> list[int]:
    """The axes of x (B, C, T, ...) over which a level, one per item or one per time step, is shared."""
    return [axis for axis in range(1, x.ndim) if axis != 2 or levels == 1]


def _number(counts: Tensor, x: Tensor, levels: int) -> Tensor:
    """How many elements of x count at each level, (B,) or (B, T); counts broadcasts to x."""
    size = torch.Size(n if axis in (0, 2) else m for axis, (m, n) in enumerate(zip(counts.shape, x.shape, strict=True)))
    whole = counts.expand(size)  # B and T in full, the other axes as they are
    return whole.sum(_axes(x, levels)) * (x.numel() // whole.numel())


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _mean(cond: Cond | None, x: Tensor) -> Tensor:
    """What x is around: the condition's mean, or 0."""
    return x.new_zeros(()) if cond is None or cond.mean is None else cond.mean.to(x)


def _cast(cond: Cond, dtype: torch.dtype) -> Cond:
    """The condition with its numbers in `dtype`."""
    slots = {"tokens": cond.tokens, "vector": cond.vector, "concat": cond.concat}
    return replace(cond, **{name: value.to(dtype) for name, value in slots.items() if value is not None})
