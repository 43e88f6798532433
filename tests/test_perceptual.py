"""The perceptual loss: on where its network is, off with one line where it is not, and never a download."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmdiff.perceptual
from mmdiff.perceptual import Perceptual


class Net(nn.Module):
    """In the place of torchmetrics' network: a mean absolute difference, with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        seen.append((a, b))
        return self.gain * (a - b).abs().mean(dim=(1, 2, 3), keepdim=True)


class Metric:
    def __init__(self, net: str) -> None:
        asked.append(net)
        self.net = Net()


seen: list[tuple[Tensor, Tensor]] = []
asked: list[str] = []


@pytest.fixture
def present(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Packages and weights as if they were installed."""
    import torchmetrics.image.lpip

    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth").touch()
    monkeypatch.setattr(mmdiff.perceptual, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torchmetrics.image.lpip, "LearnedPerceptualImagePatchSimilarity", Metric)
    seen.clear(), asked.clear()


def refuse(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("a download was tried")


@pytest.mark.parametrize(
    ("found", "missing"),
    [([], "torchmetrics"), (["torchmetrics"], "torchvision"), (["torchmetrics", "torchvision"], "pth")],
    ids=["torchmetrics", "torchvision", "weights"],
)
def test_without_its_parts_it_is_off_with_one_line_and_no_download(
    found: list[str], missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(mmdiff.perceptual, "find_spec", lambda name: name if name in found else None)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss = Perceptual()
        x_hat = torch.randn(1, 3, 2, 4, 4, requires_grad=True)
        assert loss(x_hat, torch.randn(1, 3, 2, 4, 4)) == 0
    (line,) = [str(warning.message) for warning in caught if "perceptual" in str(warning.message)]
    assert line.startswith("the perceptual loss is off: ")
    assert missing in line
    assert "\n" not in line


@pytest.mark.usefixtures("present")
def test_it_is_the_mean_over_items_and_frames() -> None:
    loss = Perceptual()
    assert asked == ["alex"]
    x, x_hat = torch.rand(2, 3, 4, 32, 31), torch.rand(2, 3, 4, 32, 31)
    torch.testing.assert_close(loss(x_hat, x), (x_hat - x).abs().mean())
    a, b = seen[-1]
    assert a.shape == b.shape == (8, 3, 32, 31)
    assert torch.equal(b[5], x[1, :, 1])  # frames of an item stand together
    torch.testing.assert_close(loss(x_hat[:, :, 0], x[:, :, 0]), (x_hat - x)[:, :, 0].abs().mean())


@pytest.mark.usefixtures("present")
def test_grey_is_seen_as_colour_and_values_are_bounded() -> None:
    loss = Perceptual()
    loss(torch.full((1, 1, 32, 32), 3.0), torch.full((1, 1, 32, 32), -3.0))
    a, b = seen[-1]
    assert a.shape == (1, 3, 32, 32)
    assert (a.unique().tolist(), b.unique().tolist()) == ([1.0], [-1.0])


@pytest.mark.usefixtures("present")
def test_the_gradient_reaches_the_reconstruction_but_not_the_network_which_is_in_no_state() -> None:
    loss = Perceptual()
    x_hat = torch.rand(1, 3, 32, 32, requires_grad=True)
    loss(x_hat, torch.rand(1, 3, 32, 32)).backward()
    assert x_hat.grad is not None
    assert x_hat.grad.count_nonzero() > 0
    assert loss.state_dict() == {}
    assert list(loss.parameters()) == []
    assert [p.grad for p in loss.hidden[0].parameters()] == [None]


@pytest.mark.usefixtures("present")
@pytest.mark.parametrize("shape", [(1, 3, 30, 32), (1, 2, 32, 32), (1, 3, 32)], ids=str)
def test_what_is_no_picture_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="perceptual loss by alex is of pictures .* at least 31 by 31, not"):
        Perceptual()(torch.zeros(shape), torch.zeros(shape))


def test_another_network_is_refused() -> None:
    with pytest.raises(ValueError, match="net='resnet' must be one of alex, squeeze, vgg"):
        Perceptual("resnet")  # type: ignore[arg-type]
