"""Latents that are computed once: never stale, the same as those computed now, with the times of their clips."""

import json
import os
import random
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from audio.data import ClipDataModule as SoundModule
from audio.files import write_audio
from mmdiff.autoencoder import Autoencoder, ConvKL, Pool
from mmdiff.backbones import UNet
from mmdiff.conditioning import Number
from mmdiff.data.batches import Buckets
from mmdiff.data.cache import LatentCache
from mmdiff.data.cache_entries import SETTINGS, DamagedEntryError, Entries
from mmdiff.data.cache_latents import contents_of, identity
from mmdiff.density import LogNormal
from mmdiff.io import fingerprint, load, save
from mmdiff.model import DiffusionModel
from mmdiff.module import DiffusionModule
from mmdiff.precond import EDM
from video.data import ClipDataModule as VideoModule
from video.files import write_video

from .small_autoencoder import trainer

LONG, FPS, RATE = 24, 8, 1000  # frames of the longer films; frames a second; Hz of the sounds
POOL = [1, 4, 4]


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five films of 24 frames whose grey level counts the frames, from a level of each film's own."""
    root = tmp_path_factory.mktemp("films")
    for index in range(5):
        level = (torch.arange(LONG) * 0.06 + index * 0.02).view(1, LONG, 1, 1) - 0.9
        write_video(root / f"film_{index}.mp4", level.expand(3, LONG, 16, 16), fps=FPS)
        (root / f"film_{index}.txt").write_text(f"film {index}\nanother {index}")
    return root


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four sounds of 2 s whose level counts the milliseconds."""
    root = tmp_path_factory.mktemp("sounds")
    for index in range(4):
        write_audio(root / f"sound_{index}.wav", torch.linspace(-0.9, 0.9 - index * 0.1, 2 * RATE)[None], RATE)
        (root / f"sound_{index}.txt").write_text(f"sound {index}")
    return root


def exported(folder: Path, seed: int = 0, width: int = 4) -> Path:
    """A learned autoencoder of videos, as training would leave it."""
    tree = {
        "class_path": "mmdiff.autoencoder.ConvKL",
        "init_args": {"channels": 3, "latent_channels": 2, "steps": [[1, 2, 2]], "width": width},
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ConvKL(3, 2, [[1, 2, 2]], width=width)
        for p in model.parameters():  # nothing is zero
            p.data.add_(0.05 * torch.randn(p.shape))
    return save(model, tree, folder)


def pooled(folder: Path, factors: list[int]) -> Path:
    """An autoencoder whose latents are means, so that they tell what the clip showed."""
    return save(Pool(factors), {"class_path": "mmdiff.autoencoder.Pool", "init_args": {"factors": factors}}, folder)


def video(films: Path, **settings: Any) -> VideoModule:
    return VideoModule(str(films), **{"frames": 4, "size": (16, 16), "batch_size": 2, "val_share": 0.3, **settings})


def sound(sounds: Path, **settings: Any) -> SoundModule:
    given = {"sample_rate": RATE, "samples": 500, "batch_size": 2, "val_share": 0.3, **settings}
    return SoundModule(str(sounds), **given)


def cache(data: Any, autoencoder: Path, folder: Path, **settings: Any) -> LatentCache:
    return LatentCache(data, str(autoencoder), str(folder), **{"device": "cpu", **settings})


def opened(module: LatentCache) -> LatentCache:
    module.prepare_data()
    module.setup()
    return module


def batches(module: Any, epoch: int = 0, split: str = "train") -> list[dict[str, Any]]:
    loader = getattr(module, f"{split}_dataloader")()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def entries(folder: Path) -> set[Path]:
    return set(folder.glob("??/*.safetensors"))


def same(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> bool:
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(torch.equal(v, y[k]) if isinstance(v, Tensor) else v == y[k] for k, v in x.items())
        for x, y in zip(a, b, strict=True)
    )


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


# Nothing stale


def test_another_autoencoder_dtype_or_decoder_is_refused_and_nothing_of_it_is_found(
    films: Path, tmp_path: Path
) -> None:
    for seed in (0, 1):
        exported(tmp_path / f"model{seed}", seed)
    exported(tmp_path / "wider", width=8)
    opened(cache(video(films), tmp_path / "model0", tmp_path / "cache"))
    before = entries(tmp_path / "cache")
    changes: list[tuple[str, Any, str, dict[str, Any]]] = [
        ("autoencoder [0-9a-f]{12}, now", video(films), "model1", {}),
        ("its config", video(films), "wider", {}),
        ("dtype float32, now float16", video(films), "model0", {"dtype": "float16"}),
        (r"decoder VideoDecode\(.*fps=None.*, now .*fps=4", video(films, fps=4.0), "model0", {}),
        (r"decoder .*size=\(16, 16\).*, now .*size=\(8, 8\)", video(films, size=(8, 8), resize="cover"), "model0", {}),
    ]
    for message, data, model, settings in changes:
        with pytest.raises(ValueError, match=f"is stale: it was made with .*{message}.*name another folder") as caught:
            cache(data, tmp_path / model, tmp_path / "cache", **settings).prepare_data()
        assert "\n" not in str(caught.value)
        with pytest.raises(ValueError, match="is stale"):
            cache(data, tmp_path / model, tmp_path / "cache", **settings).setup()
    assert entries(tmp_path / "cache") == before
    (tmp_path / "cache" / SETTINGS).unlink()  # without the note the names still tell
    for _, data, model, settings in changes:
        module = cache(data, tmp_path / model, tmp_path / "cache", missing="later", **settings)
        module.setup()
        (tmp_path / "cache" / SETTINGS).unlink()
        latents = module.latents
        assert latents is not None
        for item in module.data.datasets["train"].items:
            assert latents.read(latents.content(item), 0) is None


def test_settings_of_the_autoencoder_that_are_no_weights_count(films: Path, tmp_path: Path) -> None:
    for name, factors in (("a", [1, 4, 4]), ("b", [4, 4, 1])):
        pooled(tmp_path / name, factors)
    opened(cache(video(films), tmp_path / "a", tmp_path / "cache"))
    with pytest.raises(ValueError, match="is stale: it was made with its config"):
        cache(video(films), tmp_path / "b", tmp_path / "cache").prepare_data()


def test_a_file_that_is_changed_in_place_is_encoded_again_even_with_its_old_size_and_time(
    sounds: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(sounds, folder)
    pooled(tmp_path / "model", [50])
    first = opened(cache(sound(folder, val_share=0), tmp_path / "model", tmp_path / "cache"))
    old = {
        key: latents for batch in batches(first) for key, latents in zip(batch["key"], batch["latents"], strict=True)
    }
    path = folder / "sound_1.wav"
    stat = path.stat()
    changed = bytearray(path.read_bytes())
    changed[-1500:] = bytes(1500)  # silence, in as many bytes
    changed[100:1500] = bytes(1400)
    path.write_bytes(changed)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    for module in (first, opened(cache(sound(folder, val_share=0), tmp_path / "model", tmp_path / "cache"))):
        new = {k: z for batch in batches(module) for k, z in zip(batch["key"], batch["latents"], strict=True)}
        for key, latents in new.items():
            assert torch.equal(latents, old[key]) == (key != "sound_1"), key


def test_files_are_told_apart_by_what_they_hold_and_may_move(films: Path, tmp_path: Path) -> None:
    """Renamed, copied and moved files keep their latents; two that were exchanged do not keep one another's."""
    exported(tmp_path / "model")
    opened(cache(video(films, val_share=0), tmp_path / "model", tmp_path / "cache"))
    before = entries(tmp_path / "cache")
    moved = tmp_path / "moved"
    shutil.copytree(films, moved)
    for a, b in (("film_0", "film_9"), ("film_1", "film_0"), ("film_9", "film_1")):  # exchanges 0 and 1
        (moved / f"{a}.mp4").rename(moved / f"{b}.mp4")
    module = opened(cache(video(moved, val_share=0), tmp_path / "model", tmp_path / "cache", missing="refuse"))
    latents = {k: z for batch in batches(module) for k, z in zip(batch["key"], batch["latents"], strict=True)}
    assert entries(tmp_path / "cache") == before
    plain = opened(cache(video(films, val_share=0), tmp_path / "model", tmp_path / "cache", missing="refuse"))
    own = {k: z for batch in batches(plain) for k, z in zip(batch["key"], batch["latents"], strict=True)}
    assert torch.equal(latents["film_0"], own["film_1"])
    assert torch.equal(latents["film_1"], own["film_0"])
    assert not torch.equal(own["film_0"], own["film_1"])


@pytest.mark.parametrize("fault", ["torn", "empty", "byte", "text", "facts"])
def test_a_damaged_entry_is_made_again_or_refused(films: Path, tmp_path: Path, fault: str) -> None:
    exported(tmp_path / "model")
    settings: Any = {"autoencoder": tmp_path / "model", "folder": tmp_path / "cache"}
    good = batches(opened(cache(video(films, val_share=0), **settings)))
    latents = cache(video(films, val_share=0), **settings)
    opened(latents)
    assert latents.latents is not None
    entry = latents.latents.path(latents.latents.content(latents.data.datasets["train"].items[2]), 0)
    whole = entry.read_bytes()
    damaged = {
        "torn": whole[:-7],
        "empty": b"",
        "byte": whole[:-3] + bytes([whole[-3] ^ 64]) + whole[-2:],
        "text": b"not a tensor" * 40,
        "facts": whole.replace(b"start_s", b"start_x"),
    }[fault]
    assert damaged != whole
    entry.write_bytes(damaged)
    refusing = opened(cache(video(films, val_share=0), **settings, missing="refuse"))
    with pytest.raises(DamagedEntryError, match=f"{entry.name} is damaged .* delete it, and it is made again"):
        batches(refusing)
    with pytest.warns(UserWarning, match=f"{entry.name} is damaged"):
        healed = batches(opened(cache(video(films, val_share=0), **settings)))
    for ours, theirs in zip(healed, good, strict=True):
        torch.testing.assert_close(ours["latents"], theirs["latents"], rtol=1e-4, atol=1e-5)
    assert Entries.read(latents.latents.entries, entry) is not None
    entry.write_bytes(damaged)
    found = cache(video(films, val_share=0), **settings).encode()
    assert (found.there, found.made) == (4 + 0, 1)


def test_what_no_name_can_hold_is_noticed_by_making_an_entry_again(
    films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decoder that has changed its ways under the same settings, as another version of a library may."""
    exported(tmp_path / "model")
    opened(cache(video(films), tmp_path / "model", tmp_path / "cache"))
    opened(cache(video(films), tmp_path / "model", tmp_path / "cache"))
    from video.data import VideoDecode

    real = VideoDecode.__call__

    def one_frame_on(self: VideoDecode, item: Any, rng: random.Random | None) -> Any:
        sample = real(self, item, rng)
        assert isinstance(sample.data, Tensor)
        return type(sample)(**{**vars(sample), "data": sample.data.roll(1, dims=1)})

    monkeypatch.setattr(VideoDecode, "__call__", one_frame_on)
    for missing in ("ahead", "later", "refuse"):
        with pytest.raises(ValueError, match=r"is stale: the latents of film_\d.mp4 come out otherwise now"):
            cache(video(films), tmp_path / "model", tmp_path / "cache", missing=missing).prepare_data()


def test_a_model_with_other_weights_than_the_latents_refuses_them(films: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        exported(tmp_path / f"model{seed}", seed)
    module = opened(cache(video(films), tmp_path / "model0", tmp_path / "cache"))
    good, other = (diffusion(tmp_path / f"model{seed}") for seed in (0, 1))
    batch = batches(module)[0]
    assert torch.isfinite(good.loss(batch, (0, 0, 0)))
    with pytest.raises(ValueError, match=r"latents of the autoencoder \w{12}, the model's is \w{12}: give"):
        other.loss(batch, (0, 0, 0))


def test_an_autoencoder_that_is_trained_on_between_opening_and_encoding_is_refused(films: Path, tmp_path: Path) -> None:
    exported(tmp_path / "model")
    module = opened(cache(video(films), tmp_path / "model", tmp_path / "cache", missing="later"))
    exported(tmp_path / "model", seed=1)
    with pytest.raises(ValueError, match="model has changed while its latents were in use"):
        batches(module)
    assert not entries(tmp_path / "cache")


def test_a_note_of_contents_that_is_lost_or_damaged_costs_time_alone(films: Path, tmp_path: Path) -> None:
    exported(tmp_path / "model")
    module = opened(cache(video(films), tmp_path / "model", tmp_path / "cache"))
    note, items = tmp_path / "cache" / "contents.json", module.data.datasets["train"].items
    found = contents_of(items, tmp_path / "cache")
    assert set(found) == {identity(item) for item in items}
    for text in ("", "[1, 2", "7"):
        note.write_text(text)
        assert contents_of(items, tmp_path / "cache") == found
        assert json.loads(note.read_text()) == found
    note.write_text(json.dumps(dict.fromkeys(found, "0" * 64)))  # wrong, so that nothing is found, and nothing wrong
    module = opened(cache(video(films), tmp_path / "model", tmp_path / "cache", missing="later"))
    assert module.latents is not None
    assert module.latents.read(module.latents.content(items[0]), 0) is None


# Refusals before long work


def test_what_is_missing_is_refused_before_training_where_the_config_says_so(films: Path, tmp_path: Path) -> None:
    exported(tmp_path / "model")
    refusing = cache(video(films, val_share=0), tmp_path / "model", tmp_path / "cache", missing="refuse")
    with pytest.raises(ValueError, match=r"no latents in .*cache of film_0.mp4, film_1.mp4, .* and 2 more: .*encode"):
        refusing.prepare_data()
    cache(video(films, val_share=0), tmp_path / "model", tmp_path / "cache").prepare_data()
    refusing.prepare_data()
    refusing.setup()
    next(iter(entries(tmp_path / "cache"))).unlink()
    with pytest.raises(ValueError, match="no latents in .* of film_"):
        batches(refusing)


def test_a_file_that_cannot_be_decoded_is_a_bad_item_in_every_mode(films: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(films, folder)
    (folder / "film_3.mp4").write_bytes((folder / "film_3.mp4").read_bytes()[:400])
    exported(tmp_path / "model")
    for missing in ("ahead", "later", "refuse"):
        data = video(folder, val_share=0, max_bad_share=0.5)
        module = cache(data, tmp_path / "model", tmp_path / "cache", missing=missing)
        with pytest.warns(UserWarning, match="bad item left out: film_3.mp4"):
            found = batches(opened(module))
        assert sorted(key for batch in found for key in batch["key"]) == ["film_0", "film_1", "film_2", "film_4"]
        assert len(data.bad["train"].found) == 1
        assert data.account()["train"]["bad"] == 1
    data = video(folder, val_share=0)
    with pytest.raises(ValueError, match="1 of 5 train items are bad"), pytest.warns(UserWarning, match="bad item"):
        batches(opened(cache(data, tmp_path / "model", tmp_path / "cache")))


@pytest.mark.parametrize(("settings", "message"), [
    ({"dtype": "int8"}, "dtype='int8' is unknown; choose float32 or float16"),
    ({"crops": 0}, "crops=0 must be at least 1"),
    ({"renew": -1}, "renew=-1 not negative"),
    ({"missing": "perhaps"}, "missing='perhaps' is unknown; choose ahead, later, refuse"),
    ({"renew": 2, "missing": "refuse"}, "renew=2 makes new latents, which missing=refuse forbids"),
])  # fmt: skip
def test_wrong_arguments_are_refused(films: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cache(video(films), tmp_path / "model", tmp_path / "cache", **settings)


def test_a_folder_that_is_no_autoencoder_or_data_without_files_is_refused(films: Path, tmp_path: Path) -> None:
    save(nn.Linear(2, 2), {"class_path": "torch.nn.Linear", "init_args": {"in_features": 2, "out_features": 2}},
         tmp_path / "linear")  # fmt: skip
    with pytest.raises(ValueError, match="linear holds a Linear, not an autoencoder"):
        cache(video(films), tmp_path / "linear", tmp_path / "cache").prepare_data()
    with pytest.raises(ValueError, match="no such model folder"):
        cache(video(films), tmp_path / "nothing", tmp_path / "cache").prepare_data()
    with pytest.raises(ValueError, match="data=LightningDataModule is no ClipDataModule"):
        cache(pl.LightningDataModule(), tmp_path / "linear", tmp_path / "cache")


def test_half_precision_is_rounded_when_it_is_made_too(films: Path, tmp_path: Path) -> None:
    exported(tmp_path / "model")
    module = cache(video(films), tmp_path / "model", tmp_path / "cache", dtype="float16", missing="later")
    made, read = batches(opened(module)), batches(module)
    assert same(made, read)
    assert made[0]["latents"].dtype == torch.float32
    assert torch.equal(made[0]["latents"], made[0]["latents"].half().float())
    entry = next(iter(entries(tmp_path / "cache")))
    assert load_file(entry)["latents"].dtype == torch.float16


# Training


def diffusion(autoencoder: Path) -> DiffusionModule:
    torch.manual_seed(3)
    backbone = UNet(
        axes=3, in_channels=2, channels=4, multipliers=[1], factors=[], kernels=[[1, 3, 3]], attend=[[]],
        vector_width=4,
    )  # fmt: skip
    model = DiffusionModel(backbone, EDM(1.0), Number("total_s", 4, 0.0, 10.0), ConvKL(3, 2, [[1, 2, 2]], width=4))
    return DiffusionModule(model, LogNormal(), autoencoder_weights=str(autoencoder))


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


def test_an_entry_is_not_only_read_by_the_library_that_wrote_it_but_checked(tmp_path: Path) -> None:
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
