"""`mmdiff eval`: do generated clips show what their prompts ask for? A reader trained on real clips is the judge.

A modality gives a `Task` through the entry-point group `mmdiff.evals`; nothing here knows which there are.
"""

import argparse
import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .cascade import Cascade, Clip
from .data.clips import ClipDataset
from .data.media import whole_file
from .io import fingerprint
from .named import pick_guidance
from .readers import (
    Labels,
    Reader,
    Recipe,
    gather,
    labels_of,
    load_reader,
    new_reader,
    read,
    save_reader,
    train_reader,
)
from .sampling import seeded_noise

SHOWN = 12  # generated clips that are written out
SEEDS_APART = 1_000_000  # so that the clips of two seeds never share their noise


@dataclass(frozen=True)
class Task:
    """What one evaluation needs of a modality.

    about:    one line for the help. data, pipeline: the default folders.
    splits:   from a data folder to its train and validation clips, whose metadata holds the attributes.
    attributes: what is prompted and read. turns: groups of attributes whose values the prompts take in turn, the
        first group fastest.
    reader, recipe: the judge and its training.
    show:     writes clips (n, C, T, ...), with a title for each, into a folder.
    """

    about: str
    data: str
    pipeline: Path
    splits: Callable[[str], tuple[ClipDataset, ClipDataset]]
    attributes: tuple[str, ...]
    turns: tuple[tuple[str, ...], ...]
    reader: type[Reader]
    recipe: Recipe
    show: Callable[[Path, Clip, list[str]], None]


@dataclass(frozen=True)
class Prompt:
    """A caption, what it asks for, and the seed of the clip made from it."""

    caption: str
    labels: Labels
    seed: int


def wilson(right: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Score interval of a share, 95 % unless `z` says otherwise (Wilson 1927; Brown et al. 2001, eq. 4).

    Raises ValueError unless 0 <= right <= count and count >= 1.
    """
    if not 0 <= right <= count or count < 1:
        raise ValueError(f"right={right} of count={count} is not a share; 0 <= right <= count and count >= 1")
    share, spread = right / count, z * z / count
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def in_turns(keys: Sequence[Sequence[Hashable]], count: int) -> list[int]:
    """`count` indices into `keys` with the values of the keys in turn: first the key's first part, then its next.

    A group that has run through its items begins anew. The groups of a later part start shifted from one group of the
    part before to the next, so that a short list is balanced too.
    """

    def order(indices: list[int], depth: int, shift: int) -> list[int]:
        if depth == len(keys[0]):
            return indices
        groups: dict[Hashable, list[int]] = {}
        for index in indices:
            groups.setdefault(keys[index][depth], []).append(index)
        names = sorted(groups, key=str)
        names = names[shift % len(names) :] + names[: shift % len(names)]
        rows = [order(groups[name], depth + 1, place) for place, name in enumerate(names)]
        return [row[turn % len(row)] for turn in range(max(map(len, rows))) for row in rows]

    if not keys:
        raise ValueError("no clips to take prompts from")
    whole = order(list(range(len(keys))), 0, 0)
    return [whole[i % len(whole)] for i in range(count)]


def balanced_prompts(task: Task, clips: ClipDataset, count: int, seed: int) -> list[Prompt]:
    """Default captions of `clips`, balanced over the task's attributes; the same for every seed but for the noise."""
    labels = [labels_of(item.meta, task.attributes) for item in clips.items]
    keys = [[tuple(label[name] for name in group) for group in task.turns] for label in labels]
    chosen = in_turns(keys, count)
    return [Prompt(clips.items[k].captions[0], labels[k], seed * SEEDS_APART + i) for i, k in enumerate(chosen)]


def generate_and_read(
    cascade: Cascade, reader: Reader, prompts: Sequence[Prompt], rate: float, batch_size: int
) -> tuple[list[Labels], Clip]:
    """(what the reader reads in a clip for each prompt, the first clips themselves).

    rate: of the clips that the reader knows. Raises ValueError if the cascade makes clips of another rate, or clips
    that are not finite.
    """
    found: list[Labels] = []
    shown: list[torch.Tensor] = []
    with tqdm(total=len(prompts), desc="generating", unit="clip") as bar:
        for first in range(0, len(prompts), batch_size):
            part = prompts[first : first + batch_size]
            noise = seeded_noise([prompt.seed for prompt in part])

            def progress(stage: str, done: int, total: int) -> None:
                bar.set_postfix_str(f"{stage} {done}/{total}")

            clip = cascade({"caption": [prompt.caption for prompt in part]}, noise=noise, progress=progress)
            if not math.isclose(clip.rate, rate, rel_tol=1e-3):
                raise ValueError(
                    f"the pipeline makes {clip.rate} steps per second, the real clips have {rate}; give its own --data"
                )
            data = clip.data.float().cpu()
            if not bool(torch.isfinite(data).all()):
                raise ValueError(f"a clip of {part[0].caption!r} or the {len(part) - 1} prompts after it is not finite")
            data = data.clamp(-1, 1)
            found += read(reader, reader.reduce(data).half())
            shown += list(data[: max(0, SHOWN - first)])
            bar.update(len(part))
    return found, Clip(torch.stack(shown), rate)


def score(wanted: Sequence[Labels], found: Sequence[Labels]) -> dict[str, dict[str, Any]]:
    """For each attribute and for all together: right, count, accuracy, 95 % interval, chance.

    chance: the accuracy of answering always what is wanted most often, the best that one can do blindly.
    """
    names = list(wanted[0])
    questions: dict[str, tuple[str, ...]] = {name: (name,) for name in names}
    if len(names) > 1:
        questions["both" if len(names) == 2 else "all"] = tuple(names)
    rows = {}
    for title, asked in questions.items():
        truth = [tuple(label[name] for name in asked) for label in wanted]
        answers = [tuple(label[name] for name in asked) for label in found]
        right, count = sum(t == a for t, a in zip(truth, answers, strict=True)), len(truth)
        chance = max(Counter(truth).values()) / count
        rows[title] = {
            "right": right,
            "count": count,
            "accuracy": right / count,
            "interval": wilson(right, count),
            "chance": chance,
        }
    return rows


def table(report: dict[str, Any]) -> str:
    """The report for the eye."""

    def cell(row: dict[str, Any]) -> str:
        low, high = row["interval"]
        share = f"{row['right']}/{row['count']}"
        return f"{100 * row['accuracy']:5.1f} % [{100 * low:.1f}, {100 * high:.1f}] {share}"

    generated, real = report["generated"], report["real"]
    lines = [f"{'':<12}{'generated':<32}{'real validation (ceiling)':<32}chance"]
    lines += [
        f"{k:<12}{cell(generated[k]):<32}{cell(real[k]):<32}{100 * generated[k]['chance']:.1f} %" for k in generated
    ]
    protocol = ", ".join(f"{name} {value}" for name, value in report["protocol"].items())
    notes = "95 % Wilson intervals; chance: always answering what is prompted most often"
    return "\n".join([*lines, notes, f"protocol: {protocol}"])


def weights_hash(folder: Path) -> str:
    """First 12 digits of the SHA-256 over the names and contents of a pipeline's weights."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest()[:12]


def reader_for(task: Task, train: ClipDataset, seed: int, folder: Path | None) -> tuple[Reader, float | None]:
    """(the reader saved in `folder`, or one trained on the real clips `train` and saved there, seconds of training)."""
    labels = [labels_of(item.meta, task.attributes) for item in train.items]
    reader = new_reader(task.reader, labels, seed)
    if folder is not None and (folder / "config.yaml").is_file():
        return load_reader(task.reader, folder, reader.answers), None
    began = time.perf_counter()
    kept, labels, _ = gather(reader, train, "real training clips")
    train_reader(reader, kept, labels, task.recipe, seed)
    if folder is not None:
        save_reader(reader, folder)
    return reader, time.perf_counter() - began


def evaluate(
    task: Task,
    cascade: Cascade,
    splits: tuple[ClipDataset, ClipDataset],
    *,
    count: int,
    seed: int,
    batch_size: int,
    reader_folder: Path | None = None,
    out: Path | None = None,
    protocol: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The report: `generated` and `real` as of `score`, `protocol`, `clips`, `seconds`; also written to `out`.

    splits: training clips, for the reader alone, and validation clips, for the ceiling and the captions.
    """
    train, val = splits
    if not len(train) or not len(val):
        raise ValueError(f"the data has {len(train)} training and {len(val)} validation clips; both are needed")
    prompts = balanced_prompts(task, val, count, seed)
    reader, training_s = reader_for(task, train, seed, reader_folder)
    kept, truth, rate = gather(reader, val, "real validation clips")
    real = score(truth, read(reader, kept))
    began = time.perf_counter()
    found, clip = generate_and_read(cascade, reader, prompts, rate, batch_size)
    report = {
        "generated": score([prompt.labels for prompt in prompts], found),
        "real": real,
        "protocol": {**(protocol or {}), "seed": seed, "reader": fingerprint(reader)},
        "seconds": {"reader": training_s, "generating": time.perf_counter() - began},
        "clips": [
            {"caption": p.caption, "seed": p.seed, "prompted": p.labels, "read": answer}
            for p, answer in zip(prompts, found, strict=True)
        ],
    }
    if out is not None:
        with whole_file(out / "report.json") as temporary:
            temporary.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
        titles = [f"prompted {_words(p.labels)}\nread {_words(a)}" for p, a in zip(prompts, found, strict=True)]
        task.show(out, clip, titles[: len(clip.data)])
    return report


def _words(labels: Labels) -> str:
    return " ".join(labels.values())


def main(args: list[str]) -> int:
    """Judges generated clips by a reader trained on real ones.

    Raises ValueError for a wrong value.
    """
    found: dict[str, EntryPoint] = {entry.name: entry for entry in entry_points(group="mmdiff.evals")}
    listed = "\n".join(f"  {name:<12}{found[name].value}" for name in sorted(found)) or "  none installed"
    usage = f"usage: mmdiff eval NAME ...\n\nevaluations (mmdiff eval NAME --help says more):\n{listed}"
    if not args or args[0] in ("-h", "--help"):
        print(usage)
        return 0 if args else 2
    name, rest = args[0], args[1:]
    if name not in found:
        raise ValueError(f"{name!r} is not an evaluation; there are {', '.join(sorted(found)) or 'none installed'}")
    task: Task = found[name].load()()
    options = _parser(name, task).parse_args(rest)
    for option, least in (("count", 1), ("batch_size", 1), ("seed", 0), ("steps", 1)):
        value = getattr(options, option)
        if value is not None and value < least:
            raise ValueError(f"--{option.replace('_', '-')} {value} is below {least}")
    guidance = None if options.guidance is None else pick_guidance(options.guidance)
    if not Path(options.data).expanduser().exists():
        raise ValueError(
            f"--data {options.data} does not exist (working directory {Path.cwd()}); give the data's folder"
        )
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)

    from .generate import pick_device
    from .io import fetch
    from .pipeline import load_pipeline

    device = pick_device(options.device)
    folder = fetch(options.pipeline)
    cascade = load_pipeline(folder).to(device)
    changed = {"steps": options.steps, "guidance": guidance}
    cascade = cascade.with_base(**{k: value for k, value in changed.items() if value is not None})
    base = next(iter(cascade.stages.values()))
    settings = {k: getattr(base, k) for k in ("steps", "guidance") if hasattr(base, k)}
    settings = {k: v if isinstance(v, (int, float)) else repr(v) for k, v in settings.items()}  # a rule, for the JSON
    protocol = {"eval": name, "pipeline": weights_hash(folder), **settings}
    report = evaluate(
        task, cascade, task.splits(options.data), count=options.count, seed=options.seed, batch_size=options.batch_size,
        reader_folder=options.reader, out=options.out, protocol=protocol,
    )  # fmt: skip
    print(table(report))
    if options.out is not None:
        print(f"report and samples: {options.out}")
    return 0


def _parser(name: str, task: Task) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"mmdiff eval {name}", description=task.about, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--pipeline", default=str(task.pipeline), help="pipeline folder or hub id")
    parser.add_argument("--data", default=task.data, help="folder of the real clips")
    parser.add_argument("--count", type=int, default=100, help="clips to generate")
    parser.add_argument("--steps", type=int, help="sampling steps of the first stage; without it the pipeline's")
    parser.add_argument("--guidance", help="of the first stage, a scale, a name or YAML; without it the pipeline's")
    parser.add_argument("--seed", type=int, default=0, help="of the clips and of the reader's training")
    parser.add_argument("--batch-size", type=int, default=10, help="clips generated together")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--out", type=Path, help="folder for report.json and some of the clips")
    parser.add_argument("--reader", type=Path, help="folder of the trained reader: used if it is there, else written")
    return parser
