"""Who does the work of a preparation: processes of this machine, or Ray Data on one machine or a cluster.

A job is a picklable function without arguments that leaves its result on disk, so that doing it twice does no harm.
"""

import functools
import logging
import os
import secrets
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

Job = Callable[[], Any]
Run = Callable[[Sequence[Job]], Iterator[tuple[int, Any]]]  # (place, result) of jobs, in the order in which they end
_BREAKS = 5  # workers lost in a row, with nothing done in between


class Engine(ABC):
    """Runs jobs in a number of processes, one core each."""

    @abstractmethod
    def opened(self) -> AbstractContextManager[Run]:
        """Context in which jobs can be run."""


def chunks(count: int, workers: int, most: int = 16) -> list[range]:
    """Places of jobs that travel together: few enough that all workers are busy to the end."""
    size = max(1, min(most, count // (workers * 8)))
    return [range(first, min(count, first + size)) for first in range(0, count, size)]


def do(jobs: Sequence[Job]) -> list[Any]:
    return [job() for job in jobs]


def single_thread() -> None:
    """Workers share the cores by being many; threads of their own would only wait for one another."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)


@dataclass(frozen=True)
class Local(Engine):
    """Processes of this machine; 1 worker is the process itself. A worker that dies is replaced and its jobs redone.

    Raises ValueError when five die in a row with nothing done in between.
    """

    workers: int = 1

    def opened(self) -> AbstractContextManager[Run]:
        return nullcontext(self._run)

    def _run(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Any]]:
        if self.workers == 1:
            yield from ((place, job()) for place, job in enumerate(jobs))
            return
        left = dict(enumerate(chunks(len(jobs), self.workers)))
        breaks = 0
        while left:
            before = len(left)
            try:
                for number, results in self._pass(jobs, left):
                    places = left.pop(number)
                    yield from zip(places, results, strict=True)
            except BrokenProcessPool as error:
                breaks = breaks + 1 if len(left) == before else 1
                if breaks == _BREAKS:
                    raise ValueError(
                        f"{breaks} worker processes died in a row (killed, or out of memory); finished work is kept: "
                        "start again with fewer --workers"
                    ) from error

    def _pass(self, jobs: Sequence[Job], left: dict[int, range]) -> Iterator[tuple[int, list[Any]]]:
        # spawn: decoders and their threads do not survive a fork
        with ProcessPoolExecutor(self.workers, get_context("spawn"), initializer=single_thread) as pool:
            waiting = iter(list(left.items()))
            running: dict[Any, int] = {}
            while True:
                for number, places in waiting:
                    running[pool.submit(do, [jobs[place] for place in places])] = number
                    if len(running) >= 2 * self.workers:
                        break
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()


@dataclass(frozen=True)
class Ray(Engine):
    """Ray Data: `address` of a running cluster, or None for one of this machine's own that ends with the work.

    On a cluster the source and the output folder must be on a disk that all machines share. Our own cluster has no
    dashboard and asks for a token, made anew for each process: Ray's servers listen on all addresses of a machine, and
    no option of Ray 2.60 keeps them to the loopback. Lost workers and machines are replaced, their jobs redone.
    gpus: of each worker, which sees no others; a fraction shares one.
    """

    workers: int = 1
    address: str | None = None
    gpus: float = 0.0

    @contextmanager
    def opened(self) -> Iterator[Run]:
        with _cluster(self.workers, self.address, self.gpus > 0) as ray:
            yield functools.partial(self._run, ray)

    def _run(self, ray: Any, jobs: Sequence[Job]) -> Iterator[tuple[int, Any]]:
        if not jobs:
            return
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        together = [{"places": list(part)} for part in chunks(len(jobs), self.workers)]
        shared = ray.put(list(jobs))
        rows = ray.data.from_items(together, override_num_blocks=len(together))
        pool = ray.data.TaskPoolStrategy(size=self.workers)
        # Ray Data retries for ever.
        done = rows.map(functools.partial(_ray_row, shared), num_cpus=1, num_gpus=self.gpus or None, compute=pool)
        for row in done.iter_rows():
            yield from zip(row["places"], row["results"], strict=True)


def _ray_row(shared: Any, row: dict[str, Any]) -> dict[str, Any]:
    import ray

    jobs = ray.get(shared)
    return {"places": row["places"], "results": do([jobs[place] for place in row["places"]])}


@contextmanager
def _cluster(workers: int, address: str | None, gpus: bool) -> Iterator[Any]:
    """The module ray, connected. Raises ImportError naming the extra, ValueError where no cluster answers."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 would starve the workers, which are all that works
    if address is None and "ray" not in sys.modules:  # Ray reads these once, when it is imported
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError(
            "--engine ray needs Ray: pip install 'mmdiff[ray]'; --engine local does the same work"
        ) from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # its lines would run through our progress bar
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if address is None:
        settings |= {"address": "local", "num_cpus": workers, "include_dashboard": False}
        settings |= {} if gpus else {"num_gpus": 0}
    else:
        settings |= {"address": address}
    try:
        ray.init(**settings)
    except (ConnectionError, TimeoutError, RuntimeError) as error:
        raise ValueError(f"Ray does not answer at {address or 'this machine'}: {error}") from error
    try:
        yield ray
    finally:
        ray.shutdown()
