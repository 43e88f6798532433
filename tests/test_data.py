"""Captioned clips: the error budget, and batches that are a function of the seed."""

import pickle
import random
import warnings
from pathlib import Path

import pytest
import torch

import audio
import video
from audio.data import AudioDecode, mix_to
from mmdiff.data import remote
from mmdiff.data.clips import ClipDataset, Sample, collate
from mmdiff.data.media import MediaError, UnreachableError
from mmdiff.data.sources import Item, load_source
from tests.captioned_media import KEYS, folder_of, shard_of, videos, write_media
from video.data import VideoDecode, resize_cover

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not there")


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_media(tmp_path_factory.mktemp("media"))


def assert_equal_batches(first: list[dict], second: list[dict]) -> None:
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            same = torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name]
            assert same, name


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
def test_bad_items_within_the_budget_are_left_out_and_counted(tmp_path, media, workers):
    module = videos(broken(media, tmp_path / "data", KEYS[4:6]), val_share=0, max_bad_share=0.2, num_workers=workers)
    module.setup()
    loader = module.train_dataloader()
    with pytest.warns(UserWarning, match="bad item left out: clip_0[45]") as caught:
        batches = list(loader)
    keys = [key for batch in batches for key in batch["key"]]
    assert sorted(keys) == sorted({*KEYS} - {*KEYS[4:6]}), "each good item once, and nothing in the place of a bad one"
    assert sum(len(batch["x"]) for batch in batches) == 8
    assert len([w for w in caught if "bad item" in str(w.message)]) == 2, "once for each bad item"
    assert module.bad["train"].by_kind() == {"not media": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(loader)) == 3, "the next epoch says no more of them"
    over = videos(tmp_path / "data", val_share=0, max_bad_share=0.19, num_workers=workers)
    over.setup()
    with (
        pytest.warns(UserWarning, match="bad item"),
        pytest.raises(ValueError, match=r"2 of 10 train items are bad, more than max_bad_share=0.19.*clip_04.*clip_05"),
    ):
        list(over.train_dataloader())


def test_a_bad_item_has_its_own_error(tmp_path, media):
    module = videos(broken(media, tmp_path / "data", KEYS[4:5]), val_share=0)
    module.setup()
    dataset = module.datasets["train"]
    with pytest.raises(MediaError, match="clip_04"):
        dataset[4]
    problem = dataset.result(4)
    assert (problem.where, problem.kind) == ("clip_04.mp4", "not media")
    assert dataset[5]["key"] == KEYS[5]


def test_an_error_of_the_program_is_not_swallowed():
    def decode(item: Item, rng: random.Random | None) -> Sample:
        raise KeyError(item.key)

    item = Item("k", "k.mp4", ["c"], {}, Path("k.mp4"))
    with pytest.raises(KeyError):
        ClipDataset([item] * 3, decode).result(0)


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
    longer = VideoDecode(24, (32, 40), short="pad")(item, random.Random(0))
    assert levels(longer) == [*range(21), 20, 20, 20]
    assert (longer.rate, longer.duration_s) == (8.0, 21 / 8)


def test_fps_takes_the_nearest_frames(media):
    item = item_of(media / "clip_04.mp4")  # 16 frames at 8 fps: 2 s
    half = VideoDecode(8, (32, 40), fps=4.0)(item, None)
    assert levels(half) == list(range(0, 16, 2))
    assert (half.rate, half.duration_s) == (4.0, 2.0)
    double = VideoDecode(40, (32, 40), fps=16.0, short="pad")(item, None)
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
    padded = AudioDecode(8000, 2000, channels=2, short="pad")(item, random.Random(0))
    assert padded.data.shape == (2, 2000)
    assert padded.duration_s == 1500 / 8000
    assert padded.data[:, 1500:].abs().max() == 0
    assert torch.equal(padded.data[0], padded.data[1])
    up = AudioDecode(16000, 4000, short="pad")(item, None)
    assert (up.data.shape, up.duration_s) == ((1, 4000), 3000 / 16000)
    assert AudioDecode(16000, 1999)(item, random.Random(1)).data.shape == (1, 1999)
    stereo = torch.tensor([[1.0, 0.0], [0.0, 0.5]])
    assert torch.equal(mix_to(stereo, 2), stereo)
    assert torch.equal(mix_to(stereo, 1), torch.tensor([[0.5, 0.25]]))


def test_audio_module(tmp_path, media):
    folder_of(tmp_path / "data", media, ".wav", "txt")
    module = audio.ClipDataModule(str(tmp_path / "data"), sample_rate=8000, samples=1000, batch_size=4, num_workers=2)
    module.setup("fit")
    batch = next(iter(module.train_dataloader()))
    assert (batch["x"].shape, batch["x"].dtype) == ((4, 1, 1000), torch.float32)
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
        "resize": "cover",
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
    assert len(seen) == 6
    assert seen[:3] != seen[3:], "set_epoch reaches the sampler"


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
    options = {"sample_rate": 8000, "samples": 8192, "short": "pad", "batch_size": 8, "limit": 8}
    module = audio.ClipDataModule(str(SHARED / "fsdd"), **options)
    module.setup()
    assert {name: len(data) for name, data in module.datasets.items()} == {"train": 8, "val": 8, "test": 0}
    batch = next(iter(module.train_dataloader()))
    assert batch["x"].shape == (8, 1, 8192)
    for index, meta in enumerate(batch["meta"]):
        assert f"digit {meta['word']}" in batch["caption"][index]
        real = min(8192, round(meta["duration"] * 8000))
        assert batch["duration_s"][index].item() == pytest.approx(real / 8000, abs=1e-3)
        assert batch["x"][index, :, real + 1 :].abs().sum() == 0


def test_a_server_without_byte_ranges_is_named(monkeypatch: pytest.MonkeyPatch):
    class Whole:
        def cat_file(self, path: str, start: int, end: int) -> bytes:
            return b"0123456789"

    monkeypatch.setattr(remote, "_system", lambda url: (Whole(), url))
    item = remote.RemoteItem("k", "x.tar:k", ["c"], {}, Path("x.tar"), 2, 3, url="http://h/x.tar")
    with pytest.raises(UnreachableError, match=r"x.tar:k: the server gives no ranges .* simplecache::http://h/x\.tar"):
        item.read()
