"""--guidance, --sampler and --weighted: names, numbers, YAML and the one line that a wrong one ends in."""

from pathlib import Path

import pytest

from mmdiff.cascade import Cascade, Generate
from mmdiff.generate import chosen, parser, with_options
from mmdiff.guidance import APG, Cfg, CfgPP, CfgZero, Guidance, Interval, OverTime, Rescale, Threshold
from mmdiff.named import GUIDANCES, SAMPLERS, part, pick_guidance
from mmdiff.prompts import Weighted
from mmdiff.sampling import Ancestral, Heun

YAML = "{class_path: mmdiff.guidance.Rescale, init_args: {guidance: 6, phi: 0.5}}"


def test_every_name_is_a_rule_with_its_defaults() -> None:
    rules = {"apg": APG(), "cfg": Cfg(), "cfg++": CfgPP(), "cfg-zero": CfgZero(), "interval": Interval(),
             "over-time": OverTime(), "rescale": Rescale(), "threshold": Threshold()}  # fmt: skip
    assert {name: pick_guidance(name) for name in GUIDANCES} == rules
    assert all(rule.reads_neg for rule in rules.values())  # none is named that would guide nowhere


@pytest.mark.parametrize(("text", "scale"), [("3", 3.0), ("0", 0.0), ("1e1", 10.0)])
def test_a_number_stays_one(text: str, scale: float) -> None:
    assert pick_guidance(text) == scale
    assert isinstance(pick_guidance(text), float)


def test_yaml_on_the_line_and_in_a_file(tmp_path: Path) -> None:
    assert pick_guidance(YAML) == Rescale(6.0, 0.5)
    (tmp_path / "rule.yaml").write_text("class_path: mmdiff.guidance.APG\ninit_args: {scale: 5, threshold: 1e-1}\n")
    assert pick_guidance(str(tmp_path / "rule.yaml")) == APG(5.0, threshold=0.1)


FOREIGN = "{class_path: os.system, init_args: {command: 'touch here'}}"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("magic", "--guidance magic: neither one of apg, cfg, cfg++"),
        ("nan", "--guidance nan is outside 0..100"),
        ("101", "--guidance 101.0 is outside 0..100"),
        ("{class_path: mmdiff.guidance.None}", "cannot be imported"),
        ("{class_path: mmdiff.guidance.APG, init_args: {scale: 0.5}}", "scale=0.5 must be at least 1"),
        ("{class_path: mmdiff.guidance.APG, init_args: {sale: 5}}", "APG has no argument 'sale'"),
        ("{class_path: mmdiff.guidance.Compose}", "Compose needs the argument 'others'"),
        ("{class_path: mmdiff.sampling.Heun}", "builds a Heun, not a Guidance"),
        ("{class_path: [", "--guidance {class_path: [: while parsing"),
        ("{scale: 3}", "has no class_path"),
        (FOREIGN, "class_path 'os.system' is outside the trusted packages"),
    ],
)
def test_a_wrong_guidance_is_refused_in_one_line(text: str, says: str) -> None:
    with pytest.raises(ValueError) as caught:
        pick_guidance(text)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_tree_is_named(tmp_path: Path) -> None:
    (tmp_path / "rule.yaml").write_text("- 1\n- 2\n")
    with pytest.raises(ValueError, match=r"--guidance .*rule.yaml: .*expected a tree with class_path"):
        pick_guidance(str(tmp_path / "rule.yaml"))


def test_packages_are_trusted_by_name_alone() -> None:
    with pytest.raises(ValueError, match="outside the trusted packages"):
        part("guidance", "{class_path: tests.nowhere.Rule}", {}, Guidance, [])  # type: ignore[type-abstract]
    with pytest.raises(ValueError, match="cannot be imported"):
        part("guidance", "{class_path: nowhere_at_all.Rule}", {}, Guidance, ["nowhere_at_all"])  # type: ignore[type-abstract]


def settings(*args: str, prompts: list[str] | None = None) -> dict[str, object]:
    given = parser("txt2vid", "", Path("nowhere")).parse_args(["x", *args])
    return chosen(given, prompts or ["x"]).get("", {})


def test_samplers_are_named_or_built_too() -> None:
    assert settings("--sampler", "ddim") == {"sampler": Ancestral(0.0)}
    yaml = "{class_path: mmdiff.sampling.Heun, init_args: {clock: flow}}"
    assert settings("--sampler", yaml, "--steps", "7", "--guidance", "apg") == {
        "sampler": Heun("flow"), "steps": 7, "guidance": APG(),
    }  # fmt: skip
    for name in SAMPLERS:
        assert "sampler" in settings("--sampler", name)
    for wrong, says in (("magic", "neither one of"), (YAML, "builds a Rescale, not a Sampler"), (FOREIGN, "trusted")):
        with pytest.raises(ValueError, match=says) as caught:
            settings("--sampler", wrong)
        assert str(caught.value).startswith(f"--sampler {wrong}: ")
        assert "\n" not in str(caught.value)


def test_weights_are_read_where_they_are_asked_for() -> None:
    assert settings(prompts=["a (red"]) == {}  # without the option a bracket is a bracket
    with pytest.raises(ValueError, match=r"'a \(red', character 3"):
        settings("--weighted", prompts=["fine", "a (red"])
    with pytest.raises(ValueError, match="'blue]', character 5"):
        settings("--weighted", "--negative", "blue]")


def test_options_reach_the_first_stage() -> None:
    from tests.test_cascade import base, upsampler

    given = parser("txt2vid", "", Path("nowhere")).parse_args(["x", "--weighted", "--guidance", YAML])
    whole = Cascade({"base": base(), "up": upsampler()}, (1, 8, 8), 8.0)
    made = with_options(whole, given, chosen(given, ["x"]))
    assert isinstance(made.first, Generate)
    assert made.first.guidance == Rescale(6.0, 0.5)
    for stage in made.stages.values():
        encoders = [m for m in stage.model.modules() if isinstance(m, Weighted)]  # type: ignore[attr-defined]
        assert len(encoders) == 1
