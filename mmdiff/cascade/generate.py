"""The stage that samples from a diffusion model: a base, or one that adds steps or pixels to the clip before.

B batch, C channels, T time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mmdiff.autoencoder import Autoencoder
from mmdiff.conditioning import Batch, Cond, Conditioner, Hint, Join, LowRes
from mmdiff.editing import Chunks, Edit, Window, cut, infill
from mmdiff.given import Given
from mmdiff.guidance import Guidance, as_guidance
from mmdiff.model import DiffusionModel
from mmdiff.nn.conv import check_sizes
from mmdiff.prompts import alternate, alternatives
from mmdiff.sampling import Denoise, Noise, Rolling, Sampler
from mmdiff.sampling import start as begin
from mmdiff.sigmas import Sigmas

from .stage import Clip, Progress, Shape, Stage, batch_size, reduced

Part = TypeVar("Part", bound=Conditioner)


@dataclass(frozen=True)
class Generate(Stage):
    """Samples from a diffusion model: a base stage, or an upsampler where the model is conditioned on a `LowRes` clip.

    sigmas: grid to sample on. sampler, steps: how. guidance: scale of classifier-free guidance, 1 is none; or a rule of
    `mmdiff.guidance`.
    window: for clips longer than the model was trained on, or without an end: `Window`, or `Chunks` for a stage that
    starts from nothing. per_step: the model was trained with one noise level per time step, so that known steps of an
    edit get level 0 instead of a replacement at every level, and that the sampler may be `Rolling`.

    Steps that are the low-resolution clip's own (`Autoencoder.every`: temporal interpolation) come back as they were.
    A `Number` reads "rate", steps per second of the model's data, and "duration_s" of what one call of it sees.
    """

    model: DiffusionModel
    sigmas: Sigmas
    sampler: Sampler
    steps: int = 32
    guidance: float | Guidance = 1.0
    window: Window | Chunks | None = None
    per_step: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1")
        if self.rule.reads_neg and not droppable(self.model.conditioner):
            raise ValueError(
                f"guidance={self.guidance} would change nothing: the model has no prompt or class that its conditioner "
                "can leave out; use guidance=1"
            )
        if isinstance(self.sampler, Rolling) and not (self.per_step and self.window is None):
            raise ValueError(
                "sampler=Rolling needs per_step=True, of a model trained with mmdiff.levels.PerStep, and is a window "
                "itself: give no window"
            )
        if isinstance(self.window, Chunks) and (self.part(LowRes) or self.part(Hint)):
            raise ValueError("window=Chunks cannot cut a low-resolution clip or a hint; use mmdiff.editing.Window")

    @property
    def rule(self) -> Guidance:
        """The guidance as a rule."""
        return as_guidance(self.guidance)

    def parts(self, kind: type[Part]) -> list[Part]:
        """The model's conditioners of a kind, alone or in a `Join`."""
        modules = () if self.model.conditioner is None else self.model.conditioner.modules()
        return [part for part in modules if isinstance(part, kind)]

    def part(self, kind: type[Part]) -> Part | None:
        """The first of them."""
        return next(iter(self.parts(kind)), None)

    def lowres(self) -> LowRes | None:
        return self.part(LowRes)

    @property
    def multiples(self) -> Sequence[int] | None:
        """What the sizes of each axis must be multiples of for the network; None where it does not say."""
        backbone: Any = self.model.denoiser.backbone
        backbone = getattr(backbone, "backbone", backbone)  # a ControlNet's
        found = getattr(backbone, "multiples", getattr(backbone, "patch", None))
        return found if isinstance(found, (list, tuple)) else None

    def seen(self, shape: Shape) -> Shape:
        """Sizes (T, ...) of what one call of the model sees of a clip of `shape`."""
        part = self.sampler if isinstance(self.sampler, Rolling) else self.window
        return shape[1:] if part is None else (min(shape[1], part.length), *shape[2:])

    def needs(self, shape: Shape, rate: float) -> tuple[Shape, float] | None:
        way = self.way_back()
        return None if way is None else reduced(way, shape, rate)

    def check(self, shape: Shape) -> None:
        """Raises ValueError for a clip of a shape that the network does not take."""
        if self.multiples is not None and len(self.multiples) == len(shape) - 1:
            check_sizes(self.seen(shape), self.multiples)

    def way_back(self) -> Autoencoder | None:
        lowres = self.lowres()
        return None if lowres is None else lowres.degrade

    def bind(self, cond: Cond | None, edit: Edit | None = None, model: DiffusionModel | None = None) -> Denoise:
        """The model's denoiser under a condition, over windows and with known steps where the settings say so."""
        model = model or self.model
        denoise: Denoise = model.bind(cond)
        if isinstance(self.sampler, Rolling):
            denoise = self.sampler.front(lambda steps: model.bind(cut(cond, steps)))
        elif isinstance(self.window, Window):
            lowres = self.lowres() if self.window.loop else None
            first = 0 if lowres is None else lowres.degrade.factors[0]  # of the steps that close a loop, see `low`
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

    def low(self, start: Clip | None, noise: Noise, device: torch.device) -> dict[str, Tensor]:
        """What `LowRes` reads: the clip of the stage before, and one draw of noise for all calls of the model."""
        if self.lowres() is None:
            return {}
        if start is None:
            raise ValueError("an upsampling stage needs the clip of a stage before it; put one first in the cascade")
        data = start.data.to(device)
        given = {"low": data, "low_noise": noise(data)}
        if isinstance(self.window, Window) and self.window.loop:  # it is interpolated from the end to the start too
            given = {key: torch.cat([z[:, :, -1:], z, z[:, :, :1]], dim=2) for key, z in given.items()}
        return given

    def known(self, edit: Edit | None, like: Tensor) -> dict[str, Tensor]:
        """What `Given` reads: the parts of an edit that are known, of the sizes of `like`."""
        if self.part(Given) is None:
            return {}
        if edit is None or edit.mask is None:
            return {"given": torch.zeros_like(like), "known": torch.zeros((1,) * like.ndim, dtype=torch.bool)}
        return {"given": edit.clip.expand(like.shape), "known": edit.mask}

    def times(self, prompt: Batch, shape: Shape, rate: float) -> dict[str, Tensor]:
        """What a `Number` reads of the clip: "rate" and "duration_s" (B,), as batches of training have them."""
        whole = prompt.get("duration_s", [shape[1] / rate] * batch_size(prompt))
        duration_s = torch.as_tensor(whole, dtype=torch.float32) * self.seen(shape)[0] / shape[1]
        return {"rate": torch.full_like(duration_s, rate * self.model.autoencoder.factors[0]), "duration_s": duration_s}

    def own(self, start: Clip | None, shape: Shape, device: torch.device) -> Edit | None:
        """The clip whose steps of the stage before are known, where that has steps of this one's."""
        way = self.way_back()
        if way is None or way.every is None or start is None:
            return None
        clip, known = infill(start.data.to(device), range(0, shape[1], way.every), shape[1])
        return Edit(clip, known=known)

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
        if isinstance(self.window, Window) and not self.window.loop and shape[1] <= self.window.length:
            whole = replace(self, window=None)  # a window's condition is cut in each call, so that no calls are joined
            return whole(
                prompt, start, shape=shape, rate=rate, noise=noise, negative=negative, progress=progress, edit=edit
            )
        if isinstance(self.window, Chunks):
            return self.chunked(self.window, prompt, shape, rate, noise, negative, progress, edit)
        device = next(self.model.parameters()).device
        x = noise(torch.empty(batch_size(prompt), *shape, device=device))
        given = {**self.times(prompt, shape, rate), **self.low(start, noise, device), **self.known(edit, x)}
        prompt, negative = {**prompt, **given}, None if negative is None else {**negative, **given}
        own = self.own(start, shape, device)
        fixed = edit if own is None else both(edit, own)
        sigmas = self.sigmas.sized(self.seen(shape))(self.steps)  # a size-dependent shift goes by what a call sees
        x, sigmas = (begin(x, sigmas[0]), sigmas) if fixed is None else fixed.start(x, sigmas)
        if len(sigmas) > 1:
            denoise = self.guided(prompt, negative, sigmas, fixed)
            if fixed is not None:
                denoise = fixed.keep(denoise)
            for step in self.sampler.steps(denoise, x, sigmas, noise):
                x = step.x
                if progress is not None:
                    progress(step.number + 1, len(sigmas) - 1)
        for kept in (own, edit):
            x = x if kept is None else kept.paste(x)
        return Clip(x, rate)

    def chunked(
        self,
        chunks: Chunks,
        prompt: Batch,
        shape: Shape,
        rate: float,
        noise: Noise,
        negative: Batch | None,
        progress: Progress | None,
        edit: Edit | None,
    ) -> Clip:
        """The clip as chunks, each an edit that knows the end of the one before."""
        one = replace(self, window=None)
        seconds = torch.as_tensor(prompt.get("duration_s", [shape[1] / rate] * batch_size(prompt)))

        def make(part: Edit, number: int, count: int) -> Tensor:
            size = (shape[0], *part.clip.shape[2:])
            own = {"duration_s": seconds * size[1] / shape[1]}
            clip = one(
                {**prompt, **own}, shape=size, rate=rate, noise=noise,
                negative=None if negative is None else {**negative, **own}, edit=part,
                progress=None if progress is None else lambda done, steps: progress(
                    number * steps + done, count * steps
                ),
            )  # fmt: skip
            return clip.data

        device = next(self.model.parameters()).device
        whole_edit = Edit(torch.zeros(1, *shape, device=device)) if edit is None else edit
        return Clip(whole_edit.paste(chunks(make, whole_edit)), rate)


def both(edit: Edit | None, own: Edit) -> Edit:
    """An edit that also keeps what `own` does, where it does not keep anything itself."""
    if edit is None or own.mask is None:
        return own
    if edit.mask is None:
        return replace(edit, clip=torch.where(own.mask, own.clip, edit.clip), known=own.mask)
    clip = torch.where(own.mask & ~edit.mask, own.clip, edit.clip)
    return replace(edit, clip=clip, known=own.mask | edit.mask)


def droppable(conditioner: Conditioner | None) -> bool:
    """Whether a conditioner's null differs from its condition: a low-resolution clip and a hint alone stay in both."""
    parts = () if conditioner is None else conditioner.modules()
    return any(isinstance(part, Conditioner) and not isinstance(part, (Given, Hint, Join, LowRes)) for part in parts)
