"""Samplers of mmdiff beside those of diffusers and k-diffusion: time outside the network, and error for each call.

usage: python benchmarks/samplers.py [--out FILE.json] [--figures FOLDER]

Needs the extra `test`, and for k-diffusion `pip install --no-deps -c constraints.txt k-diffusion`; without it its rows
are left out. Takes about a minute on one core. Nothing here times a network: the denoiser is a formula.

Overhead: seconds for 50 steps on a (4, 16, 32, 32) latent of a network that returns what it is given.
Error: of the end of the path from 256 starts, against the exact solution of the probability-flow ODE for a mixture of
two Gaussians, root mean square, in parts of the data's own spread. Budgets count calls of the network.
The default's grid was chosen on the first mixture; the three held out took no part, and nothing was chosen on them.
The peers run on their own grids and on the default's, which tells what the grid does from what the algorithm does.
"""

import argparse
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mmdiff import sampling as ours
from mmdiff.sigmas import DDPM, Cosine, Flow, Geometric, Karras, Sigmas
from tests.oracles import Mixture

BUDGETS = (5, 10, 20, 50)
GRID = Karras(0.02, 20.0, 9.0)
DEFAULT = "mmdiff AdamsBashforth on Karras(0.02, 20, 9)"  # what docs/core.md recommends without guidance
SAME_GRID = ", the default's grid"
Denoise = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """A mixture and the seed of the 256 starts of its paths."""

    oracle: Mixture
    seed: int

    def starts(self, sigma: float) -> Tensor:
        return self.oracle.sample(256, torch.Generator().manual_seed(self.seed), sigma)

    def error(self, sample: Tensor, x: Tensor, sigma: float, sigma_next: float = 0.0) -> float:
        """Of the path from x, in parts of the data's spread."""
        exact = self.oracle.flow(x, sigma, sigma_next)
        spread = math.sqrt(float(self.oracle.covariance().trace()) / self.oracle.dim)
        return float((sample - exact).square().mean().sqrt()) / spread


CHOSEN_ON = Problem(Mixture(64), 0)
HELD_OUT = {
    "64 dimensions, std 0.3, means 3 apart, shares 0.5": Problem(Mixture(64, 0.3, 1.5, 0.5), 1),
    "16 dimensions, std 0.8, means 1 apart, shares 0.2, 0.8": Problem(Mixture(16, 0.8, 0.5, 0.2), 2),
    "128 dimensions, std 0.15, means 2 apart, shares 0.4, 0.6": Problem(Mixture(128, 0.15, 1.0, 0.4), 3),
}
Run = Callable[[Problem, Denoise, int], tuple[Tensor, float, Tensor]]  # (.., D, steps) -> start, its sigma, sample


class Counted:
    """A denoiser that counts its calls."""

    def __init__(self, denoise: Denoise) -> None:
        self.denoise, self.calls = denoise, 0

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.calls += 1
        return self.denoise(x, sigma)


def never(like: Tensor) -> Tensor:
    raise AssertionError("a deterministic sampler asked for noise")


def run_ours(sampler: ours.Sampler, grid: Sigmas) -> Run:
    def run(problem: Problem, denoise: Denoise, steps: int) -> tuple[Tensor, float, Tensor]:
        sigmas = grid(steps)
        x = problem.starts(float(sigmas[0]))
        return x, float(sigmas[0]), sampler(denoise, x, sigmas, never)

    return run


def run_diffusers(kind: str, grid: Sigmas | None = None, **settings: Any) -> Run:
    """A scheduler with x0 prediction; x_t = alpha x where it is variance-preserving.

    grid: levels in the place of its own. Only Euler's set_timesteps takes any, so they are set on the scheduler.
    """
    import diffusers

    def run(problem: Problem, denoise: Denoise, steps: int) -> tuple[Tensor, float, Tensor]:
        scheduler = getattr(diffusers, kind)(prediction_type="sample", beta_schedule="scaled_linear", **settings)
        scheduler.set_timesteps(steps)
        if grid is not None:
            scheduler.sigmas = grid(steps)
            if kind.startswith("DEIS"):  # repeats the last level, as on its own grids: it takes the logarithm of each
                scheduler.sigmas[-1] = scheduler.sigmas[-2]
            scheduler.timesteps = torch.linspace(999, 1, steps)  # labels, which must differ from each other
        preserving = not kind.startswith(("Euler", "Heun"))
        levels = scheduler.sigmas if hasattr(scheduler, "sigmas") else None
        bar = scheduler.alphas_cumprod.double()
        first = float(levels[0]) if levels is not None else math.sqrt(float(1 / bar[scheduler.timesteps[0]] - 1))
        x = problem.starts(first)
        state = x / math.hypot(1, first) if preserving else x
        for t in scheduler.timesteps:
            if not preserving:
                scheduler.scale_model_input(state, t)
            sigma = math.sqrt(float(1 / bar[t] - 1)) if levels is None else float(levels[scheduler.step_index or 0])
            x0 = denoise(state * math.hypot(1, sigma) if preserving else state, torch.tensor(sigma))
            state = scheduler.step(x0, t, state).prev_sample.double()
        return x, first, state

    return run


def load_k() -> ModuleType | None:
    """k-diffusion's sampling.py alone, or nothing."""
    if importlib.util.find_spec("k_diffusion") is None:
        return None
    from tests.test_sampling_kdiffusion import load

    return load(Path(str(importlib.util.find_spec("k_diffusion").origin)).with_name("sampling.py"))  # type: ignore[union-attr]


def run_k(module: ModuleType, function: str, grid: Sigmas | None = None, **settings: Any) -> Run:
    def run(problem: Problem, denoise: Denoise, steps: int) -> tuple[Tensor, float, Tensor]:
        sigmas = (grid(steps) if grid else module.get_sigmas_karras(steps, 0.002, 80.0)).double()
        x = problem.starts(float(sigmas[0]))
        model = lambda x, sigma: denoise(x, sigma[0])
        return x, float(sigmas[0]), getattr(module, function)(model, x, sigmas, disable=True, **settings)

    return run


def error(run: Run, budget: int, problem: Problem) -> float:
    """With as many steps as the budget of calls allows; nan where not even one step fits."""
    for steps in range(budget, 0, -1):
        counted = Counted(problem.oracle.denoise)
        try:
            x, sigma, sample = run(problem, counted, steps)
        except (ValueError, IndexError, RuntimeError):
            continue
        if counted.calls <= budget:
            return problem.error(sample, x, sigma)
    return math.nan


def ours_runs() -> dict[str, Run]:
    grids = {
        "Karras": Karras(),
        "Karras(0.02, 20, 9)": GRID,
        "Geometric(0.05, 80)": Geometric(0.05, 80.0),
        "Flow": Flow(),
        "Cosine(80)": Cosine(80.0),
        "DDPM": DDPM(),
    }
    samplers = {
        "Ancestral(0)": ours.Ancestral(), "Heun(flow)": ours.Heun("flow"), "DPMpp2S": ours.DPMpp2S(),
        "DPMpp2M": ours.DPMpp2M(), "DPMpp3M": ours.DPMpp3M(), "UniPC(2)": ours.UniPC(2), "UniPC(3)": ours.UniPC(3),
        "AdamsBashforth": ours.AdamsBashforth(), "AdamsBashforth(sigma)": ours.AdamsBashforth(3, "sigma"),
        "RK4": ours.RK4(),
    }  # fmt: skip
    return {f"{s} on {g}": run_ours(samplers[s], grids[g]) for s in samplers for g in grids}


def their_runs() -> dict[str, Run]:
    runs: dict[str, Run] = {}
    for label, kind, settings in (
        ("DDIM, trailing", "DDIMScheduler", {"timestep_spacing": "trailing", "clip_sample": False}),
        ("DPM-Solver++ 2M, karras", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        ("DPM-Solver++ 2M, trailing", "DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}),
        ("DPM-Solver++ 2M, lu lambdas", "DPMSolverMultistepScheduler", {"use_lu_lambdas": True}),
        ("DPM-Solver++ 3M, karras", "DPMSolverMultistepScheduler", {"solver_order": 3, "use_karras_sigmas": True}),
        ("UniPC 2, karras", "UniPCMultistepScheduler", {"use_karras_sigmas": True}),
        ("UniPC 3, karras", "UniPCMultistepScheduler", {"solver_order": 3, "use_karras_sigmas": True}),
        ("UniPC 3, trailing", "UniPCMultistepScheduler", {"solver_order": 3, "timestep_spacing": "trailing"}),
        ("DEIS 3, karras", "DEISMultistepScheduler", {"solver_order": 3, "use_karras_sigmas": True}),
        ("Euler, karras", "EulerDiscreteScheduler", {"use_karras_sigmas": True}),
        ("Heun, karras", "HeunDiscreteScheduler", {"use_karras_sigmas": True}),
    ):
        runs[f"diffusers {label}"] = run_diffusers(kind, **settings)
        if label.endswith("karras") and not kind.startswith("Heun"):  # Heun lists its levels twice
            runs[f"diffusers {label.removesuffix(', karras')}{SAME_GRID}"] = run_diffusers(kind, GRID, **settings)
    module = load_k()
    if module is not None:
        for function, options in (
            ("sample_euler", {}), ("sample_heun", {}), ("sample_dpm_2", {}), ("sample_lms", {}),
            ("sample_dpmpp_2m", {}), ("sample_dpmpp_2s_ancestral", {"eta": 0.0}),
            ("sample_dpmpp_3m_sde", {"eta": 0.0, "noise_sampler": lambda *_: 0}),
        ):  # fmt: skip
            label = f"k-diffusion {function.removeprefix('sample_')}"
            runs[label] = run_k(module, function, **options)
            runs[label + SAME_GRID] = run_k(module, function, GRID, **options)
    return runs


def fastest(call: Callable[[], object], repeats: int = 7) -> float:
    """Seconds of the fastest of several calls, after one to warm up."""
    call()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def overheads() -> dict[str, dict[str, float]]:
    """Milliseconds for 50 steps: {method: {suite: ms}}."""
    import diffusers

    x = torch.randn(4, 16, 32, 32, generator=torch.Generator().manual_seed(0))
    x0 = torch.tanh(x)
    sigmas, k = Karras()(50), load_k()
    found: dict[str, dict[str, float]] = {}
    for method, sampler, kind, settings, function in (
        ("DDIM", ours.Ancestral(), "DDIMScheduler", {}, None),
        ("Euler", ours.Euler(), "EulerDiscreteScheduler", {"use_karras_sigmas": True}, "sample_euler"),
        ("DPM-Solver++ 2M", ours.DPMpp2M(), "DPMSolverMultistepScheduler", {}, "sample_dpmpp_2m"),
        ("UniPC 2", ours.UniPC(2), "UniPCMultistepScheduler", {}, None),
        ("UniPC 3", ours.UniPC(3), "UniPCMultistepScheduler", {"solver_order": 3}, None),
        ("DPM-Solver++ 3M", ours.DPMpp3M(), "DPMSolverMultistepScheduler", {"solver_order": 3}, None),
    ):
        scheduler = getattr(diffusers, kind)(prediction_type="epsilon", **settings)

        def theirs(scheduler: Any = scheduler) -> None:
            scheduler.set_timesteps(50)
            state = x
            for t in scheduler.timesteps:
                state = scheduler.step(x0, t, scheduler.scale_model_input(state, t)).prev_sample

        row = {
            "mmdiff": 1e3 * fastest(lambda sampler=sampler: sampler(lambda x, sigma: x0, x, sigmas, never)),  # type: ignore[misc]
            "diffusers": 1e3 * fastest(theirs),
        }
        if k is not None and function is not None:
            call = getattr(k, function)
            row["k-diffusion"] = 1e3 * fastest(lambda call=call: call(lambda x, sigma: x0, x, sigmas, disable=True))  # type: ignore[misc]
        found[method] = row
    return found


def orders() -> dict[str, list[tuple[float, float]]]:
    """Points (steps, error) of each order, on the levels of a Karras grid from 80 to 0.05."""
    samplers = {
        "Euler, DDIM (1)": ours.Ancestral(), "Heun (2)": ours.Heun(), "DPM-Solver++ 2M (2)": ours.DPMpp2M(),
        "DPM-Solver++ 3M (3)": ours.DPMpp3M(), "DEIS (3)": ours.AdamsBashforth(), "UniPC-2 (3)": ours.UniPC(2),
        "UniPC-3 (4)": ours.UniPC(3), "RK4 (4)": ours.RK4(),
    }  # fmt: skip
    x = CHOSEN_ON.starts(80.0)
    points: dict[str, list[tuple[float, float]]] = {label: [] for label in samplers}
    for steps in (8, 16, 32, 64, 128):
        sigmas = Karras(0.05, 80.0).levels(steps + 1)
        for label, sampler in samplers.items():
            sample = sampler(CHOSEN_ON.oracle.denoise, x, sigmas, never)
            points[label].append((steps, CHOSEN_ON.error(sample, x, 80.0, 0.05)))
    return points


def draw(results: dict[str, Any], folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    figure, axis = plt.subplots(figsize=(6, 4.2))
    for label, points in results["orders"].items():
        axis.loglog(*zip(*points, strict=True), "o-", label=label, markersize=3)
    axis.set(xlabel="steps", ylabel="error of the path", title="Order of each sampler (declared in brackets)")
    axis.legend(fontsize=7)
    figure.savefig(folder / "sampler_orders.png", dpi=130, bbox_inches="tight")
    plt.close(figure)

    problems = {"on this mixture the default's grid was chosen": results["errors"]}
    problems |= {f"held out: {title}": errors for title, errors in results["held_out"].items()}
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    shown = {DEFAULT: "o-"}  # the same lines in all four
    for suite, style in (("mmdiff", "o-"), ("diffusers", "s--"), ("k-diffusion", "^:")):
        rows = {label: row for label, row in results["errors"].items() if label.startswith(suite)}
        own = [label for label in rows if not label.endswith(SAME_GRID)]
        shown |= dict.fromkeys(sorted(own, key=lambda label: rows[label]["20"])[:2], style)
        same = [label for label in rows if label.endswith(SAME_GRID)]
        shown |= dict.fromkeys(sorted(same, key=lambda label: rows[label]["20"])[:1], style)
    for (title, errors), axis in zip(problems.items(), axes.flat, strict=True):
        budgets = [budget for budget in map(str, BUDGETS) if budget in errors[DEFAULT]]
        for label, style in shown.items():
            axis.loglog([*map(int, budgets)], [errors[label][b] for b in budgets], style, label=label, markersize=4)
        axis.set_title(title, fontsize=9)
        axis.set(xlabel="calls of the network", ylabel="error of the path")
        axis.set_xticks([*map(int, budgets)], budgets)
        axis.minorticks_off()
    figure.legend(*axes.flat[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=2)
    figure.savefig(folder / "sampler_errors.png", dpi=130, bbox_inches="tight")
    plt.close(figure)


def compare(
    title: str, runs: dict[str, Run], problem: Problem, budgets: tuple[int, ...]
) -> dict[str, dict[str, float]]:
    """Print the errors of all runs and the best of each side; {label: {budget: error}}."""
    errors = {label: {str(budget): error(run, budget, problem) for budget in budgets} for label, run in runs.items()}
    print(f"\n{title}\n{'error for calls of the network':58}" + "".join(f"{budget:>11}" for budget in budgets))
    for label, row in sorted(errors.items(), key=lambda item: item[1]["20"]):
        print(f"{label:58}" + "".join(f"{row[str(budget)]:11.2e}" for budget in budgets))
    sides: dict[str, Callable[[str], bool]] = {
        "best of ours": lambda label: label.startswith("mmdiff"),
        "best peer, its own grid": lambda label: not label.startswith("mmdiff") and not label.endswith(SAME_GRID),
        "best peer, the default's grid": lambda label: label.endswith(SAME_GRID),
    }
    for budget in map(str, budgets):
        print(f"\n{budget:>3} calls: {'the default':30} {errors[DEFAULT][budget]:.2e} {DEFAULT}")
        for side, belongs in sides.items():
            found, label = min(
                (row[budget], label) for label, row in errors.items() if belongs(label) and row[budget] >= 0
            )
            print(f"           {side:30} {found:.2e} {label}")
    return errors


def main() -> int:
    options = argparse.ArgumentParser(description="samplers of mmdiff beside those of diffusers and k-diffusion")
    options.add_argument("--out", type=Path, help="write every number as JSON")
    options.add_argument("--figures", type=Path, help="folder to draw the figures in, e.g. docs/figures")
    given = options.parse_args()
    torch.set_num_threads(1)
    overhead = overheads()
    print(f"{'50 steps, (4, 16, 32, 32), ms':32}{'mmdiff':>9}{'diffusers':>11}{'k-diffusion':>13}  ours / diffusers")
    for method, row in overhead.items():
        share = row["mmdiff"] / row["diffusers"]
        third = f"{row['k-diffusion']:13.2f}" if "k-diffusion" in row else " " * 13
        print(f"{method:32}{row['mmdiff']:9.2f}{row['diffusers']:11.2f}{third}  {share:.2f}")
    runs = {f"mmdiff {label}": run for label, run in ours_runs().items()} | their_runs()
    errors = compare("Mixture on which the grid of the default was chosen", runs, CHOSEN_ON, BUDGETS)
    held_out = {
        title: compare(f"Held out, nothing chosen on it: {title}", runs, problem, (10, 20))
        for title, problem in HELD_OUT.items()
    }
    results = {"overhead_ms": overhead, "errors": errors, "held_out": held_out, "orders": orders()}
    if given.out:
        given.out.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    if given.figures:
        draw(results, given.figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
