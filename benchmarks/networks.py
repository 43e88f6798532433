"""The networks that are compared: ours and those of other projects, each with forward(x, c_noise, cond=None).

Widths are chosen so that the networks of one case have as many parameters, within 5 %; the rest of a peer's settings
are its defaults, or those of its README, attention included. None is conditioned on text: UNet3DConditionModel, which
cannot go without, is given one token. Noise levels come as mmdiff's c_noise and go to each peer in its own range.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

OURS = "mmdiff"
MATCH = 0.05  # parameters of a case agree within this


class Peer(nn.Module):
    """Another project's network behind our signature; `call` gives it x and the noise level in [0, 1]."""

    def __init__(self, network: nn.Module, call: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.call = network, call

    def forward(self, x: Tensor, c_noise: Tensor, cond: object = None) -> Tensor:
        return self.call(self.network, x, ((c_noise + 2) / 4).clamp(0, 1))  # EDM's ln(sigma) / 4 lies in (-2, 2)


@dataclass(frozen=True)
class Network:
    """One row of a case. package: what must be importable; build: a fresh network."""

    name: str
    package: str
    build: Callable[[], nn.Module]

    @property
    def ours(self) -> bool:
        return self.package == OURS

    @property
    def present(self) -> bool:
        return importlib.util.find_spec(self.package) is not None


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def check_parameters(counts: dict[str, int], ours: str) -> None:
    """Raises ValueError naming a network whose parameters differ from ours by more than MATCH."""
    for name, count in counts.items():
        if abs(count - counts[ours]) > MATCH * counts[ours]:
            raise ValueError(
                f"{name} has {count:,} parameters, {ours} {counts[ours]:,}: more than {MATCH:.0%} apart; "
                "choose other widths in benchmarks/cases.py"
            )


def import_imagen() -> Any:
    """imagen_pytorch, which asks the hub for T5's configuration when it is imported: it is given one instead."""
    import transformers

    original = transformers.T5Config.__dict__.get("from_pretrained")
    transformers.T5Config.from_pretrained = classmethod(lambda cls, *_, **__: cls(d_model=768))
    try:
        import imagen_pytorch
    finally:
        if original is None:
            del transformers.T5Config.from_pretrained
        else:
            transformers.T5Config.from_pretrained = original
    return imagen_pytorch


def video_diffusion_pytorch(channels: int, dim: int) -> nn.Module:
    from video_diffusion_pytorch.video_diffusion_pytorch import Unet3D

    return Peer(Unet3D(dim=dim, channels=channels), lambda network, x, level: network(x, 1000 * level))


def imagen_pytorch(channels: int, dim: int) -> nn.Module:
    network = import_imagen().Unet3D(dim=dim, channels=channels, cond_on_text=False)
    return Peer(network, lambda network, x, level: network(x, 20 * level - 10))  # it takes log SNR


def diffusers_unet3d(channels: int, widths: Sequence[int], tokens_width: int = 64) -> nn.Module:
    from diffusers import UNet3DConditionModel

    network = UNet3DConditionModel(
        in_channels=channels, out_channels=channels, block_out_channels=tuple(widths), norm_num_groups=16,
        attention_head_dim=32, cross_attention_dim=tokens_width,
    )  # fmt: skip

    def call(network: nn.Module, x: Tensor, level: Tensor) -> Tensor:
        return network(x, 1000 * level, x.new_zeros(len(x), 1, tokens_width)).sample

    return Peer(network, call)


def diffusers_latte(shape: Sequence[int], heads: int, head: int, pairs: int) -> nn.Module:
    """Latte as released (ada_norm_single, GELU), a spatial and a temporal block in turn, without text."""
    from diffusers import LatteTransformer3DModel

    _, channels, frames, height, _ = shape
    network = LatteTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=head, in_channels=channels, out_channels=channels,
        num_layers=pairs, attention_bias=True, sample_size=height, patch_size=2, activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
        caption_channels=8, video_length=frames,
    )  # fmt: skip
    network.caption_projection = nn.Identity()  # its result goes nowhere without cross-attention

    def call(network: nn.Module, x: Tensor, level: Tensor) -> Tensor:
        return network(x, 1000 * level, encoder_hidden_states=x.new_zeros(len(x), 1, heads * head)).sample

    return Peer(network, call)


def diffusers_unet1d(widths: Sequence[int]) -> nn.Module:
    """As for Dance Diffusion: 16 Fourier features of the level beside the samples, attention at the lowest rate."""
    from diffusers import UNet1DModel

    inner = len(widths) - 2
    network = UNet1DModel(
        in_channels=1, out_channels=1, extra_in_channels=16, block_out_channels=tuple(widths), time_embedding_dim=16,
        down_block_types=("DownBlock1DNoSkip", *["DownBlock1D"] * inner, "AttnDownBlock1D"),
        up_block_types=("AttnUpBlock1D", *["UpBlock1D"] * inner, "UpBlock1DNoSkip"),
    )  # fmt: skip
    return Peer(network, lambda network, x, level: network(x, level).sample)


def unet_v0(channels: Sequence[int], modulation: int) -> nn.Module:
    """UNetV0 with the factors, items and attentions of its README's first levels."""
    from audio_diffusion_pytorch import UNetV0

    levels = len(channels)
    network = UNetV0(
        dim=1, in_channels=1, channels=list(channels), factors=[1, 4, 4, 4, 2, 2, 2, 2, 2, 2][:levels],
        items=[1, 2, 2, 2, 2, 2, 2, 2, 4, 4][:levels], attentions=[0, 0, 0, 0, 0, 1, 1, 1, 1, 1][:levels],
        attention_heads=8, attention_features=64, modulation_features=modulation,
    )  # fmt: skip
    return Peer(network, lambda network, x, level: network(x, time=level))
