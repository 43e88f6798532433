"""What an optimizer is given: which parameters train, at which rate, and which of them decay."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim.lr_scheduler import LRScheduler

Named = tuple[str, nn.Parameter]


@dataclass(frozen=True)
class ParameterGroups:
    """Groups of an optimizer by the parameters' names, those of the LightningModule's `named_parameters()`.

    frozen: patterns of what is not trained. rates: learning rate by pattern, as a multiple of the optimizer's; of
    several patterns that match a parameter the last counts. no_decay: patterns of what the weight decay leaves alone,
    beside biases, gains, norms and embeddings, which it always leaves alone: decay is for the weights of linear maps.

    Patterns are those of a shell, matched to whole names: "model.denoiser.backbone.down.*". Raises ValueError for a
    rate that is not above 0, and, when they are used, for a pattern that matches nothing.
    """

    frozen: list[str] = field(default_factory=list)
    rates: dict[str, float] = field(default_factory=dict)
    no_decay: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for pattern, rate in self.rates.items():
            if not 0 < rate < float("inf"):
                raise ValueError(
                    f"rates[{pattern!r}]={rate} must be above 0 and finite; name what must not train frozen"
                )

    def freeze(self, module: nn.Module) -> None:
        """Takes the gradients of what is `frozen`. Checks every pattern against the names of `module`."""
        names = [name for name, _ in module.named_parameters()]
        for argument in ("frozen", "rates", "no_decay"):
            for pattern in getattr(self, argument):
                check_matches(argument, pattern, names)
        for name, parameter in module.named_parameters():
            if matches(name, self.frozen):
                parameter.requires_grad_(False)

    def optimizer(self, make: OptimizerCallable, module: nn.Module, within: str = "") -> torch.optim.Optimizer:
        """The optimizer of the parameters of `module` that train and whose names begin with `within`.

        Its state knows them by their names: loading that of other parameters raises ValueError with the difference.
        """
        decayed = {id(p) for p in linear_weights(module)}
        groups: dict[tuple[float, bool], list[Named]] = {}
        for name, p in module.named_parameters():
            if p.requires_grad and name.startswith(within):
                decay = id(p) in decayed and not matches(name, self.no_decay)
                groups.setdefault((self.rate(name), decay), []).append((name, p))
        if not groups:
            raise ValueError(f"nothing trains: every parameter of {type(module).__name__}.{within} is frozen")
        optimizer = make([group(named, rate, decay) for (rate, decay), named in groups.items()])  # type: ignore[arg-type]
        for built, (rate, _) in zip(optimizer.param_groups, groups, strict=True):
            built["lr"] = built["lr"] * rate
        optimizer.register_load_state_dict_pre_hook(check_same_parameters)
        return optimizer

    def rate(self, name: str) -> float:
        """Multiple of the optimizer's rate for the parameter of this name."""
        found = [rate for pattern, rate in self.rates.items() if fnmatchcase(name, pattern)]
        return found[-1] if found else 1.0

    def check_scheduler(self, scheduler: LRScheduler) -> None:
        """Raises ValueError for a scheduler that gives all groups one rate, so that `rates` would say nothing."""
        groups = scheduler.optimizer.param_groups
        rates = [self.rate(group["param_names"][0]) for group in groups]
        first = groups[0].get("initial_lr", groups[0]["lr"]) / rates[0]
        for built, rate in zip(groups, rates, strict=True):
            if abs(built.get("initial_lr", built["lr"]) - first * rate) > 1e-9 * first * rate:
                raise ValueError(
                    f"{type(scheduler).__name__} sets one rate for all parameters and forgets rates={self.rates}; "
                    "take a schedule that multiplies each group's own, such as those of mmdiff.schedules"
                )


def group(named: list[Named], rate: float, decay: bool) -> dict[str, Any]:
    """One group of an optimizer; its "name" is what learning rates are logged under."""
    name = ("decay" if decay else "no_decay") + ("" if rate == 1 else f"_x{rate:g}")
    return {"params": named, "name": name, **({} if decay else {"weight_decay": 0.0})}


def linear_weights(module: nn.Module) -> Iterator[nn.Parameter]:
    """Weights of linear layers and convolutions, and whatever else multiplies in the same way."""
    for path, part in module.named_modules():
        if isinstance(part, nn.Embedding | nn.EmbeddingBag | nn.LayerNorm | nn.RMSNorm):
            continue
        for name, p in part.named_parameters(recurse=False):
            if isinstance(part, ParametrizationList):  # path ends with the name of what is computed of this
                name = f"{path.rpartition('.')[2]}_{name}"
            gain = name in ("weight_g", "weight_original0")  # of torch's two forms of weight norm
            if p.ndim > 1 and "weight" in name and not gain:
                yield p


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether any of the patterns matches the name."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def check_matches(argument: str, pattern: str, names: list[str]) -> None:
    """Raises ValueError that names what is like the pattern, where it matches none of the names."""
    if not any(fnmatchcase(name, pattern) for name in names):
        like = get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
        raise ValueError(f"{argument}: no parameter's name matches {pattern!r}; names are such as {', '.join(like)}")


def check_same_parameters(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Raises ValueError where a state to load is not of the optimizer's own parameters."""
    mine, theirs = (
        [name for group in groups for name in group.get("param_names", ["?"])]
        for groups in (optimizer.param_groups, state["param_groups"])
    )
    if theirs == mine or "?" in theirs:
        return
    new, gone = sorted(set(mine) - set(theirs)), sorted(set(theirs) - set(mine))
    change = "; ".join(
        f"{len(names)} {what}, such as {names[0]}"
        for what, names in (("are new", new), ("no longer train", gone))
        if names
    )
    raise ValueError(
        f"the checkpoint's optimizer has other parameters: {change or 'their groups differ'}. A run that is resumed "
        "trains what it trained; to change that, export the model and start a new run from it (start_from)"
    )
