"""Pipelines of one task side by side, such as one that samples pixels and one that samples latents.

usage: python benchmarks/pipelines.py NAME PIPELINE [PIPELINE ...] [--count N] [--data FOLDER] [--reader FOLDER]
       [--seed N] [--out FILE.md]

NAME is an evaluation of `mmdiff eval`. Each pipeline makes N clips (default 100) for the same prompts and seeds. For
each are printed the shares of clips in which the reader reads what was prompted, the Frechet distance to N real
validation clips of random features (`mmdiff.distance`; of waveforms, those of their log-mel spectrograms; with its
95 % interval from 40 clips on), and the seconds a clip takes here. The line `real` has N real training clips in their
place: as near as real clips come.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from tqdm import tqdm

from audio.mel import Mel
from mmdiff import evaluate
from mmdiff.accuracy import score
from mmdiff.data.clips import ClipDataset
from mmdiff.distance import GROUPS, RandomFeatures, frechet_distance, measure
from mmdiff.pipeline import load_pipeline
from mmdiff.readers import Labels, Reader, labels_of, read
from mmdiff.sampling import seeded_noise
from mmdiff.tasks import Prompt, Task, balanced_prompts

BATCH = 10


def main(args: list[str]) -> int:
    """Prints the table. Returns the exit status. Raises ValueError for a wrong name, folder or clip."""
    given = _parser().parse_args(args)
    found = {entry.name: entry for entry in evaluate.entry_points(group="mmdiff.evals")}
    if given.name not in found:
        raise ValueError(f"{given.name!r} is not an evaluation; there are {', '.join(sorted(found))}")
    task: Task = found[given.name].load()()
    first = load_pipeline(given.pipelines[0])
    train, val = task.splits(given.data or task.data or "", tuple(first.shape), first.rate)
    reader = evaluate.reader_for(task, train, given.seed, given.reader).reader
    prompts = balanced_prompts(task, val, given.count, given.seed)
    questions = [*task.attributes] + (
        ["both" if len(task.attributes) == 2 else "all"] if len(task.attributes) > 1 else []
    )
    rows = [["pipeline", *(f"{name} %" for name in questions), "Frechet distance", "s/clip"]]
    real = clips(val, given.count)
    shown, truth = clips(train, given.count), labels(train, given.count, task)
    rows.append(["real", *shares(truth, answers(task, reader, shown, first.rate)), distance(real, shown), ""])
    for folder in given.pipelines:
        made, seconds = generate(folder, prompts)
        read_out = answers(task, reader, made, first.rate)
        rows.append(
            [folder.name, *shares([p.labels for p in prompts], read_out), distance(real, made), f"{seconds:.2f}"]
        )
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    print("\n".join(lines))
    if given.out is not None:
        given.out.write_text("\n".join(lines) + "\n", "utf-8")
    return 0


def generate(folder: Path, prompts: list[Prompt]) -> tuple[Tensor, float]:
    """(clips (N, C, T, ...) in [-1, 1] for the prompts, seconds each)."""
    cascade = load_pipeline(folder)
    made, began = [], time.perf_counter()
    for first in tqdm(range(0, len(prompts), BATCH), desc=folder.name, unit="batch"):
        part = prompts[first : first + BATCH]
        clip = cascade({"caption": [p.caption for p in part]}, noise=seeded_noise([p.seed for p in part]))
        made.append(clip.data.float().clamp(-1, 1))
    return torch.cat(made), (time.perf_counter() - began) / len(prompts)


def clips(dataset: ClipDataset, count: int) -> Tensor:
    """The first clips (count, C, T, ...). Raises ValueError for too few."""
    if len(dataset) < count:
        raise ValueError(f"--count {count} is more than the {len(dataset)} real clips of a split")
    return torch.stack([dataset[index]["x"] for index in range(count)])


def labels(dataset: ClipDataset, count: int, task: Task) -> list[Labels]:
    return [labels_of(item.meta, task.attributes) for item in dataset.items[:count]]


def answers(task: Task, reader: Reader, made: Tensor, rate: float) -> list[Labels]:
    if task.measured is not None:
        return task.measured(made, rate)
    return read(reader, torch.cat([reader.reduce(part).half() for part in made.split(BATCH)]))


def shares(wanted: list[Labels], found: list[Labels]) -> list[str]:
    """Of each attribute, then of all together, in per cent with the 95 % interval."""
    scores = score(wanted, found).values()
    return [
        f"{100 * row['accuracy']:.0f} ({100 * row['interval'][0]:.0f} to {100 * row['interval'][1]:.0f})"
        for row in scores
    ]


def distance(real: Tensor, made: Tensor) -> str:
    sizes = [min(a, b) for a, b in zip(real.shape[2:], made.shape[2:], strict=True)]  # 15 frames beside 16
    a, b = (features(x[(..., *(slice(size) for size in sizes))]) for x in (real, made))
    if min(len(a), len(b)) < 2 * GROUPS:
        return f"{frechet_distance(a, b):.2f}"
    found = measure(frechet_distance, a, b, protocol="random features")
    return f"{found.value:.2f} ({max(0.0, found.low):.2f} to {found.high:.2f})"


@torch.inference_mode()
def features(x: Tensor) -> Tensor:
    """(N, C, T, ...) -> (N, D)."""
    if x.ndim == 3:
        mel = Mel(8000, n_fft=512, hop_length=128, mels=64, mean=-3.0, std=1.5)
        x = mel.encode(x[..., : x.shape[2] // 128 * 128])
    network = RandomFeatures(x.shape[1], x.ndim - 2)
    return torch.cat([network(part) for part in x.split(BATCH)])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("pipelines", nargs="+", type=Path)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data")
    parser.add_argument("--reader", type=Path)
    parser.add_argument("--out", type=Path)
    return parser


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
