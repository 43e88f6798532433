"""The recipes of text to video: every stage with either backbone and every objective trains, and makes clips."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from mmdiff.backbones import SpatioTemporalDiT, UNet
from mmdiff.cascade import Clip, Generate
from mmdiff.config import build, dump_config, read_config, trust_policy
from mmdiff.footprint import first_batch, instantiate, parsed
from mmdiff.io import save
from mmdiff.module import DiffusionModule
from mmdiff.precond import EDM, X0, Flow, V
from mmdiff.sampling import Ancestral, seeded_noise
from mmdiff.sigmas import Karras

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "video"
SMALL = {  # besides what the recipe says: a clip of 4 frames of 16x16, in networks that are narrow
    "data": {"init_args": {"count": 8, "val_count": 2, "frames": 4, "size": [16, 16], "batch_size": 2}},
    "model": {"init_args": {"model": {"init_args": {"backbone": {"init_args": {}}}}}},
}
NARROW = {"unet": {"channels": 16, "head_channels": 16}, "dit": {"width": 32, "depth": 2, "head_channels": 16}}
STAGES = {"world": 1, "world_interpolate": 2, "world_up": 1}  # frames of the clip for one of the clip before
OBJECTIVES = {"own": None, "edm": EDM, "v": V, "flow": Flow}
QUICK = [
    ("world", "dit", "own"), ("world_interpolate", "dit", "flow"), ("world_up", "dit", "v"), ("world", "unet", "edm"),
]  # fmt: skip
ALL = [case for case in itertools.product(STAGES, NARROW, OBJECTIVES) if case not in QUICK]


@pytest.fixture(autouse=True)
def _trusted() -> None:
    trust_policy([])


def recipe(folder: Path, *names: str, narrow: str, changes: dict[str, Any] | None = None) -> str:
    """The layers of a recipe, as `instantiate` reads them, the last of which makes it small."""
    small: dict[str, Any] = {**SMALL, "model": {"init_args": {**(changes or {})}}}
    model = small["model"]["init_args"].setdefault("model", {"init_args": {}})
    model["init_args"]["backbone"] = {"init_args": NARROW[narrow]}
    (folder / "small.yaml").write_text(dump_config(small))
    return "+".join([*(str(CONFIGS / f"{name}.yaml") for name in names), str(folder / "small.yaml")])


def check_trains_and_samples(config: str) -> DiffusionModule:
    """A step reaches every weight, and the model makes finite clips of the size that it was trained on."""
    module, data, _ = instantiate(config)
    assert isinstance(module, DiffusionModule)
    batch = first_batch(data, config)
    module.model.train()
    optimizer = torch.optim.SGD(module.parameters(), 1e-3)
    for _ in range(2):  # at first the last layer, which starts at zero, alone has a gradient
        optimizer.zero_grad()
        module.losses(batch, (0, 0))["loss"].backward()
        optimizer.step()
    gradients = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    assert all(g is not None and bool(g.isfinite().all()) for g in gradients.values())
    stage = Generate(module.model.eval(), Karras(0.02, 80), Ancestral(), steps=2)
    latents, lowres = module.model.latents(batch), stage.lowres()
    start = None if lowres is None else Clip(lowres.degrade.encode(latents), 8.0)
    made = stage(batch, start, shape=tuple(latents.shape[1:]), rate=16.0, noise=seeded_noise([0, 1])).data
    assert made.shape == latents.shape
    assert bool(made.isfinite().all())
    assert float(made.std()) > 1e-3
    return module


def check_case(case: tuple[str, str, str], folder: Path) -> None:
    stage, backbone, objective = case
    names = [
        stage,
        *(["dit"] if backbone == "dit" else []),
        *([f"objective/{objective}"] if objective != "own" else []),
    ]
    module = check_trains_and_samples(recipe(folder, *names, narrow=backbone))
    kind = OBJECTIVES[objective] or {"world": X0}.get(stage, EDM)
    assert isinstance(module.model.denoiser.precond, kind)
    network = module.model.denoiser.backbone
    assert isinstance(network, SpatioTemporalDiT if backbone == "dit" else UNet)


@pytest.mark.parametrize("case", QUICK, ids="-".join)
def test_a_stage_trains_and_samples_with_another_backbone_or_objective(
    case: tuple[str, str, str], tmp_path: Path
) -> None:
    check_case(case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL, ids="-".join)
def test_every_stage_backbone_and_objective_trains_and_samples(case: tuple[str, str, str], tmp_path: Path) -> None:
    check_case(case, tmp_path)


@pytest.mark.parametrize("stage", STAGES)
def test_a_dit_in_the_place_of_a_unet_keeps_what_the_stage_says_of_its_clips(stage: str) -> None:
    def backbone(*names: str) -> dict[str, Any]:
        _, given, _ = parsed("+".join(str(CONFIGS / f"{name}.yaml") for name in names))
        tree: dict[str, Any] = given.as_dict()["model"]["init_args"]["model"]["init_args"]["backbone"]["init_args"]
        return tree

    before, after = backbone(stage), backbone(stage, "dit")
    kept = ("in_channels", "concat_channels", "tokens_width", "vector_width", "patch")
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert after["attend"] == [[1, 2], [0]]
    assert not {"channels", "multipliers", "factors"} & set(after)


def test_objectives_train_where_video_is_learned_and_sample_in_the_same_place() -> None:
    """Half of the draws are above sigma 1.5 in all three, and a grid's middle is within a factor of 4 of theirs."""
    for name in ("edm", "v", "flow"):
        tree = read_config(CONFIGS / "objective" / f"{name}.yaml")["model"]["init_args"]
        density = build(tree["density"])
        median = float(density.quantile(torch.tensor(0.5, dtype=torch.float64)))
        assert 1.5 < median < 4, name
        stage = read_config(CONFIGS / "objective" / f"{name}_cascade.yaml")["stages"]["base"]["init_args"]
        middle = float(build(stage["sigmas"])(stage["steps"])[stage["steps"] // 2])
        assert median / 4 < middle < 4 * median, name


def test_the_latent_recipe_trains_in_the_space_of_its_autoencoder(tmp_path: Path) -> None:
    """The autoencoder's recipe and the model's name one and the same network; a given frame is a given latent."""
    layers = "+".join(str(CONFIGS / f"{name}.yaml") for name in ("autoencoder", "world_autoencoder"))
    _, given, _ = parsed(layers)
    trained = given.as_dict()["model"]["init_args"]["model"]
    torch.manual_seed(0)
    folder = save(build(trained), trained, tmp_path / "autoencoder")
    config = recipe(
        tmp_path, "world", "world_latent", "objective/v", narrow="unet", changes={"autoencoder_weights": str(folder)}
    )
    module = check_trains_and_samples(config)
    space = module.model.autoencoder
    assert space.latent_shape((3, 16, 32, 32)) == (8, 16, 8, 8)
    known = torch.zeros(1, 1, 16, 32, 32, dtype=torch.bool)
    known[:, :, 3] = True
    assert space.known(known).flatten(2)[0, 0].reshape(16, -1).all(1).nonzero().flatten().tolist() == [3]


def test_clips_and_stills_train_one_network(tmp_path: Path) -> None:
    """Both come, as their shares say; the model makes either; and a still's loss moves what a clip's does."""
    tree = read_config(CONFIGS / "world_joint.yaml")
    parts = tree["data"]["init_args"]["parts"]
    assert [part["init_args"]["frames"] for part in parts] == [16, 1]
    assert [part["init_args"]["world"] for part in parts] == [parts[0]["init_args"]["world"]] * 2
    small = [{**p["init_args"], "count": 24, "val_count": 2, "size": [16, 16], "batch_size": 2} for p in parts]
    small[0]["frames"] = 4
    changes = {"model": {"init_args": {"backbone": {"init_args": NARROW["unet"]}}}}
    data = {"parts": [{**part, "init_args": args} for part, args in zip(parts, small, strict=True)]}
    (tmp_path / "small.yaml").write_text(dump_config({"model": {"init_args": changes}, "data": {"init_args": data}}))
    config = "+".join([str(CONFIGS / "world.yaml"), str(CONFIGS / "world_joint.yaml"), str(tmp_path / "small.yaml")])
    module, mixed, _ = instantiate(config)
    assert isinstance(module, DiffusionModule)
    batches = list(mixed.train_dataloader())
    lengths = [batch["x"].shape[2] for batch in batches]
    assert sorted(lengths) == [1] * 4 + [4] * 12
    stage = Generate(module.model, Karras(0.02, 80), Ancestral(), steps=2)
    for length in (1, 4):
        module.model.train()
        batch = batches[lengths.index(length)]
        module.zero_grad()
        module.losses(batch, (0, 0))["loss"].backward()
        head = [p.grad for p in module.model.denoiser.backbone.parameters() if p.grad is not None]
        assert any(float(g.abs().max()) > 0 for g in head)
        module.model.eval()
        made = stage(batch, shape=(3, length, 16, 16), rate=8.0, noise=seeded_noise([0, 1])).data
        assert made.shape == (2, 3, length, 16, 16)
        assert bool(made.isfinite().all())
