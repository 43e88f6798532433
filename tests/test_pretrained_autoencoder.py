"""diffusers' autoencoders as ours: latents and data equal to what diffusers computes, sizes, memory, refusals."""

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmdiff import pretrained_autoencoder as ours
from mmdiff.autoencoder import Chain, Pool
from mmdiff.config import build

BLOCKS = {"block_out_channels": (8, 8, 8), "norm_num_groups": 4, "latent_channels": 4, "layers_per_block": 1}


def kl(**more: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3, **{**BLOCKS, **more}
    )


def temporal() -> Any:
    from diffusers import AutoencoderKLTemporalDecoder

    return AutoencoderKLTemporalDecoder(
        down_block_types=["DownEncoderBlock2D"] * 2, block_out_channels=(32, 32), latent_channels=4, layers_per_block=1
    )


def oobleck(ratios: tuple[int, ...] = (2, 4, 4)) -> Any:
    from diffusers import AutoencoderOobleck

    return AutoencoderOobleck(
        encoder_hidden_size=12,
        downsampling_ratios=list(ratios),
        channel_multiples=[1, 2, 2],
        decoder_channels=4,
        decoder_input_channels=6,
        audio_channels=2,
    )


def wan(**more: Any) -> Any:
    from diffusers import AutoencoderKLWan

    z_dim = 4
    statistics = {"latents_mean": [0.3, -0.2, 0.1, 0.5], "latents_std": [2.0, 0.5, 1.5, 3.0]}
    settings = {"base_dim": 4, "z_dim": z_dim, "dim_mult": [1, 1, 2], "num_res_blocks": 1, **statistics}
    return AutoencoderKLWan(temperal_downsample=[True, True], **{**settings, **more})


def cogvideox() -> Any:
    from diffusers import AutoencoderKLCogVideoX

    return AutoencoderKLCogVideoX(
        down_block_types=["CogVideoXDownBlock3D"] * 3, up_block_types=["CogVideoXUpBlock3D"] * 3, **BLOCKS
    )


# model, our class, its further arguments, shape of data, shape of latents
CASES = {
    "kl": (kl, ours.PretrainedKL, {"frames": 2}, (2, 3, 3, 8, 12), (2, 4, 3, 2, 3)),
    "kl-shift": (lambda: kl(shift_factor=0.4), ours.PretrainedKL, {}, (1, 3, 2, 8, 8), (1, 4, 2, 2, 2)),
    "kl-mean": (
        lambda: kl(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0], scaling_factor=0.5),
        ours.PretrainedKL,
        {},
        (1, 3, 2, 8, 8),
        (1, 4, 2, 2, 2),
    ),
    "kl-mel": (lambda: kl(in_channels=1, out_channels=1), ours.PretrainedKL, {"axes": 2}, (2, 1, 8, 12), (2, 4, 2, 3)),
    "temporal": (temporal, ours.PretrainedTemporalKL, {"frames": 2}, (2, 3, 3, 4, 6), (2, 4, 3, 2, 3)),
    "oobleck": (oobleck, ours.PretrainedOobleck, {}, (2, 2, 96), (2, 6, 3)),
    "wan": (wan, ours.PretrainedWan, {}, (2, 3, 9, 8, 12), (2, 4, 3, 2, 3)),
    "wan-patch": (
        lambda: wan(patch_size=2, in_channels=12, out_channels=12),
        ours.PretrainedWan,
        {},
        (1, 3, 5, 16, 8),
        (1, 4, 2, 2, 1),
    ),
    "cogvideox": (cogvideox, ours.PretrainedCogVideoX, {}, (1, 3, 17, 8, 12), (1, 4, 5, 2, 3)),
}
cases = pytest.mark.parametrize("case", CASES)


def saved(case: str, folder: Path) -> tuple[Any, ours.PretrainedAutoencoder, Tensor]:
    """diffusers' model, ours read from its folder, and data."""
    make, cls, arguments, shape, _ = CASES[case]
    theirs = make().eval().requires_grad_(False)
    theirs.save_pretrained(folder)
    return theirs, cls(str(folder), **arguments), torch.rand(shape) * 2 - 1


def encoded(theirs: Any, x: Tensor) -> Tensor:
    """As the pipelines of diffusers do: over frames or whole, then shift and scale."""
    images = type(theirs).__name__ in ("AutoencoderKL", "AutoencoderKLTemporalDecoder") and x.ndim == 5
    z = theirs.encode(x.transpose(1, 2).flatten(0, 1) if images else x).latent_dist.mode()
    z = z.unflatten(0, (len(x), -1)).transpose(1, 2) if images else z
    settings = theirs.config
    if settings.get("latents_mean") is not None:
        ones = (1, -1, *(1,) * (z.ndim - 2))
        z = (z - torch.tensor(settings.latents_mean).view(ones)) / torch.tensor(settings.latents_std).view(ones)
        return z * settings.get("scaling_factor", 1.0)
    return (z - (settings.get("shift_factor") or 0.0)) * settings.get("scaling_factor", 1.0)


def decoded(theirs: Any, z: Tensor) -> Tensor:
    settings = theirs.config
    z = z / settings.get("scaling_factor", 1.0)
    if settings.get("latents_mean") is not None:
        ones = (1, -1, *(1,) * (z.ndim - 2))
        z = z * torch.tensor(settings.latents_std).view(ones) + torch.tensor(settings.latents_mean).view(ones)
    z = z + (settings.get("shift_factor") or 0.0)
    name = type(theirs).__name__
    if name not in ("AutoencoderKL", "AutoencoderKLTemporalDecoder") or z.ndim == 4:
        return theirs.decode(z).sample
    frames = {"num_frames": z.shape[2]} if name == "AutoencoderKLTemporalDecoder" else {}
    x = theirs.decode(z.transpose(1, 2).flatten(0, 1), **frames).sample
    return x.unflatten(0, (len(z), -1)).transpose(1, 2)


@cases
def test_latents_and_data_are_diffusers_own_to_1e_5(case: str, tmp_path: Path) -> None:
    """Relative to the largest value. Measured: bit for bit, but for those with a deviation of each channel, 1.8e-6."""
    theirs, autoencoder, x = saved(case, tmp_path)
    expected = encoded(theirs, x)
    z = autoencoder.encode(x)
    assert z.shape == CASES[case][4]
    assert autoencoder.latent_shape(tuple(x.shape[1:])) == tuple(z.shape[1:])
    assert (z - expected).abs().max() <= 1e-5 * expected.abs().max()
    back = decoded(theirs, expected)
    assert autoencoder.decode(expected).shape == x.shape == back.shape
    assert (autoencoder.decode(expected) - back).abs().max() <= 1e-5 * back.abs().max()


@cases
def test_a_folder_of_yaml_builds_it_and_no_model_stores_its_weights(case: str, tmp_path: Path) -> None:
    _, autoencoder, x = saved(case, tmp_path)
    cls = type(autoencoder)
    tree = {"class_path": f"{cls.__module__}.{cls.__name__}", "init_args": {"path": str(tmp_path), **CASES[case][2]}}
    built = build(yaml.safe_load(yaml.safe_dump(tree)))
    assert torch.equal(built.encode(x), autoencoder.encode(x))
    assert not built.state_dict()
    assert not list(built.parameters())
    assert not built.train().network.training
    assert not any(p.requires_grad for p in built.network.parameters())
    assert built.factors == tuple(n // m for n, m in zip(x.shape[2:], CASES[case][4][2:], strict=True)) or x.ndim == 5


def test_it_trains_a_diffusion_model_without_weights_of_its_own_to_name(tmp_path: Path) -> None:
    from mmdiff.backbones import UNet
    from mmdiff.density import LogNormal
    from mmdiff.io import load, save
    from mmdiff.model import DiffusionModel
    from mmdiff.module import DiffusionModule
    from mmdiff.precond import EDM

    _, autoencoder, x = saved("kl", tmp_path / "vae")
    net = {"axes": 3, "in_channels": 4, "channels": 8, "multipliers": [1], "head_channels": 4}
    model = DiffusionModel(UNet(**net), EDM(1.0), autoencoder=autoencoder)
    module = DiffusionModule(model, LogNormal())
    assert torch.isfinite(module.losses({"x": x}, (0,))["loss"])
    assert not any("autoencoder" in name for name in module.state_dict())
    tree = {
        "class_path": "mmdiff.model.DiffusionModel",
        "init_args": {
            "backbone": {"class_path": "mmdiff.backbones.UNet", "init_args": net},
            "precond": {"class_path": "mmdiff.precond.EDM", "init_args": {"sigma_data": 1.0}},
            "autoencoder": {
                "class_path": "mmdiff.pretrained_autoencoder.PretrainedKL",
                "init_args": {"path": str(tmp_path / "vae")},
            },
        },
    }
    again = load(save(model, tree, tmp_path / "model"))
    assert (again.encode(x) - model.encode(x)).abs().max() < 1e-5


def test_it_moves_casts_and_copies_with_the_model_that_holds_it(tmp_path: Path) -> None:
    theirs, autoencoder, x = saved("oobleck", tmp_path)
    holder = copy.deepcopy(Chain([Pool([1]), autoencoder])).to(torch.float64)
    assert holder.parts[1].network.dtype == torch.float64
    assert autoencoder.network.dtype == torch.float32
    expected = theirs.double().encode(x.double()).latent_dist.mode()
    assert (holder.encode(x.double()) - expected).abs().max() < 1e-6 * expected.abs().max()
    half = ours.PretrainedOobleck(str(tmp_path), dtype="bfloat16")
    z = half.encode(x)
    assert z.dtype == torch.float32
    assert half.network.dtype == torch.bfloat16
    assert 0 < (z - expected).abs().max() < 0.1 * expected.abs().max()


def test_gradients_pass_to_the_data(tmp_path: Path) -> None:
    _, autoencoder, x = saved("kl", tmp_path)
    x.requires_grad_()
    autoencoder.decode(autoencoder.encode(x)).square().sum().backward()
    assert x.grad is not None
    assert (x.grad.abs().amax(dim=(1, 3, 4)) > 0).all()


def test_frames_go_through_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, autoencoder, x = saved("kl", tmp_path)
    seen: list[int] = []
    for name in ("encode", "decode"):
        method: Callable[[Tensor], Any] = getattr(autoencoder.network, name)
        monkeypatch.setattr(autoencoder.network, name, lambda v, m=method: (seen.append(len(v)), m(v))[1])
    autoencoder.decode(autoencoder.encode(x))
    assert seen == [2, 2, 2, 2, 2, 2]


def test_the_temporal_decoder_sees_across_the_frames_it_decodes_together(tmp_path: Path) -> None:
    _, autoencoder, x = saved("temporal", tmp_path)
    z = autoencoder.encode(x)
    whole = autoencoder.decode(z)
    autoencoder.together = 2
    parts = autoencoder.decode(z)
    assert parts.shape == whole.shape
    apart = torch.cat([autoencoder.decode(z[:, :, :2]), autoencoder.decode(z[:, :, 2:])], dim=2)
    assert (parts - apart).abs().max() < 1e-4
    assert (parts - whole).abs().max() > 1e-3


@pytest.mark.parametrize("length", [1, 31, 32, 33, 95])
def test_a_waveform_may_have_any_length(length: int, tmp_path: Path) -> None:
    theirs, autoencoder, _ = saved("oobleck", tmp_path)
    x = torch.rand(1, 2, length) * 2 - 1
    cells = -(-length // 32)
    z = autoencoder.encode(x)
    assert autoencoder.latent_shape((2, length)) == tuple(z.shape[1:]) == (6, cells)
    assert autoencoder.decode(z).shape == (1, 2, 32 * cells)
    padded = torch.cat([x, torch.zeros(1, 2, 32 * cells - length)], dim=2)
    assert torch.equal(z, theirs.encode(padded).latent_dist.mode())
    known = autoencoder.known(torch.arange(length)[None, None] >= 32)
    assert known.flatten().tolist() == [i > 0 for i in range(cells)]


@pytest.mark.parametrize("case", ["wan", "cogvideox"])
def test_a_causal_autoencoder_keeps_the_first_frame_alone(case: str, tmp_path: Path) -> None:
    _, autoencoder, x = saved(case, tmp_path)
    image = autoencoder.encode(x[:, :, :1])
    assert image.shape[2] == 1
    assert autoencoder.decode(image).shape[2] == 1
    mask = torch.zeros(1, 1, 17, 8, 12, dtype=torch.bool)
    mask[:, :, :6] = True
    mask[:, :, :, :, :4] = False
    known = autoencoder.known(mask)
    assert tuple(known.shape[2:]) == autoencoder.latent_shape((3, 17, 8, 12))[1:]
    assert known[0, 0, :, 0, 1].tolist() == [True, True, False, False, False]
    assert not known[..., 0].any()


@pytest.mark.parametrize(
    ("case", "shape", "message"),
    [
        ("wan", (3, 6, 8, 8), "T=6 is not 1 \\+ a multiple of 4; nearest: 5 or 9"),
        ("cogvideox", (3, 13, 8, 8), "T=13 is not 1 \\+ a multiple of 8; nearest: 9 or 17"),
        ("cogvideox", (3, 9, 8, 6), "W=6 is not a multiple of 4; nearest: 4 or 8"),
        ("kl", (3, 2, 7, 8), "H=7 is not a multiple of 4; nearest: 4 or 8"),
        ("kl", (3, 8, 8), "does not fit AutoencoderKL, which takes 3 channels and 3 axes"),
        ("oobleck", (1, 32), "does not fit AutoencoderOobleck, which takes 2 channels and 1 axes"),
    ],
)
def test_sizes_that_do_not_fit_name_those_that_do(
    case: str, shape: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    _, autoencoder, _ = saved(case, tmp_path)
    with pytest.raises(ValueError, match=message):
        autoencoder.latent_shape(shape)
    with pytest.raises(ValueError, match=message):
        autoencoder.encode(torch.zeros(1, *shape))


def test_cogvideox_decodes_no_even_number_of_latents(tmp_path: Path) -> None:
    _, autoencoder, _ = saved("cogvideox", tmp_path)
    with pytest.raises(ValueError, match="z has 2 steps of time, but AutoencoderKLCogVideoX decodes 1, 3, 5"):
        autoencoder.decode(torch.zeros(1, 4, 2, 2, 2))


def drop(folder: Path) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state.pop("decoder.conv_in.bias")
    save_file(state, file, metadata={"format": "pt"})


def misshape(folder: Path) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(file), "decoder.conv_in.bias": torch.zeros(3)}, file, metadata={"format": "pt"})


def rename_class(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_class_name": "AutoencoderKLWan"}))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (drop, "decoder.conv_in.bias"),
        (misshape, "decoder.conv_in.bias|size mismatch|shape"),
        (rename_class, "it is of class AutoencoderKLWan"),
        (
            lambda f: (f / "diffusion_pytorch_model.safetensors").rename(f / "diffusion_pytorch_model.bin"),
            "safetensors",
        ),
        (lambda f: (f / "diffusion_pytorch_model.safetensors").write_bytes(b"x" * 100), "holds no AutoencoderKL"),
        (lambda f: (f / "config.json").write_text("{"), "holds no AutoencoderKL"),
        (lambda f: (f / "config.json").unlink(), "holds no AutoencoderKL"),
    ],
    ids=["missing", "misshapen", "class", "pickle", "header", "json", "no-config"],
)
def test_a_folder_that_does_not_fit_is_one_line(
    break_it: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    saved("kl", tmp_path)
    break_it(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path.name} holds no AutoencoderKL in safetensors.*") as caught:
        ours.PretrainedKL(str(tmp_path))
    assert caught.match(message)
    assert "\n" not in str(caught.value)


def test_oobleck_of_odd_ratios_is_refused(tmp_path: Path) -> None:
    oobleck((2, 3, 4)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"downsampling_ratios=\[2, 3, 4\] must be even"):
        ours.PretrainedOobleck(str(tmp_path))


def test_settings_out_of_range_are_refused_before_anything_is_read() -> None:
    with pytest.raises(ValueError, match="axes=1 must be 2"):
        ours.PretrainedKL("nowhere", axes=1)
    with pytest.raises(ValueError, match="frames=0 and together=None must be at least 1"):
        ours.PretrainedTemporalKL("nowhere", frames=0)


def test_reading_leaves_the_caller_s_random_numbers_alone(tmp_path: Path) -> None:
    saved("kl", tmp_path)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    ours.PretrainedKL(str(tmp_path))
    assert torch.equal(torch.rand(3), expected)


def test_without_diffusers_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match="AutoencoderKL needs diffusers: pip install"):
        ours.PretrainedKL("nowhere")
