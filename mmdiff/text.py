"""Text encoders: list[str] -> (tokens (B, L, D), mask (B, L) bool, True = attend).

`ByteTransformer` needs no vocabulary and no download and is trained with the model; `PretrainedText` is any text tower
that transformers can load (T5, CLIP, CLAP).
"""

from typing import Any

import torch
from torch import Tensor, nn

from .nn.embed import sinusoid

PAD, START = 256, 257  # beside the 256 bytes


class ByteTransformer(nn.Module):
    """Transformer over the UTF-8 bytes of a prompt, trained in place. Convolutions first turn letters into words.

    width: D. depth: layers. max_bytes: the longest prompt; a longer one raises ValueError. An empty prompt is the start
    mark alone. Source: ByT5 (Xue et al. 2022) for bytes, CANINE (Clark et al. 2022, sec. 3) for the local mixing.
    """

    def __init__(self, width: int = 128, depth: int = 2, heads: int = 4, max_bytes: int = 256) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width} is not a multiple of heads={heads}")
        self.width, self.max_bytes = width, max_bytes
        self.embed = nn.Embedding(258, width, padding_idx=PAD)
        self.local = nn.ModuleList(nn.Conv1d(width, width, 5, padding=2) for _ in range(2))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        ids = self.bytes(prompts).to(self.embed.weight.device)  # (B, L)
        mask = ids != PAD
        positions = sinusoid(torch.arange(ids.shape[1], device=ids.device), self.width, shortest=4.0)
        x = self.embed(ids)
        for convolution in self.local:
            y = convolution((x * mask[..., None]).transpose(1, 2)).transpose(1, 2)  # padding stays out of its neighbours
            x = x + nn.functional.gelu(y)
        x = x + positions
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=~mask)
        return self.norm(x), mask

    def bytes(self, prompts: list[str]) -> Tensor:
        """(B, L) of byte values after a start mark, padded to the longest."""
        rows = [[START, *prompt.encode()] for prompt in prompts]
        for prompt, row in zip(prompts, rows, strict=True):
            if len(row) - 1 > self.max_bytes:
                raise ValueError(
                    f"the prompt {prompt[:40]!r}... has {len(row) - 1} bytes, more than max_bytes={self.max_bytes}: shorten it"
                )
        longest = max(len(row) for row in rows)
        return torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])


class PretrainedText(nn.Module):
    """Frozen text tower of a pretrained T5, CLIP or CLAP model, through transformers (extra `text`).

    path: a folder, or the id of a model on the hub. max_tokens: longer prompts are cut there.
    D is `width`, the tower's own. Raises ValueError where transformers is missing, the model's type is not known, or the
    tokenizer knows so few words that every prompt would look alike (transformers 5 does that where files are missing).
    """

    TOWERS = {"t5": "T5EncoderModel", "clip": "CLIPTextModel", "clip_text_model": "CLIPTextModel", "clap": "ClapTextModel",
              "clap_text_model": "ClapTextModel"}  # fmt: skip

    def __init__(self, path: str, max_tokens: int = 77) -> None:
        super().__init__()
        try:
            import transformers
        except ImportError:
            raise ValueError("PretrainedText needs transformers: pip install 'mmdiff[text]'") from None
        kind = transformers.AutoConfig.from_pretrained(path).model_type
        if kind not in self.TOWERS:
            raise ValueError(f"{path} holds a {kind!r} model; text towers known here: {', '.join(sorted(self.TOWERS))}")
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(path)
        words = ("a red ball", "two dogs bark", "seven")
        if len({tuple(self.tokenizer(w)["input_ids"]) for w in words}) < len(words):
            raise ValueError(f"the tokenizer of {path} gives different prompts the same ids: its vocabulary files are missing")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.tower = getattr(transformers, self.TOWERS[kind]).from_pretrained(path).eval().requires_grad_(False)
        self.max_tokens, self.width = max_tokens, self.tower.config.hidden_size

    def train(self, mode: bool = True) -> "PretrainedText":
        super().train(mode)
        self.tower.eval()  # frozen: no dropout in it, ever
        return self

    @torch.no_grad()
    def forward(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        device = next(self.tower.parameters()).device
        inputs = self.tokenizer(prompts, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt").to(device)
        states = self.tower(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
        return states, inputs["attention_mask"].bool()
