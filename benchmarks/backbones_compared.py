"""U-Net and DiT, in pixels and in latents, with three objectives, each trained with as many operations: one table.

usage: python benchmarks/backbones_compared.py FOLDER [--tflop N] [--rows NAME ...] [--count N] [--seed N] [--threads N]

Twelve small models of text to video on the procedural world, 8 frames of 32x32 at 4 fps, made of the recipes in
configs/video: world.yaml with dit.yaml, world_latent.yaml and objective/*.yaml over it, and sampled as the objective's
cascade says. Each has N teraflop of training (default 6: a minute or two on 2 cores), as `mmdiff estimate`
counts a step, the encoding of clips included; the latents' autoencoder, trained once before, is not. For each are
printed the words of N prompts (default 100) that are seen in its clips, the Frechet distance to real ones with its
95 % interval, and what a clip costs.

FOLDER keeps a file for each row, so that a run that was ended goes on with the next one.
"""

import argparse
import itertools
import json
import logging
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import lightning.pytorch as pl
import torch

from benchmarks.judge import HEAD, Judge, Verdict, table
from mmdiff.cascade import Clip, Generate
from mmdiff.config import build, dump_config, read_config, trust_policy
from mmdiff.data.media import whole_file
from mmdiff.footprint import instantiate, measure
from mmdiff.generate import pick_device
from mmdiff.module import DiffusionModule
from mmdiff.sampling import seeded_noise

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "video"
BATCH = 20  # clips sampled together


@dataclass(frozen=True)
class Scale:
    """How small clips and models are. unet, dit: arguments of the backbones. autoencoder: its steps of training."""

    frames: int = 8
    size: tuple[int, int] = (32, 32)
    fps: float = 4.0
    batch_size: int = 16
    unet: dict[str, Any] = field(
        default_factory=lambda: {"channels": 32, "head_channels": 32, "factors": [[1, 2, 2], [1, 2, 2]]}
    )
    dit: dict[str, Any] = field(default_factory=lambda: {"width": 96, "depth": 4, "head_channels": 32})
    widths: tuple[int, int] = (16, 48)
    autoencoder: int = 200
    rate: float = 0.002

    @property
    def shape(self) -> tuple[int, ...]:
        return 3, self.frames, *self.size


@dataclass(frozen=True)
class Recipe:
    """One line of the table: a backbone in a space with an objective."""

    dit: bool
    latent: bool
    objective: str

    @property
    def name(self) -> str:
        return "-".join(("dit" if self.dit else "unet", "latents" if self.latent else "pixels", self.objective))

    def layers(self) -> list[Path]:
        """The configs of the recipe, each over those before."""
        own = ["world_latent.yaml"] * self.latent + ["dit.yaml"] * self.dit
        return [CONFIGS / name for name in ("world.yaml", *own, f"objective/{self.objective}.yaml")]

    def differences(self, scale: Scale, steps: int, folder: Path, seed: int) -> dict[str, Any]:
        """What is smaller than in the configs, as a config over them."""
        text = {
            "class_path": "mmdiff.conditioning.Text",
            "init_args": {
                "encoder": {"class_path": "mmdiff.text.ByteTransformer", "init_args": {"width": 128, "depth": 1}},
                "norm": {"class_path": "mmdiff.nn.Standardize", "init_args": {"width": 128, "gain": 3.0}},
            },
        }
        backbone = {**(scale.dit if self.dit else scale.unet), "concat_channels": 0}
        model: dict[str, Any] = {"backbone": {"init_args": backbone}, "conditioner": text}
        arguments: dict[str, Any] = {}
        if self.latent:
            model["autoencoder"] = {"init_args": {"widths": [*scale.widths]}}
            arguments["autoencoder_weights"] = str(folder / "autoencoder")
            if self.objective == "edm":
                model["precond"] = {"init_args": {"sigma_data": 1.0}}
        arguments |= {
            "model": {"init_args": model},
            "optimizer": {"init_args": {"lr": scale.rate}},
            "scheduler": {"init_args": {"steps": steps, "warmup": steps // 20}},
        }
        return {"model": {"init_args": arguments}, "data": {"init_args": data_of(scale, seed)}}


RECIPES = [Recipe(*each) for each in itertools.product((False, True), (False, True), ("edm", "v", "flow"))]


def data_of(scale: Scale, seed: int) -> dict[str, Any]:
    return {
        "count": 20_000, "val_count": 64, "frames": scale.frames, "size": [*scale.size], "fps": scale.fps,
        "batch_size": scale.batch_size, "seed": seed,
    }  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What a recipe came to. settings: of the benchmark, which rows of one table share."""

    name: str
    settings: dict[str, Any]
    parameters: int
    gflop: float  # of a step
    steps: int
    train_s: float
    clip_s: float
    verdict: Verdict

    def cells(self) -> list[str]:
        numbers = [f"{self.parameters / 1e6:.2f}", f"{self.gflop:.1f}", str(self.steps), f"{self.train_s:.0f}"]
        return [*self.name.split("-"), *numbers, *self.verdict.cells(), f"{self.clip_s:.2f}"]


TITLES = ["backbone", "space", "objective", "M parameters", "GFLOP/step", "steps", "training s", *HEAD, "s/clip"]


def autoencoder(scale: Scale, folder: Path, seed: int) -> None:
    """Trains the latent space that the recipes share and leaves it in `folder/autoencoder`, unless it is there."""
    if (folder / "autoencoder").is_dir():
        return
    steps = scale.autoencoder
    tree = {
        "model": {"init_args": {
            "model": {"init_args": {"widths": [*scale.widths]}},
            "scheduler": {"init_args": {"total_steps": steps}},
        }},
        "data": {"init_args": data_of(scale, seed)},
        "trainer": {
            "max_steps": steps, "val_check_interval": steps, "default_root_dir": str(folder / "run"),
            "callbacks": [{
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {"dirpath": str(folder / "run"), "filename": "last", "every_n_train_steps": steps},
            }],
        },
    }  # fmt: skip
    small = written(tree, folder / "autoencoder.yaml")
    layers = [CONFIGS / "autoencoder.yaml", CONFIGS / "world_autoencoder.yaml", small]
    command([*itertools.chain(["fit"], *(["-c", str(layer)] for layer in layers))], folder)
    command(["export", str(folder / "autoencoder"), "--checkpoint", str(folder / "run" / "last.ckpt")], folder)


def command(words: list[str], folder: Path) -> None:
    """Runs mmdiff. Raises RuntimeError with the end of what it said where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "mmdiff", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    (folder / f"{words[0]}.log").write_text(done.stdout + done.stderr, "utf-8")
    if done.returncode != 0:
        raise RuntimeError(f"mmdiff {' '.join(words)} failed: {done.stderr[-2000:]}")


def written(tree: dict[str, Any], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump_config(tree), "utf-8")
    return path


def train(
    recipe: Recipe, scale: Scale, tflop: float, folder: Path, seed: int
) -> tuple[DiffusionModule, dict[str, Any]]:
    """(the trained module, name: number of its cost). Leaves the config of the differences in `folder/NAME.yaml`."""
    own = folder / f"{recipe.name}.yaml"

    def config(steps: int) -> str:
        return "+".join(map(str, [*recipe.layers(), written(recipe.differences(scale, steps, folder, seed), own)]))

    found = measure(config(100), folder)
    steps = max(1, round(1000 * tflop / found.training_gflop))
    pl.seed_everything(seed, verbose=False)
    module, data, settings = instantiate(config(steps))
    assert isinstance(module, DiffusionModule)
    trainer = pl.Trainer(
        max_steps=steps, devices=1, gradient_clip_val=settings.get("gradient_clip_val"), limit_val_batches=0,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    began = time.perf_counter()
    trainer.fit(module, datamodule=data)
    cost = {
        "parameters": found.parameters["backbone"], "gflop": found.training_gflop, "steps": steps,
        "train_s": time.perf_counter() - began,
    }  # fmt: skip
    return module, cost


@torch.inference_mode()
def sampled(module: DiffusionModule, recipe: Recipe, scale: Scale, judge: Judge) -> tuple[Clip, float]:
    """(clips for the judge's prompts, seconds each), as the cascade of the objective samples."""
    settings = read_config(CONFIGS / "objective" / f"{recipe.objective}_cascade.yaml")["stages"]["base"]["init_args"]
    device = pick_device("auto")
    model = module.model.eval().to(device)
    stage = Generate(
        model, build(settings["sigmas"]), build(settings["sampler"]), settings["steps"], settings["guidance"]
    )
    rate, shape = scale.fps / model.autoencoder.factors[0], model.autoencoder.latent_shape(scale.shape)
    began, made = time.perf_counter(), []
    for first in range(0, judge.count, BATCH):
        some = judge.prompts[first : first + BATCH]
        noise = seeded_noise(range(first, first + len(some)))
        clip = stage({"caption": some}, shape=shape, rate=rate, noise=noise)
        made.append(model.autoencoder.decode(clip.data).float().cpu())
    return Clip(torch.cat(made), scale.fps), (time.perf_counter() - began) / judge.count


def compare(
    recipes: Sequence[Recipe], folder: Path, judge: Judge, tflop: float, scale: Scale, seed: int = 0
) -> list[Row]:
    """The rows, those that are not in `folder` made anew. Raises ValueError where it holds rows of other settings."""
    settings = {"tflop": tflop, "count": judge.count, "seed": seed, "scale": json.loads(json.dumps(asdict(scale)))}
    rows = []
    folder.mkdir(parents=True, exist_ok=True)
    for recipe in recipes:
        file = folder / f"{recipe.name}.json"
        if file.is_file():
            found = json.loads(file.read_text("utf-8"))
            if found["settings"] != settings:
                raise ValueError(f"{file} was made with {found['settings']}, not {settings}; name another folder")
            rows.append(Row(**{**found, "verdict": Verdict(**found["verdict"])}))
            continue
        if recipe.latent:
            autoencoder(scale, folder, seed)
        module, cost = train(recipe, scale, tflop, folder, seed)
        clip, clip_s = sampled(module, recipe, scale, judge)
        rows.append(Row(recipe.name, settings, clip_s=clip_s, verdict=judge(clip), **cost))
        with whole_file(file) as temporary:
            temporary.write_text(json.dumps(asdict(rows[-1]), indent=1) + "\n", "utf-8")
        print(" | ".join(rows[-1].cells()), flush=True)
    return rows


def main(args: Sequence[str] | None = None) -> int:
    """Prints the table and writes it to the folder. Raises ValueError for a wrong name or number."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [recipe.name for recipe in RECIPES]
    options.add_argument("folder", type=Path)
    options.add_argument("--tflop", type=float, default=6.0, help="operations of each training (default: 6)")
    options.add_argument("--rows", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    options.add_argument("--count", type=int, default=100, help="clips of each model, at least 40")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: all cores)")
    given = options.parse_args(args)
    if given.tflop <= 0:
        raise ValueError(f"--tflop {given.tflop} must be above 0: the operations of a training")
    torch.set_num_threads(given.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    trust_policy([])
    scale, judge = Scale(), Judge(given.count, seed=given.seed)
    recipes = [recipe for recipe in RECIPES if recipe.name in given.rows]
    rows = compare(recipes, given.folder.resolve(), judge, given.tflop, scale, given.seed)
    real = judge.ceiling(Clip(torch.empty(1, *scale.shape), scale.fps))
    last = ["real clips", *[""] * 6, *real.cells(), ""]
    text = table([TITLES, *(row.cells() for row in rows), last])
    print(text)
    (given.folder / "table.md").write_text(text + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
