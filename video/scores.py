"""Scores of pictures by weights in a folder: CLIP's agreement with the caption, and how pleasing they are."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from mmdiff.data.towers import tower, unit

_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training pictures, red, green, blue
_STD = (0.26862954, 0.26130258, 0.27577711)


@torch.inference_mode()
def clip_score(folder: str, shots: Sequence[np.ndarray], caption: str) -> tuple[float, Tensor]:
    """(mean cosine of the pictures with the caption, -1 to 1; the pictures' unit vectors (n, D)).

    folder: a CLIP model in transformers' layout. shots: (H, W, 3) uint8. Hessel et al. 2021, without their factor 2.5.
    """
    model, tokenizer = tower(folder, "clip")
    side = int(model.config.vision_config.image_size)
    most = int(model.config.text_config.max_position_embeddings)
    words = tokenizer([caption], return_tensors="pt", truncation=True, max_length=most)
    words = {name: words[name] for name in ("input_ids", "attention_mask")}
    vectors = unit(model.get_image_features(pixel_values=torch.stack([_prepared(shot, side) for shot in shots])))
    return float((vectors @ unit(model.get_text_features(**words)).T).mean()), vectors


def _prepared(shot: np.ndarray, side: int) -> Tensor:
    """(H, W, 3) uint8 -> (3, side, side), as CLIP was trained: bicubic, the middle, its own mean and deviation."""
    height, width = shot.shape[:2]
    scale = side / min(height, width)
    size = (max(side, round(width * scale)), max(side, round(height * scale)))
    picture = Image.fromarray(shot).resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    cut = torch.from_numpy(np.array(picture.crop((left, top, left + side, top + side)))).permute(2, 0, 1) / 255
    return (cut - torch.tensor(_MEAN).view(3, 1, 1)) / torch.tensor(_STD).view(3, 1, 1)


@torch.inference_mode()
def aesthetic_score(folder: str, vectors: Tensor) -> float:
    """Mean of a linear rating of CLIP's unit vectors (n, D), as LAION's aesthetic predictor.

    folder: holds aesthetic.safetensors with weight (1, D) and bias (1,).
    """
    weight, bias = _rating(folder)
    if weight.shape != (1, vectors.shape[1]):
        raise ValueError(f"{folder}: weight is {tuple(weight.shape)}; this CLIP needs (1, {vectors.shape[1]})")
    return float((vectors @ weight.T + bias).mean())


@lru_cache(maxsize=2)
def _rating(folder: str) -> tuple[Tensor, Tensor]:
    path = Path(folder).expanduser() / "aesthetic.safetensors"
    if not path.is_file():
        raise ValueError(f"{path} is not there; aesthetic_weights is a folder with that file")
    tensors = load_file(path)
    if set(tensors) != {"weight", "bias"}:
        raise ValueError(f"{path} holds {', '.join(sorted(tensors))}; weight (1, D) and bias (1,) are needed")
    return tensors["weight"], tensors["bias"]
