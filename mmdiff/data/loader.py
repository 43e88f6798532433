"""Batches of a data set: resumable in the middle of an epoch, in step over processes, and never stuck.

The state is the epoch and the number of batches given, because every random choice is a function of (seed, epoch,
item): workers, prefetching and the number of them leave no trace.
"""

import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, get_worker_info

from mmdiff.data.bad import BadItems
from mmdiff.data.batches import Plan
from mmdiff.data.items import Problem
from mmdiff.exits import ProcessError

if TYPE_CHECKING:
    from mmdiff.data.clips import ClipDataset

Index = tuple[int, int]  # (epoch, place): the epoch travels along, as persistent workers hold the data set of the first


class WorkerError(ProcessError):
    """A process that makes batches ended or hung; the message names the items it was at and the cure."""


class EpochBatches:
    """The batches of one rank, as lists of (epoch, place), from the `start`-th on. Lightning calls `set_epoch`."""

    def __init__(self, plan: Plan, rank: int, world_size: int) -> None:
        self.plan, self.rank, self.world_size = plan, rank, world_size
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[Index]]:
        mine = self.plan.batches(self.epoch, self.world_size)[self.rank :: self.world_size]
        return iter([[(self.epoch, place) for place in batch] for batch in mine[self.start :]])


class ClipLoader:
    """Batches of `dataset` by `plan`, as `collate` makes them of what could be decoded.

    Bad items are left out of their batch and counted in `bad`, nothing is put in their place, and over the budget
    ValueError lists them. A batch of which nothing is left is left out; while training it is None instead, for which
    Lightning skips the step, so that an epoch has as many batches as it says. With several processes all leave it out
    together, else those with a batch would wait in the backward pass for ever; what they had is counted as skipped.
    Processes also agree on every batch, so that one that has ended or hangs is noticed within `timeout_s` seconds.

    report is called at the end of every epoch, skip before every None.
    state_dict, load_state_dict: position and bad items; Lightning keeps them in its checkpoints. `sampler.set_epoch`
    chooses the epoch. Raises WorkerError when a worker dies or gives nothing for `timeout_s`, which with num_workers 0
    cannot be noticed.
    """

    def __init__(
        self,
        dataset: "ClipDataset",
        plan: Plan,
        collate: Callable[[Sequence[dict[str, Any]]], dict[str, Any]],
        bad: BadItems,
        *,
        train: bool,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        timeout_s: float = 600.0,
        report: Callable[[], None] | None = None,
        skip: Callable[[], None] | None = None,
    ) -> None:
        self.dataset, self.bad, self.train, self.timeout_s, self.report = dataset, bad, train, timeout_s, report
        self.skip = skip
        self.sampler = EpochBatches(plan, rank, world_size)
        self.batch_sampler = None  # Lightning asks for it, to warn of shuffled validation data
        self.rank, self.world_size = rank, world_size
        self.steps = plan.steps(world_size)
        self.digest = plan.digest([item.key for item in dataset.items])
        self.progress = torch.full((num_workers,), -1).share_memory_() if num_workers else None
        self.batches: DataLoader[Any] = DataLoader(
            _Watched(dataset, self.progress),
            batch_sampler=self.sampler,  # type: ignore[arg-type]
            num_workers=num_workers,
            collate_fn=_Sorted(collate),
            pin_memory=torch.cuda.is_available(),
            persistent_workers=num_workers > 0,
            timeout=timeout_s if num_workers else 0,
            worker_init_fn=_heed_the_parent_alone,
            generator=torch.Generator().manual_seed(0),  # torch draws a seed for the workers: not from the global one
        )
        self.position = 0
        self._resume: tuple[int, int] | None = None  # (epoch, batches given on this rank)
        self._group: Any = None

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[dict[str, Any] | None]:
        resume, self._resume = self._resume, None
        self.position = resume[1] if resume is not None and resume[0] == self.sampler.epoch else 0
        self.sampler.start = self.position
        iterator = iter(self.batches)  # asks the sampler at once
        self.sampler.start = 0
        while self.position < self.steps:
            batch, found = self._next(iterator)
            self.position += 1
            new = self.bad.add({place: Problem(*rest) for place, *rest in found})
            lost = 0 if batch is None else len(batch["key"])
            if self.world_size > 1 and dist.is_initialized() and self._agreed(new, batch is None):
                self.bad.skipped += lost
                batch = None
            self.bad.check()
            if batch is None and self.train and self.skip is not None:
                self.skip()
            if batch is not None or self.train:
                yield batch
        if self.report is not None:
            self.report()

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.sampler.epoch,
            "position": self.position,
            "world_size": self.world_size,
            "plan": self.digest,
            "bad": self.bad.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues after the last batch that was given. Warns when that is no longer the same place."""
        if state["plan"] != self.digest or state["world_size"] != self.world_size:
            warnings.warn(
                "the data, batch size, seed or number of processes are not those of the checkpoint: the epoch goes on "
                "at the same batch number, and some of its items come twice or not at all; the next epoch is whole",
                stacklevel=2,
            )
        epoch, position = state["epoch"], min(state["position"], self.steps)
        if position == self.steps:
            epoch, position = epoch + 1, 0
        self.sampler.set_epoch(epoch)
        self.position, self._resume = position, (epoch, position)
        self.bad.load_state_dict(state["bad"])

    def _next(self, iterator: Iterator[Any]) -> tuple[dict[str, Any] | None, list[list[Any]]]:
        """(batch of what is left, [place, where, kind, reason] of the bad items)."""
        try:
            batch, found = next(iterator)
        except RuntimeError as error:
            if "DataLoader" not in str(error):  # an error of the decoder, brought over from its worker
                raise
            at = self._at()
            for worker in getattr(iterator, "_workers", []):  # one that hangs would hold up the end of the process
                worker.kill()
            raise WorkerError(
                f"a worker that decodes {self.bad.split} clips ended or gave nothing for {self.timeout_s:g} s, at "
                f"{at}; look at these files, at the memory (num_workers), or raise timeout_s ({error})"
            ) from error
        return batch, found

    def _at(self) -> str:
        places = [] if self.progress is None else [place for place in self.progress.tolist() if place >= 0]
        return ", ".join(self.dataset.items[place].where for place in places) or "no item"

    def _agreed(self, new: dict[int, Problem], empty: bool) -> bool:
        """Whether the batch of any process is empty; takes in what the others found bad."""
        try:
            if self._group is None:
                self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout_s))
            counts = torch.tensor([len(new), int(empty)])
            dist.all_reduce(counts, group=self._group)
            if counts[0]:
                mine = [[place, problem.where, problem.kind, str(problem)] for place, problem in new.items()]
                theirs: list[Any] = [None] * self.world_size
                dist.all_gather_object(theirs, mine, group=self._group)
                for place, *rest in (row for rows in theirs for row in rows):
                    self.bad.found.setdefault(place, Problem(*rest))
        except RuntimeError as error:
            raise WorkerError(
                f"rank {self.rank}: another process gave no {self.bad.split} batch within {self.timeout_s:g} s or "
                f"ended; its own message says why ({str(error).splitlines()[0]})"
            ) from error
        return bool(counts[1])


def _heed_the_parent_alone(worker: int) -> None:
    """Lets a worker go on where a signal to stop comes from anyone else: the main process needs it to end its step.

    A cluster sends SIGTERM, and a terminal Ctrl-C, to all processes of a job at once.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()  # not os.getppid(), which may be a server that forks for it
    if parent is not None and hasattr(signal, "sigtimedwait"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    """Ends this process when the parent says so, or is no more."""
    while True:
        told = signal.sigtimedwait({signal.SIGTERM}, 5.0)
        if told.si_pid == parent.pid if told is not None else not parent.is_alive():
            os._exit(0)


class _Watched(Dataset[Any]):
    """A data set whose worker notes which item it is at, for the message when it never comes back."""

    def __init__(self, dataset: "ClipDataset", progress: torch.Tensor | None) -> None:
        self.dataset, self.progress = dataset, progress

    def __getitems__(self, indices: Sequence[Index]) -> list[tuple[int, dict[str, Any] | Problem]]:
        results = []
        for index in indices:
            self._note(index[1])
            results.append((index[1], self.dataset.result(index)))
        self._note(-1)
        return results

    def _note(self, place: int) -> None:
        worker = get_worker_info()
        if worker is not None and self.progress is not None:
            self.progress[worker.id] = place


class _Sorted:
    """Collates the good results; of the bad ones the plain parts, as pinning rebuilds what it knows."""

    def __init__(self, collate: Callable[[Sequence[dict[str, Any]]], dict[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, results: Sequence[tuple[int, dict[str, Any] | Problem]]) -> tuple[Any, list[list[Any]]]:
        good = [result for _, result in results if not isinstance(result, Problem)]
        bad = [
            [place, result.where, result.kind, str(result)] for place, result in results if isinstance(result, Problem)
        ]
        return self.collate(good) if good else None, bad
