"""The autoencoders that diffusers reads, as `Autoencoder`s: named by folder or hub id, frozen, stored with no model.

B batch, C channels, T time, `*axes` T and what follows it. Data lies in [-1, 1]; latents are normalised as the
pipelines of the model in question do. `factors` and `latent_channels` come from the model's own config.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from math import ceil, prod
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.utils import remove_weight_norm

from .autoencoder import Autoencoder

Dtype = Literal["float32", "float16", "bfloat16"]


class Layout(NamedTuple):
    """Channels of the data, channels of the latents, and by what each axis is divided."""

    channels: int
    latent_channels: int
    factors: tuple[int, ...]


class PretrainedAutoencoder(Autoencoder):
    """A frozen autoencoder of diffusers; `encode` gives its posterior's mean.

    Args:
        path: folder, or `user/name` on the Hugging Face hub, with config.json and weights as safetensors.
        subfolder: of it, where it is a whole pipeline ("vae"). revision: commit, tag or branch of the hub's model.
        dtype: of the weights; data is cast to it and the result back. Half precision overflows in some of them.

    The weights are in no state dict: a checkpoint or an exported model holds the path instead, so name a hub id and its
    revision in what others are to load. They follow `.to(...)`, and gradients pass through them to the data.
    Raises ValueError where diffusers is not installed, nothing is at the path, it is of another class, tensors are
    missing, left over or of another shape, and for data that does not fit. No pickle is read.
    """

    kind: ClassVar[str]  # the class of diffusers
    network: Any
    shift: Tensor  # (latent_channels,): latents are (z - shift) * gain
    gain: Tensor

    def __init__(
        self, path: str, subfolder: str | None = None, revision: str | None = None, dtype: Dtype = "float32"
    ) -> None:
        super().__init__()
        # not a submodule, which parameters() and state_dict() would hold
        self.__dict__["network"] = read(self.kind, path, subfolder, revision, getattr(torch, dtype))
        settings = self.network.config
        self.channels, self.latent_channels, self.factors = self.layout(settings)
        shift, gain = normalisation(settings)
        for name, values in (("shift", shift), ("gain", gain)):
            self.register_buffer(name, values.expand(self.latent_channels).clone(), persistent=False)

    @abstractmethod
    def layout(self, settings: Mapping[str, Any]) -> Layout:
        """What the network's config says of its shapes."""

    @abstractmethod
    def mean(self, x: Tensor) -> Tensor:
        """The posterior's mean, as the network gives it, of data that fits."""

    @abstractmethod
    def generate(self, z: Tensor) -> Tensor:
        """Data of latents as the network takes them."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.network._apply(fn)
        return super()._apply(fn, recurse)

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if len(shape) != 1 + len(self.factors) or shape[0] != self.channels:
            raise ValueError(
                f"data of shape (C, *axes) = {tuple(shape)} does not fit {self.kind}, which takes {self.channels} "
                f"channels and {len(self.factors)} axes"
            )
        return super().latent_shape(shape)

    def encode(self, x: Tensor) -> Tensor:
        self.latent_shape(tuple(x.shape[1:]))
        z = self.mean(x.to(self.network.dtype)).to(x.dtype)
        return (z - self.along(self.shift, z)) * self.along(self.gain, z)

    def decode(self, z: Tensor) -> Tensor:
        raw = z / self.along(self.gain, z) + self.along(self.shift, z)
        return self.generate(raw.to(self.network.dtype)).to(z.dtype)

    @staticmethod
    def along(values: Tensor, z: Tensor) -> Tensor:
        """One number for each channel, to broadcast to z."""
        return values.to(z).view(-1, *(1,) * (z.ndim - 2))


class PretrainedKL(PretrainedAutoencoder):
    """AutoencoderKL of images (Rombach et al. 2022) over videos frame by frame, or over spectrograms.

    axes: 3 for videos (B, C, T, H, W), 2 for (B, C, T, F). frames: how many go through the network at once.
    """

    kind = "AutoencoderKL"
    axes: int
    frames: int

    def __init__(
        self,
        path: str,
        subfolder: str | None = None,
        revision: str | None = None,
        dtype: Dtype = "float32",
        axes: int = 3,
        frames: int = 8,
    ) -> None:
        if axes not in (2, 3) or frames < 1:
            raise ValueError(f"axes={axes} must be 2 (spectrograms) or 3 (videos), frames={frames} at least 1")
        self.__dict__["axes"], self.__dict__["frames"] = axes, frames  # layout needs them before there is a module
        super().__init__(path, subfolder, revision, dtype)

    def layout(self, settings: Mapping[str, Any]) -> Layout:
        factor = 2 ** (len(settings["block_out_channels"]) - 1)
        factors = (factor, factor) if self.axes == 2 else (1, factor, factor)
        return Layout(settings["in_channels"], settings["latent_channels"], factors)

    def mean(self, x: Tensor) -> Tensor:
        return by_frames(x, self.frames, lambda images: self.network.encode(images).latent_dist.mode())

    def generate(self, z: Tensor) -> Tensor:
        return by_frames(z, self.frames, lambda images: self.network.decode(images).sample)


class PretrainedTemporalKL(PretrainedAutoencoder):
    """AutoencoderKLTemporalDecoder (Stable Video Diffusion): encodes frame by frame, decodes with a look across time.

    frames: how many are encoded at once. together: how many are decoded as one clip; None takes all of them, fewer
    save memory and leave seams where the decoder cannot look across.
    """

    kind = "AutoencoderKLTemporalDecoder"

    def __init__(
        self,
        path: str,
        subfolder: str | None = None,
        revision: str | None = None,
        dtype: Dtype = "float32",
        frames: int = 8,
        together: int | None = None,
    ) -> None:
        if frames < 1 or (together is not None and together < 1):
            raise ValueError(f"frames={frames} and together={together} must be at least 1")
        super().__init__(path, subfolder, revision, dtype)
        self.frames, self.together = frames, together

    def layout(self, settings: Mapping[str, Any]) -> Layout:
        factor = 2 ** (len(settings["block_out_channels"]) - 1)
        return Layout(settings["in_channels"], settings["latent_channels"], (1, factor, factor))

    def mean(self, x: Tensor) -> Tensor:
        return by_frames(x, self.frames, lambda images: self.network.encode(images).latent_dist.mode())

    def generate(self, z: Tensor) -> Tensor:
        parts = []
        for part in z.split(self.together or z.shape[2], dim=2):
            frames = self.network.decode(rearrange(part, "b c t h w -> (b t) c h w"), num_frames=part.shape[2]).sample
            parts.append(rearrange(frames, "(b t) c h w -> b c t h w", b=len(part)))
        return torch.cat(parts, dim=2)


class PretrainedOobleck(PretrainedAutoencoder):
    """AutoencoderOobleck (Stable Audio Open) of waveforms (B, C, T), of any length from 1 up.

    T samples give ceil(T / factor) latents, the last of them padded with silence; decoding gives whole cells.
    """

    kind = "AutoencoderOobleck"

    def layout(self, settings: Mapping[str, Any]) -> Layout:
        ratios = settings["downsampling_ratios"]
        if any(ratio % 2 for ratio in ratios):
            raise ValueError(f"downsampling_ratios={list(ratios)} must be even; at an odd one decoding loses a sample")
        return Layout(settings["audio_channels"], settings["decoder_input_channels"], (prod(ratios),))

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        (hop,) = self.factors
        return super().latent_shape((*shape[:-1], ceil(shape[-1] / hop) * hop))

    def known(self, mask: Tensor) -> Tensor:
        return super().known(F.pad(mask, (0, -mask.shape[2] % self.factors[0]), value=True))

    def mean(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (0, -x.shape[2] % self.factors[0]))
        return self.network.encode(padded).latent_dist.mode()  # type: ignore[no-any-return]

    def generate(self, z: Tensor) -> Tensor:
        return self.network.decode(z).sample  # type: ignore[no-any-return]


class CausalVideo(PretrainedAutoencoder):
    """A causal autoencoder of videos (B, C, T, H, W): a latent of the first frame, then one of each `factors[0]`.

    cell: frames beyond the first come in multiples of it. One frame is an image.
    """

    cell: int

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if len(shape) == 4:
            low = 1 + (shape[1] - 1) // self.cell * self.cell
            if low != shape[1]:
                near = " or ".join(str(n) for n in (low, low + self.cell) if n > 0)
                raise ValueError(f"T={shape[1]} is not 1 + a multiple of {self.cell}; nearest: {near}")
            shape = (shape[0], shape[1] + self.factors[0] - 1, *shape[2:])
        return super().latent_shape(shape)

    def known(self, mask: Tensor) -> Tensor:
        """Which latents' own cells are known whole: (B, 1, T, H, W) bool -> (B, 1, *axes of the latents)."""
        first = mask[:, :, :1].expand(-1, -1, self.factors[0] - 1, -1, -1)
        return super().known(torch.cat([first, mask], dim=2))

    def mean(self, x: Tensor) -> Tensor:
        return self.network.encode(x).latent_dist.mode()  # type: ignore[no-any-return]

    def generate(self, z: Tensor) -> Tensor:
        return self.network.decode(z).sample  # type: ignore[no-any-return]


class PretrainedWan(CausalVideo):
    """AutoencoderKLWan (Wan 2.1 and 2.2): T = 1 + a multiple of 4 frames. Decoded values are clamped to [-1, 1]."""

    kind = "AutoencoderKLWan"

    def layout(self, settings: Mapping[str, Any]) -> Layout:
        patch = settings["patch_size"] or 1
        self.cell = 2 ** sum(settings["temperal_downsample"])
        if self.cell != 4:
            raise ValueError(
                f"temperal_downsample={settings['temperal_downsample']} must divide time by 4, as Wan does"
            )
        factor = 2 ** (len(settings["dim_mult"]) - 1) * patch
        return Layout(settings["in_channels"] // patch**2, settings["z_dim"], (4, factor, factor))


class PretrainedCogVideoX(CausalVideo):
    """AutoencoderKLCogVideoX: T = 1 + a multiple of 8 frames, for it decodes latents in pairs after the first."""

    kind = "AutoencoderKLCogVideoX"

    def layout(self, settings: Mapping[str, Any]) -> Layout:
        stride = int(settings["temporal_compression_ratio"])
        self.cell = 2 * stride
        factor = 2 ** (len(settings["block_out_channels"]) - 1)
        return Layout(settings["in_channels"], settings["latent_channels"], (stride, factor, factor))

    def generate(self, z: Tensor) -> Tensor:
        if z.shape[2] % 2 == 0:
            raise ValueError(f"z has {z.shape[2]} steps of time, but {self.kind} decodes 1, 3, 5, ...")
        return super().generate(z)


def by_frames(x: Tensor, frames: int, network: Callable[[Tensor], Tensor]) -> Tensor:
    """`network` of images (B, C, H, W) over a video (B, C, T, H, W), so many frames at once; over images as it is."""
    if x.ndim == 4:
        return network(x)
    images = rearrange(x, "b c t h w -> (b t) c h w")
    return rearrange(torch.cat([network(part) for part in images.split(frames)]), "(b t) c h w -> b c t h w", b=len(x))


def normalisation(settings: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Shift and gain of a config, (C,) or (1,): (z - shift) * gain is what its diffusion model is trained on."""
    mean, deviation = settings.get("latents_mean"), settings.get("latents_std")
    shift = (settings.get("shift_factor") or 0.0) if mean is None else mean
    factor = torch.tensor([settings.get("scaling_factor") or 1.0], dtype=torch.float32)
    gain = factor if deviation is None else factor / torch.tensor(deviation, dtype=torch.float32)
    return torch.tensor(shift, dtype=torch.float32).reshape(-1), gain


def read(kind: str, path: str, subfolder: str | None, revision: str | None, dtype: torch.dtype) -> Any:
    """The model of diffusers' class `kind` at `path`, frozen, in eval mode. Raises ValueError in one line."""
    try:
        import diffusers
    except ImportError as error:
        raise ValueError(f"{kind} needs diffusers: pip install 'diffusers>=0.42,<0.43'") from error
    from safetensors import SafetensorError

    cls = getattr(diffusers, kind)
    where = {"subfolder": subfolder, "revision": revision}
    try:
        found = cls.load_config(path, **where).get("_class_name")
        if found != kind:
            raise ValueError(f"it is of class {found}")
        with torch.random.fork_rng(devices=[]):  # weights that are overwritten must not cost the caller's seed
            network, report = cls.from_pretrained(
                path,
                **where,
                torch_dtype=dtype,
                use_safetensors=True,  # never a pickle
                low_cpu_mem_usage=False,  # which would need accelerate
                output_loading_info=True,
            )
        faults = {what: names for what, names in report.items() if names}
        if faults:
            raise ValueError("; ".join(f"{what}: {names}" for what, names in faults.items()))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        place = path if subfolder is None else f"{path}/{subfolder}"
        reason = " ".join(str(error).split())[:400]
        raise ValueError(f"{place} holds no {kind} in safetensors that can be read: {reason}") from error
    for module in network.modules():
        if hasattr(module, "weight_g"):
            remove_weight_norm(module)  # what it would compute at every call is fixed now, and can be copied
    return network.requires_grad_(False).eval()
