"""UNet1D, UNet2D, UNet3D and the settings named in the docs: built from YAML, a still is a video of one frame."""

from typing import Any

import pytest
import torch
from torch import nn

from mmdiff.backbones import UNet, UNet1D, UNet2D, UNet3D
from mmdiff.conditioning import Cond
from mmdiff.config import build
from mmdiff.nn import Snake
from tests.unet_cases import perturbed

TINY: dict[str, Any] = {"channels": 8, "head_channels": 8}
LEVELS = {"multipliers": [1, 2, 4]}
VIDEO: dict[str, dict[str, Any]] = {
    "2+1": {},
    "full": {"kernels": [[3, 3, 3]]},
    "vdm": {"kernels": [[1, 3, 3]], "attend": [[[1, 2], [0]], [[1, 2], [0]], [[1, 2], [0]]]},
}


@pytest.mark.parametrize(
    ("cls", "sizes", "multiples"),
    [(UNet1D, (1024,), [512]), (UNet2D, (12, 8), [4, 4]), (UNet3D, (3, 16, 8), [1, 8, 8])],
)
def test_defaults_suit_the_modality(cls: type, sizes: tuple[int, ...], multiples: list[int]) -> None:
    net = cls(2, vector_width=5, tokens_width=6, concat_channels=1, **TINY)
    x = torch.randn(2, 2, *sizes)
    cond = Cond(torch.randn(2, 3, 6), None, torch.randn(2, 5), torch.randn(2, 1, *sizes))
    assert isinstance(net, UNet)
    assert net.multiples == multiples
    for c_noise in (torch.rand(2), torch.rand(2, sizes[0])):
        assert net(x, c_noise, cond).count_nonzero() == 0
        out = perturbed(net)(x, c_noise, cond)
        assert out.shape == x.shape
        out.square().sum().backward()
        assert all(p.grad is not None and p.grad.count_nonzero() for p in net.parameters())
        net = cls(2, vector_width=5, tokens_width=6, concat_channels=1, **TINY)


@pytest.mark.parametrize("cls", [UNet1D, UNet2D, UNet3D])
@pytest.mark.parametrize("levels", [1, 2, 5])
def test_defaults_follow_the_number_of_levels(cls: type, levels: int) -> None:
    net = cls(1, multipliers=[1] * levels, tokens_width=4, **TINY)
    attends = [any(block.attentions or block.cross for block in blocks) for blocks in net.down]
    reads = [any(block.cross is not None for block in blocks) for blocks in net.down]
    assert attends[-1]
    assert attends == reads
    assert attends == sorted(attends)
    assert levels == 1 or not attends[0]


def test_waveforms_have_snake_unless_told_otherwise() -> None:
    for given, kind in (({}, Snake), ({"activation": None}, nn.SiLU)):
        net = UNet1D(1, multipliers=[1, 1], **TINY, **given)
        assert {type(block.res.act_in) for block in net.middle} == {type(net.activation)} == {kind}


def test_a_preset_is_the_plain_network_with_those_settings() -> None:
    settings = {"in_channels": 3, "tokens_width": 6, **TINY}
    torch.manual_seed(0)
    preset = UNet3D(**settings)
    torch.manual_seed(0)
    plain = UNet(
        3,
        **settings,
        multipliers=[1, 2, 4, 8],
        factors=[[1, 2, 2]] * 3,
        kernels=[[1, 3, 3], [3, 1, 1]],
        attend=[[], [[0]], [[0]], [[0, 1, 2]]],
        cross=[False, True, True, True],
    )
    assert all(torch.equal(a, b) for a, b in zip(preset.parameters(), plain.parameters(), strict=True))
    assert [name for name, _ in preset.named_parameters()] == [name for name, _ in plain.named_parameters()]


@pytest.mark.parametrize("name", VIDEO)
def test_an_image_is_a_video_of_one_frame(name: str) -> None:
    """At T=1 a video network gives what the 2-D one gives with the middle time slice of each kernel as weights."""
    patterns = VIDEO[name].get("attend", [[], [[0]], [[0, 1, 2]]])
    attend = [[[a - 1 for a in pattern if a] for pattern in level if pattern != [0]] for level in patterns]
    video = perturbed(UNet3D(3, **TINY, **LEVELS, **VIDEO[name]))
    kernels = [kernel[1:] for kernel in VIDEO[name].get("kernels", [[1, 3, 3], [3, 1, 1]])]
    image = UNet(2, 3, **LEVELS, kernels=kernels, attend=attend, **TINY)
    with torch.no_grad():
        for block in video.modules():  # attention over one frame's time adds its value; without it nothing is left
            if hasattr(block, "pattern") and block.pattern == (0,):
                block.out.weight.zero_()
                block.out.bias.zero_()
    still = {
        key: value[:, :, value.shape[2] // 2] if value.ndim == 5 else value for key, value in video.state_dict().items()
    }
    names = {id(module): key for key, module in video.named_modules()}
    for block in [b for b in video.modules() if hasattr(b, "attentions")]:
        kept = [a for a in block.attentions if a.pattern != (0,)]
        prefix = f"{names[id(block)]}.attentions."
        moved = {key: still.pop(key) for key in list(still) if key.startswith(prefix)}
        for new, attention in enumerate(kept):
            old = names[id(attention)]
            still |= {prefix + str(new) + k[len(old) :]: v for k, v in moved.items() if k.startswith(f"{old}.")}
    image.load_state_dict(still)
    x, c_noise = torch.randn(2, 3, 1, 8, 12), torch.rand(2)
    if any([0, 1, 2] == pattern for level in patterns for pattern in level):
        image, video = flat(image), flat(video)
    torch.testing.assert_close(video(x, c_noise)[:, :, 0], image(x[:, :, 0], c_noise), rtol=1e-4, atol=1e-5)


def flat(net: UNet) -> UNet:
    """Without rotary positions: they share the channels among the axes of a pattern, so 3-D and 2-D ones differ."""
    for module in net.modules():
        if hasattr(module, "turn"):
            module.turn = lambda x, table: x
    return net


@pytest.mark.parametrize("name", VIDEO)
def test_every_video_preset_takes_any_number_of_frames(name: str) -> None:
    net = perturbed(UNet3D(3, **TINY, **LEVELS, **VIDEO[name]))
    for frames in (1, 2, 5):
        x = torch.randn(1, 3, frames, 8, 4)
        assert net(x, torch.rand(1, frames)).shape == x.shape


def test_frames_convolved_alone_meet_in_attention_over_time_only() -> None:
    """VDM's factorised video: with 2-D kernels and no time attention, frames do not see one another."""
    reach = {}
    for name, attend in (("space", [[], [[1, 2]]]), ("time", [[], [[1, 2], [0]]])):
        net = perturbed(UNet3D(2, multipliers=(1, 2), kernels=[[1, 3, 3]], attend=attend, **TINY))
        for module in net.modules():
            if isinstance(module, nn.GroupNorm):
                module.forward = lambda x: x  # type: ignore[method-assign]
            if isinstance(module, nn.Conv3d) and module.kernel_size == (3, 3, 3):  # stem and head look one frame around
                with torch.no_grad():
                    module.weight[:, :, ::2] = 0
        x = torch.randn(1, 2, 5, 4, 4, requires_grad=True)
        (gradient,) = torch.autograd.grad(net(x, torch.rand(1, 5))[:, :, 2].sum(), x)
        reach[name] = [bool(frame.count_nonzero()) for frame in gradient[0].unbind(1)]
    assert reach["space"] == [False, False, True, False, False]
    assert reach["time"] == [True] * 5


SPECS = {
    "VDM": {"class_path": "mmdiff.backbones.UNet3D", "init_args": {"in_channels": 3, **TINY, **LEVELS, **VIDEO["vdm"]}},
    "wave": {
        "class_path": "mmdiff.backbones.UNet1D",
        "init_args": {
            "in_channels": 1,
            **TINY,
            "multipliers": [1, 2],
            "factors": [[4]],
            "dilations": [1, 2],
            "blocks": 2,
            "activation": {"class_path": "mmdiff.nn.Snake", "init_args": {"alpha": 0.5}},
        },
    },
}


@pytest.mark.parametrize("name", SPECS)
def test_a_config_builds_the_same_network_as_the_command_line(name: str) -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--net", type=nn.Module)
    torch.manual_seed(0)
    built = build(SPECS[name])
    torch.manual_seed(0)
    parsed = parser.instantiate(parser.parse_object({"net": SPECS[name]})).net
    assert type(built) is type(parsed)
    for a, b in zip(built.state_dict().items(), parsed.state_dict().items(), strict=True):
        assert a[0] == b[0]
        assert torch.equal(a[1], b[1])
    snakes = [module for module in parsed.modules() if isinstance(module, Snake)]
    assert bool(snakes) == (name == "wave")
    assert all(torch.allclose(snake.log_alpha.exp(), torch.tensor(0.5)) for snake in snakes)
