"""How well a sound fits its caption, by CLAP weights in a folder."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from audio.files import resample
from mmdiff.data.towers import tower, unit


@torch.inference_mode()
def clap_score(folder: str, waveform: Tensor, sample_rate: int, caption: str) -> float:
    """Cosine of a sound (C, T) with its caption, -1 to 1; of the channels' mean. folder: in transformers' layout."""
    model, tokenizer = tower(folder, "clap")
    extract = _extractor(folder)
    mono = resample(waveform.mean(0), sample_rate, int(extract.sampling_rate))
    # the extractor would cut a longer sound at a random place; the middle is the same every time
    first = max(0, (mono.shape[0] - int(extract.nb_max_samples)) // 2)
    mono = mono[first : first + int(extract.nb_max_samples)]
    features = extract(mono.numpy(), sampling_rate=int(extract.sampling_rate), return_tensors="pt")
    words = tokenizer([caption], return_tensors="pt", truncation=True, max_length=_longest(model))
    words = {name: words[name] for name in ("input_ids", "attention_mask")}
    heard = unit(model.get_audio_features(**features))
    return float((heard @ unit(model.get_text_features(**words)).T).mean())


def _longest(model: Any) -> int:
    return int(model.config.text_config.max_position_embeddings) - 2  # RoBERTa counts positions from 2


@lru_cache(maxsize=2)
def _extractor(folder: str) -> Any:
    import transformers

    return transformers.AutoFeatureExtractor.from_pretrained(str(Path(folder).expanduser()), local_files_only=True)
