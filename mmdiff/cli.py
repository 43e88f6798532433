"""`mmdiff fit | validate | test | predict`: LightningCLI on the suite's classes, or anyone's LightningModule."""

import argparse
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from jsonargparse import ArgumentError, Namespace
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from .__main__ import LIGHTNING
from .callbacks.checkpoints import Checkpoints
from .callbacks.doctor import Doctor
from .callbacks.exact import ExactResume
from .callbacks.finite import FiniteSteps
from .callbacks.history import History
from .callbacks.monitor import Monitor
from .callbacks.noise_levels import LossByNoiseLevel
from .callbacks.run_record import RunRecord
from .callbacks.signals import StopSignals
from .checkpoint import AtomicCheckpointIO
from .config import plain
from .exits import NonFiniteError
from .io import trust_policy
from .ranks import Ranks, end_children, lost, shorten_timeout
from .resume import Found, find, keep_csv


class SaveConfig(SaveConfigCallback):
    """Writes the resolved config to the run's folder, and into every checkpoint, so that it can be exported alone."""

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["config"] = yaml.safe_load(self.parser.dump(self.config, skip_none=False))


# What `mmdiff fit` adds, with default arguments, where trainer.callbacks has none of that type.
DEFAULT_CALLBACKS: tuple[type[pl.Callback], ...] = (
    Ranks,
    Doctor,  # before FiniteSteps, to name what it stops at
    FiniteSteps,
    ExactResume,
    History,  # before LearningRateMonitor, which needs a logger
    LearningRateMonitor,
    LossByNoiseLevel,
    Monitor,
    RunRecord,
    Checkpoints,
)
VERSIONED = ("TensorBoardLogger", "CSVLogger")  # loggers whose folder is save_dir / name / version


class MmdiffCLI(LightningCLI):
    """LightningCLI that saves checkpoints atomically, gives `fit` its default callbacks, and goes on with a run.

    resume: where to look for the run that `fit` goes on with; "" is where the config's own run folders are, None is a
    new run. argv: the command line, for processes that the trainer starts.
    """

    def __init__(self, *args: Any, resume: str | None = None, argv: list[str] | None = None, **kwargs: Any) -> None:
        self.resume, self.argv = resume, argv
        super().__init__(*args, **kwargs)

    def instantiate_classes(self) -> None:
        if self.argv is not None:
            sys.argv[1:] = self.argv
        given = self.config
        if self.subcommand == "fit" and self.resume is not None:
            self.config = self._resumed(given)
        self.given = given
        super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        self.config = self.given  # so that the run's folder and its checkpoints keep the config as it was given
        config = self._get(self.config_init, "trainer")
        kwargs["plugins"] = [*_listed(config.get("plugins")), AtomicCheckpointIO()]
        if self.subcommand == "fit":
            kwargs["callbacks"] = [*_listed(config.get("callbacks")), *self._added(config)]
        trainer = super().instantiate_trainer(**kwargs)
        shorten_timeout(trainer)
        return trainer

    def fit(self, model: pl.LightningModule, **kwargs: Any) -> None:
        """Trains. Raises ProcessError where another process is gone."""
        try:
            self.trainer.fit(model, **kwargs)
        except RuntimeError as error:
            gone = lost(error, self.trainer)
            if gone is None:
                raise
            raise gone from error
        finally:
            end_children(self.trainer)

    def _added(self, config: Namespace) -> list[pl.Callback]:
        """Default callbacks of which the config has none of its own."""
        given = _listed(config.get("callbacks"))
        kinds = [kind for kind in DEFAULT_CALLBACKS if not any(isinstance(one, kind) for one in given)]
        if config.get("enable_checkpointing") is False:
            kinds = [kind for kind in kinds if not issubclass(kind, pl.callbacks.Checkpoint)]
        return [kind() for kind in kinds]

    def _resumed(self, given: Namespace) -> Namespace:
        """The config that goes on with the newest whole checkpoint, in its run's folder; or as it is, saying so."""
        config = given.clone()
        fit = config.fit
        if fit.ckpt_path is not None:
            raise ValueError(f"--resume and ckpt_path={fit.ckpt_path} both say where to go on; give one of them")
        folders = [Path(self.resume)] if self.resume else _run_folders(fit.trainer)
        if self.resume and folders[0].is_file():
            raise ValueError(f"--resume {self.resume} is a file; give the folder of a run, or --ckpt_path for one file")
        resolved = yaml.safe_load(self._parser("fit").dump(fit, skip_none=False))
        found = find(folders, None if self.resume else resolved)
        if found is None:
            of = "checkpoint" if self.resume else "checkpoint of this config"
            rank_zero_info(f"--resume: no whole {of} in {', '.join(map(str, folders))}: starts anew")
            return config
        rank_zero_info(f"--resume: goes on in {found.run} with step {found.step} of {found.checkpoint.name}")
        fit.ckpt_path = str(found.checkpoint)
        if fit.trainer.logger is not False:
            default = Namespace(class_path="lightning.pytorch.loggers.TensorBoardLogger", init_args=Namespace())
            loggers = [default if one in (None, True) else one for one in _listed(fit.trainer.logger) or [True]]
            fit.trainer.logger = [_continued(one, found) for one in loggers]
        return config


def _continued(logger: Namespace, found: Found) -> Namespace:
    """A logger that writes where the run's did; others than Lightning's own know by themselves how."""
    kind = logger.class_path.rsplit(".", 1)[-1]
    if kind in VERSIONED:
        logger.init_args.update(Namespace(save_dir=str(found.run.parent), name="", version=found.run.name))
    if kind == "TensorBoardLogger":  # hides what the run logged after the checkpoint, which comes again
        logger.dict_kwargs = {**(logger.get("dict_kwargs") or {}), "purge_step": found.logged + 1}
    if kind == "CSVLogger":
        keep_csv(found)
    return logger


def _run_folders(trainer: Namespace) -> list[Path]:
    """Where the config's runs and their checkpoints lie, as far as it says."""
    folders = [trainer.default_root_dir or "."]
    folders += [one.init_args.get("save_dir") for one in _listed(trainer.logger) if isinstance(one, Namespace)]
    folders += [one.init_args.get("dirpath") for one in _listed(trainer.callbacks)]
    return [Path(folder).expanduser() for folder in dict.fromkeys(folders) if folder]


def main(args: list[str]) -> int:
    """Runs LightningCLI on `args`, whose first is the command. Returns the exit status. Raises ValueError.

    A config may name classes of mmdiff, video, audio, audiovideo, torch.nn, torch.optim and lightning.pytorch;
    `--trust-config-imports PACKAGE` adds another package, of the user's own. `fit --resume [FOLDER]` goes on with the
    newest whole checkpoint, in FOLDER or else of this config; where there is none, it starts anew.
    """
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--trust-config-imports", action="append", default=[], metavar="PACKAGE[,PACKAGE...]")
    if args[0] == "fit":
        own.add_argument("--resume", nargs="?", const="", metavar="FOLDER")
    given, rest = own.parse_known_args(args)
    trust_policy([name for names in given.trust_config_imports for name in names.split(",")])
    sys.argv[1:] = rest  # LightningCLI warns where both are given and differ
    raises = {"exit_on_error": False}  # in the place of pages of usage
    signals = StopSignals()
    if args[0] == "fit":
        signals.install()
    try:
        MmdiffCLI(
            pl.LightningModule,
            pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            parser_kwargs={**raises, **{name: raises.copy() for name in LIGHTNING}},
            resume=getattr(given, "resume", None),
            argv=args,
        )
    except NonFiniteError:
        raise
    except ArgumentError as error:
        raise ValueError(f"{plain(error)}; mmdiff {args[0]} --help lists the options") from error
    except ValueError as error:
        raise ValueError(plain(error)) from error
    finally:
        signals.restore()
    return 0


def _listed(value: Any) -> list[Any]:
    """What one of the trainer's options holds, none, one or a list, as a new list."""
    if value is None:
        return []
    return [*value] if isinstance(value, list) else [value]
