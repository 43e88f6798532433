"""The weights that ship: small, of the committed configs, and they make clips that are neither constant nor noise."""

from pathlib import Path

import pytest
import torch

from audio.commands import SHIPPED as DIGITS
from mmdiff.config import read_config
from mmdiff.pipeline import load_pipeline, models, read_cascade
from mmdiff.sampling import seeded_noise
from tests.test_configs import model_of
from video.commands import SHIPPED as SPRITES

ROOT = Path(__file__).resolve().parent.parent
RECIPES = {  # configs of the cascade and of the models in its folders
    SPRITES: ("video/sprites_cascade", {"base": "video/sprites", "up": "video/sprites_up"}),
    DIGITS: ("audio/digits_latent_cascade", {"base": "audio/digits_latent"}),
}


def test_together_they_are_under_24_mb() -> None:
    files = [file for folder in RECIPES for file in folder.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 24e6


@pytest.mark.parametrize("folder", RECIPES, ids=lambda folder: folder.name)
def test_they_come_from_the_committed_configs(folder: Path) -> None:
    cascade, recipes = read_cascade(folder), RECIPES[folder]
    assert cascade == read_config(ROOT / "configs" / f"{recipes[0]}.yaml")
    assert {model for _, model in models(cascade).values()} == set(recipes[1])
    for model, config in recipes[1].items():
        contains(read_config(folder / model), model_of(ROOT / "configs" / f"{config}.yaml"), model)


def contains(saved: object, asked: object, where: str) -> None:
    """Asserts that every setting of the config is the saved model's; defaults may be written out in the latter."""
    if isinstance(asked, dict):
        assert isinstance(saved, dict), where
        for key, value in asked.items():
            assert key in saved, f"{where}.{key}"
            contains(saved[key], value, f"{where}.{key}")
    elif isinstance(asked, list):
        assert isinstance(saved, list), where
        assert len(saved) == len(asked), where
        for i, (a, b) in enumerate(zip(saved, asked, strict=True)):
            contains(a, b, f"{where}[{i}]")
    else:
        assert saved == asked, where


@pytest.mark.parametrize("folder", RECIPES, ids=lambda folder: folder.name)
def test_each_has_a_card_with_recipe_licence_and_numbers(folder: Path) -> None:
    card = (folder / "README.md").read_text("utf-8")
    for part in ("mmdiff fit -c configs/", "mmdiff export", "mmdiff eval", "CC BY-SA", "What it cannot do", "chance"):
        assert part in card, part
    assert "{" not in card, "a number is still to be filled in"


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def test_sprites_are_pictures_that_move() -> None:
    prompt = "a character with tan skin and silver hair, wearing a white shirt, white trousers and brown boots, "
    clip = load_pipeline(SPRITES)(
        {"caption": [prompt + "walking to the left, on a blue background"]}, noise=seeded_noise([0])
    )
    assert clip.data.shape == (1, 3, 16, 64, 64)
    assert clip.rate == 8
    x = clip.data
    assert x.std() > 0.05, "the clip is constant"
    assert correlation(x[..., 1:], x[..., :-1]) > 0.7, "neighbouring pixels have nothing in common: noise"
    assert (x[:, :, 1:] - x[:, :, :-1]).abs().amax() > 0.2, "nothing moves"


def test_digits_are_sounds_with_a_beginning_and_an_end() -> None:
    clip = load_pipeline(DIGITS)({"caption": ["the digit seven spoken by jackson"]}, noise=seeded_noise([0]))
    assert clip.data.shape == (1, 1, 8192)
    assert clip.rate == 8000
    level = clip.data[0, 0].reshape(32, 256).square().mean(dim=1).sqrt()
    assert level.max() > 0.01, "silence"
    assert level.max() > 20 * level.min(), "the level is that of steady noise"
