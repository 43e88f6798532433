"""`mmdiff report`: a run on one HTML page, to send to others and to look at in years."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mmdiff.data.media import whole_file

from ..generate import Parser
from .curves import by_level, charts
from .history import read_history
from .page import Media, flat, folded, page, row, table, text
from .record import DIFF, read_record
from .samples import Shot, read_shots, spread

REPORT = "report.html"
SHOWN = 8  # times of samples; all of them are in the folder


def write_report(folder: Path, data: Path | None = None) -> Path:
    """Writes report.html of a run's folder and returns its path. data: as in `report`."""
    content, target = report(folder, data), folder / REPORT
    with whole_file(target) as temporary:
        temporary.write_text(content, "utf-8")
    return target


def report(folder: Path, data: Path | None = None) -> str:
    """The page: how the run went, the doctor's findings, curves, samples over time, data, timings, config, versions.

    data: report.json of `mmdiff data report`, or the folder it lies in; default data_report in the run's folder, if it
    is there. Raises ValueError where there is no run, or `data` is no such report.
    """
    record = read_record(folder)
    curves = read_history(folder)
    shots = read_shots(folder)
    title = run_name(folder)
    parts = [
        f"<h1>{text(title)}</h1>",
        *_status(record["launches"]),
        table(facts(record)),
        "<h2>Findings of the doctor</h2>",
        *_findings(folder),
        "<h2>Curves</h2>",
        row([*charts({title: curves}), *by_level({title: curves})]) if curves else "<p>nothing was logged yet</p>",
        f"<h2>Samples</h2>{samples(shots, Media())}",
        "<h2>Data</h2>",
        *_data(folder, record),
        *_data_report(folder, data),
        "<h2>Timings</h2>",
        *_timings(record["launches"]),
        "<h2>Config, versions, git</h2>",
        folded("config", yaml.safe_dump(record["config"], sort_keys=False) if record["config"] else "not recorded"),
        *_versions(folder, record["launches"]),
    ]
    return page(title, parts)


def run_name(folder: Path) -> str:
    """The last parts of its path that tell it from others."""
    parts = [part for part in folder.resolve().parts if part != "lightning_logs"]
    return "/".join(parts[-2:])


def facts(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Model, seed, steps, command and machine of a run, for a table."""
    last, model = record["launches"][-1], record["model"]
    where = last["machine"]
    devices = ", ".join(where["devices"]) or f"{where['cpu']}, {where['cores']} cores, {where['threads']} threads"
    git = [
        f"{name} {state['commit'][:12]}, {len(state['changed'])} changed files" for name, state in last["git"].items()
    ]
    return [
        ("command", last["command"]),
        ("steps", f"{last['last_step']:,}"),
        ("model", f"{model['class']}: {model['parameters']:,} parameters, {model['trained']:,} of them trained"),
        ("seed", str(record["seed"])),
        ("machine", f"{where['host']}: {devices}"),
        ("processes", f"{last['processes']}, {last['strategy']}, precision {last['precision']}"),
        ("git", "; ".join(git) or "no repository"),
        *[(f"data, {split}", data_line(found)) for split, found in record["data"].items()],
        ("checkpoints", ", ".join(last["checkpoints"]) or "none"),
    ]


def data_line(found: Mapping[str, Any]) -> str:
    """What a split holds."""
    left = ", ".join(f"{count} {kind}" for kind, count in found["left_out"].items())
    return (
        f"{found['items']} items in {found['batches']} batches, {found['data set']}, fingerprint {found['fingerprint']}"
        f"{f', left out: {left}' if left else ''}"
    )


def samples(shots: Sequence[Shot], media: Media) -> str:
    """Each caption with its clips over time, from each of the weights they were made with."""
    if not shots:
        return "<p>none: give the config a mmdiff.callbacks.Samples, or Reconstructions for an autoencoder</p>"
    shown = spread(shots, SHOWN)
    figures: dict[tuple[int, str], list[str]] = {}
    for shot in reversed(shown):  # the last ones first, while there is room in the page
        for weights, clips in shot.files.items():
            for place, files in enumerate(clips):
                inside = "".join(media(shot.folder / name) for name in files)
                figure = f"<figure>{inside}<figcaption>step {shot.step:,}, {text(weights)}</figcaption></figure>"
                figures.setdefault((place, weights), []).insert(0, figure)
    parts = [f"<p>{len(shown)} of {len(shots)} times; all are in the folder {text(shots[-1].folder.parent)}</p>"]
    for (place, weights), clips in sorted(figures.items()):
        captions = shots[-1].captions
        caption = captions[place] if place < len(captions) and captions[place] else f"clip {place}"
        parts.append(f"<h3>{text(caption)} ({text(weights)})</h3>{row(clips)}")
    return "".join(parts)


def _status(launches: Sequence[Mapping[str, Any]]) -> list[str]:
    last = launches[-1]
    good = last["status"] == "finished"
    words = last["status"] if good else f"{last['status']}: last heard of at step {last['last_step']:,}, {last['at']}"
    return [f'<p class="{"good" if good else "bad"}">{text(words)}</p>']


def _findings(folder: Path) -> list[str]:
    try:
        found = json.loads((folder / "doctor.json").read_text("utf-8"))
    except FileNotFoundError:
        return ["<p>none were recorded</p>"]
    except (OSError, ValueError) as error:
        return [f'<p class="bad">doctor.json cannot be read: {text(error)}</p>']
    if not found:
        return ['<p class="good">none</p>']
    return [
        table(
            [(one.get("name"), one.get("step"), one.get("found"), one.get("cure")) for one in found],
            ("name", "step", "what was found", "what to do"),
        )
    ]


def _data(folder: Path, record: Mapping[str, Any]) -> list[str]:
    parts = [table([(split, data_line(found)) for split, found in record["data"].items()])]
    for split, found in record["data"].items():
        if found["captions"]:
            parts += [f"<h3>Captions of {text(split)}</h3>", table(found["captions"].items())]
    bad = folder / "bad_items.json"
    if bad.exists():
        parts.append(folded("items that were left out", bad.read_text("utf-8", errors="replace")))
    return parts


def _data_report(folder: Path, given: Path | None) -> list[str]:
    """What `mmdiff data report` has found, without its list of items."""
    path = folder / "data_report" if given is None else given
    path = path / "report.json" if path.is_dir() else path
    if given is None and not path.exists():
        return []
    try:
        found = json.loads(path.read_text("utf-8"))
        failures, rest = found["failures"], {name: part for name, part in found.items() if name != "items"}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no report.json of `mmdiff data report`: {error}") from error
    lines = [f'<p class="bad">fails: {text(line)}</p>' for line in failures] or ['<p class="good">passes</p>']
    return ["<h3>Data report</h3>", *lines, table(flat(rest).items())]


def _timings(launches: Sequence[Mapping[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(name for launch in launches for name in launch["seconds"]))
    rows = []
    for launch in launches:
        spent_s = launch["seconds"]
        steps = launch["last_step"] - launch["first_step"]
        training_s = spent_s.get("training steps", 0) + spent_s.get("waiting for data", 0)
        speed = f"{steps / training_s:.3g}" if training_s else ""
        rows.append(
            (
                launch["started"],
                f"{launch['first_step']:,} to {launch['last_step']:,}",
                launch["status"],
                speed,
                *[spent_s.get(name, "") for name in names],
            )
        )
    return [table(rows, ("started", "steps", "end", "steps/s", *[f"{name}, s" for name in names]))]


def _versions(folder: Path, launches: Sequence[Mapping[str, Any]]) -> list[str]:
    last = launches[-1]
    parts = [
        folded("versions", "\n".join(f"{name} {version}" for name, version in last["versions"].items())),
        folded("machine", yaml.safe_dump(last["machine"], sort_keys=False)),
        folded("git", yaml.safe_dump(last["git"], sort_keys=False)),
    ]
    if (folder / DIFF).exists():
        diff = (folder / DIFF).read_text("utf-8", errors="replace")
        parts.append(folded(f"changes since the commit ({DIFF})", diff[:200_000]))
    return parts


def main(args: list[str]) -> int:
    """Makes the HTML report of a run's folder: curves, samples, config, versions, data, timings."""
    parser = Parser("mmdiff report", description=main.__doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="the run's folder, as lightning_logs/version_0")
    parser.add_argument("--data", type=Path, metavar="REPORT", help="of mmdiff data report, to show the data with it")
    given = parser.parse_args(args)
    print(write_report(given.run, given.data))
    return 0
