"""Embeddings of a frozen text encoder that are computed once: the same, never stale, the empty prompt always there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmdiff.conditioning import Text
from mmdiff.data.cache_entries import DamagedEntryError
from mmdiff.data.cache_text import CachedText
from mmdiff.prompts import Weighted
from mmdiff.text import ByteTransformer, PretrainedText

from .test_text import tower

PROMPTS = ["a red ball", "two dogs", "", "a red ball"]
Embedding = tuple[Tensor, Tensor, Tensor]


class Counted(nn.Module):
    """An encoder that notes what it is asked for."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.encoder, self.asked = inner, list[str]()
        self.width, self.longest = inner.width, inner.longest

    def forward(self, prompts: list[str]) -> Embedding:
        self.asked += prompts
        return self.encoder(prompts)  # type: ignore[no-any-return]

    def spans(self, prompt: str) -> list[tuple[int, int]]:
        return self.encoder.spans(prompt)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny T5, a tiny CLIP, another T5 of other weights, and the T5 with a tokenizer of another order of words."""
    pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("towers")
    made = {}
    for name, seed, kind in (("t5", 0, "t5"), ("clip", 0, "clip"), ("other", 1, "t5"), ("words", 0, "t5")):
        torch.manual_seed(seed)
        (root / name).mkdir()
        from .test_text import WORDS

        made[name] = tower(root / name, kind, WORDS if name != "words" else WORDS[::-1])
    return made


def close(a: Embedding, b: Embedding) -> None:
    """The same tokens where they count, masks and vectors."""
    assert torch.equal(a[1], b[1])
    torch.testing.assert_close(a[0][a[1]], b[0][b[1]], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a[2], b[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_it_gives_what_the_encoder_gives_and_asks_it_once(towers: dict[str, Path], tmp_path: Path, kind: str) -> None:
    plain = PretrainedText(str(towers[kind]), max_tokens=8)
    counted = Counted(plain)
    cached = CachedText(counted, str(tmp_path)).train()
    wanted = plain(PROMPTS)
    close(cached(PROMPTS), wanted)
    assert sorted(counted.asked) == sorted({*PROMPTS}), "each prompt is encoded once"
    counted.asked.clear()
    close(cached(PROMPTS), wanted)
    close(CachedText(counted, str(tmp_path)).train()(PROMPTS[::-1]), plain(PROMPTS[::-1]))
    assert counted.asked == []
    assert (cached.width, cached.longest, cached.spans("a red")) == (plain.width, plain.longest, plain.spans("a red"))


def test_the_empty_prompt_is_there_from_the_first_use_on(towers: dict[str, Path], tmp_path: Path) -> None:
    counted = Counted(PretrainedText(str(towers["t5"])))
    cached = CachedText(counted, str(tmp_path)).train()
    cached(["a red ball"])
    assert sorted(counted.asked) == ["", "a red ball"]
    counted.asked.clear()
    text = Text(CachedText(counted, str(tmp_path)), dropout=1.0).train()
    dropped = text({"caption": ["a red ball", "two"]})  # every condition is dropped
    null = text.null({"caption": ["a red ball", "two"]})
    assert dropped.tokens is not None
    assert null.tokens is not None
    assert torch.equal(dropped.tokens, null.tokens)
    assert counted.asked == [], "the encoder was asked for the empty prompt, or for a dropped one"


def test_prompts_can_be_encoded_ahead(towers: dict[str, Path], tmp_path: Path) -> None:
    counted = Counted(PretrainedText(str(towers["t5"])))
    cached = CachedText(counted, str(tmp_path))
    assert cached.fill(["a red ball", "two", "a red ball"]) == (1, 2)  # the empty one is there by then
    assert cached.fill(["a red ball", "seven"]) == (2, 1)
    counted.asked.clear()
    close(cached.eval()(["two", "seven", ""]), counted.encoder(["two", "seven", ""]))
    assert counted.asked == []


def test_another_encoder_dtype_or_tokenizer_is_refused(towers: dict[str, Path], tmp_path: Path) -> None:
    CachedText(PretrainedText(str(towers["t5"])), str(tmp_path)).train()(["two"])
    before = set(tmp_path.rglob("*.safetensors"))
    changes: list[tuple[str, nn.Module, dict[str, Any]]] = [
        ("encoder", PretrainedText(str(towers["other"])), {}),
        ("encoder", PretrainedText(str(towers["words"])), {}),
        ("encoder", PretrainedText(str(towers["t5"])).half(), {}),
        ("encoder", Weighted(PretrainedText(str(towers["t5"])), factor=1.5).requires_grad_(False), {}),
        ("dtype", PretrainedText(str(towers["t5"])), {"dtype": "float16"}),
    ]
    for name, encoder, settings in changes:
        with pytest.raises(ValueError, match=f"is stale: it was made with {name} .*, now .*; name another folder"):
            CachedText(encoder, str(tmp_path), **settings).train()(["two"])
        quiet = CachedText(encoder, str(tmp_path), **settings).eval()  # writes nothing, finds nothing of the others
        close(quiet(["two"]), CachedText(encoder, str(tmp_path / "none"), **settings).eval()(["two"]))
    assert set(tmp_path.rglob("*.safetensors")) == before
    assert not (tmp_path / "none").exists(), "a model that only samples has written a folder"
    again = CachedText(PretrainedText(str(towers["t5"])), str(tmp_path)).train()
    again(["two"])  # after the tokenizer has padded a batch it is still the same encoder
    again.encoder(["two", "a red ball"])
    CachedText(again.encoder, str(tmp_path)).train()(["two"])


def test_weights_that_are_loaded_or_cast_later_are_noticed(towers: dict[str, Path], tmp_path: Path) -> None:
    cached = CachedText(PretrainedText(str(towers["t5"])), str(tmp_path)).train()
    cached(["two"])
    other = CachedText(PretrainedText(str(towers["other"])), str(tmp_path / "other"))
    cached.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="is stale: it was made with encoder"):
        cached(["two"])
    same = CachedText(PretrainedText(str(towers["t5"])), str(tmp_path)).train()
    same(["two"])
    with pytest.raises(ValueError, match="is stale: it was made with encoder"):
        same.half()(["two"])


def test_a_damaged_entry_is_made_again(towers: dict[str, Path], tmp_path: Path) -> None:
    cached = CachedText(PretrainedText(str(towers["t5"])), str(tmp_path)).train()
    wanted = cached(["two", ""])
    entries = cached.open()
    assert entries is not None
    for prompt in ("two", ""):
        path = entries.path(prompt)
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(DamagedEntryError):
            entries.read(path)
        with pytest.warns(UserWarning, match=f"{path.name} is damaged"):
            close(CachedText(cached.encoder, str(tmp_path)).train()(["two", ""]), wanted)
        assert entries.read(path) is not None


def test_half_precision_is_rounded_when_it_is_made_too(towers: dict[str, Path], tmp_path: Path) -> None:
    cached = CachedText(PretrainedText(str(towers["t5"])), str(tmp_path), dtype="float16").train()
    made, read = cached(["two"]), cached(["two"])
    assert torch.equal(made[0], read[0])
    assert torch.equal(made[2], read[2])
    assert torch.equal(made[0], made[0].half().float())
    with torch.autocast("cpu", torch.bfloat16):  # what is stored does not depend on the precision of a run
        mixed = cached(["a red ball"])
    close(mixed, CachedText(cached.encoder, str(tmp_path / "plain"), dtype="float16").train()(["a red ball"]))


def test_weights_and_long_prompts_go_through_it(towers: dict[str, Path], tmp_path: Path) -> None:
    plain = PretrainedText(str(towers["t5"]), max_tokens=8)
    cached = CachedText(plain, str(tmp_path)).train()
    prompts = ["a (red:1.5) ball", "a red ball two dogs bark seven a red ball two dogs bark"]
    found, expected = Weighted(cached)(prompts), Weighted(plain)(prompts)
    assert found[0].shape == expected[0].shape
    close(found, expected)


def test_an_encoder_that_is_trained_and_wrong_arguments_are_refused(towers: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="encoder=ByteTransformer is trained, and what it gave would be stale"):
        CachedText(ByteTransformer(8, 1), str(tmp_path))
    with pytest.raises(ValueError, match="dtype='int8' is unknown; choose float32 or float16"):
        CachedText(PretrainedText(str(towers["t5"])), str(tmp_path), dtype="int8")
