"""`mmdiff generate`: a file of prompts to clips, by processes of one machine or the machines of a Ray cluster.

A clip's files are named by its place, and its record is written last: who starts anew finds what is there, and a batch
that is done twice, because its worker was lost, leaves the same files.
"""

import argparse
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from .data.media import whole_file
from .data.prepare_engines import Engine, Local, Ray
from .generate import (
    Job,
    Write,
    check_folder,
    check_length,
    check_pipeline,
    chosen,
    jobs,
    parser,
    pick_device,
    with_options,
)

if TYPE_CHECKING:
    from .cascade import Cascade

ASKED, MADE = "generate.json", "generated.jsonl"


@dataclass(frozen=True)
class Output:
    """How a modality's clips become files; packages add theirs to the entry-point group `mmdiff.outputs`.

    axes: of a clip, T and what follows it. shipped: folder of the pipeline that is the default. write: see `Write`.
    """

    axes: int
    shipped: Path
    write: Write


def outputs() -> dict[str, Output]:
    """The modalities that are installed, by name."""
    return {entry.name: entry.load() for entry in entry_points(group="mmdiff.outputs")}


def stem(place: int, job: Job) -> str:
    """Name of a clip's files, without suffix: place among all, words of the prompt, seed."""
    words = re.sub(r"[^a-z0-9]+", "-", job.prompt.lower()).strip("-")[:48].strip("-") or "clip"
    return f"{place:06d}-{words}-seed{job.seed}"


def record_of(out: Path, place: int, job: Job) -> dict[str, Any] | None:
    """What is known of a clip that is there with all its files; None for one still to make."""
    try:
        record: dict[str, Any] = json.loads((out / f"{stem(place, job)}.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    whole = record.get("files") and all((out / name).is_file() for name in record["files"])
    return record if whole and (record["prompt"], record["seed"]) == (job.prompt, job.seed) else None


@functools.lru_cache(maxsize=1)
def opened(options: str) -> "tuple[argparse.Namespace, Cascade, Output]":
    """The options, read from JSON, with the pipeline that they name; kept for the next batch of this process."""
    from .pipeline import load_pipeline

    given = argparse.Namespace(**json.loads(options))
    cascade = load_pipeline(given.pipeline, given.trust).to(pick_device(given.device))
    return given, with_options(cascade, given, chosen(given, [])), outputs()[given.media]


@dataclass(frozen=True)
class Batch:
    """Clips to make together: (place, job) of each. Returns the records of those that could not be made."""

    options: str
    clips: tuple[tuple[int, Job], ...]

    def __call__(self) -> list[dict[str, Any]]:
        given, cascade, output = opened(self.options)
        todo = [clip for clip in self.clips if record_of(Path(given.out), *clip) is None]
        try:
            if todo:
                make(given, cascade, output, todo)
        except ValueError as error:
            if len(todo) == 1:  # a prompt of too many words, say
                (place, job), *_ = todo
                return [{"place": place, "prompt": job.prompt, "seed": job.seed, "error": " ".join(str(error).split())}]
            return [bad for clip in todo for bad in Batch(self.options, (clip,))()]
        return []


def make(given: argparse.Namespace, cascade: "Cascade", output: Output, todo: Sequence[tuple[int, Job]]) -> None:
    """Generates clips and writes each one's files, its record last."""
    from .cascade import Clip
    from .sampling import seeded_noise

    made = cascade(
        {"caption": [job.prompt for _, job in todo]},
        noise=seeded_noise([job.seed for _, job in todo]),
        negative=None if given.negative is None else {"caption": [given.negative] * len(todo)},
        shape=(cascade.shape[0], length(given, cascade), *cascade.shape[2:]),
    )
    for data, (place, job) in zip(made.data.cpu().split(1), todo, strict=True):
        path = Path(given.out) / stem(place, job)
        files = [file.name for file in output.write(path, Clip(data, made.rate), given.preview)]
        record = {"place": place, "prompt": job.prompt, "negative": given.negative, "seed": job.seed, "files": files}
        with whole_file(path.with_name(f"{path.name}.json")) as temporary:
            temporary.write_text(json.dumps({**record, "pipeline": given.pipeline}, indent=2) + "\n", "utf-8")


def length(given: argparse.Namespace, cascade: "Cascade") -> int:
    """Time steps of the clips to make."""
    return cascade.shape[1] if given.duration is None else round(given.duration * cascade.rate)


def main(args: list[str]) -> int:
    """Generates clips from a file of prompts, on many processes or machines; goes on where it was stopped."""
    options = parser("generate", main.__doc__ or "", Path())
    options.set_defaults(pipeline=None)
    options.add_argument("--media", metavar="NAME", help="what the clips are: video, audio (default: the pipeline's)")
    options.add_argument("--workers", type=int, default=1, help="processes that generate at the same time (default: 1)")
    options.add_argument("--engine", choices=("local", "ray"), default="local", help="who runs them (default: local)")
    options.add_argument(
        "--address", help="of a Ray cluster, as auto or ray://HOST:10001; its machines share the folders; implies ray"
    )
    options.add_argument("--gpus", type=float, default=0.0, metavar="N", help="of each worker, with Ray (default: 0)")
    given = options.parse_args(args)
    todo = [*enumerate(jobs(given))]
    chosen(given, [job.prompt for _, job in todo])
    engine = engine_of(given)
    given.media, given.pipeline = media_and_pipeline(given.media, given.pipeline)
    check_duration(given)
    check_folder(given.out)
    given.out = given.out.absolute()
    check_free(given, todo)
    bad = run(given, todo, engine)
    for left in given.out.glob(".*.tmp"):  # of workers that were killed, now or in an earlier run
        left.unlink(missing_ok=True)
    records = [record_of(given.out, *clip) for clip in todo]
    with whole_file(given.out / MADE) as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in records if record), "utf-8")
    if bad:
        raise ValueError(
            f"{len(bad)} of {len(todo)} clips could not be made, the first of {bad[0]['prompt'][:60]!r}: "
            f"{bad[0]['error']}; the others are in {given.out}, and the same command tries these again"
        )
    print(given.out / MADE)
    return 0


def run(given: argparse.Namespace, clips: Sequence[tuple[int, Job]], engine: Engine) -> list[dict[str, Any]]:
    """Makes the clips that are not there yet. Returns the records of those that could not be made."""
    left = [clip for clip in clips if record_of(given.out, *clip) is None]
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in vars(given).items()}
    batches = [Batch(json.dumps(plain), tuple(part)) for part in parts(left, given.batch_size)]
    bad: list[dict[str, Any]] = []
    with tqdm(total=len(clips), initial=len(clips) - len(left), desc="clips", unit="clip") as bar:
        if left:
            with engine.opened() as work:
                for place, failed in work(batches):
                    bad += failed
                    bar.update(len(batches[place].clips))
    return sorted(bad, key=lambda record: record["place"])


def parts(clips: Sequence[tuple[int, Job]], size: int) -> Iterator[Sequence[tuple[int, Job]]]:
    return (clips[first : first + size] for first in range(0, len(clips), size))


def engine_of(given: argparse.Namespace) -> Engine:
    """Who does the work. Raises ValueError for options that do not go together."""
    if given.workers < 1:
        raise ValueError(f"--workers {given.workers} is below 1")
    if given.address is not None or given.engine == "ray":
        if given.gpus < 0:
            raise ValueError(f"--gpus {given.gpus:g} is below 0")
        return Ray(given.workers, given.address, given.gpus)
    if given.gpus:
        raise ValueError("--gpus shares GPUs out among the workers of Ray; add --engine ray, or use --device cuda")
    return Local(given.workers)


def media_and_pipeline(media: str | None, pipeline: str | None) -> tuple[str, str]:
    """The name of the modality, and the pipeline's folder, absolute, or hub id, each from the other where it is None.

    Raises ValueError where they do not fit each other, or are both missing.
    """
    known = outputs()
    names = ", ".join(sorted(known))
    if media is not None and media not in known:
        raise ValueError(f"--media {media} is not installed; there are {names}")
    if pipeline is None:
        if media is None:
            raise ValueError(f"give --pipeline FOLDER, or --media ({names}) for the shipped one")
        return media, str(known[media].shipped)
    check_pipeline(pipeline)
    from .io import fetch
    from .pipeline import read_cascade

    shape = read_cascade(fetch(pipeline))["shape"]
    fitting = sorted(name for name, output in known.items() if output.axes == len(shape) - 1)
    if media is None and len(fitting) != 1:
        raise ValueError(
            f"--pipeline {pipeline} makes clips of shape {shape}; say with --media what they are ({names})"
        )
    if media is not None and media not in fitting:
        raise ValueError(f"--pipeline {pipeline} makes clips of shape {shape}, which are no {media}")
    folder = Path(pipeline).expanduser()
    return media or fitting[0], str(folder.absolute()) if folder.is_dir() else pipeline


def check_duration(given: argparse.Namespace) -> None:
    """Raises ValueError for clips of a length that the pipeline cannot make, before its weights are loaded."""
    from .cascade import Cascade
    from .io import fetch
    from .pipeline import read_cascade

    tree = read_cascade(fetch(given.pipeline))
    bare = Cascade({}, tuple(tree["shape"]), float(tree["rate"]))
    check_length(length(given, bare), bare)


def check_free(given: argparse.Namespace, clips: Sequence[tuple[int, Job]]) -> None:
    """Notes what is asked for in the output folder. Raises ValueError where that holds something else."""
    from .io import fetch

    told = "\n".join(f"{job.seed} {job.prompt}" for _, job in clips).encode()
    manifest = fetch(given.pipeline) / "manifest.json"
    asked = {
        name: getattr(given, name) for name in ("negative", "steps", "sampler", "guidance", "weighted", "duration")
    }
    asked |= {"media": given.media, "preview": given.preview, "prompts": hashlib.sha256(told).hexdigest()}
    asked["pipeline"] = hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else given.pipeline
    path = given.out / ASKED
    if path.is_file():
        old = json.loads(path.read_text("utf-8"))
        if other := sorted(name for name, value in asked.items() if old.get(name) != value):
            raise ValueError(f"--out {given.out} holds clips made with other {', '.join(other)}; give another folder")
        return
    if any(re.match(r"\d{6}-", name) for name in os.listdir(given.out)):
        raise ValueError(f"--out {given.out} holds clips that no {ASKED} tells of; give another folder")
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(asked, indent=2) + "\n", "utf-8")
