"""Video evaluations: the world's attributes on renders, and features by networks that the test saves itself."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mmdiff.accuracy import score
from mmdiff.config import read_config
from mmdiff.distance import Extractor
from mmdiff.evaluate import pick_features
from mmdiff.readers import Labels, ReaderFeatures, new_reader, read, save_reader
from mmdiff.tasks import balanced_prompts
from mmdiff.world import World, is_held_out, parse
from video import metrics
from video.clip_reader import ClipReader
from video.features import ClipVision, VideoMAE, spread
from video.i3d import I3D, Inception
from video.metrics import WORDS, read_world, scenes, world, world_scores, world_splits
from video.render import WorldDataModule

ROOT = Path(__file__).resolve().parent.parent
SHAPE, FPS = (3, 16, 32, 32), 8.0


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "TRAIN", 10)
    monkeypatch.setattr(metrics, "VAL", 24)


# -- the procedural world


def test_renders_have_all_that_their_captions_say() -> None:
    drawn = scenes(range(12), "seen", SHAPE, FPS)
    clips = torch.stack([metrics.render(scene, 16, (32, 32), FPS) for _, scene in drawn])
    rows = world_scores(clips, [item.captions[0] for item, _ in drawn], FPS)
    assert list(rows) == [*WORDS, "all"]
    assert {(row["right"], row["count"]) for row in rows.values()} == {(12, 12)}
    assert world_scores(clips, [scene for _, scene in drawn], FPS) == rows


def test_clips_of_others_captions_and_of_nothing_are_wrong() -> None:
    drawn = scenes(range(8), "seen", SHAPE, FPS)
    clips = torch.stack([metrics.render(scene, 16, (32, 32), FPS) for _, scene in drawn])
    captions = [item.captions[0] for item, _ in drawn]
    shifted = world_scores(clips, [*captions[1:], captions[0]], FPS)
    by_hand = [
        parse(a)["colour"] == parse(b)["colour"] for a, b in zip(captions, [*captions[1:], captions[0]], strict=True)
    ]
    assert shifted["colour"]["right"] == sum(by_hand)
    empty = torch.full((8, *SHAPE), -1.0)
    rows = world_scores(empty, captions, FPS)
    assert {name: row["right"] for name, row in rows.items() if name != "background"} == dict.fromkeys(
        [*WORDS[:-1], "all"], 0
    )
    assert read_world(empty[:1], FPS) == [{"background": "black"}]


def test_world_clips_are_of_the_pipeline_s_shape_and_told_apart_by_combination(few: None) -> None:
    train, val = world_splits("", (3, 8, 48, 48), 4.0)
    assert (len(train), len(val)) == (10, 48)
    item = val[0]
    assert (tuple(item["x"].shape), item["rate"], item["duration_s"]) == ((3, 8, 48, 48), 4.0, 2.0)
    held_out = {name: is_held_out_pair(item.meta) for name, item in ((i.key, i) for i in val.items)}
    assert [held_out[item.key] for item in val.items] == [item.meta["combination"] == "held-out" for item in val.items]
    assert not any(is_held_out_pair(item.meta) for item in train.items)
    assert not {item.key for item in train.items} & {item.key for item in val.items}
    prompts = balanced_prompts(world(), val, 20, 0)
    assert [prompt.part for prompt in prompts] == ["held-out", "seen"] * 10
    assert all(parse(prompt.caption).items() >= prompt.labels.items() for prompt in prompts)
    assert set(prompts[0].labels) == set(WORDS)


def is_held_out_pair(meta: dict[str, str]) -> bool:
    """By the rule of mmdiff.world: red circles, green squares, blue triangles and yellow crosses."""
    pairs = {("red", "circle"), ("green", "square"), ("blue", "triangle"), ("yellow", "cross")}
    return (meta["colour"], meta["shape"]) in pairs


def test_the_scenes_are_those_of_the_recipe() -> None:
    settings = read_config(ROOT / "configs" / "video" / "world.yaml")["data"]["init_args"]["world"]
    assert World(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}) == metrics.WORLD
    data = WorldDataModule(4, 16, (32, 32), FPS, val_count=2, world=metrics.WORLD)
    for combination, dataset, first, step in (("seen", data.train, 0, 1), ("seen", data.val, -1, -1),
                                              ("held-out", data.test, -metrics.TEST_FROM, -1)):  # fmt: skip
        ours = [scene for _, scene in scenes(range(first, first + 2 * step, step), combination, SHAPE, FPS)]
        assert ours == [dataset.scene(0), dataset.scene(1)]
        assert is_held_out(ours[0], ("colour", "shape")) == (combination == "held-out")


# -- features


def moving(count: int) -> Tensor:
    return torch.stack(
        [metrics.render(scene, 8, (24, 24), 4.0) for _, scene in scenes(range(count), "seen", (3, 8), 4.0)]
    )


def expect_features(extractor: Extractor, x: Tensor, size: int) -> None:
    """Of each clip by itself, told apart by the clips, and without a gradient."""
    found = extractor(x)
    assert found.shape == (len(x), size)
    assert not found.requires_grad
    assert torch.allclose(extractor(x[1:2]), found[1:2], atol=1e-4)
    assert float((found[0] - found[1]).abs().max()) > 1e-4


@pytest.fixture
def videomae(tmp_path: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    config = transformers.VideoMAEConfig(
        image_size=16, patch_size=8, num_frames=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    transformers.VideoMAEModel(config).save_pretrained(tmp_path / "mae")
    return tmp_path / "mae"


@pytest.fixture
def clip_vision(tmp_path: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(
        image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        projection_dim=12,
    )  # fmt: skip
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def test_videomae_from_a_folder_of_safetensors(videomae: Path) -> None:
    text = f"{{class_path: video.features.VideoMAE, init_args: {{folder: {videomae}}}}}"
    extractor = pick_features(text)
    assert isinstance(extractor, VideoMAE)
    x = moving(2)
    expect_features(extractor, x, 16)
    assert torch.equal(extractor(x), extractor(spread(x, 4)))
    assert not torch.allclose(extractor(x), extractor(x.flip(2)))  # it sees the order of frames
    assert extractor.protocol.startswith("VideoMAE ")
    assert extractor.protocol.endswith("4 frames of 16, bilinear, mean of tokens")


def test_clip_from_a_folder_of_safetensors_is_the_mean_over_frames(clip_vision: Path) -> None:
    extractor, x = ClipVision(str(clip_vision), frames=4), moving(2)
    expect_features(extractor, x, 12)
    frames = torch.stack([extractor(spread(x, 4)[:, :, [k]]) for k in range(4)])
    assert torch.allclose(extractor(x), frames.mean(0), atol=1e-5)
    assert "4 frames of 16" in extractor.protocol


def test_frames_are_spread_over_the_clip() -> None:
    x = torch.arange(10.0).view(1, 1, 10, 1, 1).expand(1, 3, 10, 1, 1)
    assert spread(x, 5)[0, 0, :, 0, 0].tolist() == [1, 3, 5, 7, 9]
    assert spread(x[:, :, :2], 4)[0, 0, :, 0, 0].tolist() == [0, 0, 1, 1]


def test_wrong_folders_give_one_line(videomae: Path, clip_vision: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds a 'videomae' model, not a 'clip' one"):
        ClipVision(str(videomae))
    with pytest.raises(ValueError, match="has no config.json and model.safetensors"):
        VideoMAE(str(tmp_path))
    (videomae / "model.safetensors").rename(videomae / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"^--features .* has no config.json and model.safetensors"):
        pick_features(f"{{class_path: video.features.VideoMAE, init_args: {{folder: {videomae}}}}}")
    with pytest.raises(ValueError, match="--features i3d: neither"):
        pick_features("i3d")


def test_a_saved_reader_s_features_are_those_of_what_it_keeps(tmp_path: Path) -> None:
    reader = new_reader(ClipReader, [{"a": "0"}, {"a": "1"}], 0).eval()
    save_reader(reader, tmp_path / "reader")
    extractor, x = ReaderFeatures(tmp_path / "reader"), moving(2)
    expect_features(extractor, x, 96)
    assert torch.allclose(extractor(x), reader.features(reader.reduce(x)), atol=1e-6)


def test_the_default_features_are_those_of_a_reader_that_can_see() -> None:
    """The shipped one: what it reads of scenes that it was not trained on is mostly right, and sizes do not matter."""
    drawn = scenes(range(-1, -25, -1), "seen", SHAPE, FPS)
    clips = torch.stack([metrics.render(scene, 32, (48, 48), 2 * FPS) for _, scene in drawn])
    small = torch.stack([metrics.render(scene, 16, (32, 32), FPS) for _, scene in drawn])
    assert metrics.features(clips).shape == (24, 96)
    rows = score([{name: item.meta[name] for name in WORDS} for item, _ in drawn], read_with(clips))
    apart = (metrics.features(clips) - metrics.features(small)).square().mean()
    assert apart < 0.1 * metrics.features(small).var(0).mean()
    assert rows["background"]["right"] >= 22
    assert rows["motion"]["right"] >= 20


def read_with(clips: Tensor) -> list[Labels]:
    reader = ReaderFeatures(metrics.WORLD_READER).reader
    return read(reader, reader.reduce(clips))


def small_i3d() -> tuple[Inception, dict[str, Any]]:
    torch.manual_seed(0)
    net = Inception(5).eval()
    return net, {name: value for name, value in net.state_dict().items() if "num_batches" not in name}


def test_i3d_has_the_published_size_and_reads_the_port_s_names(tmp_path: Path) -> None:
    net, state = small_i3d()
    trunk = sum(p.numel() for name, p in net.named_parameters() if not name.startswith("logits"))
    assert trunk == pytest.approx(12.29e6, rel=2e-3)
    assert tuple(state["Conv3d_1a_7x7.conv3d.weight"].shape) == (64, 3, 7, 7, 7)
    assert tuple(state["Mixed_3b.b1b.conv3d.weight"].shape) == (128, 96, 3, 3, 3)
    assert tuple(state["Mixed_5c.b3b.bn.running_var"].shape) == (128,)
    assert tuple(state["logits.conv3d.bias"].shape) == (5,)
    save_file(state, tmp_path / "i3d.safetensors")
    extractor = I3D(str(tmp_path / "i3d.safetensors"), classes=5)
    found = extractor(moving(1)[..., :12, :12])  # 8 frames, of which it needs one more
    assert found.shape == (1, 5)
    assert bool(torch.isfinite(found).all())
    del state["Mixed_4f.b0.bn.bias"]
    save_file(state, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match="part.safetensors is not I3D of 5 classes: Mixed_4f.b0.bn.bias differ"):
        I3D(str(tmp_path / "part.safetensors"), classes=5)
