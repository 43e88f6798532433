"""What a setting of one stage of a cascade does: to the words that its clips show, their distance and their cost.

usage: python benchmarks/cascade_sweeps.py steps|guidance|noise|speed PIPELINE [--stage NAME] [--until NAME]
       [--values N ...] [--beside PIPELINE] [--count N] [--seed N] [--threads N] [--out FOLDER]

steps:    sampling steps of the first stage (8, 12, 20, 50), judged by that stage's clips.
guidance: scale of its classifier-free guidance (1, 1.5, 2, 3, 5), judged likewise.
noise:    noise that is added to the low-resolution clip of the last stage which has one (0, 0.05, 0.1, 0.2, 0.3),
          judged by the end of the cascade. --beside is a pipeline whose stage of the same name was trained without
          noise augmentation (conditioner: noise 0, level 0); it becomes the line `without`.
speed:    seconds a clip takes by stage and step, one clip at a time.

Each value has the same prompts and noise, of N scenes of the procedural world (default 100) that no training saw; the
stages before the one that changes run once. Printed, and written to FOLDER as Markdown, JSON and a plot.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.judge import HEAD, Judge, Verdict, table
from mmdiff.cascade import Cascade, Clip, Generate, Stage
from mmdiff.generate import pick_device
from mmdiff.pipeline import load_pipeline
from mmdiff.sampling import seeded_noise

BATCH = 10
APART = 1_000_003  # so that no two stages of a clip share their noise

Change = Callable[[Generate, float], Generate]


def with_steps(stage: Generate, steps: float) -> Generate:
    return replace(stage, steps=int(steps))


def with_guidance(stage: Generate, scale: float) -> Generate:
    return replace(stage, guidance=scale)


def with_noise(stage: Generate, level: float) -> Generate:
    """The stage with another level of noise on its low-resolution clip. Raises ValueError where it has none so high."""
    changed = replace(stage, model=copy.deepcopy(stage.model))
    lowres = changed.lowres()
    if lowres is None:
        raise ValueError("the stage has no low-resolution clip (LowRes) to add noise to; name another --stage")
    if not 0 <= level <= lowres.noise:
        raise ValueError(f"level {level} is outside 0..{lowres.noise}, which the stage was trained with")
    lowres.level = level
    return changed


@dataclass(frozen=True)
class Sweep:
    """A setting, its values, and whether it is one of an upsampler, judged at the cascade's end."""

    about: str
    values: tuple[float, ...]
    change: Change
    upsampler: bool = False


SWEEPS = {
    "steps": Sweep("sampling steps", (8, 12, 20, 50), with_steps),
    "guidance": Sweep("guidance", (1, 1.5, 2, 3, 5), with_guidance),
    "noise": Sweep("noise on the low-resolution clip", (0, 0.05, 0.1, 0.2, 0.3), with_noise, upsampler=True),
}


@dataclass
class Timed:
    """The clip after each stage of a part of a cascade, and the seconds they took, over all of them."""

    clips: list[Clip] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def run(cascade: Cascade, prompts: Sequence[str], first: int, last: int, before: Clip | None, seed: int) -> Timed:
    """The stages from `first` to `last`, numbers in the cascade, of clips for the prompts.

    before: clip of the stage before the first. The noise of a clip is that of its number and the stage alone.
    """
    channels, length, *sizes = cascade.shape
    plan = cascade.plan((channels, cascade.whole(length), *sizes), cascade.rate)
    stages = list(zip(cascade.stages.items(), plan, strict=True))[first : last + 1]
    found = Timed(seconds=dict.fromkeys((name for (name, _), _ in stages), 0.0))
    batches: list[list[Clip]] = []
    for begin in range(0, len(prompts), BATCH):
        some = list(prompts[begin : begin + BATCH])
        clip = None if before is None else Clip(before.data[begin : begin + BATCH], before.rate)
        batches.append([])
        for number, ((name, stage), (shape, rate)) in enumerate(stages, start=first):
            noise = seeded_noise([seed + begin + i + number * APART for i in range(len(some))])
            began = time.perf_counter()
            clip = stage({"caption": some}, clip, shape=shape, rate=rate, noise=noise)
            clip = Clip(clip.data.cpu(), clip.rate)  # waits for the device
            found.seconds[name] += time.perf_counter() - began
            batches[-1].append(clip)
    found.clips = [Clip(torch.cat([c.data for c in each]), each[0].rate) for each in zip(*batches, strict=True)]
    return found


@dataclass(frozen=True)
class Row:
    """One value of a setting. seconds: for a clip, of the stage that changes; steps: of that stage."""

    value: str
    verdict: Verdict
    seconds: float
    steps: int


def sweep(
    cascade: Cascade,
    judge: Judge,
    name: str,
    until: str,
    change: Change,
    values: Sequence[float],
    beside: Cascade | None,
) -> Iterator[Row]:
    """A row for each value of the stage `name`, judged by the clips of the stage `until`; last `beside`'s own stage."""
    names = list(cascade.stages)
    at, last = names.index(name), names.index(until)
    if last < at:
        raise ValueError(f"--until {until} comes before the stage {name}, which changes; name it or a later one")
    stage = cascade.stages[name]
    if not isinstance(stage, Generate):
        raise ValueError(f"stage {name!r} is a {type(stage).__name__} and samples nothing; name another --stage")
    variants = [(f"{value:g}", change(stage, value)) for value in values]
    if beside is not None:
        without = beside.stage(name)
        if not isinstance(without, Generate):
            raise ValueError(f"--beside: its stage {name!r} is a {type(without).__name__}, not a Generate")
        variants.append(("without", without))
    before = None if at == 0 else run(cascade, judge.prompts, 0, at - 1, None, judge.seed).clips[-1]
    for label, variant in variants:
        changed = replace(cascade, stages={**cascade.stages, name: variant})
        made = run(changed, judge.prompts, at, last, before, judge.seed)
        yield Row(label, judge(made.clips[-1]), made.seconds[name] / judge.count, variant.steps)


def chosen(cascade: Cascade, which: Sweep, stage: str | None, until: str | None) -> tuple[str, str]:
    """The stage that changes and the one that is judged, where the command names none."""
    names = list(cascade.stages)
    if stage is None and which.upsampler:
        able = [name for name, one in cascade.stages.items() if isinstance(one, Generate) and one.lowres() is not None]
        if not able:
            raise ValueError(f"no stage of {', '.join(names)} has a low-resolution clip; it has no such noise")
        stage = able[-1]
    stage = names[0] if stage is None else stage
    if until is None and which.upsampler:
        until = names[-1]
    for name in (stage, until or stage):
        cascade.stage(name)
    return stage, until or shown(cascade, stage)


def shown(cascade: Cascade, stage: str) -> str:
    """The first stage from this one on whose clips are pictures: the next decoding, where it makes latents."""
    names = list(cascade.stages)
    after = names[names.index(stage) :]
    one = cascade.stages[stage]
    latent = isinstance(one, Generate) and any(True for _ in one.model.autoencoder.parameters())
    return next((name for name in after if not isinstance(cascade.stages[name], Generate)), stage) if latent else stage


def speed(cascade: Cascade, judge: Judge, clips: int) -> list[list[str]]:
    """Lines of a table: what a clip costs by stage, its clips made one at a time."""
    rows = [["stage", "clip", "steps", "s/clip", "s/step"]]
    total = 0.0
    made = [
        run(cascade, [prompt], 0, len(cascade.stages) - 1, None, i) for i, prompt in enumerate(judge.prompts[:clips])
    ]
    for place, (name, stage) in enumerate(cascade.stages.items()):
        seconds = sorted(one.seconds[name] for one in made)[len(made) // 2]
        data, steps = made[0].clips[place].data, steps_of(stage)
        size = "x".join(map(str, data.shape[2:]))
        rows.append(
            [name, f"{size} at {made[0].clips[place].rate:g}/s", str(steps), f"{seconds:.2f}", f"{seconds / steps:.3f}"]
        )
        total += seconds
    return [*rows, ["all", "", "", f"{total:.2f}", ""]]


def steps_of(stage: Stage) -> int:
    return stage.steps if isinstance(stage, Generate) else 1


def lines(about: str, rows: Sequence[Row], real: Verdict) -> list[list[str]]:
    """The table of a sweep, the real clips last."""
    head = [about, *HEAD, "s/clip", "s/step"]
    body = [[r.value, *r.verdict.cells(), f"{r.seconds:.2f}", f"{r.seconds / r.steps:.3f}"] for r in rows]
    return [head, *body, ["real clips", *real.cells(), "", ""]]


def plot(path: Path, about: str, rows: Sequence[Row], real: Verdict) -> None:
    """Distance with its interval, and words that are right, over the values."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True)
    places = list(range(len(rows)))
    near = [row.verdict for row in rows]
    spread = [[v.distance - max(0.0, v.distance_low) for v in near], [v.distance_high - v.distance for v in near]]
    left.errorbar(places, [v.distance for v in near], yerr=spread, marker="o", capsize=3)
    left.axhline(real.distance, linestyle=":", color="grey", label="real clips")
    left.set_ylabel("Frechet distance")
    right.plot(places, [100 * v.mean for v in near], marker="o", label="words")
    right.plot(places, [100 * v.share("all") for v in near], marker="s", label="all of a clip")
    right.set(ylabel="right, %", ylim=(0, 101))
    for axis in (left, right):
        axis.set_xticks(places, [row.value for row in rows])
        axis.set_xlabel(about)
        axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(args: Sequence[str] | None = None) -> int:
    """Prints the table. Raises ValueError for a wrong stage, value or folder."""
    given = parser().parse_args(args)
    torch.set_num_threads(given.threads)
    cascade = load_pipeline(given.pipeline).to(pick_device("auto"))
    judge = Judge(given.count, seed=given.seed)
    if given.setting == "speed":
        rows = speed(cascade, judge, 3)
        found: object = rows
    else:
        which = SWEEPS[given.setting]
        stage, until = chosen(cascade, which, given.stage, given.until)
        beside = None if given.beside is None else load_pipeline(given.beside).to(pick_device("auto"))
        done = []
        for row in sweep(cascade, judge, stage, until, which.change, given.values or which.values, beside):
            print(f"{which.about} of {stage}: {row.value}, {row.verdict.cells()}, {row.seconds:.2f} s/clip", flush=True)
            done.append(row)
        data = cascade.until(until)
        real = judge.ceiling(Clip(torch.empty(1, *data.shape), data.rate))
        rows = lines(f"{which.about} ({stage})", done, real)
        found = {"stage": stage, "until": until, "rows": [asdict(row) for row in done], "real": asdict(real)}
    print(table(rows))
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / f"{given.setting}.md").write_text(table(rows) + "\n", "utf-8")
        (given.out / f"{given.setting}.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
        if given.setting != "speed":
            plot(given.out / f"{given.setting}.png", f"{which.about} ({stage})", done, real)
    return 0


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("setting", choices=[*SWEEPS, "speed"])
    options.add_argument("pipeline", type=Path)
    options.add_argument("--stage", help="that changes")
    options.add_argument("--until", help="stage whose clips are judged")
    options.add_argument("--values", nargs="+", type=float)
    options.add_argument("--beside", type=Path, help="pipeline whose stage was trained without noise augmentation")
    options.add_argument("--count", type=int, default=100, help="clips of each value, at least 40")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: all cores)")
    options.add_argument("--out", type=Path, help="folder for the table, its numbers and its plot")
    return options


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
