"""Rules around another rule: where it acts, how far it may go, and a classifier's push on top.

guidance: the rule inside; a number is `Cfg` of that scale. B batch, C channels, T time.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mmdiff.denoiser import expand_like
from mmdiff.sampling import Denoise

from .rules import Bind, Guidance, as_guidance, short


class _Around(Guidance):
    """A rule around the rule `guidance`, which alone decides whether `neg` matters."""

    guidance: Guidance | float

    @property
    def reads_neg(self) -> bool:
        return as_guidance(self.guidance).reads_neg


@dataclass(frozen=True)
class Rescale(_Around):
    """Guided estimate brought back to the conditional one's standard deviation, item by item.

    phi: share of the rescaled estimate, 0 (none) to 1. Source: arXiv 2305.08891, eq. 15-16, on the estimate of x0;
    the paper rescales v, which at high noise is nearly -x0. diffusers rescales whatever the network predicts.
    """

    guidance: Guidance | float = 5.0
    phi: float = 0.7

    def __post_init__(self) -> None:
        if not 0 <= self.phi <= 1:
            raise ValueError(f"phi={self.phi} must lie between 0 (no rescaling) and 1 (all of it); 0.7 is usual")
        as_guidance(self.guidance)

    def __call__(self, pos: Denoise, neg: Denoise, sigmas: Tensor, bind: Bind | None = None) -> Denoise:
        heard: list[Tensor] = []  # what the rule inside had of `pos` in this call, so that it is not called twice

        def listened(x: Tensor, sigma: Tensor) -> Tensor:
            heard[:] = [pos(x, sigma)]
            return heard[0]

        guide = as_guidance(self.guidance)(listened, neg, sigmas, bind)

        def rescaled(x: Tensor, sigma: Tensor) -> Tensor:
            heard.clear()
            guided = guide(x, sigma)
            conditional = heard.pop() if heard else pos(x, sigma)
            axes = tuple(range(1, x.ndim))
            spread = guided.std(dim=axes, keepdim=True)
            ratio = conditional.std(dim=axes, keepdim=True) / torch.where(spread > 0, spread, 1)  # silence stays so
            return torch.lerp(guided, guided * ratio, self.phi)

        return guide if self.phi == 0 else rescaled


@dataclass(frozen=True)
class Interval(_Around):
    """Guides where low < sigma <= high alone; elsewhere the conditional estimate, at half the cost.

    Source: arXiv 2404.07724, with its values for SDXL as defaults. Raises ValueError, in the call, if no level
    of the grid lies inside.
    """

    guidance: Guidance | float = 5.0
    low: float = 0.28
    high: float = 5.42

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high:
            raise ValueError(f"low={self.low}, high={self.high} must satisfy 0 <= low < high; inf is no upper end")
        as_guidance(self.guidance)

    def __call__(self, pos: Denoise, neg: Denoise, sigmas: Tensor, bind: Bind | None = None) -> Denoise:
        if not self._holds(sigmas).any():
            raise ValueError(
                f"low={self.low}, high={self.high}: no level of the grid ({float(sigmas[0]):g} down to "
                f"{float(sigmas[-2]):g}) lies between them, so that nothing is guided"
            )
        guide = as_guidance(self.guidance)(pos, neg, sigmas, bind)

        def limited(x: Tensor, sigma: Tensor) -> Tensor:
            inside = self._holds(sigma)
            if not inside.any():  # asked on the CPU: a wait for the device, which a call saved is worth
                return pos(x, sigma)
            if (inside | (sigma == 0)).all():  # a known part has level 0 and is what it is
                return guide(x, sigma)
            return torch.where(expand_like(inside, x), guide(x, sigma), pos(x, sigma))

        return limited

    def _holds(self, sigma: Tensor) -> Tensor:
        return (sigma > self.low) & (sigma <= self.high)


@dataclass(frozen=True)
class Threshold(_Around):
    """Dynamic thresholding: an item's estimate is cut at its own `percentile` of |x0| and divided by it.

    percentile: 0 to 1. limit: where the data ends, 1 for pixels in [-1, 1]; an item whose percentile lies below it is
    cut at `limit` alone and keeps its scale. Not for latents, which have no such end.
    Source: arXiv 2205.11487, sec. 2.3.
    """

    guidance: Guidance | float = 5.0
    percentile: float = 0.995
    limit: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.percentile <= 1:
            raise ValueError(f"percentile={self.percentile} must lie in 0..1, 0 excluded; 0.995 is usual")
        if not 0 < self.limit < math.inf:
            raise ValueError(f"limit={self.limit} must be positive and finite; 1 for pixels in [-1, 1]")
        as_guidance(self.guidance)

    def __call__(self, pos: Denoise, neg: Denoise, sigmas: Tensor, bind: Bind | None = None) -> Denoise:
        guide = as_guidance(self.guidance)(pos, neg, sigmas, bind)

        def thresholded(x: Tensor, sigma: Tensor) -> Tensor:
            x0 = guide(x, sigma)
            sizes = x0.abs().flatten(1).sort(dim=1).values  # torch.quantile takes no more than 2^24 values
            place = self.percentile * (sizes.shape[1] - 1)
            below, above = sizes[:, math.floor(place)], sizes[:, math.ceil(place)]
            edge = torch.lerp(below, above, place - math.floor(place)).clamp(min=self.limit)
            edge = expand_like(edge, x0)
            return x0.clamp(-edge, edge) * (self.limit / edge)

        return thresholded


@dataclass(frozen=True, repr=False)
class Classifier(_Around):
    """Push up the gradient of a classifier of noisy clips: D + sigma^2 * scale * grad_x log p(target | x, sigma).

    classifier: the model folder of a module that maps (x, sigma) to logits (B, classes), or the module. x is
        x0 + sigma * eps and sigma has shape (B,). target: the class, or one for each item. guidance: the rule pushed;
        1, the conditional estimate, as it is.
    Source: arXiv 2105.05233, algorithm 2 and eq. 14, whose x_t is x / sqrt(1 + sigma^2).
    """

    classifier: str | nn.Module
    target: int | Sequence[int]
    scale: float = 1.0
    guidance: Guidance | float = 1.0
    model: nn.Module = field(init=False, compare=False)

    def __post_init__(self) -> None:
        from mmdiff.io import load

        object.__setattr__(
            self, "model", load(self.classifier) if isinstance(self.classifier, str) else self.classifier
        )
        if self.model.training:
            raise ValueError("classifier is in training mode, where its output is random; call classifier.eval() first")
        if not math.isfinite(self.scale) or self.scale == 0:
            raise ValueError(f"scale={self.scale} must be finite and not 0, which would push nowhere; 1 to 10 is usual")
        as_guidance(self.guidance)

    def __call__(self, pos: Denoise, neg: Denoise, sigmas: Tensor, bind: Bind | None = None) -> Denoise:
        guide = as_guidance(self.guidance)(pos, neg, sigmas, bind)
        model = self.model

        def pushed(x: Tensor, sigma: Tensor) -> Tensor:
            level = expand_like(sigma, x)
            return guide(x, sigma) + self.scale * level**2 * self.gradient(model.to(x.device), x, sigma)

        return pushed

    def __repr__(self) -> str:
        return (
            f"Classifier(classifier={short(self.classifier)}, target={self.target}, scale={self.scale}, "
            f"guidance={self.guidance})"
        )

    def gradient(self, model: nn.Module, x: Tensor, sigma: Tensor) -> Tensor:
        """The gradient of log p(target | x, sigma) by x, of x's shape. Raises ValueError for targets of other size."""
        targets = [self.target] * len(x) if isinstance(self.target, int) else list(self.target)
        if len(targets) != len(x):
            raise ValueError(f"target={self.target} has {len(targets)} classes for a batch of {len(x)}; give one each")
        with torch.inference_mode(False), torch.enable_grad():  # Generate samples without gradients; this needs one
            leaf = x.detach().clone().requires_grad_()
            logits = model(leaf, sigma.detach().clone().expand(len(x)) if sigma.ndim == 0 else sigma.detach().clone())
            if not 0 <= min(targets) <= max(targets) < logits.shape[1]:
                raise ValueError(f"target={self.target}: the classifier knows the classes 0..{logits.shape[1] - 1}")
            chosen = logits.log_softmax(dim=1).gather(1, torch.tensor(targets, device=x.device)[:, None])
            (slope,) = torch.autograd.grad(chosen.sum(), leaf)
        return slope
