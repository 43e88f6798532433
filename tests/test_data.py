"""Captioned clips: sources, splits, captions, the error budget, and batches that are a function of the seed."""

import csv
import io
import json
import pickle
import random
import shutil
import tarfile
import warnings
from pathlib import Path

import pytest
import torch

import audio
import video
from audio.data import AudioDecode, mix_to
from audio.files import write_audio
from mmdiff.data.clips import ClipDataset, EpochSampler, Sample, collate
from mmdiff.data.media import MediaError
from mmdiff.data.sources import Item, load_source
from video.data import VideoDecode, resize_cover
from video.files import write_video

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not there")

KEYS = [f"clip_{index:02d}" for index in range(10)]


def captions(index: int) -> list[str]:
    return [f"caption {index}", f"another {index}", f"third {index}"]


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten videos of 12 to 21 frames whose grey level counts the frames, and ten sounds that count their samples."""
    root = tmp_path_factory.mktemp("media")
    for index, key in enumerate(KEYS):
        count = 12 + index
        level = torch.arange(count).view(1, count, 1, 1) / 16 - 0.9
        write_video(root / f"{key}.mp4", level.expand(3, count, 32, 40), fps=8)
        write_audio(root / f"{key}.wav", (torch.arange(1000 + index * 100) / 32768)[None], 8000)
    return root


def folder_of(root: Path, media: Path, suffix: str, how: str, keys: list[str] = KEYS) -> Path:
    """A plain folder whose captions are written in the convention `how`."""
    root.mkdir(parents=True)
    rows = []
    for key in keys:
        index = KEYS.index(key)
        shutil.copy(media / f"{key}{suffix}", root)
        record = {"caption": captions(index)[0], "captions": captions(index), "number": index}
        if how == "json":
            (root / f"{key}.json").write_text(json.dumps(record))
        elif how == "txt":
            (root / f"{key}.txt").write_text("\n".join(captions(index)) + "\n")
        rows.append({"file_name": f"{key}{suffix}", **record})
    if how == "metadata.jsonl":
        (root / how).write_text("\n".join(json.dumps(row) for row in rows))
    if how in ("metadata.csv", "metadata.csv text"):
        with open(root / "metadata.csv", "w", newline="") as file:
            column = "text" if how.endswith("text") else "caption"
            writer = csv.DictWriter(file, ["file_name", column])
            writer.writeheader()
            writer.writerows({"file_name": row["file_name"], column: row["caption"]} for row in rows)
    return root


def shard_of(
    path: Path, media: Path, suffix: str, keys: list[str] = KEYS, more: dict[str, bytes] | None = None
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for key in keys:
            index = KEYS.index(key)
            record = {"caption": captions(index)[0], "captions": captions(index), "number": index}
            for name, data in (
                (key + suffix, (media / (key + suffix)).read_bytes()),
                (f"{key}.json", json.dumps(record).encode()),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        for name, data in (more or {}).items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def videos(path: Path, **options: object) -> video.ClipDataModule:
    return video.ClipDataModule(str(path), **{"frames": 8, "size": (16, 20), "batch_size": 4, **options})


def assert_equal_batches(first: list[dict], second: list[dict]) -> None:
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            same = torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name]
            assert same, name


# sources


@pytest.mark.parametrize("how", ["json", "txt", "metadata.jsonl", "metadata.csv", "metadata.csv text"])
def test_captions_of_every_convention(tmp_path, media, how):
    source = load_source(folder_of(tmp_path / "data", media, ".mp4", how), (".mp4",), val_share=0)
    items = source.splits["train"]
    assert [item.key for item in items] == KEYS
    expected = [captions(i)[:1] if "csv" in how else captions(i) for i in range(10)]
    assert [item.captions for item in items] == expected
    assert (items[3].meta.get("number") == 3) == (how in ("json", "metadata.jsonl"))
    assert not any(source.problems.values())


def test_json_goes_before_txt_and_txt_fills_in(tmp_path, media):
    root = folder_of(tmp_path / "data", media, ".mp4", "json", KEYS[:2])
    (root / f"{KEYS[0]}.txt").write_text("from txt")
    (root / f"{KEYS[1]}.txt").write_text("from txt")
    (root / f"{KEYS[1]}.json").write_text('{"number": 1}')
    items = load_source(root, (".mp4",), val_share=0).splits["train"]
    assert [item.captions[0] for item in items] == ["caption 0", "from txt"]


def test_splits_by_shard_folder_or_hash(tmp_path, media):
    for split, keys in (("train", KEYS[:6]), ("val", KEYS[6:8]), ("test", KEYS[8:])):
        shard_of(tmp_path / "tar" / f"{split}-000000.tar", media, ".mp4", keys)
        folder_of(tmp_path / "plain" / split, media, ".mp4", "json", keys)
    (tmp_path / "plain" / "val").rename(tmp_path / "plain" / "validation")
    for root in ("tar", "plain"):
        splits = load_source(tmp_path / root, (".mp4",)).splits
        assert {name: [item.key for item in items] for name, items in splits.items()} == {
            "train": KEYS[:6], "val": KEYS[6:8], "test": KEYS[8:]}  # fmt: skip
    folder_of(tmp_path / "flat", media, ".mp4", "json")
    shard_of(tmp_path / "one.tar", media, ".mp4")
    halves = [load_source(tmp_path / name, (".mp4",), val_share=0.4).splits for name in ("flat", "one.tar")]
    keys = [{name: [item.key for item in items] for name, items in splits.items()} for splits in halves]
    assert keys[0] == keys[1]
    assert sorted(keys[0]["train"] + keys[0]["val"]) == KEYS
    assert 1 <= len(keys[0]["val"]) <= 7
    assert len(load_source(tmp_path / "flat", (".mp4",), val_share=1e-9).splits["val"]) == 1, "never empty"
    for key in KEYS[:3]:  # membership does not depend on the other items
        (tmp_path / "flat" / f"{key}.mp4").unlink()
        (tmp_path / "flat" / f"{key}.json").unlink()
    fewer = load_source(tmp_path / "flat", (".mp4",), val_share=0.4).splits["val"]
    assert [item.key for item in fewer] == [key for key in keys[0]["val"] if key not in KEYS[:3]]


def test_metadata_file_above_the_split_folders(tmp_path, media):
    for split, keys in (("train", KEYS[:6]), ("val", KEYS[6:])):
        folder_of(tmp_path / "data" / split, media, ".mp4", "nothing", keys)
    rows = [{"file_name": f"{'train' if i < 6 else 'val'}/{key}.mp4", "text": f"t{i}"} for i, key in enumerate(KEYS)]
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    splits = load_source(tmp_path / "data", (".mp4",)).splits
    assert [item.captions for item in splits["val"]] == [["t6"], ["t7"], ["t8"], ["t9"]]


class Trap:
    """Unpickling it is an error."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was loaded')",))


def test_pickles_and_other_members_are_never_opened(tmp_path, media):
    trap = pickle.dumps(Trap())
    more = {
        f"{KEYS[0]}.pyd": trap,
        f"{KEYS[0]}.pkl": trap,
        f"{KEYS[1]}.pth": trap,
        "other.pickle": trap,
        "x.mp4.pkl": trap,
    }
    shard = shard_of(tmp_path / "train-0.tar", media, ".mp4", more=more)
    source = load_source(shard, (".mp4",), val_share=0)
    assert [item.key for item in source.splits["train"]] == KEYS
    root = folder_of(tmp_path / "plain", media, ".mp4", "json")
    for name, data in more.items():
        (root / name).write_bytes(data)
    assert [item.key for item in load_source(root, (".mp4",), val_share=0).splits["train"]] == KEYS


def test_what_is_missing_is_named(tmp_path, media):
    more = {"lonely.json": b'{"caption": "no media"}', "bad.json": b"{", "bad.mp4": b"x", "mute.mp4": b"x"}
    shard = shard_of(tmp_path / "tar" / "train-0.tar", media, ".mp4", more=more)
    root = folder_of(tmp_path / "plain", media, ".mp4", "json")
    for name, data in more.items():
        (root / name).write_bytes(data)
    (root / "metadata.jsonl").write_text('{"file_name": "gone.mp4", "caption": "gone"}')
    (root / "LICENSE-CC-BY.txt").write_text("not a caption")
    for path, places in ((shard.parent, ("train-0.tar:lonely", "train-0.tar:bad.mp4", "train-0.tar:mute.mp4")),
                         (root, ("lonely.json", "bad.mp4", "mute.mp4", "gone.mp4"))):  # fmt: skip
        source = load_source(path, (".mp4",), val_share=0)
        assert len(source.splits["train"]) == 10
        problems = source.problems["train"]
        assert len(problems) == len(places)
        assert all(any(line.startswith(place) for line in problems) for place in places)
        with (
            pytest.warns(UserWarning, match="left out of train"),
            pytest.raises(ValueError, match="lack media or caption"),
        ):
            videos(path).setup()
        with pytest.warns(UserWarning, match="left out") as caught:
            videos(path, max_bad_share=0.5).setup()
        assert len(caught) == len(places)


def test_useless_sources_say_so(tmp_path, media):
    with pytest.raises(ValueError, match=r"path='.*nowhere' does not exist.*folder of media"):
        videos(tmp_path / "nowhere").prepare_data()
    with pytest.raises(ValueError, match="does not exist"):
        videos(tmp_path / "nowhere").setup()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no captioned media in .*empty.*looked for \.mp4"):
        videos(tmp_path / "empty").setup()
    root = folder_of(tmp_path / "mute", media, ".mp4", "nothing")
    with pytest.raises(ValueError, match=r"clip_00\.mp4: no caption.*\(10\); put a caption"):
        videos(root).setup()
    module = videos(root, caption="none")
    module.setup()
    assert next(iter(module.train_dataloader()))["caption"] == [""] * 4
    with tarfile.open(tmp_path / "packed.tar", "w:gz"):
        pass
    with pytest.raises(ValueError, match=r"packed\.tar: not a whole, uncompressed tar"):
        videos(tmp_path / "packed.tar").setup()
    shard = shard_of(tmp_path / "cut.tar", media, ".mp4")
    shard.write_bytes(shard.read_bytes()[:9000])
    with pytest.raises(ValueError, match=r"cut\.tar: not a whole"):
        videos(shard).setup()
    shard_of(tmp_path / "mix" / "train-0.tar", media, ".mp4")
    shard_of(tmp_path / "mix" / "more.tar", media, ".mp4")
    with pytest.raises(ValueError, match=r"more\.tar belongs to no split"):
        videos(tmp_path / "mix").setup()


def test_wrong_arguments_are_named():
    for options, match in (({"batch_size": 0}, "batch_size=0"), ({"num_workers": -1}, "num_workers=-1"),
                           ({"caption": "all"}, "caption='all'"), ({"val_share": 1}, "val_share=1"),
                           ({"max_bad_share": 2}, "max_bad_share=2"), ({"limit": 0}, "limit=0"),
                           ({"frames": 0}, "frames=0"), ({"size": (0, 4)}, "size="),
                           ({"fps": 0}, "fps=0")):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            videos(Path("x"), **options)
    for options in ({"sample_rate": 0}, {"samples": 0}, {"channels": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}=0"):
            audio.ClipDataModule("x", **options)


# batches


def test_both_sources_give_the_same_batches(tmp_path, media):
    shard_of(tmp_path / "tar" / "train-0.tar", media, ".mp4")
    folder_of(tmp_path / "plain", media, ".mp4", "json")
    batches = []
    for root in ("tar", "plain"):
        module = videos(tmp_path / root, caption="random", val_share=0.3)
        module.setup()
        batches.append([*module.train_dataloader(), *module.val_dataloader()])
    assert_equal_batches(*batches)
    batch = batches[0][0]
    assert (batch["x"].shape, batch["x"].dtype) == ((4, 3, 8, 16, 20), torch.float32)
    assert batch["rate"].tolist() == [8.0] * 4
    assert batch["duration_s"].tolist() == [1.0] * 4
    assert batch["meta"][0] == {"number": KEYS.index(batch["key"][0])}


def test_workers_do_not_change_batches_and_epochs_do(tmp_path, media):
    root = folder_of(tmp_path / "data", media, ".mp4", "json")
    runs = []
    for workers in (0, 2):
        module = videos(root, num_workers=workers, caption="random", val_share=0, seed=3)
        module.setup()
        loader = module.train_dataloader()
        run = []
        for epoch in (0, 1):
            loader.sampler.set_epoch(epoch)
            run.append(list(loader))
        runs.append(run)
    assert_equal_batches(runs[0][0], runs[1][0])
    assert_equal_batches(runs[0][1], runs[1][1])
    keys = [[key for batch in epoch for key in batch["key"]] for epoch in runs[0]]
    assert keys[0] != keys[1]
    chosen = [
        {k: c for batch in epoch for k, c in zip(batch["key"], batch["caption"], strict=True)} for epoch in runs[0]
    ]
    assert any(chosen[0][key] != chosen[1][key] for key in chosen[0].keys() & chosen[1].keys())
    other = videos(root, val_share=0, seed=4)
    other.setup()
    assert [key for batch in other.train_dataloader() for key in batch["key"]] != keys[0]


def test_spawned_workers_and_global_generators(tmp_path, media):
    module = videos(folder_of(tmp_path / "data", media, ".mp4", "json"), val_share=0)
    module.setup()
    dataset = pickle.loads(pickle.dumps(module.datasets["train"]))  # noqa: S301  what a spawned worker gets
    state, torch_state = random.getstate(), torch.get_rng_state()
    assert torch.equal(dataset[(2, 9)]["x"], module.datasets["train"][(2, 9)]["x"])
    assert random.getstate() == state
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_sampler_shares_an_epoch_among_ranks():
    items = list(range(10))
    parts = [list(EpochSampler(items, shuffle=True, seed=1, rank=rank, world_size=2)) for rank in (0, 1)]
    assert sorted(index for part in parts for _, index in part) == items
    whole = list(EpochSampler(items, shuffle=True, seed=1))
    assert [pair for both in zip(*parts, strict=True) for pair in both] == whole


def test_limit_and_small_sets(tmp_path, media):
    root = folder_of(tmp_path / "data", media, ".mp4", "json")
    module = videos(root, limit=3, val_share=0.3)
    module.setup()
    assert len(module.datasets["train"]) == 3
    assert [len(batch["key"]) for batch in module.train_dataloader()] == [3], "smaller than a batch, yet not dropped"
    assert videos(root, val_share=0).setup() is None
    with pytest.raises(ValueError, match="no test split"):
        module.test_dataloader()


# the error budget


def broken(media: Path, root: Path, bad: list[str]) -> Path:
    folder_of(root, media, ".mp4", "json")
    for key in bad:
        (root / f"{key}.mp4").write_bytes(b"broken")
    return root


def test_one_bad_item_of_ten_fails_and_is_named(tmp_path, media):
    module = videos(broken(media, tmp_path / "data", KEYS[4:5]), val_share=0)
    module.setup()
    with pytest.warns(UserWarning, match=r"clip_04\.mp4"), pytest.raises(ValueError, match=r"1 of 10 .*clip_04\.mp4"):
        list(module.train_dataloader())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:bad item")
def test_bad_items_within_the_budget_are_replaced(tmp_path, media, workers):
    module = videos(broken(media, tmp_path / "data", KEYS[4:6]), val_share=0, max_bad_share=0.2, num_workers=workers)
    module.setup()
    keys = [key for batch in module.train_dataloader() for key in batch["key"]]
    assert len(keys) == 8
    assert not {*KEYS[4:6]} & {*keys}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dataset = module.datasets["train"]
        dataset.bad.clear()
        assert [dataset[i]["key"] for i in (4, 5, 4, 3)] == [KEYS[6], KEYS[6], KEYS[6], KEYS[3]]
    assert len(caught) == 2, "once for each bad item"
    over = videos(tmp_path / "data", val_share=0, max_bad_share=0.19, num_workers=workers)
    over.setup()
    over.datasets["train"].items = over.datasets["train"].items[4:6] * 5
    loader = over.train_dataloader()
    with pytest.raises(ValueError, match="more than max_bad_share"):
        list(loader)
    if workers:  # left to the garbage collector, torch waits 5 s for each worker
        loader._iterator._shutdown_workers()


def test_an_error_of_the_program_is_not_swallowed():
    def decode(item: Item, rng: random.Random | None) -> Sample:
        raise KeyError(item.key)

    item = Item("k", "k.mp4", ["c"], {}, Path("k.mp4"))
    with pytest.raises(KeyError):
        ClipDataset([item] * 3, decode, max_bad_share=1)[0]


@pytest.mark.filterwarnings("ignore:bad item")
def test_nothing_but_bad_items_ends():
    def decode(item: Item, rng: random.Random | None) -> Sample:
        raise MediaError("no")

    items = [Item(str(i), f"{i}.mp4", ["c"], {}, Path("x")) for i in range(3)]
    with pytest.raises(ValueError, match=r"none of the 3 items.*2\.mp4: no"):
        ClipDataset(items, decode, max_bad_share=1)[0]


def test_shard_cut_after_the_index_is_a_bad_item(tmp_path, media):
    shard = shard_of(tmp_path / "train-0.tar", media, ".mp4")
    item = load_source(shard, (".mp4",), val_share=0).splits["train"][-1]
    assert item.read() == (media / f"{KEYS[9]}.mp4").read_bytes()
    shard.write_bytes(shard.read_bytes()[: item.offset + 10])
    with pytest.raises(MediaError, match=r"train-0\.tar:clip_09\.mp4: 10 of"):
        item.read()


# geometry


def item_of(path: Path) -> Item:
    return Item(path.stem, path.name, ["c"], {}, path)


def levels(sample: Sample) -> list[int]:
    """Number of each frame, read from its grey level."""
    return ((sample.data.mean((0, 2, 3)) + 0.9) * 16).round().int().tolist()


def test_temporal_crop(media):
    item = item_of(media / "clip_09.mp4")  # 21 frames
    assert levels(VideoDecode(8, (32, 40))(item, None)) == list(range(6, 14))
    starts = {levels(VideoDecode(8, (32, 40))(item, random.Random(seed)))[0] for seed in range(40)}
    assert {0, 13} <= starts <= set(range(14))
    assert len(starts) > 8
    longer = VideoDecode(24, (32, 40))(item, random.Random(0))
    assert levels(longer) == [*range(21), 20, 20, 20]
    assert (longer.rate, longer.duration_s) == (8.0, 21 / 8)


def test_fps_takes_the_nearest_frames(media):
    item = item_of(media / "clip_04.mp4")  # 16 frames at 8 fps: 2 s
    half = VideoDecode(8, (32, 40), fps=4.0)(item, None)
    assert levels(half) == list(range(0, 16, 2))
    assert (half.rate, half.duration_s) == (4.0, 2.0)
    double = VideoDecode(40, (32, 40), fps=16.0)(item, None)
    assert double.duration_s == 2.0
    assert levels(double)[:5] == [0, 0, 1, 1, 2]
    assert levels(double)[30:] == [15] * 10
    assert levels(VideoDecode(16, (32, 40), fps=8.0)(item, None)) == list(range(16))


def test_resize_covers_and_crops_the_middle():
    clip = torch.rand(3, 2, 16, 16)
    assert torch.equal(resize_cover(clip, (16, 16)), clip)
    assert torch.equal(resize_cover(clip, (16, 10)), clip[..., 3:13]), "the same height: only a crop"
    assert resize_cover(clip, (9, 21)).shape == (3, 2, 9, 21)
    ramp = torch.linspace(0, 1, 64).expand(1, 1, 32, 64)
    small = resize_cover(ramp, (8, 8))[0, 0, 0]
    assert small[0] + small[-1] == pytest.approx(1, abs=1e-3)
    assert small[-1] - small[0] == pytest.approx(28 / 63, abs=0.03)


def test_sound_crop_padding_channels_and_rate(media, tmp_path):
    item = item_of(media / "clip_05.wav")  # 1500 samples that count
    first = AudioDecode(8000, 1000)(item, None)
    assert (first.data[0] * 32768).int().tolist() == list(range(1000))
    assert (first.rate, first.duration_s) == (8000.0, 0.125)
    starts = {int(AudioDecode(8000, 1000)(item, random.Random(seed)).data[0, 0] * 32768) for seed in range(40)}
    assert min(starts) < 100
    assert 400 < max(starts) <= 500
    padded = AudioDecode(8000, 2000, channels=2)(item, random.Random(0))
    assert padded.data.shape == (2, 2000)
    assert padded.duration_s == 1500 / 8000
    assert padded.data[:, 1500:].abs().max() == 0
    assert torch.equal(padded.data[0], padded.data[1])
    up = AudioDecode(16000, 4000)(item, None)
    assert (up.data.shape, up.duration_s) == ((1, 4000), 3000 / 16000)
    assert AudioDecode(16000, 1999)(item, random.Random(1)).data.shape == (1, 1999)
    stereo = torch.tensor([[1.0, 0.0], [0.0, 0.5]])
    assert torch.equal(mix_to(stereo, 2), stereo)
    assert torch.equal(mix_to(stereo, 1), torch.tensor([[0.5, 0.25]]))


def test_audio_module(tmp_path, media):
    folder_of(tmp_path / "data", media, ".wav", "txt")
    module = audio.ClipDataModule(str(tmp_path / "data"), sample_rate=8000, samples=1024, batch_size=4, num_workers=2)
    module.setup("fit")
    batch = next(iter(module.train_dataloader()))
    assert (batch["x"].shape, batch["x"].dtype) == ((4, 1, 1024), torch.float32)
    assert batch["rate"].tolist() == [8000.0] * 4
    assert all(caption.startswith("caption") for caption in batch["caption"])


def test_collate():
    sample = {"x": torch.zeros(3, 2), "caption": "a", "rate": 8, "duration_s": 0.25, "key": "k", "meta": {}}
    batch = collate([sample, sample])
    assert (batch["x"].shape, batch["rate"].dtype, batch["duration_s"].tolist()) == (
        (2, 3, 2),
        torch.float32,
        [0.25] * 2,
    )
    assert (batch["caption"], batch["key"], batch["meta"]) == (["a", "a"], ["k", "k"], [{}, {}])


# with Lightning


def test_lightning_builds_and_shuffles_anew(tmp_path, media):
    import jsonargparse
    from lightning.pytorch import LightningDataModule, LightningModule, Trainer

    folder_of(tmp_path / "data", media, ".mp4", "json")
    parser = jsonargparse.ArgumentParser()
    parser.add_subclass_arguments(LightningDataModule, "data")
    options = {
        "path": str(tmp_path / "data"),
        "frames": 4,
        "size": [16, 16],
        "batch_size": 4,
        "fps": None,
        "limit": None,
    }
    config = parser.parse_object({"data": {"class_path": "video.ClipDataModule", "init_args": options}})
    module = parser.instantiate(config).data
    assert isinstance(module, video.ClipDataModule)
    seen: list[list[str]] = []

    class Watcher(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def training_step(self, batch, index):
            seen.append([*batch["key"], str(batch["x"].sum().item())])
            return (self.weight - batch["x"].mean()) ** 2

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path)  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(Watcher(), module)
    assert len(seen) == 4
    assert seen[:2] != seen[2:], "set_epoch reaches the sampler"


# real data


@needs_shared
def test_real_sprites():
    module = video.ClipDataModule(str(SHARED / "lpc_sprites"), batch_size=4, limit=8)
    module.setup()
    batch = next(iter(module.val_dataloader()))
    assert batch["x"].shape == (4, 3, 16, 64, 64)
    assert batch["rate"].tolist() == [8.0] * 4
    assert batch["duration_s"].tolist() == [2.0] * 4
    for caption, meta in zip(batch["caption"], batch["meta"], strict=True):
        assert meta["hair"] in caption
        assert meta["split"] == "val"
    assert (batch["x"][0].std(dim=1) > 0.1).any(), "it moves"


@needs_shared
def test_real_digits():
    module = audio.ClipDataModule(str(SHARED / "fsdd"), sample_rate=8000, samples=8192, batch_size=8, limit=8)
    module.setup()
    assert {name: len(data) for name, data in module.datasets.items()} == {"train": 8, "val": 8, "test": 0}
    batch = next(iter(module.train_dataloader()))
    assert batch["x"].shape == (8, 1, 8192)
    for index, meta in enumerate(batch["meta"]):
        assert f"digit {meta['word']}" in batch["caption"][index]
        real = min(8192, round(meta["duration"] * 8000))
        assert batch["duration_s"][index].item() == pytest.approx(real / 8000, abs=1e-3)
        assert batch["x"][index, :, real + 1 :].abs().sum() == 0
