"""Loaders: resumed exactly anywhere, in step over processes, never stuck; bad items left out and accounted for."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from mmdiff.checkpoint import AtomicCheckpointIO
from mmdiff.data.loader import ClipLoader, WorkerError
from tests.clip_files import NumberModule, write_numbers

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.filterwarnings("ignore:bad item")


def loader_of(folder: Path, **options: Any) -> ClipLoader:
    data = NumberModule(str(folder), **options)
    data.setup()
    loader = data.train_dataloader()
    assert isinstance(loader, ClipLoader)
    return loader


def facts(batch: dict[str, Any] | None) -> tuple[Any, ...]:
    return () if batch is None else (*batch["key"], *batch["x"][:, 1, 0, 0].tolist())


def epochs(loader: ClipLoader, count: int) -> list[list[tuple[Any, ...]]]:
    found = []
    for epoch in range(count):
        loader.sampler.set_epoch(epoch)
        found.append([facts(batch) for batch in loader])
    return found


# state


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cut_anywhere_goes_on_exactly(tmp_path: Path, workers: int) -> None:
    folder = write_numbers(tmp_path, [str(n) for n in range(9)])
    whole = epochs(loader_of(folder), 2)
    assert [len(epoch) for epoch in whole] == [5, 5]
    assert whole[0] != whole[1]
    loader, again = loader_of(folder, num_workers=workers), loader_of(folder, num_workers=workers)
    loader.sampler.set_epoch(1)
    for cut in range(6):
        iterator = iter(loader)
        first = [facts(next(iterator)) for _ in range(cut)]
        state = json.loads(json.dumps(loader.state_dict()))
        again.load_state_dict(state)
        assert first == whole[1][:cut]
        if cut < 5:
            assert first + [facts(batch) for batch in again] == whole[1]
        else:  # at the end of an epoch comes the next
            assert again.sampler.epoch == 2
            assert len(list(again)) == 5


class Recorder(LightningModule):
    """Notes what it is given; its one weight follows from it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.seen: list[tuple[int, int, tuple[Any, ...]]] = []

    def training_step(self, batch: dict[str, Any], index: int) -> torch.Tensor:
        self.seen.append((self.current_epoch, index, facts(batch)))
        return (self.weight - batch["x"].double().mean((0, 2, 3))).square().sum()

    def validation_step(self, batch: dict[str, Any], index: int) -> None:
        assert batch["key"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1)


def fitted(folder: Path, root: Path, steps: int, ckpt: Path | None = None, **options: Any) -> Recorder:
    module = Recorder()
    saves = ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", logger=False, callbacks=[saves], default_root_dir=root,
        enable_progress_bar=False, enable_model_summary=False, plugins=[AtomicCheckpointIO()],
        num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, NumberModule(str(folder), **options), ckpt_path=ckpt, weights_only=True)
    return module


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("workers", "batch_size"), [(0, 2), (2, 2), (0, 1)])
def test_lightning_resumes_exactly_from_every_step(tmp_path: Path, workers: int, batch_size: int) -> None:
    folder = write_numbers(tmp_path / "data", [*map(str, range(6)), "bad", "7"])
    steps = 10 if batch_size == 2 else 14  # of single items one is bad: its batch is None, in every epoch
    whole = fitted(folder, tmp_path / "whole", steps, val_share=0.2, batch_size=batch_size)
    assert len(whole.seen) == steps
    assert whole.seen[-1][0] >= 2, "over the ends of two epochs"
    for cut in range(1, steps) if workers == 0 else (2, 5):
        part = fitted(
            folder, tmp_path / f"cut{cut}", steps, tmp_path / "whole" / f"step={cut}.ckpt",
            num_workers=workers, val_share=0.2, batch_size=batch_size,
        )  # fmt: skip
        assert part.seen == whole.seen[cut:], cut
        assert torch.equal(part.weight, whole.weight)


def test_other_data_since_the_checkpoint_is_said(tmp_path: Path) -> None:
    loader = loader_of(write_numbers(tmp_path / "a", list("0123")))
    next(iter(loader))
    state = loader.state_dict()
    for other in (loader_of(write_numbers(tmp_path / "b", list("01234"))), loader_of(tmp_path / "a", batch_size=1),
                  loader_of(tmp_path / "a", seed=1)):  # fmt: skip
        with pytest.warns(UserWarning, match="not those of the checkpoint: the epoch goes on at the same batch number"):
            other.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader_of(tmp_path / "a", num_workers=1).load_state_dict(state)


def test_no_global_generator_is_touched(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    list(loader_of(write_numbers(tmp_path, list("0123")), num_workers=1))
    assert torch.equal(state, torch.get_rng_state())


# bad items


def test_a_batch_of_nothing_but_bad_items(tmp_path: Path) -> None:
    folder = write_numbers(tmp_path / "train", ["bad", "bad", "2", "3", "4"])
    write_numbers(tmp_path / "val", ["bad", "bad", "bad", "3"])
    data = NumberModule(str(tmp_path), batch_size=1)
    data.setup()
    batches = list(data.train_dataloader())
    assert len(batches) == len(data.train_dataloader()) == 5
    assert batches.count(None) == 2, "Lightning skips the step of None while training"
    assert sorted(batch["key"][0] for batch in batches if batch) == ["002", "003", "004"]
    assert [batch["key"] for batch in data.val_dataloader()] == [["003"]], "and stumbles over it in validation"
    assert folder.is_dir()


@pytest.mark.filterwarnings("ignore")
def test_the_run_s_report_counts_bad_items(tmp_path: Path) -> None:
    write_numbers(tmp_path / "data" / "train", ["bad", "1", "2", "bad", "4"])
    write_numbers(tmp_path / "data" / "val", ["0", "bad"])
    module = fitted(tmp_path / "data", tmp_path / "run", 6)
    assert len(module.seen) == 6
    report = json.loads((tmp_path / "run" / "bad_items.json").read_text())
    assert (report["train"]["items"], report["train"]["bad"], report["train"]["by_kind"]) == (5, 2, {"damaged": 2})
    assert report["train"]["bad_items"] == [
        {"key": key, "where": f"train/{key}.n", "kind": "damaged", "reason": f"train/{key}.n: is bad"}
        for key in ("000", "003")
    ]
    assert report["val"]["bad"] == 1
    assert report["test"]["items"] == 0
    clean = tmp_path / "clean"
    fitted(write_numbers(tmp_path / "good", list("0123")), clean, 2)
    assert not (clean / "bad_items.json").exists()


@pytest.mark.filterwarnings("ignore")
def test_counts_survive_a_resume_and_a_stop(tmp_path: Path) -> None:
    folder = write_numbers(tmp_path / "data", ["bad", "1", "2", "3"])
    fitted(folder, tmp_path / "a", 4)
    fitted(folder, tmp_path / "b", 5, tmp_path / "a" / "step=4.ckpt")  # one step more, of which an item may be bad
    assert json.loads((tmp_path / "b" / "bad_items.json").read_text())["train"]["bad"] == 1
    with pytest.raises(ValueError, match=r"1 of 4 train items are bad, more than max_bad_share=0.1.*000\.n: is bad"):
        fitted(folder, tmp_path / "c", 4, max_bad_share=0.1)
    assert json.loads((tmp_path / "c" / "bad_items.json").read_text())["train"]["bad"] == 1


# workers that die or hang


def test_a_worker_that_hangs_is_named_within_the_timeout(tmp_path: Path) -> None:
    folder = write_numbers(tmp_path, ["0", "1", "2", "sleep"])
    start = time.monotonic()
    with pytest.raises(WorkerError, match=r"gave nothing for 6 s, at .*003\.n.*raise timeout_s"):
        list(loader_of(folder, num_workers=1, timeout_s=6))
    assert time.monotonic() - start < 60


def test_a_worker_that_is_killed_is_named(tmp_path: Path) -> None:
    folder = write_numbers(tmp_path, ["sleep"] * 4)
    loader = loader_of(folder, num_workers=1, timeout_s=100)
    iterator = iter(loader)

    def kill() -> None:
        while getattr(loader.batches, "_iterator", None) is None or loader.progress is None or loader.progress[0] < 0:
            time.sleep(0.05)
        os.kill(loader.batches._iterator._workers[0].pid, signal.SIGKILL)  # type: ignore[union-attr]

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(WorkerError, match=r"a worker that decodes train clips ended .*at 00\d\.n"):
        next(iterator)
    thread.join()


# several processes

RANKS = """
import json, os, sys, time, warnings
from datetime import timedelta
from pathlib import Path
import torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from mmdiff.data.loader import WorkerError
from tests.clip_files import NumberModule
warnings.simplefilter("ignore")
root, rank = Path(sys.argv[2]), int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{root}/rendezvous", rank=rank, world_size=2,
                        timeout=timedelta(seconds=200))
from unittest.mock import MagicMock
def loader_of(name, **options):
    data = NumberModule(str(root / name), **options)
    data.trainer = MagicMock(global_rank=rank, world_size=2, log_dir=str(root / "run"))
    data.setup()
    return data, data.train_dataloader()
out = {}
for name, workers in (("even", 0), ("uneven", 0), ("uneven", 1), ("bad", 0)):
    data, loader = loader_of(name, num_workers=workers)
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)
        out[f"{name} {workers} {epoch}"] = [None if b is None else b["key"] for b in loader]
    out[f"{name} report"] = data.account()["train"]
data, loader = loader_of("uneven")
loader.sampler.set_epoch(1)
iterator = iter(loader)
first = [next(iterator)["key"] for _ in range(1)]
data, again = loader_of("uneven")
again.load_state_dict(loader.state_dict())
out["cut"] = first + [b["key"] for b in again]
data, single = loader_of("bad", batch_size=1)
out["single"] = [None if b is None else b["key"] for b in single]
out["single report"] = data.account()["train"]
data, loader = loader_of("bad", max_bad_share=0.2)
try:
    list(loader)
    out["budget"] = "none"
except ValueError as error:
    out["budget"] = str(error)
(root / f"{rank}.json").write_text(json.dumps(out))
data, loader = loader_of("even", timeout_s=60)
iterator = iter(loader)
next(iterator)
if rank == 1:
    os._exit(0)
start = time.monotonic()
try:
    for _ in iterator:
        pass
    out["alone"] = "none"
except WorkerError as error:
    out["alone"] = str(error)
out["alone s"] = time.monotonic() - start
(root / "0.json").write_text(json.dumps(out))
os._exit(0)
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes that talk by gloo were given."""
    root = tmp_path_factory.mktemp("ranks")
    write_numbers(root / "even", [str(n) for n in range(8)])
    write_numbers(root / "uneven", [str(n) for n in range(7)])
    write_numbers(root / "bad", ["bad"] * 5 + ["5", "6", "7", "8"])
    (root / "ranks.py").write_text(RANKS)
    command = [sys.executable, str(root / "ranks.py"), str(ROOT), str(root)]
    running = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True) for rank in (0, 1)]
    errors = [process.communicate(timeout=250)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], errors
    return [json.loads((root / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_ranks_share_an_epoch_and_have_as_many_batches(two_ranks: list[dict[str, Any]]) -> None:
    one, two = two_ranks
    for name, count in (("even", 8), ("uneven", 7)):
        for epoch in (0, 1):
            mine, theirs = one[f"{name} 0 {epoch}"], two[f"{name} 0 {epoch}"]
            assert len(mine) == len(theirs)
            assert sorted(key for batch in mine + theirs for key in batch) == [f"{n:03d}" for n in range(count)]
    for rank in two_ranks:
        assert [rank[f"uneven 1 {epoch}"] for epoch in (0, 1)] == [rank[f"uneven 0 {epoch}"] for epoch in (0, 1)]
        assert rank["cut"] == rank["uneven 0 1"]


def test_ranks_skip_an_empty_batch_together(two_ranks: list[dict[str, Any]]) -> None:
    one, two = two_ranks
    for name in ("bad 0 0", "bad 0 1", "single"):
        assert [batch is None for batch in one[name]] == [batch is None for batch in two[name]]
    seen = [key for rank in two_ranks for batch in rank["bad 0 0"] if batch for key in batch]
    assert len(set(seen)) == len(seen)
    assert set(seen) <= {"005", "006", "007", "008"}
    missed = 4 - len(seen)
    assert sum(rank["bad report"]["skipped"] for rank in two_ranks) >= missed
    assert one["single"].count(None) > 0
    assert one["bad report"]["bad_items"] == two["bad report"]["bad_items"]
    assert [row["key"] for row in one["bad report"]["bad_items"]] == [f"{n:03d}" for n in range(5)]


def test_the_budget_ends_all_ranks_with_the_same_message(two_ranks: list[dict[str, Any]]) -> None:
    assert "of 9 train items are bad, more than max_bad_share=0.2" in two_ranks[0]["budget"]
    assert two_ranks[0]["budget"] == two_ranks[1]["budget"]


def test_a_rank_that_ends_is_noticed_by_the_other(two_ranks: list[dict[str, Any]]) -> None:
    assert "rank 0: another process gave no train batch within 60 s or ended" in two_ranks[0]["alone"]
    assert two_ranks[0]["alone s"] < 45


DDP = """
import json, os, sys, warnings
from pathlib import Path
sys.path.insert(0, sys.argv[1])
warnings.simplefilter("ignore")
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from mmdiff.checkpoint import AtomicCheckpointIO
from tests.clip_files import NumberModule
from tests.test_data_loader import Recorder
root, rank = Path(sys.argv[2]), int(os.environ["RANK"])
for name, steps, ckpt in (("whole", 6, None), ("part", 6, root / "whole" / "step=3.ckpt")):
    module = Recorder()
    saves = ModelCheckpoint(root / name, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = Trainer(max_steps=steps, accelerator="cpu", devices=2, logger=False, callbacks=[saves],
                      strategy=DDPStrategy(process_group_backend="gloo"), default_root_dir=root / name,
                      enable_progress_bar=False, enable_model_summary=False, plugins=[AtomicCheckpointIO()])
    trainer.fit(module, NumberModule(str(root / "data"), batch_size=1), ckpt_path=ckpt, weights_only=True)
    out = {"seen": module.seen, "weight": module.weight.tolist()}
    (root / f"{name}-{rank}.json").write_text(json.dumps(out))
"""


@pytest.mark.slow
def test_lightning_on_two_processes_resumes_exactly_and_is_never_stuck(tmp_path: Path) -> None:
    """Batches of one item of which some are bad, the worst case: python -m pytest tests/test_data_loader.py -m slow"""
    write_numbers(tmp_path / "data", ["0", "bad", "2", "3", "bad", "5", "6", "7", "8", "9"])
    (tmp_path / "ddp.py").write_text(DDP)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(tmp_path / "ddp.py"), str(ROOT), str(tmp_path)], capture_output=True, text=True, timeout=280,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = {(n, r): json.loads((tmp_path / f"{n}-{r}.json").read_text()) for n in ("whole", "part") for r in (0, 1)}
    for rank in (0, 1):
        assert len(found["whole", rank]["seen"]) == 6
        assert found["part", rank]["seen"] == found["whole", rank]["seen"][3:]
        assert found["part", rank]["weight"] == found["whole", 0]["weight"]
    seen = [facts[0] for rank in (0, 1) for _, _, facts in found["whole", rank]["seen"]]
    assert not {"001", "004"} & set(seen)
