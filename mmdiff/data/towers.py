"""Pretrained two-tower models (CLIP, CLAP) that score how well media fit their captions, from a folder of weights."""

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def weights_key(folder: str) -> str:
    """Hash of the folder's safetensors and JSON files, so that other weights give other keys. Raises ValueError."""
    files = sorted(p for p in Path(folder).expanduser().glob("*") if p.suffix in (".safetensors", ".json", ".txt"))
    if not any(file.suffix == ".safetensors" for file in files):
        raise ValueError(f"{folder} holds no .safetensors weights; give a folder of a model in transformers' layout")
    found = hashlib.sha256()
    for file in files:
        found.update(file.name.encode())
        with file.open("rb") as data:
            found.update(hashlib.file_digest(data, "sha256").digest())
    return found.hexdigest()


@lru_cache(maxsize=2)  # a worker process loads a model once
def tower(folder: str, kind: str) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder; kind: transformers' model type, clip or clap. Nothing is downloaded.

    Raises ValueError where transformers is missing or the folder holds another model.
    """
    try:
        import transformers
    except ImportError:
        raise ValueError(f"{kind} scores need transformers: pip install 'mmdiff[text]'") from None
    path = str(Path(folder).expanduser())
    try:
        found = transformers.AutoConfig.from_pretrained(path, local_files_only=True).model_type
        if found != kind:
            raise ValueError(f"{folder} holds a {found!r} model; a {kind} model is needed")
        model = transformers.AutoModel.from_pretrained(path, local_files_only=True, use_safetensors=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    except OSError as error:
        raise ValueError(f"{folder}: no {kind} model in transformers' layout ({str(error).splitlines()[0]})") from error
    return model.eval().requires_grad_(False), tokenizer


def unit(vectors: Any) -> Tensor:
    """(n, D) of length one; from what transformers returns, a tensor or, from 5 on, an output that holds it."""
    found: Tensor = vectors if isinstance(vectors, Tensor) else vectors.pooler_output
    return torch.nn.functional.normalize(found, dim=-1)
