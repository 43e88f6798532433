"""What the benchmarks measure with: interleaved rounds, paired ratios, the machine's matrix rate.

Seconds throughout. A round times every network once, in an order that turns from round to round: what slows the machine
for some seconds slows all of them, and the ratio of two times of one round hardly notices.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Work = Callable[[], None]
PRODUCTS = (512, 1024, 2048)  # sides of the square products that the matrix rate is measured with


@dataclass(frozen=True)
class Interval:
    """A median with the bounds between which it lies with 95 % confidence, by order statistics."""

    median: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """Half of the interval in parts of the median."""
        return (self.high - self.low) / 2 / self.median


def interval(values: Sequence[float]) -> Interval:
    """Of at least one value. Under six values there is no such interval, and the bounds are the extremes."""
    ordered, n = sorted(values), len(values)
    if not n:
        raise ValueError("no values were measured: at least one round is needed")
    rank, tail = 0, 0.5**n  # P(at most `rank` of n fall below the median), which must stay under 2.5 %
    while tail + math.comb(n, rank + 1) * 0.5**n <= 0.025:
        rank += 1
        tail += math.comb(n, rank) * 0.5**n
    return Interval(statistics.median(ordered), ordered[rank], ordered[n - 1 - rank])


@dataclass
class Rounds:
    """Seconds of each work by round: seconds[name][i] and seconds[other][i] were measured next to each other."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratios(self, slow: str, fast: str) -> list[float]:
        """Of the seconds of `slow` to those of `fast`, round by round."""
        return [s / f for s, f in zip(self.seconds[slow], self.seconds[fast], strict=True)]


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Work, device: torch.device) -> float:
    synchronise(device)
    begin = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - begin


def measure_rounds(
    works: Mapping[str, Work],
    device: torch.device,
    budget_s: float,
    pairs: Sequence[tuple[str, str]] = (),
    tolerance: float = 0.02,
    rounds: tuple[int, int] = (7, 100),
) -> Rounds:
    """Rounds until the ratio of each of `pairs` is known to `tolerance`, or `budget_s` seconds are spent.

    rounds: at least and at most so many; the budget ends them only after the least number.
    Raises ValueError unless 1 <= least <= most.
    """
    least, most = rounds
    if not 1 <= least <= most:
        raise ValueError(f"rounds={rounds} must be (least, most) with 1 <= least <= most")
    begin = time.perf_counter()
    for work in works.values():
        timed(work, device)  # the first call allocates, chooses kernels, compiles
    found, names = Rounds({name: [] for name in works}), list(works)
    for turn in range(most):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            found.seconds[name].append(timed(works[name], device))
        if turn + 1 < least:
            continue
        known = all(interval(found.ratios(*pair)).spread < tolerance for pair in pairs)
        if (pairs and known) or time.perf_counter() - begin > budget_s:
            break
    return found


def training_step(network: nn.Module, x: Tensor, c_noise: Tensor, target: Tensor, autocast: bool = False) -> Work:
    """Forward, mean square error, backward and the clearing of the gradients; no optimizer's step."""

    def work() -> None:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            loss = nn.functional.mse_loss(network(x, c_noise).float(), target)
        loss.backward()
        network.zero_grad(set_to_none=True)

    return work


def inference_step(network: nn.Module, x: Tensor, c_noise: Tensor, autocast: bool = False) -> Work:
    """Forward alone, without gradients and in eval mode."""

    def work() -> None:
        was = network.training
        network.eval()
        with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            network(x, c_noise)
        network.train(was)

    return work


def matrix_products(device: torch.device, dtype: torch.dtype, sides: Sequence[int] = PRODUCTS) -> dict[str, Work]:
    """A square product of each size, by the name `matrix SIDE`, repeated to take some 20 ms on two cores."""
    works: dict[str, Work] = {}
    for side in sides:
        a, b = torch.randn(2, side, side, device=device).to(dtype)
        out, repeats = torch.empty_like(a), products_in_a_work(side)

        def work(a: Tensor = a, b: Tensor = b, out: Tensor = out, repeats: int = repeats) -> None:
            for _ in range(repeats):
                torch.mm(a, b, out=out)

        works[f"matrix {side}"] = work
    return works


def products_in_a_work(side: int) -> int:
    return max(1, round((1024 / side) ** 3))


def matrix_flops(name: str) -> float:
    """FLOPs of a work of `matrix_products`: 2 n^3 for each product."""
    side = int(name.removeprefix("matrix "))
    return 2.0 * side**3 * products_in_a_work(side)


def best_matrix(rounds: Rounds) -> str:
    """The size of the highest median rate: what share of the machine a network reaches is told against it."""
    names = [name for name in rounds.seconds if name.startswith("matrix ")]
    return max(names, key=lambda name: matrix_flops(name) / rounds.median(name))
