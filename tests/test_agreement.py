"""What a network is sampled with is what it was trained with, for every shipped config: compared at the network."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmdiff.autoencoder import Autoencoder, Pool
from mmdiff.backbones import UNet
from mmdiff.backbones.condition import check_input
from mmdiff.cascade import Cascade, Clip, Decode, Generate, Stage
from mmdiff.conditioning import Batch, Cond, LowRes, Text
from mmdiff.config import build, read_config
from mmdiff.density import LogNormal, Shifted, SigmaDensity
from mmdiff.io import save
from mmdiff.levels import Levels
from mmdiff.model import DiffusionModel
from mmdiff.module import DiffusionModule
from mmdiff.precond import Flow
from mmdiff.sampling import Ancestral, seeded_noise
from mmdiff.sigmas import Flow as FlowGrid
from mmdiff.sigmas import ResolutionShift
from tests.test_configs import training

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
TOLERANCE = 1e-6


def trained_config(cascade: Path, model: str) -> Path:
    """The training config of the model that a stage names."""
    stem = cascade.stem.removesuffix("_cascade")
    name = stem if model == "base" else f"{stem}_{model}"
    return cascade.with_name(f"{name}.yaml")


CASCADES = sorted(CONFIGS.rglob("*_cascade.yaml"))
STAGES = [
    (path, name)
    for path in CASCADES
    for name, stage in read_config(path)["stages"].items()
    if "model" in stage["init_args"]
]


class Spy(nn.Module):
    """In the place of a backbone: keeps what it is given, has the backbone check it, and predicts nought."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        names = ("in_channels", "multiples", "tokens_width", "vector_width", "concat_channels")
        built = {name: getattr(backbone, name) for name in names} if isinstance(backbone, UNet) else None
        self.check = (lambda *given: None) if built is None else partial(check_input, **built)
        self.calls: list[tuple[Tensor, Tensor, Cond | None]] = []

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        assert len(args) == 3, "x, c_noise, cond and nothing else: positions follow from x's shape"
        assert not kwargs
        self.check(*args)
        self.calls.append(args)
        return self.weight * args[0]


@dataclass(frozen=True)
class At(Levels):
    """One noise level for all."""

    sigma: float

    def __call__(self, density: SigmaDensity, x0: Tensor, generator: torch.Generator) -> Tensor:
        return torch.full((len(x0),), self.sigma)


def cascade_of(path: Path) -> Cascade:
    """The cascade, its models fresh and their backbones spied upon."""
    tree = read_config(path)
    stages: dict[str, Stage] = {}
    for name, stage in tree["stages"].items():
        args = dict(stage["init_args"])
        for argument in {"model", "autoencoder"} & {k for k, v in args.items() if isinstance(v, str)}:
            model = training(trained_config(path, args[argument]))["model"]["init_args"]["model"]
            args[argument] = model["init_args"].get("autoencoder", model) if argument == "autoencoder" else model
        made = build({**stage, "init_args": args})
        assert isinstance(made, Stage)
        if isinstance(made, Generate):
            made.model.denoiser.backbone = Spy(made.model.denoiser.backbone)
            made.model.eval()
        stages[name] = made
    (channels, steps, *sizes), multiple, offset = tree["shape"], tree.get("multiple", 1), tree.get("offset", 0)
    made = steps + (offset - steps) % multiple  # before it is cut
    return Cascade(stages, (channels, made, *sizes), tree["rate"], multiple, offset)


@dataclass(frozen=True)
class Case:
    """A stage with what it is sampled on, and the module that trains its model."""

    stage: Generate
    module: DiffusionModule
    shape: tuple[int, ...]
    low: Clip | None
    prompt: Batch

    def sample(self) -> list[tuple[Tensor, Tensor, Tensor, Tensor, Cond | None]]:
        """(x, sigma) that the sampler asks about, and (input, c_noise, cond) that reach the network, call by call."""
        asked: list[tuple[Tensor, Tensor]] = []
        denoiser = self.stage.model.eval().denoiser
        handle = denoiser.register_forward_pre_hook(lambda module, args: asked.append((args[0], args[1])))
        spy = denoiser.backbone
        spy.calls.clear()
        self.stage(self.prompt, self.low, shape=self.shape, rate=1.0, noise=seeded_noise([7]))
        handle.remove()
        return [(x, sigma, *call) for (x, sigma), call in zip(asked, spy.calls, strict=True)]

    def train(
        self, latents: Tensor, sigma: float, monkeypatch: pytest.MonkeyPatch
    ) -> tuple[Tensor, Tensor, Cond | None]:
        """(input, c_noise, cond) that reach the network in training."""
        spy = self.module.model.train().denoiser.backbone
        spy.calls.clear()
        monkeypatch.setattr(self.module, "levels", At(sigma))
        monkeypatch.setattr(self.module.model, "encode", lambda x: latents)
        self.module.losses({"x": latents, **self.prompt}, (0, 0, 0))
        monkeypatch.undo()
        (call,) = spy.calls
        return call


def case_of(path: Path, name: str, tmp_path: Path) -> Case:
    cascade = cascade_of(path)
    plan = cascade.plan(tuple(cascade.shape), cascade.rate)
    index = list(cascade.stages).index(name)
    stage = cascade.stages[name]
    assert isinstance(stage, Generate)
    tree = training(trained_config(path, read_config(path)["stages"][name]["init_args"]["model"]))
    settings = tree["model"]["init_args"]
    weights = None
    if any(True for _ in stage.model.autoencoder.parameters()):
        weights = str(save(stage.model.autoencoder, settings["model"]["init_args"]["autoencoder"], tmp_path / "ae"))
    module = DiffusionModule(stage.model, build(settings["density"]), autoencoder_weights=weights)
    low = None if stage.needs(*plan[index]) is None else Clip(torch.randn(1, *plan[index - 1][0]), 1.0)
    return Case(stage, module, plan[index][0], low, {"caption": ["a red circle moves left"]})


cases = pytest.mark.parametrize(("path", "name"), STAGES, ids=[f"{p.stem}-{n}" for p, n in STAGES])


def test_every_diffusion_config_is_sampled_by_some_cascade() -> None:
    compared = {trained_config(p, read_config(p)["stages"][n]["init_args"]["model"]) for p, n in STAGES}
    trainings = {
        path
        for path in CONFIGS.rglob("*.yaml")
        if "overfit" not in path.parts and "model" in read_config(path)
        if not path.stem.endswith("_cascade") and training(path)["model"]["class_path"].endswith(".DiffusionModule")
    }
    assert compared == trainings


@cases
def test_level_and_scale_at_the_network(path: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every level that sampling visits: the same c_noise, and the same factor from x0 + sigma eps to the input."""
    case = case_of(path, name, tmp_path)
    sampled = case.sample()
    grid = case.stage.sigmas.sized(case.shape[1:])(case.stage.steps)
    visited = {float(sigma) for _, sigma, *_ in sampled}
    assert visited == set(grid[:-1].tolist()), "sampling asked about other levels than its grid's"
    latents = torch.randn(1, *case.shape)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(hash((0,) * 5) % 2**63))
    for x, sigma, given, c_noise, cond in sampled:
        trained, trained_c_noise, shown = case.train(latents, float(sigma), monkeypatch)
        x, noised = around(x, cond), around(latents + sigma * noise, shown)
        assert torch.equal(c_noise, trained_c_noise.expand_as(c_noise))
        assert given.shape[1:] == trained.shape[1:]
        factors = [float((a * b).sum() / (b * b).sum()) for a, b in ((given, x), (trained, noised))]
        assert factors[0] == pytest.approx(factors[1], rel=TOLERANCE)
        torch.testing.assert_close(given, factors[0] * x, rtol=1e-5, atol=1e-6)  # a factor and nothing else
    first, sigma = sampled[0][:2]
    drawn = seeded_noise([7])(torch.empty(1, *case.shape))
    start = drawn * torch.hypot(torch.ones(()), sigma)
    free = torch.ones(case.shape[1], dtype=torch.bool)
    if (lowres := case.stage.lowres()) is not None and lowres.degrade.every is not None:
        free[:: lowres.degrade.every] = False  # the low clip's own steps start at their own clean values
    torch.testing.assert_close(first[:1, :, free], start[:, :, free], rtol=TOLERANCE, atol=TOLERANCE * float(sigma))


def around(x: Tensor, cond: Cond | None) -> Tensor:
    """What is denoised: x, or its difference from the condition's mean."""
    return x if cond is None or cond.mean is None else x - cond.mean


@cases
def test_condition_at_the_network(path: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same slots, of the same widths; and what guidance guides away from is what training drops to."""
    case = case_of(path, name, tmp_path)
    cond = case.sample()[0][-1]
    latents = torch.randn(1, *case.shape)
    for rate in (0.0, 1.0):
        for text in [m for m in case.stage.model.modules() if isinstance(m, Text)]:
            text.dropout = rate
        trained = case.train(latents, 1.0, monkeypatch)[2]
        assert (cond is None) == (trained is None)
        if cond is None or trained is None:
            continue
        for slot in ("tokens", "mask", "vector", "concat"):
            a, b = getattr(cond, slot), getattr(trained, slot)
            assert (a is None) == (b is None), slot
            if a is not None:
                assert a.dtype == b.dtype
                assert a.shape[-1] == b.shape[-1] or slot == "mask"
                assert slot != "concat" or a.shape[1:] == b.shape[1:]
        if rate == 1.0:
            null = case.stage.model.eval().null({**case.prompt, "latents": latents})
            assert null is not None
            for slot in ("tokens", "mask", "vector"):
                a, b = getattr(null, slot), getattr(trained, slot)
                assert (a is None) == (b is None)
                assert a is None or torch.allclose(a.float(), b.float(), rtol=0, atol=TOLERANCE), slot


@cases
def test_sampling_stays_where_training_has_been(path: Path, name: str, tmp_path: Path) -> None:
    """The grid's ends have at least 1e-4 of the training's draws beyond them; for `tiny` configs 1e-7.

    The tiny ones train for seconds and sample on EDM's own ends, 0.002 and 80, of which its own density has 1e-6.
    """
    case = case_of(path, name, tmp_path)
    share = 1e-7 if path.parent.name == "tiny" else 1e-4
    density = case.module.density.sized(case.shape[1:])
    low, high = density.quantile(torch.tensor([share, 1 - share], dtype=torch.float64)).tolist()
    grid = case.stage.sigmas.sized(case.shape[1:])(case.stage.steps)[:-1]
    assert low <= float(grid.min())
    assert float(grid.max()) <= high


@cases
def test_low_clips_are_as_noisy_as_in_training(path: Path, name: str, tmp_path: Path) -> None:
    case = case_of(path, name, tmp_path)
    lowres = case.stage.lowres()
    if lowres is None:
        assert case.low is None
        return
    assert case.low is not None
    used = case.sample()[0][-1]
    assert used is not None
    assert used.concat is not None
    level = float(used.concat[:, -1].unique())
    batch = {"latents": torch.randn(400, *case.shape[:2], *[8] * len(case.shape[2:]))}
    drawn = lowres.train()(batch, [torch.Generator().manual_seed(i) for i in range(400)]).concat
    assert drawn is not None
    levels = drawn[:, -1].flatten(1)[:, 0]
    assert levels.min() < level < levels.max()
    assert float(levels.max()) == pytest.approx(lowres.noise, rel=0.02)


@pytest.mark.parametrize("path", CASCADES, ids=lambda p: p.stem)
def test_each_stage_is_given_what_it_was_trained_on(path: Path) -> None:
    """An upsampler's own low clips are the latents of the stage before; a decoder decodes the latents it encodes."""
    cascade = cascade_of(path)
    x = torch.randn(2, *cascade.shape).clamp(-1, 1)
    stages = list(cascade.stages.values())
    plan = cascade.plan(tuple(cascade.shape), cascade.rate)
    encoded: Tensor | None = None
    for index, (stage, (shape, rate)) in enumerate(zip(stages, plan, strict=True)):
        if isinstance(stage, Decode):
            share_weights(stages[index - 1], stage.autoencoder)
            given = latents = stage.autoencoder.encode(x)
        else:
            assert isinstance(stage, Generate)
            latents = stage.model.encode(x)
            if latents.shape[1:] != shape:  # trained on clips of its own size, from which another is rendered
                name = read_config(path)["stages"][list(cascade.stages)[index]]["init_args"]["model"]
                data = training(trained_config(path, name))["data"]["init_args"]
                assert (3, data["frames"], *data["size"], data["fps"]) == (*shape, rate)
                encoded = None
                continue
            given = latents if index == 0 else stage.lowres().degrade.encode(latents)  # type: ignore[union-attr]
        if encoded is not None:
            torch.testing.assert_close(encoded, given, rtol=TOLERANCE, atol=TOLERANCE)
        encoded = latents


def share_weights(before: Stage, autoencoder: Autoencoder) -> None:
    """Gives a decoder, built on its own from its config, the weights that the model before it has been trained in."""
    assert isinstance(before, Generate)
    autoencoder.load_state_dict(before.model.autoencoder.state_dict())
    autoencoder.eval()


class Plain(nn.Module):
    """Network of no axes in particular."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, c_noise: Tensor, cond: object = None) -> Tensor:
        return self.weight * x


@pytest.mark.parametrize("steps", [8, 32])
def test_a_shift_by_size_is_the_same_in_training_and_in_sampling(steps: int) -> None:
    """Both go by the size of the latents; the shift applies once. At 4 latent steps it is 1."""
    model = DiffusionModel(Spy(Plain()), Flow(), autoencoder=Pool([2])).eval()
    shift, expected = ResolutionShift(4), (steps / 2 / 4) ** 0.5
    density = LogNormal(0.0, 1e-6)  # every draw is 1 before the shift
    module = DiffusionModule(model, Shifted(density, shift))
    module.losses({"x": torch.randn(1, 1, steps)}, (0, 0, 0))
    stage = Generate(model, FlowGrid(shift=shift), Ancestral(), steps=2)
    stage({"caption": ["x"]}, shape=(1, steps // 2), rate=1.0, noise=seeded_noise([0]))
    trained, *sampled = (float(c_noise / (1 - c_noise)) for _, c_noise, _ in model.denoiser.backbone.calls)
    plain = replace(stage, sigmas=FlowGrid()).sigmas(2)[:-1]
    assert trained == pytest.approx(expected, rel=1e-4)
    assert sampled == pytest.approx([expected * float(level) for level in plain], rel=1e-3)


def test_the_tests_above_see_an_upsampler_and_a_prompt() -> None:
    models = [cascade_of(path).stages[name].model for path, name in STAGES]  # type: ignore[attr-defined]
    kinds = {type(m) for model in models for m in model.modules()}
    assert {LowRes, Text} <= kinds
