"""Features of clips by pretrained networks that the user gives, for Frechet and kernel video distances.

B batch, T frames, H W space; clips are (B, 3, T, H, W) in [-1, 1]. Weights are read from safetensors files alone, and
nothing is downloaded: a TorchScript file (the usual I3D) is a program, and is not run. `mmdiff.readers.ReaderFeatures`
is the default, `video.i3d.I3D` the network of the first video distances.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdiff.distance import Extractor


class VideoMAE(Extractor):
    """Mean of the last tokens of a VideoMAE (Tong et al. 2022), of as many frames as it takes, spread evenly.

    folder: a model of transformers' (extra `text`): config.json and model.safetensors. Raises ValueError for another.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.model, self.digest = pretrained(folder, "videomae", "VideoMAEModel")

    @property
    def protocol(self) -> str:
        config = self.model.config
        return f"VideoMAE {self.digest}, {config.num_frames} frames of {config.image_size}, bilinear, mean of tokens"

    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        config = self.model.config
        pixels = normalised(spread(x, config.num_frames), config.image_size, IMAGENET)
        return self.model(pixel_values=pixels).last_hidden_state.mean(1)


class ClipVision(Extractor):
    """Mean over frames of CLIP's image embeddings (Radford et al. 2021): what is in the frames, without their order.

    folder: a model of transformers' (extra `text`): config.json and model.safetensors. frames: how many, spread evenly.
    """

    def __init__(self, folder: str, frames: int = 8) -> None:
        super().__init__()
        if frames < 1:
            raise ValueError(f"frames={frames} is below 1")
        self.model, self.digest = pretrained(folder, "clip", "CLIPVisionModelWithProjection")
        self.frames = frames

    @property
    def protocol(self) -> str:
        return (
            f"CLIP {self.digest}, {self.frames} frames of {self.model.config.image_size}, bilinear, mean of embeddings"
        )

    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        pixels = normalised(spread(x, self.frames), self.model.config.image_size, CLIP)  # (B, T, 3, H, W)
        found = self.model(pixel_values=pixels.flatten(0, 1)).image_embeds
        return found.unflatten(0, pixels.shape[:2]).mean(1)


Colours = tuple[tuple[float, float, float], tuple[float, float, float]]  # mean and spread of red, green, blue in [0, 1]
IMAGENET: Colours = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP: Colours = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def pretrained(folder: str, kind: str, name: str) -> tuple[Any, str]:
    """(the transformers model of this class in a folder, frozen; first 12 digits of the SHA-256 of its weights)."""
    try:
        import transformers
    except ImportError:
        raise ValueError(f"{name} needs transformers: pip install 'mmdiff[text]'") from None
    weights = Path(folder) / "model.safetensors"
    if not (weights.is_file() and (Path(folder) / "config.json").is_file()):
        raise ValueError(f"{folder} has no config.json and model.safetensors; give a model's folder")
    found = transformers.AutoConfig.from_pretrained(folder, local_files_only=True).model_type
    if not found.startswith(kind):
        raise ValueError(f"{folder} holds a {found!r} model, not a {kind!r} one")
    model = getattr(transformers, name).from_pretrained(folder, use_safetensors=True, local_files_only=True)
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    return model.eval().requires_grad_(False), digest


def spread(x: Tensor, frames: int) -> Tensor:
    """`frames` frames of clips (B, 3, T, H, W), spread evenly: the middle ones of as many equal parts of T."""
    if x.ndim != 5 or x.shape[1] != 3:
        raise ValueError(f"clips have shape {tuple(x.shape)}; (B, 3, T, H, W) is needed")
    places = (torch.arange(frames, device=x.device) * 2 + 1) * x.shape[2] // (2 * frames)
    return x[:, :, places]


def normalised(x: Tensor, side: int, colours: Colours) -> Tensor:
    """Clips (B, 3, T, H, W) in [-1, 1] as (B, T, 3, side, side) of the colours that a network was trained on."""
    pixels = x.movedim(1, 2).flatten(0, 1)
    pixels = F.interpolate(pixels, (side, side), mode="bilinear", align_corners=False, antialias=True)
    mean, std = (torch.tensor(part, device=x.device).view(3, 1, 1) for part in colours)
    return (((pixels + 1) / 2 - mean) / std).unflatten(0, (len(x), -1))
