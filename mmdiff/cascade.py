"""From a prompt to a clip: stages, each of which makes a clip from the prompt and the clip of the stage before.

B batch, C channels, T time. A clip's data is what its stage works on: pixels, a spectrogram, samples of a waveform.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .autoencoder import Autoencoder
from .conditioning import Batch, LowRes
from .guidance import cfg
from .model import DiffusionModel
from .sampling import Noise, Sampler
from .sampling import start as begin
from .sigmas import Sigmas

Shape = tuple[int, ...]
Progress = Callable[[int, int], None]  # (steps done, steps in all)


@dataclass(frozen=True)
class Clip:
    """data (B, C, T, ...); rate: steps of T per second (frames per second, Hz)."""

    data: Tensor
    rate: float


class Stage(ABC):
    """One step of a cascade. `shape` is (C, T, ...) of the clip it makes."""

    @abstractmethod
    def needs(self, shape: Shape, rate: float) -> tuple[Shape, float] | None:
        """Shape and rate of the clip it must be given to make one of `shape` and `rate`; None: it starts from nothing.

        Raises ValueError where no clip would do.
        """

    @abstractmethod
    def __call__(
        self,
        prompt: Batch,
        start: Clip | None = None,
        *,
        shape: Shape,
        rate: float,
        noise: Noise,
        negative: Batch | None = None,
        progress: Progress | None = None,
    ) -> Clip:
        """A clip of `shape` and `rate`, for each item of `prompt`, a batch as the conditioner reads it.

        start: clip of the stage before. noise: source of every random number. negative: prompts to guide away from.
        """


@dataclass(frozen=True)
class Generate(Stage):
    """Samples from a diffusion model: a base stage, or an upsampler where the model is conditioned on a `LowRes` clip.

    sigmas: grid to sample on. sampler, steps: how. guidance: scale of classifier-free guidance; 1 is none.
    """

    model: DiffusionModel
    sigmas: Sigmas
    sampler: Sampler
    steps: int = 32
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1")

    def lowres(self) -> LowRes | None:
        found = (
            []
            if self.model.conditioner is None
            else [m for m in self.model.conditioner.modules() if isinstance(m, LowRes)]
        )
        return found[0] if found else None

    def needs(self, shape: Shape, rate: float) -> tuple[Shape, float] | None:
        lowres = self.lowres()
        return None if lowres is None else reduced(lowres.degrade, shape, rate)

    @torch.inference_mode()
    def __call__(
        self,
        prompt: Batch,
        start: Clip | None = None,
        *,
        shape: Shape,
        rate: float,
        noise: Noise,
        negative: Batch | None = None,
        progress: Progress | None = None,
    ) -> Clip:
        if self.model.training:
            raise ValueError(
                "the model is in training mode, where conditions are dropped at random; call model.eval() first"
            )
        device = next(self.model.parameters()).device
        x = noise(torch.empty(batch_size(prompt), *shape, device=device))
        if self.lowres() is not None:
            if start is None:
                raise ValueError(
                    "an upsampling stage needs the clip of a stage before it; put one first in the cascade"
                )
            low = start.data.to(device)
            given = {"low": low, "low_noise": noise(low)}  # one draw for both guided calls
            prompt, negative = {**prompt, **given}, None if negative is None else {**negative, **given}
        denoise = self.model.bind(self.model.condition(prompt))
        if self.guidance != 1:
            cond = self.model.null(prompt) if negative is None else self.model.condition(negative)
            denoise = cfg(denoise, self.model.bind(cond), self.guidance)
        sigmas = self.sigmas(self.steps)
        for step in self.sampler.steps(denoise, begin(x, sigmas[0]), sigmas, noise):
            x = step.x
            if progress is not None:
                progress(step.number + 1, len(sigmas) - 1)
        return Clip(x, rate)


@dataclass(frozen=True)
class Decode(Stage):
    """Decodes the clip before with an autoencoder: latents to pixels, a mel spectrogram to a waveform."""

    autoencoder: Autoencoder

    def needs(self, shape: Shape, rate: float) -> tuple[Shape, float]:
        return reduced(self.autoencoder, shape, rate)

    @torch.inference_mode()
    def __call__(
        self,
        prompt: Batch,
        start: Clip | None = None,
        *,
        shape: Shape,
        rate: float,
        noise: Noise,
        negative: Batch | None = None,
        progress: Progress | None = None,
    ) -> Clip:
        if start is None:
            raise ValueError("a decoding stage needs the clip of a stage before it; put one first in the cascade")
        data = self.autoencoder.decode(start.data)
        if progress is not None:
            progress(1, 1)
        return Clip(data, rate)


def reduced(autoencoder: Autoencoder, shape: Shape, rate: float) -> tuple[Shape, float]:
    """Shape and rate of the latents of a clip of `shape` and `rate`."""
    return autoencoder.latent_shape(shape), rate / autoencoder.factors[0]


def batch_size(prompt: Batch) -> int:
    """Number of items a prompt describes."""
    return len(next(iter(prompt.values())))


@dataclass(frozen=True)
class Cascade:
    """Stages in order, by name.

    shape (C, T, ...) and rate are what the last one makes unless the caller says otherwise. multiple: what a length in
    T must be a multiple of for every stage; other lengths are made longer and cut.
    """

    stages: Mapping[str, Stage]
    shape: Sequence[int]
    rate: float
    multiple: int = 1

    def plan(self, shape: Shape, rate: float) -> list[tuple[Shape, float]]:
        """Shape and rate of every stage's clip, so that the last one makes `shape` at `rate`."""
        if not self.stages:
            raise ValueError("stages={} is empty; a cascade needs at least one stage")
        plan: list[tuple[Shape, float]] = []
        need: tuple[Shape, float] | None = (tuple(shape), rate)
        for name, stage in reversed(list(self.stages.items())):
            if need is None:
                raise ValueError(
                    f"stage {name!r} stands before one that starts from nothing, so its clip would be lost"
                )
            plan.append(need)
            need = stage.needs(*need)
        if need is not None:
            raise ValueError(f"the first stage, {next(iter(self.stages))!r}, needs a clip to start from")
        return plan[::-1]

    def __call__(
        self,
        prompt: Batch,
        *,
        noise: Noise,
        shape: Shape | None = None,
        negative: Batch | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> Clip:
        """A clip (B, *shape). progress is called with (stage, steps done, steps in all)."""
        if negative is not None and all(
            stage.guidance == 1 for stage in self.stages.values() if isinstance(stage, Generate)
        ):
            raise ValueError(
                "a negative prompt has no effect at guidance=1; raise the guidance of a stage, or give no negative"
            )
        channels, length, *rest = shape or self.shape
        plan = self.plan((channels, -(-length // self.multiple) * self.multiple, *rest), self.rate)
        clip: Clip | None = None
        for (name, stage), (size, rate) in zip(self.stages.items(), plan, strict=True):
            report = None if progress is None else lambda done, total, name=name: progress(name, done, total)
            clip = stage(prompt, clip, shape=size, rate=rate, noise=noise, negative=negative, progress=report)
        assert clip is not None  # plan() refuses an empty cascade
        return Clip(clip.data[:, :, :length], clip.rate)

    def to(self, device: torch.device | str) -> "Cascade":
        """The same cascade with its models on `device`, moved in place."""
        for stage in self.stages.values():
            if isinstance(stage, Generate):
                stage.model.to(device)
            elif isinstance(stage, Decode):
                stage.autoencoder.to(device)
        return self

    @property
    def first(self) -> Stage:
        """The stage that starts from nothing."""
        return next(iter(self.stages.values()))

    def with_base(self, **settings: object) -> "Cascade":
        """The same cascade with other settings (steps, sampler, sigmas, guidance) of its first stage."""
        name = next(iter(self.stages))
        return replace(self, stages={**self.stages, name: replace(self.first, **settings)})  # type: ignore[type-var]
