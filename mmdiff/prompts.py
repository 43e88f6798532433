"""Prompts in which words weigh more or less, take turns, or are too many for the encoder.

    (red)        1.1 times as much          (red:1.3)    1.3 times as much         ((red))   1.21 times
    [red]        1 / 1.1 times as much      (red:0)      as if it were not there
    [red|blue]   red and blue in turn, from sampling step to step; an end may be empty: [red|]
    \\( \\) \\[ \\] \\| \\: \\\\   the marks themselves; a colon or a bar outside brackets needs no backslash

Brackets nest and their weights multiply. B batch, L tokens, D width.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .conditioning import Batch, Conditioner, Text
from .sampling import Denoise

HEAVIEST = 10.0
MOST_TURNS = 64
MARKS = "()[]|:\\"


class Piece(NamedTuple):
    """Some text of a prompt and its weight."""

    text: str
    weight: float


def parse(prompt: str, factor: float = 1.1) -> list[list[Piece]]:
    """The pieces of a prompt, for each turn of its alternations: [[...]] where it has none.

    factor: the weight of brackets that state none. Raises ValueError naming the character at fault, counted from 1.
    """
    reader = _Reader(prompt, factor)
    turns = reader.sequence("")
    if reader.at < len(prompt):
        raise reader.error(reader.at, f"{prompt[reader.at]!r} closes nothing; write \\{prompt[reader.at]} for the mark")
    return [_merged(pieces) for pieces in turns]


def unparse(pieces: Sequence[Piece]) -> str:
    """A prompt that `parse` reads as these pieces."""
    texts = ["".join(f"\\{c}" if c in MARKS else c for c in piece.text) for piece in pieces]
    return "".join(t if p.weight == 1 else f"({t}:{p.weight!r})" for t, p in zip(texts, pieces, strict=True))


def alternate(denoisers: Sequence[Denoise], sigmas: Tensor) -> Denoise:
    """Denoiser that is the next of several at each step of the grid, and the first again after the last.

    sigmas: (steps + 1,), the grid that it is sampled on; a sigma between two levels belongs to the step from the upper.
    """
    if len(denoisers) == 1:
        return denoisers[0]
    levels = sigmas.tolist()

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        level = float(sigma.max()) * (1 + 1e-6)  # the sampler's state may round the grid's float64
        return denoisers[sum(upper > level for upper in levels) % len(denoisers)](x, sigma)

    return denoise


def alternatives(conditioner: Conditioner | None, batch: Batch) -> list[Batch]:
    """The batches that alternating prompts stand for, in turn: [batch] unless a `Weighted` encoder reads some."""
    texts = [m for m in conditioner.modules() if isinstance(m, Text)] if conditioner is not None else []
    turns = {
        text.key: [text.encoder.turns(prompt) for prompt in batch[text.key]]
        for text in texts
        if isinstance(text.encoder, Weighted)
    }
    count = math.lcm(*(len(own) for prompts in turns.values() for own in prompts))
    if count == 1:
        return [batch]
    if count > MOST_TURNS:
        raise ValueError(f"the prompts of the batch take {count} turns together, more than {MOST_TURNS}")
    return [
        {**batch, **{key: [own[turn % len(own)] for own in prompts] for key, prompts in turns.items()}}
        for turn in range(count)
    ]


def weigh(model: nn.Module) -> int:
    """Wraps the text encoders of a model in `Weighted`, in place, and returns how many there are."""
    texts = [m for m in model.modules() if isinstance(m, Text)]
    for text in texts:
        if not isinstance(text.encoder, Weighted):
            text.encoder = Weighted(text.encoder)
    return len(texts)


class Weighted(nn.Module):
    """A text encoder that reads weights in prompts, and prompts of any length.

    encoder: `ByteTransformer`, `PretrainedText` or any encoder that also says `longest`, the most tokens it takes, and
        `spans(prompt)`, the characters (first, end) that each token stands for, (0, 0) for a mark of its own.
    factor: the weight of `(word)`, and 1 over that of `[word]`.

    A token of weight w becomes e + w * (token - e), with e the mean token of the empty prompt: the interpolation that
    ComfyUI makes with the empty prompt's token of the same position, which unpadded prompts have not. Its norm is not
    kept. Tokens that share characters of several weights take their mean. The vector v of the prompt becomes
    v + sum_k (w_k - 1) * (v - v without piece k), so that a weight of 0 is the prompt without the piece.
    Prompts longer than the encoder takes are cut between words into chunks, whose tokens follow one another and whose
    vectors are averaged. Where no weight is other than 1 and no prompt is long, it is the encoder, bit for bit.
    Raises ValueError for a malformed prompt, and for an alternation [a|b], which `Generate` resolves step by step.
    """

    def __init__(self, encoder: nn.Module, factor: float = 1.1) -> None:
        super().__init__()
        if not (hasattr(encoder, "spans") and hasattr(encoder, "longest")):
            raise ValueError(f"encoder={type(encoder).__name__} has no `spans` and `longest`, which weights need")
        if not 1 < factor <= HEAVIEST:
            raise ValueError(f"factor={factor} must be above 1 and at most {HEAVIEST:g}; 1.1 is usual")
        self.encoder: Any = encoder
        self.factor = factor

    def forward(self, prompts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        pieces = [self.pieces(prompt) for prompt in prompts]
        whole = [_text(p) for p in pieces]
        cuts = [self.chunks(text) for text in whole]
        chunks = [text[first:end] for text, places in zip(whole, cuts, strict=True) for first, end in places]
        tokens, mask, vector = self.encoder(chunks)
        if any(piece.weight != 1 for p in pieces for piece in p):
            tokens = self.weighted(tokens, mask, chunks, pieces, cuts)
        counts = [len(places) for places in cuts]
        if max(counts) > 1:
            rows = [t[m] for t, m in zip(tokens, mask, strict=True)]
            joined = [torch.cat(rows[end - n : end]) for n, end in zip(counts, accumulate(counts), strict=True)]
            tokens = nn.utils.rnn.pad_sequence(joined, batch_first=True)
            lengths = torch.tensor([len(row) for row in joined], device=mask.device)
            mask = torch.arange(tokens.shape[1], device=mask.device) < lengths[:, None]
            vector = _means(vector, counts)
        return tokens, mask, self.shared(vector, whole, pieces)

    def pieces(self, prompt: str) -> list[Piece]:
        turns = parse(prompt, self.factor)
        if len(turns) > 1:
            raise ValueError(
                f"the prompt {prompt[:40]!r} alternates, which needs the steps of sampling: give it to a Generate stage"
            )
        return turns[0]

    def turns(self, prompt: str) -> list[str]:
        """The prompts, each without alternation, that a prompt stands for in turn."""
        return [unparse(pieces) for pieces in parse(prompt, self.factor)]

    def chunks(self, text: str) -> list[tuple[int, int]]:
        """Where a text is cut so that the encoder takes each part: characters (first, end). One where it takes all."""
        longest = self.encoder.longest
        if len(self.encoder.spans(text)) <= longest:
            return [(0, len(text))]
        words = [i for i in range(1, len(text)) if text[i - 1].isspace() and not text[i].isspace()]
        cuts, first = [], 0
        while first < len(text):
            fits = lambda end, first=first: len(self.encoder.spans(text[first:end])) <= longest
            ends = [i for i in words if i > first] + [len(text)]
            if not fits(ends[0]):  # one word, or a script without spaces: between tokens
                ends = sorted({first + i for i, _ in self.encoder.spans(text[first:]) if i > 0})
            count = bisect_left(ends, True, key=lambda end: not fits(end))  # a longer text has no fewer tokens
            if count == 0:
                raise ValueError(f"longest={longest} of {type(self.encoder).__name__} is too short for any chunk")
            cuts.append((first, ends[count - 1]))
            first = ends[count - 1]
        return cuts

    def weighted(
        self, tokens: Tensor, mask: Tensor, chunks: list[str], pieces: list[list[Piece]], cuts: list[Any]
    ) -> Tensor:
        """tokens (N, L, D) of the chunks, each moved away from the empty prompt's or towards it by its weight."""
        scale = torch.ones(tokens.shape[:2], dtype=tokens.dtype)
        places = [(p, place) for p, own in zip(pieces, cuts, strict=True) for place in own]
        for row, (chunk, (p, (first, end))) in enumerate(zip(chunks, places, strict=True)):
            letters = [piece.weight for piece in p for _ in piece.text][first:end]
            held = mask[row].nonzero()[:, 0].cpu()
            spans = self.encoder.spans(chunk)
            if len(spans) != len(held):
                raise ValueError(f"encoder gives {len(held)} tokens and {len(spans)} spans for {chunk[:40]!r}")
            scale[row, held] = torch.tensor([_mean(letters, chunk, *span) for span in spans], dtype=scale.dtype)
        empty, there, _ = self.encoder([""])
        middle = empty[0][there[0]].mean(dim=0)  # (D,)
        scale = scale.to(tokens.device)[..., None]
        return torch.where(scale == 1, tokens, torch.lerp(middle.expand_as(tokens), tokens, scale))

    def shared(self, vector: Tensor, whole: list[str], pieces: list[list[Piece]]) -> Tensor:
        """vector (B, D) with the share of each weighted piece, what the prompt loses without it, weighted."""
        found = [(i, k) for i, p in enumerate(pieces) for k, piece in enumerate(p) if piece.weight != 1]
        if not found:
            return vector
        without = [_text(pieces[i][:k] + pieces[i][k + 1 :]) for i, k in found]
        cuts = [self.chunks(text) for text in without]
        chunks = [text[first:end] for text, places in zip(without, cuts, strict=True) for first, end in places]
        rest = _means(self.encoder(chunks)[2], [len(places) for places in cuts])
        rows = torch.tensor([i for i, _ in found], device=vector.device)
        more = torch.tensor([[pieces[i][k].weight - 1] for i, k in found], dtype=vector.dtype, device=vector.device)
        return vector.index_add(0, rows, more * (vector[rows] - rest))


@dataclass
class _Reader:
    """Where in a prompt the reader is."""

    prompt: str
    factor: float
    at: int = 0

    def error(self, at: int, what: str) -> ValueError:
        return ValueError(f"the prompt {self.prompt[:40]!r}, character {at + 1}: {what}")

    def sequence(self, ends: str) -> list[list[Piece]]:
        """Pieces up to one of `ends`, a bracket that closes or the prompt's end, for each turn."""
        turns: list[list[Piece]] = [[]]
        while self.at < len(self.prompt) and (c := self.prompt[self.at]) not in ends and c not in ")]":
            if c == "(":
                turns = self.together(turns, self.round())
            elif c == "[":
                turns = self.together(turns, self.square())
            else:
                if c == "\\":
                    self.at += 1
                    if self.prompt[self.at : self.at + 1] not in tuple(MARKS):
                        raise self.error(self.at - 1, "a backslash before no mark; write \\\\ for one")
                turns = self.together(turns, [[Piece(self.prompt[self.at], 1.0)]])
                self.at += 1
        return turns

    def round(self) -> list[list[Piece]]:
        opened, weight = self.at, self.factor
        self.at += 1
        turns = self.sequence(":")
        if self.prompt[self.at : self.at + 1] == ":":
            closing = self.prompt.find(")", self.at)
            number = self.prompt[self.at + 1 : closing if closing >= 0 else None]
            try:
                weight = float(number)
            except ValueError:
                raise self.error(self.at, f"the weight {number!r} is no number; write \\: for a colon") from None
            if not 0 <= weight <= HEAVIEST:
                raise self.error(self.at, f"the weight {number} is outside 0..{HEAVIEST:g}; write \\: for a colon")
            self.at += 1 + len(number)
        self.close(")", opened, turns)
        return _scaled(turns, weight)

    def square(self) -> list[list[Piece]]:
        opened = self.at
        options: list[list[list[Piece]]] = []
        while not options or self.prompt[self.at : self.at + 1] == "|":
            self.at += 1
            options.append(self.sequence("|:"))
        if self.prompt[self.at : self.at + 1] == ":":
            raise self.error(self.at, "a colon means nothing in [...]; write (word:0.8), or \\: for the mark")
        if len(options) == 1:
            self.close("]", opened, options[0])
            return _scaled(options[0], 1 / self.factor)
        self.close("]", opened)
        rounds = math.lcm(*(len(turns) for turns in options))
        self.check(rounds * len(options))
        return [turns[i % len(turns)] for i in range(rounds) for turns in options]

    def together(self, one: list[list[Piece]], other: list[list[Piece]]) -> list[list[Piece]]:
        """One after the other, in each turn."""
        count = math.lcm(len(one), len(other))
        self.check(count)
        return [one[i % len(one)] + other[i % len(other)] for i in range(count)]

    def close(self, mark: str, opened: int, turns: list[list[Piece]] | None = None) -> None:
        if self.prompt[self.at : self.at + 1] != mark:
            raise self.error(
                opened, f"{self.prompt[opened]!r} is not closed by {mark!r}; write \\( or \\[ for the mark"
            )
        if turns == [[]]:
            raise self.error(opened, "the brackets are empty")
        self.at += 1

    def check(self, turns: int) -> None:
        if turns > MOST_TURNS:
            raise self.error(self.at, f"alternations take {turns} turns together, more than {MOST_TURNS}")


def _scaled(turns: list[list[Piece]], weight: float) -> list[list[Piece]]:
    return [[Piece(piece.text, piece.weight * weight) for piece in pieces] for pieces in turns]


def _merged(pieces: list[Piece]) -> list[Piece]:
    return [Piece("".join(p.text for p in run), weight) for weight, run in groupby(pieces, lambda p: p.weight)]


def _text(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def _mean(letters: list[float], text: str, first: int, end: int) -> float:
    """Mean weight of a token's characters, spaces aside; 1 for a mark of the encoder's own."""
    own = [letters[i] for i in range(first, end) if not text[i].isspace()]
    return sum(own) / len(own) if own else 1.0


def _means(vectors: Tensor, counts: list[int]) -> Tensor:
    """(sum of counts, D) -> (len(counts), D), the mean of each run."""
    return torch.stack([run.mean(dim=0) for run in vectors.split(counts)])
