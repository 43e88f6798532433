"""The report of an evaluation, for the eye and for JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from .accuracy import score
from .distance import Measured
from .judging import Judge, averages
from .memorised import Memorised
from .readers import Labels
from .restoration import Restored
from .tasks import Prompt

Scores = dict[str, Any]


def scores(
    prompts: Sequence[Prompt], found: Judge, truth: Sequence[Labels], parts: Sequence[str], real: Judge
) -> Scores:
    """`score` of the generated clips and of the real ones: of all, and of each part where they are told apart.

    truth, parts: labels and part of each real clip.
    """
    wanted, asked = [prompt.labels for prompt in prompts], [prompt.part for prompt in prompts]
    whole: Scores = {"generated": score(wanted, found.read), "real": score(truth, real.read), "parts": {}}
    for name in sorted({*asked} & {*parts}) if len({*asked}) > 1 else ():
        ours, theirs = ([k for k, part in enumerate(side) if part == name] for side in (asked, parts))
        whole["parts"][name] = {
            "generated": score([wanted[k] for k in ours], [found.read[k] for k in ours]),
            "real": score([truth[k] for k in theirs], [real.read[k] for k in theirs]),
        }
    return whole


def record(
    made: Judge, real: Judge, measured: Sequence[Measured], copied: Memorised | None, stages: Sequence[Restored]
) -> dict[str, Any]:
    """What is found besides the scores, as JSON takes it."""
    near = None
    if copied is not None:
        near = {**asdict(copied), "distances": copied.distances.tolist(), "nearest": copied.nearest.tolist()}
    return {
        "distances": [asdict(one) for one in measured],
        "measures": {"generated": averages(made), "real": averages(real)},
        "memorised": near,
        "stages": [asdict(one) for one in stages],
        "lines": [*map(str, measured), *([] if copied is None else [str(copied)]), *map(str, stages)],
    }


def table(report: Mapping[str, Any]) -> str:
    """The report for the eye."""
    blocks = _shares("generated", report)
    for name, part in report["parts"].items():
        blocks += _shares(f"generated, {name}", part)
    measures = [
        f"{name}: generated {_mean(row)}, real {_mean(report['measures']['real'][name])}"
        for name, row in report["measures"]["generated"].items()
    ]
    protocol = ", ".join(f"{name} {value}" for name, value in report["protocol"].items())
    notes = "95 % intervals, of shares Wilson's; chance: always answering what is prompted most often"
    return "\n".join([*blocks, *measures, *report["lines"], notes, f"protocol: {protocol}"])


def _shares(title: str, rows: Mapping[str, Any]) -> list[str]:
    generated, real = rows["generated"], rows["real"]
    lines = [f"{'':<12}{title:<32}{'real validation (ceiling)':<32}chance"]
    for name, row in generated.items():
        lines.append(f"{name:<12}{_cell(row):<32}{_cell(real[name]):<32}{100 * row['chance']:.1f} %")
    return lines


def _cell(row: Mapping[str, Any]) -> str:
    low, high = row["interval"]
    share = f"{row['right']}/{row['count']}"
    return f"{100 * row['accuracy']:5.1f} % [{100 * low:.1f}, {100 * high:.1f}] {share}"


def _mean(row: Mapping[str, Any]) -> str:
    low, high = row["interval"]
    return f"{row['mean']:.4g} [{low:.4g}, {high:.4g}] of {row['count']}"
