"""The contract, and the rules that are linear in the estimates: one scale, one for each time step or each condition.

pos, neg, weak: denoisers D(x, sigma) -> x0 under the prompt, the null or negative prompt, and of a weaker model.
B batch, C channels, T time (axis 2 of x).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from mmdiff.model import DiffusionModel
from mmdiff.sampling import Denoise

from .together import together


class Bind(Protocol):
    """Binds another condition than the prompt's: with changes, key -> one value for all items, or another model."""

    def __call__(self, changes: Mapping[str, Any], model: nn.Module | None = None) -> Denoise: ...


class Guidance(ABC):
    """Rule that makes one denoiser of the conditional and the unconditional one, for one sampling run."""

    @property
    def reads_neg(self) -> bool:
        """Whether `neg` changes the result: where it does not, a negative prompt would be lost and is refused."""
        return True

    @abstractmethod
    def __call__(self, pos: Denoise, neg: Denoise, sigmas: Tensor, bind: Bind | None = None) -> Denoise:
        """The guided denoiser. What it remembers from call to call begins anew where a run does, at sigmas[0].

        sigmas: (steps + 1,), the grid that it will be sampled on. bind: for rules that need further conditions.
        """


def cfg(pos: Denoise, neg: Denoise, scale: float) -> Denoise:
    """Denoiser at neg + scale * (pos - neg): guided towards `pos` and away from `neg`.

    `neg` bound to the null prompt is classifier-free guidance (arXiv 2207.12598, eq. 6 with scale = 1 + w), to another
    prompt a negative prompt, to a weaker model autoguidance (arXiv 2406.02507, eq. 3).
    scale: 1 is `pos` alone and never calls `neg`, 0 is `neg` alone and never calls `pos`, above 1 guides.
    Raises ValueError if the scale is not finite.
    """
    check_finite("scale", scale)
    if scale == 1:
        return pos
    if scale == 0:
        return neg

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        d_neg, d_pos = together([neg, pos], x, sigma)
        return torch.lerp(d_neg, d_pos, scale)

    return guided


def compose(conditions: Sequence[Denoise], neg: Denoise, scales: Sequence[float]) -> Denoise:
    """Denoiser at neg + sum_i scales[i] * (conditions[i] - neg): several conditions at once.

    A negative scale is the paper's NOT. Source: composable diffusion, arXiv 2206.01714.
    Raises ValueError unless there is one finite scale for each condition.
    """
    if not conditions or len(conditions) != len(scales):
        raise ValueError(f"{len(conditions)} conditions need as many scales, at least one, not {len(scales)}")
    for scale in scales:
        check_finite("scale", scale)

    def composed(x: Tensor, sigma: Tensor) -> Tensor:
        d_neg, *estimates = together([neg, *conditions], x, sigma)
        guided = d_neg
        for scale, d in zip(scales, estimates, strict=True):
            guided = guided + scale * (d - d_neg)
        return guided

    return composed


def short(model: str | nn.Module) -> str:
    """A model in one line: its folder, or its class."""
    return repr(model) if isinstance(model, str) else type(model).__name__


def check_finite(name: str, scale: float) -> None:
    if not math.isfinite(scale):
        raise ValueError(f"{name}={scale} must be finite; 1 is no guidance, 2 to 8 is usual")


@dataclass(frozen=True)
class Cfg(Guidance):
    """Classifier-free guidance, or with a negative prompt away from it: `cfg`. A plain number is this rule."""

    scale: float = 3.0

    def __post_init__(self) -> None:
        check_finite("scale", self.scale)

    @property
    def reads_neg(self) -> bool:
        return self.scale != 1

    def __call__(self, pos: Denoise, neg: Denoise, sigmas: Tensor, bind: Bind | None = None) -> Denoise:
        return cfg(pos, neg, self.scale)


def as_guidance(guidance: Guidance | float) -> Guidance:
    """A number as the `Cfg` of that scale; a Guidance as it is. Raises ValueError for anything else."""
    if isinstance(guidance, Guidance):
        return guidance
    if not isinstance(guidance, (int, float)) or isinstance(guidance, bool):
        raise ValueError(f"guidance={guidance!r} must be a number or a Guidance of mmdiff.guidance")
    return Cfg(float(guidance))


@dataclass(frozen=True)
class OverTime(Guidance):
    """`Cfg` whose scale changes over the clip's T axis, for image-to-video: little where a frame is given.

    linear: from `first` at the first time step to `last` at the last one (Stable Video Diffusion, arXiv 2311.15127).
    triangle: from `first` at both ends to `last` in the middle, for clips that return to where they began
    (SV3D, arXiv 2403.12008). A clip of one time step has the scale `first`.
    """

    first: float = 1.0
    last: float = 3.0
    shape: Literal["linear", "triangle"] = "linear"

    def __post_init__(self) -> None:
        check_finite("first", self.first)
        check_finite("last", self.last)
        if self.shape not in ("linear", "triangle"):
            raise ValueError(f"shape={self.shape!r} must be linear or triangle")

    @property
    def reads_neg(self) -> bool:
        return not self.first == self.last == 1

    def __call__(self, pos: Denoise, neg: Denoise, sigmas: Tensor, bind: Bind | None = None) -> Denoise:
        if self.first == self.last:
            return cfg(pos, neg, self.first)

        def guided(x: Tensor, sigma: Tensor) -> Tensor:
            d_neg, d_pos = together([neg, pos], x, sigma)
            share = torch.linspace(0, 1, x.shape[2], dtype=x.dtype, device=x.device)
            if self.shape == "triangle":
                share = 1 - (2 * share - 1).abs() if x.shape[2] > 1 else share
            scale = self.first + (self.last - self.first) * share
            return torch.lerp(d_neg, d_pos, scale.reshape(-1, *(1,) * (x.ndim - 3)))

        return guided


@dataclass(frozen=True)
class Compose(Guidance):
    """Several prompts at once, each with a scale: `compose`, of the clip's own prompt at `scale` and of `others`.

    others: prompt -> scale; below 0 guides away from it. key: where the conditioner reads prompts in the batch.
    One more call of the network for each.
    """

    others: Mapping[str, float]
    scale: float = 3.0
    key: str = "caption"

    def __post_init__(self) -> None:
        if not self.others:
            raise ValueError("others={} names no further prompt; for one condition use Cfg")
        for name, scale in {"scale": self.scale, **self.others}.items():
            check_finite(name, scale)

    def __call__(self, pos: Denoise, neg: Denoise, sigmas: Tensor, bind: Bind | None = None) -> Denoise:
        if bind is None:
            raise ValueError("Compose needs `bind`, which makes denoisers of further prompts; Generate gives it")
        others = [bind({self.key: prompt}) for prompt in self.others]
        return compose([pos, *others], neg, [self.scale, *self.others.values()])


@dataclass(frozen=True, repr=False)
class Autoguidance(Guidance):
    """Away from a weaker model under the same prompt: smaller, or trained for less (arXiv 2406.02507, eq. 3).

    weak: the model's folder, or the model. guidance: the rule, with the weak model's estimate as `neg`. The null
    prompt is not used, nor a negative one.
    """

    weak: str | nn.Module
    guidance: Guidance | float = 2.0
    model: nn.Module = field(init=False, compare=False)

    def __post_init__(self) -> None:
        from mmdiff.io import load

        object.__setattr__(self, "model", load(self.weak) if isinstance(self.weak, str) else self.weak)
        if not isinstance(self.model, DiffusionModel):
            raise ValueError(f"weak={short(self.weak)} is a {type(self.model).__name__}, not a DiffusionModel")
        if self.model.training:
            raise ValueError("weak is in training mode, where conditions are dropped at random; call weak.eval() first")
        if not as_guidance(self.guidance).reads_neg:
            raise ValueError(f"guidance={self.guidance} never reads the weaker model; 2 is usual")

    @property
    def reads_neg(self) -> bool:
        return False

    def __repr__(self) -> str:
        return f"Autoguidance(weak={short(self.weak)}, guidance={self.guidance})"

    def __call__(self, pos: Denoise, neg: Denoise, sigmas: Tensor, bind: Bind | None = None) -> Denoise:
        if bind is None:
            raise ValueError("Autoguidance needs `bind`, which binds the prompt to the weaker model; Generate gives it")
        return as_guidance(self.guidance)(pos, bind({}, self.model), sigmas, bind)
