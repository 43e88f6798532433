"""Latents that would be stale, damaged, missing or wrong: not found, made again, or refused."""

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mmdiff.data.cache_entries import SETTINGS, DamagedEntryError, Entries
from mmdiff.data.cache_latents import contents_of, identity
from mmdiff.io import save

from .cached_clips import (
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


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_films(tmp_path_factory.mktemp("films"))


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sounds(tmp_path_factory.mktemp("sounds"))


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
    """A decoder that has changed its ways under the same settings, as another version of PyAV may."""
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
    assert torch.isfinite(good.losses(batch, (0, 0, 0))["loss"])
    with pytest.raises(ValueError, match=r"latents of the autoencoder \w{12}, the model's is \w{12}: give"):
        other.losses(batch, (0, 0, 0))


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
