"""Several data modules as one training: shares, whole passes through every part, and a resume at any batch."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from mmdiff.backbones import UNet
from mmdiff.callbacks import Checkpoints, ExactResume, FiniteSteps
from mmdiff.checkpoint import AtomicCheckpointIO
from mmdiff.data.mixed import Mixed, MixedLoader
from mmdiff.density import LogNormal
from mmdiff.model import DiffusionModel
from mmdiff.module import DiffusionModule
from mmdiff.precond import EDM
from tests.clip_files import NumberModule, Numbers, write_numbers
from tests.survivors import assert_same
from video.render import WorldDataModule


class Stills(NumberModule):
    """Clips (B, 1, 2, 1) of a file each, in the place of stills."""

    def decoder(self) -> Any:
        return Numbers(steps=2)


class Clips(NumberModule):
    """Clips (B, 1, 4, 1)."""

    def decoder(self) -> Any:
        return Numbers(steps=4)


def mixed(folder: Path, clips: int = 6, stills: int = 5, shares: tuple[float, float] = (0.6, 0.4)) -> Mixed:
    """Clips in batches of 2 and stills one by one."""
    first = Clips(str(write_numbers(folder / "clips", [str(n) for n in range(clips)])), batch_size=2)
    second = Stills(str(write_numbers(folder / "stills", [str(100 + n) for n in range(stills)])), batch_size=1, seed=7)
    return Mixed([first, second], shares, seed=3)


def loader_of(module: Mixed) -> MixedLoader:
    module.prepare_data()
    module.setup("fit")
    return module.train_dataloader()


def epoch_of(loader: MixedLoader, epoch: int) -> list[torch.Tensor]:
    loader.sampler.set_epoch(epoch)
    return [batch["x"] for batch in loader]


def numbers(batches: list[torch.Tensor], steps: int) -> list[int]:
    """The files that the batches with so many time steps came from."""
    return [int(x) for batch in batches if batch.shape[2] == steps for x in batch[:, 0, 0, 0]]


def test_an_epoch_is_one_pass_of_the_first_part_and_as_many_of_the_other_as_the_shares_say(tmp_path: Path) -> None:
    loader = loader_of(mixed(tmp_path))
    assert len(loader) == 5  # 3 batches of clips are 60 %
    first, second = epoch_of(loader, 0), epoch_of(loader, 1)
    for batches in (first, second):
        assert len(batches) == len(loader)
        assert sorted(numbers(batches, 4)) == [0, 1, 2, 3, 4, 5]
        assert len(numbers(batches, 2)) == 2
    kinds = [[batch.shape[2] for batch in epoch_of(loader, epoch)] for epoch in range(8)]
    assert len({tuple(order) for order in kinds}) > 1, "the parts come in the same order in every epoch"


def test_what_an_epoch_leaves_over_of_a_part_comes_before_any_of_it_again(tmp_path: Path) -> None:
    loader = loader_of(mixed(tmp_path))
    seen = [number for epoch in range(5) for number in numbers(epoch_of(loader, epoch), 2)]
    assert [sorted(seen[:5]), sorted(seen[5:])] == [[100, 101, 102, 103, 104]] * 2
    assert seen[:5] != seen[5:], "every pass has the same order"


def test_a_part_that_is_shorter_than_its_share_begins_anew_within_the_epoch(tmp_path: Path) -> None:
    loader = loader_of(mixed(tmp_path, stills=2, shares=(0.3, 0.7)))
    assert len(loader) == 3 + 7
    assert Counter(numbers(epoch_of(loader, 0), 2)) == {100: 4, 101: 3} or Counter(numbers(epoch_of(loader, 0), 2)) == {
        100: 3,
        101: 4,
    }


def test_another_loader_goes_on_at_any_batch_of_any_epoch(tmp_path: Path) -> None:
    whole = loader_of(mixed(tmp_path))
    expected = [epoch_of(whole, epoch) for epoch in range(3)]
    for epoch, position in itertools.product(range(2), range(6)):
        interrupted = loader_of(mixed(tmp_path))
        for before in range(epoch):
            epoch_of(interrupted, before)
        interrupted.sampler.set_epoch(epoch)
        given = list(itertools.islice(iter(interrupted), position))
        assert len(given) == min(position, 5)
        resumed = loader_of(mixed(tmp_path))
        if position:
            resumed.load_state_dict(interrupted.state_dict())
        else:
            resumed.sampler.set_epoch(epoch)
        rest = [batch["x"] for batch in resumed]
        due = expected[epoch][position:] if position < 5 else expected[epoch + 1]
        assert len(rest) == len(due)
        assert all(torch.equal(a, b) for a, b in zip(rest, due, strict=True))


def trained(folder: Path, root: Path, ckpt: Path | None = None, saves: tuple[Any, ...] = ()) -> dict[str, Any]:
    """Weights and Adam's state after 12 steps, over more than two epochs."""
    torch.manual_seed(3)
    backbone = UNet(2, in_channels=2, channels=4, multipliers=[1], head_channels=4, dropout=0.2)
    module = DiffusionModule(DiffusionModel(backbone, EDM()), LogNormal())
    trainer = pl.Trainer(
        max_steps=12, accelerator="cpu", logger=False, default_root_dir=root, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0, plugins=[AtomicCheckpointIO()],
        callbacks=[FiniteSteps(), ExactResume(), *saves], enable_checkpointing=bool(saves),
    )  # fmt: skip
    trainer.fit(module, mixed(folder), ckpt_path=ckpt, weights_only=True)
    assert trainer.global_step == 12
    return {"weights": module.state_dict(), "optimizer": trainer.optimizers[0].state_dict()}


@pytest.mark.filterwarnings("ignore")
def test_a_training_that_is_resumed_at_any_step_is_the_same_training(tmp_path: Path) -> None:
    root = tmp_path / "whole"
    whole = trained(tmp_path, root, saves=(Checkpoints(minutes=None, steps=1, keep=100),))
    found = sorted(root.rglob("resume-*.ckpt"))
    assert len(found) >= 11
    for path in (found[0], found[4], found[7], found[-2]):
        assert_same(trained(tmp_path, tmp_path / "again", path), whole, path.name)


def test_stills_of_the_world_are_clips_of_one_frame() -> None:
    parts = [WorldDataModule(8, frames=n, size=(8, 8), batch_size=b, val_count=2) for n, b in ((4, 2), (1, 8))]
    module = Mixed(parts, [0.8, 0.2])
    shapes = Counter(tuple(batch["x"].shape) for batch in loader_of(module) if batch is not None)
    assert shapes == {(2, 3, 4, 8, 8): 4, (8, 3, 1, 8, 8): 1}
    assert next(iter(module.val_dataloader()))["x"].shape == (2, 3, 4, 8, 8)


@pytest.mark.parametrize(("shares", "message"), [
    ([1.0], r"shares=\[1.0\] for 2 parts; give one share for each part"),
    ([0.5, 0.4], r"shares=\[0.5, 0.4\] must be positive and add up to 1, they add up to 0.9"),
    ([1.0, 0.0], r"shares=\[1.0, 0.0\] must be positive"),
])  # fmt: skip
def test_shares_that_cannot_be_are_named(shares: list[float], message: str) -> None:
    parts = [WorldDataModule(2, frames=2, size=(8, 8)) for _ in range(2)]
    with pytest.raises(ValueError, match=message):
        Mixed(parts, shares)
