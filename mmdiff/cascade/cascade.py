"""Stages in order: a fold from a prompt to a clip, with what every one of them is given.

B batch, C channels, T time. A clip's data is what its stage works on: pixels, a spectrogram, samples of a waveform.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from mmdiff.conditioning import Batch, Number
from mmdiff.editing import Edit
from mmdiff.reference import Reference
from mmdiff.sampling import Noise

from .decode import Decode
from .generate import Generate
from .stage import Clip, Shape, Stage, batch_size

MOST_MULTIPLES = 64


@dataclass(frozen=True)
class Cascade:
    """Stages in order, by name.

    shape (C, T, ...) and rate are what the last one makes unless the caller says otherwise. multiple, offset: every
    stage can make `offset` plus a multiple of `multiple` steps of T; other lengths are made longer and cut. A causal
    video autoencoder, whose first latent is one frame, has offset 1. parked: contexts in which the weights of a stage
    are there, for stages that have theirs only while they work (`mmdiff.parked`).
    """

    stages: Mapping[str, Stage]
    shape: Sequence[int]
    rate: float
    multiple: int = 1
    offset: int = 0
    parked: Mapping[str, AbstractContextManager[None]] = field(default_factory=dict)

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

    def legal(self, shape: Shape, rate: float) -> list[tuple[Shape, float]]:
        """The plan of a clip that the networks of all stages take. Raises ValueError where one does not."""
        plan = self.plan(shape, rate)
        for stage, (size, _) in zip(self.stages.values(), plan, strict=True):
            if isinstance(stage, Generate):
                stage.check(size)
        return plan

    def whole(self, length: int) -> int:
        """The steps of T to make for a clip of `length`: the next number that every stage can make."""
        return self.offset + -((self.offset - length) // self.multiple) * self.multiple

    def __call__(
        self,
        prompt: Batch,
        *,
        noise: Noise,
        shape: Shape | None = None,
        negative: Batch | None = None,
        progress: Callable[[str, int, int], None] | None = None,
        edit: Edit | None = None,
        watch: Callable[[str, Clip], None] | None = None,
    ) -> Clip:
        """A clip (B, *shape). progress is called with (stage, steps done, steps in all), watch with every stage's clip.

        edit: of a clip of `shape`. It is brought to each stage's space by the stages' own way back. The first stage
        starts from it at its strength, and every stage keeps what is known and pastes it. Raises ValueError for a clip
        of another shape. prompt["reference"], (1 or B, C, any T, ...) of the other sizes, is brought there likewise.
        """
        if negative is not None and all(
            not stage.rule.reads_neg for stage in self.stages.values() if isinstance(stage, Generate)
        ):
            raise ValueError(
                "a negative prompt has no effect at guidance=1, nor with a rule that reads none; raise the guidance of "
                "a stage, or give no negative"
            )
        channels, length, *rest = shape or self.shape
        plan = self.legal((channels, self.whole(length), *rest), self.rate)
        if edit is not None and tuple(edit.clip.shape[1:]) != (channels, length, *rest):
            raise ValueError(
                f"the edit's clip has shape {tuple(edit.clip.shape)}, but a clip of {(channels, length, *rest)} is to "
                "be made; resize it, or give its shape"
            )
        if edit is not None and edit.strength == 0:
            return Clip(edit.clip.expand(batch_size(prompt), *edit.clip.shape[1:]), self.rate)
        edits = [{}] * len(plan) if edit is None else [{"edit": e} for e in self.edits(edit, plan)]
        duration_s = prompt.get("duration_s", [length / self.rate] * batch_size(prompt))
        prompts = self.prompts({**prompt, "duration_s": duration_s}, plan)
        clip: Clip | None = None
        for (name, stage), (size, rate), given, words in zip(self.stages.items(), plan, edits, prompts, strict=True):
            report = None if progress is None else lambda done, total, name=name: progress(name, done, total)
            with self.awake(name):
                clip = stage(
                    words, clip, shape=size, rate=rate, noise=noise, negative=negative, progress=report, **given
                )
            if watch is not None:
                watch(name, clip)
        assert clip is not None  # plan() refuses an empty cascade
        return Clip(clip.data[:, :, :length], clip.rate)

    def awake(self, name: str) -> AbstractContextManager[None]:
        """The context in which a stage has its weights."""
        return self.parked.get(name, nullcontext())

    @torch.inference_mode()
    def edits(self, edit: Edit, plan: list[tuple[Shape, float]]) -> list[Edit]:
        """The edit as each stage gets it, for the clips of `plan`; only the first stage's strength is not 1."""
        if isinstance(self.first, Generate):
            edit = edit.to(next(self.first.model.parameters()).device)
        found = [edit.padded(plan[-1][0][1])]
        for name, stage in reversed([*self.stages.items()][1:]):
            with self.awake(name):
                found.append(stage.back(found[-1]))
        return [found[-1], *(replace(e, strength=1.0) for e in reversed(found[:-1]))]

    def prompts(self, prompt: Batch, plan: list[tuple[Shape, float]]) -> list[Batch]:
        """The prompt as each stage gets it: a reference in the space of its clip, held to its length."""
        if "reference" not in prompt:
            return [prompt] * len(plan)
        self.check_reference()
        reference: Tensor = prompt["reference"]
        shape, _ = plan[-1]
        if reference.ndim != 1 + len(shape) or (reference.shape[1], *reference.shape[3:]) != (shape[0], *shape[2:]):
            raise ValueError(
                f"the reference has shape {tuple(reference.shape)}, but a clip of {shape} is to be made; resize it, "
                "its length may be any"
            )
        edits = self.edits(Edit(reference[:, :, : shape[1]]), plan)
        return [{**prompt, "reference": edit.clip.expand(batch_size(prompt), *edit.clip.shape[1:])} for edit in edits]

    def check_reference(self) -> None:
        """Raises ValueError unless a model reads a reference."""
        if not any(isinstance(stage, Generate) and stage.part(Reference) for stage in self.stages.values()):
            raise ValueError("no model of the cascade reads a reference; train one with mmdiff.reference.Reference")

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

    def stage(self, name: str) -> Stage:
        """The stage of a name. Raises ValueError, with those there are, where it is missing."""
        if name not in self.stages:
            raise ValueError(f"there is no stage {name!r}; the cascade has {', '.join(self.stages)}")
        return self.stages[name]

    def with_stage(self, name: str, **settings: object) -> "Cascade":
        """The same cascade with other settings (steps, sampler, sigmas, guidance, ...) of one stage."""
        stage = self.stage(name)
        own = {part.name for part in fields(stage)}  # type: ignore[arg-type]
        if unknown := sorted(set(settings) - own):
            raise ValueError(f"stage {name!r} is a {type(stage).__name__}, which has no {', '.join(unknown)}")
        return replace(self, stages={**self.stages, name: replace(stage, **settings)})  # type: ignore[type-var]

    def with_base(self, **settings: object) -> "Cascade":
        """The same cascade with other settings of its first stage."""
        return self.with_stage(next(iter(self.stages)), **settings)

    def until(self, name: str) -> "Cascade":
        """The stages up to one, whose clip is that which it makes in the whole cascade. Raises ValueError for none."""
        self.stage(name)
        place = list(self.stages).index(name)
        stages = dict(list(self.stages.items())[: place + 1])
        channels, length, *sizes = self.shape
        length = self.whole(length)
        shape, rate = self.plan((channels, length, *sizes), self.rate)[place]
        for more in range(1, MOST_MULTIPLES + 1):  # a cascade that rounds no lengths up may refuse the next one
            with suppress(ValueError):
                longer, _ = self.plan((channels, length + more * self.multiple, *sizes), self.rate)[place]
                multiple = longer[1] - shape[1]
                return replace(
                    self, stages=stages, shape=shape, rate=rate, multiple=multiple, offset=shape[1] % multiple
                )
        return replace(self, stages=stages, shape=shape, rate=rate, multiple=1, offset=0)

    def at(self, rate: float) -> tuple["Cascade", int]:
        """A cascade for clips of another rate, and n, where every n-th step of its clips makes that rate.

        Where the models read a rate (`Number` of "rate") it is made as asked. Else it must be the cascade's own over a
        whole number: last stages that only add steps between are left out, and then steps. Raises ValueError otherwise.
        """
        ranges = self.trained_rates(rate)
        if ranges and all(part.low <= value <= part.high for part, value in ranges):
            return replace(self, rate=rate), 1
        every = max(1, round(self.rate / rate))
        if abs(self.rate / every - rate) > 1e-3 * rate:
            some = ", ".join(f"{self.rate / n:.4g}" for n in (1, 2, 3, 4))
            more = ""
            if ranges:
                low = max(part.low * rate / value for part, value in ranges)
                high = min(part.high * rate / value for part, value in ranges)
                more = f", or {low:.4g}..{high:.4g}, which its models were trained with"
            raise ValueError(
                f"{rate:g} steps per second cannot be made: the cascade makes {self.rate:g}, or that over a whole "
                f"number ({some}, ...){more}"
            )
        cascade = self
        while every > 1 and len(cascade.stages) > 1:
            before, last = [*cascade.stages][-2:]
            way = cascade.stages[last].way_back()
            if not isinstance(cascade.stages[last], Generate) or way is None or not way.every or every % way.every:
                break
            cascade, every = cascade.until(before), every // way.every
        return cascade, every

    def trained_rates(self, rate: float) -> list[tuple[Number, float]]:
        """Conditioners that read a rate, with what they would read for clips of `rate`; none if the first does not."""
        channels, length, *sizes = self.shape
        found = [
            (part, own * stage.model.autoencoder.factors[0])
            for stage, (_, own) in zip(
                self.stages.values(), self.plan((channels, self.whole(length), *sizes), rate), strict=True
            )
            if isinstance(stage, Generate)
            for part in stage.parts(Number)
            if part.key == "rate"
        ]
        first = isinstance(self.first, Generate) and any(part.key == "rate" for part in self.first.parts(Number))
        return found if first else []
