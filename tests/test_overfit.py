"""Every training config learns four clips by heart in under two minutes: `pytest --slow tests/test_overfit.py`."""

from pathlib import Path

import pytest
import torch

from mmdiff.config import read_config, trust_policy
from mmdiff.export import export_model
from mmdiff.footprint import first_batch, instantiate
from mmdiff.io import load
from tests.overfit_profiles import CONFIGS, ROOT, Profile, Workshop, apart, distances, psnr

PROFILES = [
    Profile(str(path.relative_to(CONFIGS / "overfit").with_suffix("")))
    for path in sorted((CONFIGS / "overfit").rglob("*.yaml"))
]
SMALLEST = Profile("tiny/video_autoencoder")
MOST_S, ALL_S = 120, 15 * 60  # on 2 cores


def names(profile: Profile) -> str:
    return profile.name


def trains(path: Path) -> bool:
    """Whether a config is one of `mmdiff fit` that brings a model, or the latents of one."""
    tree = read_config(path)
    return "model" in tree or tree.get("data", {}).get("class_path", "").endswith("LatentCache")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("overfit"))


def test_every_training_config_has_a_profile_and_every_profile_a_config() -> None:
    configs = {path.relative_to(CONFIGS) for path in CONFIGS.rglob("*.yaml")}
    wanted = {str(p.with_suffix("")) for p in configs if p.parts[0] != "overfit" and trains(CONFIGS / p)}
    assert {profile.name for profile in PROFILES} == wanted
    assert {"tiny/video", "tiny/video_latent_cached", "audio/vocoder", "video/sprites_up"} <= wanted


@pytest.mark.parametrize("profile", PROFILES, ids=names)
def test_a_profile_says_what_it_is_how_it_is_run_and_what_to_expect(profile: Profile) -> None:
    assert profile.layers[-2:] == [f"configs/{profile.name}.yaml", f"configs/overfit/{profile.name}.yaml"]
    for layer in profile.layers:
        assert (ROOT / layer).is_file(), layer
    assert len(profile.path.read_text("utf-8").splitlines()) <= 40
    tree = read_config(profile.path)
    assert tree["trainer"]["log_every_n_steps"] == 5
    assert profile.checkpoint == f"runs/overfit/{profile.name}.ckpt"
    assert float(profile.promise["loss"]) > 0


def check_promises(profile: Profile, workshop: Workshop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Trains as the header says, and holds it to its time, its loss and its samples."""
    seconds = workshop.make(profile)
    assert seconds <= MOST_S
    promise = profile.promise
    assert workshop.last_losses(profile) < float(promise["loss"])
    monkeypatch.chdir(workshop.folder)
    trust_policy([])
    config = "+".join(profile.layers)
    _, data, _ = instantiate(config)
    batch = first_batch(data, config)
    assert len(set(batch["key"])) == 4, "the profile trains on other than four clips"
    model = load(export_model(workshop.folder / profile.checkpoint, tmp_path / "model", half=False)).eval()
    found = distances(profile.name, model, batch)
    assert found.argmin(dim=1).tolist() == [0, 1, 2, 3], "a sample is nearer to another clip than to its own"
    own, bar = found.diagonal(), float(promise["bar"])
    if promise["side"] == "above":
        assert psnr(own).min() > bar
    else:
        assert own.max() < bar


def test_the_smallest_profile_keeps_its_promises(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check_promises(SMALLEST, workshop, monkeypatch, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(2 * ALL_S)  # a slow machine is to be told by the assertions
@pytest.mark.parametrize("profile", [profile for profile in PROFILES if profile != SMALLEST], ids=names)
def test_a_profile_keeps_its_promises(
    profile: Profile, workshop: Workshop, shared_data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check_promises(profile, workshop, monkeypatch, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(4 * ALL_S)
def test_all_profiles_together_take_at_most_a_quarter_of_an_hour(workshop: Workshop, shared_data: Path) -> None:
    for profile in PROFILES:
        workshop.make(profile)
    assert sum(workshop.seconds.values()) <= ALL_S, workshop.seconds


def test_distances_are_those_worked_out_by_hand() -> None:
    clips = torch.stack([torch.zeros(3, 2, 2, 2), torch.ones(3, 2, 2, 2)])
    assert apart(clips + 0.5, clips).tolist() == [[0.5, 0.5], [1.5, 0.5]]
    assert psnr(torch.tensor([2.0, 0.2, 0.02])).tolist() == pytest.approx([0.0, 20.0, 40.0], abs=1e-4)
