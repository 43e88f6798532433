"""`mmdiff plot-noise`: pictures of the noise that a config trains on and samples on, or of every kind there is."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .generate import Parser

if TYPE_CHECKING:  # no torch and no matplotlib before they are needed
    from matplotlib.figure import Figure
    from torch import Tensor

    from .density import SigmaDensity
    from .sigmas import Sigmas

DRAWS = 20_000  # levels that the picture of a density is made of
COLUMNS = 4


def every() -> "tuple[dict[str, Sigmas], dict[str, SigmaDensity]]":
    """One of each kind of grid and density, by a short name."""
    from . import density as d
    from . import sigmas as s

    latent = s.DDPM("scaled_linear", 1000, 0.00085, 0.012)
    tables = {
        "DDPM linear": s.DDPM(),
        "DDPM scaled_linear": latent,
        "DDPM cosine": s.DDPM("cosine"),
        "DDPM sigmoid": s.DDPM("sigmoid"),
        "DDPM zero terminal SNR": s.DDPM("scaled_linear", 1000, 0.00085, 0.012, zero_terminal_snr=True),
        "DDPM leading": s.DDPM(spacing="leading"),
        "DDPM linspace": s.DDPM(spacing="linspace"),
    }
    resolution, length = s.ResolutionShift(1024), s.LengthShift()
    grids: dict[str, s.Sigmas] = {
        "Karras": s.Karras(),
        "Geometric": s.Geometric(),
        "Geometric rho=2": s.Geometric(rho=2.0),
        "Cosine": s.Cosine(),
        "Cosine shift=4": s.Cosine(shift=4.0),
        "Flow": s.Flow(),
        "Flow shift=3": s.Flow(3.0),
        "Flow ResolutionShift, 64 x 64": s.Flow(resolution).sized((1, 64, 64)),
        "Flow LengthShift, 64 x 64": s.Flow(length).sized((1, 64, 64)),
        **tables,
    }
    densities: dict[str, d.SigmaDensity] = {
        "LogNormal (EDM)": d.LogNormal(),
        "LogNormal(0, 1), logit-normal": d.LogNormal(0.0, 1.0),
        "LogUniform": d.LogUniform(0.01, 50.0),
        "Uniform": d.Uniform(),
        "Mode": d.Mode(),
        "Cosine": d.Cosine(),
        "Table": d.Table(),
        "Shifted Cosine, 4": d.Shifted(d.Cosine(), 4.0),
        "Shifted Uniform, LengthShift, 64 x 64": d.Shifted(d.Uniform(), length).sized((1, 64, 64)),
        "Stratified LogNormal": d.Stratified(d.LogNormal()),
        "Importance LogNormal": d.Importance(d.LogNormal(), (1.0, 2.0, 4.0, 2.0)),
    }
    return grids, densities


def named(config: Path, trusted: Sequence[str] = ()) -> "tuple[dict[str, Sigmas], dict[str, SigmaDensity]]":
    """Grids and densities in a training config, a cascade.yaml or any other config, by their place in it.

    Raises ValueError where it names none.
    """
    from .config import build, read_config
    from .density import SigmaDensity
    from .sigmas import Sigmas

    found = {where: build(tree, trusted) for where, tree in _specs(read_config(config), "")}
    grids = {where: part for where, part in found.items() if isinstance(part, Sigmas)}
    densities = {where: part for where, part in found.items() if isinstance(part, SigmaDensity)}
    if not grids and not densities:
        raise ValueError(f"{config} names no grid (sigmas) and no density; without -c every kind is drawn")
    return grids, densities


def _specs(tree: object, where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The trees under the arguments `sigmas` and `density`, and a whole config that is one of ours."""
    if isinstance(tree, Mapping):
        own = str(tree.get("class_path", "")).startswith(("mmdiff.sigmas.", "mmdiff.density."))
        if "class_path" in tree and (own or where.rpartition(".")[2] in ("sigmas", "density")):
            yield where or str(tree["class_path"]), tree
            return
        for key, value in tree.items():
            short = key in ("sigmas", "density") and isinstance(value, str)  # LightningCLI's form without arguments
            inner = where if key == "init_args" else f"{where}.{key}".lstrip(".")
            yield from _specs({"class_path": value} if short else value, inner)
    elif isinstance(tree, list):
        for i, value in enumerate(tree):
            yield from _specs(value, f"{where}[{i}]")


def draw_grids(grids: "Mapping[str, Sigmas]", steps: int) -> "Figure":
    """A panel for each grid: sigma at each of its steps, without the final 0, and above it the first and the last."""
    figure, panels = _figure(len(grids), f"sigma at each of {steps} steps")
    for panel, (name, grid) in zip(panels, grids.items(), strict=True):
        levels = grid(steps)[:-1]
        panel.semilogy(range(steps), levels, ".-", markersize=4, linewidth=0.8)
        panel.minorticks_off()
        panel.set_title(f"{name}\n{levels[0]:.4g} to {levels[-1]:.4g}", fontsize=8)
        panel.set_xlabel("step", fontsize=7)
    return figure


def draw_densities(densities: "Mapping[str, SigmaDensity]") -> "Figure":
    """A panel for each density: share of the draws by log10 sigma, and, where it weights, what the draws stand for."""
    import torch

    figure, panels = _figure(len(densities), "share of the draws, by log10 sigma")
    u = (torch.arange(DRAWS, dtype=torch.float64) + 0.5) / DRAWS
    for panel, (name, density) in zip(panels, densities.items(), strict=True):
        sigma = density.quantile(u)
        shares, weighted, edges = histogram(sigma, density.weight(sigma))
        panel.stairs(shares, edges, fill=True, alpha=0.5)
        if not torch.allclose(shares, weighted):
            panel.stairs(weighted, edges, color="black", linewidth=0.8, label="times weight")
            panel.legend(fontsize=6)
        low, middle, high = density.quantile(u[[DRAWS // 100, DRAWS // 2, -DRAWS // 100]]).tolist()
        panel.set_title(f"{name}\n1, 50, 99 %: {low:.3g}, {middle:.3g}, {high:.3g}", fontsize=8)
        panel.set_xlabel("log10 sigma", fontsize=7)
    return figure


def histogram(sigma: "Tensor", weight: "Tensor", bins: int = 80) -> "tuple[Tensor, Tensor, Tensor]":
    """Shares per unit of log10 sigma (bins,), the same of the weighted draws, and the bins' edges (bins + 1,)."""
    import torch

    value = sigma.log10()
    low, high = value.quantile(0.001).item(), value.quantile(0.999).item()
    if high - low < 1e-6:  # a density of one level
        low, high = low - 0.5, high + 0.5
    width = (high - low) / bins
    plain, edges = torch.histogram(value, bins, range=(low, high))
    weighted, _ = torch.histogram(value, bins, range=(low, high), weight=weight)
    return plain / len(sigma) / width, weighted / len(sigma) / width, edges


def _figure(count: int, title: str) -> "tuple[Figure, list[Any]]":
    from matplotlib.figure import Figure

    columns = min(COLUMNS, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(max(3.0 * columns, 5.0), 2.2 * rows + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=10)
    panels = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for panel in panels:
        panel.tick_params(labelsize=6)
    for panel in panels[count:]:
        panel.set_axis_off()
    return figure, panels[:count]


def main(args: list[str]) -> int:
    """Draws noise grids and densities: every kind, or those that a config names."""
    parser = Parser("mmdiff plot-noise", description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for grids.png and densities.png")
    parser.add_argument("-c", "--config", type=Path, help="training config or cascade.yaml; default: every kind")
    parser.add_argument("--steps", type=int, help="sampling steps of the grids (default 32)")
    parser.add_argument(
        "--shape", type=int, nargs="+", metavar="N", help="axes T ... of the state, for shifts that depend on its size"
    )
    parser.add_argument(
        "--trust", action="append", default=[], metavar="PACKAGE", help="package that the config may also name"
    )
    given = parser.parse_args(args)
    if given.out.exists() and not given.out.is_dir():
        raise ValueError(f"--out {given.out} is a file; name a folder")
    if given.config is None and (given.shape or given.trust):
        raise ValueError("--shape and --trust are for the parts that a config names; give it with -c")
    if given.shape and min(given.shape) < 1:
        raise ValueError(f"--shape {' '.join(map(str, given.shape))} must be positive: the axes T ... of the state")
    grids, densities = every() if given.config is None else named(given.config, given.trust)
    if given.steps is not None and not grids:
        raise ValueError(f"--steps {given.steps} has no effect: {given.config} names no grid, only densities")
    sized = [name for name, grid in grids.items() if grid.sized((1,)) is not grid]
    sized += [name for name, density in densities.items() if density.sized((1,)) is not density]
    if sized and not given.shape:
        raise ValueError(f"{sized[0]} depends on the size of the state; give its axes with --shape, such as 16 32 32")
    if given.shape and not sized:
        raise ValueError(f"--shape has no effect: no shift that {given.config} names depends on the size")
    if given.shape:
        grids = {name: grid.sized(given.shape) for name, grid in grids.items()}
        densities = {name: density.sized(given.shape) for name, density in densities.items()}
    figures = {"grids.png": draw_grids(grids, 32 if given.steps is None else given.steps)} if grids else {}
    if densities:
        figures["densities.png"] = draw_densities(densities)
    given.out.mkdir(parents=True, exist_ok=True)  # nothing is written before everything is drawn
    for name, figure in figures.items():
        figure.savefig(given.out / name, dpi=120)
        print(given.out / name)
    return 0
