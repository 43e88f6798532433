"""Moving averages of the weights, beside the raw ones."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from .. import post_hoc
from ..run.folder import run_folder


class Decay(ABC):
    """How much of an average is kept at each of its updates. `str` names the average, such as "width=0.05"."""

    @abstractmethod
    def __call__(self, update: int) -> float:
        """Share of the old average at the update, counted from 1."""


@dataclass(frozen=True)
class Constant(Decay):
    """`value`, or (1 + n) / (10 + n) at update n as long as that is less, so that early steps do not linger."""

    value: float

    def __post_init__(self) -> None:
        if not 0 <= self.value < 1:
            raise ValueError(f"decay={self.value} must be at least 0 and below 1; 0.999 averages over some 1,000 steps")

    def __call__(self, update: int) -> float:
        return min(self.value, (1 + update) / (10 + update))

    def __str__(self) -> str:
        return f"decay={self.value:g}"


@dataclass(frozen=True)
class PowerFunction(Decay):
    """(1 - 1 / n)^(gamma + 1) at update n: the average's `width` is a share of the whole training, however long it is.

    width: sigma_rel, above 0 and at most 0.2886; 0.05 and 0.1 suit most. Source: Karras et al. 2024, arXiv 2312.02696;
    the mathematics are in `mmdiff.post_hoc`.
    """

    width: float = 0.05

    def __post_init__(self) -> None:
        post_hoc.gamma(self.width)

    def __call__(self, update: int) -> float:
        return (1 - 1 / update) ** (post_hoc.gamma(self.width) + 1)

    def __str__(self) -> str:
        return f"width={self.width:g}"


class EMA(pl.Callback):
    """Averages the module's trainable parameters after every optimizer step, in float32 at least.

    decay: a number is a `Constant` one; see there and at `PowerFunction`.
    keep_every: updates between averages that are kept for good, in the folder `averages` of the run, one file each;
        from those of one or two power functions `mmdiff export` makes an average of any width. Default none.

    There can be several, each of its own decay. Validation, test, and what logs during them use the first in the
    trainer's list; the others stay beside. A checkpoint's state_dict holds the raw weights, whenever it is written; the
    averages are in these callbacks' states, each the same on all ranks. With FSDP2 an average is sharded like its
    weights. A run that resumes a checkpoint with one average goes on with that; of several, each goes on with its
    own, and one that the checkpoint does not have begins with the checkpoint's weights. ValueError where the
    checkpoint averages other parameters than those that train.
    """

    def __init__(self, decay: float | Decay = 0.999, keep_every: int | None = None) -> None:
        if keep_every is not None and keep_every < 1:
            raise ValueError(f"keep_every={keep_every} must be at least 1, or left out to keep none")
        self.decay = decay if isinstance(decay, Decay) else Constant(decay)
        if keep_every is not None and not isinstance(self.decay, PowerFunction):
            raise ValueError(f"keep_every={keep_every} is for averages of a PowerFunction, not of {self.decay}")
        self.keep_every = keep_every
        self.step = self.updates = 0  # the trainer's at the last update; how many there were
        self.kept: list[int] = []  # updates whose average is in a file
        self.average: dict[str, Tensor] = {}
        self.raw: dict[str, Tensor] = {}  # the weights themselves, while the averages stand in for them
        self.folder: Path | None = None

    @property
    def state_key(self) -> str:
        return f"EMA[{self.decay}]"

    def state_dict(self) -> dict[str, Any]:
        average = {name: whole(value) for name, value in self.average.items()}
        return {
            "name": str(self.decay),
            "step": self.step,
            "updates": self.updates,
            "kept": list(self.kept),
            "average": average,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step, self.average = state_dict["step"], state_dict["average"]
        self.updates, self.kept = state_dict["updates"], list(state_dict["kept"])

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        states = {key: state for key, state in checkpoint.get("callbacks", {}).items() if key.startswith("EMA[")}
        mine = self.state_key
        if mine not in states and len(states) == 1 and len(all_of(trainer)) == 1:
            ((mine, state),) = states.items()
            self.load_state_dict(state)  # the checkpoint's one average, under another name
        if mine in states:
            check_same(states[mine]["average"], trainable(pl_module), str(self.decay))
        elif trainer.state.fn == TrainerFn.FITTING:
            rank_zero_warn(f"the checkpoint has no average {self.decay}; it begins with the checkpoint's weights")

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.keep_every is not None and stage == "fit":
            self.folder = run_folder(trainer) / "averages"

    @torch.no_grad()
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.average:
            self.step = trainer.global_step
            self.average = {name: p.detach().clone() for name, p in trainable(pl_module).items()}
        self.place(pl_module)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:  # gradients are still being accumulated
            return
        self.step, self.updates = trainer.global_step, self.updates + 1
        live = trainable(pl_module)
        averages = [local(self.average[name]) for name in live]
        weights = [local(p).to(average.dtype) for p, average in zip(live.values(), averages, strict=True)]
        torch._foreach_lerp_(averages, weights, 1 - self.decay(self.updates))
        if self.keep_every is not None and self.updates % self.keep_every == 0:
            self.keep(trainer)

    def keep(self, trainer: pl.Trainer) -> None:
        """Writes the average to its file."""
        average = {name: whole(value) for name, value in self.average.items()}
        if trainer.is_global_zero and self.folder is not None and isinstance(self.decay, PowerFunction):
            self.folder.mkdir(parents=True, exist_ok=True)
            post_hoc.keep(self.folder, self.decay.width, self.updates, average)
        self.kept.append(self.updates)

    @torch.inference_mode(False)  # of validation, whose tensors could not be updated later
    def place(self, pl_module: pl.LightningModule) -> None:
        """Brings the averages to where the weights are, and into the same shards."""
        for name, p in trainable(pl_module).items():
            average = self.average[name].to(p.device, torch.promote_types(p.dtype, torch.float32))
            if isinstance(p, DTensor) and not isinstance(average, DTensor):
                # Every rank has read the whole average, so none needs to be sent.
                average = distribute_tensor(average, p.device_mesh, p.placements, src_data_rank=None)
            elif isinstance(average, DTensor) and not isinstance(p, DTensor):
                average = average.full_tensor()
            self.average[name] = average

    @torch.no_grad()
    def swap_in(self, pl_module: pl.LightningModule) -> None:
        """Puts the averages in the place of the weights, tensor by tensor, without a second copy of either."""
        self.place(pl_module)
        for name, p in trainable(pl_module).items():
            average = self.average[name]
            if average.dtype == p.dtype:
                exchange(local(p), local(average))
                self.raw[name], self.average[name] = average, p.detach()
            else:
                self.raw[name] = p.detach().clone()
                local(p).copy_(local(average))

    @torch.no_grad()
    def swap_out(self, pl_module: pl.LightningModule) -> None:
        """Puts the raw weights back, if they are aside."""
        if not self.raw:
            return
        for name, p in trainable(pl_module).items():
            raw = self.raw[name]
            if self.average[name].dtype == p.dtype:
                exchange(local(p), local(raw))
                self.average[name] = raw
            else:
                local(p).copy_(local(raw))
        self.raw = {}

    @contextmanager
    def applied(self, pl_module: pl.LightningModule) -> Iterator[None]:
        """Averages in place of the weights, or of another average, within the context."""
        if self.raw or not self.average:  # it is in place already, or before the first step it is the weights
            yield
            return
        with raw_weights(pl_module):
            self.swap_in(pl_module)
            try:
                yield
            finally:
                self.swap_out(pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.average and all_of(trainer)[0] is self:
            self.swap_in(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.swap_out(pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.on_validation_start(trainer, pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.swap_out(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.swap_out(pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if not self.raw:
            return
        names = {id(p): name for name, p in trainable(pl_module).items()}
        for name, p in pl_module.named_parameters(remove_duplicate=False):  # the state names shared ones twice
            if id(p) in names:
                raw = whole(self.raw[names[id(p)]])
                if name in checkpoint["state_dict"]:  # with FSDP2 in the first process alone
                    checkpoint["state_dict"][name] = raw


@contextmanager
def raw_weights(pl_module: pl.LightningModule) -> Iterator[None]:
    """The raw weights, within the context, whichever average stands in for them outside."""
    trainer = getattr(pl_module, "_trainer", None)  # `trainer` itself raises where there is none
    inside = [ema for ema in all_of(trainer) if ema.raw] if trainer is not None else []
    for ema in inside:
        ema.swap_out(pl_module)
    try:
        yield
    finally:
        for ema in inside:
            ema.swap_in(pl_module)


def all_of(trainer: pl.Trainer) -> list[EMA]:
    """The trainer's averages, in the order of its list."""
    return [callback for callback in trainer.callbacks if isinstance(callback, EMA)]  # type: ignore[attr-defined]


def trainable(module: pl.LightningModule) -> dict[str, Tensor]:
    """The parameters that train, by name; with FSDP2 the shards, which the last forward pass may have hidden."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def local(value: Tensor) -> Tensor:
    """What of a tensor this process holds."""
    return value.to_local() if isinstance(value, DTensor) else value.detach()


def whole(value: Tensor) -> Tensor:
    """All of a tensor. A sharded one comes to the CPU, and all processes must ask for it."""
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def exchange(a: Tensor, b: Tensor) -> None:
    """Each takes the other's values, in place."""
    kept = a.clone()
    a.copy_(b)
    b.copy_(kept)


def check_same(average: dict[str, Tensor], live: dict[str, Tensor], name: str) -> None:
    """Raises ValueError where the checkpoint's average is not of the parameters that train."""
    shapes, mine = ({key: tuple(value.shape) for key, value in part.items()} for part in (average, live))
    if shapes != mine:
        differ = sorted(key for key in shapes.keys() | mine.keys() if shapes.get(key) != mine.get(key))
        raise ValueError(
            f"the checkpoint's average ({name}) is of other parameters than those that train: {len(differ)} differ, "
            f"such as {differ[0]} (there {shapes.get(differ[0], 'frozen')}, here {mine.get(differ[0], 'frozen')}). A "
            "run that is resumed trains what it trained; to change that, export the model and start anew from it"
        )
