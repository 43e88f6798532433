"""Guidance inside a `Generate` stage: what it binds, one call of the network for all conditions, what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmdiff.autoencoder import Pool
from mmdiff.backbones import UNet
from mmdiff.cascade import Cascade, Clip, Generate
from mmdiff.conditioning import Cond, Conditioner, Join, LowRes, Text
from mmdiff.guidance import APG, Autoguidance, Cfg, CfgZero, Classifier, Compose, Guidance, Interval, Rescale, together
from mmdiff.io import build, save
from mmdiff.model import Bound, DiffusionModel
from mmdiff.precond import EDM
from mmdiff.sampling import Ancestral, seeded_noise
from mmdiff.sigmas import Karras
from mmdiff.text import ByteTransformer

GRID = Karras(sigma_max=10)
CAPTIONS = ["a dog", "two very loud cats in the rain"]
UPSAMPLER = {"tokens_width": 0, "vector_width": 0, "concat_channels": 2}


def moved(module: Any, seed: int = 3) -> Any:
    """The module in eval mode with every weight off its start, where a network gives zero."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return module.eval()


def text() -> Text:
    torch.manual_seed(2)
    return Text(ByteTransformer(8, 1, 2))


def model(conditioner: Conditioner | None = None, seed: int = 3, **settings: Any) -> DiffusionModel:
    sizes = {"tokens_width": 8, "vector_width": 8, **settings}
    net = UNet(2, 1, channels=8, multipliers=(1, 1), head_channels=8, **sizes)
    return moved(DiffusionModel(net, EDM(), conditioner or text()), seed)


def sample(
    guidance: Guidance | float, net: DiffusionModel | None = None, captions: list[str] = CAPTIONS, **given: Any
) -> Tensor:
    stage = Generate(net or model(), GRID, Ancestral(), steps=4, guidance=guidance)
    noise = seeded_noise(range(len(captions)))
    return stage({"caption": captions}, shape=(1, 4, 4), rate=4.0, noise=noise, **given).data


def by_hand(rule: Guidance, net: DiffusionModel, pos: Any, neg: Any) -> Tensor:
    """The same run without the stage: a rule over two closures, called one by one."""
    noise, sigmas = seeded_noise([0, 1]), GRID(4)
    x = noise(torch.empty(2, 1, 4, 4)) * (1 + float(sigmas[0]) ** 2) ** 0.5
    with torch.inference_mode():
        ends = [lambda x, s, c=cond: net.denoiser(x, s, c) for cond in (pos, neg)]
        return Ancestral()(rule(ends[0], ends[1], sigmas), x, sigmas, noise)


@pytest.mark.parametrize("rule", [Cfg(3.0), APG(3.0), CfgZero(3.0), Rescale(3.0)], ids=lambda rule: type(rule).__name__)
def test_a_stage_guides_away_from_null_or_the_negative_prompt(rule: Guidance) -> None:
    net = model()
    pos, null = net.condition({"caption": CAPTIONS}), net.null({"caption": CAPTIONS})
    torch.testing.assert_close(sample(rule, net), by_hand(rule, net, pos, null), rtol=1e-4, atol=1e-5)
    rain = {"caption": ["rain"] * 2}
    away = sample(rule, net, negative=rain)
    torch.testing.assert_close(away, by_hand(rule, net, pos, net.condition(rain)), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(away, sample(rule, net), atol=1e-4)


def test_a_number_is_cfg() -> None:
    net = model()
    assert torch.equal(sample(3.0, net), sample(Cfg(3.0), net))
    assert torch.equal(sample(3, net), sample(Cfg(3.0), net))


@pytest.mark.parametrize("shape", [(), (2,), (2, 4)])
def test_conditions_of_one_network_are_one_call_of_it(shape: tuple[int, ...]) -> None:
    """Equal to the calls one by one to 1e-6, with prompts of other lengths, which are padded."""
    net = model(Join([text(), LowRes(Pool([1, 2]))]), concat_channels=2)
    x, low = torch.randn(2, 1, 4, 4), {"low": torch.randn(2, 1, 4, 2), "low_noise": torch.zeros(2, 1, 4, 2)}
    sigma = torch.rand(shape) + 0.5
    bound = [net.bind(net.condition({"caption": [a, b], **low})) for a, b in (CAPTIONS, ("", ""), ("rain", "snow"))]
    calls: list[int] = []
    net.denoiser.backbone.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    with torch.inference_mode():
        found = together(bound, x, sigma)
        assert calls == [6]
        for one, denoise in zip(found, bound, strict=True):
            torch.testing.assert_close(one, denoise(x, sigma), rtol=1e-6, atol=1e-6)


def test_other_networks_and_closures_are_called_one_by_one() -> None:
    one, other = model(), model(seed=4)
    conds = {"caption": CAPTIONS}
    bound = [one.bind(one.condition(conds)), other.bind(other.condition(conds)), lambda x, sigma: 2 * x]
    x, sigma = torch.randn(2, 1, 4, 4), torch.tensor(1.0)
    with torch.inference_mode():
        for found, denoise in zip(together(bound, x, sigma), bound, strict=True):
            assert torch.equal(found, denoise(x, sigma))
        assert torch.equal(together(bound[:1], x, sigma)[0], bound[0](x, sigma))
    bare = DiffusionModel(UNet(2, 1, channels=8, multipliers=(1,), head_channels=8), EDM()).eval()
    for cond in (None, Cond()):
        found = together([Bound(bare.denoiser, cond), Bound(bare.denoiser, None)], x, sigma)
        assert torch.equal(found[0], found[1])


def test_compose_binds_further_prompts() -> None:
    net = model()
    with torch.inference_mode():
        bind = lambda caption: net.bind(net.condition({"caption": [caption] * 2}))
        pos, neg, other = net.bind(net.condition({"caption": CAPTIONS})), bind(""), bind("rain")

        def expected(x: Tensor, sigma: Tensor) -> Tensor:
            d = neg(x, sigma)
            return d + 3 * (pos(x, sigma) - d) - 1.5 * (other(x, sigma) - d)

        noise, sigmas = seeded_noise([0, 1]), GRID(4)
        x = noise(torch.empty(2, 1, 4, 4)) * (1 + float(sigmas[0]) ** 2) ** 0.5
        by_formula = Ancestral()(expected, x, sigmas, noise)
    torch.testing.assert_close(sample(Compose({"rain": -1.5}), net), by_formula, rtol=1e-4, atol=1e-5)


def test_autoguidance_binds_the_prompt_to_the_weaker_model(tmp_path: Path) -> None:
    net, weak = model(), model(seed=5)
    pos, low = (m.condition({"caption": CAPTIONS}) for m in (net, weak))
    noise, sigmas = seeded_noise([0, 1]), GRID(4)
    x = noise(torch.empty(2, 1, 4, 4)) * (1 + float(sigmas[0]) ** 2) ** 0.5
    with torch.inference_mode():
        ends = net.bind(pos), weak.bind(low)
        by_formula = Ancestral()(lambda x, s: ends[1](x, s) + 2.5 * (ends[0](x, s) - ends[1](x, s)), x, sigmas, noise)
    torch.testing.assert_close(sample(Autoguidance(weak, 2.5), net), by_formula, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(sample(Autoguidance(weak, Interval(2.5, 1.0, 5.0)), net), by_formula, atol=1e-4)

    backbone = {"axes": 2, "in_channels": 1, "channels": 8, "multipliers": [1, 1], "head_channels": 8}
    words = {"class_path": "mmdiff.text.ByteTransformer", "init_args": {"width": 8, "depth": 1, "heads": 2}}
    tree = {"class_path": "mmdiff.model.DiffusionModel", "init_args": {
        "backbone": {"class_path": "mmdiff.backbones.UNet",
                     "init_args": {**backbone, "tokens_width": 8, "vector_width": 8}},
        "precond": {"class_path": "mmdiff.precond.EDM"},
        "conditioner": {"class_path": "mmdiff.conditioning.Text", "init_args": {"encoder": words}}}}  # fmt: skip
    save(weak, tree, tmp_path / "weak")
    spec = {
        "class_path": "mmdiff.guidance.Autoguidance",
        "init_args": {"weak": str(tmp_path / "weak"), "guidance": 2.5},
    }
    stored = build(spec)
    torch.testing.assert_close(sample(stored, net), by_formula, rtol=1e-4, atol=1e-5)
    assert repr(stored) == f"Autoguidance(weak={str(tmp_path / 'weak')!r}, guidance=2.5)"


class Bright(nn.Module):
    """Logits of dark and bright."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.eval()

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        mean = self.gain * x.flatten(1).mean(dim=1) / (1 + sigma)
        return torch.stack([-mean, mean], dim=1)


def test_a_classifier_pushes_where_the_stage_allows_no_gradient() -> None:
    net = model()
    plain, bright, dark = (
        sample(1.0, net),
        sample(Classifier(Bright(), 1, 5.0), net),
        sample(Classifier(Bright(), 0, 5.0), net),
    )
    assert (bright.mean(dim=(1, 2, 3)) > plain.mean(dim=(1, 2, 3)) + 0.01).all()
    assert (dark.mean(dim=(1, 2, 3)) < plain.mean(dim=(1, 2, 3)) - 0.01).all()
    assert repr(Classifier(Bright(), 1, 5.0)) == "Classifier(classifier=Bright, target=1, scale=5.0, guidance=1.0)"


def test_guidance_that_could_change_nothing_is_refused() -> None:
    """Before: a guided upsampler without prompts ran twice as long and gave the same clip."""
    upsampler = model(LowRes(Pool([1, 2])), **UPSAMPLER)
    bare = DiffusionModel(UNet(2, 1, channels=8, multipliers=(1,), head_channels=8), EDM()).eval()
    for net in (upsampler, model(Join([LowRes(Pool([1, 2]))]), **UPSAMPLER), bare):
        for guidance in (2.0, 0.0, APG(3.0)):
            with pytest.raises(ValueError, match="would change nothing: the model has no prompt or class") as caught:
                Generate(net, GRID, Ancestral(), guidance=guidance)
            assert "\n" not in str(caught.value)
        assert Generate(net, GRID, Ancestral(), guidance=1.0).rule == Cfg(1.0)
    start = Clip(torch.randn(2, 1, 4, 2), 4.0)
    for rule in (Classifier(Bright(), 1), Autoguidance(model(LowRes(Pool([1, 2])), 5, **UPSAMPLER))):
        assert not torch.allclose(sample(rule, upsampler, start=start), sample(1.0, upsampler, start=start), atol=1e-4)


@pytest.mark.parametrize("rule", [1.0, Interval(1.0), Rescale(1.0), Classifier(Bright(), 1)], ids=repr)
def test_a_negative_prompt_that_no_rule_reads_is_refused(rule: Guidance | float) -> None:
    cascade = Cascade({"base": Generate(model(), GRID, Ancestral(), 2, rule)}, (1, 4, 4), 4.0)
    with pytest.raises(ValueError, match="a negative prompt has no effect at guidance=1, nor with a rule"):
        cascade({"caption": ["x"]}, noise=seeded_noise([0]), negative={"caption": ["y"]})


def test_the_rule_has_the_grid_that_is_sampled() -> None:
    seen: list[Tensor] = []

    class Spy(Cfg):
        def __call__(self, pos: Any, neg: Any, sigmas: Tensor, bind: Callable[..., Any] | None = None) -> Any:
            seen.append(sigmas)
            return super().__call__(pos, neg, sigmas, bind)

    sample(Spy(2.0))
    assert torch.equal(seen[0], GRID(4))
