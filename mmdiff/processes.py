"""What processes that train together tell each other; where there is one, each of these costs nothing."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def number() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def summed(values: Tensor) -> Tensor:
    """Sum over the processes that train together, or the values where there is one."""
    if number() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def shared(values: Tensor) -> Tensor:
    """Rank 0's values on all processes that train together."""
    if number() > 1:
        values = values.clone()
        dist.broadcast(values, src=0)
    return values


def check_as_many(batches: Sequence[float], what: str) -> None:
    """Raises ValueError on all processes where they have other numbers of batches, which would leave some waiting."""
    if number() == 1:
        return
    found: list[Any] = [None] * number()
    dist.all_gather_object(found, list(batches))
    if any(one != found[0] for one in found):
        raise ValueError(
            f"the processes have {found} {what} batches, and those with more would wait for the others for ever: give "
            "each as many (the data modules of video, audio and audiovideo do), or set the trainer's limit_*_batches"
        )


class Places:
    """Where the items of this process's batch stand among those of all processes, which lie rank after rank.

    The numbers travel between the hosts, so no accelerator waits for them. A process that gives none within
    `timeout_s` ends the others with an error.
    """

    def __init__(self, timeout_s: float = 600.0) -> None:
        self.timeout_s = timeout_s
        self.group: dist.ProcessGroup | None = None

    def __call__(self, count: int) -> tuple[int, int]:
        """(place of the first of this process's `count` items, number of all). All processes must call it together."""
        if number() == 1:
            return 0, count
        if self.group is None:
            self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout_s))
        counts = torch.zeros(number(), dtype=torch.long)
        counts[dist.get_rank()] = count
        dist.all_reduce(counts, group=self.group)
        return int(counts[: dist.get_rank()].sum()), int(counts.sum())
