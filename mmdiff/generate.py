"""What the text-to-something commands share: options, checks before anything is loaded, seeds, file names, progress."""

import argparse
import json
import math
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from tqdm import tqdm

from . import edit_options, stage_options

if TYPE_CHECKING:
    from .cascade import Cascade, Clip

LONGEST = 16  # times the length a pipeline was made for: beyond, memory rather than patience runs out

Write = Callable[[Path, "Clip", bool], list[Path]]  # (path without suffix, one clip (1, C, T, ...), preview) -> files


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help lists the options")


def parser(command: str, description: str, pipeline: Path) -> Parser:
    """Options that every modality has. pipeline: folder of the shipped weights, the default."""
    options = Parser(f"mmdiff {command}", description=description)
    options.add_argument("prompt", nargs="?", help="what to generate")
    options.add_argument("--prompts", type=Path, metavar="FILE", help="many prompts, one a line")
    options.add_argument("--negative", default=None, help="what to guide away from; default is the empty prompt")
    options.add_argument("--out", type=Path, default=Path("outputs"), help="folder for the files (default: outputs)")
    options.add_argument("--count", type=int, default=1, help="clips for each prompt, of seeds SEED, SEED + 1, ...")
    options.add_argument("--seed", type=int, default=0, help="same seed, same machine: same file (default: 0)")
    stage_options.add_settings(options)
    options.add_argument(
        "--weighted", action="store_true", help="read (word:1.3), [word] and [a|b] in prompts, and longer prompts"
    )
    options.add_argument("--duration", type=float, metavar="SECONDS", help="length (default: the pipeline's)")
    options.add_argument(
        "--pipeline", default=str(pipeline), metavar="FOLDER|HUB_ID", help="which model (default: shipped)"
    )
    options.add_argument(
        "--trust", action="append", default=[], metavar="PACKAGE", help="package a pipeline may also name"
    )
    options.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    options.add_argument("--preview", action="store_true", help="also a picture of every clip")
    options.add_argument("--batch-size", type=int, default=8, help="clips generated together (default: 8)")
    return options


@dataclass(frozen=True)
class Job:
    """One clip to make."""

    prompt: str
    seed: int


def jobs(given: argparse.Namespace) -> list[Job]:
    """The clips that the options ask for. Raises ValueError for options that are wrong whatever the pipeline."""
    if (given.prompt is None) == (given.prompts is None):
        raise ValueError("give one prompt, or --prompts FILE with one a line")
    if given.prompts is not None:
        try:
            prompts = [line.strip() for line in given.prompts.read_text("utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--prompts {given.prompts} cannot be read: {error}") from error
        if not prompts:
            raise ValueError(f"--prompts {given.prompts} holds no prompt")
    elif not given.prompt.strip():
        raise ValueError("the prompt is empty; say what to generate")
    else:
        prompts = [given.prompt]
    for name in ("count", "batch_size"):
        value = getattr(given, name)
        if value is not None and not 1 <= value <= 10_000:
            raise ValueError(f"--{name.replace('_', '-')} {value} is outside 1..10000")
    if not 0 <= given.seed < 2**62:
        raise ValueError(f"--seed {given.seed} is outside 0..2^62")
    if given.duration is not None and not (math.isfinite(given.duration) and given.duration > 0):
        raise ValueError(f"--duration {given.duration} must be a number of seconds above 0")
    return [Job(prompt, given.seed + i) for prompt in prompts for i in range(given.count)]


def check_folder(folder: Path) -> None:
    """Makes the output folder and a file in it, which is removed again. Raises ValueError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--out {folder} cannot be written: {error.strerror or error}") from error


def check_pipeline(name: str) -> None:
    """Raises ValueError for a local folder that is no pipeline, or has no weights, without loading any."""
    if Path(name).expanduser().is_dir():
        from .pipeline import read_cascade

        read_cascade(Path(name).expanduser())
    elif not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        raise ValueError(f"--pipeline {name}: no such folder (nor is it a hub id such as user/model)")


def pick_device(name: str) -> str:
    """The torch device to use. Raises ValueError where this machine has none such."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return name


def file_stem(folder: Path, job: Job) -> Path:
    """A path without suffix under which `folder` has no file yet: number, words of the prompt, seed."""
    words = re.sub(r"[^a-z0-9]+", "-", job.prompt.lower()).strip("-")[:48].strip("-") or "clip"
    taken = [int(name[:4]) for name in os.listdir(folder) if re.match(r"\d{4}-", name)]
    return folder / f"{max(taken, default=-1) + 1:04d}-{words}-seed{job.seed}"


class Bars:
    """A progress bar for each stage of a cascade."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.bars: dict[str, tqdm] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self.bars:
            self.bars[stage] = tqdm(total=total, desc=f"{self.title} {stage}")
        self.bars[stage].update(done - self.bars[stage].n)
        if done == total:
            self.bars[stage].close()


def chosen(given: argparse.Namespace, prompts: list[str]) -> stage_options.Settings:
    """The stages' settings that the options name, built. Raises ValueError for wrong ones, and wrong prompts."""
    settings = stage_options.settings(given)
    if given.weighted:
        from .prompts import parse

        for prompt in [*prompts, given.negative or ""]:
            parse(prompt)
    return settings


def with_options(cascade: "Cascade", given: argparse.Namespace, settings: stage_options.Settings) -> "Cascade":
    """The cascade with other settings of its stages, and prompts read with weights where the options say so."""
    from .cascade import Generate

    if not isinstance(cascade.first, Generate):
        raise ValueError(f"--pipeline {given.pipeline}: its first stage is a {type(cascade.first).__name__}, no model")
    if given.weighted:
        from .prompts import weigh

        if not sum(weigh(stage.model) for stage in cascade.stages.values() if isinstance(stage, Generate)):
            raise ValueError(f"--weighted: no model of --pipeline {given.pipeline} reads a prompt")
    return stage_options.with_settings(cascade, settings)


def check_length(steps: int, cascade: "Cascade") -> None:
    """Raises ValueError unless a clip of that many time steps is one that the cascade can make."""
    longest = LONGEST * cascade.shape[1]
    if not 1 <= steps <= longest:
        raise ValueError(
            f"{steps} steps of time ({steps / cascade.rate:g} s) are outside 1..{longest} "
            f"({1 / cascade.rate:g}..{longest / cascade.rate:g} s), which this pipeline can make; choose another "
            "--duration, or number of frames"
        )


@dataclass(frozen=True)
class Asked:
    """The clips that are asked for: `steps` of T made by `cascade`, of which every `every`-th, from 0 on, is kept."""

    cascade: "Cascade"
    steps: int
    every: int = 1


def run(
    given: argparse.Namespace, write: Write, ask: Callable[["Cascade"], Asked], media: edit_options.Media | None = None
) -> int:
    """Generates what the options ask for, writes it with `write` and prints the files. Returns the exit status.

    ask: what the modality's own options ask of a cascade. media: how the files of an edit are read.
    """
    todo = jobs(given)
    settings = chosen(given, [job.prompt for job in todo])
    if media is not None:
        edit_options.check(given, media)
    check_pipeline(given.pipeline)
    check_folder(given.out)
    device = pick_device(given.device)

    from .cascade import Clip
    from .pipeline import load_pipeline
    from .sampling import seeded_noise

    cascade = load_pipeline(given.pipeline, given.trust, in_turn=True).to(device)
    numbers = stage_options.latents(cascade)
    cascade = with_options(cascade, given, settings)
    asked = ask(cascade if given.until is None else cascade.until(given.until))
    check_length(asked.steps, asked.cascade)
    *before, last = asked.cascade.stages
    if last in numbers and (files := edit_options.files(given)):
        raise ValueError(f"--until {last} makes latents, no media: it goes without {', '.join(files)}")
    make = edit_options.maker(given, media, asked.cascade, asked.steps, LONGEST * asked.cascade.shape[1])
    used = {**stage_options.record(asked.cascade), "weighted": str(given.weighted)}
    for first in range(0, len(todo), given.batch_size):
        batch = todo[first : first + given.batch_size]
        clips: dict[str, Clip] = {}
        clip = make(
            {"caption": [job.prompt for job in batch]},
            noise=seeded_noise([job.seed for job in batch]),
            negative=None if given.negative is None else {"caption": [given.negative] * len(batch)},
            progress=Bars(f"clips {first + 1}-{first + len(batch)} of {len(todo)}:"),
            watch=clips.__setitem__ if given.save_stages else None,
        )
        clips = {name: clips[name] for name in before if name in clips}
        clips[last] = Clip(clip.data[:, :, :: asked.every], clip.rate / asked.every)
        for place, job in enumerate(batch):
            stem = file_stem(given.out, job)
            for name, whole in clips.items():
                own = stem if name == last else stem.with_name(f"{stem.name}-{name}")
                one = Clip(whole.data[place : place + 1].cpu(), whole.rate)
                for file in write_latents(own, one) if name in numbers else write(own, one, given.preview):
                    print(file)
            record = {"prompt": job.prompt, "negative": given.negative, "seed": job.seed, "pipeline": given.pipeline}
            stem.with_name(f"{stem.name}.json").write_text(
                json.dumps(record | edit_options.record(given) | used, indent=2) + "\n", "utf-8"
            )
    return 0


def write_latents(stem: Path, clip: "Clip") -> list[Path]:
    """Writes a clip (1, C, T, ...) as STEM.safetensors, its rate in the metadata. Returns the file."""
    from safetensors.torch import save_file

    file = stem.with_name(f"{stem.name}.safetensors")
    save_file({"latents": clip.data[0].contiguous()}, file, metadata={"rate": repr(clip.rate)})
    return [file]
