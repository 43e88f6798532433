"""Latents that are computed once: never stale, the same as those computed now, with the times of their clips."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mmdiff.autoencoder import Autoencoder
from mmdiff.conditioning import Number
from mmdiff.data.batches import Buckets
from mmdiff.data.cache_entries import SETTINGS, DamagedEntryError, Entries
from mmdiff.io import fingerprint, load

from .cached_clips import (
    FPS,
    LONG,
    POOL,
    RATE,
    batches,
    cache,
    diffusion,
    entries,
    exported,
    make_films,
    make_sounds,
    opened,
    pooled,
    same,
    sound,
    video,
)
from .small_autoencoder import trainer


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_films(tmp_path_factory.mktemp("films"))


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sounds(tmp_path_factory.mktemp("sounds"))


# What a batch is


def test_a_batch_holds_the_latents_of_the_clips_and_all_else_that_the_data_gives(films: Path, tmp_path: Path) -> None:
    model = load(exported(tmp_path / "model"))
    assert isinstance(model, Autoencoder)
    module = opened(cache(video(films), tmp_path / "model", tmp_path / "cache"))
    plain = video(films)
    plain.setup()
    for ours, theirs in zip(batches(module, split="val"), batches(plain, split="val"), strict=True):
        assert set(ours) == set(theirs) - {"x"} | {"latents", "autoencoder"}
        with torch.no_grad():
            torch.testing.assert_close(ours["latents"], model.encode(theirs["x"]), rtol=1e-4, atol=1e-5)
        assert ours["autoencoder"] == [fingerprint(model)] * len(ours["key"])
        for name in set(theirs) - {"x"}:
            if isinstance(theirs[name], Tensor):
                assert torch.equal(ours[name], theirs[name]), name
            else:
                assert ours[name] == theirs[name], name


@pytest.mark.parametrize("missing", ["ahead", "later"])
@pytest.mark.parametrize("kind", ["video", "audio"])
def test_a_crop_moves_the_timing_conditions_with_it(
    films: Path, sounds: Path, tmp_path: Path, kind: str, missing: Any
) -> None:
    """The latents are means, which say where in the file a clip begins; start_s must say the same."""
    data = video(films, val_share=0) if kind == "video" else sound(sounds, val_share=0)
    pooled(tmp_path / "model", POOL if kind == "video" else [50])
    module = opened(cache(data, tmp_path / "model", tmp_path / "cache", crops=4, missing=missing))
    starts = []
    for epoch in range(3):
        for batch in batches(module, epoch):
            total_s = LONG / FPS if kind == "video" else 2.0
            torch.testing.assert_close(batch["total_s"], torch.full_like(batch["total_s"], total_s))
            torch.testing.assert_close(batch["duration_s"], torch.full_like(batch["duration_s"], 0.5))
            for latents, start_s, key in zip(batch["latents"], batch["start_s"].tolist(), batch["key"], strict=True):
                index = int(key[-1])
                if kind == "video":
                    shown_s = (float(latents[:, 0].mean()) + 0.9 - index * 0.02) / 0.06 / FPS
                    assert abs(shown_s - start_s) < 0.5 / FPS  # 8-bit colours
                else:  # the mean over the first 50 ms is the level at their middle
                    heard_s = (float(latents[0, 0]) + 0.9) / (1.8 - index * 0.1) * (2 - 1 / RATE) - 24.5 / RATE
                    assert abs(heard_s - start_s) < 1e-3
                starts.append((key, start_s))
    assert len({start for _, start in starts}) > 4, "the crops begin at the same place"


def test_a_number_condition_hears_where_the_crop_begins(films: Path, tmp_path: Path) -> None:
    pooled(tmp_path / "model", POOL)
    module = opened(cache(video(films, val_share=0), tmp_path / "model", tmp_path / "cache", crops=8))
    condition = Number("start_s", 8, 0.0, 3.0, dropout=0.0)
    first, *_ = batches(module)
    assert first["start_s"][0] != first["start_s"][1]
    vectors = condition(first).vector
    assert vectors is not None
    assert not torch.allclose(vectors[0], vectors[1])


@pytest.mark.parametrize("missing", ["ahead", "later"])
def test_batches_are_the_same_with_0_and_2_workers_and_from_the_second_run(
    films: Path, tmp_path: Path, missing: Any
) -> None:
    exported(tmp_path / "model")
    found = []
    for name, workers in (("one", 0), ("two", 2), ("two", 0)):
        module = cache(
            video(films, num_workers=workers, caption="random"),
            tmp_path / "model", tmp_path / name, crops=2, missing=missing,
        )  # fmt: skip
        found.append([batch for epoch in range(2) for batch in batches(opened(module), epoch)])
    assert same(found[1], found[2]), "what was read is not what was given when it was made"
    if missing == "later":
        assert same(found[0], found[1])
    for ours, theirs in zip(found[0], found[1], strict=True):
        torch.testing.assert_close(ours["latents"], theirs["latents"], rtol=1e-4, atol=1e-5)
        assert {k: str(v) for k, v in ours.items() if k != "latents"} == {
            k: str(v) for k, v in theirs.items() if k != "latents"
        }


def test_encoding_ahead_leaves_nothing_to_do_and_later_makes_only_what_is_asked_for(
    films: Path, tmp_path: Path
) -> None:
    exported(tmp_path / "model")
    ahead = cache(video(films), tmp_path / "model", tmp_path / "ahead", crops=3)
    ahead.prepare_data()
    train, val = (len(ahead.data.datasets[split]) for split in ("train", "val"))
    assert (train, val) == (4, 1)
    assert len(entries(tmp_path / "ahead")) == 3 * train + val
    before = {path: path.stat().st_mtime_ns for path in entries(tmp_path / "ahead")}
    ahead.setup()
    for epoch in range(4):
        batches(ahead, epoch)
    assert {path: path.stat().st_mtime_ns for path in entries(tmp_path / "ahead")} == before
    later = cache(video(films), tmp_path / "model", tmp_path / "later", crops=3, missing="later")
    opened(later)
    assert not entries(tmp_path / "later")
    batches(later)
    assert len(entries(tmp_path / "later")) == train


def test_rolling_crops_are_renewed_at_each_files_own_epoch_and_old_ones_are_deleted(
    films: Path, tmp_path: Path
) -> None:
    pooled(tmp_path / "model", POOL)
    renew, crops = 3, 2
    module = opened(cache(video(films, val_share=0), tmp_path / "model", tmp_path / "cache", crops=crops, renew=renew))
    assert not entries(tmp_path / "cache"), "rolling clips are made when they are needed"
    seen: dict[str, list[set[float]]] = {}
    for epoch in range(4 * renew):
        for batch in batches(module, epoch):
            for key, start_s in zip(batch["key"], batch["start_s"].tolist(), strict=True):
                seen.setdefault(key, []).append({start_s})
        assert len(entries(tmp_path / "cache")) <= crops * len(seen)
    first_changes = set()
    for key, epochs in seen.items():
        assert len(set.union(*epochs)) > crops, f"{key} was never renewed"
        latents = module.latents
        assert latents is not None
        item = next(item for item in module.data.datasets["train"].items if item.key == key)
        ages = [latents.age(latents.content(item), epoch) for epoch in range(4 * renew)]
        assert ages[0] == 0
        assert ages[-1] in (3, 4)
        changes = [epoch for epoch in range(1, 4 * renew) if ages[epoch] != ages[epoch - 1]]
        assert {b - a for a, b in pairwise(changes)} == {renew}
        first_changes.add(changes[0])
    assert len(first_changes) > 1, "all files are renewed in the same epoch"
    again = opened(cache(video(films, val_share=0), tmp_path / "model", tmp_path / "other", crops=crops, renew=renew))
    assert same(batches(module, 11), batches(again, 11)), "what came before has left a trace"


def test_a_mask_is_kept_in_the_latents_space(sounds: Path, tmp_path: Path) -> None:
    pooled(tmp_path / "model", [50])
    data = sound(sounds, samples=3000, short="mask", val_share=0)
    (batch, *_) = batches(opened(cache(data, tmp_path / "model", tmp_path / "cache")))
    assert batch["latents"].shape == (2, 1, 60)
    assert batch["mask"].shape == (2, 1, 60)
    assert batch["mask"].dtype == torch.bool
    assert batch["mask"].sum(dim=2).flatten().tolist() == [40, 40]  # 2 s of 3 s, in cells of 50 ms


def test_buckets_are_cached_at_their_own_shapes(films: Path, tmp_path: Path) -> None:
    data = video(films, buckets=Buckets(steps=[4, 8], sizes=[(16, 16), (8, 8)]), val_share=0, resize="cover")
    exported(tmp_path / "model")
    module = opened(cache(data, tmp_path / "model", tmp_path / "cache"))
    plain = video(films, buckets=Buckets(steps=[4, 8], sizes=[(16, 16), (8, 8)]), val_share=0, resize="cover")
    plain.setup()
    shapes = [tuple(batch["x"].shape) for batch in batches(plain)]
    assert [tuple(batch["latents"].shape) for batch in batches(module)] == [
        (n, 2, t, h // 2, w // 2) for n, _, t, h, w in shapes
    ]


# Training


class Trace(pl.Callback):
    """The loss of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))


def losses(data: pl.LightningDataModule, autoencoder: Path) -> list[float]:
    trace = Trace()
    trainer(max_epochs=3, callbacks=[trace], limit_val_batches=1).fit(diffusion(autoencoder), datamodule=data)
    return trace.losses


@pytest.mark.parametrize("missing", ["ahead", "later"])
def test_training_on_cached_latents_has_the_loss_trace_of_training_on_the_fly(
    films: Path, tmp_path: Path, missing: Any
) -> None:
    """Clips as long as their files, so that every crop is the same."""
    exported(tmp_path / "model")
    plain = losses(video(films, frames=LONG), tmp_path / "model")
    cached = losses(
        cache(video(films, frames=LONG), tmp_path / "model", tmp_path / "cache", missing=missing), tmp_path / "model"
    )
    assert len(plain) == 6
    assert len(set(plain)) == 6
    torch.testing.assert_close(torch.tensor(cached), torch.tensor(plain), rtol=2e-5, atol=0)


def test_a_run_of_several_processes_shares_the_clips_out(films: Path, tmp_path: Path) -> None:
    exported(tmp_path / "model")
    keys = []
    for rank in range(2):
        module = cache(video(films, val_share=0, batch_size=1), tmp_path / "model", tmp_path / "cache")
        module.trainer = type("T", (), {"global_rank": rank, "world_size": 2, "log_dir": None})()  # type: ignore[assignment]
        keys.append([key for batch in batches(opened(module)) for key in batch["key"]])
    assert len(keys[0]) == len(keys[1]) == 2
    assert not set(keys[0]) & set(keys[1])


def test_an_entry_is_not_only_read_by_safetensors_but_checked(tmp_path: Path) -> None:
    """safetensors alone takes an entry whose bytes were changed, and one that another program wrote."""
    store = Entries(tmp_path, {"a": "b"})
    store.open()
    path = store.path("x", 1)
    store.write(path, {"z": torch.arange(6.0)}, {"t": 1.5})
    found = store.read(path)
    assert found is not None
    assert torch.equal(found[0]["z"], torch.arange(6.0))
    assert found[1] == {"t": 1.5}
    assert store.read(store.path("x", 2)) is None
    assert (
        len({store.path("x", 1), store.path("x", "1"), store.path("x1"), Entries(tmp_path, {"a": "c"}).path("x", 1)})
        == 4
    )
    save_file({"z": torch.arange(6.0)}, path)
    with pytest.raises(DamagedEntryError, match="is damaged"):
        store.read(path)
    for text in ("{", "[]", "3"):
        (tmp_path / SETTINGS).write_text(text)
        with pytest.raises(ValueError, match="cache.json is damaged|is stale"):
            store.open()
