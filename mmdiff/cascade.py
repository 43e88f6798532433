"""From a prompt to a clip: stages, each of which makes a clip from the prompt and the clip of the stage before.

B batch, C channels, T time. A clip's data is what its stage works on: pixels, a spectrogram, samples of a waveform.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .autoencoder import Autoencoder
from .conditioning import Batch, Cond, Conditioner, Hint, Join, LowRes
from .editing import Edit, Window, cut
from .guidance import Guidance, as_guidance
from .model import DiffusionModel
from .prompts import alternate, alternatives
from .sampling import Denoise, Noise, Sampler
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
        edit: Edit | None = None,
    ) -> Clip:
        """A clip of `shape` and `rate`, for each item of `prompt`, a batch as the conditioner reads it.

        start: clip of the stage before. noise: source of every random number. negative: prompts to guide away from.
        edit: a clip of `shape` to start from or to keep parts of; not given where there is none.
        """

    def back(self, edit: Edit) -> Edit:
        """An edit of the clip it makes, in the space of the clip it must be given. Raises ValueError where none is."""
        raise ValueError(f"a {type(self).__name__} stage takes no edits: it has no way back to the stage before it")


@dataclass(frozen=True)
class Generate(Stage):
    """Samples from a diffusion model: a base stage, or an upsampler where the model is conditioned on a `LowRes` clip.

    sigmas: grid to sample on. sampler, steps: how. guidance: scale of classifier-free guidance, 1 is none; or a rule of
    `mmdiff.guidance`.
    window: for clips longer than the model was trained on, or without an end. per_step: the model was trained with one
    noise level per time step, so that known steps of an edit get level 0 instead of a replacement at every level.
    """

    model: DiffusionModel
    sigmas: Sigmas
    sampler: Sampler
    steps: int = 32
    guidance: float | Guidance = 1.0
    window: Window | None = None
    per_step: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1")
        if self.rule.reads_neg and not droppable(self.model.conditioner):
            raise ValueError(
                f"guidance={self.guidance} would change nothing: the model has no prompt or class that its conditioner "
                "can leave out; use guidance=1"
            )

    @property
    def rule(self) -> Guidance:
        """The guidance as a rule."""
        return as_guidance(self.guidance)

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

    def back(self, edit: Edit) -> Edit:
        lowres = self.lowres()
        return super().back(edit) if lowres is None else edit.back(lowres.degrade)

    def bind(self, cond: Cond | None, edit: Edit | None = None, model: DiffusionModel | None = None) -> Denoise:
        """The model's denoiser under a condition, over windows and with known steps where the settings say so."""
        model = model or self.model
        denoise: Denoise = model.bind(cond)
        if self.window is not None:
            lowres = self.lowres() if self.window.loop else None
            first = 0 if lowres is None else lowres.degrade.factors[0]  # of the steps that close a loop, see __call__
            denoise = self.window(lambda steps: model.bind(cut(cond, steps + first)))
        return edit.keep_steps(denoise) if self.per_step and edit is not None else denoise

    def prompted(self, prompt: Batch, sigmas: Tensor, edit: Edit | None = None, model: Any = None) -> Denoise:
        """A model's denoiser under a prompt, which may alternate from step to step of the grid `sigmas`."""
        model = self.model if model is None else model.to(next(self.model.parameters()).device)
        turns = alternatives(model.conditioner, prompt)
        return alternate([self.bind(model.condition(turn), edit, model) for turn in turns], sigmas)

    def guided(self, prompt: Batch, negative: Batch | None, sigmas: Tensor, edit: Edit | None = None) -> Denoise:
        """What is sampled on the grid `sigmas`: the model's denoiser under the prompt, guided."""

        def bind(changes: Batch, model: nn.Module | None = None) -> Denoise:
            changed = {key: [value] * batch_size(prompt) for key, value in changes.items()}
            return self.prompted({**prompt, **changed}, sigmas, edit, model)

        pos = neg = bind({})
        if self.rule.reads_neg and negative is None:
            neg = self.bind(self.model.null(prompt), edit)
        elif self.rule.reads_neg and negative is not None:
            neg = self.prompted(negative, sigmas, edit)
        return self.rule(pos, neg, sigmas, bind)

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
        edit: Edit | None = None,
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
            if self.window is not None and self.window.loop:  # it is interpolated from the end to the start too
                given = {key: torch.cat([z[:, :, -1:], z, z[:, :, :1]], dim=2) for key, z in given.items()}
            prompt, negative = {**prompt, **given}, None if negative is None else {**negative, **given}
        seen = shape[1] if self.window is None else min(shape[1], self.window.length)
        sigmas = self.sigmas.sized((seen, *shape[2:]))(self.steps)  # a size-dependent shift goes by what a call sees
        x, sigmas = (begin(x, sigmas[0]), sigmas) if edit is None else edit.start(x, sigmas)
        if len(sigmas) > 1:
            denoise = self.guided(prompt, negative, sigmas, edit)
            if edit is not None:
                denoise = edit.keep(denoise)
            for step in self.sampler.steps(denoise, x, sigmas, noise):
                x = step.x
                if progress is not None:
                    progress(step.number + 1, len(sigmas) - 1)
        return Clip(x if edit is None else edit.paste(x), rate)


@dataclass(frozen=True)
class Decode(Stage):
    """Decodes the clip before with an autoencoder: latents to pixels, a mel spectrogram to a waveform."""

    autoencoder: Autoencoder

    def needs(self, shape: Shape, rate: float) -> tuple[Shape, float]:
        return reduced(self.autoencoder, shape, rate)

    def back(self, edit: Edit) -> Edit:
        return edit.back(self.autoencoder)

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
        edit: Edit | None = None,
    ) -> Clip:
        if start is None:
            raise ValueError("a decoding stage needs the clip of a stage before it; put one first in the cascade")
        data = self.autoencoder.decode(start.data)[:, :, : shape[1]]  # a last latent may stand for fewer steps
        if progress is not None:
            progress(1, 1)
        return Clip(data if edit is None else edit.paste(data), rate)


def reduced(autoencoder: Autoencoder, shape: Shape, rate: float) -> tuple[Shape, float]:
    """Shape and rate of the latents of a clip of `shape` and `rate`."""
    return autoencoder.latent_shape(shape), rate / autoencoder.factors[0]


def droppable(conditioner: Conditioner | None) -> bool:
    """Whether a conditioner's null differs from its condition: a low-resolution clip and a hint alone stay in both."""
    parts = () if conditioner is None else conditioner.modules()
    return any(isinstance(part, Conditioner) and not isinstance(part, (Hint, Join, LowRes)) for part in parts)


def batch_size(prompt: Batch) -> int:
    """Number of items a prompt describes."""
    return len(next(iter(prompt.values())))


@dataclass(frozen=True)
class Cascade:
    """Stages in order, by name.

    shape (C, T, ...) and rate are what the last one makes unless the caller says otherwise. multiple, offset: every
    stage can make `offset` plus a multiple of `multiple` steps of T; other lengths are made longer and cut. A causal
    video autoencoder, whose first latent is one frame, has offset 1.
    """

    stages: Mapping[str, Stage]
    shape: Sequence[int]
    rate: float
    multiple: int = 1
    offset: int = 0

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
        edit: Edit | None = None,
    ) -> Clip:
        """A clip (B, *shape). progress is called with (stage, steps done, steps in all).

        edit: of a clip of `shape`. It is brought to each stage's space by the stages' own way back. The first stage
        starts from it at its strength, and every stage keeps what is known and pastes it. Raises ValueError for a clip
        of another shape.
        """
        if negative is not None and all(
            not stage.rule.reads_neg for stage in self.stages.values() if isinstance(stage, Generate)
        ):
            raise ValueError(
                "a negative prompt has no effect at guidance=1, nor with a rule that reads none; raise the guidance of "
                "a stage, or give no negative"
            )
        channels, length, *rest = shape or self.shape
        whole = self.offset + -((self.offset - length) // self.multiple) * self.multiple  # rounded up
        plan = self.plan((channels, whole, *rest), self.rate)
        if edit is not None and tuple(edit.clip.shape[1:]) != (channels, length, *rest):
            raise ValueError(
                f"the edit's clip has shape {tuple(edit.clip.shape)}, but a clip of {(channels, length, *rest)} is to "
                "be made; resize it, or give its shape"
            )
        if edit is not None and edit.strength == 0:
            return Clip(edit.clip.expand(batch_size(prompt), *edit.clip.shape[1:]), self.rate)
        edits = [{}] * len(plan) if edit is None else [{"edit": e} for e in self.edits(edit, plan)]
        clip: Clip | None = None
        for (name, stage), (size, rate), given in zip(self.stages.items(), plan, edits, strict=True):
            report = None if progress is None else lambda done, total, name=name: progress(name, done, total)
            clip = stage(prompt, clip, shape=size, rate=rate, noise=noise, negative=negative, progress=report, **given)
        assert clip is not None  # plan() refuses an empty cascade
        return Clip(clip.data[:, :, :length], clip.rate)

    @torch.inference_mode()
    def edits(self, edit: Edit, plan: list[tuple[Shape, float]]) -> list[Edit]:
        """The edit as each stage gets it, for the clips of `plan`; only the first stage's strength is not 1."""
        if isinstance(self.first, Generate):
            edit = edit.to(next(self.first.model.parameters()).device)
        found = [edit.padded(plan[-1][0][1])]
        for stage in reversed([*self.stages.values()][1:]):
            found.append(stage.back(found[-1]))
        return [found[-1], *(replace(e, strength=1.0) for e in reversed(found[:-1]))]

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
