"""A curriculum: small and short clips first, then larger and longer ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl


@dataclass(frozen=True)
class Stage:
    """data: what is trained on in this stage, for so many `epochs`; None, of the last stage alone, is to the end."""

    data: pl.LightningDataModule
    epochs: int | None = None


class Curriculum(pl.LightningDataModule):
    """Trains on one data module after the other, each with its own size, length, batch size or files.

    stages: at least two. A stage is a function of the epoch alone, so a run that is resumed is in the right one; where
    an epoch of the data is too long, trainer.limit_train_batches makes shorter ones.

    Validation and test data are the last stage's throughout, so that held-out losses can be compared. Needs
    trainer.reload_dataloaders_every_n_epochs: 1, for Lightning to ask for each epoch's data. Raises ValueError without
    it, for fewer than two stages, and for epochs that are not given where they must be.
    """

    def __init__(self, stages: list[Stage]) -> None:
        super().__init__()
        if len(stages) < 2:
            raise ValueError(f"stages has {len(stages)} entries; a curriculum needs two or more")
        for place, stage in enumerate(stages[:-1]):
            if stage.epochs is None or stage.epochs < 1:
                raise ValueError(f"stages[{place}]: epochs={stage.epochs} must be at least 1; only the last has none")
        if stages[-1].epochs is not None:
            raise ValueError(f"the last of the stages lasts to the end: leave out its epochs={stages[-1].epochs}")
        self.stages = list(stages)
        self.loader: tuple[int, Any] | None = None  # of the stage that lasts, whose workers live through its epochs

    def stage(self, epoch: int) -> int:
        """Place of the stage of an epoch, counted from 0."""
        for place, stage in enumerate(self.stages[:-1]):
            epoch -= stage.epochs or 0
            if epoch < 0:
                return place
        return len(self.stages) - 1

    def prepare_data(self) -> None:
        for part in self.parts:
            part.trainer = self.trainer
            part.prepare_data()

    def setup(self, stage: str) -> None:
        every = 1 if self.trainer is None else self.trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
        if stage == "fit" and every != 1:
            raise ValueError(
                f"a curriculum needs trainer.reload_dataloaders_every_n_epochs: 1, which is {every}: otherwise it "
                "would stay in its first stage"
            )
        for part in self.parts:
            part.trainer = self.trainer
            part.setup(stage)

    def train_dataloader(self) -> Any:
        place = self.stage(self.trainer.current_epoch if self.trainer else 0)
        if self.loader is None or self.loader[0] != place:
            before, self.loader = self.loader, None  # ends the workers of the stage before
            self.loader = (place, self.stages[place].data.train_dataloader())
            if before is not None and self.trainer is not None and self.trainer.fit_loop.restarting:
                # The checkpoint is of the last step of the stage before, which Lightning knows by the count of its
                # batches. That it compares with the length of an epoch, of this stage already.
                done = self.trainer.fit_loop.epoch_loop.batch_progress.current
                done.completed = max(done.completed, len(self.loader[1]))
        return self.loader[1]

    def val_dataloader(self) -> Any:
        return self.stages[-1].data.val_dataloader()

    def test_dataloader(self) -> Any:
        return self.stages[-1].data.test_dataloader()

    def teardown(self, stage: str) -> None:
        for part in self.parts:
            part.teardown(stage)

    def on_exception(self, exception: BaseException) -> None:
        for part in self.parts:
            part.on_exception(exception)

    def state_dict(self) -> dict[str, Any]:
        return {"stages": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if len(state_dict["stages"]) != len(self.stages):
            raise ValueError(
                f"the checkpoint's curriculum has {len(state_dict['stages'])} stages, this one {len(self.stages)}"
            )
        for part, state in zip(self.parts, state_dict["stages"], strict=True):
            part.load_state_dict(state)

    @property
    def parts(self) -> Sequence[pl.LightningDataModule]:
        return [stage.data for stage in self.stages]
