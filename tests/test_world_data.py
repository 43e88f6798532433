"""Data modules of the world: batches, splits, held-out combinations, order and workers."""

import itertools
from typing import Any

import pytest
import torch

import audio.render
import audiovideo.world
import video.render
from mmdiff.data.clips import ClipDataset
from mmdiff.world import EASY, World, caption, is_held_out, joint_caption, scene, sound_caption
from mmdiff.world.dataset import WorldClips, WorldDataset, train_and_val

KEYS = ["caption", "duration_s", "key", "meta", "rate", "start_s", "total_s", "x"]
SMALL = {"count": 6, "val_count": 3, "batch_size": 4}
FULL = World()


def video_module(**values: Any) -> Any:
    return video.render.WorldDataModule(**{"frames": 4, "size": (8, 12), **SMALL, **values})


@pytest.mark.parametrize(
    ("module", "shape", "rate", "text"),
    [
        (video_module(), (3, 4, 8, 12), 8, caption),
        (audio.render.WorldDataModule(samples=4000, **SMALL), (1, 4000), 8000, sound_caption),
        (audio.render.WorldDataModule(samples=4000, channels=2, **SMALL), (2, 4000), 8000,
         lambda drawn: sound_caption(drawn, True)),
    ],
)  # fmt: skip
def test_a_data_module_yields_batches(module: Any, shape: tuple[int, ...], rate: float, text: Any) -> None:
    batches = list(module.train_dataloader())
    assert [len(batch["key"]) for batch in batches] == [4, 2]
    assert sorted(batches[0]) == KEYS
    batch = batches[0]
    assert batch["x"].shape == (4, *shape)
    lasts = shape[1] / rate
    for name, value in {"rate": rate, "duration_s": lasts, "start_s": 0, "total_s": lasts}.items():
        assert batch[name].dtype is torch.float32
        assert batch[name].tolist() == [value] * 4
    for key, sentence, meta in zip(batch["key"], batch["caption"], batch["meta"], strict=True):
        drawn = scene(int(key.split("-", 2)[2]), duration_s=lasts)
        assert sentence == text(drawn)
        assert meta["bodies"][0]["shape"] == drawn.shape
    train, val, test = (
        {key for batch in loader() for key in batch["key"]}
        for loader in (module.train_dataloader, module.val_dataloader, module.test_dataloader)
    )
    assert (len(train), len(val), len(test), len(train | val | test)) == (6, 3, 3, 12)
    assert [b["key"] for b in module.train_dataloader()] == [b["key"] for b in batches]  # the order is the seed's


def test_picture_and_sound_are_of_the_same_scene() -> None:
    module = audiovideo.world.WorldDataModule(frames=12, size=(16, 16), fps=8, channels=2, world=FULL, seed=3, **SMALL)
    batch = next(iter(module.train_dataloader()))
    assert sorted(batch) == KEYS
    assert batch["x"]["video"].shape == (4, 3, 12, 16, 16)
    assert batch["x"]["audio"].shape == (4, 2, 12000)
    assert {name: rate.tolist() for name, rate in batch["rate"].items()} == {"video": [8.0] * 4, "audio": [8000.0] * 4}
    assert batch["duration_s"].tolist() == [1.5] * 4
    for i, key in enumerate(batch["key"]):
        drawn = FULL.scene(int(key.split("-", 2)[2]), 3, 1.5)
        assert batch["caption"][i] == joint_caption(drawn, True)
        assert torch.equal(batch["x"]["video"][i], video.render.render(drawn, 12, (16, 16), 8))
        assert torch.equal(batch["x"]["audio"][i], audio.render.render(drawn, 12000, 8000, 2))


def test_one_argument_holds_combinations_out() -> None:
    pair = ("colour", "shape")
    module = video_module(count=60, val_count=30, world=World(held_out=pair))
    for dataset, held in ((module.train, False), (module.val, False), (module.test, True)):
        assert {is_held_out(dataset.scene(i), pair) for i in range(len(dataset))} == {held}
    free = video_module(count=60, world=World())
    assert {is_held_out(free.train.scene(i), pair) for i in range(60)} == {True, False}


def test_one_part_can_be_chosen_for_all_loaders() -> None:
    module = video_module(count=30, world=World(held_out=("colour", "shape"), split="held-out"))
    assert all(is_held_out(part.scene(i), ("colour", "shape")) for part in (module.train, module.val) for i in range(3))


def test_workers_give_the_same_batches() -> None:
    lists = []
    for workers in (0, 2):
        module = video_module(frames=2, batch_size=2, num_workers=workers, world=FULL)
        lists.append([(batch["key"], batch["x"]) for batch in module.train_dataloader()])
    for (keys, x), (other_keys, other) in zip(*lists, strict=True):
        assert keys == other_keys
        assert torch.equal(x, other)


def test_epochs_differ_and_a_loader_goes_on_where_it_was() -> None:
    def keys(loader: Any) -> list[list[str]]:
        return [batch["key"] for batch in loader]

    module = video_module(count=20)
    loader = module.train_dataloader()
    first = keys(loader)
    loader.sampler.set_epoch(1)
    assert sorted(itertools.chain(*keys(loader))) == sorted(itertools.chain(*first))
    assert keys(loader) != first
    fresh, loader = module.train_dataloader(), module.train_dataloader()
    running = iter(loader)
    given = [next(running)["key"], next(running)["key"]]
    fresh.load_state_dict(loader.state_dict())
    assert given + keys(fresh) == first


def test_scenes_do_not_depend_on_how_many_there_are() -> None:
    few, many = (train_and_val(len, caption, count, 2, 8.0, 2.0, 0)[0] for count in (5, 10**6))  # type: ignore[arg-type]
    assert isinstance(few, ClipDataset)
    assert [few.scene(i) for i in range(5)] == [many.scene(i) for i in range(5)]
    assert many.items[10**6 - 1].key == "world-0-999999"
    assert few.world == EASY


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: video_module(count=0), "count=0 is not a positive"),
        (lambda: video_module(batch_size=0), "batch_size=0 is below 1"),
        (lambda: video_module(num_workers=-1), "num_workers=-1 is negative"),
        (lambda: video_module(frames=0), "frames=0 is not"),
        (lambda: audio.render.WorldDataModule(channels=5), "channels=5 is neither"),
        (lambda: audiovideo.world.WorldDataModule(fps=-1.0), "fps=-1.0 is not"),
        (lambda: audiovideo.world.WorldDataModule(sample_rate=0), "samples=0 is not"),
    ],
)
def test_messages(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_an_item_out_of_range_is_refused() -> None:
    data = WorldDataset(lambda drawn: torch.zeros(1, 2), caption, 3, 8.0, 2.0)
    assert data[2]["key"] == "world-0-2"
    with pytest.raises(IndexError, match="item 3 of 3"):
        data[3]


def test_a_world_is_set_in_yaml(tmp_path: Any) -> None:
    from jsonargparse import ArgumentParser

    config = tmp_path / "data.yaml"
    config.write_text(
        "data: {class_path: audiovideo.world.WorldDataModule, init_args: {count: 4, frames: 4, size: [8, 8],"
        " world: {bodies: 2, actions: [bounce, turn], held_out: [colour, shape]}}}"
    )
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(WorldClips, "data")
    made = parser.instantiate_classes(parser.parse_args(["--config", str(config)])).data
    assert made.train.world == World(bodies=2, actions=("bounce", "turn"), held_out=("colour", "shape"), split="seen")
