"""Text encoders: list[str] -> tokens (B, L, D), mask (B, L) bool (True = attend), vector (B, D) of the whole prompt.

Each also says `longest`, the most tokens it takes, and `spans(prompt)`, which characters each token stands for: that is
all that `mmdiff.prompts.Weighted` needs to weigh words and to take prompts of any length.

`ByteTransformer` needs no vocabulary and no download and is trained with the model; `PretrainedText` is any text tower
that transformers can load (T5, CLIP, CLAP).
"""

import re
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .nn.embed import sinusoid

LONGEST = 16  # bytes of a piece; longer words, and scripts without spaces, are several
LOUDNESS = 2.0  # of a prompt's vector
PIECES = re.compile(r"\w+|[^\w\s]")


class ByteTransformer(nn.Module):
    """Transformer over the words of a prompt, each made of its UTF-8 bytes by convolutions; trained in place.

    No vocabulary: any script, any new word. A word means the same wherever it stands, so that little data suffices.
    width: D. depth: layers. heads: of attention. max_words: the longest prompt, in words and punctuation marks; a
    longer one raises ValueError. An empty prompt is a start mark alone, which every prompt begins with.
    The vector is the sum of the words before any layer, scaled so that one other word moves each of its D channels by
    0.6 in a prompt of 6 words and by 0.3 in one of 31 (measured untrained): a backbone hears that at once, and word
    order from the tokens later. With a mean or a maximum over the layers' output a word moves it by 0.1 or less, and
    prompts were ignored for the first 500 to 1,000 steps of training.
    Source: CharacterBERT (El Boukkouri et al. 2020) for words from characters, ByT5 (Xue et al. 2022) for bytes.
    """

    def __init__(self, width: int = 128, depth: int = 2, heads: int = 4, max_words: int = 96) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width} is not a multiple of heads={heads}")
        self.width, self.max_words = width, max_words
        self.embed = nn.Embedding(257, width, padding_idx=256)
        self.local = nn.ModuleList(nn.Conv1d(width, width, 3, padding=1) for _ in range(2))
        self.word_norm = nn.LayerNorm(width)
        self.start = nn.Parameter(torch.randn(width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, prompts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        split = [self.pieces(prompt) for prompt in prompts]
        known = {piece: i + 1 for i, piece in enumerate(sorted({piece for pieces in split for piece in pieces}))}
        # Without any word, of one that nobody reads: a process whose prompts are all empty would else have no gradient
        # for the words' weights, and those that train with it would wait for it for ever.
        table = torch.cat([self.start[None], self.words(list(known) or [b"-"])])
        longest = 1 + max(len(pieces) for pieces in split)
        ids = torch.tensor([[0] + [known[p] for p in pieces] + [-1] * (longest - 1 - len(pieces)) for pieces in split])
        ids = ids.to(table.device)
        mask = ids >= 0
        positions = sinusoid(torch.arange(longest, device=ids.device), self.width, shortest=4.0)
        words = table[ids.clamp(min=0)] * mask[..., None]  # (B, L, D)
        vector = LOUDNESS * words.sum(dim=1) / mask.sum(dim=1, keepdim=True) ** 0.5
        x = words + positions.to(table.dtype)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=~mask)
        return self.norm(x), mask, vector

    def words(self, pieces: list[bytes]) -> Tensor:
        """(N, D) of N pieces, from their bytes."""
        rows = [list(piece) + [256] * (LONGEST - len(piece)) for piece in pieces]
        ids = torch.tensor(rows, device=self.start.device)
        there = (ids < 256).unsqueeze(1)  # (N, 1, LONGEST)
        x = self.embed(ids).transpose(1, 2)
        for convolution in self.local:
            x = x + nn.functional.gelu(convolution(x * there))
        return self.word_norm((x * there).sum(dim=2) / there.sum(dim=2) ** 0.5)

    @property
    def longest(self) -> int:
        """The most tokens it takes, the start mark among them."""
        return 1 + self.max_words

    def spans(self, prompt: str) -> list[tuple[int, int]]:
        """Characters (first, end) of each token, (0, 0) of the start mark; of prompts of any length."""
        found = [(0, 0)]
        for match in PIECES.finditer(prompt):
            word = match.group().encode()
            ends = [match.start() + len(word[:i].decode(errors="ignore")) for i in range(0, len(word), LONGEST)]
            found += pairwise([*ends, match.end()])
        return found

    def pieces(self, prompt: str) -> list[bytes]:
        """Words and punctuation marks as bytes, cut at LONGEST. Raises ValueError where there are too many."""
        words = [word.encode() for word in PIECES.findall(prompt)]
        pieces = [word[i : i + LONGEST] for word in words for i in range(0, len(word), LONGEST)]
        if len(pieces) > self.max_words:
            raise ValueError(
                f"the prompt {prompt[:40]!r}... has {len(pieces)} words and marks, more than "
                f"max_words={self.max_words}: shorten it, or wrap the encoder in mmdiff.prompts.Weighted"
            )
        return pieces


class PretrainedText(nn.Module):
    """Frozen text tower of a pretrained T5, CLIP or CLAP model, through transformers (extra `text`).

    path: a folder, or the id of a model on the hub. max_tokens: longer prompts, marks included, raise ValueError.
    D is `width`, the tower's own; the vector is the tokens' mean. Raises ValueError where transformers is missing,
    the model's type is not known, max_tokens is more than the tower has positions, or the tokenizer gives different
    prompts the same ids, as transformers 5 does where its files are missing.
    """

    TOWERS: ClassVar[dict[str, str]] = {
        "t5": "T5EncoderModel",
        "clip": "CLIPTextModel",
        "clip_text_model": "CLIPTextModel",
        "clap": "ClapTextModel",
        "clap_text_model": "ClapTextModel",
    }

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
            raise ValueError(
                f"the tokenizer of {path} gives different prompts the same ids: its vocabulary files are missing"
            )
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.tower = getattr(transformers, self.TOWERS[kind]).from_pretrained(path).eval().requires_grad_(False)
        positions = getattr(self.tower.config, "max_position_embeddings", None)
        if positions is not None and max_tokens > positions:
            raise ValueError(f"max_tokens={max_tokens} is more than the {positions} positions of {path}")
        self.max_tokens, self.width = max_tokens, self.tower.config.hidden_size

    def train(self, mode: bool = True) -> "PretrainedText":
        super().train(mode)
        self.tower.eval()  # frozen: no dropout in it, ever
        return self

    @torch.no_grad()
    def forward(self, prompts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        device = next(self.tower.parameters()).device
        inputs = self.tokenizer(prompts, padding=True, return_tensors="pt").to(device)
        counts = inputs["attention_mask"].sum(dim=1).tolist()
        for prompt, count in zip(prompts, counts, strict=True):
            if count > self.max_tokens:
                raise ValueError(
                    f"the prompt {prompt[:40]!r}... has {count} tokens, more than max_tokens={self.max_tokens}: "
                    "shorten it, or wrap the encoder in mmdiff.prompts.Weighted, which takes it in chunks"
                )
        states = self.tower(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
        mask = inputs["attention_mask"].bool()
        vector = (states * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)
        return states, mask, vector

    @property
    def longest(self) -> int:
        """The most tokens it takes, its own marks among them."""
        return self.max_tokens

    def spans(self, prompt: str) -> list[tuple[int, int]]:
        """Characters (first, end) of each token, (0, 0) of its own marks; of prompts of any length.

        Raises ValueError where the tokenizer cannot tell: it must be one of the tokenizers package (a "fast" one).
        """
        if not self.tokenizer.is_fast:
            raise ValueError("this tokenizer does not say which characters a token stands for; weights need a fast one")
        return [tuple(span) for span in self.tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]]
