"""`mmdiff fit | validate | test | predict`: LightningCLI on the suite's classes, or anyone's LightningModule."""

import argparse
import sys
from typing import Any

import lightning.pytorch as pl
import yaml
from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback

from .__main__ import LIGHTNING
from .checkpoint import AtomicCheckpointIO
from .config import plain
from .io import trust_policy


class SaveConfig(SaveConfigCallback):
    """Writes the resolved config to the run's folder, and into every checkpoint, so that it can be exported alone."""

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["config"] = yaml.safe_load(self.parser.dump(self.config, skip_none=False))


class MmdiffCLI(LightningCLI):
    """LightningCLI that saves checkpoints atomically."""

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        plugins = self._get(self.config_init, "trainer").get("plugins") or []
        plugins = [*plugins] if isinstance(plugins, list) else [plugins]
        return super().instantiate_trainer(plugins=[*plugins, AtomicCheckpointIO()], **kwargs)


def main(args: list[str]) -> int:
    """Runs LightningCLI on `args`, whose first is the command. Returns the exit status. Raises ValueError.

    A config may name classes of mmdiff, video, audio, audiovideo, torch.nn, torch.optim and lightning.pytorch;
    `--trust-config-imports PACKAGE` adds another package, of the user's own.
    """
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--trust-config-imports", action="append", default=[], metavar="PACKAGE[,PACKAGE...]")
    given, rest = own.parse_known_args(args)
    trust_policy([name for names in given.trust_config_imports for name in names.split(",")])
    sys.argv[1:] = rest  # LightningCLI warns where both are given and differ
    raises = {"exit_on_error": False}  # in the place of pages of usage
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
        )
    except ArgumentError as error:
        raise ValueError(f"{plain(error)}; mmdiff {args[0]} --help lists the options") from error
    except ValueError as error:
        raise ValueError(plain(error)) from error
    return 0
