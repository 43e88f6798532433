"""Parameter groups: what decays, what is slow, what is frozen, in our modules and in those of others."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from audio.autoencoder import WaveAutoencoder
from mmdiff.autoencoder_module import AutoencoderModule
from mmdiff.backbones import DiT1D, UNet
from mmdiff.checkpoint import AtomicCheckpointIO
from mmdiff.conditioning import Text
from mmdiff.density import LogNormal
from mmdiff.model import DiffusionModel
from mmdiff.module import DiffusionModule
from mmdiff.parameters import ParameterGroups
from mmdiff.precond import EDM
from mmdiff.schedules import Cosine
from mmdiff.text import ByteTransformer
from tests.small_autoencoder import adversarial, network, trainer
from video.autoencoder import CausalVideo

NORMS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.Embedding)


def diffusion(backbone: Any = None, **settings: Any) -> DiffusionModule:
    net = backbone or UNet(1, 1, channels=8, multipliers=(1, 2), factors=[[1]], attend=[[], [[0]]], tokens_width=8,
                           cross=[False, True], vector_width=8, head_channels=4)  # fmt: skip
    return DiffusionModule(DiffusionModel(net, EDM(), Text(ByteTransformer(8, 1, 2))), LogNormal(), **settings)


def names(optimizer: torch.optim.Optimizer) -> dict[str, list[str]]:
    return {group["name"]: group["param_names"] for group in optimizer.param_groups}


@pytest.mark.parametrize(
    "module",
    [
        lambda: diffusion(),
        lambda: diffusion(DiT1D(1, width=16, depth=1, head_channels=8, tokens_width=8, vector_width=8)),
        lambda: AutoencoderModule(CausalVideo(channels=1, steps=[[2, 2, 2]], widths=[4]), adversarial=adversarial()),
        lambda: AutoencoderModule(WaveAutoencoder(strides=(2,), width=4)),
    ],
    ids=["unet", "dit", "video autoencoder", "audio autoencoder"],
)
def test_weights_of_linear_maps_decay_and_nothing_else(module: Any) -> None:
    module = module()
    built = module.configure_optimizers()
    optimizers = built if isinstance(built, list) else [built]
    found = {
        name: group["weight_decay"] for o in optimizers for group in o.param_groups for name in group["param_names"]
    }
    assert set(found) == {name for name, p in module.named_parameters() if p.requires_grad}
    for path, part in module.named_modules():
        for leaf, p in part.named_parameters(recurse=False):
            if p.requires_grad:
                linear = p.ndim > 1 and leaf in ("weight", "in_proj_weight") and not isinstance(part, NORMS)
                assert (found[f"{path}.{leaf}"] > 0) == linear, f"{path}.{leaf}"
    assert any(found.values())
    assert not all(found.values())


def test_gains_of_weight_norm_and_rows_of_embeddings_do_not_decay() -> None:
    class Foreign(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.table = weight_norm(nn.Conv1d(2, 2, 3)), nn.Embedding(5, 4)
            self.attend = nn.MultiheadAttention(4, 2)
            self.position = nn.Parameter(torch.zeros(6, 4))

    groups = ParameterGroups(no_decay=["attend.out_proj*"])
    module = Foreign()
    groups.freeze(module)
    found = names(groups.optimizer(torch.optim.AdamW, module))
    assert found["decay"] == ["conv.parametrizations.weight.original1", "attend.in_proj_weight"]
    assert {"table.weight", "position", "conv.parametrizations.weight.original0"} < set(found["no_decay"])


def test_rates_multiply_the_optimizers_and_follow_the_schedule_and_frozen_parts_stay() -> None:
    groups = ParameterGroups(
        frozen=["model.conditioner.*"], rates={"model.denoiser.*": 0.5, "model.denoiser.backbone.up.*": 0.1}
    )
    module = diffusion(
        groups=groups, optimizer=lambda p: torch.optim.AdamW(p, lr=0.2), scheduler=lambda o: Cosine(o, 10, warmup=2)
    )
    built = module.configure_optimizers()
    optimizer, scheduler = built["optimizer"], built["lr_scheduler"]["scheduler"]
    for n in range(10):
        for group in optimizer.param_groups:
            slow = {0.1 if ".up." in name else 0.5 for name in group["param_names"]}
            assert len(slow) == 1
            assert group["lr"] == pytest.approx(0.2 * slow.pop() * scheduler.factor(n) * min(1, (n + 1) / 2))
        optimizer.step()
        scheduler.step()
    assert {group["name"] for group in optimizer.param_groups} == {
        "decay_x0.5", "no_decay_x0.5", "decay_x0.1", "no_decay_x0.1"
    }  # fmt: skip
    assert not any(name.startswith("model.conditioner") for group in names(optimizer).values() for name in group)
    assert not any(p.requires_grad for p in module.model.conditioner.parameters())  # type: ignore[union-attr]


def test_both_optimizers_of_an_autoencoder_have_groups() -> None:
    groups = ParameterGroups(frozen=["model.encoder.0.*"], rates={"adversarial.*": 2.0})
    model, judges = AutoencoderModule(network(), adversarial=adversarial(), groups=groups).configure_optimizers()
    assert all(name.startswith("model.") for part in names(model).values() for name in part)
    assert not any(name.startswith("model.encoder.0.") for part in names(model).values() for name in part)
    assert [group["lr"] for group in judges.param_groups] == [0.002, 0.002]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frozen": ["model.denoiser.bakbone.*"]}, "frozen: no parameter's name matches 'model.denoiser.bakbone"),
        ({"rates": {"nothing": 0.1}}, "rates: no parameter's name matches 'nothing'; names are such as model"),
        ({"no_decay": ["x*"]}, "no_decay: no parameter's name matches"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        diffusion(groups=ParameterGroups(**settings))


def test_wrong_rates_and_nothing_to_train_are_refused() -> None:
    with pytest.raises(ValueError, match="rates\\['x'\\]=0 must be above 0 and finite; name what"):
        ParameterGroups(rates={"x": 0})
    with pytest.raises(ValueError, match="nothing trains: every parameter of DiffusionModule. is frozen"):
        diffusion(groups=ParameterGroups(frozen=["*"])).configure_optimizers()


@pytest.mark.parametrize("autoencoder", [False, True])
def test_a_scheduler_that_forgets_rates_is_refused(autoencoder: bool) -> None:
    def cycle(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)

    def module(groups: ParameterGroups) -> Any:
        if autoencoder:
            return AutoencoderModule(network(), scheduler=cycle, groups=groups)
        return diffusion(scheduler=cycle, groups=groups)

    module(ParameterGroups()).configure_optimizers()  # one rate for all is what it is for
    with pytest.raises(ValueError, match="OneCycleLR sets one rate for all parameters and forgets rates="):
        module(ParameterGroups(rates={"model.*.bias": 0.5})).configure_optimizers()


def test_resuming_with_other_trainable_parameters_names_the_difference(tmp_path: Path) -> None:
    from torch.utils.data import DataLoader

    items = [{"x": torch.randn(1, 8), "caption": "a", "rate": 8.0} for _ in range(2)]
    data = DataLoader(items, batch_size=2)  # type: ignore[arg-type]
    first = trainer(plugins=[AtomicCheckpointIO()], max_steps=1)
    first.fit(diffusion(), data)
    first.save_checkpoint(tmp_path / "x.ckpt")
    frozen = diffusion(groups=ParameterGroups(frozen=["model.conditioner.*"]))
    with pytest.raises(ValueError, match=r"no longer train, such as model.conditioner.* start a new run .*start_from"):
        trainer(plugins=[AtomicCheckpointIO()], max_steps=2).fit(frozen, data, ckpt_path=tmp_path / "x.ckpt")
