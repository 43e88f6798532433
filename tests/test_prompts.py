"""Weights, turns and long prompts: how they are read, what they do to tokens and vectors, and when they do nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmdiff.autoencoder import Pool
from mmdiff.backbones import UNet
from mmdiff.cascade import Generate
from mmdiff.conditioning import Join, LowRes, Text
from mmdiff.io import build
from mmdiff.model import DiffusionModel
from mmdiff.precond import EDM
from mmdiff.prompts import Weighted, alternate, alternatives, parse, unparse, weigh
from mmdiff.sampling import Ancestral, seeded_noise
from mmdiff.sigmas import Karras
from mmdiff.text import ByteTransformer, PretrainedText

# Reading


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("", []),
        ("a red ball: 3 | 4", [("a red ball: 3 | 4", 1.0)]),
        ("a (red) ball", [("a ", 1.0), ("red", 1.1), (" ball", 1.0)]),
        ("a (red:1.3) ball", [("a ", 1.0), ("red", 1.3), (" ball", 1.0)]),
        ("a (red: 1.3 )", [("a ", 1.0), ("red", 1.3)]),
        ("[red]", [("red", 1 / 1.1)]),
        ("((red))", [("red", 1.1 * 1.1)]),
        ("(a (b:2) c:1.5)", [("a ", 1.5), ("b", 3.0), (" c", 1.5)]),
        ("(red:1)(blue:1.0)", [("redblue", 1.0)]),
        ("(red:0)", [("red", 0.0)]),
        (r"\(a\) \[b\] c\|d e\:f \\", [(r"(a) [b] c|d e:f " + "\\", 1.0)]),
        (r"(at 10\:30)", [("at 10:30", 1.1)]),
        ("(a|b)", [("a|b", 1.1)]),
        ("(犬:1.5)が走る", [("犬", 1.5), ("が走る", 1.0)]),
    ],
)
def test_weights_are_read(prompt: str, pieces: list[tuple[str, float]]) -> None:
    (found,) = parse(prompt)
    assert [piece.text for piece in found] == [text for text, _ in pieces]
    assert [piece.weight for piece in found] == pytest.approx([weight for _, weight in pieces], rel=1e-15)


@pytest.mark.parametrize(
    ("prompt", "turns"),
    [
        ("[a|b]", ["a", "b"]),
        ("a [red|blue|green] ball", ["a red ball", "a blue ball", "a green ball"]),
        ("[red|]", ["red", ""]),
        ("[a|b] [c|d|e]", ["a c", "b d", "a e", "b c", "a d", "b e"]),
        ("[a|[b|c]]", ["a", "b", "a", "c"]),
        ("([a|b]:1.5) c", ["(a:1.5) c", "(b:1.5) c"]),
        ("[(a:2)|b]", ["(a:2.0)", "b"]),
    ],
)
def test_alternations_take_turns(prompt: str, turns: list[str]) -> None:
    assert [unparse(pieces) for pieces in parse(prompt)] == turns


@pytest.mark.parametrize("prompt", ["a (b\\:c:1.3) [d] \\(e\\)", "x\\\\y", "((a:1.7) b:0.3)"])
def test_unparsed_prompts_are_read_as_they_were(prompt: str) -> None:
    (pieces,) = parse(prompt)
    assert parse(unparse(pieces)) == [pieces]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a (red ball", r"character 3: '\(' is not closed by '\)'"),
        ("a [red ball", r"character 3: '\[' is not closed by '\]'"),
        ("a red) ball", r"character 6: '\)' closes nothing"),
        ("a (red] ball", r"character 3: '\(' is not closed by '\)'"),
        ("(red:big)", r"character 5: the weight 'big' is no number"),
        ("(red:)", r"character 5: the weight '' is no number"),
        ("(at 10:30)", r"character 7: the weight 30 is outside 0..10; write \\: for a colon"),
        ("(red:-1)", "character 5: the weight -1 is outside"),
        ("(red:nan)", "character 5: the weight nan is outside"),
        ("(red:1.3", r"character 1: '\(' is not closed"),
        ("[a:b:0.5]", r"character 3: a colon means nothing in \[...\]"),
        ("a ()", "character 3: the brackets are empty"),
        ("a []", "character 3: the brackets are empty"),
        ("a \\b", "character 3: a backslash before no mark"),
        ("a \\", "character 3: a backslash before no mark"),
        ("[a|b][a|b|c][a|b|c|d|e][a|b|c|d|e|f|g]", "alternations take 210 turns together, more than 64"),
    ],
)
def test_malformed_prompts_name_the_character(prompt: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse(prompt)
    assert "\n" not in str(caught.value)


# Encoding

PLAIN = ["a red ball", "", "two dogs, barking loudly at the moon", "犬が走る"]


def encoder(max_words: int = 96) -> ByteTransformer:
    torch.manual_seed(0)
    return ByteTransformer(16, 2, 2, max_words).eval()


def equal(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_weight_1_everywhere_is_the_encoder_bit_for_bit() -> None:
    plain = encoder()
    expected = plain(PLAIN)
    assert equal(Weighted(plain)(PLAIN), expected)
    assert equal(
        Weighted(plain)(["a (red:1) ball", "", "(two (dogs:1.0):1), barking loudly at the moon", "犬が走る"]), expected
    )
    tokens, mask, vector = Weighted(plain)(["a (red:2) ball", *PLAIN[1:]])  # and next to a weighted prompt
    assert torch.equal(mask, expected[1])
    assert torch.equal(tokens[1:], expected[0][1:])
    assert torch.equal(vector[1:], expected[2][1:])


def test_weighted_tokens_leave_the_empty_prompts_and_the_others_stay() -> None:
    plain = encoder()
    expected, _, _ = plain(["a red ball"])
    empty = plain([""])[0][0, 0]
    for weight in (0.0, 0.5, 1.7):
        tokens, _, _ = Weighted(plain)([f"a (red:{weight}) ball"])
        torch.testing.assert_close(tokens[0, 2], empty + weight * (expected[0, 2] - empty))  # start, a, red, ball
        assert torch.equal(tokens[0, [0, 1, 3]], expected[0, [0, 1, 3]])
    halves, _, _ = Weighted(plain)(["a r(ed:1.6) ball"])  # a word of two weights takes the mean of its characters
    torch.testing.assert_close(halves[0, 2], empty + 1.4 * (expected[0, 2] - empty))


def test_the_vector_takes_the_share_of_a_piece() -> None:
    plain = encoder()
    whole, red, dog = (plain([text])[2][0] for text in ("a red dog", "a  dog", "a red "))
    vector = lambda prompt: Weighted(plain)([prompt])[2][0]
    torch.testing.assert_close(vector("a (red:0) dog"), red)  # weight 0: as if the word were not there
    torch.testing.assert_close(vector("a (red:1.5) dog"), whole + 0.5 * (whole - red))
    torch.testing.assert_close(vector("a (red:1.5) (dog:0.2)"), whole + 0.5 * (whole - red) - 0.8 * (whole - dog))


def test_gradients_reach_the_encoder_through_weights() -> None:
    plain = ByteTransformer(16, 1, 2)
    tokens, mask, vector = Weighted(plain)(["a (red:1.5) ball"])
    ((tokens[mask] * torch.randn_like(tokens[mask])).sum() + vector.sum()).backward()
    assert [name for name, p in plain.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("text", ["one two three four five six seven, eight", "犬" * 100, "ab " + "x" * 200, "a" * 90])
def test_long_prompts_are_encoded_in_chunks(text: str) -> None:
    small = encoder(max_words=5)
    with pytest.raises(ValueError, match="max_words=5: shorten it, or wrap the encoder in mmdiff.prompts.Weighted"):
        small([text])
    weighted = Weighted(small)
    chunks = [text[first:end] for first, end in weighted.chunks(text)]
    assert "".join(chunks) == text
    assert len(chunks) > 1
    tokens, mask, vector = weighted([text, "short"])
    parts = [small([chunk]) for chunk in chunks]
    torch.testing.assert_close(tokens[0][mask[0]], torch.cat([part[0][0] for part in parts]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(vector[0], torch.stack([part[2][0] for part in parts]).mean(dim=0), rtol=1e-5, atol=1e-5)
    alone, _, alone_vector = small(["short"])
    torch.testing.assert_close(tokens[1][mask[1]], alone[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(vector[1], alone_vector[0], rtol=1e-5, atol=1e-5)


def test_words_stay_whole_at_the_cut_and_weights_find_their_chunk() -> None:
    small = encoder(max_words=3)
    weighted = Weighted(small)
    text = "one two three four five"
    assert [text[a:b] for a, b in weighted.chunks(text)] == ["one two three ", "four five"]
    plain, mask, _ = weighted([text])
    tokens, _, vector = weighted(["one two three four (five:2)"])
    changed = (tokens != plain).any(dim=2)[0].nonzero()[:, 0].tolist()
    assert changed == [int(mask.sum()) - 1]
    rest = torch.stack([small(["one two three "])[2][0], small(["four "])[2][0]]).mean(dim=0)
    whole = weighted([text])[2][0]
    torch.testing.assert_close(vector[0], 2 * whole - rest, rtol=1e-5, atol=1e-5)


def test_settings_count_and_wrong_ones_are_refused() -> None:
    plain = encoder()
    strong, mild = (Weighted(plain, factor)(["a (red) [ball]"]) for factor in (1.5, 1.1))
    assert not torch.allclose(strong[0], mild[0], atol=1e-3)
    assert not torch.allclose(strong[2], mild[2], atol=1e-3)
    with pytest.raises(ValueError, match=r"factor=1.0 must be above 1"):
        Weighted(plain, 1.0)
    with pytest.raises(ValueError, match="encoder=Linear has no `spans` and `longest`"):
        Weighted(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"'\[a\|b\]' alternates, which needs the steps of sampling"):
        Weighted(plain)(["[a|b]"])
    with pytest.raises(ValueError, match="too short for any chunk"):
        Weighted(encoder(max_words=0))(["word"])


def test_it_builds_from_a_config_around_any_encoder() -> None:
    inner = {"class_path": "mmdiff.text.ByteTransformer", "init_args": {"width": 16, "depth": 1, "heads": 2}}
    made = build({"class_path": "mmdiff.prompts.Weighted", "init_args": {"encoder": inner, "factor": 1.2}})
    assert isinstance(made.encoder, ByteTransformer)
    assert made.factor == 1.2


@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_pretrained_towers_take_weights_and_chunks(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("transformers")
    from tests.test_text import tower

    plain = PretrainedText(str(tower(tmp_path, kind)), max_tokens=5)
    weighted = Weighted(plain)
    assert equal(weighted(["a red ball", "", "(two:1) dogs"]), plain(["a red ball", "", "two dogs"]))
    assert plain.spans("a red ball") == [(0, 1), (2, 5), (6, 10), (0, 0)]
    expected, mask, _ = plain(["a red ball"])
    empty = plain([""])[0][0].mean(dim=0)
    tokens, _, vector = weighted(["a (red:1.5) ball"])
    torch.testing.assert_close(tokens[0, 1], empty + 1.5 * (expected[0, 1] - empty))
    assert torch.equal(tokens[0, [0, 2, 3]], expected[0, [0, 2, 3]])
    assert not torch.allclose(vector, plain(["a red ball"])[2])
    long = "a red ball two dogs bark seven"
    with pytest.raises(
        ValueError, match=r"'a red ball two dogs bark seven'\.\.\. has 8 tokens, more than max_tokens=5"
    ):
        plain([long])
    tokens, mask, _ = weighted([long])
    assert mask.sum() == 9  # 4 words and the end, 3 words and the end
    torch.testing.assert_close(tokens[0, :5], plain(["a red ball two "])[0][0], rtol=1e-5, atol=1e-5)


# Turns while sampling


def test_each_step_of_the_grid_has_its_turn() -> None:
    sigmas = Karras(0.1, 10.0)(5)
    denoise = alternate([lambda x, s, k=k: torch.full_like(x, k) for k in range(3)], sigmas)  # type: ignore[misc]
    x = torch.zeros(2, 1)
    assert [denoise(x, sigma)[0, 0].item() for sigma in sigmas[:-1]] == [0, 1, 2, 0, 1]
    fine = sigmas.double() * 1.1  # a float64 grid, whose levels a float32 state rounds up or down
    rounded = alternate([lambda x, s, k=k: torch.full_like(x, k) for k in range(3)], fine)  # type: ignore[misc]
    assert [rounded(x, sigma)[0, 0].item() for sigma in fine[:-1].float()] == [0, 1, 2, 0, 1]
    between = (sigmas[1] + sigmas[2]) / 2
    assert denoise(x, between)[0, 0].item() == 2  # past the level of step 1, before that of step 2
    assert denoise(x, torch.stack([sigmas[1], torch.tensor(0.0)]))[0, 0].item() == 1  # a known part has no level


def model(weighted: bool = True) -> DiffusionModel:
    torch.manual_seed(1)
    text = Text(Weighted(encoder()) if weighted else encoder())
    built = DiffusionModel(
        UNet(2, 1, channels=8, multipliers=(1,), head_channels=8, tokens_width=16, vector_width=16), EDM(), text
    ).eval()
    for parameter in built.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return built


def sample(captions: list[str], net: DiffusionModel, **settings: Any) -> Tensor:
    stage = Generate(net, Karras(sigma_max=10), Ancestral(), steps=4, **settings)
    noise = seeded_noise(range(len(captions)))
    return stage({"caption": captions}, shape=(1, 4, 4), rate=4.0, noise=noise).data


def test_a_stage_alternates_from_step_to_step() -> None:
    net = model()
    grid, denoisers = Karras(sigma_max=10)(4), [net.bind(net.condition({"caption": [c]})) for c in ("a red", "a blue")]
    noise = seeded_noise([0])
    x = noise(torch.empty(1, 1, 4, 4))
    with torch.inference_mode():
        expected = Ancestral()(alternate(denoisers, grid), x * (1 + grid[0] ** 2) ** 0.5, grid, noise)
    found = sample(["a [red|blue]"], net)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for other in ("a red", "a blue", "a [blue|red]"):
        assert not torch.allclose(sample([other], net), found, atol=1e-5)
    both = sample(["a [red|blue]", "dog"], net, guidance=2.0)
    torch.testing.assert_close(both[:1], sample(["a [red|blue]"], net, guidance=2.0), rtol=1e-4, atol=1e-4)


def test_alternatives_of_a_batch_are_its_prompts_in_turn() -> None:
    conditioner = Join([Text(Weighted(encoder())), LowRes(Pool([1, 2]))])
    batch = {"caption": ["[a|b]", "x", "[c|d|e]"], "low": 1}
    turns = alternatives(conditioner, batch)
    assert [turn["caption"] for turn in turns] == [
        [a, "x", c] for a, c in zip("ababab", "cdecde", strict=True)
    ]  # fmt: skip
    assert all(turn["low"] == 1 for turn in turns)
    assert alternatives(None, batch) == alternatives(Text(encoder()), batch) == [batch]
    many = [f"[{'|'.join('abcdefghijk'[:n])}]" for n in (5, 7, 11)]
    with pytest.raises(ValueError, match="the prompts of the batch take 385 turns together, more than 64"):
        alternatives(conditioner, {"caption": many})


def test_a_model_learns_to_read_weights_in_place() -> None:
    net = model(weighted=False)
    plain = sample(["a (red:3) ball"], net)
    assert weigh(net) == 1
    assert weigh(net) == 1
    assert isinstance(net.conditioner.encoder.encoder, ByteTransformer)  # wrapped once  # type: ignore[union-attr]
    assert not torch.allclose(sample(["a (red:3) ball"], net), plain, atol=1e-5)
    torch.testing.assert_close(sample(["a (red:1) ball"], net), sample(["a red ball"], model(weighted=False)))
    assert weigh(nn.Linear(1, 1)) == 0
