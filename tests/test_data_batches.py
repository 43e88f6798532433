"""Which items are a batch: each exactly once an epoch, on any number of processes, in buckets of equal time."""

import re
from pathlib import Path

import pytest
import torch
import yaml

import video
from mmdiff.config import read_config
from mmdiff.data.batches import Buckets, Plan, Shape
from mmdiff.data.measure import main, measure
from tests.clip_files import NumberModule, write_numbers
from video.files import write_video

COUNTS = (1, 2, 3, 7, 10, 16, 33)


def plan(groups: list[int], sizes: list[int], shuffle: bool = True, seed: int = 0) -> Plan:
    """Groups of so many items each, numbered through."""
    starts = [sum(groups[:place]) for place in range(len(groups))]
    members = tuple(tuple(range(start, start + count)) for start, count in zip(starts, groups, strict=True))
    return Plan(members, tuple(sizes), shuffle, seed)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_item_exactly_once_and_as_many_batches_on_every_rank(world_size: int, shuffle: bool) -> None:
    for count in COUNTS:
        for size in (1, 2, 3, 5):
            for groups in ([count], [count, 4], [1, count, 2]):
                made = plan(groups, [size, size + 1, size][: len(groups)], shuffle)
                for epoch in (0, 3):
                    batches = made.batches(epoch, world_size)
                    seen = [place for batch in batches for place in batch]
                    assert len(batches) % world_size == 0
                    assert len(batches) == made.steps(world_size) * world_size
                    assert len(set(seen)) == len(seen)
                    whole = sum(groups)
                    assert all(batches)
                    if len(seen) < whole:  # only where there is nothing to divide
                        assert max(map(len, batches), default=1) == 1
                        assert whole - len(seen) < world_size
                    for batch in batches:
                        owners = {next(i for i, group in enumerate(made.groups) if p in group) for p in batch}
                        assert len(owners) == 1, "a batch has one bucket"
                        assert len(batch) <= made.sizes[owners.pop()]


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    made = plan([20, 7], [4, 2])
    assert made.batches(1) == plan([20, 7], [4, 2]).batches(1)
    assert made.batches(1) != made.batches(2)
    assert made.batches(1) != plan([20, 7], [4, 2], seed=1).batches(1)
    assert plan([20, 7], [4, 2], seed=1).batches(0) != made.batches(1), "seeds do not share their epochs"
    state = torch.get_rng_state()
    made.batches(5)
    assert torch.equal(state, torch.get_rng_state()), "no global generator is touched"
    assert plan([5], [2], shuffle=False).batches(9) == [[0, 1], [2, 3], [4]]


def test_two_processes_see_what_one_with_two_steps_sees() -> None:
    made = plan([32, 8], [4, 2])
    assert made.batches(0, 2) == made.batches(0, 1)
    assert [made.batches(0, 2)[rank::2] for rank in (0, 1)] == [made.batches(0)[0::2], made.batches(0)[1::2]]
    buckets = [sorted({p >= 32 for p in batch}) for batch in made.batches(0)]
    assert buckets not in (sorted(buckets), sorted(buckets, reverse=True)), "buckets take turns"


def test_the_digest_tells_other_data_apart() -> None:
    one = plan([3], [2])
    keys = ["a", "b", "c"]
    assert one.digest(keys) == plan([3], [2]).digest(keys)
    others = [plan([3], [1]), plan([3], [2], seed=1), plan([3], [2], shuffle=False), plan([2, 1], [2, 2])]
    assert len({one.digest(keys), one.digest(["a", "b", "d"]), *(other.digest(keys) for other in others)}) == 6


# buckets


OWN = Shape(50, 25.0, (90, 160))
ASKED = Shape(16, 0, (64, 64))


@pytest.mark.parametrize(
    ("options", "own", "asked", "expected"),
    [
        ({}, OWN, ASKED, ASKED),
        ({"steps": [8, 16, 48, 64]}, OWN, ASKED, Shape(48, 0, (64, 64))),
        (
            {"steps": [64, 80]},
            OWN,
            ASKED,
            Shape(64, 0, (64, 64)),
        ),  # none is filled
        ({"steps": "own"}, OWN, ASKED, Shape(50, 0, (64, 64))),
        ({"durations_s": [0.5, 1.0, 4.0]}, OWN, Shape(16, 8.0, (64, 64)), Shape(8, 8.0, (64, 64))),
        ({"durations_s": [1.0, 2.0]}, Shape(16000, 8000.0, (1,)), Shape(1, 8000.0, (1,)), Shape(16000, 8000.0, (1,))),
        ({"rates": [8.0, 24.0]}, OWN, ASKED, Shape(16, 24.0, (64, 64))),
        ({"rates": [20.0, 30.0]}, OWN, ASKED, Shape(16, 20.0, (64, 64))),
        ({"rates": "own"}, OWN, ASKED, Shape(16, 25.0, (64, 64))),
        ({"rates": [12.5], "steps": [16, 25, 26]}, OWN, ASKED, Shape(25, 12.5, (64, 64))),
        ({"sizes": "own"}, OWN, ASKED, Shape(16, 0, (90, 160))),
        ({"sizes": [(64, 64), (48, 80), (80, 48)]}, OWN, ASKED, Shape(16, 0, (48, 80))),
        ({"sizes": [(64, 64), (32, 32)]}, Shape(1, 1.0, (30, 30)), ASKED, Shape(16, 0, (32, 32))),
    ],
)
def test_an_item_goes_where_the_least_of_it_is_lost(
    options: dict[str, object], own: Shape, asked: Shape, expected: Shape
) -> None:
    assert Buckets(**options).choose(own, asked) == expected  # type: ignore[arg-type]


def test_batch_sizes_take_equal_time() -> None:
    shapes = [Shape(8, 8.0, (32, 32)), Shape(16, 8.0, (64, 64)), Shape(16, 8.0, (32, 48))]
    sizes = Buckets().batch_sizes(shapes, 4)
    assert sizes == [32, 4, 10]
    times = [size * shape.values for size, shape in zip(sizes, shapes, strict=True)]
    assert min(times) / max(times) > 0.93
    assert Buckets(power=2.0).batch_sizes(shapes, 4) == [256, 4, 28]
    costs = {"8x32x32@8": 0.01, "16x64x64@8": 0.05, "16x32x48@8": 0.021}
    assert Buckets(costs=costs).batch_sizes(shapes, 8) == [40, 8, 19]
    assert Buckets(costs=dict.fromkeys(costs, 1.0)).batch_sizes(shapes, 3) == [3, 3, 3]
    with pytest.raises(ValueError, match=r"costs has no 8x32x32@8, only a; measure again"):
        Buckets(costs={"a": 1.0}).batch_sizes(shapes, 4)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"steps": [8], "durations_s": [1.0]}, "steps and durations_s say the same"),
        ({"steps": []}, "steps=.. must be a list"),
        ({"steps": [0]}, "steps=.0. holds what is not above 0"),
        ({"sizes": "all"}, "sizes='all'"),
        ({"sizes": [(64, 0)]}, "sizes"),
        ({"rates": [float("nan")]}, "rates"),
        ({"power": 0}, "power=0"),
        ({"costs": {"a": 0.0}}, "costs"),
    ],
)
def test_wrong_buckets_are_named(options: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=f"buckets: .*{match}"):
        Buckets(**options)  # type: ignore[arg-type]


def test_a_module_makes_batches_of_its_buckets(tmp_path: Path) -> None:
    texts = [f"{number} {steps}" for number, steps in enumerate([4] * 9 + [8] * 5 + [2] * 3)]
    texts[3] = "bad"
    data = NumberModule(str(write_numbers(tmp_path / "n", texts)), buckets=Buckets(steps=[4, 8]), batch_size=2)
    with pytest.warns(UserWarning, match=r"bad item left out: 003\.n: is bad"):
        data.setup()
    batches = list(data.train_dataloader())
    seen = sorted(key for batch in batches for key in batch["key"])
    assert seen == [f"{n:03d}" for n in range(17) if n != 3]
    assert data.plans["train"].sizes == (4, 2)
    assert data.bad["train"].by_kind() == {"damaged": 1}
    for batch in batches:
        numbers = batch["x"][:, 0, 0, 0].int().tolist()
        assert batch["x"].shape[2] == (8 if all(9 <= n < 14 for n in numbers) else 4)
        assert [f"{n:03d}" for n in numbers] == batch["key"]


@pytest.mark.filterwarnings("ignore:bad item")
def test_videos_in_buckets_of_length_and_aspect_by_one_line_of_yaml(tmp_path: Path) -> None:
    import jsonargparse
    from lightning.pytorch import LightningDataModule

    torch.manual_seed(0)
    wide, tall = (32, 48), (48, 32)
    for number, (frames, size) in enumerate([(8, wide), (9, wide), (17, tall), (16, tall), (5, wide)]):
        write_video(tmp_path / f"{number}.mp4", torch.rand(3, frames, *size) * 2 - 1, 8)
    parser = jsonargparse.ArgumentParser()
    parser.add_subclass_arguments(LightningDataModule, "data")
    options = {"path": str(tmp_path), "caption": "none", "val_share": 0, "max_bad_share": 0.2, "batch_size": 2}
    found, bad = [], []
    for line in ("{steps: [8, 16], sizes: [[32, 48], [48, 32]]}", "{steps: own, sizes: own, rates: own}"):
        args = ["--data=video.ClipDataModule", *(f"--data.{name}={value}" for name, value in options.items())]
        data = parser.instantiate(parser.parse_args([*args, f"--data.buckets={line}"])).data
        assert isinstance(data, video.ClipDataModule)
        data.setup()
        batches = list(data.train_dataloader())
        found.append(sorted((key, *batch["x"].shape[2:]) for batch in batches for key in batch["key"]))
        bad.append({problem.where: problem.kind for problem in data.bad["train"].found.values()})
    assert found[0] == [("0", 8, *wide), ("1", 8, *wide), ("2", 16, *tall), ("3", 16, *tall)]
    assert bad == [{"4.mp4": "too short"}, {}]
    assert found[1] == [("0", 8, *wide), ("1", 9, *wide), ("2", 17, *tall), ("3", 16, *tall), ("4", 5, *wide)]


def config_of(folder: Path, buckets: dict[str, object] | None) -> Path:
    """The tiny video model on clips of two lengths in `folder`."""
    torch.manual_seed(0)
    for number in range(12):
        frames = 8 if number % 2 else 16
        write_video(folder / "clips" / f"{number}.mp4", torch.rand(3, frames, 16, 16) * 2 - 1, 8)
    tree = read_config(Path(__file__).parent.parent / "configs" / "tiny" / "video.yaml")
    options = {"path": str(folder / "clips"), "frames": 8, "size": [16, 16], "caption": "none", "val_share": 0,
               "batch_size": 2, "buckets": buckets}  # fmt: skip
    tree["data"] = {"class_path": "video.ClipDataModule", "init_args": options}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return folder / "config.yaml"


def test_measured_costs_are_a_line_for_the_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(config_of(tmp_path, {"steps": [8, 16], "costs": {"old": 1.0}}))]) == 0
    line = yaml.safe_load(capsys.readouterr().out)
    assert set(line["costs"]) == {"8x16x16", "16x16x16"}
    assert all(cost > 0 for cost in line["costs"].values())
    assert Buckets(steps=[8, 16], **line).batch_sizes([Shape(8, 0, (16, 16))], 4) == [4]
    assert main([str(config_of(tmp_path, None))]) == 2
    assert "its data has no buckets" in capsys.readouterr().err
    assert main([str(config_of(tmp_path, {"steps": [32]}))]) == 2
    assert re.search(r"no clip of the bucket 32x16x16 can be used: \d+\.mp4: has \d+ frames", capsys.readouterr().err)


@pytest.mark.slow
def test_measured_buckets_take_equal_time(tmp_path: Path) -> None:
    """Needs idle cores: python -m pytest tests/test_data_batches.py -m slow"""
    costs = measure(str(config_of(tmp_path, {"steps": [8, 16]})))
    made = Buckets(steps=[8, 16], costs=costs)
    names = {"8x16x16": Shape(8, 0, (16, 16)), "16x16x16": Shape(16, 0, (16, 16))}
    sizes = made.batch_sizes([names[name] for name in costs], 6)
    times = [size * costs[name] for size, name in zip(sizes, costs, strict=True)]
    assert max(times) / min(times) < 1.3
