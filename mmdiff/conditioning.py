"""What a backbone can be conditioned on (`Cond`) and what turns a batch into it (`Conditioner`).

B batch, L tokens, D width, C channels. Condition dropout, which classifier-free guidance needs (Ho & Salimans 2022),
happens here and nowhere else.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import register_dataclass

from .autoencoder import Autoencoder
from .nn.embed import sinusoid

Batch = Mapping[str, Any]
Generators = Sequence[torch.Generator]


@dataclass(frozen=True)
class Cond:
    """The four ways to condition a backbone.

    tokens (B, L, D) is cross-attended, mask (B, L) bool says to which tokens (True = attend), vector (B, D) joins the
    noise embedding, concat (B, C', *axes) is concatenated to x.
    known (B, 1, *axes) bool says what of x the condition already shows: it counts in no loss. mean (B, C, *axes) is
    what x is expected around: the denoiser works on the difference. Backbones read neither.
    """

    tokens: Tensor | None = None
    mask: Tensor | None = None
    vector: Tensor | None = None
    concat: Tensor | None = None
    known: Tensor | None = None
    mean: Tensor | None = None


register_dataclass(Cond)  # FSDP2 looks for tensors in what modules take and return, and finds none in unknown classes


class Conditioner(nn.Module, ABC):
    """Batch -> Cond. In training mode it drops conditions at random.

    generators: one for each item, from which all that is random of it is drawn, so that it depends neither on its
    neighbours in the batch nor on how many processes share the work. None draws from the global generator.
    """

    @abstractmethod
    def forward(self, batch: Batch, generators: Generators | None = None) -> Cond: ...

    @abstractmethod
    def null(self, batch: Batch) -> Cond:
        """The condition without what guidance guides: empty prompts, no class. A low-resolution clip stays."""


def dropped(n: int, rate: float, generators: Generators | None) -> list[bool]:
    """For each of `n` items whether its condition is dropped, at probability `rate`."""
    return (draw(torch.rand, (n,), generators) < rate).tolist() if rate > 0 else [False] * n


def draw(law: Callable[..., Tensor], shape: Sequence[int], generators: Generators | None) -> Tensor:
    """Random numbers of `shape` (B, ...) by torch.rand or torch.randn, each item's from its own generator."""
    if generators is None:
        return law(tuple(shape))
    if len(generators) != shape[0]:
        raise ValueError(f"a batch of {shape[0]} needs as many generators, not {len(generators)}: one for each item")
    return torch.stack([law(tuple(shape[1:]), generator=generator) for generator in generators])


def check_rate(dropout: float) -> None:
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout={dropout} must be a probability, 0 to 1")


class Text(Conditioner):
    """Prompts of `batch[key]` through a text encoder: tokens, mask and vector.

    encoder: `mmdiff.text.ByteTransformer`, `mmdiff.text.PretrainedText`, or any module that maps list[str] to
    (tokens (B, L, D), mask (B, L) bool, vector (B, D)). A dropped or null prompt is the empty string.
    norm: of the vector, such as `mmdiff.nn.Standardize`, without which the words that all prompts share drown the few
    that tell long prompts apart; None leaves it as it is.
    """

    def __init__(
        self, encoder: nn.Module, dropout: float = 0.1, key: str = "caption", norm: nn.Module | None = None
    ) -> None:
        super().__init__()
        check_rate(dropout)
        self.encoder, self.dropout, self.key = encoder, dropout, key
        self.norm = norm or nn.Identity()

    def forward(self, batch: Batch, generators: Generators | None = None) -> Cond:
        if isinstance(batch[self.key], str):
            raise ValueError(f"{self.key}={batch[self.key][:40]!r} must be a list of prompts, one for each item")
        prompts = list(batch[self.key])
        if self.training:
            drop = dropped(len(prompts), self.dropout, generators)
            prompts = ["" if d else prompt for d, prompt in zip(drop, prompts, strict=True)]
        return self.encode(prompts)

    def null(self, batch: Batch) -> Cond:
        return self.encode([""] * len(batch[self.key]))

    def encode(self, prompts: list[str]) -> Cond:
        tokens, mask, vector = self.encoder(prompts)
        return Cond(tokens, mask, self.norm(vector))


class Label(Conditioner):
    """Class index `batch[key]`, a LongTensor (B,) in 0..classes-1, as a learned vector; dropped, class `classes`."""

    def __init__(self, key: str, classes: int, width: int, dropout: float = 0.1) -> None:
        super().__init__()
        check_rate(dropout)
        self.key, self.classes, self.dropout = key, classes, dropout
        self.table = nn.Embedding(classes + 1, width)

    def forward(self, batch: Batch, generators: Generators | None = None) -> Cond:
        labels = torch.as_tensor(batch[self.key], device=self.table.weight.device)
        if labels.min() < 0 or labels.max() >= self.classes:
            raise ValueError(f"{self.key} has labels {labels.min()}..{labels.max()}; legal are 0..{self.classes - 1}")
        if self.training:
            drop = torch.tensor(dropped(len(labels), self.dropout, generators), device=labels.device)
            labels = torch.where(drop, self.classes, labels)
        return Cond(vector=self.table(labels))

    def null(self, batch: Batch) -> Cond:
        n = len(batch[self.key])
        return Cond(vector=self.table(torch.full((n,), self.classes, device=self.table.weight.device)))


class Number(Conditioner):
    """Number `batch[key]` (B,), such as a duration in seconds or a frame rate, as a vector; dropped, a learned one.

    low, high: the range that the embedding resolves, in the number's own unit; values outside raise ValueError.
    """

    def __init__(self, key: str, width: int, low: float, high: float, dropout: float = 0.1) -> None:
        super().__init__()
        check_rate(dropout)
        if not low < high:
            raise ValueError(f"low={low} must be below high={high}")
        self.key, self.width, self.low, self.high, self.dropout = key, width, low, high, dropout
        self.net = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.empty = nn.Parameter(torch.zeros(width))

    def forward(self, batch: Batch, generators: Generators | None = None) -> Cond:
        values = torch.as_tensor(batch[self.key], device=self.empty.device, dtype=torch.float32)
        if values.min() < self.low or values.max() > self.high:
            raise ValueError(f"{self.key} has {values.min():g}..{values.max():g}; legal is {self.low:g}..{self.high:g}")
        unit = (values - self.low) / (self.high - self.low)
        vector = self.net(sinusoid(unit, self.width, shortest=0.02, longest=4.0))
        if self.training:
            drop = torch.tensor(dropped(len(vector), self.dropout, generators), device=vector.device)
            vector = torch.where(drop[:, None], self.empty, vector)
        return Cond(vector=vector)

    def null(self, batch: Batch) -> Cond:
        return Cond(vector=self.empty.expand(len(batch[self.key]), -1))


class LowRes(Conditioner):
    """The clip of the stage before, brought to full size, as concat: what makes a backbone an upsampler.

    degrade: an autoencoder without parameters (`Pool`, `Subsample`, a `Chain`) that says what "low resolution" is. In
    training the low clip is `degrade.encode(batch["latents"])`; in a cascade it is `batch["low"]`, the clip of the
    stage before, whose own model was trained on the same `degrade`.

    Noise of standard deviation uniform in [0, `noise`] is added to the low clip in training and its level is told to
    the backbone, so that faults of the stage before do no harm (Ho et al. 2021, sec. 4.2); `level` is what sampling
    adds. The level is one more channel of concat.

    residual: whether what is generated is the difference from the low clip at full size, which is small where that is
    nearly right; `sigma_data` is then the difference's deviation (SRDiff, Li et al. 2022, arXiv 2104.14951).

    Steps that are the low clip's own (`Autoencoder.every`, as `Subsample` has them) come back exactly in sampling, so
    they count in no loss: temporal interpolation learns what lies between.
    """

    def __init__(self, degrade: Autoencoder, noise: float = 0.2, level: float = 0.05, residual: bool = False) -> None:
        super().__init__()
        if any(True for _ in degrade.parameters()):
            raise ValueError(
                f"degrade={type(degrade).__name__} has parameters, which training would change; use Pool or Subsample"
            )
        if not 0 <= level <= noise:
            raise ValueError(f"level={level} must lie in 0..noise={noise}, the range that training covers")
        self.degrade, self.noise, self.level, self.residual = degrade, noise, level, residual

    def forward(self, batch: Batch, generators: Generators | None = None) -> Cond:
        low = batch["low"] if "low" in batch else self.degrade.encode(batch["latents"])
        n = (low.shape[0],) + (1,) * (low.ndim - 1)
        if self.training:
            level = self.noise * draw(torch.rand, n, generators).to(low)
        else:
            level = torch.full(n, self.level).to(low)
        # one field of noise for all calls of a sampling run, so that guidance compares like with like
        noise = batch["low_noise"] if "low_noise" in batch else draw(torch.randn, low.shape, generators).to(low)
        full = self.degrade.decode(low + level * noise)
        known = None
        if self.degrade.every is not None and self.degrade.every > 1:
            own = torch.arange(full.shape[2], device=full.device) % self.degrade.every == 0
            known = own.view(1, 1, -1, *(1,) * (full.ndim - 3)).expand(len(full), 1, *full.shape[2:])
        mean = self.degrade.decode(low) if self.residual else None  # without noise, which the result would keep
        return Cond(concat=torch.cat([full, level.expand(-1, 1, *full.shape[2:])], dim=1), known=known, mean=mean)

    def null(self, batch: Batch) -> Cond:
        return self(batch)


class Hint(Conditioner):
    """A hint of the clip's own axes as concat, for a `mmdiff.backbones.ControlNet`: edges, depth, an envelope, ...

    transform: makes the hint (B, C', *axes) from the data batch["x"] where the batch has none: `video.hints.Edges`,
        `audio.hints.Envelope`, ... key: the batch's own hint, which comes first: what sampling is given, or what was
        computed ahead. shrink: an autoencoder without parameters (`Pool`) that brings it to the latents' sizes.
    spread: sizes of further axes, over which a hint of time alone is repeated: [64] for 64 mel bins.

    In a `Join` it stands last: a ControlNet's hint is the last of concat. Guidance keeps it in both predictions.
    """

    def __init__(
        self,
        transform: nn.Module | None = None,
        key: str = "hint",
        shrink: Autoencoder | None = None,
        spread: Sequence[int] = (),
    ) -> None:
        super().__init__()
        for name, part in (("transform", transform), ("shrink", shrink)):
            if part is not None and any(True for _ in part.parameters()):
                raise ValueError(f"{name}={type(part).__name__} has parameters, which training would change")
        self.transform, self.key, self.shrink, self.spread = transform, key, shrink, tuple(spread)

    def forward(self, batch: Batch, generators: Generators | None = None) -> Cond:
        if self.key in batch:
            hint = batch[self.key]
        elif self.transform is None or "x" not in batch:
            raise ValueError(f"the batch has no {self.key!r}; give the hint (B, C, *axes), as the model was trained on")
        else:
            hint = self.transform(batch["x"])
        hint = hint if self.shrink is None else self.shrink.encode(hint)
        hint = hint.reshape(*hint.shape, *(1,) * len(self.spread))
        return Cond(concat=hint.expand(*hint.shape[: hint.ndim - len(self.spread)], *self.spread))

    def null(self, batch: Batch) -> Cond:
        return self(batch)


class Join(Conditioner):
    """Several conditioners as one: tokens (of one width) follow one another, vectors join along D, concats along C."""

    def __init__(self, parts: Sequence[Conditioner]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, batch: Batch, generators: Generators | None = None) -> Cond:
        return self.joined([part(batch, generators) for part in self.parts])

    def null(self, batch: Batch) -> Cond:
        return self.joined([part.null(batch) for part in self.parts])  # type: ignore[operator]

    def joined(self, conds: list[Cond]) -> Cond:
        masks = [
            torch.ones(c.tokens.shape[:2], dtype=torch.bool, device=c.tokens.device) if c.mask is None else c.mask
            for c in conds
            if c.tokens is not None
        ]

        def join(slots: list[Tensor | None]) -> Tensor | None:
            given = [s for s in slots if s is not None]
            return torch.cat(given, dim=1) if given else None

        known = [c.known for c in conds if c.known is not None]
        return Cond(
            tokens=join([c.tokens for c in conds]),
            mask=torch.cat(masks, dim=1) if masks else None,
            vector=join([c.vector for c in conds]),
            concat=join([c.concat for c in conds]),
            known=functools.reduce(torch.logical_or, known) if known else None,
            mean=next((c.mean for c in conds if c.mean is not None), None),
        )
