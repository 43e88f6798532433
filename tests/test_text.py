"""Text encoders: a prompt's tokens are its own, and the pretrained towers give what transformers gives."""

import json
from pathlib import Path

import pytest
import torch

from mmdiff.text import ByteTransformer, PretrainedText

PROMPTS = [
    "a dog barks",
    "",
    "two  cats, one very long prompt with UNEQUAL words!",
    "犬が走る",
    "naïve café 🎈",
    "a" * 50,
]


@pytest.mark.parametrize("mode", ["train", "eval", "inference"])
def test_neighbours_in_a_batch_do_not_change_a_prompts_tokens(mode: str) -> None:
    encoder = ByteTransformer(16, 2, 2).train(mode == "train")
    with torch.inference_mode(mode == "inference"):
        tokens, mask, vector = encoder(PROMPTS)
        assert tokens.shape == (len(PROMPTS), mask.shape[1], 16)
        assert torch.isfinite(tokens[mask]).all()
        for i, prompt in enumerate(PROMPTS):
            alone, all_true, alone_vector = encoder([prompt])
            assert all_true.all()
            torch.testing.assert_close(tokens[i][mask[i]], alone[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(vector[i], alone_vector[0], rtol=1e-5, atol=1e-5)


def test_the_vector_hears_one_other_word() -> None:
    """It is the sum of the words over the root of their number, so a word weighs the same wherever it stands."""
    encoder = ByteTransformer(64, 1, 4).eval()
    _, _, vector = encoder(["walking to the left", "walking to the right", "the left to walking"])
    assert (vector[0] - vector[1]).std() > 0.2
    torch.testing.assert_close(vector[0], vector[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prompt", [*PROMPTS, "two  cats", "犬" * 20, " x "])
def test_spans_say_which_characters_a_token_stands_for(prompt: str) -> None:
    encoder = ByteTransformer(16, 1, 2)
    spans = encoder.spans(prompt)
    assert len(spans) == encoder([prompt])[1].sum()
    assert spans[0] == (0, 0)
    assert "".join(prompt[first:end] for first, end in spans) == "".join(prompt.split())  # every mark, in order


def test_prompts_are_told_apart() -> None:
    encoder = ByteTransformer(16, 1, 2).eval()
    pairs = [("dog", "god"), ("a b", "b a"), ("ab c", "a bc"), ("Walk", "walk"), ("犬", "猫"), ("x", ""), ("é", "e")]
    pairs += [("a" * 17, "a" * 18), ("go.", "go!")]
    for one, other in pairs:
        a, b = (encoder([prompt])[0] for prompt in (one, other))
        assert a.shape != b.shape or not torch.allclose(a, b, atol=1e-3), (one, other)


def test_empty_prompt_is_the_start_alone() -> None:
    encoder = ByteTransformer(16, 1, 2)
    for prompt in ("", "  \n"):
        assert encoder([prompt])[0].shape == (1, 1, 16)
    assert encoder(["x"])[0].shape == (1, 2, 16)


def test_every_setting_counts() -> None:
    def tokens(**settings: int) -> torch.Tensor:
        torch.manual_seed(0)
        return ByteTransformer(**{"width": 16, "depth": 1, "heads": 2, **settings}).eval()(["a dog"])[0]

    for change in ({"width": 32}, {"depth": 2}, {"heads": 4}):
        assert tokens().shape != tokens(**change).shape or not torch.allclose(tokens(), tokens(**change), atol=1e-4)


def test_wrong_values_are_refused() -> None:
    with pytest.raises(ValueError, match="width=10 is not a multiple of heads=4"):
        ByteTransformer(10)
    encoder = ByteTransformer(16, 1, 2, max_words=3)
    encoder(["one two three"])
    with pytest.raises(ValueError, match=r"'one two three\.'\.\.\. has 4 words and marks, .* max_words=3"):
        encoder(["ok", "one two three."])


def test_gradients_reach_every_parameter() -> None:
    encoder = ByteTransformer(16, 2, 2)
    tokens, mask, vector = encoder(["a dog", "cat"])
    ((tokens[mask] * torch.randn_like(tokens[mask])).sum() + vector.sum()).backward()
    dead = [n for n, p in encoder.named_parameters() if p.grad is None or p.grad.count_nonzero() == 0]
    assert dead == []


WORDS = ["a", "red", "ball", "two", "dogs", "bark", "seven", "blue"]


def word_tokenizer(folder: Path, special: dict[str, str], words: list[str]) -> None:
    """Saves a tokenizer of whole words, in the form that transformers reads."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*special.values(), "<unk>", *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    end = special["eos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, vocabulary[end])]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special).save_pretrained(folder)


def tower(folder: Path, kind: str, words: list[str] = WORDS) -> Path:
    """A tiny model of random weights with its tokenizer, as a folder."""
    import transformers as tf

    special = {"pad_token": "<pad>", "eos_token": "</s>"}
    sizes = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    if kind == "t5":
        model = tf.T5EncoderModel(tf.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    elif kind == "clip":
        model = tf.CLIPTextModel(tf.CLIPTextConfig(**sizes, max_position_embeddings=12, eos_token_id=1))
    else:
        model = tf.ClapTextModel(tf.ClapTextConfig(**sizes, max_position_embeddings=16, pad_token_id=0))
    model.save_pretrained(folder)
    word_tokenizer(folder, special, words)
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


@pytest.mark.parametrize("kind", ["t5", "clip", "clap"])
def test_pretrained_towers_give_what_transformers_gives(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("transformers")
    encoder = PretrainedText(str(tower(tmp_path, kind)), max_tokens=8)
    prompts = ["a red ball", "two dogs", ""]
    tokens, mask, vector = encoder(prompts)
    assert tokens.shape == (3, 4, encoder.width) == (3, 4, 16)
    assert mask.sum(1).tolist() == [4, 3, 1]
    assert not tokens.requires_grad
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not encoder.train().tower.training
    for i, prompt in enumerate(prompts):
        ids = encoder.tokenizer(prompt, return_tensors="pt")["input_ids"]
        reference = encoder.tower(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(tokens[i][mask[i]], reference, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(vector[i], reference.mean(dim=0), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(tokens[0, :2], tokens[1, :2])
    long = " ".join(WORDS)
    with pytest.raises(ValueError, match=r"has 9 tokens, more than max_tokens=8: shorten it, or wrap"):
        encoder(["a", long])  # nothing is cut silently
    assert encoder([" ".join(WORDS[:7])])[0].shape[1] == encoder.longest == 8
    if kind != "t5":
        with pytest.raises(ValueError, match="max_tokens=500 is more than the"):
            PretrainedText(str(tmp_path), max_tokens=500)


def test_a_tokenizer_without_its_vocabulary_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    folder = tower(tmp_path, "t5", words=[])
    with pytest.raises(ValueError, match="gives different prompts the same ids"):
        PretrainedText(str(folder))


def test_a_model_without_a_text_tower_known_here_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match="holds a 'vit' model; text towers known here: clap, "):
        PretrainedText(str(tmp_path))
