"""How a pipeline keeps to its prompt and its colours over clips many times as long as those it was trained on.

usage: python benchmarks/long_video.py [NAME] [--pipeline FOLDER] [--data FOLDER] [--times N] [--count N]
       [--window OVERLAP|none] [--reader FOLDER] [--batch-size N] [--seed N] [--json FILE]

NAME is an evaluation of `mmdiff eval` (default: sprites). For the same prompts and seeds it makes clips of the
pipeline's own length and of N times that (default: 10), cuts the long ones into windows of the own length, and reads
the prompt's attributes in each. --window gives the first stage windows of its own length with that overlap, or none,
in place of what the pipeline says.

Ends with two bars: the share of attributes that are right falls by at most 5 points, and the mean colour of no window
differs from its clip's first by more than 2 % of the range on average. Exit status: 0 met, 1 missed.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import entry_points
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.bars import Bar, exit_status, print_bars
from mmdiff.cascade import Cascade
from mmdiff.editing import Window
from mmdiff.evaluate import reader_for
from mmdiff.pipeline import load_pipeline
from mmdiff.readers import Labels, Reader, read
from mmdiff.sampling import seeded_noise
from mmdiff.tasks import Prompt, Task, balanced_prompts

MOST_FALL, MOST_DRIFT = 5.0, 2.0  # points, % of the range

Read = Callable[[Tensor, float], list[Labels]]  # (clips (B, C, T, ...), rate) -> what each shows


@dataclass(frozen=True)
class Long:
    """What was found of `count` clips in `times` windows each.

    right: attribute -> share of all windows in which it is read as prompted; short: of the clips of the own length.
    fall: how many points the share of right attributes lies below the short clips', low and high its 95 % interval
    over clips. by_window: that share for each window. drift: mean over clips of |mean colour of a window - of the
    first|, in % of the range, for each window.
    """

    count: int
    times: int
    right: dict[str, float]
    short: dict[str, float]
    fall: float
    low: float
    high: float
    by_window: list[float]
    drift: list[float]

    @property
    def bars(self) -> list[Bar]:
        return [
            Bar(f"attributes at {self.times} times the length: points lost", MOST_FALL, self.fall, most=True),
            Bar("mean colour: % of the range from the first window", MOST_DRIFT, max(self.drift), most=True),
        ]

    def table(self) -> str:
        lines = [f"{'attribute':<14}{'own length':>12}{f'{self.times} times':>12}"]
        lines += [f"{k:<14}{100 * self.short[k]:>10.1f} %{100 * v:>10.1f} %" for k, v in self.right.items()]
        shares = " ".join(f"{100 * share:.1f}" for share in self.by_window)
        drift = " ".join(f"{value:.2f}" for value in self.drift)
        return "\n".join([
            *lines,
            f"falls by {self.fall:.1f} points [{self.low:.1f}, {self.high:.1f}], 95 % over {self.count} clips",
            f"right in each window, %: {shares}",
            f"colour from the first window, %: {drift}",
        ])  # fmt: skip


def check(wanted: Sequence[Labels], found: Sequence[Labels]) -> Tensor:
    """(N, attributes), 1 where what is read is what is wanted."""
    pairs = zip(wanted, found, strict=True)
    return torch.tensor([[float(got.get(name) == value) for name, value in asked.items()] for asked, got in pairs])


def colours(windows: Sequence[Tensor]) -> Tensor:
    """Mean of each channel of windows (B, C, T, ...), (B, windows, C)."""
    return torch.stack([window.flatten(2).mean(dim=2) for window in windows], dim=1)


@torch.inference_mode()
def measure_long(cascade: Cascade, prompts: Sequence[Prompt], read: Read, times: int, batch_size: int) -> Long:
    """Clips of the cascade's own length and of `times` that, for the same prompts and seeds, compared."""
    channels, length, *sizes = cascade.shape
    short, long, drift = [], [], []
    for first in tqdm(range(0, len(prompts), batch_size), desc="clips", unit="batch"):
        asked = prompts[first : first + batch_size]
        wanted = [prompt.labels for prompt in asked]

        def made(steps: int, asked: Sequence[Prompt] = asked) -> Tensor:
            noise = seeded_noise([prompt.seed for prompt in asked])
            captions = {"caption": [prompt.caption for prompt in asked]}
            return cascade(captions, noise=noise, shape=(channels, steps, *sizes)).data.float().cpu().clamp(-1, 1)

        short.append(check(wanted, read(made(length), cascade.rate)))
        windows = made(times * length).split(length, dim=2)
        long.append(torch.stack([check(wanted, read(window, cascade.rate)) for window in windows], dim=1))
        mean = colours(windows)
        drift.append((mean - mean[:, :1]).abs().mean(dim=2) / 2 * 100)
    before, after = torch.cat(short), torch.cat(long)  # (N, attributes), (N, windows, attributes)
    names = list(prompts[0].labels)
    lost = 100 * (before.mean(dim=1) - after.mean(dim=(1, 2)))
    half = 1.959964 * float(lost.std()) / math.sqrt(len(lost)) if len(lost) > 1 else math.inf
    fall = float(lost.mean())
    return Long(
        len(prompts), times, dict(zip(names, after.mean(dim=(0, 1)).tolist(), strict=True)),
        dict(zip(names, before.mean(dim=0).tolist(), strict=True)), fall, fall - half, fall + half,
        after.mean(dim=(0, 2)).tolist(), torch.cat(drift).mean(dim=0).tolist(),
    )  # fmt: skip


def reading(task: Task, reader: Reader) -> Read:
    """How a task reads clips: by measuring, or else by its reader."""
    return task.measured or (lambda clips, rate: read(reader, reader.reduce(clips).half()))


def windowed(cascade: Cascade, window: str | None) -> Cascade:
    """The cascade whose first stage has windows of its own length with this overlap, or none; None leaves it.

    Raises ValueError for anything else.
    """
    if window is None:
        return cascade
    if window == "none":
        return cascade.with_base(window=None)
    if not window.isdecimal():
        raise ValueError(f"--window {window} must be an overlap, 0 or more time steps, or none")
    (_, length, *_), _ = cascade.plan(tuple(cascade.shape), cascade.rate)[0]
    return cascade.with_base(window=Window(length, int(window)))


def main(args: list[str]) -> int:
    found = {entry.name: entry for entry in entry_points(group="mmdiff.evals")}
    options = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    options.add_argument("name", nargs="?", default="sprites", choices=sorted(found), help="evaluation")
    options.add_argument("--pipeline", help="pipeline folder; without it the evaluation's")
    options.add_argument("--data", help="folder of the real clips; without it the evaluation's")
    options.add_argument("--times", type=int, default=10, help="how many times the pipeline's length")
    options.add_argument("--count", type=int, default=20, help="clips of each length")
    options.add_argument("--window", metavar="OVERLAP|none", help="of the first stage; without it the pipeline's")
    options.add_argument("--reader", type=Path, help="folder of the trained reader: used if it is there, else written")
    options.add_argument("--batch-size", type=int, default=4, help="clips generated together")
    options.add_argument("--seed", type=int, default=0, help="of the clips and of the reader's training")
    options.add_argument("--json", type=Path, help="file for the numbers")
    given = options.parse_args(args)
    for name in ("times", "count", "batch_size"):
        if getattr(given, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(given, name)} is below 1")
    task: Task = found[given.name].load()()
    cascade = windowed(load_pipeline(given.pipeline or task.pipeline), given.window)
    train, val = task.splits(given.data or task.data or "", tuple(cascade.shape), cascade.rate)
    reader = reader_for(task, train, given.seed, given.reader).reader
    prompts = balanced_prompts(task, val, given.count, given.seed)
    result = measure_long(cascade, prompts, reading(task, reader), given.times, given.batch_size)
    print(result.table())
    print_bars(result.bars)
    if given.json is not None:
        given.json.write_text(json.dumps(asdict(result), indent=1) + "\n", "utf-8")
    return exit_status(result.bars)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        sys.exit(str(error))
