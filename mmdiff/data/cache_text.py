"""Embeddings of a frozen text encoder that are computed once and kept beside the data.

B prompts, L tokens, D width.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from mmdiff.data.cache_entries import DamagedEntryError, Entries
from mmdiff.data.cache_latents import DTYPES
from mmdiff.io import fingerprint

ROWS = 16  # prompts that are encoded together
Found = tuple[Tensor, Tensor]  # tokens (L, D) and vector (D,) of one prompt


class CachedText(nn.Module):
    """A frozen text encoder whose embeddings are kept in `folder`: list[str] -> tokens, mask, vector, as `mmdiff.text`.

    encoder: such as `mmdiff.text.PretrainedText`, alone or in `mmdiff.prompts.Weighted`. dtype: of what is stored;
    float16 takes half the room. What the encoder is (weights, tokenizer, class) and the prompt are in an entry's name,
    and a folder made with another encoder is refused. Opening the folder puts the embedding of the empty prompt there,
    so that condition dropout and guidance always find it. In training mode what is missing is encoded and put there; in
    eval mode, as in a pipeline that was exported, it is encoded and nothing is written.

    Raises ValueError for an encoder with parameters that training would change, and at first use for a stale folder.
    """

    def __init__(self, encoder: nn.Module, folder: str, dtype: str = "float32") -> None:
        super().__init__()
        if any(p.requires_grad for p in encoder.parameters()):
            raise ValueError(
                f"encoder={type(encoder).__name__} is trained, and what it gave would be stale after a step; "
                "leave CachedText out, or freeze it"
            )
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is unknown; choose {' or '.join(DTYPES)}")
        self.encoder, self.folder, self.dtype = encoder, Path(folder).expanduser(), dtype
        self._entries: Entries | None = None

    def forward(self, prompts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        entries = self.open()
        different = list(dict.fromkeys(prompts))
        found: dict[str, Found | None] = {p: None if entries is None else self._read(entries, p) for p in different}
        missing = [prompt for prompt, embedding in found.items() if embedding is None]
        if missing:
            made = self.encode(missing)
            if entries is not None and self.training:
                for prompt in missing:
                    self._write(entries, prompt, made[prompt])
            found.update(made)
        device = next(self.encoder.parameters()).device
        rows: list[Any] = [found[prompt] for prompt in prompts]
        tokens = pad_sequence([tokens for tokens, _ in rows], batch_first=True)  # (B, L, D)
        lengths = torch.tensor([len(tokens) for tokens, _ in rows])
        mask = torch.arange(tokens.shape[1]) < lengths[:, None]
        return tokens.to(device), mask.to(device), torch.stack([vector for _, vector in rows]).to(device)

    def fill(self, prompts: Sequence[str]) -> tuple[int, int]:
        """Encodes what is not there, damaged entries too. Returns how many prompts were there, and how many made."""
        entries = self.open(make=True)
        assert entries is not None
        different = list(dict.fromkeys(["", *prompts]))
        missing = [prompt for prompt in different if self._read(entries, prompt) is None]
        for start in tqdm(range(0, len(missing), ROWS), desc="encoding prompts", unit="batch", disable=None):
            for prompt, embedding in self.encode(missing[start : start + ROWS]).items():
                self._write(entries, prompt, embedding)
        return len(different) - len(missing), len(missing)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> dict[str, Found]:
        """Of each prompt, on the CPU and rounded to `dtype`, in the encoder's own precision also under autocast."""
        device = next(self.encoder.parameters()).device
        with torch.autocast(device.type, enabled=False):
            tokens, mask, vectors = self.encoder(prompts)
        return {
            prompt: (self._rounded(tokens[i][mask[i]]), self._rounded(vectors[i])) for i, prompt in enumerate(prompts)
        }

    def open(self, make: bool = False) -> Entries | None:
        """The folder, with the empty prompt in it; None where there is none and, in eval mode, none is made.

        Raises ValueError for a folder made with another encoder.
        """
        if self._entries is None:
            if not (make or self.training or self.folder.is_dir()):
                return None
            entries = Entries(self.folder, {"encoder": self.words(), "dtype": self.dtype})
            if make or self.training:
                entries.open()
                if self._read(entries, "") is None:
                    self._write(entries, "", self.encode([""])[""])
            self._entries = entries
        return self._entries

    def words(self) -> str:
        """The encoder in words that change with what it gives: class, weights, tokenizer and numbers of its own."""
        inner: Any = getattr(self.encoder, "encoder", self.encoder)  # that of `Weighted`
        tokenizer = getattr(inner, "tokenizer", None)
        if tokenizer is None:
            pieces = ""
        elif tokenizer.is_fast:
            tree = json.loads(tokenizer.backend_tokenizer.to_str())
            pieces = json.dumps({k: v for k, v in tree.items() if k not in ("padding", "truncation")}, sort_keys=True)
        else:
            pieces = json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])
        numbers = {name: value for name, value in vars(self.encoder).items() if type(value) in (int, float, str)}
        rest = hashlib.sha256(json.dumps([pieces, numbers], sort_keys=True).encode()).hexdigest()[:12]
        return f"{type(self.encoder).__name__} {fingerprint(self.encoder)} {rest}"

    @property
    def width(self) -> int:
        """D."""
        return int(self.encoder.width)  # type: ignore[arg-type]

    @property
    def longest(self) -> int:
        """The most tokens that the encoder takes, its own marks among them."""
        return int(self.encoder.longest)  # type: ignore[arg-type]

    def spans(self, prompt: str) -> list[tuple[int, int]]:
        """Characters (first, end) of each token, as the encoder says."""
        return self.encoder.spans(prompt)  # type: ignore[no-any-return, operator]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CachedText":
        self._entries = None  # another precision gives other embeddings
        return super()._apply(fn, recurse)  # type: ignore[return-value]

    def _load_from_state_dict(self, *args: Any) -> None:
        self._entries = None
        super()._load_from_state_dict(*args)

    def _rounded(self, values: Tensor) -> Tensor:
        return values.detach().to("cpu", DTYPES[self.dtype]).float().contiguous()

    def _read(self, entries: Entries, prompt: str) -> Found | None:
        """None where there is no entry, and, with a warning, for a damaged one."""
        try:
            found = entries.read(entries.path(prompt))
        except DamagedEntryError as error:
            warnings.warn(str(error), stacklevel=3)
            return None
        return None if found is None else (found[0]["tokens"].float(), found[0]["vector"].float())

    def _write(self, entries: Entries, prompt: str, embedding: Found) -> None:
        tokens, vector = (value.to(DTYPES[self.dtype]) for value in embedding)
        entries.write(entries.path(prompt), {"tokens": tokens, "vector": vector}, {"prompt": prompt})
