"""`mmdiff compare`: curves, samples and differences of several runs side by side on one HTML page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdiff.data.media import whole_file

from ..generate import Parser
from .charts import COLOURS
from .curves import charts
from .history import read_history
from .page import Media, flat, page, row, table, text
from .record import read_record
from .report import facts, run_name
from .samples import Shot, read_shots

ABSENT = "(not there)"


def compare(folders: Sequence[Path]) -> str:
    """The page. Raises ValueError for fewer than two runs, one given twice, or a folder that holds none."""
    names = names_of(folders)
    records = {name: read_record(folder) for name, folder in zip(names, folders, strict=True)}
    histories = {name: read_history(folder) for name, folder in zip(names, folders, strict=True)}
    shots = {name: read_shots(folder) for name, folder in zip(names, folders, strict=True)}
    coloured = [
        f'<span style="color:{COLOURS[place % len(COLOURS)]}">{text(name)}</span>' for place, name in enumerate(names)
    ]
    title = "Runs compared"
    parts = [
        f"<h1>{title}</h1><p>{', '.join(coloured)}</p>",
        "<h2>Runs</h2>",
        table(_side_by_side({name: dict(facts(record)) for name, record in records.items()}), ("", *names)),
        "<h2>Differences of the configs</h2>",
        _differences({name: flat(record["config"] or {}) for name, record in records.items()}, "configs"),
        "<h2>Differences of the versions</h2>",
        _differences({name: record["launches"][-1]["versions"] for name, record in records.items()}, "versions"),
        f"<h2>Curves</h2>{row(charts(histories))}",
        "<h2>Samples</h2>",
        *_samples(shots),
    ]
    return page(title, parts)


def names_of(folders: Sequence[Path]) -> list[str]:
    """A name for each run that no other has."""
    if len(folders) < 2:
        raise ValueError(f"{len(folders)} run given; give two or more folders to compare")
    whole = [folder.resolve() for folder in folders]
    for folder in whole:
        if whole.count(folder) > 1:
            raise ValueError(f"{folder} is given twice; give different runs")
    short = [run_name(folder) for folder in whole]
    return short if len(set(short)) == len(short) else [str(folder) for folder in whole]


def differing(runs: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[Any]]]:
    """What is not the same in all of them: (key, its value in each)."""
    keys = dict.fromkeys(key for values in runs.values() for key in values)
    rows = [(key, [values.get(key, ABSENT) for values in runs.values()]) for key in keys]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]


def _differences(runs: Mapping[str, Mapping[str, Any]], what: str) -> str:
    rows = differing(runs)
    if not rows:
        return f"<p>none: the {what} are the same</p>"
    return table([(key, *values) for key, values in rows], ("", *runs))


def _side_by_side(runs: Mapping[str, Mapping[str, Any]]) -> list[list[Any]]:
    keys = dict.fromkeys(key for values in runs.values() for key in values)
    return [[key, *[values.get(key, "") for values in runs.values()]] for key in keys]


def _samples(shots: Mapping[str, Sequence[Shot]]) -> list[str]:
    """The clips of the last step that all runs have samples of, or of each run's last, in columns."""
    if not all(shots.values()):
        missing = ", ".join(name for name, found in shots.items() if not found)
        return [f"<p>none of {text(missing)}</p>"] if missing else []
    common = set.intersection(*[{shot.step for shot in found} for found in shots.values()])
    step = max(common, default=None)
    chosen = {
        name: found[-1] if step is None else next(shot for shot in found if shot.step == step)
        for name, found in shots.items()
    }
    media, rows = Media(), []
    weights = dict.fromkeys(kind for shot in chosen.values() for kind in shot.files)
    count = max(len(shot.captions) for shot in chosen.values())
    for place in range(count):
        for kind in weights:
            cells = "".join(f"<td>{_cell(shot, kind, place, media)}</td>" for shot in chosen.values())
            rows.append(f"<tr><th>{text(kind)}</th>{cells}</tr>")
    head = "".join(f"<th>{text(name)}, step {shot.step:,}</th>" for name, shot in chosen.items())
    return [f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table>"]


def _cell(shot: Shot, weights: str, place: int, media: Media) -> str:
    clips = shot.files.get(weights, [])
    if place >= len(clips):
        return ABSENT
    caption = shot.captions[place] if place < len(shot.captions) else ""
    return f"{''.join(media(shot.folder / name) for name in clips[place])}{text(caption)}"


def main(args: list[str]) -> int:
    """Lays curves, samples and config differences of runs side by side on one HTML page."""
    parser = Parser("mmdiff compare", description=main.__doc__)
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="folders of runs, two or more")
    parser.add_argument("--out", type=Path, default=Path("compare.html"), help="the page (default: compare.html)")
    given = parser.parse_args(args)
    content = compare(given.runs)
    with whole_file(given.out) as temporary:
        temporary.write_text(content, "utf-8")
    print(given.out)
    return 0
