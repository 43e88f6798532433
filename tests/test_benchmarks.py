"""What benchmarks/ concludes from its numbers, on numbers made up here and on networks too small to time."""

import importlib
import json
import math
import sys
import types
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks import backbones, quality
from benchmarks.backbones import Found, Row, bars_of, measure_case
from benchmarks.bars import MET, MISSED, NOT_MEASURED, Bar, exit_status, least_bar, most_bar, print_bars
from benchmarks.cases import CASES, GPU_CASES, Case
from benchmarks.measure import (
    Interval,
    Rounds,
    best_matrix,
    inference_step,
    interval,
    matrix_flops,
    matrix_products,
    measure_rounds,
    training_step,
)
from benchmarks.networks import OURS, Network, Peer, check_parameters, import_imagen, parameters

CPU = torch.device("cpu")


class Stub(nn.Module):
    """A network of one linear map over channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inside = nn.Linear(2, width)
        self.outside = nn.Linear(width, 2)

    def forward(self, x: Tensor, c_noise: Tensor, cond: object = None) -> Tensor:
        return self.outside(self.inside(x.movedim(1, -1))).movedim(-1, 1) + c_noise[:, None, None]


def stub_case(peer_width: int = 50, peer_package: str = "torch") -> Case:
    peer = Network("theirs", peer_package, lambda: Stub(peer_width))
    return Case("stub", "stub", (2, 2, 8), [Network("mine", OURS, lambda: Stub(50)), peer], faster=1.25, share=0.7)


def row(network: str, train_ratio: float = 1.0, memory: int | None = 100, share: float = 0.5) -> Row:
    point = Interval(train_ratio, train_ratio, train_ratio)
    return Row(network, 10, 0.1, 0.05, 20.0, 1.0, 10.0, Interval(share, share, share), point, point, memory)


# Bars


@pytest.mark.parametrize(("value", "most", "verdict"), [
    (1.25, False, MET), (1.2499, False, MISSED), (1.25, True, MET), (1.2501, True, MISSED),
    (None, False, NOT_MEASURED), (math.nan, False, MISSED), (math.nan, True, MISSED),
])  # fmt: skip
def test_a_bar_is_met_at_its_limit_and_missed_beyond(value: float | None, most: bool, verdict: str) -> None:
    assert Bar("b", 1.25, value, most).verdict == verdict


def test_a_bar_without_one_of_its_peers_can_be_missed_but_not_met() -> None:
    assert least_bar("b", 1.25, {"slow": 2.0}, absent=["fast"]).verdict == NOT_MEASURED
    assert least_bar("b", 1.25, {"slow": 1.1}, absent=["fast"]).verdict == MISSED
    assert least_bar("b", 1.25, {}, absent=["slow", "fast"]).verdict == NOT_MEASURED
    assert most_bar("b", 1.1, {"lean": 1.3}, absent=["other"]).verdict == MISSED


def test_the_value_of_a_bar_is_that_beside_the_best_peer() -> None:
    ratios = {"a": 3.0, "b": 1.5, "c": 2.0}
    assert (least_bar("x", 1.0, ratios).value, least_bar("x", 1.0, ratios).against) == (1.5, "beside b")
    assert (most_bar("x", 1.0, ratios).value, most_bar("x", 1.0, ratios).against) == (3.0, "beside a")


def test_the_table_names_each_verdict_and_the_exit_status_follows_the_worst(capsys: pytest.CaptureFixture[str]) -> None:
    met, missed = Bar("fast", 1.0, 1.5), Bar("lean", 1.0, 1.5, most=True)
    unknown = Bar("far", 1.0, None, absent=["peer"])
    assert (exit_status([met]), exit_status([met, unknown]), exit_status([met, unknown, missed])) == (0, 3, 1)
    print_bars([met, missed, unknown])
    *_, one, two, three, total = capsys.readouterr().out.splitlines()
    assert one.split() == ["fast", ">=", "1.00", "1.500", "met"]
    assert two.split() == ["lean", "<=", "1.00", "1.500", "MISSED"]
    assert three.split() == ["far", ">=", "1.00", "not", "measured", "(without", "peer)"]
    assert total == "1 met, 1 MISSED, 1 not measured"


def test_bars_of_a_case_follow_from_its_rows() -> None:
    found = Found(
        stub_case(), [row("mine", share=0.71, memory=109), row("theirs", 1.3, 100)], [], 7, "matrix 512", 100.0
    )
    throughput, share, memory = bars_of(found)
    assert (throughput.value, throughput.verdict) == (1.3, MET)
    assert (share.value, share.verdict) == (0.71, MET)
    assert (memory.value, memory.verdict) == (pytest.approx(1.09), MET)
    heavy = replace(found, rows=[row("mine", share=0.69, memory=111), row("theirs", 1.2, 100)])
    assert [bar.verdict for bar in bars_of(heavy)] == [MISSED, MISSED, MISSED]
    alone = replace(found, rows=found.rows[:1], absent=["theirs"])
    assert [bar.verdict for bar in bars_of(alone)] == [NOT_MEASURED, MET, NOT_MEASURED]
    unmeasured = replace(found, rows=[row("mine", memory=None), row("theirs", 1.3, None)])
    assert bars_of(unmeasured)[2].verdict == NOT_MEASURED


def test_faster_than_leaves_the_other_peers_out_of_the_bar_of_speed_alone() -> None:
    case = replace(stub_case(), faster_than=("theirs",), share=None)
    rows = [row("mine", memory=120), row("theirs", 2.0, 130), row("third", 0.5, 100)]
    speed, memory = bars_of(Found(case, rows, [], 7, "matrix 512", 1.0))
    assert (speed.value, memory.value) == (2.0, pytest.approx(1.2))
    absent = bars_of(Found(case, rows[:2], ["third"], 7, "matrix 512", 1.0))
    assert [bar.verdict for bar in absent] == [MET, NOT_MEASURED]


def test_the_bars_are_those_of_the_issue() -> None:
    assert {name: (case.faster, case.share) for name, case in CASES.items()} == {
        "unet3d": (1.25, None), "unet3d-32": (1.25, None), "dit": (1.6, 0.7), "unet1d": (1.3, None),
    }  # fmt: skip
    assert [case.shape for case in CASES.values()] == [
        (2, 4, 8, 16, 16), (2, 3, 8, 32, 32), (2, 4, 8, 16, 16), (2, 1, 16384)
    ]  # fmt: skip
    assert {name: case.share for name, case in GPU_CASES.items()} == {"dit": 0.45, "unet3d": 0.30}
    assert GPU_CASES["dit"].shape[2:] == (16, 32, 32)


# Parameters and peers


def test_networks_of_other_sizes_are_refused() -> None:
    check_parameters({"mine": 1000, "theirs": 1050}, "mine")
    with pytest.raises(ValueError, match="theirs has 1,051 parameters, mine 1,000: more than 5% apart"):
        check_parameters({"mine": 1000, "theirs": 1051}, "mine")
    with pytest.raises(ValueError, match="more than 5% apart"):
        measure_case(stub_case(peer_width=60), CPU, 0.0, 1, memory=False)


@pytest.mark.parametrize("name", CASES)
def test_parameters_of_every_installed_network_of_a_case_match(name: str) -> None:
    case = CASES[name]
    with torch.device("meta"):
        counts = {n.name: parameters(n.build()) for n in case.networks if n.present and n.package != "imagen_pytorch"}
    check_parameters(counts, case.ours.name)
    assert 9.5e6 < counts[case.ours.name] < 10.5e6


@pytest.mark.parametrize("name", CASES)
def test_every_installed_network_gives_what_it_is_given_the_shape_of(name: str) -> None:
    case = CASES[name]
    x, c_noise, _ = case.input()
    for network in case.networks:
        if network.present and network.package == OURS:
            assert network.build()(x[:1], c_noise[:1]).shape == x[:1].shape


def test_a_peer_is_given_the_level_in_its_own_range() -> None:
    seen: list[Tensor] = []
    peer = Peer(nn.Identity(), lambda network, x, level: seen.append(level) or x)  # type: ignore[func-returns-value]
    peer(torch.zeros(3, 1), torch.tensor([-2.0, 0.0, 9.0]))
    assert seen[0].tolist() == [0.0, 0.5, 1.0]


def test_importing_imagen_asks_no_hub_and_leaves_transformers_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    asked = []

    class Finder:
        """Stands for imagen_pytorch: reads T5's configuration while it is imported."""

        def find_spec(self, name: str, path: object = None, target: object = None) -> object:
            if name != "imagen_pytorch":
                return None
            return importlib.machinery.ModuleSpec(name, self)  # type: ignore[arg-type]

        def create_module(self, spec: object) -> types.ModuleType | None:
            return None

        def exec_module(self, module: types.ModuleType) -> None:
            asked.append(transformers.T5Config.from_pretrained("google/t5-v1_1-base").d_model)

    monkeypatch.delitem(sys.modules, "imagen_pytorch", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    before = transformers.T5Config.from_pretrained
    import_imagen()
    assert asked == [768]
    assert transformers.T5Config.from_pretrained == before
    monkeypatch.delitem(sys.modules, "imagen_pytorch", raising=False)


# Measuring


@pytest.mark.parametrize(("n", "low", "high"), [(1, 0, 0), (5, 0, 4), (6, 0, 5), (9, 1, 7), (15, 3, 11), (100, 39, 60)])
def test_interval_of_the_median_is_that_of_the_tables(n: int, low: int, high: int) -> None:
    """Ranks of the 95 % interval by the sign test, e.g. Conover 1999, table A3; counted from 0."""
    found = interval([float(v) for v in reversed(range(n))])
    assert (found.median, found.low, found.high) == ((n - 1) / 2, low, high)
    with pytest.raises(ValueError, match="at least one round"):
        interval([])


def test_ratios_are_of_the_same_round() -> None:
    rounds = Rounds({"a": [2.0, 20.0, 2.0], "b": [1.0, 10.0, 4.0]})  # the second round was ten times slower for both
    assert rounds.ratios("a", "b") == [2.0, 2.0, 0.5]
    assert (rounds.median("a"), interval(rounds.ratios("a", "b")).median) == (2.0, 2.0)


def test_every_round_runs_each_work_once_and_turns_the_order() -> None:
    calls: list[str] = []
    works = {name: (lambda name=name: calls.append(name)) for name in "abc"}  # type: ignore[misc]
    found = measure_rounds(works, CPU, budget_s=0.0, rounds=(3, 3))
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"  # the first of each warms up
    assert {name: len(seconds) for name, seconds in found.seconds.items()} == {"a": 3, "b": 3, "c": 3}
    with pytest.raises(ValueError, match=r"rounds=\(5, 3\)"):
        measure_rounds(works, CPU, 0.0, rounds=(5, 3))


def test_rounds_end_when_the_ratio_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(10_000))
    monkeypatch.setattr("benchmarks.measure.time.perf_counter", lambda: float(next(ticks)))
    works = {"a": lambda: None, "b": lambda: None}
    steady = measure_rounds(works, CPU, budget_s=1e9, pairs=[("a", "b")], rounds=(7, 50))
    assert len(steady.seconds["a"]) == 7  # every call takes one tick: the ratio is exactly 1
    unknown = measure_rounds(works, CPU, budget_s=1e9, rounds=(7, 20))
    assert len(unknown.seconds["a"]) == 20  # without pairs only the budget or the most number ends it


def test_a_training_step_leaves_no_gradient_and_an_inference_step_the_mode() -> None:
    network, (x, c_noise, target) = Stub(4), stub_case().input()
    training_step(network, x, c_noise, target)()
    assert all(p.grad is None for p in network.parameters())
    network.train()
    inference_step(network, x, c_noise)()
    assert network.training


def test_matrix_rate_takes_the_best_size() -> None:
    works = matrix_products(CPU, torch.float32, sides=(512,))
    for work in works.values():
        work()
    assert matrix_flops("matrix 1024") == 2 * 1024**3
    assert matrix_flops("matrix 512") == matrix_flops("matrix 2048") / 8 == 2 * 1024**3
    rounds = Rounds({"matrix 512": [0.2, 0.2], "matrix 1024": [0.1, 0.1], "train x": [0.01, 0.01]})
    assert best_matrix(rounds) == "matrix 1024"


def test_the_whole_runs_on_stubs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = replace(stub_case(), faster=0.01, share=None)
    absent = Network("nobody's", "no_such_package", lambda: Stub(1))
    monkeypatch.setattr(backbones, "CASES", {"stub": replace(case, networks=[*case.networks, absent])})
    monkeypatch.setattr(backbones, "matrix_products", partial(matrix_products, sides=(512,)))
    file = tmp_path / "found.json"
    threads = torch.get_num_threads()
    status = backbones.main(["--seconds", "0.01", "--no-memory", "--threads", str(threads), "--json", str(file)])
    assert status == 3  # one peer is absent
    out = capsys.readouterr().out
    assert "nobody's: not installed, left out" in out
    assert "0 met, 0 MISSED, 2 not measured" in out
    found = json.loads(file.read_text())
    mine, theirs = found["cases"]["stub"]
    assert (mine["parameters"], mine["train_ratio"]["median"]) == (50 * 5 + 2, 1.0)
    assert mine["train_gflop"] == pytest.approx((3 * 2 * 2 * 8 * 50 * 2 * 2 - 2 * 2 * 8 * 2 * 50) / 1e9)  # x needs none
    assert theirs["network"] == "theirs"
    assert [bar["verdict"] for bar in found["bars"]] == [NOT_MEASURED, NOT_MEASURED]


@pytest.mark.parametrize(("args", "message"), [
    (["--case", "unet4d"], "--case unet4d: cases are unet3d"), (["--threads", "0"], "--threads is under 1"),
])  # fmt: skip
def test_options_that_cannot_be_are_named(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        backbones.main(args)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_peak_memory_repeats_and_counts_weights_and_gradients() -> None:
    from benchmarks.memory import peak_of

    first, again = (peak_of("dit", CASES["dit"].ours.name, 1) for _ in range(2))
    weights = 4 * parameters(CASES["dit"].ours.build())
    assert first == pytest.approx(again, rel=0.03)
    assert first > 2 * weights


# Quality


def test_learning_rate_rises_and_falls_with_the_time_that_is_gone() -> None:
    factors = [quality.annealed(share) for share in (0.0, 0.025, 0.05, 0.525, 1.0, 1.1)]
    assert factors == pytest.approx([0.01, 0.5, 1.0, 0.5, 0.0, 0.0])


def test_both_train_as_long_on_the_same_batches_and_are_judged_on_the_same_noise(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = torch.randn(16, 2, 8), torch.randn(4, 2, 8)
    mine, theirs = stub_case().networks
    task = quality.Task("stub", lambda seed: data, mine, theirs, 4)
    monkeypatch.setattr(quality.time, "perf_counter", map(float, range(10**6)).__next__)  # a step takes one second
    ours, peer = quality.compete(task, 24.0, 1e-3, seed=0)
    assert (ours.seconds, ours.steps, peer.seconds, peer.steps) == (24.0, 24, 24.0, 24)
    assert ours.history == peer.history  # equal networks from equal weights see equal batches and levels
    assert len(ours.history) == quality.TURNS
    assert ours.history[-1][2] < ours.history[0][2]
    assert ours.evaluate(data[1], 4) == ours.evaluate(data[1], 2)
    monkeypatch.setattr(quality, "TASKS", {"stub": replace(task, peer=replace(theirs, package="no_such_package"))})
    assert quality.main(["--task", "stub"]) == 3
    assert "not installed, left out" in capsys.readouterr().out
