"""Hints as a condition: from the batch or from the data, and with a ControlNet in training."""

from pathlib import Path

import pytest
import torch
from torch import nn

from mmdiff.autoencoder import Pool
from mmdiff.backbones import ControlNet, UNet
from mmdiff.conditioning import Conditioner, Hint, Join, Label
from mmdiff.density import LogNormal
from mmdiff.io import save
from mmdiff.model import DiffusionModel
from mmdiff.module import DiffusionModule
from mmdiff.precond import EDM
from video.hints import Edges


def test_a_hint_comes_from_the_batch_or_else_from_the_data() -> None:
    x, given = torch.rand(2, 3, 2, 8, 8), torch.rand(2, 1, 2, 8, 8)
    hint = Hint(Edges(), key="edges", shrink=Pool([1, 2, 2]))
    assert torch.equal(hint({"x": x}).concat, Pool([1, 2, 2]).encode(Edges()(x)))
    assert torch.equal(hint({"x": x, "edges": given}).concat, Pool([1, 2, 2]).encode(given))
    assert torch.equal(hint.null({"edges": given}).concat, hint({"edges": given}).concat)
    with pytest.raises(ValueError, match="the batch has no 'edges'; give the hint"):
        hint({"caption": ["a"]})
    with pytest.raises(ValueError, match="the batch has no 'hint'"):
        Hint()({"x": x})


def test_a_hint_of_time_alone_is_spread_over_the_other_axes() -> None:
    given = torch.rand(2, 12, 5)
    concat = Hint(spread=[4])({"hint": given}).concat
    assert concat.shape == (2, 12, 5, 4)
    assert all(torch.equal(concat[..., f], given) for f in range(4))


def test_a_part_with_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="transform=Linear has parameters"):
        Hint(nn.Linear(2, 2))


def labelled(net: nn.Module, conditioner: Conditioner) -> DiffusionModel:
    return DiffusionModel(net, EDM(0.5), conditioner)


def test_a_control_net_starts_from_the_model_that_it_steers(tmp_path: Path) -> None:
    settings = {"in_channels": 3, "channels": 8, "multipliers": [1], "head_channels": 4, "vector_width": 6}
    trained = labelled(UNet(3, **settings), Label("y", 3, 6)).eval()
    nn.init.normal_(trained.denoiser.backbone.head.weight, std=0.1)
    backbone = {"class_path": "mmdiff.backbones.UNet", "init_args": {"axes": 3, **settings}}
    label = {"class_path": "mmdiff.conditioning.Label", "init_args": {"key": "y", "classes": 3, "width": 6}}
    precond = {"class_path": "mmdiff.precond.EDM", "init_args": {"sigma_data": 0.5}}
    tree = {"backbone": backbone, "precond": precond, "conditioner": label}
    save(trained, {"class_path": "mmdiff.model.DiffusionModel", "init_args": tree}, tmp_path / "base")
    steered = labelled(ControlNet(UNet(3, **settings), 1), Join([Label("y", 3, 6), Hint(Edges())]))
    module = DiffusionModule(steered, LogNormal(), start_from=str(tmp_path / "base")).eval()
    batch = {"x": torch.rand(2, 3, 2, 8, 8), "y": torch.tensor([0, 2])}
    with torch.no_grad():
        sigma = torch.tensor([0.5, 2.0])
        bare = trained.bind(trained.condition(batch))(batch["x"], sigma)
        assert torch.equal(steered.bind(steered.condition(batch))(batch["x"], sigma), bare)
    moving = {name.split(".")[2] for name, p in module.named_parameters() if p.requires_grad}
    assert moving == {"backbone"}  # the denoiser's; nothing of the label
    assert not any(p.requires_grad for p in steered.denoiser.backbone.backbone.parameters())


def test_a_model_starts_from_another_of_its_kind_or_says_why_not(tmp_path: Path) -> None:
    trained, other = (labelled(UNet(1, 1, channels=8, vector_width=6), Label("y", 3, 6)) for _ in range(2))
    other.start_from(trained)
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), other.parameters(), strict=True))
    assert all(p.requires_grad for p in other.parameters())
    with pytest.raises(ValueError, match="the trained model's weights are not of this model"):
        labelled(UNet(1, 1, channels=16, vector_width=6), Label("y", 3, 6)).start_from(trained)
    with pytest.raises(ValueError, match="no conditioner for the weights"):
        DiffusionModel(UNet(1, 1, channels=8, vector_width=6), EDM()).start_from(trained)


def test_a_control_net_trains_with_it_in_a_diffusion_module() -> None:
    net = UNet(3, 3, channels=8, multipliers=[1], head_channels=4, vector_width=6)
    nn.init.normal_(net.head.weight, std=0.1)
    model = DiffusionModel(ControlNet(net, 1), EDM(0.5), Join([Label("y", 3, 6), Hint(Edges())]))
    module = DiffusionModule(model, LogNormal())
    module.losses({"x": torch.rand(2, 3, 2, 8, 8), "y": torch.tensor([0, 2])}, (0,))["loss"].backward()
    joins = model.denoiser.backbone.joins
    assert all(join.weight.grad.abs().max() > 0 for join in joins)
    assert all(p.grad is None for p in net.parameters())
