"""Samplers against k-diffusion on its own levels, with the same noise, in float64: equal to 1e-9 but where it is wrong.

Only its sampling.py is loaded: the package's __init__ asks for clip, wandb and more. `scripts/test.sh` installs it.
"""

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from mmdiff.sampling import (
    AdamsBashforth,
    Ancestral,
    Brownian,
    DPMpp2M,
    DPMpp2MSDE,
    DPMpp2S,
    DPMpp3M,
    DPMpp3MSDE,
    Euler,
    Heun,
    Sampler,
)
from tests.oracles import Mixture, distance, torch_noise

ORACLE = Mixture(4)
WRONG = "d2 = (d1_0 - d1_1) / (r0 + r1)"  # of sample_dpmpp_3m_sde; the second derivative is twice that


def load(file: Path) -> ModuleType:
    """k-diffusion's sampling.py under a parent that holds the one function that it takes from there."""
    parent, utils = ModuleType("k_reference"), ModuleType("k_reference.utils")
    parent.__path__ = []
    utils.append_dims = lambda x, dims: x[(..., *[None] * (dims - x.ndim))]
    sys.modules |= {"k_reference": parent, "k_reference.utils": utils}
    spec = importlib.util.spec_from_file_location("k_reference.sampling", file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def file() -> Path:
    spec = importlib.util.find_spec("k_diffusion")  # finds, and runs nothing
    if spec is None or any(importlib.util.find_spec(name) is None for name in ("torchsde", "torchdiffeq", "scipy")):
        pytest.skip(
            "needs k-diffusion: pip install -e '.[test]' && pip install --no-deps -c constraints.txt k-diffusion"
        )
    return Path(str(spec.origin)).with_name("sampling.py")


@pytest.fixture(scope="module")
def theirs(file: Path) -> ModuleType:
    return load(file)


@pytest.fixture(scope="module")
def mended(file: Path, tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The same with the one factor put right."""
    source = file.read_text()
    assert source.count(WRONG) == 1
    copy = tmp_path_factory.mktemp("k") / "sampling.py"
    copy.write_text(source.replace(WRONG, WRONG.replace("(d1_0", "2 * (d1_0")))
    return load(copy)


def model(x: Tensor, sigma: Tensor) -> Tensor:
    return ORACLE.denoise(x, sigma[0])


def levels(module: ModuleType, steps: int = 20, end: bool = True) -> Tensor:
    sigmas = module.get_sigmas_karras(steps, 0.02, 80.0).double()
    return sigmas if end else sigmas[:-1]


def first(sigmas: Tensor) -> Tensor:
    return ORACLE.sample(3, torch.Generator().manual_seed(0), float(sigmas[0]))


@pytest.mark.parametrize(
    ("sampler", "function", "settings"),
    [
        (Ancestral(), "sample_euler", {}),
        (Euler(), "sample_euler", {}),
        (Heun(), "sample_heun", {}),
        (DPMpp2S(), "sample_dpmpp_2s_ancestral", {"eta": 0.0}),
        (DPMpp2M(), "sample_dpmpp_2m", {}),
        (DPMpp2MSDE(0.0), "sample_dpmpp_2m_sde", {"eta": 0.0}),
    ],
    ids=str,
)
@pytest.mark.parametrize("end", [True, False], ids=["to 0", "above 0"])
def test_deterministic(sampler: Sampler, function: str, settings: dict, end: bool, theirs: ModuleType) -> None:
    sigmas = levels(theirs, end=end)
    expected = getattr(theirs, function)(model, first(sigmas), sigmas, disable=True, **settings)
    assert distance(sampler(ORACLE.denoise, first(sigmas), sigmas, torch_noise(0)), expected) < 1e-9


@pytest.mark.parametrize("order", [1, 2, 3])
def test_lms(order: int, theirs: ModuleType) -> None:
    """Its coefficients come from a quadrature with a relative tolerance of 1e-4, ours are exact."""
    sigmas = levels(theirs, end=False)
    expected = theirs.sample_lms(model, first(sigmas), sigmas, disable=True, order=order)
    sampler = AdamsBashforth(order, "sigma") if order > 1 else AdamsBashforth(1)
    assert distance(sampler(ORACLE.denoise, first(sigmas), sigmas, torch_noise(0)), expected) < 1e-5


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_euler_ancestral(eta: float, theirs: ModuleType) -> None:
    sigmas, noise = levels(theirs), torch_noise(1)
    x = first(sigmas)
    expected = theirs.sample_euler_ancestral(
        model, x, sigmas, disable=True, eta=eta, noise_sampler=lambda sigma, sigma_next: noise(x)
    )
    assert distance(Ancestral(eta)(ORACLE.denoise, x, sigmas, torch_noise(1)), expected) < 1e-9


@pytest.mark.parametrize(("sampler", "function"), [(Euler, "sample_euler"), (Heun, "sample_heun")])
def test_churn(sampler: type, function: str, theirs: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """It draws in every step, also in those without churn, so the draws are tied to the steps here."""
    settings = {"s_churn": 10.0, "s_tmin": 0.1, "s_tmax": 30.0, "s_noise": 1.01}
    sigmas, draws, theirs_number = levels(theirs), torch_noise(2), iter(range(1000))
    x = first(sigmas)
    table = [draws(x) for _ in sigmas]
    monkeypatch.setattr(theirs.torch, "randn_like", lambda like: table[next(theirs_number)])
    expected = getattr(theirs, function)(model, x, sigmas, disable=True, **settings)
    churned = iter(i for i, sigma in enumerate(sigmas[:-1]) if 0.1 <= sigma <= 30)
    sample = sampler(**settings)(ORACLE.denoise, x, sigmas, lambda like: table[next(churned)])
    assert next(churned, None) is None
    assert distance(sample, expected) < 1e-9


def brownian(x: Tensor, eta: float) -> object:
    path = Brownian.like(x, torch_noise(3), eta)

    def draw(sigma: Tensor, sigma_next: Tensor) -> Tensor:
        high, low = float(sigma), float(sigma_next)
        return path(high, low) / (low * math.sqrt(1 - (low / high) ** (2 * eta)))

    return draw


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("end", [True, False], ids=["to 0", "above 0"])
def test_sde_2m(eta: float, end: bool, theirs: ModuleType) -> None:
    """With the increments of our Brownian path as its noise."""
    sigmas = levels(theirs, end=end)
    x = first(sigmas)
    expected = theirs.sample_dpmpp_2m_sde(model, x, sigmas, disable=True, eta=eta, noise_sampler=brownian(x, eta))
    assert distance(DPMpp2MSDE(eta)(ORACLE.denoise, x, sigmas, torch_noise(3)), expected) < 1e-9


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_sde_3m_with_the_factor_put_right(eta: float, mended: ModuleType) -> None:
    sigmas = levels(mended)
    x = first(sigmas)
    expected = mended.sample_dpmpp_3m_sde(
        model, x, sigmas, disable=True, eta=eta, noise_sampler=brownian(x, eta) if eta else lambda *_: 0
    )
    assert distance(DPMpp3MSDE(eta)(ORACLE.denoise, x, sigmas, torch_noise(3)), expected) < 1e-9


def test_its_third_order_is_second(theirs: ModuleType, mended: ModuleType) -> None:
    """Without noise: halving the steps divides its error by 4, and by 8 with the factor put right, as ours."""
    orders = {}
    for label, run in (
        ("theirs", lambda x, s: theirs.sample_dpmpp_3m_sde(model, x, s, disable=True, eta=0.0, noise_sampler=0)),
        ("mended", lambda x, s: mended.sample_dpmpp_3m_sde(model, x, s, disable=True, eta=0.0, noise_sampler=0)),
        ("ours", lambda x, s: DPMpp3M()(ORACLE.denoise, x, s, torch_noise(0))),
    ):
        errors = []
        for steps in (65, 129):
            sigmas = theirs.get_sigmas_karras(steps, 0.02, 80.0)[:-1].double()
            x = first(sigmas)
            errors.append(distance(run(x, sigmas), ORACLE.flow(x, float(sigmas[0]), float(sigmas[-1]))))
        orders[label] = math.log2(errors[0] / errors[1])
    assert orders["theirs"] < 2.3
    assert 2.8 < orders["mended"] < 3.3
    assert 2.8 < orders["ours"] < 3.3
