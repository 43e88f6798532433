"""Conditions: which slots are filled, what is dropped and by which generator, what guidance guides away from."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmdiff.autoencoder import Chain, ConvKL, Pool, Subsample
from mmdiff.conditioning import Cond, Conditioner, Join, Label, LowRes, Number, Text
from mmdiff.text import ByteTransformer


class Lengths(nn.Module):
    """A text encoder simple enough to see through: tokens are codes of letters, the vector is the largest."""

    def forward(self, prompts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        longest = max(1, *map(len, prompts))
        codes = torch.tensor([[float(ord(c)) for c in p] + [0.0] * (longest - len(p)) for p in prompts])
        mask = torch.arange(longest) < torch.tensor([max(1, len(p)) for p in prompts])[:, None]
        return codes[..., None], mask, codes.amax(dim=1, keepdim=True)


def generators(n: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(n * seed + i) for i in range(n)]


CONDITIONERS: dict[str, tuple[Conditioner, dict[str, Any]]] = {
    "text": (Text(Lengths(), dropout=0.3), {"caption": ["ab"] * 2000}),
    "label": (Label("class", 5, 4, dropout=0.3), {"class": torch.full((2000,), 2)}),
    "number": (Number("rate", 4, 0, 10, dropout=0.3), {"rate": torch.full((2000,), 3.0)}),
}
CONDITIONERS["number"][0].empty.data.fill_(0.5)


@pytest.mark.parametrize("name", CONDITIONERS)
def test_conditions_are_dropped_at_the_rate_by_the_generator_alone(name: str) -> None:
    conditioner, batch = CONDITIONERS[name]
    conditioner.train()
    state = torch.get_rng_state()
    first, again, other = (conditioner(batch, generators(2000, s)).vector for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    null = conditioner.null(batch).vector
    dropped = (first == null).all(dim=1)
    assert 0.26 < dropped.float().mean() < 0.34
    conditioner.eval()
    kept = conditioner(batch).vector
    assert not (kept == null).all(dim=1).any()
    torch.testing.assert_close(first[~dropped], kept[~dropped])


@pytest.mark.parametrize("name", CONDITIONERS)
@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_dropout_at_its_ends(name: str, rate: float) -> None:
    conditioner, batch = CONDITIONERS[name]
    before, conditioner.dropout = conditioner.dropout, rate
    found = conditioner.train()(batch, generators(2000)).vector
    expected = conditioner.null(batch).vector if rate else conditioner.eval()(batch).vector
    conditioner.dropout = before
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", CONDITIONERS)
def test_what_is_dropped_of_an_item_does_not_depend_on_its_neighbours(name: str) -> None:
    conditioner, batch = CONDITIONERS[name]
    whole = conditioner.train()(batch, generators(2000)).vector
    part = {key: values[700:900] for key, values in batch.items()}
    assert torch.equal(conditioner(part, generators(2000)[700:900]).vector, whole[700:900])
    with pytest.raises(ValueError, match="a batch of 200 needs as many generators, not 2000: one for each item"):
        conditioner(part, generators(2000))


@pytest.mark.parametrize("rate", [-0.1, 1.1])
def test_dropout_is_a_probability(rate: float) -> None:
    for make in (lambda: Text(Lengths(), rate), lambda: Label("a", 2, 2, rate), lambda: Number("a", 2, 0, 1, rate)):
        with pytest.raises(ValueError, match=f"dropout={rate} must be a probability"):
            make()


def test_text_fills_tokens_mask_and_vector() -> None:
    text = Text(Lengths(), key="words").eval()
    cond = text({"words": ["abc", "b"]})
    assert cond.tokens.shape == (2, 3, 1)
    assert cond.mask.tolist() == [[True, True, True], [True, False, False]]
    assert cond.vector[:, 0].tolist() == [99, 98]
    assert cond.concat is None
    assert torch.equal(text.null({"words": ["abc", "b"]}).vector, torch.zeros(2, 1))


def test_a_bare_string_is_no_batch_of_prompts() -> None:
    with pytest.raises(ValueError, match="caption='hello' must be a list of prompts"):
        Text(Lengths())({"caption": "hello"})


def test_text_trains_its_encoder() -> None:
    text = Text(ByteTransformer(8, 1, 2))
    cond = text({"caption": ["a dog", "two cats"]}, generators(2))
    (cond.vector.square().sum() + cond.tokens[..., 0].sum()).backward()
    assert all(p.grad is not None and p.grad.count_nonzero() for p in text.parameters() if p.ndim > 1)


def test_label() -> None:
    label = Label("class", 3, 4).eval()
    a = label({"class": torch.tensor([0, 1, 2])}).vector
    assert torch.equal(a, label({"class": [0, 1, 2]}).vector)
    assert torch.equal(a, label.table.weight[:3])
    assert torch.equal(label.null({"class": [0]}).vector, label.table.weight[3:])
    for wrong in ([0, 3], [-1, 0]):
        with pytest.raises(ValueError, match=r"class has labels .* legal are 0..2"):
            label({"class": wrong})


def test_number_tells_values_apart_and_refuses_those_outside() -> None:
    number = Number("seconds", 16, 0.5, 20).eval()
    vectors = number({"seconds": torch.tensor([0.5, 0.7, 10.0, 20.0])}).vector
    assert torch.cdist(vectors, vectors).add(torch.eye(4)).min() > 1e-3
    with pytest.raises(ValueError, match=r"seconds has 0.5..21; legal is 0.5..20"):
        number({"seconds": [0.5, 21]})
    with pytest.raises(ValueError, match="low=2 must be below high=1"):
        Number("seconds", 16, 2, 1)
    wide = Number("seconds", 16, 0.5, 40).eval()
    wide.load_state_dict(number.state_dict())
    assert not torch.allclose(wide({"seconds": [10]}).vector, number({"seconds": [10]}).vector)


def test_low_resolution_keeps_the_known_frames_and_tells_the_noise() -> None:
    low_res = LowRes(Subsample(3), noise=0.4, level=0.0).eval()
    x = torch.randn(2, 1, 6, 4)
    concat = low_res({"latents": x}).concat
    assert concat.shape == (2, 2, 6, 4)
    assert torch.equal(concat[:, :1, ::3], x[:, :, ::3])
    assert concat[:, 1].count_nonzero() == 0
    low_res.level = 0.25
    noisy = low_res({"latents": x}, generators(2)).concat
    assert (noisy[:, 1] == 0.25).all()
    noise = torch.stack([torch.randn(1, 2, 4, generator=generator) for generator in generators(2)])
    torch.testing.assert_close(noisy[:, :1, ::3], x[:, :, ::3] + 0.25 * noise)


def test_low_resolution_in_training_draws_each_items_level_from_the_generator() -> None:
    low_res = LowRes(Pool([2, 2]), noise=0.4).train()
    batch = {"latents": torch.zeros(500, 1, 4, 4)}
    state = torch.get_rng_state()
    concat = low_res(batch, generators(500)).concat
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(concat, low_res(batch, generators(500)).concat)
    level = concat[:, 1]
    assert torch.equal(level, level[:, :1, :1].expand_as(level))
    assert 0.18 < level.mean() < 0.22
    assert 0 <= level.min() < 0.01 < 0.39 < level.max() <= 0.4
    spread = concat[:, 0, :2, :2].flatten(1).abs().mean(1) / level[:, 0, 0]
    assert 0.4 < spread.mean() < 1.0  # the noise has the level that the channel tells


def test_low_resolution_takes_the_clip_of_a_stage_before() -> None:
    degrade = Chain([Subsample(2), Pool([1, 2])])
    low_res = LowRes(degrade, level=0.1).eval()
    x, noise = torch.randn(2, 1, 4, 6), torch.randn(2, 1, 2, 3)
    given = {"low": degrade.encode(x), "low_noise": noise}
    a, b = low_res(given).concat, low_res.null(given).concat
    assert torch.equal(a, b)  # what guidance guides away from has the same clip, with the same noise
    torch.testing.assert_close(a[:, :1], degrade.decode(given["low"] + 0.1 * noise))
    assert not torch.equal(low_res({**given, "low": -given["low"]}).concat, a)


def test_low_resolution_refuses() -> None:
    with pytest.raises(ValueError, match=r"level=0.3 must lie in 0..noise=0.2"):
        LowRes(Subsample(2), noise=0.2, level=0.3)
    with pytest.raises(ValueError, match="degrade=ConvKL has parameters"):
        LowRes(ConvKL(1, 1, [[2]], width=4))


def test_join_fills_every_slot_of_its_parts() -> None:
    parts = [Text(Lengths()), Text(Lengths(), key="sound"), Label("class", 3, 4), LowRes(Subsample(2), level=0.0)]
    joined = Join(parts).eval()
    batch = {"caption": ["ab", "c"], "sound": ["x", "yz"], "class": [0, 1], "latents": torch.randn(2, 1, 4)}
    cond = joined(batch)
    each = [part(batch) for part in parts]
    assert torch.equal(cond.tokens, torch.cat([each[0].tokens, each[1].tokens], dim=1))
    assert torch.equal(cond.mask, torch.cat([each[0].mask, each[1].mask], dim=1))
    assert torch.equal(cond.vector, torch.cat([each[0].vector, each[1].vector, each[2].vector], dim=1))
    assert torch.equal(cond.concat, each[3].concat)
    null = joined.null(batch)
    assert torch.equal(null.vector, torch.cat([part.null(batch).vector for part in parts[:3]], dim=1))
    assert torch.equal(null.concat, cond.concat)
    assert Join([Label("class", 3, 4)])(batch).tokens is None


def test_join_attends_to_tokens_that_come_without_a_mask() -> None:
    a, b = Cond(tokens=torch.randn(1, 2, 3)), Cond(tokens=torch.randn(1, 1, 3), mask=torch.tensor([[False]]))
    assert Join([]).joined([a, b]).mask.tolist() == [[True, True, False]]
