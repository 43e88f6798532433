"""Samples while training, from fixed seeds and prompts: files that play, in the run's folder and in its logger."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyExperiment
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from ..cascade import Clip, Generate
from ..guidance import Guidance
from ..run.folder import run_folder
from ..run.samples import Shot, drop_after, shot_folder, write_index
from ..sampling import DPMpp2M, Sampler, seeded_noise
from ..sigmas import Karras, Sigmas
from .ema import all_of, raw_weights

_METHODS = {".mp4": "log_video", ".wav": "log_audio", ".png": "log_image"}  # of Lightning's W&B logger, by suffix


class Show(ABC):
    """Makes clips be seen or heard: as files, and in TensorBoard. One for each modality."""

    @abstractmethod
    def __call__(self, experiment: Any, tag: str, data: Tensor, rate: float, captions: list[str], step: int) -> None:
        """data (N, C, T, ...); rate: steps of T per second. experiment: the logger's, a TensorBoard SummaryWriter."""

    @abstractmethod
    def files(self, stem: Path, clip: Tensor, rate: float) -> list[Path]:
        """Writes a clip (C, T, ...) as STEM.mp4, STEM.wav or STEM.png, or several of them, and returns their paths."""


class ShowClips(pl.Callback, ABC):
    """Clips made with the raw weights and with those of every `EMA`, at the end of a validation.

    A subclass says how, in `made`. The clips go to samples/ in the run's folder, to loggers with a TensorBoard
    experiment by `show`, and as files to loggers that have Lightning's methods log_video, log_audio and log_image.

    Samples of later steps than the one that training starts from are removed: of a run that is resumed, or of an
    earlier one in the same folder.

    All processes make them of the first one's batch, since a sharded network works with all alone; the first one
    writes. Each kind of weights has its turn in the place of the others, so that no second network is held. No random
    generator of the training is touched.
    """

    def __init__(self, show: Show, count: int, every: int) -> None:
        if count < 1 or every < 1:
            raise ValueError(f"count={count}, every={every} must both be at least 1")
        self.show, self.count, self.every = show, count, every
        self.seen = 0
        self.batch: dict[str, Any] | None = None
        self.folder: Path | None = None

    @abstractmethod
    def made(self, pl_module: pl.LightningModule, batch: dict[str, Any]) -> Clip:
        """Clips of the batch's items, with the module's present weights."""

    def given(self, pl_module: pl.LightningModule, batch: dict[str, Any]) -> Clip | None:
        """What they are to be compared with; default nothing."""
        return None

    def chosen(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What of the first validation batch is worked on."""
        return rows(batch, range(min(self.count, _length(batch))))

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen = state_dict["seen"]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.folder = run_folder(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.folder is not None and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            drop_after(self.folder, trainer.global_step)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.batch = None

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.batch is None and batch is not None and dataloader_idx == 0:
            self.batch = self.chosen(batch)

    @torch.no_grad()  # not inference_mode, in which sharded weights cannot be exchanged
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self.seen += 1
        if self.seen % self.every:
            return
        batch = trainer.strategy.broadcast(self.batch)
        self.batch = None
        if batch is None:
            return
        batch = trainer.strategy.batch_to_device(batch)
        with isolate_rng():
            torch.manual_seed(0)  # for decoders that draw: their part of the samples is fixed too
            clips = dict[str, Clip]()
            for name, weights in kinds_of_weights(trainer, pl_module):
                with weights:
                    clips[name] = finite(self.made(pl_module, batch), name)
            if (given := self.given(pl_module, batch)) is not None:
                clips = {"data": given, **clips}
            if trainer.is_global_zero:
                self._write(trainer, clips, list(batch.get("caption", [""] * len(next(iter(clips.values())).data))))

    def _write(self, trainer: pl.Trainer, clips: dict[str, Clip], captions: list[str]) -> None:
        assert self.folder is not None
        step = trainer.global_step
        folder = shot_folder(self.folder, step)
        folder.mkdir(parents=True, exist_ok=True)
        files = {
            name: [self.show.files(folder / f"{name}-{i}", data, clip.rate) for i, data in enumerate(clip.data)]
            for name, clip in clips.items()
        }
        names = {name: [[path.name for path in paths] for paths in made] for name, made in files.items()}
        write_index(Shot(step, folder, captions, names))
        for logger in trainer.loggers:
            experiment = getattr(logger, "experiment", None)
            if isinstance(experiment, DummyExperiment):
                continue
            for name, clip in clips.items():
                if hasattr(experiment, "add_image"):
                    self.show(experiment, f"samples/{name}", clip.data, clip.rate, captions, step)
                else:
                    _send(logger, f"samples/{name}", files[name], captions)


class Samples(ShowClips):
    """Generates from the first validation batch's captions (and low-resolution clips) at the end of a validation.

    Args:
        show: how to show. count: clips. every: validations between samples.
        sigmas, sampler, steps, guidance: as in `mmdiff.cascade.Generate`. decode: decode latents before they are shown.
        prompts: captions to generate from in the place of the batch's; one clip of each, and `count` does not count.

    Clip i starts from the noise of seed i. See `ShowClips` for where the clips go.
    """

    def __init__(
        self,
        show: Show,
        count: int = 4,
        every: int = 1,
        sigmas: Sigmas | None = None,
        sampler: Sampler | None = None,
        steps: int = 16,
        guidance: float | Guidance = 1.0,
        decode: bool = True,
        prompts: Sequence[str] | None = None,
    ) -> None:
        super().__init__(show, count, every)
        if prompts is not None and not prompts:
            raise ValueError("prompts=[] leaves nothing to generate; leave it out for the validation's captions")
        self.sigmas, self.sampler = sigmas or Karras(), sampler or DPMpp2M()
        self.steps, self.guidance, self.decode = steps, guidance, decode
        self.prompts = None if prompts is None else list(prompts)

    def chosen(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        if self.prompts is None:
            return super().chosen(batch)
        places = [i % _length(batch) for i in range(len(self.prompts))]
        return {**rows(batch, places), "caption": self.prompts}

    def made(self, pl_module: pl.LightningModule, batch: dict[str, Any]) -> Clip:
        model: Any = pl_module.model
        latents = model.latents(batch)
        noise = seeded_noise(range(len(latents)))
        stage = Generate(model, self.sigmas, self.sampler, self.steps, self.guidance)
        rate = float(batch["rate"][0]) / model.autoencoder.factors[0]
        lowres, start = stage.lowres(), None
        if lowres is not None:
            start = Clip(lowres.degrade.encode(latents), rate / lowres.degrade.factors[0])
        clip = stage(batch, start, shape=tuple(latents.shape[1:]), rate=rate, noise=noise)
        return Clip(model.autoencoder.decode(clip.data), float(batch["rate"][0])) if self.decode else clip


def finite(clip: Clip, name: str) -> Clip:
    """The clip with 0 for values that are not finite, of which it warns: they must not end a training."""
    if clip.data.isfinite().all():
        return clip
    rank_zero_warn(f"samples from the {name} weights hold values that are not finite; they are shown as 0")
    return Clip(clip.data.nan_to_num(0, 0, 0), clip.rate)


def kinds_of_weights(
    trainer: pl.Trainer, pl_module: pl.LightningModule
) -> Iterator[tuple[str, AbstractContextManager[None]]]:
    """raw and ema, or ema-DECAY of several: with the context in which the module has these weights."""
    yield "raw", raw_weights(pl_module)
    averages = [ema for ema in all_of(trainer) if ema.average]
    for ema in averages:
        yield ("ema" if len(averages) == 1 else f"ema-{ema.decay}"), ema.applied(pl_module)


def rows(batch: Mapping[str, Any], places: Sequence[int]) -> dict[str, Any]:
    """Copies of these items of a batch, so that the rest of it need not be kept; single values stay as they are."""
    found: dict[str, Any] = {}
    for name, value in batch.items():
        if isinstance(value, Mapping):
            found[name] = rows(value, places)
        elif isinstance(value, Tensor):
            found[name] = value[list(places)] if value.ndim else value
        elif isinstance(value, (list, tuple)):
            found[name] = [value[place] for place in places]
        else:
            found[name] = value
    return found


def _length(batch: Mapping[str, Any]) -> int:
    value = next(iter(batch.values()))
    return _length(value) if isinstance(value, Mapping) else len(value)


def _send(logger: Any, tag: str, files: Sequence[Sequence[Path]], captions: Sequence[str]) -> None:
    """Gives files to a logger that takes their kind."""
    for suffix, name in _METHODS.items():
        method = getattr(logger, name, None)
        chosen = [(str(path), captions[i]) for i, paths in enumerate(files) for path in paths if path.suffix == suffix]
        if chosen and callable(method):
            method(tag, [path for path, _ in chosen], caption=[caption for _, caption in chosen])
