"""`mmdiff eval`: do generated clips show what their prompts ask for, and are they like real ones?

A modality gives a `Task` through the entry-point group `mmdiff.evals`; nothing here knows which there are.
"""

import argparse
import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .cascade import Cascade, Clip
from .data.clips import ClipDataset
from .data.media import whole_file
from .distance import Extractor
from .eval_report import record, scores, table
from .io import fingerprint
from .judging import Judge, distances
from .memorised import NEAR, Memorised, memorised
from .named import part, pick_guidance
from .readers import (
    Gathered,
    Labels,
    Reader,
    gather,
    labels_of,
    load_reader,
    new_reader,
    save_reader,
    train_reader,
)
from .restoration import Restored, restored
from .sampling import seeded_noise
from .tasks import Prompt, Splits, Task, balanced_prompts, part_of

SHOWN = 12  # generated clips that are written out
PAIRS = 6  # generated clips that are shown with the training clips nearest to them


@dataclass(frozen=True)
class Known:
    """A reader, what it keeps of the training clips, and the seconds of its training; None where it was saved."""

    reader: Reader
    train: Gathered
    training_s: float | None


def reader_for(task: Task, train: ClipDataset, seed: int, folder: Path | None) -> Known:
    """The reader saved in `folder`, else the one that ships, else one trained on the real clips `train`.

    One that is trained is saved in `folder`, where there is one.
    """
    labels = [labels_of(item.meta, task.attributes) for item in train.items]
    reader = new_reader(task.reader, labels, seed)
    saved = folder if folder is not None and (folder / "config.yaml").is_file() else None
    saved = task.trained if folder is None else saved
    if saved is not None:
        reader = load_reader(task.reader, saved, reader.answers)
    known = gather(reader, train, "real training clips")
    if saved is not None:
        return Known(reader, known, None)
    began = time.perf_counter()
    train_reader(reader, known.kept, known.labels, task.recipe, seed)
    if folder is not None:
        save_reader(reader, folder)
    return Known(reader, known, time.perf_counter() - began)


def generate(cascade: Cascade, judge: Judge, prompts: Sequence[Prompt], rate: float, batch_size: int) -> Tensor:
    """Clips (N, C, T, ...) of all prompts, in half precision, after the judge has seen them whole.

    rate: of the clips that the reader knows. Raises ValueError if the cascade makes clips of another rate, or clips
    that are not finite.
    """
    made: list[Tensor] = []
    with tqdm(total=len(prompts), desc="generating", unit="clip") as bar:
        for first in range(0, len(prompts), batch_size):
            asked = prompts[first : first + batch_size]
            noise = seeded_noise([prompt.seed for prompt in asked])

            def progress(stage: str, done: int, total: int) -> None:
                bar.set_postfix_str(f"{stage} {done}/{total}")

            clip = cascade({"caption": [prompt.caption for prompt in asked]}, noise=noise, progress=progress)
            if not math.isclose(clip.rate, rate, rel_tol=1e-3):
                raise ValueError(
                    f"the pipeline makes {clip.rate} steps per second, the real clips have {rate}; give its own --data"
                )
            data = clip.data.float().cpu()
            if not bool(torch.isfinite(data).all()):
                raise ValueError(
                    f"a clip of {asked[0].caption!r} or the {len(asked) - 1} prompts after it is not finite"
                )
            data = data.clamp(-1, 1)
            judge(data, rate)
            made.append(data.half())
            bar.update(len(asked))
    return torch.cat(made)


def weights_hash(folder: Path) -> str:
    """First 12 digits of the SHA-256 over the names and contents of a pipeline's weights."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest()[:12]


def evaluate(
    task: Task,
    cascade: Cascade,
    splits: Splits,
    *,
    count: int,
    seed: int,
    batch_size: int,
    reader_folder: Path | None = None,
    extractor: Extractor | None = None,
    restore: int = 0,
    out: Path | None = None,
    protocol: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The report: `generated` and `real` as of `score`, `parts` where scores are told apart, `distances`, `measures`,
    `memorised`, `stages`, `protocol`, `clips`, `seconds`; also written to `out`.

    splits: training clips, for the reader and as what may be memorised, and validation clips, for the ceiling, the
    captions and as what generated clips are compared with. extractor: features of the distances, instead of the
    reader's. restore: real clips on which each upsampling stage is judged.
    """
    train, val = splits
    if not len(train) or not len(val):
        raise ValueError(f"the data has {len(train)} training and {len(val)} validation clips; both are needed")
    prompts = balanced_prompts(task, val, count, seed)
    known = reader_for(task, train, seed, reader_folder)
    real, made = (Judge(task, known.reader, extractor) for _ in range(2))
    truth = gather(known.reader, val, "real validation clips", real)
    began = time.perf_counter()
    data = generate(cascade, made, prompts, truth.rate, batch_size)
    generating_s = time.perf_counter() - began
    settings = {**(protocol or {}), "seed": seed, "reader": fingerprint(known.reader)}
    size = f"{'x'.join(map(str, data.shape[2:]))} at {truth.rate:g} steps/s"
    apart = distances(made, real, ", ".join([size, *(f"{k} {v}" for k, v in settings.items())]), seed)
    copied = memorised(made.kept, known.train.kept, truth.kept) if len(truth.kept) >= 1 / NEAR else None
    stages: list[Restored] = []
    if restore and task.restoring is not None:
        stages = restored(cascade, val, task.restoring, restore, seed, batch_size)
    report = {
        **scores(prompts, made, truth.labels, [part_of(task, val, place) for place in truth.places], real),
        **record(made, real, apart, copied, stages),
        "protocol": settings,
        "seconds": {"reader": known.training_s, "generating": generating_s},
        "clips": [
            {"caption": p.caption, "seed": p.seed, "prompted": p.labels, "read": answer}
            for p, answer in zip(prompts, made.read, strict=True)
        ],
    }
    if out is not None:
        write(out, task, report, Clip(data, truth.rate), prompts, made.read)
        if copied is not None:
            pairs(out / "nearest", task, copied, Clip(data, truth.rate), train, known.train.places)
    return report


def write(
    out: Path, task: Task, report: dict[str, Any], clip: Clip, prompts: Sequence[Prompt], found: Sequence[Labels]
) -> None:
    """Writes report.json and shows the first clips."""
    with whole_file(out / "report.json") as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    titles = [title(prompt.labels, answer) for prompt, answer in zip(prompts, found, strict=True)]
    task.show(out, Clip(clip.data[:SHOWN].float(), clip.rate), titles[:SHOWN])


def title(wanted: Labels, found: Labels) -> str:
    """A line for each attribute: what was prompted and, where that is not what is read, what is."""
    answers = {name: found.get(name, "nothing") for name in wanted}
    return "\n".join(v if answers[name] == v else f"{v}, read {answers[name]}" for name, v in wanted.items())


def pairs(folder: Path, task: Task, copied: Memorised, clip: Clip, train: ClipDataset, places: Sequence[int]) -> None:
    """Shows the generated clips that are nearest to training clips, each with that clip below it."""
    folder.mkdir(exist_ok=True)
    shown, titles = [], []
    for number in copied.distances.argsort()[:PAIRS].tolist():
        shown += [clip.data[number].float(), train[places[int(copied.nearest[number])]]["x"]]
        titles += [f"generated {number}", f"nearest training clip\nat {float(copied.distances[number]):.3f}"]
    sizes = [min(clip.shape[axis] for clip in shown) for axis in range(1, shown[0].ndim)]
    cut = [x[(slice(None), *(slice(size) for size in sizes))] for x in shown]
    task.show(folder, Clip(torch.stack(cut), clip.rate), titles)


def main(args: list[str]) -> int:
    """Judges generated clips: what is read of them, and how far they are from real ones.

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
    for option, least in (("count", 1), ("batch_size", 1), ("seed", 0), ("steps", 1), ("restore", 0)):
        value = getattr(options, option)
        if value is not None and value < least:
            raise ValueError(f"--{option.replace('_', '-')} {value} is below {least}")
    guidance = None if options.guidance is None else pick_guidance(options.guidance)
    extractor = None if options.features is None else pick_features(options.features, options.trust)
    if options.data is not None and not Path(options.data).expanduser().exists():
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
    cascade = load_pipeline(folder, options.trust).to(device)
    changed = {"steps": options.steps, "guidance": guidance}
    cascade = cascade.with_base(**{k: value for k, value in changed.items() if value is not None})
    base = next(iter(cascade.stages.values()))
    settings = {k: getattr(base, k) for k in ("steps", "guidance") if hasattr(base, k)}
    settings = {k: v if isinstance(v, (int, float)) else repr(v) for k, v in settings.items()}  # a rule, for the JSON
    protocol = {"eval": name, "pipeline": weights_hash(folder), **settings}
    splits = task.splits(options.data or "", tuple(cascade.shape), cascade.rate)
    report = evaluate(
        task, cascade, splits, count=options.count, seed=options.seed, batch_size=options.batch_size,
        reader_folder=options.reader, extractor=extractor, restore=options.restore, out=options.out, protocol=protocol,
    )  # fmt: skip
    print(table(report))
    if options.out is not None:
        print(f"report and samples: {options.out}")
    return 0


def pick_features(text: str, trusted: Sequence[str] = ()) -> Extractor:
    """What --features gives: an extractor by YAML. Raises ValueError for anything else."""
    return part("features", text, {}, Extractor, trusted)  # type: ignore[type-abstract]


def _parser(name: str, task: Task) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"mmdiff eval {name}", description=task.about, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--pipeline", default=str(task.pipeline), help="pipeline folder or hub id")
    if task.data is not None:
        parser.add_argument("--data", default=task.data, help="folder of the real clips")
    parser.set_defaults(data=task.data)
    parser.add_argument("--count", type=int, default=task.count, help="clips to generate")
    parser.add_argument("--steps", type=int, help="sampling steps of the first stage; without it the pipeline's")
    parser.add_argument("--guidance", help="of the first stage, a scale, a name or YAML; without it the pipeline's")
    parser.add_argument("--seed", type=int, default=0, help="of the clips and of the reader's training")
    parser.add_argument("--batch-size", type=int, default=10, help="clips generated together")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--out", type=Path, help="folder for report.json and some of the clips")
    parser.add_argument("--reader", type=Path, help="folder of the trained reader: used if it is there, else written")
    parser.add_argument(
        "--features", metavar="YAML", help="what distances are of, as {class_path: ...}; else the reader's"
    )
    parser.add_argument("--restore", type=int, default=24, help="real clips on which each upsampling stage is judged")
    parser.add_argument(
        "--trust", action="append", default=[], metavar="PACKAGE", help="package that YAML may also name"
    )
    return parser
