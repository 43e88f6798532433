"""`mmdiff plot-noise`: pictures of every grid and density, or of a config's; wrong requests end in one line."""

import tomllib
from pathlib import Path

import pytest
import torch
from PIL import Image

from mmdiff.__main__ import guarded
from mmdiff.density import Importance, LogNormal, SigmaDensity, Table
from mmdiff.plot_noise import draw_densities, draw_grids, every, histogram, main, named
from mmdiff.sigmas import DDPM, Flow, Karras, ResolutionShift, Sigmas

ROOT = Path(__file__).resolve().parent.parent


def concrete(kind: type) -> set[type]:
    below = {found for sub in kind.__subclasses__() for found in concrete(sub)}
    own = {kind} if kind.__module__.startswith("mmdiff.") and not getattr(kind, "__abstractmethods__", None) else set()
    return own | below


def test_every_kind_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grids, densities = every()
    assert {type(grid) for grid in grids.values()} == concrete(Sigmas)
    assert {type(density) for density in densities.values()} == concrete(SigmaDensity)
    assert main(["--out", str(tmp_path / "new" / "plots")]) == 0
    files = [tmp_path / "new" / "plots" / name for name in ("grids.png", "densities.png")]
    assert capsys.readouterr().out.split() == [str(file) for file in files]
    for file in files:
        with Image.open(file) as picture:
            picture.load()
            assert picture.width > 1000
            assert len(picture.convert("L").getcolors(256) or []) > 50  # something is drawn


def test_a_panel_shows_the_grids_own_levels() -> None:
    grids = {"a": Karras(), "b": Flow(3.0)}
    figure = draw_grids(grids, 7)
    for panel, (name, grid) in zip(figure.axes, grids.items(), strict=True):
        assert panel.get_title().startswith(f"{name}\n")
        torch.testing.assert_close(torch.tensor(panel.lines[0].get_ydata()), grid(7)[:-1], check_dtype=False)


@pytest.mark.parametrize(
    "density", [LogNormal(), Table(DDPM(train_steps=2)), Importance(LogNormal(), (1, 3))], ids=repr
)
def test_histograms_hold_all_draws(density: SigmaDensity) -> None:
    sigma = density.quantile((torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000)
    shares, weighted, edges = histogram(sigma, density.weight(sigma))
    for part in (shares, weighted):
        assert (part * edges.diff()).sum() == pytest.approx(1, abs=0.005)  # all but 0.1 % at either end


def test_a_weighted_density_shows_what_it_stands_for() -> None:
    plain, important = draw_densities({"plain": LogNormal(), "more": Importance(LogNormal(), (1, 8))}).axes
    assert len(plain.patches) == 1
    drawn, meant = (patch.get_data() for patch in important.patches)
    centres = 0.5 * (meant.edges[1:] + meant.edges[:-1])
    mean = (meant.values * centres).sum() / meant.values.sum()
    assert mean == pytest.approx(-1.2 / 2.302585, abs=0.01)  # of the LogNormal, in log10
    assert (drawn.values * centres).sum() / drawn.values.sum() > mean + 0.1


def test_a_config_is_searched_for_its_grids_and_densities(tmp_path: Path) -> None:
    grids, densities = named(ROOT / "configs/tiny/video_cascade.yaml")
    assert not densities
    assert set(grids) == {"stages.base.sigmas"}
    assert all(isinstance(grid, Karras) for grid in grids.values())
    grids, densities = named(ROOT / "configs/tiny/video.yaml")
    assert (grids, densities) == ({}, {"model.density": LogNormal(mean=-0.5)})
    own = tmp_path / "own.yaml"
    own.write_text(
        "a: [{sigmas: mmdiff.sigmas.Karras}]\n"
        "density: {class_path: mmdiff.density.Stratified, init_args: {density: mmdiff.density.Mode}}\n"
    )
    grids, densities = named(own)
    assert grids == {"a[0].sigmas": Karras()}
    assert list(densities) == ["density"]  # the inner one is a part of it


def sized_config(folder: Path) -> Path:
    path = folder / "sized.yaml"
    path.write_text(
        "class_path: mmdiff.sigmas.Flow\n"
        "init_args: {shift: {class_path: mmdiff.sigmas.ResolutionShift, init_args: {base: 16}}}\n"
    )
    return path


def test_options_change_the_picture(tmp_path: Path) -> None:
    config = str(sized_config(tmp_path))
    pictures = []
    for i, options in enumerate((["--shape", "4", "8"], ["--shape", "8", "8"], ["--shape", "8", "8", "--steps", "5"])):
        assert main(["--out", str(tmp_path / str(i)), "-c", config, *options]) == 0
        assert not (tmp_path / str(i) / "densities.png").exists()
        pictures.append((tmp_path / str(i) / "grids.png").read_bytes())
    assert len(set(pictures)) == 3
    assert Flow(ResolutionShift(16)) == named(Path(config))[0]["mmdiff.sigmas.Flow"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "the following arguments are required: --out"),
        (["--out", "OUT", "--steps", "0"], "steps=0 must be at least 1"),
        (["--out", "OUT", "--steps", "2000"], "steps=2000 must lie between 1 and train_steps=1000"),
        (["--out", "OUT", "--steps", "many"], "invalid int value: 'many'"),
        (["--out", "OUT", "-c", "nowhere.yaml"], "no such file: nowhere.yaml"),
        (["--out", "OUT", "-c", "EMPTY"], "names no grid (sigmas) and no density"),
        (["--out", "OUT", "-c", "WRONG"], "Karras: sigma_min=-1.0, sigma_max=80.0 must satisfy"),
        (["--out", "OUT", "-c", "FOREIGN"], "class_path 'os.Popen' is outside the trusted packages"),
        (["--out", "OUT", "-c", "SIZED"], "mmdiff.sigmas.Flow depends on the size of the state; give its axes"),
        (["--out", "OUT", "-c", "SIZED", "--shape", "0"], "--shape 0 must be positive"),
        (["--out", "OUT", "-c", "PLAIN", "--shape", "8"], "--shape has no effect"),
        (["--out", "OUT", "-c", "PLAIN", "--steps", "8"], "--steps 8 has no effect"),
        (["--out", "OUT", "--shape", "8"], "--shape and --trust are for the parts that a config names"),
        (["--out", "FILE"], "is a file; name a folder"),
    ],
)
def test_wrong_requests_end_in_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {
        "EMPTY": "seed_everything: 0\n",
        "WRONG": "sigmas: {class_path: mmdiff.sigmas.Karras, init_args: {sigma_min: -1}}\n",
        "FOREIGN": "sigmas: {class_path: os.Popen}\n",
        "PLAIN": "density: mmdiff.density.LogNormal\n",
        "FILE": "",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    sized_config(tmp_path).rename(tmp_path / "SIZED")
    args = [str(tmp_path / word) if word.isupper() else word for word in options]
    assert guarded("plot-noise", main, args) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("mmdiff plot-noise: error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "OUT").exists()


def test_it_is_a_command() -> None:
    commands = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["entry-points"]["mmdiff.commands"]
    assert commands["plot-noise"] == f"{main.__module__}:{main.__name__}"
